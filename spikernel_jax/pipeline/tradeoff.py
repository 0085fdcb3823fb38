"""Step 4: accuracy against memory, the Pareto front, and the model chosen under a budget.

Accuracies are to be maximised, memory is to be minimised. A candidate whose accuracy is not finite (training
failed) is never on the front and never chosen.
"""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from spikernel_jax.cells.kernels import kernel_set
from spikernel_jax.data import Split
from spikernel_jax.io.units import format_bytes
from spikernel_jax.pipeline import baselines
from spikernel_jax.pipeline.job import Job
from spikernel_jax.pipeline.summary import write_summary_report
from spikernel_jax.report import figures
from spikernel_jax.search.queue import NothingFitsError
from spikernel_jax.snn import cost
from spikernel_jax.snn.devices import NO_LIMIT, Budget, broken
from spikernel_jax.snn.model import Model
from spikernel_jax.snn.spec import NetworkSpec
from spikernel_jax.training.checkpoint import load_model
from spikernel_jax.training.evaluation import activity

if TYPE_CHECKING:
    import polars as pl

_IMAGES = 256  # of the validation split, that firing rates are the means of


def _candidates(accuracy: Any, memory: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 and int64 or float64 vectors of one length; ValueError otherwise."""
    accuracy = np.asarray(accuracy, dtype=np.float64)
    memory = np.asarray(memory)
    if accuracy.ndim != 1 or accuracy.shape != memory.shape:
        raise ValueError(f"need one accuracy and one memory a candidate, got {accuracy.shape} and {memory.shape}")
    if memory.size and (memory.dtype.kind not in "iuf" or not np.isfinite(memory).all() or (memory < 0).any()):
        raise ValueError("the memory of every candidate must be a number of bytes, 0 or more")
    return accuracy, memory


def pareto_front(accuracy: Any, memory: Any) -> np.ndarray:
    """Finds the candidates that no other one beats.

    A candidate is beaten by another with at least its accuracy and at most its memory, one of them better.
    Exact ties do not beat each other.

    Args:
      accuracy: float[n].
      memory: bytes[n].

    Returns:
      bool[n], True on the front; False where the accuracy is not finite.

    Raises:
      ValueError: the shapes differ, or a memory is not a number of bytes.
    """
    accuracy, memory = _candidates(accuracy, memory)
    finite = np.isfinite(accuracy)
    front = np.zeros(accuracy.shape, dtype=bool)
    if finite.any():
        sizes, size_of = np.unique(memory[finite], return_inverse=True)
        best = np.full(sizes.shape, -np.inf)  # best accuracy at each size, sizes ascending
        np.maximum.at(best, size_of, accuracy[finite])
        best_of_smaller = np.concatenate([[-np.inf], np.maximum.accumulate(best)[:-1]])
        on_front = (accuracy[finite] == best[size_of]) & (accuracy[finite] > best_of_smaller[size_of])
        front[finite] = on_front
    return front


def choose(accuracy: Any, memory: Any, budget: int | None) -> int:
    """Chooses the most accurate candidate that fits; of equal ones the smallest, then the first.

    Args:
      accuracy: float[n]; candidates that are not finite are passed over.
      memory: bytes[n].
      budget: bytes, or None for no limit.

    Returns:
      The index of the choice, which is on the Pareto front of all candidates.

    Raises:
      NothingFitsError: no candidate of finite accuracy is within the budget.
      ValueError: there is no candidate of finite accuracy, or an argument is wrong (see `pareto_front`).
    """
    accuracy, memory = _candidates(accuracy, memory)
    finite = np.isfinite(accuracy)
    if not finite.any():
        raise ValueError(f"none of the {accuracy.size} candidates has a finite accuracy")
    fits = finite if budget is None else finite & (memory <= budget)
    if not fits.any():
        smallest = math.ceil(memory[finite].min())
        raise NothingFitsError(
            f"nothing fits in {budget} bytes: the smallest candidate needs {smallest} bytes ({format_bytes(smallest)})"
        )
    indices = np.flatnonzero(fits)
    return int(indices[np.lexsort((indices, memory[indices], -accuracy[indices]))[0]])


class Weighed(NamedTuple):
    """What a network takes: bytes, and which limits of a device it breaks."""

    memory: int
    broken: list[str]


def weigh(budget: Budget, spec: NetworkSpec, genotype: ArrayLike) -> Weighed:
    """What a network takes of a budget."""
    row = np.asarray(genotype)
    memory = int(cost.costs(spec, row[None], budget.bits).memory_bytes[0])
    return Weighed(memory, broken(budget.device, spec, row, budget.bits) if budget.device else [])


def table_of(
    mean: "pl.DataFrame", weighed: list[Weighed], others: "pl.DataFrame", of_others: list[Weighed], budget: Budget
) -> "pl.DataFrame":
    """Finalists and baselines with their memory, what is on the finalists' Pareto front, and what is chosen.

    Args:
      mean: of the finalists, `baselines.over_seeds`.
      weighed: what each takes.
      others: of the baselines, likewise; never on the front and never chosen.
      of_others: what each takes.
      budget: that the chosen one must keep to.

    Raises:
      NothingFitsError: one line, if no finalist fits.
    """
    import polars as pl

    accuracy = mean["validation_accuracy"].to_numpy()
    memory, able = [own.memory for own in weighed], np.array([not own.broken for own in weighed])
    if budget.device and not able.any():
        own = min(weighed, key=lambda own: (len(own.broken), own.memory))
        raise NothingFitsError(f"no finalist fits {budget.device.name}: the nearest has {', '.join(own.broken)}")
    best = choose(np.where(able, accuracy, np.nan), np.asarray(memory), budget.memory_bytes)
    finalists = mean.with_columns(
        pl.Series("memory_bytes", memory, dtype=pl.Int64),
        pl.Series("on_front", pareto_front(accuracy, np.asarray(memory))),
        pl.Series("chosen", np.arange(len(mean)) == best),
        _fits(weighed, budget),
    )
    compared = others.with_columns(
        pl.Series("memory_bytes", [own.memory for own in of_others], dtype=pl.Int64),
        pl.lit(False).alias("on_front"),
        pl.lit(False).alias("chosen"),
        _fits(of_others, budget),
    )
    return pl.concat([finalists, compared], how="vertical_relaxed")


def _fits(weighed: list[Weighed], budget: Budget) -> "pl.Series":
    import polars as pl

    able = [not own.broken and own.memory <= budget.memory_bytes for own in weighed]
    return pl.Series("fits", able, dtype=pl.Boolean)


def choose_model(job: Job) -> "pl.DataFrame":
    """Accuracy against memory, the Pareto front of the finalists, and the one chosen under the budget.

    Both use mean validation accuracy; test accuracy is only reported. Memory is counted at this job's bits,
    which need not be those of the search. Leaves ``tables/tradeoff.parquet`` (a row for each finalist and baseline),
    ``tables/activity.parquet`` (`activity_of` the chosen one), ``figures/tradeoff.png``, `chosen` and `search_helped`
    in ``summary.json``, ``report.md`` and ``report.html``.

    Raises:
      NothingFitsError: one line, if no finalist fits.
    """
    import polars as pl

    run, budget = job.run, job.options.budget
    with job.step("tradeoff"):
        wanted = ("name", "kernel_set", "genotype", "seed", "validation_accuracy", "test_accuracy", "parameters")
        by_seed = {
            "finalists": run.read_table("finalists", "experiments/train.py", (*wanted, "checkpoint")),
            "baselines": run.read_table("baselines", "experiments/train.py", (*wanted, "role", "of")),
        }
        finalists = by_seed["finalists"].unique(("name", "seed"), maintain_order=True)
        mean = baselines.over_seeds(finalists.with_columns(role=pl.lit(baselines.SEARCHED)))
        others = baselines.over_seeds(by_seed["baselines"])
        models = [load_model(run.path / f"finalists/{name}/checkpoint") for name in mean["name"]]
        weighed = [weigh(budget, model.spec, model.genotype) for model in models]
        of_others = [weigh(budget, *baselines.cell_of(job, row)) for row in others.iter_rows(named=True)]
        table = table_of(mean, weighed, others, of_others, budget)
        run.write_table("tradeoff", table)
        n = job.preset.seeds
        title = f"Accuracy (float32) against memory (counted at {budget.bits} bits), {job.data.name}, n = {n} seeds"
        line = budget.memory_bytes if budget.memory_bytes < NO_LIMIT else None
        figures.tradeoff_figure(table, run.folder("figures") / "tradeoff.png", title, line)
        chosen = table.filter(pl.col("chosen")).row(0, named=True)
        sets = finalists.filter(pl.col("name") == chosen["name"])["kernel_set"][0]
        helped = baselines.verdict(by_seed["finalists"], by_seed["baselines"], table)
        run.update_summary(chosen=_summary(job, chosen, sets), search_helped=helped)
        run.write_table(
            "activity", activity_of(models[mean["name"].to_list().index(chosen["name"])], job.data.validation)
        )
    job.say(helped["text"])
    job.say(f"report: {write_summary_report(job)}")
    return table


def activity_of(model: Model, split: Split) -> "pl.DataFrame":
    """A row for each LIF layer and time step: spikes of the split's first image, and the layer's firing rate.

    `rate` is the mean over `images` images and all time steps; `neurons` fire at most once a time step.
    """
    import polars as pl

    images = split.images[:_IMAGES]
    return pl.DataFrame([
        {"site": site, "time_step": step, "spikes": float(spikes), "neurons": own.neurons, "rate": own.rate,
         "images": len(images)}
        for site, own in activity(model, images).items()
        for step, spikes in enumerate(own.spikes_T)
    ])  # fmt: skip


def _summary(job: Job, chosen: dict[str, Any], sets: str) -> dict[str, Any]:
    """What ``summary.json`` says of the chosen model."""
    same = ("name", "genotype", "validation_accuracy", "test_accuracy", "parameters", "memory_bytes")
    return {name: chosen[name] for name in same} | {
        "kernels": list(kernel_set(sets)),
        "seeds": chosen["n"],
        "test_accuracy_sd": chosen["test_sd"],
        "bits": job.options.bits,
        "memory_budget_bytes": job.options.memory_budget,
        "device": job.options.device or None,
        "checkpoint": str(job.run.path / f"finalists/{chosen['name']}/checkpoint"),
    }
