"""Search strategies at an equal number of scored candidates: regularised evolution, random search, pruning.

All strategies and seeds see the same scoring function (one bank of weights, one set of images), so a seed
varies the search alone, and evolution and random search of one seed begin with the same candidates.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from numpy.typing import NDArray

from spikernel_jax.cells.space import CellSpace
from spikernel_jax.io.store import ChunkStore
from spikernel_jax.pipeline import tradeoff
from spikernel_jax.pipeline.job import Job
from spikernel_jax.report import figures, pages
from spikernel_jax.scoring import scorer
from spikernel_jax.scoring.fidelity import Fidelity
from spikernel_jax.search import evolution, pruning, queue
from spikernel_jax.snn.cost import costs

if TYPE_CHECKING:
    import polars as pl

SPACES = ("feedback", "two_cells", "forward")
_BANK_KEY, _SEARCH_KEY, _IMAGES_KEY = 201, 202, 203


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

    preset, space = job.preset, study.cell_space
    trained = job.network(space)
    scored = study.fidelity.network(trained)
    bank = scorer.make_bank(job.key(_BANK_KEY), scored, study.fidelity.seeds)
    images = study.fidelity.images(job.key(_IMAGES_KEY), job.data, trained)
    folder = job.run.path / "searches"
    folder.mkdir(exist_ok=True)
    chunk = study.evolution.children
    settings = job.run.config

    def fits(rows: NDArray[np.int8]) -> NDArray[np.bool_]:
        return queue.memory_of(trained, rows, study.bits) <= study.memory_budget

    def score(rows: NDArray[np.int8]) -> NDArray[np.float64]:
        return scorer.score_population(rows, bank, images, scored, score=preset.score, chunk=chunk).scores

    tables = []

    def record(strategy: str, seed: int, rows: NDArray[np.int8], scores: Any, first: int = 1) -> None:
        pairs = rows[:, None] if rows.ndim == 2 else rows
        tables.append(
            pl.DataFrame({
                "strategy": [strategy] * len(rows),
                "seed": np.full(len(rows), seed, np.int64),
                "evaluation": np.arange(first, first + len(rows), dtype=np.int64),
                "genotype": [" | ".join(space.explicit(cell) for cell in pair) for pair in pairs],
                "score": np.asarray(scores, np.float64),
                "memory_bytes": costs(trained, rows, study.bits).memory_bytes,
            })
        )  # fmt: skip

    job.say(f"{study.space} cells of sizes {study.kernel_set}, {study.budget} candidates a search, {study.seeds} seeds")
    if study.space == "forward":
        cells = space.enumerate()
        cells = cells[fits(cells)]
        if not len(cells):
            raise tradeoff.NothingFitsError(
                f"no cell fits --memory-budget {tradeoff.format_bytes(study.memory_budget)}"
            )
        known = _exhaustive(cells, score, ChunkStore(folder / "exhaustive", settings), 4 * chunk, job.say)
        record("exhaustive", 0, cells, known)
        by_row = {row.tobytes(): value for row, value in zip(cells, known, strict=True)}

        def look_up(rows: NDArray[np.int8]) -> NDArray[np.float64]:  # what `score` would give once more
            return np.array([by_row[row.tobytes()] for row in rows])
    else:
        look_up = score
    if study.cells == 1:
        found = pruning.prune(
            space,
            lambda masks: pruning.score_supernets(masks, bank, images, scored, score=preset.score),
            fits=fits,
            folder=folder / "pruning",
            settings=settings,
            progress=lambda number, left: job.say(f"  pruning  round {number}, {left} operations to go"),
        )
        record("pruning", 0, found.cell[None], look_up(found.cell[None]), found.evaluations)
    for seed in range(study.seeds):
        key = jax.random.fold_in(job.key(_SEARCH_KEY), seed)
        shared: dict[str, Any] = {
            "budget": study.budget, "key": key, "cells": study.cells, "fits": fits, "settings": settings,
        }  # fmt: skip
        for strategy in ("evolution", "random"):
            own: dict[str, Any] = {
                "folder": folder / f"{strategy}-seed{seed}",
                "progress": _progress_line(job.say, f"{strategy}, seed {seed}"),
            }
            if strategy == "evolution":
                state = evolution.evolve(space, look_up, config=study.evolution, **shared, **own)
            else:
                own |= {"children": chunk, "retries": study.evolution.retries}
                state = evolution.random_search(space, look_up, **shared, **own)
            record(strategy, seed, state.rows, state.scores)
    table = pl.concat(tables)
    job.run.write_table("evaluations", table)
    title = (
        f"{study.space} cells of sizes {','.join(map(str, study.kernel_set))}, {job.data.name}: {preset.score}, "
        f"C = {scored.channels}, B = {study.fidelity.batch}, T = {scored.time_steps}, R = {study.fidelity.seeds}"
    )
    figures.progress_figure(table, job.run.folder("figures") / "progress.png", title)
    text = (
        f"{job.data.source}\n\nAt most {tradeoff.format_bytes(study.memory_budget)} at {study.bits} bits and "
        f"C = {preset.channels}; scored at C = {scored.channels}.\n\n"
        "`scored` counts candidates; for pruning, supernets, each of which costs as much as several cells.\n\n"
    )
    if study.space == "two_cells":
        text += f"{two_cells_note(table)}\n\n"
    summary = summarise(table)
    rows = [{k: v for k, v in row.items() if v == v and v not in (np.inf, -np.inf)} for row in summary.to_dicts()]
    job.run.update_summary(strategies=rows)  # JSON has no NaN and no infinity
    pages.write_report(job.run, [(title, text + summary_markdown(summary))])
    return table


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


def summarise(table: "pl.DataFrame") -> "pl.DataFrame":
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


def _exhaustive(
    rows: NDArray[np.int8],
    score: evolution.ScoreRows,
    store: ChunkStore,
    chunk: int,
    say: Callable[[str], None],
) -> NDArray[np.float64]:
    line, there, began, scored = _progress_line(say, "exhaustive"), store.done(), time.perf_counter(), 0
    parts: list[NDArray[np.float64]] = []
    for index, start in enumerate(range(0, len(rows), chunk)):
        here = rows[start : start + chunk]
        if index not in there:
            store.save(index, scores=score(here))
            scored += len(here)
        parts.append(store.load(index)["scores"])
        best = float(evolution.best_so_far(np.concatenate(parts))[-1])
        line(queue.Progress(start + len(here), len(rows), time.perf_counter() - began, scored, best))
    return np.concatenate(parts)


def _progress_line(say: Callable[[str], None], name: str, every: float = 5.0) -> Callable[[queue.Progress], None]:
    last = [time.perf_counter()]

    def line(p: queue.Progress) -> None:
        if p.done == p.total or time.perf_counter() - last[0] > every:
            last[0] = time.perf_counter()
            say(f"  {name}  {p.done}/{p.total}  {p.rate:.0f}/s  {p.left:.0f} s left  best {p.best:.2f}")

    return line
