"""Step 3, search: ranks the cells of every kernel set by a training-free score, and marks each set's best."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from spikernel_jax.cells.kernels import Kernel, kernel_set_text
from spikernel_jax.pipeline.job import Job, Purpose
from spikernel_jax.report import figures, page
from spikernel_jax.scoring.fidelity import NAMES, Fidelity
from spikernel_jax.scoring.replicates import paired_standard_errors
from spikernel_jax.search import halving, shorts
from spikernel_jax.search.halving import Cells, Rung, Search
from spikernel_jax.search.queue import NothingFitsError
from spikernel_jax.search.shorts import Shorts
from spikernel_jax.snn.cost import Cost, costs

if TYPE_CHECKING:
    import polars as pl


def settled(job: Job, sets: Sequence[tuple[Kernel, ...]]) -> Search:
    """The search of these sets that a job's options ask for."""
    options = job.options
    rungs: dict[str, Fidelity] = dict(zip(NAMES, job.preset.fidelities, strict=True))
    at = {"halving": NAMES, "trainings": NAMES[:1]}.get(options.strategy, (options.fidelity,))
    return Search(
        sets=tuple(tuple(s) for s in sets),
        trained=job.network(halving.union(options.space, sets)),
        strategy=options.strategy,
        samples=options.samples,
        budget=options.budget,
        score=job.preset.score,
        rungs=tuple((name, rungs[name]) for name in at),
        cells_key=job.key(Purpose.SAMPLED_CELLS),
        banks_key=job.key(Purpose.SCORING_BANKS),
        images_key=job.key(Purpose.SCORING_IMAGES),
        folder=job.run.folder("scores"),
        origin={"data": job.data.name, "seed": job.seed, "train": len(job.data.train.labels)},
        processes=job.processes,
        say=job.say,
        method=job.method,
    )


_OPTIONS = ("sets", "keep", "strategy", "samples", "fidelity", "search_epochs", "search_seconds", "memory_budget",
            "device", "bits")  # fmt: skip
_PLAN = "search_plan.json"


def _training(job: Job, search: Search) -> shorts.Training:
    """How its cells are trained shortly; by SGD, for Muon would orthogonalise what a cell does not use, too."""
    config = dataclasses.replace(job.preset.training(job.data.name, "snasnet"), epochs=shorts.RUNGS[-1])
    return shorts.Training(search.trained, config, job.seeds[0], job.run.folder("search"), job.processes)


def _train(job: Job, search: Search, cells: Cells, rung: Rung) -> Shorts:
    """Trains the first in line shortly, as long as the budget lets; the plan of a run stays as it was first made."""
    training = _training(job, search)
    line = shorts.line_of(search.trained, cells, rung.scores.scores)
    if not (job.run.path / _PLAN).exists():
        epochs, seconds = job.options.search_epochs, job.options.search_seconds
        if seconds:
            each = shorts.pace(training, line, job.data) / job.processes.count
            epochs = max(1, int(min(seconds / each, _MOST_EPOCHS)))
        job.run.write_json(_PLAN, {"epochs": epochs, "seconds": seconds})
    epochs = int(job.run.read_json(_PLAN)["epochs"])
    job.say(f"  short trainings, {epochs} epochs in all")
    found = shorts.train_rungs(training, line, epochs, job.data, job.say)
    if job.processes.count > 1:
        job.processes.wait_for_others(lambda: None)
    return found


_MOST_EPOCHS = 1_000_000


def join_search(job: Job) -> None:
    """What a process other than the first does of `search_sets`; errors as `halving.share_rungs`."""
    search = settled(job, [tuple(s) for s in job.processes.hear("sets")])
    cells = halving.find_cells(search)
    halving.share_rungs(search, cells, job.data)
    if search.strategy == "trainings":
        shorts.share_rungs(_training(job, search), cells.rows, job.data)


def table_of(
    search: Search,
    cells: Cells,
    total: Cost,
    fits: NDArray[np.bool_],
    results: Sequence[Rung],
    trained: Shorts | None = None,
) -> "pl.DataFrame":
    """A row for each set and cell, the set's best under the budget marked as its finalist.

    `score` and its errors are those at the highest fidelity that a cell was scored at (`fidelity`): compare cells of
    one fidelity only. `score_se` is the standard error of the score itself, `score_se_paired` what is left of it when
    candidates are compared, all on the same draws; `first_score` is the score at the first fidelity, which all cells
    have. `search_epochs` are those of a cell's short training, 0 where it had none, and `search_validation` its
    validation accuracy after these.

    Args:
      search: what is searched.
      cells: its cells.
      total: what each of `cells.rows` costs.
      fits: which of them keep to the budget.
      results: of each fidelity, lowest first.
      trained: what short trainings found, which then mark the finalists; None where none were made.
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
    epochs = np.zeros(n, np.int64) if trained is None else trained.epochs
    accuracy = np.full(n, np.nan) if trained is None else trained.accuracy
    tables = []
    for kernel_set, own, at in zip(search.sets, cells.members, cells.positions, strict=True):
        scored = halving.winner(at, results, memory, fits)
        winner = scored if trained is None else shorts.winner(at, trained)
        tables.append(
            pl.DataFrame({
                "kernel_set": [kernel_set_text(kernel_set)] * len(at),
                "genotype": [search.trained.space.explicit(row) for row in own],
                **{name: values[at] for name, values in columns.items()},
                "fidelity": [results[index].name for index in reached[at]],
                "first_score": results[0].scores.scores[at],
                "first_score_se": results[0].scores.standard_errors[at],
                "search_epochs": epochs[at],
                "search_validation": accuracy[at],
                "lif_calls": lif_calls[at],
                "conv_edges": total.conv_edges[at] // 2,
                "memory_bytes": memory[at],
                "fits": fits[at],
                "finalist": at == (-1 if winner is None else winner),
            })
        )  # fmt: skip
    return pl.concat(tables)


def search_sets(job: Job, sets: Sequence[tuple[Kernel, ...]]) -> "pl.DataFrame":
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
    with job.step("search"):
        search = settled(job, sets)
        cells = halving.find_cells(search)
        fits = search.budget.fits(search.trained, cells.rows) if search.ranks_all else np.ones(len(cells.rows), bool)
        if not fits.any():
            raise NothingFitsError(f"no cell of any set fits {search.budget.text}")
        total = costs(search.trained, cells.rows, search.budget.bits)
        job.remember(*_OPTIONS)
        job.say(f"step 3, search ({search.strategy}): {len(cells.rows)} distinct cells in {len(sets)} sets")
        job.processes.tell("sets", sets)
        results = list(halving.score_rungs(search, cells, job.data))
        trained = _train(job, search, cells, results[0]) if search.strategy == "trainings" else None
        table = table_of(search, cells, total, fits, results, trained)
        _say_of(job, table, int((~np.isfinite(results[0].scores.scores)).sum()))
        job.run.write_table("search", table)
        _figure(job, search, table)
    page.keep_page(job.run.path)
    return table


def _say_of(job: Job, table: "pl.DataFrame", infinite: int) -> None:
    """Says what has no finalist and no score; ValueError if there is no finalist at all."""
    for (kernel_set,), own in table.group_by("kernel_set", maintain_order=True):
        if not own["finalist"].any():
            why = "has a finite score" if own["fits"].any() else f"fits {job.options.budget.text}"
            job.say(f"  {kernel_set}: no cell {why}; this set has no finalist")
    if not table["finalist"].any():
        raise ValueError("no cell that fits the budget has a finite score: score larger networks or other images")
    cells = table["genotype"].n_unique()
    job.say(f"  {infinite} of {cells} cells have no finite score (two images with the same spikes)")


def _figure(job: Job, search: Search, table: "pl.DataFrame") -> None:
    import polars as pl

    name, fidelity = search.rungs[0]
    title = f"{job.preset.score} of every cell scored, {job.data.name}, {name} fidelity, R = {fidelity.seeds}"
    drawn = table.with_columns(score=pl.col("first_score"), score_se=pl.col("first_score_se"))
    figures.search_figure(drawn, job.run.folder("figures") / "search.png", title)
