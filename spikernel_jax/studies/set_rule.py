"""Does step 2's rule keep the kernel sets whose best cells are best? Held against a table of trained cells.

Step 1's cell is trained with each kernel by the table's recipe, the rule (`kernel_sets.keep_sets`) judges all pairs of
them, and the best cells of what it kept are compared with the best of everything, under several budgets of memory, and
with what is left if as many sets are kept at random. A search is as good as can be here: it finds a set's best cell by
the validation accuracy of one seed, and is held against the test accuracies of the others.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spikernel_jax.cells.kernels import Kernel, kernel_set, kernel_set_text
from spikernel_jax.pipeline import cli
from spikernel_jax.pipeline.job import Job
from spikernel_jax.pipeline.kernel_sets import SetVerdict, judge
from spikernel_jax.pipeline.options import impact_genotypes
from spikernel_jax.report import pages, ranking
from spikernel_jax.report.ranking import Estimate
from spikernel_jax.snn.spec import spec_from_json
from spikernel_jax.studies import score_rank, trained_cells
from spikernel_jax.studies.tables import read_table
from spikernel_jax.training.recipe import TrainConfig

if TYPE_CHECKING:
    import polars as pl

BUDGETS = (0.25, 0.5, 0.75, 1.0)  # quantiles of the cells' memory
LEAST = 10  # cells of a half


@dataclasses.dataclass(frozen=True)
class Study:
    """What is judged, and on what.

    Attributes:
      impact: the trainings of step 1.
      kernels: of its cells, one each.
      table: of `tables.load_trained_cells`, of one half.
      draws: of the bootstrap.
    """

    impact: trained_cells.Study
    kernels: tuple[Kernel, ...]
    table: "pl.DataFrame"
    draws: int


class Known(NamedTuple):
    """Trained cells, and which sets hold them."""

    validation: NDArray[np.float64]  # [n, seeds]
    accuracy: NDArray[np.float64]  # on test images, [n, seeds]
    memory: NDArray[np.int64]  # bytes, [n]
    held: NDArray[np.bool_]  # [sets, n]


def open_rule(options: cli.TableOptions, seeds: int, draws: int) -> tuple[Job, Study]:
    """Reads the table of a script's options, and makes or continues its run folder.

    Args:
      options: of the script.
      seeds: trainings of each of step 1's cells.
      draws: of the bootstrap.

    Raises:
      ValueError: on the first thing that is wrong; nothing has been written then.
    """
    table, facts = read_table(options.table)
    for name, value, least in (("--seeds", seeds, 2), ("--draws", draws, 1)):
        if value < least:
            raise ValueError(f"{name} {value} must be at least {least}")
    own = table.filter(table["half"] == options.half)
    if table["seed"].n_unique() < 2 or own["genotype"].n_unique() < LEAST:
        raise ValueError(f"{options.table}: want two seeds of {LEAST} cells in its half {options.half!r}")
    spec, config = spec_from_json(facts["spec"]), TrainConfig(**facts["recipe"])
    given = {"recipe": facts["recipe"], "seeds": seeds, "draws": draws}
    job = score_rank.open_job(options, "set-rule", facts, config.batch_size, given)
    cells = impact_genotypes(spec.space, job.options.cell)
    return job, Study(trained_cells.Study(spec, config, np.stack([*cells.values()]), seeds), tuple(cells), own, draws)


def verdicts_of(study: Study, impact: "pl.DataFrame") -> list[SetVerdict]:
    """What the rule says of all pairs of kernels, from the trainings of step 1."""
    import polars as pl

    names = {study.impact.spec.space.explicit(row): str(kernel)
             for row, kernel in zip(study.impact.rows, study.kernels, strict=True)}  # fmt: skip
    named = impact.with_columns(kernel=pl.col("genotype").replace_strict(names), accuracy="validation_accuracy")
    return judge(named, None)


def known_of(table: "pl.DataFrame", verdicts: list[SetVerdict]) -> Known:
    """The cells of a table that have all seeds."""
    import polars as pl

    wide = {
        name: table.pivot("seed", index="genotype", values=name).drop_nulls().sort("genotype")
        for name in ("validation_accuracy", "test_accuracy")
    }
    facts = wide["test_accuracy"].select("genotype").join(
        table.unique("genotype").select("genotype", "memory_bytes", "kernel_sizes"), on="genotype", how="left",
        maintain_order="left",
    )  # fmt: skip
    used = [set(kernel_set(text)) if text else set() for text in facts["kernel_sizes"]]
    held = np.array([[own <= set(verdict.kernel_set) for own in used] for verdict in verdicts])
    validation, accuracy = (own.select(pl.exclude("genotype")).to_numpy() for own in wide.values())
    return Known(validation, accuracy, facts["memory_bytes"].to_numpy(), held)


def value(known: Known, able: NDArray[np.bool_], seed: int) -> float:
    """Test accuracy over other seeds of the cell, of the able ones, that one seed's validation chooses; NaN of none."""
    if not able.any():
        return float("nan")
    chosen = np.where(able, known.validation[:, seed], -np.inf).argmax()
    return float(np.delete(known.accuracy[chosen], seed).mean())


def figures_of(known: Known, kept: NDArray[np.bool_], rng: np.random.Generator | None) -> dict[str, float]:
    """What the best cells of each set, of those kept and of all are worth under each budget, as it is or resampled.

    ``BUDGET|rule`` and ``BUDGET|random`` are what they lack of the best of all sets: of those kept, and the mean over
    all choices of as many sets. As it is, figures are means over the seed that chooses.
    """
    seeds = known.accuracy.shape[1]
    limits = np.quantile(known.memory, BUDGETS)
    if rng is None:
        found = [_figures(known, kept, limits, seed) for seed in range(seeds)]
        return {name: float(np.mean([own[name] for own in found])) for name in found[0]}
    at = rng.integers(len(known.memory), size=len(known.memory))
    validation, accuracy, memory = known.validation[at], known.accuracy[at], known.memory[at]
    return _figures(Known(validation, accuracy, memory, known.held[:, at]), kept, limits, int(rng.integers(seeds)))


def _figures(known: Known, kept: NDArray[np.bool_], limits: NDArray[np.float64], seed: int) -> dict[str, float]:
    found = {}
    choices = list(itertools.combinations(range(len(kept)), int(kept.sum())))
    for quantile, limit in zip(BUDGETS, limits, strict=True):
        fits = known.memory <= limit
        best = value(known, fits & known.held.any(0), seed)
        for index, own in enumerate(known.held):
            found[f"{quantile}|{index}"] = value(known, fits & own, seed)
        found[f"{quantile}|all"] = best
        found[f"{quantile}|rule"] = best - value(known, fits & known.held[kept].any(0), seed)
        drawn = [best - value(known, fits & known.held[list(choice)].any(0), seed) for choice in choices]
        found[f"{quantile}|random"] = float(np.mean(drawn))
    return found


def check_rule(job: Job, study: Study, half: str) -> "pl.DataFrame":
    """Trains step 1's cells, and leaves ``tables/set_rule.parquet`` (a row for each set and budget) and ``report.md``.

    Args:
      job: run folder and data.
      study: of `open_rule`.
      half: of the table, for the report.
    """
    import polars as pl

    impact = trained_cells.train_cells(job, study.impact)
    verdicts = verdicts_of(study, impact)
    known = known_of(study.table, verdicts)
    kept = np.array([verdict.kept for verdict in verdicts])
    found = ranking.bootstrap(lambda rng: figures_of(known, kept, rng), study.draws, job.seed)
    limits = np.quantile(known.memory, BUDGETS)
    rows = []
    for (index, verdict), (quantile, limit) in itertools.product(
        enumerate(verdicts), zip(BUDGETS, limits, strict=True)
    ):
        best = found[f"{quantile}|{index}"]
        rows.append({
            "kernel_set": kernel_set_text(verdict.kernel_set), "kept": verdict.kept, "reason": verdict.reason,
            "quantile": quantile, "budget_bytes": int(limit),
            "cells": int((known.held[index] & (known.memory <= limit)).sum()),
            "best": best.value, "best_low": best.low, "best_high": best.high,
        })  # fmt: skip
    table = pl.DataFrame(rows)
    job.run.write_table("set_rule", table)
    _report(job, study, half, (table, impact), (known, kept), found)
    return table


def _report(
    job: Job,
    study: Study,
    half: str,
    tables: tuple["pl.DataFrame", "pl.DataFrame"],
    judged: tuple[Known, NDArray[np.bool_]],
    found: Mapping[str, Estimate],
) -> None:
    import polars as pl

    (table, impact), (known, kept) = tables, judged
    share = known.held[kept].any(0).sum() / known.held.any(0).sum()
    about = (
        f"{job.data.source}\n\n{len(known.memory)} cells of the half {half!r}, {known.accuracy.shape[1]} seeds; step "
        f"1's cell {job.options.cell!r}, {study.impact.seeds} seeds, by the table's recipe. The rule keeps "
        f"{kept.sum()} of {len(kept)} sets, and with them {100 * share:.0f} % of the table's cells. Budgets are "
        "quantiles of the cells' memory. A set's best cell: chosen by one seed's validation, test accuracy of the "
        "others. Lost: what the best of the sets kept lacks of the best of all. "
        f"Intervals: {study.draws} bootstrap samples of cells and seeds."
    )
    lost = pl.DataFrame([
        {"budget, bytes": limit, "best of all sets, %": _text(found[f"{quantile}|all"]),
         "lost by the rule, points": _text(found[f"{quantile}|rule"]),
         "lost by as many sets at random": _text(found[f"{quantile}|random"])}
        for quantile, limit in table.unique("quantile").sort("quantile").select("quantile", "budget_bytes").iter_rows()
    ])  # fmt: skip
    steps = impact.group_by("genotype", maintain_order=True).agg(
        (100 * pl.col("validation_accuracy").mean()).alias("validation, %"),
        (100 * pl.col("validation_accuracy").std()).alias("sd"), pl.col("memory_bytes").first(),
    )  # fmt: skip
    sets = table.with_columns(best=100 * pl.col("best")).pivot(
        "budget_bytes", index=["kernel_set", "kept", "reason"], values="best"
    )
    pages.write_report(
        job.run,
        [
            ("Run", about),
            ("Step 1", pages.markdown_table(steps, steps.columns)),
            ("The rule against keeping all", pages.markdown_table(lost, lost.columns)),
            ("Best cell of each set under each budget, %", pages.markdown_table(sets, sets.columns)),
        ],
    )


def _text(own: Estimate) -> str:
    if np.isnan(own.value):
        return "-"
    return f"{100 * own.value:.2f} [{100 * own.low:.2f}, {100 * own.high:.2f}]"
