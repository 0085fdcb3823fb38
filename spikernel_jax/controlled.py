"""What the kernel size itself does: one cell at every size, at equal width and again at equal parameters.

At equal width a larger kernel is a larger network, so what looks like the kernel's doing may be its parameters'. At
equal parameters each size k has a width C_k of its own: the one whose parameters come nearest to the reference's.
Stem and transition are 3×3 in all networks. Data, recipe, epochs, time steps and seeds are the same throughout, so
trainings of one seed are compared as pairs: they see the same images in the same order.

Validation accuracy is what is compared. The test split is touched once for each trained network, after all trainings.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special  # jax itself requires scipy

from spikernel_jax import cost, figures, report
from spikernel_jax.data import DATASETS
from spikernel_jax.files import read_json, read_jsonl, write_json
from spikernel_jax.jobs import Job, impact_genotypes, timed
from spikernel_jax.pipeline import measured
from spikernel_jax.presets import Preset
from spikernel_jax.spec import NetworkSpec
from spikernel_jax.train import TrainingDivergedError, evaluate, train

if TYPE_CHECKING:
    import polars as pl

REFERENCE = 3  # the kernel size that the others are compared with
WIDTH, PARAMETERS = "equal width", "equal parameters"
_MOST_PARAMETERS = 10**9


class Interval(NamedTuple):
    """A sample of n values: mean, standard deviation (n - 1), and the mean's confidence interval by Student's t."""

    mean: float
    sd: float
    n: int
    low: float
    high: float


class Network(NamedTuple):
    """One of the networks that are trained."""

    kernel_size: int
    channels: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which networks are compared.

    Attributes:
      spec: the network at the equal width.
      genotypes: the cell [E] at each kernel size.
      parameters: the reference's, which equal parameters come nearest to.
      widths: C by comparison (`WIDTH`, `PARAMETERS`) and kernel size.
    """

    spec: NetworkSpec
    genotypes: dict[int, NDArray[np.int8]]
    parameters: int
    widths: dict[str, dict[int, int]]

    def spec_at(self, channels: int) -> NetworkSpec:
        """The network at a width."""
        return dataclasses.replace(self.spec, channels=channels)

    def rows(self, seeds: range) -> Iterator[tuple[str, Network, int]]:
        """(comparison, network, seed) of every row of the table."""
        for (name, widths), seed in itertools.product(self.widths.items(), seeds):
            yield from ((name, Network(k, channels), seed) for k, channels in widths.items())


def interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Mean, standard deviation and the mean's t-interval, mean ± t(n - 1)·sd/√n.

    Args:
      values: [n], independent and about normally distributed.
      confidence: of the interval, above 0 and below 1.

    Returns:
      The interval; sd and bounds are NaN for n = 1.

    Raises:
      ValueError: if there is no value or one is not finite, or on a confidence that is none.
    """
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or not x.size or not np.isfinite(x).all():
        raise ValueError(f"values={x.tolist()} must be at least one finite number in a row")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must be above 0 and below 1")
    mean = float(x.mean())
    if x.size == 1:
        return Interval(mean, math.nan, 1, math.nan, math.nan)
    sd = float(x.std(ddof=1))
    half = float(special.stdtrit(x.size - 1, (1 + confidence) / 2)) * sd / math.sqrt(x.size)
    return Interval(mean, sd, x.size, mean - half, mean + half)


def parameters_at(spec: NetworkSpec, genotype: ArrayLike, channels: int) -> int:
    """Parameters of a network at width `channels`."""
    at_width = dataclasses.replace(spec, channels=channels)
    return int(cost.costs(at_width, np.asarray(genotype)[None]).parameters[0])


def width_for(spec: NetworkSpec, genotype: ArrayLike, parameters: int) -> int:
    """The width at which a network's parameters come nearest to a number; of two as near, the smaller.

    Parameters are a quadratic P(C) that grows with C, so P(1), P(2) and P(3) give it whole, and the largest C with
    P(C) <= `parameters` is the floor of its root, taken in whole numbers.

    Args:
      spec: the network; its own width does not matter.
      genotype: codes [E] or [2, E].
      parameters: wanted.

    Returns:
      The width C.

    Raises:
      ValueError: if the network has more parameters at width 1 already.
    """
    one, two, three = (parameters_at(spec, genotype, channels) for channels in (1, 2, 3))
    if parameters < one:
        raise ValueError(f"parameters={parameters} must be at least {one}, which the network has at width 1")
    slope, bend = two - one, three - 2 * two + one
    # 2·P(1 + x) = 2·one + 2·slope·x + bend·x·(x - 1), and the transition makes bend positive.
    linear = 2 * slope - bend
    root = math.isqrt(linear**2 + 8 * bend * (parameters - one))
    below = 1 + (root - linear) // (2 * bend)
    return min((below, below + 1), key=lambda channels: abs(parameters_at(spec, genotype, channels) - parameters))


def make_plan(data: str, preset: Preset, parameters: int | None = None) -> Plan:
    """Chooses all widths and checks the settings; no image is needed.

    Args:
      data: a known data set.
      preset: its kernel sizes, cell, width, seeds, epochs and bits are used.
      parameters: of the reference; None takes those of kernel size 3 at the preset's width.

    Returns:
      The plan.

    Raises:
      ValueError: one line on the first setting that is wrong.
    """
    sizes = tuple(sorted(preset.kernel_sizes))
    if REFERENCE not in sizes or len(sizes) < 2:
        raise ValueError(f"--kernel-sizes {sizes}: want {REFERENCE}, the reference, and at least one other, as 1 3 5 7")
    if not 3 <= preset.impact_seeds <= 1000:
        raise ValueError(f"--seeds {preset.impact_seeds} must be from 3 to 1000: an interval needs a few trainings")
    space, genotypes = impact_genotypes(sizes, preset.impact_cell)
    spec = preset.network(data, DATASETS[data].num_classes, space)
    preset.training(data, preset.impact_epochs)  # refuses epochs
    cost.costs(spec, genotypes[REFERENCE][None], preset.bits)  # refuses bits
    if parameters is None:
        parameters = parameters_at(spec, genotypes[REFERENCE], spec.channels)
    elif not 1 <= parameters <= _MOST_PARAMETERS:
        raise ValueError(f"--parameters {parameters} must be from 1 to {_MOST_PARAMETERS}")
    equal = {}
    for k, genotype in genotypes.items():
        try:
            equal[k] = width_for(spec, genotype, parameters)
        except ValueError as error:
            raise ValueError(f"kernel size {k}: {error}; give more --parameters or --channels") from None
    return Plan(spec, genotypes, parameters, {WIDTH: dict.fromkeys(genotypes, spec.channels), PARAMETERS: equal})


def compare(job: Job, plan: Plan) -> "pl.DataFrame":
    """Trains every network over all seeds, goes on where a killed process stopped, and writes the result.

    Leaves ``tables/kernel_controlled.parquet`` (a row for each comparison, seed and kernel size),
    ``figures/kernel_controlled.png``, ``report.md``, and `kernel_controlled` in ``summary.json``. A network that
    both comparisons hold is trained once a seed and stands in both.

    Args:
      job: run folder, data, preset, seed, and the option `bits`.
      plan: of `make_plan`, from the same preset.

    Returns:
      The table: `comparison`, `kernel_size`, `channels`, `seed`, `parameters`, `mismatch` (parameters over the
      reference's, less 1), `memory_bytes`, `macs` (of the stem, an image), `synops` and `energy_nj` (an image,
      measured on validation images), `seconds` (of training, with compilation), `validation_accuracy` and
      `test_accuracy` (0 to 1, after the last epoch).
    """
    import polars as pl

    started = time.perf_counter()
    preset, run = job.preset, job.run
    seeds = range(job.seed * 1000, job.seed * 1000 + preset.impact_seeds)
    rows = list(plan.rows(seeds))
    # Seed by seed, so that the time left rests on measurements of every network early on.
    trainings = sorted({(seed, network) for _, network, seed in rows})
    job.say(
        f"{preset.impact_cell!r}: {len(trainings)} trainings of {preset.impact_epochs} epochs; the reference has "
        f"{plan.parameters:,} parameters"
    )
    for name, widths in plan.widths.items():
        job.say(f"  {name}: " + ", ".join(f"{k}x{k} at C = {channels}" for k, channels in widths.items()))
    networks = dict.fromkeys(network for _, network in trainings)
    clock = _Clock(
        {training: preset.impact_epochs for training in trainings},
        {network: _work(plan, network) for network in networks},
    )
    results = {
        training: _train(job, plan, *training, clock, f"{number}/{len(trainings)}")
        for number, training in enumerate(trainings, start=1)
    }
    test = {training: _test(job, plan, *training) for training in trainings}
    table = pl.DataFrame([
        {
            "comparison": name, "kernel_size": network.kernel_size, "channels": network.channels, "seed": seed,
            "mismatch": results[seed, network]["parameters"] / plan.parameters - 1,
            **results[seed, network], "test_accuracy": test[seed, network],
        }
        for name, network, seed in rows
    ])  # fmt: skip
    run.write_table("kernel_controlled", table)
    summary = summarise(table)
    run.update_summary(kernel_controlled=summary.to_dicts(), reference_parameters=plan.parameters)
    title = (
        f"Kernel size, {job.data.name}, {len(job.data.train.labels):,} training and "
        f"{len(job.data.validation.labels):,} validation images, {preset.impact_epochs} epochs"
    )
    figures.controlled_figure(table, run.folder("figures") / "kernel_controlled.png", title)
    report.write_report(run, _sections(job, plan, summary))
    timed(job, "kernel_controlled", started)
    return table


def summarise(table: "pl.DataFrame") -> "pl.DataFrame":
    """A row for each comparison and kernel size: statistics over seeds, and the paired difference to kernel size 3.

    Args:
      table: of `compare`.

    Returns:
      `comparison`, `kernel_size`, `channels`, `parameters`, `mismatch`, `memory_bytes`, `macs`; means `synops`,
      `energy_nj`, `seconds`; `n`; `validation`, `difference` and `test` (means) with `_sd`, `_low` and `_high`
      (95 % t-interval). The difference is validation accuracy less that of kernel size 3, seed by seed; null for 3.

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
            row |= {"n": len(validation), **_named("validation", interval(validation))}
            paired = interval(validation - reference["validation_accuracy"].to_numpy())
            row |= {field: None if k == REFERENCE else value for field, value in _named("difference", paired).items()}
            rows.append(row | _named("test", interval(own["test_accuracy"].to_numpy())))
    return pl.DataFrame(rows)


def _named(name: str, i: Interval) -> dict[str, float]:
    return {name: i.mean, f"{name}_sd": i.sd, f"{name}_low": i.low, f"{name}_high": i.high}


def accuracy_markdown(summary: "pl.DataFrame", split: str = "validation") -> str:
    """The accuracy of each network as Markdown, in per cent: ``"validation"``, with differences, or ``"test"``."""
    import polars as pl

    def points(row: dict[str, Any], name: str, sign: str = "") -> str:
        mean, low, high = (f"{100 * row[field]:{sign}.2f}" for field in (name, f"{name}_low", f"{name}_high"))
        return f"{mean} ± {100 * row[f'{name}_sd']:.2f} [{low}, {high}]"

    rows = []
    for row in summary.iter_rows(named=True):
        shown: dict[str, Any] = {"": row["comparison"], "kernel": _kernel(row), "C": row["channels"]}
        if split == "validation":
            shown |= {"parameters": f"{row['parameters']:,}", "to reference": f"{100 * row['mismatch']:+.2f} %"}
        shown |= {"n": row["n"], f"{split} % ± sd [95 %]": points(row, split)}
        if split == "validation":
            difference = "" if row["difference"] is None else points(row, "difference", "+")
            shown["minus 3x3, paired ± sd [95 %]"] = difference or "-"
        rows.append(shown)
    table = pl.DataFrame(rows)
    return report.markdown_table(table, table.columns)


def cost_markdown(summary: "pl.DataFrame", bits: int) -> str:
    """What each network costs, as Markdown; means over seeds where they are measured."""
    import polars as pl

    table = pl.DataFrame([
        {
            "": row["comparison"], "kernel": _kernel(row), "C": row["channels"],
            "parameters": f"{row['parameters']:,}",
            f"memory KiB at {bits} bits": round(row["memory_bytes"] / 1024, 1),
            "MACs M": row["macs"] / 1e6, "synaptic operations M": row["synops"] / 1e6,
            "energy µJ": row["energy_nj"] / 1000, "training s": row["seconds"],
        }
        for row in summary.iter_rows(named=True)
    ])  # fmt: skip
    return report.markdown_table(table, table.columns)


def _kernel(row: dict[str, Any]) -> str:
    return "{0}x{0}".format(row["kernel_size"])


def _sections(job: Job, plan: Plan, summary: "pl.DataFrame") -> list[tuple[str, str]]:
    preset = job.preset
    about = (
        f"{job.data.source}\n\nCell `{preset.impact_cell}`, K in {', '.join(map(str, plan.genotypes))}, T = "
        f"{preset.time_steps}, {preset.impact_epochs} epochs, batch {preset.batch_size}, seed {job.seed}, "
        f"n = {preset.impact_seeds} trainings a network. K is the size of the cells' convolutions alone: **stem and "
        f"transition are 3x3 in all networks**. Equal width is C = {plan.spec.channels}; at equal parameters C comes "
        f"nearest to {plan.parameters:,} parameters. A network in both comparisons is trained once."
    )
    accuracy = (
        "After the last epoch. Intervals are Student's t over seeds, 95 % each, not corrected for their number; "
        "differences are taken seed by seed.\n\n" + accuracy_markdown(summary)
    )
    what = (
        "An image: MACs are the stem's, synaptic operations are counted on validation images. Training time has "
        "compilation in it, which the first seed pays.\n\n"
    )
    return [
        ("Run", about),
        ("Validation accuracy", accuracy),
        ("Cost", what + cost_markdown(summary, preset.bits)),
        ("Test accuracy", "Touched once, after all trainings.\n\n" + accuracy_markdown(summary, "test")),
    ]


class _Clock:
    """Time left: the epochs left of each training times the median epoch of its network.

    A network of which no epoch was seen is taken to be as fast for its work as all others together.
    """

    def __init__(self, epochs_left: dict[tuple[int, Network], int], work: dict[Network, float]):
        self.epochs_left, self.work = dict(epochs_left), work
        self.seconds: dict[Network, list[float]] = {}

    def epoch(self, training: tuple[int, Network], epochs_left: int, seconds: float) -> None:
        self.epochs_left[training] = epochs_left
        self.seconds.setdefault(training[1], []).append(seconds)

    def left(self) -> float:
        each = {network: float(np.median(seconds)) for network, seconds in self.seconds.items()}
        rate = sum(each.values()) / sum(self.work[network] for network in each)
        return sum(
            epochs * each.get(network, rate * self.work[network]) for (_, network), epochs in self.epochs_left.items()
        )


def _work(plan: Plan, network: Network) -> float:
    """Operations of one image and time step if every neuron fired, to guess times by."""
    spec, genotype = plan.spec_at(network.channels), plan.genotypes[network.kernel_size]
    neurons = {name: float(site.neurons) for name, site in spec.sites(genotype).items()}
    return cost.stem_macs(spec) + cost.synaptic_operations(spec, genotype, neurons)


def _folder(job: Job, seed: int, network: Network) -> Path:
    return job.run.path / "trainings" / f"k{network.kernel_size}-c{network.channels}-seed{seed}"


def _fit(job: Job, plan: Plan, seed: int, network: Network, progress: Callable[[dict[str, Any]], None] | None) -> Any:
    """Trains a network, goes on with it, or gives it back as it was trained."""
    folder = _folder(job, seed, network)
    folder.mkdir(parents=True, exist_ok=True)
    spec, genotype = plan.spec_at(network.channels), plan.genotypes[network.kernel_size]
    config = job.preset.training(job.data.name, job.preset.impact_epochs)
    try:
        return train(spec, genotype, job.data, config, seed=seed, folder=folder, progress=progress, say=job.say)
    except TrainingDivergedError as error:  # leaving it out would make the comparison kinder to its kernel size
        raise TrainingDivergedError(f"{folder.name}: {error}") from None


def _train(job: Job, plan: Plan, seed: int, network: Network, clock: _Clock, place: str) -> dict[str, Any]:
    """Parameters, costs and validation accuracy of one training, kept in its folder once it is done."""
    path = _folder(job, seed, network) / "result.json"
    epochs, name = job.preset.impact_epochs, f"{place}  {path.parent.name}"
    if path.exists():
        clock.epochs_left[seed, network] = 0
        return read_json(path)
    last = [time.perf_counter()]

    def line(record: dict[str, Any]) -> None:
        now = time.perf_counter()
        clock.epoch((seed, network), epochs - record["epoch"], now - last[0])
        last[0] = now
        job.say(
            f"  {name}  epoch {record['epoch']}/{epochs}  loss {record['train_loss']:.3f}  validation "
            f"{100 * record['validation_accuracy']:.1f} %  {_minutes(clock.left())} left"
        )

    model = _fit(job, plan, seed, network, line)
    clock.epochs_left[seed, network] = 0
    seconds = sum(float(record["seconds"]) for record in read_jsonl(path.parent / "metrics.jsonl"))
    result = measured(job, model) | {
        "macs": cost.stem_macs(model.spec),
        "seconds": round(seconds, 3),
        "validation_accuracy": float(model.metrics["validation_accuracy"]),
    }
    write_json(path, result)
    return result


def _test(job: Job, plan: Plan, seed: int, network: Network) -> float:
    """Test accuracy of a trained network; asked for once, and then kept in its folder."""
    path = _folder(job, seed, network) / "test.json"
    if not path.exists():
        write_json(path, {"test_accuracy": evaluate(_fit(job, plan, seed, network, None), job.data.test)})
    return float(read_json(path)["test_accuracy"])


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
