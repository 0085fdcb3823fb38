"""Step 4: accuracy against memory, the Pareto front, and the model chosen under a budget.

Accuracies are to be maximised, memory is to be minimised. A candidate whose accuracy is not finite (training
failed) is never on the front and never chosen.
"""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from spikernel_jax.cells.kernels import kernel_set
from spikernel_jax.io.units import format_bytes
from spikernel_jax.pipeline import baselines
from spikernel_jax.pipeline.job import Job
from spikernel_jax.pipeline.summary import write_summary_report
from spikernel_jax.report import figures
from spikernel_jax.search.queue import NothingFitsError
from spikernel_jax.snn import cost
from spikernel_jax.training.checkpoint import load_model

if TYPE_CHECKING:
    import polars as pl


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


def table_of(
    mean: "pl.DataFrame", memory: list[int], others: "pl.DataFrame", of_others: list[int], budget: int
) -> "pl.DataFrame":
    """Finalists and baselines with their memory, what is on the finalists' Pareto front, and what is chosen.

    Args:
      mean: of the finalists, `baselines.over_seeds`.
      memory: bytes of each.
      others: of the baselines, likewise; never on the front and never chosen.
      of_others: bytes of each.
      budget: bytes.

    Raises:
      NothingFitsError: one line, if no finalist fits.
    """
    import polars as pl

    accuracy = mean["validation_accuracy"].to_numpy()
    best = choose(accuracy, np.asarray(memory), budget)
    finalists = mean.with_columns(
        pl.Series("memory_bytes", memory, dtype=pl.Int64),
        pl.Series("on_front", pareto_front(accuracy, np.asarray(memory))),
        pl.Series("chosen", np.arange(len(mean)) == best),
    )
    compared = others.with_columns(
        pl.Series("memory_bytes", of_others, dtype=pl.Int64), on_front=pl.lit(False), chosen=pl.lit(False)
    )
    return pl.concat([finalists, compared], how="vertical_relaxed")


def choose_model(job: Job) -> "pl.DataFrame":
    """Accuracy against memory, the Pareto front of the finalists, and the one chosen under the budget.

    Both use mean validation accuracy; test accuracy is only reported. Memory is counted at this job's bits,
    which need not be those of the search. Leaves ``tables/tradeoff.parquet`` (a row for each finalist and baseline),
    ``figures/tradeoff.png``, `chosen` and `search_helped` in ``summary.json``, and ``report.md``.

    Raises:
      NothingFitsError: one line, if no finalist fits.
    """
    import polars as pl

    run, budget, bits = job.run, job.options.memory_budget, job.options.bits
    with job.step("tradeoff"):
        wanted = ("name", "kernel_set", "genotype", "seed", "validation_accuracy", "test_accuracy", "parameters")
        by_seed = {
            "finalists": run.read_table("finalists", "experiments/train.py", (*wanted, "checkpoint")),
            "baselines": run.read_table("baselines", "experiments/train.py", (*wanted, "role", "of")),
        }
        finalists = by_seed["finalists"].unique(("name", "seed"), maintain_order=True)
        mean = baselines.over_seeds(finalists.with_columns(role=pl.lit(baselines.SEARCHED)))
        others = baselines.over_seeds(by_seed["baselines"])
        memory = [_bytes_of_export(job, name) for name in mean["name"]]
        of_others = [baselines.memory_of(job, row, bits) for row in others.iter_rows(named=True)]
        table = table_of(mean, memory, others, of_others, budget)
        run.write_table("tradeoff", table)
        n = job.preset.seeds
        title = f"Accuracy (float32) against memory (counted at {bits} bits), {job.data.name}, n = {n} seeds"
        figures.tradeoff_figure(table, run.folder("figures") / "tradeoff.png", title, budget)
        chosen = table.filter(pl.col("chosen")).row(0, named=True)
        sets = finalists.filter(pl.col("name") == chosen["name"])["kernel_set"][0]
        helped = baselines.verdict(by_seed["finalists"], by_seed["baselines"], table, budget)
        run.update_summary(chosen=_summary(job, chosen, sets), search_helped=helped)
    job.say(helped["text"])
    job.say(f"report: {write_summary_report(job)}")
    return table


def _bytes_of_export(job: Job, name: str) -> int:
    model = load_model(job.run.path / f"finalists/{name}/checkpoint")
    return int(cost.costs(model.spec, np.asarray(model.genotype)[None], job.options.bits).memory_bytes[0])


def _summary(job: Job, chosen: dict[str, Any], sets: str) -> dict[str, Any]:
    """What ``summary.json`` says of the chosen model."""
    same = ("name", "genotype", "validation_accuracy", "test_accuracy", "parameters", "memory_bytes")
    return {name: chosen[name] for name in same} | {
        "kernels": list(kernel_set(sets)),
        "seeds": chosen["n"],
        "test_accuracy_sd": chosen["test_sd"],
        "bits": job.options.bits,
        "memory_budget_bytes": job.options.memory_budget,
        "checkpoint": str(job.run.path / f"finalists/{chosen['name']}/checkpoint"),
    }
