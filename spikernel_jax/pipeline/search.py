"""Step 3, search: ranks the cells of every kernel set by a training-free score, and marks each set's best.

Successive halving scores all cells that fit the budget at the lowest fidelity, the best tenth of each set at the
next, and the best hundredth at full size (after Jamieson & Talwalkar, AISTATS 2016, with sizes of network and
draws in the place of training time). The other strategies score at one fidelity.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from spikernel_jax.cells.space import CellSpace, kernel_set_text
from spikernel_jax.io.units import format_bytes
from spikernel_jax.pipeline.job import Job, Purpose
from spikernel_jax.report import figures
from spikernel_jax.scoring.fidelity import NAMES, Fidelity
from spikernel_jax.scoring.scorer import Scorer, Scores, make_bank, paired_standard_errors
from spikernel_jax.search import queue
from spikernel_jax.snn import cost
from spikernel_jax.snn.spec import NetworkSpec

if TYPE_CHECKING:
    import polars as pl

FRACTIONS = (1.0, 0.1, 0.01)  # of each set's cells, at low, medium and full fidelity
_LEAST = 8  # cells that a set keeps, so that a small set is not decided at the lowest fidelity


class Cells(NamedTuple):
    """What is searched."""

    space: CellSpace  # the union space
    trained: NetworkSpec  # the network that would be trained
    members: list[NDArray[np.int8]]  # cells of each set
    rows: NDArray[np.int8]  # all distinct ones
    positions: list[NDArray[np.int64]]  # of each set's cells in `rows`


class Rung(NamedTuple):
    """What came of one fidelity."""

    name: str
    at: NDArray[np.int64]  # positions in `Cells.rows`, increasing
    scores: Scores


def find_cells(job: Job, sets: Sequence[tuple[int, ...]]) -> Cells:
    """The cells that the job's strategy looks at; `halving` and `random` rule out those over the budget."""
    options = job.options
    space = CellSpace(tuple(sorted({k for s in sets for k in s})))
    trained = job.network(space)

    def fits(rows: NDArray[np.int8]) -> NDArray[np.bool_]:
        return queue.memory_of(trained, rows, options.bits) <= options.memory_budget

    members = [
        queue.candidates(
            space, s, strategy="random" if options.strategy == "random" else "exhaustive", samples=options.samples,
            key=job.key(Purpose.SAMPLED_CELLS), fits=None if options.strategy == "exhaustive" else fits,
        )
        for s in sets
    ]  # fmt: skip
    return gather(space, trained, members)


def gather(space: CellSpace, trained: NetworkSpec, members: list[NDArray[np.int8]]) -> Cells:
    """The distinct cells of all sets, and where each set's are among them."""
    rows, position = np.unique(np.concatenate(members), axis=0, return_inverse=True)
    return Cells(
        space, trained, members, rows, np.split(position.ravel(), np.cumsum([len(own) for own in members])[:-1])
    )


def rungs(job: Job) -> list[tuple[str, Fidelity]]:
    """The fidelities that the job scores at, in order."""
    every: dict[str, Fidelity] = dict(zip(NAMES, job.preset.fidelities, strict=True))
    if job.options.strategy == "halving":
        return list(every.items())
    return [(job.options.fidelity, every[job.options.fidelity])]


def promoted(cells: Cells, at: NDArray[np.int64], scores: NDArray[np.float64], fraction: float) -> NDArray[np.int64]:
    """Positions in `cells.rows` of the best of each set: `fraction` of its cells, at least a few.

    Args:
      cells: what is searched.
      at: positions of the cells that were scored.
      scores: theirs; a cell without a finite score is never promoted.
      fraction: of each set.
    """
    value = np.full(len(cells.rows), -np.inf)
    value[at] = np.where(np.isfinite(scores), scores, -np.inf)
    kept = []
    for own in cells.positions:
        order = own[np.argsort(-value[own], kind="stable")]
        order = order[np.isfinite(value[order])]
        kept.append(order[: max(_LEAST, math.ceil(fraction * len(own)))])
    return np.unique(np.concatenate(kept))


def _units(job: Job, cells: Cells, name: str, fidelity: Fidelity, at: NDArray[np.int64]) -> queue.Units:
    """What is scored at one rung: cells, weights, images, and where the scores are kept."""
    preset = job.preset
    spec = fidelity.network(cells.trained)
    index = NAMES.index(name)
    bank = make_bank(jax.random.fold_in(job.key(Purpose.SCORING_BANKS), index), spec, fidelity.seeds)
    images = fidelity.images(jax.random.fold_in(job.key(Purpose.SCORING_IMAGES), index), job.data, cells.trained)
    chunk = queue.unit_rows(spec, fidelity.batch)
    scorer = Scorer(bank, images, spec, score=preset.score, chunk=chunk, say=job.say)
    origin = {"data": job.data.name, "seed": job.seed, "train": len(job.data.train.labels)}
    origin |= {"strategy": job.options.strategy, "fidelity": name}
    return queue.Units(
        cells.rows[at],
        scorer,
        job.run.folder("scores") / name,
        seeds=fidelity.seeds,
        chunk=chunk,
        inputs=queue.inputs_of(spec, preset.score, scorer.precision, bank, images) | origin,
        processes=job.processes,
        name=name,
    )


def join_search(job: Job) -> None:
    """What a process other than the first does of `search_sets`: it scores, and writes nothing but scores.

    Raises:
      ValueError: if the first process gave up, or its run folder is not seen here.
    """
    cells = find_cells(job, [tuple(s) for s in job.processes.hear("sets")])
    for name, fidelity in rungs(job):
        at = np.array(job.processes.hear(f"{name}/cells"), np.int64)
        queue.score_share(_units(job, cells, name, fidelity, at))


def score_rungs(job: Job, cells: Cells) -> list[Rung]:
    """Scores the cells at the lowest fidelity, and those promoted at the next ones."""
    results: list[Rung] = []
    at = np.arange(len(cells.rows))
    for (name, fidelity), fraction in zip(rungs(job), FRACTIONS, strict=False):
        if results:
            at = promoted(cells, at, results[-1].scores.scores, fraction)
        spec = fidelity.network(cells.trained)
        job.say(
            f"  {name}: {len(at)} cells, C = {spec.channels}, B = {fidelity.batch}, T = {spec.time_steps}, "
            f"{spec.image_shape[0]}x{spec.image_shape[1]} images, R = {fidelity.seeds}"
        )
        job.processes.tell(f"{name}/cells", at.tolist())
        units, last = _units(job, cells, name, fidelity, at), name == rungs(job)[-1][0]
        results.append(Rung(name, at, queue.score_units(units, last=last, progress=queue.progress_line(job.say))))
    return results


def _winner(own: NDArray[np.int64], results: Sequence[Rung], memory: NDArray[np.int64], budget: int) -> int | None:
    """Position of a set's best cell: by the highest fidelity at which one of its cells has a finite score."""
    for rung in reversed(results):
        mine = np.isin(rung.at, own)
        best = queue.best_under_budget(np.where(mine, rung.scores.scores, np.nan), memory[rung.at], budget)
        if best is not None:
            return int(rung.at[best])
    return None


def table_of(
    sets: Sequence[tuple[int, ...]], cells: Cells, total: cost.Cost, results: Sequence[Rung], budget: int
) -> "pl.DataFrame":
    """A row for each set and cell, the set's best under the budget marked as its finalist.

    `score` and its errors are those at the highest fidelity that a cell was scored at (`fidelity`): compare cells of
    one fidelity only. `score_se` is the standard error of the score itself, `score_se_paired` what is left of it when
    candidates are compared, all on the same draws; `first_score` is the score at the first fidelity, which all cells
    have.

    Args:
      sets: kernel sets.
      cells: theirs.
      total: what each of `cells.rows` costs.
      results: of each fidelity, lowest first.
      budget: bytes.
    """
    import polars as pl

    n, memory = len(cells.rows), total.memory_bytes
    reached, lif_calls = np.zeros(n, np.int64), np.zeros(n, np.int64)
    columns = {name: np.full(n, np.nan) for name in ("score", "score_se", "score_se_paired")}
    for index, (_, at, scores) in enumerate(results):
        paired = paired_standard_errors(scores.replicates)
        for name, values in zip(columns, (scores.scores, scores.standard_errors, paired), strict=True):
            columns[name][at] = values
        reached[at], lif_calls[at] = index, scores.lif_calls
    tables = []
    for kernel_set, own, at in zip(sets, cells.members, cells.positions, strict=True):
        winner = _winner(at, results, memory, budget)
        tables.append(
            pl.DataFrame({
                "kernel_set": [kernel_set_text(kernel_set)] * len(at),
                "genotype": [cells.space.explicit(row) for row in own],
                **{name: values[at] for name, values in columns.items()},
                "fidelity": [results[index].name for index in reached[at]],
                "first_score": results[0].scores.scores[at],
                "first_score_se": results[0].scores.standard_errors[at],
                "lif_calls": lif_calls[at],
                "conv_edges": total.conv_edges[at] // 2,
                "memory_bytes": memory[at],
                "fits": memory[at] <= budget,
                "finalist": at == (-1 if winner is None else winner),
            })
        )  # fmt: skip
    return pl.concat(tables)


def search_sets(job: Job, sets: Sequence[tuple[int, ...]]) -> "pl.DataFrame":
    """Scores the cells of every set and marks each set's best under the budget.

    A cell that several sets hold is scored once. Leaves ``tables/search.parquet`` and ``figures/search.png``.

    Args:
      job: the run.
      sets: kernel sets to search.

    Returns:
      The table, of `table_of`.

    Raises:
      NothingFitsError: if no cell of any set fits the budget.
      ValueError: if no cell that fits has a finite score, or the folder holds another search.
    """
    budget, bits = job.options.memory_budget, job.options.bits
    with job.step("search"):
        cells = find_cells(job, sets)
        total = cost.costs(cells.trained, cells.rows, bits) if len(cells.rows) else None
        if total is None or total.memory_bytes.min() > budget:
            raise queue.NothingFitsError(
                f"no cell of any set fits --memory-budget {format_bytes(budget)} at {bits} bits"
            )
        job.remember("sets", "keep", "strategy", "samples", "fidelity", "memory_budget", "bits")
        job.say(f"step 3, search ({job.options.strategy}): {len(cells.rows)} distinct cells in {len(sets)} sets")
        job.processes.tell("sets", sets)
        results = score_rungs(job, cells)
        table = table_of(sets, cells, total, results, budget)
        _say_of(job, table, int((~np.isfinite(results[0].scores.scores)).sum()))
        job.run.write_table("search", table)
        _figure(job, table)
    return table


def _say_of(job: Job, table: "pl.DataFrame", infinite: int) -> None:
    """Says what has no finalist and no score; ValueError if there is no finalist at all."""
    for (kernel_set,), own in table.group_by("kernel_set", maintain_order=True):
        if not own["finalist"].any():
            why = "has a finite score" if own["fits"].any() else f"fits {format_bytes(job.options.memory_budget)}"
            job.say(f"  {kernel_set}: no cell {why}; this set has no finalist")
    if not table["finalist"].any():
        raise ValueError("no cell that fits the budget has a finite score: score larger networks or other images")
    cells = table["genotype"].n_unique()
    job.say(f"  {infinite} of {cells} cells have no finite score (two images with the same spikes)")


def _figure(job: Job, table: "pl.DataFrame") -> None:
    import polars as pl

    name, fidelity = rungs(job)[0]
    title = f"{job.preset.score} of every cell scored, {job.data.name}, {name} fidelity, R = {fidelity.seeds}"
    drawn = table.with_columns(score=pl.col("first_score"), score_se=pl.col("first_score_se"))
    figures.search_figure(drawn, job.run.folder("figures") / "search.png", title)
