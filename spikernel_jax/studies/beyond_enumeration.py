"""Search strategies at an equal number of scored candidates: regularised evolution, random search, pruning.

All strategies and seeds see the same scoring function (one bank of weights, one set of images), so a seed
varies the search alone, and evolution and random search of one seed begin with the same candidates.
"""

import dataclasses
import itertools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from spikernel_jax.cells.kernels import kernel_set_text
from spikernel_jax.cells.space import CellSpace
from spikernel_jax.io.store import ResultStore
from spikernel_jax.io.units import format_bytes
from spikernel_jax.io.voice import Moving
from spikernel_jax.pipeline.job import Job, Purpose
from spikernel_jax.report import pages, search_figures
from spikernel_jax.scoring.bank import make_bank
from spikernel_jax.scoring.fidelity import Fidelity
from spikernel_jax.scoring.population import score_population
from spikernel_jax.search import evolution, pruning, queue
from spikernel_jax.snn.network import Params
from spikernel_jax.snn.spec import NetworkSpec

if TYPE_CHECKING:
    import polars as pl

SPACES = ("feedback", "two_cells", "forward")


@dataclasses.dataclass(frozen=True)
class Study:
    """What is compared.

    Attributes:
      space: ``"feedback"`` (SNASNet-BW's cells), ``"two_cells"`` (two independent forward cells, as SpikeNAS)
        or ``"forward"``, which is small enough to know the best cell.
      kernel_set: kernel sizes of the cells.
      budget: candidates that each search scores.
      seeds: searches of each strategy.
      fidelity: sizes of the score.
      evolution: settings of evolution; random search scores as many at once.
      memory_budget: bytes; a candidate over it is never scored.
      bits: width of weights, membranes and activations.

    Raises:
      ValueError: naming the field.
    """

    space: str
    kernel_set: tuple[int, ...]
    budget: int
    seeds: int
    fidelity: Fidelity
    evolution: evolution.Evolution
    memory_budget: int
    bits: int

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        if self.space not in SPACES:
            raise ValueError(f"--space {self.space!r} is unknown; known: {', '.join(SPACES)}")
        for name, least in (("seeds", 1), ("budget", self.evolution.population)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least {least}")
        if not 1 <= self.bits <= 64:
            raise ValueError(f"--bits {self.bits} must be from 1 to 64")
        _ = self.cell_space  # refuses kernel sizes

    @property
    def cell_space(self) -> CellSpace:
        """The space of each cell."""
        return CellSpace(self.kernel_set, feedback=self.space == "feedback")

    @property
    def cells(self) -> int:
        """How many cells a candidate has of its own."""
        return 2 if self.space == "two_cells" else 1


class Scoring(NamedTuple):
    """How candidates of a study are scored and weighed, the same for all strategies and seeds."""

    study: Study
    trained: NetworkSpec  # whose memory counts
    spec: NetworkSpec  # that is scored
    bank: Params
    images: NDArray[np.float32]
    name: str  # of the score

    def fits(self, rows: NDArray[np.int8]) -> NDArray[np.bool_]:
        """Which candidates are within the memory budget."""
        return queue.memory_of(self.trained, rows, self.study.bits) <= self.study.memory_budget

    def score(self, rows: NDArray[np.int8]) -> NDArray[np.float64]:
        """The candidates' scores."""
        chunk = self.study.evolution.children
        return score_population(rows, self.bank, self.images, self.spec, score=self.name, chunk=chunk).scores

    def evaluations(self, strategy: str, seed: int, rows: NDArray[np.int8], scores: Any, first: int = 1) -> Any:
        """Rows of the table of evaluations, counted from `first`."""
        import polars as pl

        pairs, explicit = rows[:, None] if rows.ndim == 2 else rows, self.study.cell_space.explicit
        return pl.DataFrame({
            "strategy": [strategy] * len(rows),
            "seed": np.full(len(rows), seed, np.int64),
            "evaluation": np.arange(first, first + len(rows), dtype=np.int64),
            "genotype": [" | ".join(explicit(cell) for cell in pair) for pair in pairs],
            "score": np.asarray(scores, np.float64),
            "memory_bytes": queue.memory_of(self.trained, rows, self.study.bits),
        })  # fmt: skip


def scoring_of(job: Job, study: Study) -> Scoring:
    """Weights and images that all strategies and seeds of a study share."""
    trained = job.network(study.cell_space)
    spec = study.fidelity.network(trained)
    bank = make_bank(job.key(Purpose.STRATEGIES_BANKS), spec, study.fidelity.seeds)
    images = study.fidelity.images(job.key(Purpose.STRATEGIES_IMAGES), job.data, trained)
    return Scoring(study, trained, spec, bank, images, job.preset.score)


def exhaustive(job: Job, scoring: Scoring, folder: Path) -> "pl.DataFrame":
    """Every cell of the forward space that fits, scored; pieces of it are kept in the folder.

    Raises:
      NothingFitsError: if none fits.
    """
    study = scoring.study
    rows = study.cell_space.enumerate()
    rows = rows[scoring.fits(rows)]
    if not len(rows):
        raise queue.NothingFitsError(f"no cell fits --memory-budget {format_bytes(study.memory_budget)}")
    store, size = ResultStore(folder, job.run.config), 4 * study.evolution.children
    line, there, began, scored = queue.progress_line(job.say, "exhaustive"), store.done(), time.perf_counter(), 0
    parts: list[NDArray[np.float64]] = []
    for index, start in enumerate(range(0, len(rows), size)):
        here = rows[start : start + size]
        if index not in there:
            store.save(index, scores=scoring.score(here))
            scored += len(here)
        parts.append(store.load(index)["scores"])
        best = float(evolution.best_so_far(np.concatenate(parts))[-1])
        line(queue.Progress(start + len(here), len(rows), time.perf_counter() - began, scored, best))
    return scoring.evaluations("exhaustive", 0, rows, np.concatenate(parts))


def pruned(job: Job, scoring: Scoring, score: evolution.ScoreRows, folder: Path) -> "pl.DataFrame":
    """The cell that pruning comes to: one row, with the number of supernets that were scored as `evaluation`."""
    found = pruning.prune(
        scoring.study.cell_space,
        lambda masks: pruning.score_supernets(masks, scoring.bank, scoring.images, scoring.spec, score=scoring.name),
        fits=scoring.fits,
        folder=folder,
        settings=job.run.config,
        progress=lambda number, left: job.say(
            Moving(f"  pruning  round {number}, {left} operations to go", done=number, operations_left=left)
        ),
    )
    rows = found.cell[None]
    return scoring.evaluations("pruning", 0, rows, score(rows), found.evaluations)


def searched(job: Job, scoring: Scoring, score: evolution.ScoreRows, folder: Path) -> "pl.DataFrame":
    """What evolution and random search scored, seed by seed."""
    import polars as pl

    study, tables = scoring.study, []
    strategies = study.evolution, evolution.RandomSearch(study.evolution.children, study.evolution.retries)
    for seed, strategy in itertools.product(range(study.seeds), strategies):
        state = evolution.drive(
            strategy,
            study.cell_space,
            score,
            budget=study.budget,
            key=jax.random.fold_in(job.key(Purpose.STRATEGIES_SEARCHES), seed),
            cells=study.cells,
            fits=scoring.fits,
            folder=folder / f"{strategy.name}-seed{seed}",
            settings=job.run.config,
            progress=queue.progress_line(job.say, f"{strategy.name}, seed {seed}"),
        )
        tables.append(scoring.evaluations(strategy.name, seed, state.rows, state.scores))
    return pl.concat(tables)


def compare(job: Job, study: Study) -> "pl.DataFrame":
    """Runs every strategy for every seed, goes on where a killed process stopped, and writes the result.

    Leaves ``tables/evaluations.parquet`` (a row for each scored candidate: `strategy`, `seed`, `evaluation`,
    which counts from 1, `genotype`, `score`, `memory_bytes`), ``figures/progress.png``, and ``report.md``. Pruning
    (forward and feedback cells) is one row: the cell that it came to, with the number of supernets that it
    scored as `evaluation`. Exhaustive scores of the forward space are rows of the strategy "exhaustive".

    Args:
      job: run folder, data, preset and seed; its options are not used.
      study: what is compared.

    Returns:
      The table of evaluations.

    Raises:
      ValueError: if no candidate fits the memory budget, or the folder holds another comparison.
    """
    import polars as pl

    scoring, folder = scoring_of(job, study), job.run.path / "searches"
    folder.mkdir(exist_ok=True)
    job.say(f"{study.space} cells of sizes {study.kernel_set}, {study.budget} candidates a search, {study.seeds} seeds")
    score, tables = scoring.score, []
    if study.space == "forward":
        tables.append(known := exhaustive(job, scoring, folder / "exhaustive"))
        values = dict(zip(known["genotype"], known["score"], strict=True))

        def score(rows: NDArray[np.int8]) -> NDArray[np.float64]:  # what it would give once more
            return np.array([values[study.cell_space.explicit(row)] for row in rows])

    if study.cells == 1:
        tables.append(pruned(job, scoring, score, folder / "pruning"))
    table = pl.concat([*tables, searched(job, scoring, score, folder)])
    job.run.write_table("evaluations", table)
    _write_page(job, scoring, table)
    return table


def _write_page(job: Job, scoring: Scoring, table: "pl.DataFrame") -> None:
    """Figure, summary and report."""
    study = scoring.study
    sizes = f"C = {scoring.spec.channels}, B = {study.fidelity.batch}, T = {scoring.spec.time_steps}"
    title = (
        f"{study.space} cells of sizes {kernel_set_text(study.kernel_set)}, {job.data.name}: {scoring.name}, {sizes}, "
        f"R = {study.fidelity.seeds}"
    )
    search_figures.progress_figure(table, job.run.folder("figures") / "progress.png", title)
    text = (
        f"{job.data.source}\n\nAt most {format_bytes(study.memory_budget)} at {study.bits} bits and "
        f"C = {job.preset.channels}; scored at C = {scoring.spec.channels}.\n\n"
        "`scored` counts candidates; for pruning, supernets, each of which costs as much as several cells.\n\n"
    )
    if study.space == "two_cells":
        text += f"{two_cells_note(table)}\n\n"
    summary = over_seeds(table)
    rows = [{k: v for k, v in row.items() if v == v and v not in (np.inf, -np.inf)} for row in summary.to_dicts()]
    job.run.update_summary(strategies=rows)  # JSON has no NaN and no infinity
    pages.write_report(job.run, [(title, text + summary_markdown(summary))])


def two_cells_note(table: "pl.DataFrame") -> str:
    """What the score of two independent cells rewards: its rank correlation with either cell's convolutions.

    Args:
      table: of `compare`, with genotypes ``"CELL1 | CELL2"``; the random search's cells are looked at.
    """
    import polars as pl
    from scipy import stats

    drawn = table.filter((pl.col("strategy") == "random") & pl.col("score").is_finite())
    counts = np.array([[cell.count("conv") for cell in text.split(" | ")] for text in drawn["genotype"]])
    scores = drawn["score"].to_numpy()
    first, second = (float(stats.spearmanr(scores, counts[:, cell])[0]) for cell in range(2))  # pyright: ignore
    return (
        f"**A high score is no good network here.** Over the {len(drawn):,} cells of the random searches, Spearman's "
        f"correlation of the score is {first:+.2f} with the convolutions of cell 1 and {second:+.2f} with those of "
        "cell 2: `sahd_paper` averages the number of neurons N over LIF calls, so few calls of the smaller cell 2 "
        "score higher, and the best have a second cell that is next to nothing."
    )


def over_seeds(table: "pl.DataFrame") -> "pl.DataFrame":
    """A row for each strategy: what its searches found, as mean and standard deviation over seeds.

    Args:
      table: of `compare`. Where it holds the strategy "exhaustive", `mean rank` is the place of each search's
        best cell in the whole space (1 is the best; equal scores share the better place).

    Returns:
      Strategies with their best candidate; scores that are not finite count nowhere.
    """
    import polars as pl

    scores = {key: part["score"].to_numpy() for key, part in table.group_by(["strategy", "seed"], maintain_order=True)}
    every = next((values for (strategy, _), values in scores.items() if strategy == "exhaustive"), None)
    rows = []
    for strategy in dict.fromkeys(strategy for strategy, _ in scores):
        parts = [values for (name, _), values in scores.items() if name == strategy]
        best = np.array([evolution.best_so_far(values)[-1] for values in parts])
        mine = table.filter((pl.col("strategy") == strategy) & pl.col("score").is_finite())
        top = mine.sort("score", descending=True, maintain_order=True).row(0, named=True) if len(mine) else {}
        row = {
            "strategy": strategy,
            "seeds": len(parts),
            "scored": int(table.filter(pl.col("strategy") == strategy)["evaluation"].max()),  # pyright: ignore
            "best score": float(best.mean()),
            "sd": float(best.std(ddof=1)) if len(best) > 1 else float("nan"),
        }
        if every is not None:
            row["mean rank"] = float(np.mean([1 + np.sum(every > value) for value in best]))
        rows.append(row | {"best cell": top.get("genotype"), "memory KiB": top.get("memory_bytes", np.nan) / 1024})
    return pl.DataFrame(rows)


def summary_markdown(summary: "pl.DataFrame") -> str:
    """The summary as Markdown; scores with three decimals, because searches differ in the second or third."""
    import polars as pl

    mean, sd = summary["best score"].to_list(), summary["sd"].to_list()
    text = [f"{m:.3f}" if np.isnan(s) else f"{m:.3f} ± {s:.3f}" for m, s in zip(mean, sd, strict=True)]
    shown = summary.with_columns(pl.Series("best score", text)).drop("sd").rename({"best score": "best score ± sd"})
    return pages.markdown_table(shown, shown.columns)
