"""Step 3, training: each kernel set's finalist over all seeds, exported."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from spikernel_jax.cells.kernels import kernel_set
from spikernel_jax.cells.space import CellSpace
from spikernel_jax.pipeline import trials
from spikernel_jax.pipeline.job import Job
from spikernel_jax.pipeline.trials import Trial
from spikernel_jax.report import figures, page
from spikernel_jax.training.checkpoint import save_model
from spikernel_jax.training.keep import epochs_of

if TYPE_CHECKING:
    import polars as pl


def named(found: "pl.DataFrame", space: CellSpace) -> tuple[dict[str, str], dict[str, tuple[CellSpace, Any]]]:
    """The finalists' names by genotype, and their cells by name; a cell that won in several sets is there once.

    Args:
      found: `kernel_set` and `genotype` of each set's finalist.
      space: that all sets are parts of.
    """
    names: dict[str, str] = {}
    cells: dict[str, tuple[CellSpace, Any]] = {}
    sets = found["kernel_set"].unique(maintain_order=True).to_list()
    for row in found.iter_rows(named=True):
        kernels = kernel_set(row["kernel_set"])
        sizes = all(isinstance(kernel, int) for kernel in kernels)
        called = "k" + "-".join(map(str, kernels)) if sizes else f"set{1 + sets.index(row['kernel_set'])}"
        name = names.setdefault(row["genotype"], called)
        if name not in cells:
            own = space.restricted(kernels)
            cells[name] = own, own.parse(row["genotype"])
    return names, cells


def table_of(found: "pl.DataFrame", names: Mapping[str, str], trained: list[dict[str, Any]]) -> "pl.DataFrame":
    """A row for each set and seed."""
    import polars as pl

    return pl.DataFrame([
        {"kernel_set": row["kernel_set"], "genotype": row["genotype"], "score": row["score"],
         "score_se": row["score_se"], **result, "checkpoint": f"finalists/{result['name']}/checkpoint"}
        for row in found.iter_rows(named=True)
        for result in trained if result["name"] == names[row["genotype"]]
    ])  # fmt: skip


def train_finalists(job: Job) -> "pl.DataFrame":
    """Trains each set's finalist over all seeds, and exports the first seed's network.

    Leaves ``finalists/<name>/checkpoint``, ``tables/finalists.parquet`` (of `table_of`) and ``figures/training.png``.
    """
    import polars as pl

    run = job.run
    with job.step("training"):
        wanted = ("kernel_set", "genotype", "score", "score_se", "finalist")
        found = run.read_table("search", "experiments/search.py", wanted).filter(pl.col("finalist"))
        job.remember("bits", "recipe")
        names, cells = named(found, job.options.space)
        job.say(f"step 3, training: {len(cells)} finalists, {job.preset.seeds} seeds, {job.preset.epochs} epochs each")
        for genotype, name in names.items():
            job.say(f"  {name}: {genotype}")
        trainings = trials.of_cells(job, cells)
        trained = trials.rows(job, trials.run_all(job, trainings))
        scores = {names[genotype]: score for genotype, score in found.select("genotype", "score").iter_rows()}
        for trial, own in zip(trainings, trained, strict=True):
            if trial.seed == job.seeds[0]:
                _export(job, trial, own | {"source": job.data.source, "score": scores[trial.kind]})
        table = table_of(found, names, trained)
        run.write_table("finalists", table)
        curves = {trial.name: epochs_of(trials.folder(job, trial)) for trial in trainings}
        title = f"Training of the finalists, {job.data.name}"
        figures.training_figure(curves, run.folder("figures") / "training.png", title)
    page.keep_page(run.path)
    return table


def _export(job: Job, trial: Trial, metrics: Mapping[str, Any]) -> None:
    """Exports a trained network with what was measured of it."""
    model = trials.fit(job, trial)
    folder = job.run.folder("finalists") / trial.kind
    folder.mkdir(exist_ok=True)
    save_model(folder / "checkpoint", dataclasses.replace(model, metrics={**model.metrics, **metrics}))
