"""Step 1: what the kernel size does to accuracy, of one cell with all its convolutions at each size.

Where operations are given, each generic one takes the place of the convolutions in turn.

Source: Putra & Shafique, IEEE Embedded Systems Letters 17(3), 2025 (SpiKernel).
"""

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from spikernel_jax.cells.kernels import Kernel, kernel_name
from spikernel_jax.pipeline import trials
from spikernel_jax.pipeline.job import Job
from spikernel_jax.pipeline.options import impact_genotypes
from spikernel_jax.pipeline.trials import Trial
from spikernel_jax.report import figures, page

if TYPE_CHECKING:
    import polars as pl


def trainings(job: Job) -> dict[Kernel, list[Trial]]:
    """The trainings of each kernel, over all seeds."""
    space = job.options.space
    genotypes = impact_genotypes(space, job.options.cell)
    return {k: trials.of_cells(job, {f"unsearched-{kernel_name(k)}": (space, row)}) for k, row in genotypes.items()}


def table_of(by_kernel: Mapping[Kernel, list[Trial]], results: Mapping[Trial, Mapping[str, Any]]) -> "pl.DataFrame":
    """A row for each kernel and seed; `kernel` is text, `accuracy` validation accuracy."""
    import polars as pl

    names = ("parameters", "memory_bytes", "synops", "energy_nj")
    return pl.DataFrame([
        {"kernel": str(k), "seed": trial.seed, "accuracy": results[trial]["validation_accuracy"],
         **{name: results[trial][name] for name in names}}
        for k, own in by_kernel.items() for trial in own
    ])  # fmt: skip


def measure_impact(job: Job) -> "pl.DataFrame":
    """Trains the cell with each kernel over several seeds.

    Leaves ``tables/impact.parquet`` (of `table_of`) and ``figures/impact.png``.
    """
    run, options, by_kernel = job.run, job.options, trainings(job)
    with job.step("impact"):
        job.remember("kernel_sizes", "operations", "cell", "bits", "recipe")
        job.say(
            f"step 1, impact: {options.cell!r}, K in {tuple(by_kernel)}, {job.preset.seeds} seeds, "
            f"{job.preset.epochs} epochs, recipe {options.recipe}"
        )
        table = table_of(by_kernel, trials.run_all(job, itertools.chain.from_iterable(by_kernel.values())))
        run.write_table("impact", table)
        title = (
            f"Impact of the kernel, {job.data.name}, n = {job.preset.seeds} seeds; accuracy in float32, memory "
            f"counted at {options.bits} bits"
        )
        figures.impact_figure(table, run.folder("figures") / "impact.png", title)
    page.keep_page(run.path)  # of what there is by now
    return table
