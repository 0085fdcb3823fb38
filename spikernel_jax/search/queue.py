"""Which cells are scored, unit by unit on disk, and which is the best under a memory budget."""

import dataclasses
import hashlib
import itertools
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from numpy.typing import NDArray

from spikernel_jax.cells.kernels import Kernel
from spikernel_jax.cells.space import CellSpace
from spikernel_jax.io.processes import ALONE, Processes, alone_counter
from spikernel_jax.io.store import ResultStore
from spikernel_jax.io.voice import Moving
from spikernel_jax.scoring.replicates import Scores, over_replicates
from spikernel_jax.snn import network
from spikernel_jax.snn.cost import costs
from spikernel_jax.snn.spec import NetworkSpec, spec_to_json

Part = dict[str, NDArray[Any]]  # "scores" and "lif_calls" of a unit's rows
Waiting = Callable[[], list[Part]]


class NothingFitsError(ValueError):
    """No candidate fits the memory budget."""


STRATEGIES = ("trainings", "halving", "exhaustive", "random")
_LISTS = ("exhaustive", "random")
_UNIT_FLOPS = 2e12  # of a unit: seconds on two cores


class AnyScorer(Protocol):
    """Scores candidates, each of R replicates with a bank and a batch of its own.

    A candidate's result must not depend on those scored beside it, nor on `lanes`.

    Attributes:
      lanes: parts that run side by side in one call, one a local device.
    """

    lanes: int

    def submit(self, replicate: int, parts: Sequence[NDArray[np.int8]]) -> Waiting:
        """Starts scoring 1 to `lanes` parts and returns at once.

        Args:
          replicate: from 0.
          parts: rows [n_i, E] or [n_i, 2, E], n_i at most the size of a chunk.

        Returns:
          A function that waits, and gives for each part its "scores" (float64 [n_i]) and "lif_calls"
          (int64 [n_i]).
        """
        ...

    def order(self, rows: NDArray[np.int8]) -> NDArray[np.int64]:
        """A permutation of rows in which neighbours share work; it depends on the rows alone."""
        ...


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a scoring job is, over all its processes; one replicate of R counts as 1/R of a candidate."""

    done: float  # candidates, those of earlier starts included
    total: int
    seconds: float  # since this start
    scored: float  # candidates since this start
    best: float  # best finite mean over the replicates that a candidate has so far, NaN if there is none
    lost: tuple[int, ...] = ()  # processes that died; what they had not finished is scored again

    @property
    def rate(self) -> float:
        """Candidates a second."""
        return self.scored / max(self.seconds, 1e-9)

    @property
    def left(self) -> float:
        """Seconds left at this rate, infinite before the first result."""
        return (self.total - self.done) / self.rate if self.rate else (np.inf if self.done < self.total else 0.0)


def progress_line(say: Callable[[str], None], name: str = "", every: float = 5.0) -> Callable[[Progress], None]:
    """A function that prints progress as a line, every few seconds and at the end."""
    last = [time.perf_counter()]

    def line(p: Progress) -> None:
        if p.done == p.total or time.perf_counter() - last[0] > every:
            last[0] = time.perf_counter()
            lost = f"  lost processes {', '.join(map(str, p.lost))}" if p.lost else ""
            what = f"{name}  {p.done:.0f}/{p.total}" if name else f"{p.done:.0f}/{p.total}"
            text = f"  {what} cells  {p.rate:.0f}/s  {p.left:.0f} s left  best {p.best:.2f}{lost}"
            known = {"rate": p.rate, "left_seconds": p.left, "best": p.best}
            finite = {name: value for name, value in known.items() if np.isfinite(value)}
            say(Moving(text, done=p.done, of=p.total, lost=p.lost, **finite))

    return line


def candidates(
    space: CellSpace,
    kernel_set: Sequence[Kernel],
    *,
    strategy: str = "exhaustive",
    samples: int = 1000,
    key: jax.Array | None = None,
    fits: Callable[[NDArray[np.int8]], NDArray[np.bool_]] | None = None,
) -> NDArray[np.int8]:
    """Distinct canonical cells to score for one kernel set, as rows of the union space.

    Args:
      space: the union space, which holds every kernel of the set.
      kernel_set: kernels of the set.
      strategy: ``"exhaustive"`` gives every distinct forward cell, ``"random"`` the distinct ones among
        `samples` draws of the reference's sampler.
      samples: number of draws.
      key: for ``"random"``; draws depend on it and the set alone.
      fits: which rows are under the memory budget; the others are ruled out here, before they are scored.

    Returns:
      int8 [n, 6], sorted, no duplicates.

    Raises:
      ValueError: on an unknown strategy, no samples, or a kernel that the space does not have.
    """
    own = space.restricted(kernel_set)
    if strategy not in _LISTS:
        raise ValueError(f"strategy={strategy!r} is unknown; known: {', '.join(_LISTS)}")
    if strategy == "exhaustive":
        rows = space.convert(own.enumerate(), own)
        return rows if fits is None else rows[fits(rows)]
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1")
    if key is None:
        raise ValueError("key: strategy='random' needs one")
    for name in own.operations:
        key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    rows = np.unique(space.convert(own.sample(key, samples), own), axis=0)
    return rows if fits is None else rows[fits(rows)]


class Units:
    """A scoring job cut into units: one replicate of one chunk of the rows, in the scorer's order.

    Unit = replicate · chunks + chunk, so that a process needs one bank of weights at a time.
    """

    def __init__(
        self,
        rows: NDArray[np.int8],
        scorer: AnyScorer,
        folder: Path,
        *,
        seeds: int,
        chunk: int = 64,
        inputs: dict[str, Any],
        processes: Processes = ALONE,
        name: str = "all",
    ):
        """Cuts a job; nothing is scored or written yet.

        Args:
          rows: canonical rows [n, E] or pairs [n, 2, E].
          scorer: scores them.
          folder: where units are kept; on a file system that all processes share.
          seeds: replicates R.
          chunk: rows per unit, which a device takes in one call.
          inputs: all that the scores depend on beside rows, seeds and chunk, for the fingerprint: `inputs_of`, and
            where they came from.
          processes: this process among others.
          name: of this job among those that the processes do together.

        Raises:
          ValueError: on no rows, seeds or chunk.
        """
        for what, value in (("rows", len(rows)), ("seeds", seeds), ("chunk", chunk)):
            if value < 1:
                raise ValueError(f"{what}={value} must be at least 1")
        self.order = np.asarray(scorer.order(rows))
        self.rows, self.scorer, self.folder, self.seeds, self.chunk = rows[self.order], scorer, folder, seeds, chunk
        self.processes, self.name = processes, name
        self.chunks = -(-len(rows) // chunk)
        self.units = self.chunks * seeds
        # Neither devices nor processes are in it: results do not depend on them.
        self.fingerprint = {**inputs, "chunk": chunk, "seeds": seeds, "rows": len(rows), "order": digest(self.rows)}

    def replicate(self, unit: int) -> int:
        """The unit's replicate."""
        return unit // self.chunks

    def where(self, unit: int) -> slice:
        """The unit's place in `rows`."""
        start = unit % self.chunks * self.chunk
        return slice(start, min(start + self.chunk, len(self.rows)))

    def score(self, store: ResultStore, units: list[int], take: Callable[[int], int]) -> Iterator[tuple[int, Part]]:
        """Scores and saves units, as many as `take` gives this process; yields each once it is on disk.

        The devices have their next units before the results of the last ones are written.
        """
        running: tuple[list[int], Waiting] | None = None
        for call in itertools.chain(self._calls(units, take), [None]):
            after = None
            if call:
                after = call, self.scorer.submit(self.replicate(call[0]), [self.rows[self.where(u)] for u in call])
            if running:
                for unit, part in zip(running[0], running[1](), strict=True):
                    store.save(unit, **part)
                    yield unit, part
            running = after

    def _calls(self, units: list[int], take: Callable[[int], int]) -> Iterator[list[int]]:
        lanes = self.scorer.lanes
        while (start := take(lanes)) < len(units):
            for _, together in itertools.groupby(units[start : start + lanes], self.replicate):
                yield list(together)


class _Results:
    """What is known of a job's scores so far."""

    def __init__(self, job: Units):
        self.job = job
        self.units: set[int] = set()
        self.replicates = np.full((len(job.rows), job.seeds), np.nan)
        self.lif_calls = np.zeros(len(job.rows), np.int64)
        self._sums, self._counts = np.zeros(len(job.rows)), np.zeros(len(job.rows), np.int64)

    def add(self, unit: int, part: Part) -> None:
        where = self.job.where(unit)
        self.replicates[where, self.job.replicate(unit)] = part["scores"]
        self.lif_calls[where] = part["lif_calls"]
        with np.errstate(invalid="ignore"):  # a score may be infinite
            self._sums[where] += part["scores"]
        self._counts[where] += 1
        self.units.add(unit)

    def read(self, store: ResultStore) -> None:
        """Adds the units that are on disk and not here."""
        done = store.done()
        if stray := sorted(done - {*range(self.job.units)}):
            raise ValueError(f"{store.folder} holds pieces {stray}, and this job has {self.job.units}: delete those")
        for unit in sorted(done - self.units):
            self.add(unit, store.load(unit))

    @property
    def undone(self) -> list[int]:
        return [unit for unit in range(self.job.units) if unit not in self.units]

    @property
    def done(self) -> float:
        """In candidates."""
        return float(self._counts.sum() / self.job.seeds)

    @property
    def best(self) -> float:
        means = self._sums[self._counts > 0] / self._counts[self._counts > 0]
        return float(means[np.isfinite(means)].max(initial=-np.inf)) if np.isfinite(means).any() else float("nan")

    def scores(self) -> Scores:
        """The scores in the caller's order of rows."""
        back = np.argsort(self.job.order)
        return over_replicates(self.replicates[back], self.lif_calls[back])


def score_units(job: Units, *, last: bool = True, progress: Callable[[Progress], None] | None = None) -> Scores:
    """Scores rows with common random numbers; every finished unit is on disk and is not scored again.

    With several processes this is what the first one calls, and `score_share` the others: each takes the next units as
    it gets done with its last ones. What a process that died had taken is scored here in the end.

    Args:
      job: what is scored.
      last: whether it is the last job, after which the other processes leave. After any other, this process
        scores what is left itself instead of waiting for them.
      progress: called after every unit, and now and then while others are waited for.

    Returns:
      Scores of all rows, in the order in which `Units` was given them.

    Raises:
      ValueError: if the folder holds results of other rows or inputs, or a damaged one; nothing is scored then.
    """
    store = ResultStore(job.folder, job.fingerprint)
    store.sweep()
    results = _Results(job)
    results.read(store)
    before, began, looked, lost = results.done, time.perf_counter(), time.perf_counter(), ()
    processes = job.processes

    def report() -> None:
        if progress:
            seconds = time.perf_counter() - began
            progress(Progress(results.done, len(job.rows), seconds, results.done - before, results.best, lost))

    def look() -> None:
        results.read(store)
        report()

    undone = results.undone
    processes.tell(f"{job.name}/undone", _runs(undone))
    for unit, part in job.score(store, undone, processes.counter(f"{job.name}/units")):
        results.add(unit, part)
        if processes.count > 1 and time.perf_counter() - looked > 2:
            results.read(store)
            looked = time.perf_counter()
        report()
    if processes.count > 1 and last:
        lost = processes.wait_for_others(look)
        look()
    while processes.count > 1 and results.undone:
        look()
        for unit, part in job.score(store, results.undone[: job.scorer.lanes], alone_counter()):
            results.add(unit, part)
            report()
    return results.scores()


def score_share(job: Units) -> int:
    """Scores this process's share of what the first one scores by `score_units`, of the same job.

    Returns:
      The number of units scored.

    Raises:
      ValueError: if the inputs are not those of the first process, or its folder is not seen here.
    """
    undone = [unit for start, stop in job.processes.hear(f"{job.name}/undone") for unit in range(start, stop)]
    store = ResultStore.join(job.folder, job.fingerprint)
    return sum(1 for _ in job.score(store, undone, job.processes.counter(f"{job.name}/units")))


def _runs(values: Sequence[int]) -> list[tuple[int, int]]:
    """Increasing values as runs (start, stop): short, where they are many and few are missing."""
    runs = (list(run) for _, run in itertools.groupby(enumerate(values), lambda pair: pair[1] - pair[0]))
    return [(run[0][1], run[-1][1] + 1) for run in runs]


def inputs_of(
    spec: NetworkSpec, score: str, precision: str, bank: network.Params, images: NDArray[np.float32]
) -> dict[str, Any]:
    """What scores depend on, for a fingerprint; bank and images by a digest."""
    return {"spec": spec_to_json(spec), "score": score, "precision": precision, "inputs": digest(bank, images)}


def unit_rows(spec: NetworkSpec, batch: int) -> int:
    """Rows per unit: a power of 2 from 16 to 256, by what a candidate costs, so that a unit takes seconds."""
    h, w = spec.cell_size(0)
    operations = map(spec.space.operation, range(spec.space.num_ops))
    largest = max(operation.weights(spec.channels) for operation in operations)
    flops = 2 * spec.time_steps * batch * h * w * (18 * spec.channels**2 + 2 * largest)
    return int(2 ** np.clip(np.round(np.log2(_UNIT_FLOPS / flops)), 4, 8))


def digest(*trees: Any) -> str:
    """A fingerprint of all arrays in trees."""
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(trees):
        array = np.ascontiguousarray(leaf)
        total.update(f"{array.shape}{array.dtype}".encode() + array.tobytes())
    return total.hexdigest()[:16]


def best_under_budget(scores: NDArray[np.float64], memory: NDArray[np.int64], budget: int | None) -> int | None:
    """Index of the highest finite score among candidates within the budget; ties go to less memory.

    Args:
      scores: [n].
      memory: bytes [n].
      budget: bytes, None for no limit.

    Returns:
      The index, or None where no candidate with a finite score fits.
    """
    possible = np.isfinite(scores)
    if budget is not None:
        possible &= memory <= budget
    if not possible.any():
        return None
    return int(np.lexsort((memory, -np.where(possible, scores, -np.inf), ~possible))[0])


def memory_of(spec: NetworkSpec, rows: NDArray[np.int8], bits: int) -> NDArray[np.int64]:
    """Bytes of each candidate at the width it would be trained with."""
    return costs(spec, rows, bits).memory_bytes
