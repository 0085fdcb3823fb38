"""What a run's folder holds for its page: tables, curves, what each cell weighs; and what is missing or damaged."""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spikernel_jax.cells.space import CellSpace
from spikernel_jax.data import dataset_info
from spikernel_jax.io.run_folder import RunFolder
from spikernel_jax.snn import devices
from spikernel_jax.snn.cost import costs, most_synaptic_operations
from spikernel_jax.snn.rounding import BITS
from spikernel_jax.snn.spec import NetworkSpec

if TYPE_CHECKING:
    import polars as pl

REPORT = "report.md"
WIDTHS = (2, 3, 4, 6, 8, 16, 32)  # bits of weights, membranes and activations that a page can count memory at

# What each table must have, and the script that makes it.
TABLES: dict[str, tuple[str, tuple[str, ...]]] = {
    "impact": (
        "experiments/kernel_impact.py",
        ("kernel", "seed", "accuracy", "parameters", "memory_bytes", "synops", "energy_nj"),
    ),
    "search": (
        "experiments/search.py",
        (
            "kernel_set", "genotype", "score", "score_se_paired", "fidelity", "search_epochs", "search_validation",
            "conv_edges", "memory_bytes", "fits", "finalist",
        ),
    ),
    "tradeoff": (
        "experiments/tradeoff.py",
        (
            "name", "role", "kernel_set", "genotype", "n", "validation_accuracy", "test_accuracy", "test_sd",
            "parameters", "synops", "energy_nj", "memory_bytes", "on_front", "chosen",
        ),
    ),
    "activity": ("experiments/tradeoff.py", ("site", "time_step", "spikes", "neurons", "rate", "images")),
}  # fmt: skip


# Of trainings that are compared, of one, and of one over several seeds.
_LOGS = ("trainings/*/metrics.jsonl", "training/metrics.jsonl", "*/training/metrics.jsonl")


@dataclasses.dataclass(frozen=True)
class Found:
    """What there is of a run.

    Attributes:
      path: its folder.
      record: configuration and environment (`RunFolder.record`).
      summary: of ``summary.json``; empty where there is none.
      tables: by name, those of `TABLES` that are there and whole.
      missing: why another one is not drawn, by name.
      curves: epochs of each training by its name.
      others: by name, tables that are there and whole and none of `TABLES`.
      report: what the run wrote in words; None where it has not.
      of_steps: whether it is a run of the four steps; else it is another study's.
    """

    path: Path
    record: Mapping[str, Any]
    summary: Mapping[str, Any]
    tables: "Mapping[str, pl.DataFrame]"
    missing: Mapping[str, str]
    curves: Mapping[str, list[dict[str, Any]]]
    others: "Mapping[str, pl.DataFrame]"
    report: str | None
    of_steps: bool

    @property
    def title(self) -> str:
        """Data set, preset and seed; of another study, its folder's name too."""
        config = self.record["config"]
        words = {"data": "", "preset": "", "seed": "seed "}
        parts = [f"{word}{config[name]}" for name, word in words.items() if name in config]
        return ", ".join(parts if self.of_steps else [self.path.resolve().name, *parts])

    @functools.cached_property
    def space(self) -> CellSpace:
        """A space that holds all cells of the tables; ValueError where one of them is none."""
        columns = [table["genotype"].to_list() for table in self.tables.values() if "genotype" in table.columns]
        edges = [edge for text in itertools.chain.from_iterable(columns) for edge in text.split()]
        names = dict.fromkeys(edge.partition(":")[2] for edge in edges)
        back = any(edge[:1] > edge[2:3] for edge in edges)
        return CellSpace(operations=tuple(dict.fromkeys(("zero", "skip", *names))), feedback=back)

    @functools.cached_property
    def _numbers(self) -> dict[Any, int]:
        return {}

    @functools.cached_property
    def _parsed(self) -> dict[str, NDArray[np.int8]]:
        return {}

    def _rows(self, genotypes: Sequence[str]) -> NDArray[np.int8]:
        """Cells [n, E], each text read once; ValueError where one is no cell."""
        for text in genotypes:
            if text not in self._parsed:
                self._parsed[text] = self.space.parse(text)
        return np.stack([self._parsed[text] for text in genotypes])

    def functions(self, genotypes: Sequence[str]) -> NDArray[np.int32]:
        """Numbers of cells, equal for those that are the same function; for equal texts alone where one is no cell."""
        names: Sequence[Any] = genotypes
        try:
            rows = self.space.canonical(self._rows(genotypes))
            names = self.space.identity(rows).tolist()
        except ValueError:
            pass
        return np.array([self._numbers.setdefault(name, len(self._numbers)) for name in names], np.int32)

    def _networks(self, genotypes: Sequence[str]) -> tuple[NetworkSpec, NDArray[np.int8]] | None:
        """The network as it was trained, and the cells; None where settings or texts do not tell."""
        config = self.record["config"]
        try:
            info = dataset_info(config["data"])
            sizes = {
                name: config["settings"][name] for name in ("channels", "time_steps", "stem_stride", "head", "dropout")
            }
            spec = NetworkSpec(info.image_shape, info.num_classes, self.space, **sizes)
            return spec, self._rows(genotypes)
        except (ValueError, KeyError, TypeError):
            return None

    def memory(self, genotypes: Sequence[str]) -> dict[int, NDArray[np.int64]]:
        """Bytes of each cell by width in bits; empty where the run's network is not known from its settings."""
        networks = self._networks(genotypes)
        return {bits: costs(*networks, bits).memory_bytes for bits in WIDTHS} if networks else {}

    def most_synops(self, genotypes: Sequence[str]) -> NDArray[np.float64]:
        """Synaptic operations of each cell if all neurons fired; NaN where the run's network is not known."""
        networks = self._networks(genotypes)
        return most_synaptic_operations(*networks) if networks else np.full(len(genotypes), np.nan)

    def broken(self, genotypes: Sequence[str]) -> dict[str, dict[int, list[str]]]:
        """Which limits of each known device the C of each cell breaks, by width of weights; an empty text is none.

        Empty where the run's network is not known.
        """
        networks, known = self._networks(genotypes), devices.devices()
        if networks is None:
            return {}
        spec, rows = networks
        least, most = BITS
        found: dict[str, dict[int, list[str]]] = {
            name: dict.fromkeys(WIDTHS, [f"C has weights of {least} to {most} bits"] * len(rows)) for name in known
        }
        for bits in (bits for bits in WIDTHS if least <= bits <= most):
            of_rows = [devices.broken_of_all(spec, row, bits) for row in rows]
            for name in known:
                found[name][bits] = ["; ".join(own[name]) for own in of_rows]
        return found


def digest(path: str | Path) -> str:
    """Of all that a run's page is drawn from; equal for folders of equal files."""
    folder = Path(path)
    patterns = ("config.json", "summary.json", REPORT, "tables/[!.]*.parquet", "figures/[!.]*.png", *_LOGS)
    found = hashlib.sha256()
    for file in sorted({file for pattern in patterns for file in folder.glob(pattern)}):
        content = file.read_bytes()
        found.update(f"{file.relative_to(folder)} {len(content)}\n".encode() + content)
    return found.hexdigest()


def find(path: str | Path) -> Found:
    """Reads a run's folder.

    Raises:
      ValueError: it is no run's, or its record is damaged; what else is damaged is told in `missing`.
    """
    run = RunFolder.open(path)
    record = run.record()
    there = sorted(path.stem for path in run.path.glob("tables/[!.]*.parquet"))
    known = TABLES | {name: (record["environment"]["command"][0], ()) for name in there if name not in TABLES}
    tables, missing = {}, {}
    for name, (script, columns) in known.items():
        try:
            tables[name] = run.read_table(name, script, columns)
        except ValueError as error:
            missing[name] = str(error)
    try:
        summary = run.summary()
    except ValueError as error:
        summary, missing["summary"] = {}, str(error)
    curves = {}
    for log in sorted(log for pattern in _LOGS for log in run.path.glob(pattern)):
        parts = log.relative_to(run.path).parts[:-1]
        name = " ".join(part for part in parts if part not in ("trainings", "training")) or "training"
        try:
            curves[name] = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
        except ValueError:
            missing[f"training {name}"] = f"{log} is damaged: remove it, and run the step again"
    report = run.path / REPORT
    return Found(
        run.path, record, summary, {name: table for name, table in tables.items() if name in TABLES}, missing, curves,
        others={name: table for name, table in tables.items() if name not in TABLES},
        report=report.read_text("utf-8", errors="replace") if report.exists() else None,
        of_steps=any(name in TABLES for name in there),
    )  # fmt: skip
