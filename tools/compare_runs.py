"""What differs between two runs: settings, versions, devices, tables column by column, weights.

Use: ``python tools/compare_runs.py A B``. Lines that begin with "same" or "differs"; exit status 1 where a table or a
weight differs by more than ``--tolerance`` (relative to the larger value), else 0.
"""

import dataclasses
import math
import sys
from pathlib import Path

import jax
import numpy as np
import polars as pl
import tyro

from spikernel_jax.io import files
from spikernel_jax.io.run_folder import RunFolder
from spikernel_jax.pipeline import cli
from spikernel_jax.training.checkpoint import load_model

_TIMES = ("seconds", "checkpoint")  # columns that may differ: how long it took, and where it lies


@dataclasses.dataclass(frozen=True)
class Options:
    """Which runs, and how near is the same."""

    runs: tyro.conf.Positional[tuple[Path, Path]]
    """Two folders of runs."""
    tolerance: float = 0.0
    """Largest relative difference of numbers that are still the same."""


def largest_difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference of two arrays of one shape, relative to the larger value; NaN equals NaN."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    both_nan = np.isnan(a) & np.isnan(b)
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = np.abs(a - b) / np.maximum(np.abs(a), np.abs(b))
    relative = np.where((a == b) | both_nan, 0.0, relative)
    return float(np.where(np.isnan(relative), math.inf, relative).max(initial=0.0))


def compare_tables(a: pl.DataFrame, b: pl.DataFrame) -> tuple[float, str]:
    """The largest relative difference of two tables, and what is to be said of it."""
    names = [name for name in a.columns if name not in _TIMES]
    if names != [name for name in b.columns if name not in _TIMES]:
        return math.inf, f"columns {sorted({*a.columns} ^ {*b.columns})} are in one alone, or in another order"
    if len(a) != len(b):
        return math.inf, f"{len(a)} rows and {len(b)}"
    worst: dict[str, float] = {}
    for name in names:
        if a[name].dtype.is_numeric() and b[name].dtype.is_numeric():
            values = (own[name].cast(pl.Float64).to_numpy() for own in (a, b))
            worst[name] = largest_difference(*values)
        else:
            worst[name] = 0.0 if a[name].equals(b[name], null_equal=True) else math.inf
    differing = {name: value for name, value in worst.items() if value}
    text = ", ".join(f"{name} by {value:.1e}" if value < math.inf else name for name, value in differing.items())
    return max(worst.values(), default=0.0), text or f"{len(a)} rows"


def compare_models(a: Path, b: Path) -> tuple[float, str]:
    """The largest relative difference of two models' weights and statistics, and what is to be said of it."""
    one, other = load_model(a), load_model(b)
    if (one.spec, one.genotype) != (other.spec, other.genotype):
        return math.inf, f"{one.text} and {other.text}, or networks of other sizes"
    leaves = [jax.tree.leaves((model.params, model.stats)) for model in (one, other)]
    scale = max(float(np.abs(leaf).max(initial=0.0)) for leaf in map(np.asarray, leaves[0]))
    gap = max(float(np.abs(np.asarray(x) - np.asarray(y)).max(initial=0.0)) for x, y in zip(*leaves, strict=True))
    return gap / scale if scale else gap, f"by {gap:.1e}, where the largest weight is {scale:.1e}" if gap else one.text


def compare(a: RunFolder, b: RunFolder, tolerance: float) -> tuple[list[str], bool]:
    """Lines of what differs, and whether tables and weights are the same within the tolerance."""
    lines, alike = [], True

    def note(what: str, differing: list[str]) -> None:
        lines.append(f"differs  {what}: {'; '.join(differing)}" if differing else f"same     {what}")

    note("configuration", files.differences(a.config, b.config))
    environments = [run.record()["environment"] for run in (a, b)]
    for name in ("versions", "device", "python", "git"):
        before, after = ({name: environment[name]} for environment in environments)
        note(name, files.differences(before, after))
    tables: list[set[str]] = [{path.stem for path in (run.path / "tables").glob("*.parquet")} for run in (a, b)]
    models: list[set[str]] = [
        {str(path.parent.relative_to(run.path)) for path in run.path.glob("finalists/*/checkpoint")} for run in (a, b)
    ]
    found: list[tuple[str, float, str]] = [
        (f"table {name}", *compare_tables(*(run.read_table(name, "the step that makes it") for run in (a, b))))
        for name in sorted(tables[0] & tables[1])
    ]
    found += [
        (f"model {name}", *compare_models(*(run.path / name / "checkpoint" for run in (a, b))))
        for name in sorted(models[0] & models[1])
    ]
    found += [(name, math.inf, "in one run alone") for own in (tables, models) for name in sorted(own[0] ^ own[1])]
    for what, value, text in found:
        lines.append(f"{'differs' if value > tolerance else 'same   '}  {what}: {text}")
        alike &= value <= tolerance
    return lines, alike


def main(options: Options) -> None:
    """Prints what differs."""
    if not options.tolerance >= 0:
        raise ValueError(f"--tolerance {options.tolerance} must be at least 0")
    lines, alike = compare(RunFolder.open(options.runs[0]), RunFolder.open(options.runs[1]), options.tolerance)
    print("\n".join(lines))
    if not alike:
        sys.exit(1)


if __name__ == "__main__":
    cli.main(Options, main, __doc__ or "")
