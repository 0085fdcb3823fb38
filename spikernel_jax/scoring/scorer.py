"""Scores chunks of candidates on all local devices, by one of several ways that give the same scores up to rounding.

Candidate i's result does not depend on which others ran, on how many devices, or beside whom.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import ArrayLike, NDArray

from spikernel_jax.data import check_images
from spikernel_jax.scoring import batched, engine
from spikernel_jax.scoring.bank import seeds_of
from spikernel_jax.scoring.room import Device, free_bytes, lanes_that_fit, table_bytes, tile_that_fits
from spikernel_jax.scoring.scores import get_score, scored_spec
from spikernel_jax.snn import network
from spikernel_jax.snn.cost import pairs
from spikernel_jax.snn.spec import NetworkSpec

Array = jax.Array
Result = TypeVar("Result")

METHODS = ("shared", "batched", "each")
PRECISIONS = ("float32", "bfloat16")
LARGEST_CHUNK = 256


def _has_bfloat16(device: Device) -> bool:
    """Whether convolutions in bfloat16 are faster there than in float32; on CPUs they are not."""
    capability = float(getattr(device, "compute_capability", None) or 0) if device.platform == "gpu" else 0
    return device.platform == "tpu" or capability >= 8


class _Programs(NamedTuple):
    """The compiled programs of one set of devices; all but `prepare` run lane by lane."""

    prepare: Callable[..., engine.Shared]
    score_groups: Callable[..., tuple[Array, Array]]
    score_each: Callable[..., tuple[Array, Array]]
    tile_groups: Callable[..., tuple[Array, Array]]
    tile_each: Callable[..., tuple[Array, Array]]


@functools.cache
def _programs(mesh: Mesh) -> _Programs:
    """Each program has its function's name, by which a profile tells them apart."""

    def by_lane(body: Callable[..., Any]) -> Callable[..., Any]:
        """Runs body on every device with its own row of the arguments after the first two."""

        @functools.wraps(body)
        def run(program: engine.Program, *args: Any) -> Any:
            def lane(*args: Any) -> Any:
                own = jax.tree.map(lambda leaf: leaf[0], args[2:])
                return jax.tree.map(lambda leaf: leaf[None], body(program, *args[:2], *own))

            specs = (P(), P()) + (P("lanes"),) * (len(args) - 2)
            return jax.shard_map(lane, mesh=mesh, in_specs=specs, out_specs=P("lanes"), check_vma=False)(*args)

        return jax.jit(run, static_argnums=0)

    return _Programs(
        jax.jit(engine.prepare, static_argnums=0, out_shardings=NamedSharding(mesh, P())),
        *map(by_lane, (engine.score_groups, engine.score_each, batched.tile_groups, batched.tile_each)),
    )


def _ladder(method: str, program: engine.Program, batch: int) -> Iterator[tuple[str, engine.Program, str]]:
    """Ways to score, each of which needs less memory than the one before: method, program, and what to say of it."""
    spec = program.spec
    yield method, program, ""
    while method == "batched" and program.tile > 1:
        less = next(n for n in range(program.tile // 2, 0, -1) if program.tile % n == 0)
        why = f"out of memory with {program.tile} candidates side by side: going on with {less}"
        program = dataclasses.replace(program, tile=less)
        yield method, program, why
    if method != "each" and not spec.space.feedback:
        tables = table_bytes(spec, batch) / 2**20
        why = f"out of memory with tables of shared work ({tables:.0f} MiB per device): going on without them"
        yield "each", program, why
    if program.steps > 1 and spec.norm == "per_step" and not spec.space.feedback:
        why = f"out of memory with all {spec.time_steps} time steps together: going on step by step"
        yield "each", dataclasses.replace(program, steps=1), why


class Scorer:
    """Scores candidates on all local devices, each replicate with a bank and a batch of its own.

    Memory does not grow with the number of candidates: they run one after another on a device, or tile by tile. What
    can outgrow it are a tile, the tables of shared work, and the activations of all time steps together. Where they
    do, the scorer says so, and goes on with smaller tiles, without tables, then with one time step at a time.

    Attributes:
      lanes: parts that run side by side in one call, one a device.
      chunk: largest number of rows of a part.
      method: ``"shared"``, ``"batched"`` or ``"each"``.
      precision: ``"float32"`` or ``"bfloat16"``.
      seeds: R.
    """

    def __init__(
        self,
        bank: network.Params,
        images: ArrayLike,
        spec: NetworkSpec,
        *,
        score: str = "sahd_paper",
        method: str | None = None,
        precision: str | None = None,
        steps: int | None = None,
        chunk: int = LARGEST_CHUNK,
        tile: int | None = None,
        devices: Sequence[Device] | None = None,
        say: Callable[[str], None] = lambda _: None,
    ):
        """Arguments as those of `score_population`; `say` prints a line."""
        get_score(score)
        spec = scored_spec(spec)
        self.seeds = seeds_of(bank, spec)
        batches = np.asarray(images)
        batches = np.broadcast_to(batches, (self.seeds, *batches.shape)) if batches.ndim == 4 else batches
        if batches.ndim != 5 or len(batches) != self.seeds or batches.shape[2:] != spec.image_shape:
            raise ValueError(
                f"images have shape {np.shape(images)}; want [{self.seeds}, B, *{spec.image_shape}] "
                f"for {self.seeds} banks"
            )
        if batches.dtype == np.uint8:
            raise ValueError("images are uint8; want normalised ones (spikernel_jax.data.normalise)")
        check_images(batches.reshape(-1, *spec.image_shape))
        found = jax.local_devices() if devices is None else list(devices)
        one_memory = found[0].platform == "cpu"
        if method is None:
            lanes = lanes_that_fit(len(found), table_bytes(spec, batches.shape[1]), free_bytes(found[0]), one_memory)
            method = "shared" if lanes and not spec.space.feedback else "each"
            found = found[:lanes] if method == "shared" else found
        if precision is None:
            precision = "bfloat16" if _has_bfloat16(found[0]) else "float32"
        for name, value, known in (("method", method, METHODS), ("precision", precision, PRECISIONS)):
            if value not in known:
                raise ValueError(f"{name}={value!r} is unknown; known: {', '.join(known)}")
        if method == "shared" and spec.space.feedback:
            raise ValueError("method='shared': feedback cells share no work; give method='each'")
        if steps is None:  # one step's activations may fit a CPU's cache; an accelerator wants large kernels
            alone = method != "batched" and spec.norm == "per_step"
            steps = 1 if found[0].platform == "cpu" and alone else spec.time_steps
        if steps < 1 or spec.time_steps % steps or (spec.norm == "over_time" and steps < spec.time_steps):
            raise ValueError(f"steps={steps} must divide T={spec.time_steps}, and be T for norm='over_time'")
        if chunk < 1:
            raise ValueError(f"chunk={chunk} must be at least 1")
        if method != "batched":
            if tile not in (None, 1):
                raise ValueError(f"tile={tile}: candidates go one after another; give method='batched'")
            tile = 1
        elif steps < spec.time_steps:
            raise ValueError(f"steps={steps}: a batch of candidates goes through all {spec.time_steps} together")
        if tile is None:
            room = free_bytes(found[0]) // (len(found) if one_memory else 1)
            room -= 0 if spec.space.feedback else table_bytes(spec, batches.shape[1])
            tile = tile_that_fits(spec, batches.shape[1], room, chunk)
        if tile < 1 or chunk % tile:
            raise ValueError(f"tile={tile} must divide chunk={chunk}")
        self.precision, self.chunk, self.lanes = precision, chunk, len(found)
        program = engine.Program(spec, score, steps, precision == "bfloat16", tile)
        self._ladder = _ladder(method, program, batches.shape[1])
        self.method, self._program, _ = next(self._ladder)
        self._mesh = Mesh(np.array(found), ("lanes",))
        self._bank, self._batches, self._say = bank, batches, say
        self._replicate: tuple[int, Any] | None = None

    @property
    def tile(self) -> int:
        """Candidates that go through the network side by side."""
        return self._program.tile

    @property
    def _grouped(self) -> bool:
        """Whether candidates share work in cell 1."""
        return self.method != "each" and not self._program.spec.space.feedback

    def order(self, rows: NDArray[np.int8]) -> NDArray[np.int64]:
        """A permutation of rows in which neighbours share work; it depends on the rows alone."""
        return engine.order(pairs(rows))

    def submit(self, replicate: int, parts: Sequence[NDArray[np.int8]]) -> Callable[[], list[dict[str, NDArray[Any]]]]:
        """Starts scoring 1 to `lanes` parts and returns at once.

        Args:
          replicate: from 0.
          parts: rows [n_i, E] or [n_i, 2, E], n_i at most `chunk`.

        Returns:
          A function that waits, and gives for each part its "scores" (float64 [n_i]) and "lif_calls"
          (int64 [n_i]).

        Raises:
          ValueError: if the memory does not hold one candidate; of the waiting function, too.
        """
        wait = self._attempt(lambda: self._start(replicate, parts))
        way = self._program

        def waiting() -> list[dict[str, NDArray[Any]]]:
            try:
                return wait()
            except jax.errors.JaxRuntimeError as error:  # started, it may still run out of memory
                self._lower(error, way)
            return self._attempt(lambda: self._start(replicate, parts)())

        return waiting

    def _attempt(self, call: Callable[[], Result]) -> Result:
        """The call's result, by the first way down the ladder that the memory is large enough for."""
        while True:
            try:
                return call()
            except jax.errors.JaxRuntimeError as error:
                self._lower(error, self._program)

    def _lower(self, error: Exception, way: engine.Program) -> None:
        """Goes one way down from that which failed; raises the error if it is of another kind, or nothing is left."""
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
            raise error
        if way is not self._program:  # what was started before has gone down already
            return
        below = next(self._ladder, None)
        if below is None:
            spec, batch = way.spec, self._batches.shape[1]
            raise ValueError(
                f"out of memory with one candidate at a time: C={spec.channels}, B={batch}, T={spec.time_steps} are "
                "too large for this device; give a lower fidelity, or a smaller batch or width"
            ) from error
        self.method, self._program, why = below
        self._replicate = None  # with its tables of shared work
        self._say(why)

    def _start(self, replicate: int, parts: Sequence[NDArray[np.int8]]) -> Callable[[], list[dict[str, NDArray[Any]]]]:
        spec = self._program.spec
        programs, tiles = _programs(self._mesh), self._program.tile > 1
        bank, images, shared = self._drawn(replicate)
        lanes = [*map(pairs, parts)] + [pairs(parts[0])[:0]] * (self.lanes - len(parts))
        if self._grouped:
            groups = [engine.group(rows, self.chunk, spec.space.num_ops) for rows in lanes]
            score = programs.tile_groups if tiles else programs.score_groups
            result = score(self._program, shared, bank, jax.tree.map(lambda *leaves: np.stack(leaves), *groups))
        else:
            padded = np.stack([engine.padded(rows, self.chunk) for rows in lanes])
            counts = np.array([len(rows) for rows in lanes], np.int32)
            score = programs.tile_each if tiles else programs.score_each
            result = score(self._program, bank, images, padded, counts)

        def wait() -> list[dict[str, NDArray[Any]]]:
            scores, calls = (np.asarray(leaf) for leaf in result)
            return [
                {"scores": scores[lane, :n].astype(np.float64), "lif_calls": calls[lane, :n].astype(np.int64)}
                for lane, n in enumerate(map(len, parts))
            ]

        return wait

    def _drawn(self, replicate: int) -> tuple[network.Params, Array, engine.Shared | None]:
        """Bank, batch and shared work of a replicate, on all devices; those of one replicate are kept."""
        if self._replicate is None or self._replicate[0] != replicate:
            self._replicate = None  # so that the last one's memory is free
            everywhere = NamedSharding(self._mesh, P())
            bank = jax.device_put(jax.tree.map(lambda leaf: leaf[replicate], self._bank), everywhere)
            images = jax.device_put(jnp.asarray(self._batches[replicate]), everywhere)
            prepare = _programs(self._mesh).prepare
            shared = prepare(self._program, bank, images) if self._grouped else None
            self._replicate = replicate, (bank, images, shared)
        return self._replicate[1]
