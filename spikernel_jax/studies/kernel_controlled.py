"""What the kernel size itself does: one cell at every size, at equal width and again at equal parameters.

At equal width a larger kernel is a larger network, so what looks like the kernel's doing may be its parameters'. At
equal parameters each size k has a width C_k of its own: the one whose parameters come nearest to the reference's.
Stem and transition are 3×3 in all networks. Data, recipe, epochs, time steps and seeds are the same throughout, so
trainings of one seed are compared as pairs: they see the same images in the same order.

Validation accuracy is what is compared. The test split is touched once for each trained network, after all trainings.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spikernel_jax.cells.space import CellSpace
from spikernel_jax.pipeline import trials
from spikernel_jax.pipeline.job import Job
from spikernel_jax.pipeline.options import impact_genotypes
from spikernel_jax.pipeline.presets import Preset
from spikernel_jax.pipeline.trials import Trial
from spikernel_jax.report import figures, pages
from spikernel_jax.report.figures import kernel_text
from spikernel_jax.report.intervals import columns, interval, points
from spikernel_jax.snn import cost
from spikernel_jax.snn.spec import NetworkSpec
from spikernel_jax.training.recipe import TrainConfig

if TYPE_CHECKING:
    import polars as pl

REFERENCE = 3  # the kernel size that the others are compared with
WIDTH, PARAMETERS = "equal width", "equal parameters"
_MOST_PARAMETERS = 10**9


class Network(NamedTuple):
    """One of the networks that are trained."""

    kernel_size: int
    channels: int


@dataclasses.dataclass(frozen=True)
class Study:
    """Which networks are compared.

    Attributes:
      spec: the network at the equal width.
      config: the recipe of all trainings.
      genotypes: the cell [E] at each kernel size.
      parameters: the reference's, which equal parameters come nearest to.
      widths: C by comparison (`WIDTH`, `PARAMETERS`) and kernel size.
    """

    spec: NetworkSpec
    config: TrainConfig
    genotypes: dict[int, NDArray[np.int8]]
    parameters: int
    widths: dict[str, dict[int, int]]

    def trial(self, seed: int, network: Network) -> Trial:
        """The training of a network."""
        k, channels = network
        spec = dataclasses.replace(self.spec, channels=channels)
        return Trial(f"k{k}-c{channels}", seed, spec, tuple(self.genotypes[k].tolist()), self.config)

    def rows(self, seeds: range) -> Iterator[tuple[str, Network, int]]:
        """(comparison, network, seed) of every row of the table."""
        for (name, widths), seed in itertools.product(self.widths.items(), seeds):
            yield from ((name, Network(k, channels), seed) for k, channels in widths.items())


def make_study(data: str, preset: Preset, recipe: str, parameters: int | None = None) -> Study:
    """Chooses all widths and checks the settings; no image is needed.

    Args:
      data: a known data set.
      preset: its kernel sizes, cell, width, seeds, epochs and bits are used.
      recipe: a name in `recipe.RECIPES`.
      parameters: of the reference; None takes those of kernel size 3 at the preset's width.

    Returns:
      The study.

    Raises:
      ValueError: one line on the first setting that is wrong.
    """
    sizes = tuple(sorted(preset.kernel_sizes))
    if REFERENCE not in sizes or len(sizes) < 2:
        raise ValueError(f"--kernel-sizes {sizes}: want {REFERENCE}, the reference, and at least one other, as 1 3 5 7")
    if not 3 <= preset.seeds <= 1000:
        raise ValueError(f"--seeds {preset.seeds} must be from 3 to 1000: an interval needs a few trainings")
    space = CellSpace(sizes)
    genotypes = dict(zip(sizes, impact_genotypes(space, preset.impact_cell).values(), strict=True))
    spec = preset.network(data, space)
    config = preset.training(data, recipe)
    cost.costs(spec, genotypes[REFERENCE][None], preset.bits)  # refuses bits
    if parameters is None:
        parameters = cost.parameters_of(spec, genotypes[REFERENCE])
    elif not 1 <= parameters <= _MOST_PARAMETERS:
        raise ValueError(f"--parameters {parameters} must be from 1 to {_MOST_PARAMETERS}")
    equal = {}
    for k, genotype in genotypes.items():
        try:
            equal[k] = cost.width_for(spec, genotype, parameters)
        except ValueError as error:
            raise ValueError(f"kernel size {k}: {error}; give more --parameters or --channels") from None
    widths = {WIDTH: dict.fromkeys(genotypes, spec.channels), PARAMETERS: equal}
    return Study(spec, config, genotypes, parameters, widths)


def compare(job: Job, study: Study) -> "pl.DataFrame":
    """Trains every network over all seeds, goes on where a killed process stopped, and writes the result.

    What there is of it is written after each seed too, without test accuracies. Leaves
    ``tables/kernel_controlled.parquet`` (a row for each comparison, seed and kernel size),
    ``figures/kernel_controlled.png``, ``report.md``, and `kernel_controlled` in ``summary.json``. A network that
    both comparisons hold is trained once a seed and stands in both.

    Args:
      job: run folder, data, preset, seed, and the option `bits`.
      study: of `make_study`, from the same preset.

    Returns:
      The table: `comparison`, `kernel_size`, `channels`, `seed`, `parameters`, `mismatch` (parameters over the
      reference's, less 1), `memory_bytes`, `macs` (of the stem, an image), `synops` and `energy_nj` (an image,
      measured on validation images), `seconds` (of training, with compilation), `validation_accuracy` and
      `test_accuracy` (0 to 1, after the last epoch; null before all are trained).
    """
    preset = job.preset
    with job.step("kernel_controlled"):
        rows = list(study.rows(job.seeds))
        # Seed by seed, so that the time left rests on measurements of every network early on, and pairs are whole.
        trainings = {
            (seed, network): study.trial(seed, network)
            for seed, network in sorted({(seed, network) for _, network, seed in rows})
        }
        job.say(
            f"{preset.impact_cell!r}: {len(trainings)} trainings of {preset.epochs} epochs; the reference has "
            f"{study.parameters:,} parameters"
        )
        for name, widths in study.widths.items():
            job.say(f"  {name}: " + ", ".join(f"{k}x{k} at C = {channels}" for k, channels in widths.items()))
        clock = trials.Clock(trainings.values())
        results: dict[tuple[int, Network], dict[str, Any]] = {}
        for number, (training, trial) in enumerate(trainings.items(), start=1):
            new = trials.finished(job, trial) is None
            results[training] = trials.run(job, trial, clock, f"{number}/{len(trainings)}")
            if new and number < len(trainings) and number % (len(trainings) // len(job.seeds)) == 0:
                _write(job, study, [row for row in rows if (row[2], row[1]) in results], results, {})
        test = {training: trials.tested(job, trial) for training, trial in trainings.items()}
        return _write(job, study, rows, results, test)


def _write(
    job: Job,
    study: Study,
    rows: list[tuple[str, Network, int]],
    results: Mapping[tuple[int, Network], dict[str, Any]],
    test: Mapping[tuple[int, Network], float],
) -> "pl.DataFrame":
    """Table, figure, summary and report of these rows."""
    import polars as pl

    run = job.run
    found = [
        {
            "comparison": name, "kernel_size": network.kernel_size, "channels": network.channels, "seed": seed,
            "mismatch": results[seed, network]["parameters"] / study.parameters - 1,
            **results[seed, network], "test_accuracy": test.get((seed, network)),
        }
        for name, network, seed in rows
    ]  # fmt: skip
    table = pl.DataFrame(found, schema_overrides={"test_accuracy": pl.Float64}).drop("diverged_epoch")
    run.write_table("kernel_controlled", table)
    summary = over_seeds(table)
    run.update_summary(kernel_controlled=summary.fill_nan(None).to_dicts(), reference_parameters=study.parameters)
    title = (
        f"Kernel size, {job.data.name}, {len(job.data.train.labels):,} training and "
        f"{len(job.data.validation.labels):,} validation images, {job.preset.epochs} epochs"
    )
    figures.controlled_figure(table, run.folder("figures") / "kernel_controlled.png", title)
    pages.write_report(run, _sections(job, study, summary))
    return table


def over_seeds(table: "pl.DataFrame") -> "pl.DataFrame":
    """A row for each comparison and kernel size: statistics over seeds, and the paired difference to kernel size 3.

    Args:
      table: of `compare`.

    Returns:
      `comparison`, `kernel_size`, `channels`, `parameters`, `mismatch`, `memory_bytes`, `macs`; means `synops`,
      `energy_nj`, `seconds`; `n`; `validation`, `difference` and `test` (means) with `_sd`, `_low` and `_high`
      (95 % t-interval). The difference is validation accuracy less that of kernel size 3, seed by seed; null for 3.
      Null of the test, where not all have been tested.

    Raises:
      ValueError: if a comparison has no kernel size 3, or sizes of other seeds than its.
    """
    import polars as pl

    same = ("comparison", "kernel_size", "channels", "parameters", "mismatch", "memory_bytes", "macs")
    rows = []
    for (name,), part in table.group_by("comparison", maintain_order=True):
        by_size = {
            k: own.sort("seed") for (k,), own in part.sort("kernel_size").group_by("kernel_size", maintain_order=True)
        }
        reference = by_size.get(REFERENCE)
        for k, own in by_size.items():
            if reference is None or own["seed"].to_list() != reference["seed"].to_list():
                raise ValueError(f"{name}: kernel size {k} has no kernel size {REFERENCE} of the same seeds beside it")
            row = {column: own[column][0] for column in same}
            row |= {column: float(np.mean(own[column].to_numpy())) for column in ("synops", "energy_nj", "seconds")}
            validation = own["validation_accuracy"].to_numpy()
            row |= {"n": len(validation), **columns("validation", interval(validation))}
            paired = interval(validation - reference["validation_accuracy"].to_numpy())
            row |= {field: None if k == REFERENCE else value for field, value in columns("difference", paired).items()}
            if (test := own["test_accuracy"]).has_nulls():
                rows.append(row | dict.fromkeys(columns("test", paired)))
            else:
                rows.append(row | columns("test", interval(test.to_numpy())))
    return pl.DataFrame(rows)


def accuracy_markdown(summary: "pl.DataFrame", split: str = "validation") -> str:
    """The accuracy of each network as Markdown, in per cent: ``"validation"``, with differences, or ``"test"``."""
    import polars as pl

    rows = []
    for row in summary.iter_rows(named=True):
        shown: dict[str, Any] = {"": row["comparison"], "kernel": kernel_text(row["kernel_size"]), "C": row["channels"]}
        if split == "validation":
            shown |= {"parameters": f"{row['parameters']:,}", "to reference": f"{100 * row['mismatch']:+.2f} %"}
        shown |= {"n": row["n"], f"{split} % ± sd [95 %]": points(row, split)}
        if split == "validation":
            shown["minus 3x3, paired ± sd [95 %]"] = points(row, "difference", "+")
        rows.append(shown)
    table = pl.DataFrame(rows)
    return pages.markdown_table(table, table.columns)


def cost_markdown(summary: "pl.DataFrame", bits: int) -> str:
    """What each network costs, as Markdown; means over seeds where they are measured."""
    import polars as pl

    table = pl.DataFrame([
        {
            "": row["comparison"], "kernel": kernel_text(row["kernel_size"]), "C": row["channels"],
            "parameters": f"{row['parameters']:,}",
            f"memory KiB at {bits} bits": round(row["memory_bytes"] / 1024, 1),
            "MACs M": row["macs"] / 1e6, "synaptic operations M": row["synops"] / 1e6,
            "energy µJ": row["energy_nj"] / 1000, "training s": row["seconds"],
        }
        for row in summary.iter_rows(named=True)
    ])  # fmt: skip
    return pages.markdown_table(table, table.columns)


def _sections(job: Job, study: Study, summary: "pl.DataFrame") -> list[tuple[str, str]]:
    preset = job.preset
    about = (
        f"{job.data.source}\n\nCell `{preset.impact_cell}`, K in {', '.join(map(str, study.genotypes))}, T = "
        f"{preset.time_steps}, {preset.epochs} epochs, batch {preset.batch_size}, recipe "
        f"{job.options.recipe}, seed {job.seed}, n = {preset.seeds} trainings per network. K is the size of "
        f"the cells' convolutions alone: **stem and transition are 3x3 in all networks**. Equal width is C = "
        f"{study.spec.channels}; at equal parameters C comes "
        f"nearest to {study.parameters:,} parameters. A network in both comparisons is trained once."
    )
    accuracy = (
        "After the last epoch. Intervals are Student's t over seeds, 95 % each, not corrected for their number; "
        "differences are taken seed by seed.\n\n" + accuracy_markdown(summary)
    )
    n = int(summary["n"][0])
    missing = f" **Not yet: {n} of {preset.seeds} seeds are trained.**" * summary["test"].has_nulls()
    what = (
        "An image: MACs are the stem's, synaptic operations are counted on validation images. Training time has "
        "compilation in it, which the first seed pays.\n\n"
    )
    return [
        ("Run", about),
        ("Validation accuracy", accuracy),
        ("Cost", what + cost_markdown(summary, preset.bits)),
        ("Test accuracy", f"Touched once, after all trainings.{missing}\n\n" + accuracy_markdown(summary, "test")),
    ]
