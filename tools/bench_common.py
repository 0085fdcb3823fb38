"""What the benchmarks share: options, ceilings, tables and results; of scoring, a population made ready and timed."""

import dataclasses
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from numpy.typing import NDArray

import ceilings
from spikernel_jax.cells.kernels import size_set
from spikernel_jax.cells.space import CellSpace
from spikernel_jax.io import files, run_folder
from spikernel_jax.scoring import engine
from spikernel_jax.scoring.bank import make_bank
from spikernel_jax.scoring.scorer import Scorer
from spikernel_jax.snn import network
from spikernel_jax.snn.spec import NetworkSpec
from work import Work, necessary_work

Rows = NDArray[np.int8]
PROGRAMS = ("jit_prepare", "jit_score_groups", "jit_score_each", "jit_tile_groups", "jit_tile_each")  # of a scorer
Options = TypeVar("Options")


def filled(
    options: Options, defaults: Mapping[str, tuple[Any, Any]], platform: str, zero: Sequence[str] = ()
) -> Options:
    """Options with every default filled in.

    Args:
      options: a frozen dataclass with `quick`, `matmul_side` and `json`.
      defaults: of options that are None, in full and quick; `matmul_side` may have none, then it is the platform's.
      platform: of the devices, ``"cpu"`` or another.
      zero: options that may be 0, besides `seed`.

    Returns:
      The options.

    Raises:
      ValueError: where a number is too small, or there is no folder for the results.
    """
    given: Any = options
    chosen = {name: pair[given.quick] for name, pair in defaults.items() if getattr(given, name) is None}
    full = dataclasses.replace(given, **chosen)
    if full.matmul_side is None:
        full = dataclasses.replace(full, matmul_side=3072 if platform == "cpu" else 8192)
    for field in dataclasses.fields(full):
        value = getattr(full, field.name)
        least = 0 if isinstance(value, bool) or field.name in ("seed", *zero) else 1
        flag = f"--{field.name.replace('_', '-')} {value}"
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(number, int) and number < least for number in numbers):
            raise ValueError(f"{flag}: want whole numbers of at least {least}")
        if any(isinstance(number, float) and not 0 < number < float("inf") for number in numbers):
            raise ValueError(f"{flag}: want finite numbers above 0")
    if full.json and not full.json.resolve().parent.is_dir():
        raise ValueError(f"--json {full.json}: want a file in a folder that is there")
    return full


def processor() -> str:
    """Name of the CPU, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def parse_set(text: str) -> CellSpace:
    """The cells of a kernel set, or of all pairs of more than two sizes."""
    sizes = size_set(text, "--sets")
    return CellSpace(sizes, max_kernel_sizes=2 if len(sizes) > 2 else None)


class Settings(NamedTuple):
    """What all sections of a benchmark share."""

    options: Any  # Options without None, but for json
    devices: list[Any]
    ceilings: ceilings.Ceilings

    def network(self, space: CellSpace, channels: int | None = None, **fields: Any) -> NetworkSpec:
        """The network that is scored."""
        options = self.options
        shape = (options.side, options.side, 3)
        return NetworkSpec(
            shape, 10, space, channels=channels or options.channels, time_steps=options.time_steps, **fields
        )

    def measured_again(self) -> "Settings":
        """With ceilings measured now, where they are better than those so far."""
        options = self.options
        found = ceilings.measure(self.devices, options.matmul_side, options.bandwidth_mb, options.repeats)
        say(f"ceilings: {found.float32 / 1e9:.0f} GFLOP/s in float32, {found.bandwidth / 1e9:.1f} GB/s")
        return self._replace(ceilings=ceilings.Ceilings(*map(max, found, self.ceilings)))

    def ceiling(self, precision: str) -> float:
        """FLOP/s of products in that precision."""
        return self.ceilings.bfloat16 if precision == "bfloat16" else self.ceilings.float32


Section = Callable[[Settings], tuple[dict[str, Any], str]]  # results, and their tables


def report(title: str, script: str, began: float, settings: Settings, sections: Mapping[str, Section]) -> None:
    """Runs sections, prints their tables, and writes all results so far after each.

    Args:
      title: heading of the report.
      script: the file that was run.
      began: `time.perf_counter` at the start of the run.
      settings: options (with `json`, where results go, or None) and devices.
      sections: by name; what each finds is written under its name, without one ("") at the top.
    """
    arguments = [Path(text).name if os.path.isabs(text) else text for text in sys.argv[1:]]
    command = ["python", f"tools/{Path(script).name}", *arguments]
    environment = run_folder.environment() | {"processor": processor(), "command": command}
    results: dict[str, Any] = {
        "environment": environment,
        "options": dataclasses.asdict(dataclasses.replace(settings.options, json=None)),
        "ceilings": settings.ceilings._asdict(),
    }
    device, versions = environment["device"], environment["versions"]
    print(
        f"## {title}\n\n`{' '.join(command)}`: commit {run_folder.commit_text(environment)}, "
        f"{environment['created'][:10]}, jax {versions['jax']}, {device['count']} {device['kind']} devices, "
        f"{environment['processor']}, {environment['cpus']} cores.\n",
        flush=True,
    )
    for name, measure in sections.items():
        entry, text = measure(settings)
        results |= {name: entry} if name else entry
        print(f"{text}\n", flush=True)
        results["seconds"] = time.perf_counter() - began
        if path := settings.options.json:
            with files.atomic_path(path) as new:
                new.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", "utf-8")
    print(f"Measured in {time.perf_counter() - began:.0f} s.")


def sample_groups(rows: Rows, cells: int, rng: np.random.Generator) -> Rows:
    """Whole groups of rows [n, E] that agree on nodes 1 and 2, drawn until there are about so many rows.

    Args:
      rows: distinct cells.
      cells: how many; the draw stops where the next group would lead farther away, and has one group at least.
      rng: draws.

    Returns:
      Rows of the groups in `engine.order`.
    """
    rows = rows[engine.order(np.stack([rows, rows], 1))]
    prefix = rows[:, engine.PREFIX]
    starts = np.flatnonzero(np.r_[True, (prefix[1:] != prefix[:-1]).any(1)])
    groups = np.split(np.arange(len(rows)), starts[1:])
    taken: list[NDArray[Any]] = []
    total = 0
    for index in rng.permutation(len(groups)):
        size = len(groups[index])
        if taken and abs(total + size - cells) >= abs(total - cells):
            break
        taken.append(groups[index])
        total += size
    return rows[np.sort(np.concatenate(taken))]


def representative(spec: NetworkSpec, cells: int, seed: int) -> Rows:
    """Of fifty samples of whole groups one whose candidates' necessary FLOPs are, in the mean, near those of all."""

    def mean(rows: Rows) -> float:
        return necessary_work(spec, rows, 1).flops / len(rows)

    everything = spec.space.enumerate()
    samples = [sample_groups(everything, cells, np.random.default_rng([seed, draw])) for draw in range(50)]
    target = mean(everything)
    return min(samples, key=lambda rows: abs(mean(rows) / target - 1) + 0.2 * abs(len(rows) / cells - 1))


def split(rows: Rows, costs: Sequence[float], lanes: int) -> list[Rows]:
    """Rows in `lanes` runs of about equal cost; a run may be empty."""
    done = np.r_[0, np.cumsum(costs)]
    targets = done[-1] * np.arange(1, lanes) / lanes
    return np.split(rows, np.abs(done - targets[:, None]).argmin(1))


def costs(spec: NetworkSpec, rows: Rows, batch: int, limits: ceilings.Ceilings) -> list[float]:
    """Least seconds that each of ordered rows adds to those before it."""
    works = [necessary_work(spec, rows[:n], batch) for n in range(len(rows) + 1)]
    seconds = [work.flops / limits.float32 + work.bytes / limits.bandwidth for work in works]
    return np.diff(seconds).tolist()


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; floats have three significant digits."""

    def text(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    lines = [header, ["---"] * len(header), *[[text(value) for value in row] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def say(text: str) -> None:
    """A line of progress."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


def seconds_of(call: Callable[[], Any]) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def random_bank(spec: NetworkSpec, seeds: int, seed: int) -> network.Params:
    """What has the shapes of `make_bank`'s banks, drawn by NumPy: nothing to compile, and as good to be timed."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> NDArray[np.float32]:
        if path[-1].key == "kernel":
            fan_in = np.prod(leaf.shape[1:-1])
            return (rng.normal(size=leaf.shape) / fan_in**0.5).astype(np.float32)
        return np.full(leaf.shape, path[-1].key == "scale", np.float32)

    shapes = jax.eval_shape(lambda key: make_bank(key, spec, seeds), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


class Bench:
    """A population that is ready to be ranked again and again: compiled, cut into one part a lane."""

    def __init__(
        self,
        settings: Settings,
        spec: NetworkSpec,
        rows: Rows,
        *,
        lanes: int | None = None,
        score: str = "sahd_paper",
        chunk: int | None = None,
        method: str | None = None,
    ):
        """Compiles for parts of `chunk` rows (None: as many as needed) on the first `lanes` devices (None: all)."""
        options = settings.options
        self.settings, self.spec, self.rows, self.batch = settings, spec, rows, options.batch
        devices = settings.devices[:lanes]
        self.parts = self.cut(rows, len(devices))
        self.bank = random_bank(spec, 2, options.seed)
        rng = np.random.default_rng(options.seed)
        self.images = rng.normal(size=(2, options.batch, *spec.image_shape)).astype(np.float32)
        chunk = chunk or max(map(len, self.parts))
        self.scorer = Scorer(self.bank, self.images, spec, score=score, chunk=chunk, devices=devices, method=method)
        self.replicate = 1
        first, second = (seconds_of(lambda: self.run([part[:1] for part in self.parts])) for _ in range(2))
        self.compile_seconds = first - second

    def cut(self, rows: Rows, lanes: int) -> list[Rows]:
        """Ordered rows as parts of equal cost."""
        if lanes == 1:
            return [rows]
        return split(rows, costs(self.spec, rows, self.batch, self.settings.ceilings), lanes)

    @property
    def work(self) -> Work:
        """Necessary work of one replicate."""
        return necessary_work(self.spec, self.rows, self.batch)

    def run(self, parts: list[Rows] | None = None) -> list[dict[str, NDArray[Any]]]:
        """One replicate, the other one than last time, so that its shared work is computed in every call."""
        self.replicate = 1 - self.replicate
        return self.scorer.submit(self.replicate, parts or self.parts)()

    def seconds(self, repeats: int) -> list[float]:
        """Times of one replicate."""
        return [seconds_of(self.run) for _ in range(repeats)]
