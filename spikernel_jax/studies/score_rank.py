"""What ranks cells rightly: counts, scores of untrained networks, short trainings, and sums of their ranks.

All are held against one table of trained cells (`tables`). Sums of ranks are chosen on the half for looking; figures
are of the held-out half. What a short training says is of one seed, and held against test accuracies of other seeds;
so is everything else, since only equals are compared.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from spikernel_jax.io.store import ResultStore
from spikernel_jax.pipeline import cli
from spikernel_jax.pipeline.job import Job, default_folder, open_study
from spikernel_jax.pipeline.presets import get_preset
from spikernel_jax.report import pages, ranking, search_figures
from spikernel_jax.report.ranking import Estimate
from spikernel_jax.scoring.counts import COUNTS
from spikernel_jax.scoring.predictors import predict, predictor_names
from spikernel_jax.search.queue import digest
from spikernel_jax.snn.spec import NetworkSpec, spec_from_json, spec_to_json
from spikernel_jax.studies.tables import HALVES, LOOKING, read_table

if TYPE_CHECKING:
    import polars as pl

Values = NDArray[np.float64]
EPOCHS = (1, 2, 4)  # of the table's trainings
KINDS = COUNT, SCORE, TRAINED, SUM = ("count", "score", "short training", "sum of ranks")
TOP = (1, 5)  # cells whose best is what a ranking finds


@dataclasses.dataclass(frozen=True)
class Study:
    """What is ranked, and by what.

    Attributes:
      spec: the network that the table's cells were trained as, in which they are scored.
      table: of `tables.load_trained_cells`.
      names: predictors.
      replicates: draws of weights and images.
      batch: images of each.
      draws: of the bootstrap.
    """

    spec: NetworkSpec
    table: "pl.DataFrame"
    names: tuple[str, ...]
    replicates: int
    batch: int
    draws: int


class Cells(NamedTuple):
    """Cells, and all that is known of them."""

    values: dict[str, Values]  # [n, R] by predictor; of short trainings [n, seeds]
    accuracy: Values  # test accuracy, [n, seeds]
    depth: Values
    memory: Values
    seconds: dict[str, float]  # a cell, by predictor

    def take(self, at: Any) -> "Cells":
        """Some of them."""
        values = {name: own[at] for name, own in self.values.items()}
        return Cells(values, self.accuracy[at], self.depth[at], self.memory[at], self.seconds)


def open_table(
    options: cli.RatedTableOptions, kind: str, names: Sequence[str], settings: Mapping[str, int], draws: int = 1
) -> tuple[Job, Study]:
    """Reads the table of a script's options, and makes or continues its run folder.

    Args:
      options: of the script.
      kind: of the folder, where none is named.
      names: predictors.
      settings: of the script's own, which its results depend on too.
      draws: of the bootstrap.

    Raises:
      ValueError: on the first thing that is wrong; nothing has been written then.
    """
    table, facts = read_table(options.table)
    study = make_study(
        spec_from_json(facts["spec"]), table, names, options.replicates, options.batch, draws
    )  # fmt: skip
    given = {field: getattr(options, field) for field in ("replicates", "batch")} | dict(settings)
    return open_job(options, kind, facts, options.batch * options.replicates, given), study


def open_job(
    options: cli.TableOptions, kind: str, facts: Mapping[str, Any], batch_size: int, settings: Mapping[str, Any]
) -> Job:
    """The run folder, and the images, of a study on a table whose settings have been checked; see `open_table`.

    Args:
      options: of the script.
      kind: of the folder, where none is named.
      facts: of the table.
      batch_size: images that are used at once.
      settings: that results depend on, beside the table, its half and the seed.
    """
    preset = get_preset(facts["data"], "cpu", batch_size=batch_size, **facts["limits"])
    name = Path(options.table).stem
    config = {"data": facts["data"], "seed": options.seed, "table": name, "spec": facts["spec"], "half": options.half}
    out = options.out or default_folder(name, options.half, options.seed, kind)
    return open_study(out, config | dict(settings), preset, data_dir=options.data_dir, say=cli.say)


def make_study(
    spec: NetworkSpec, table: "pl.DataFrame", names: Sequence[str], replicates: int, batch: int, draws: int
) -> Study:
    """Settles a study; ValueError on the first setting that is wrong."""
    for name, value in (("--replicates", replicates), ("--batch", batch), ("--draws", draws)):
        if value < 1:
            raise ValueError(f"{name} {value} must be at least 1")
    if unknown := [name for name in names if name not in predictor_names()]:
        raise ValueError(f"--names {unknown[0]!r} is unknown; known: {', '.join(predictor_names())}")
    if (seeds := table["seed"].n_unique()) < 2:
        raise ValueError(f"the table has {seeds} seed: want 2, one to search with and one to be held against")
    for half in HALVES:
        if (cells := table.filter(table["half"] == half)["genotype"].n_unique()) < 2 * max(TOP):
            raise ValueError(f"the table has {cells} cells in its half {half!r}: want {2 * max(TOP)}")
    return Study(spec, table, tuple(names) or predictor_names(), replicates, batch, draws)


def rate(job: Job, study: Study) -> tuple[list[str], Cells]:
    """Scores every cell by every predictor, each once however often it is asked for; texts of the cells, and those.

    Cells that lack one of the seeds are left out.
    """
    import polars as pl

    wide = study.table.pivot("seed", index="genotype", values="test_accuracy").drop_nulls()
    texts = wide["genotype"].to_list()
    rows = np.stack([study.spec.space.parse(text) for text in texts])
    origin = {"spec": spec_to_json(study.spec), "data": job.data.name, "seed": job.seed, "cells": digest(rows),
             "images": digest(job.data.train.images), "replicates": study.replicates, "batch": study.batch}  # fmt: skip
    store = ResultStore(job.run.folder("scores"), origin)
    values, seconds = {}, {}
    for name in study.names:
        place = predictor_names().index(name)
        if place not in store.done():
            named = {"replicates": study.replicates, "batch": study.batch}
            found = predict(name, rows, study.spec, job.data, jax.random.key(job.seed), **named)
            store.save(place, values=found.values, seconds=found.seconds)
            job.say(f"  {name}  {1000 * found.seconds:.2f} ms a cell")
        kept = store.load(place)
        values[name] = kept["values"]
        seconds[name] = float(kept["seconds"]) * (1 if name in COUNTS else study.replicates)
    lasting = study.table["validation"].list.len().max()
    for epochs in (number for number in EPOCHS if number <= lasting):  # pyright: ignore[reportOperatorIssue]
        at = study.table.with_columns(value=pl.col("validation").list.get(epochs - 1))
        own = at.pivot("seed", index="genotype", values="value")
        name = _epochs_name(epochs)
        own = wide.select("genotype").join(own, on="genotype", how="left", maintain_order="left")
        values[name] = own.select(wide.columns[1:]).to_numpy()
        seconds[name] = float(study.table["seconds"].mean()) * epochs / lasting  # pyright: ignore
    known = study.table.unique("genotype").select("genotype", "depth", "memory_bytes")
    facts = wide.select("genotype").join(known, on="genotype", how="left", maintain_order="left")
    depth, memory = (facts[name].to_numpy().astype(np.float64) for name in ("depth", "memory_bytes"))
    return texts, Cells(values, wide.drop("genotype").to_numpy(), depth, memory, seconds)


def _epochs_name(epochs: int) -> str:
    return f"{epochs} epoch{'s' * (epochs > 1)}"


def kind_of(name: str) -> str:
    """Of `KINDS`."""
    if "+" in name:
        return SUM
    return COUNT if name in COUNTS else TRAINED if "epoch" in name else SCORE


def order_by(cells: Cells, name: str, seed: int, replicates: Any) -> Values:
    """What a predictor, or a sum of ranks written ``a + b``, says of cells: [n].

    Args:
      cells: the cells.
      name: of the predictor.
      seed: place of the seed that short trainings are of.
      replicates: places of the replicates whose mean is taken.
    """
    parts = []
    for part in name.split(" + "):
        own = cells.values[part]
        parts.append(own[:, seed] if kind_of(part) == TRAINED else _mean(own[:, replicates]))
    return parts[0] if len(parts) == 1 else np.sum([ranking.ranks(own) for own in parts], 0)


def _mean(values: Values) -> Values:
    """Over replicates; -inf where one is."""
    with np.errstate(invalid="ignore"):
        return values.mean(1)


def figures_of(cells: Cells, names: Sequence[str], baseline: str, rng: np.random.Generator | None) -> dict[str, float]:
    """τ, ρ and regrets of every predictor, of the cells as they are, or resampled: cells, seeds and replicates.

    As they are, each seed in turn is the one searched with, and figures are means over them.

    Args:
      cells: the cells.
      names: of predictors and sums.
      baseline: whose τ is taken from each other's.
      rng: resamples; None does not.
    """
    n, seeds = cells.accuracy.shape
    replicates = next((own.shape[1] for name, own in cells.values.items() if kind_of(name) != TRAINED), 1)
    if rng is None:
        found = [_figures(cells, names, baseline, seed, _others(seeds, seed), np.arange(replicates))
                 for seed in range(seeds)]  # fmt: skip
        return {what: float(np.mean([own[what] for own in found])) for what in found[0]}
    seed = int(rng.integers(seeds))
    others = rng.choice(_others(seeds, seed), seeds - 1)
    drawn = cells.take(rng.integers(n, size=n))
    return _figures(drawn, names, baseline, seed, others, rng.integers(replicates, size=replicates))


def _others(seeds: int, seed: int) -> NDArray[np.int64]:
    return np.array([other for other in range(seeds) if other != seed])


def _figures(
    cells: Cells, names: Sequence[str], baseline: str, seed: int, others: Any, replicates: Any
) -> dict[str, float]:
    truth = cells.accuracy[:, others].mean(1)
    small = cells.memory <= np.median(cells.memory)
    result = {}
    for name in names:
        x = order_by(cells, name, seed, replicates)
        result[f"{name}|tau"] = ranking.kendall(x, truth)
        result[f"{name}|rho"] = ranking.spearman(x, truth)
        result[f"{name}|within depth"] = ranking.kendall(x, truth, cells.depth)
        result[f"{name}|under budget"] = ranking.kendall(x[small], truth[small])
        for k in TOP:
            result[f"{name}|regret {k}"] = ranking.regret(x, truth, k)
    for name in names:
        result[f"{name}|over"] = result[f"{name}|tau"] - result[f"{baseline}|tau"]
    return result


def best_sums(cells: Cells) -> dict[str, str]:
    """The sums of ranks of the highest τ: of two and three untrained ones, and with one or two epochs of training.

    Returns:
      Sums by what may be in them.
    """
    free = [name for name in cells.values if kind_of(name) != TRAINED]
    seeds = range(cells.accuracy.shape[1])

    def mean_tau(name: str) -> float:
        everything = np.arange(cells.values[free[0]].shape[1])
        return float(np.mean([
            ranking.kendall(order_by(cells, name, s, everything), cells.accuracy[:, _others(len(seeds), s)].mean(1))
            for s in seeds
        ]))  # fmt: skip

    result = {}
    pools = {"untrained": [list(pair) for count in (2, 3) for pair in itertools.combinations(free, count)]}
    for epochs in EPOCHS[:2]:
        if (trained := _epochs_name(epochs)) in cells.values:
            pools[trained] = [[*pair, trained] for count in (1, 2) for pair in itertools.combinations(free, count)]
    for what, pool in pools.items():
        result[what] = max((" + ".join(parts) for parts in pool), key=mean_tau)
    return result


def table_of(cells: Cells, found: Mapping[str, Estimate], names: Sequence[str]) -> "pl.DataFrame":
    """A row for each predictor, best τ first; intervals of the middle 95 % as ``_low`` and ``_high``."""
    import polars as pl

    rows = []
    for name in names:
        row: dict[str, Any] = {"predictor": name, "kind": kind_of(name), "seconds": _seconds(cells, name)}
        row["tied"] = ranking.tied(order_by(cells, name, 0, slice(None)))
        for what in ("tau", "rho", "within depth", "under budget", *(f"regret {k}" for k in TOP), "over"):
            own, column = found[f"{name}|{what}"], what.replace(" ", "_")
            row |= {column: own.value, f"{column}_low": own.low, f"{column}_high": own.high}
        rows.append(row)
    return pl.DataFrame(rows).sort("tau", descending=True, nulls_last=True)


def _seconds(cells: Cells, name: str) -> float:
    return sum(cells.seconds[part] for part in name.split(" + "))


def rank(job: Job, study: Study, half: str) -> "pl.DataFrame":
    """Holds every predictor against the table; leaves ``tables/score_rank.parquet``, a figure and ``report.md``."""
    job.say(f"{study.table['genotype'].n_unique()} cells by {len(study.names)} predictors")
    texts, cells = rate(job, study)
    halves = dict(study.table.select("genotype", "half").iter_rows())
    own = np.array([halves[text] for text in texts])
    looked, held = cells.take(own == LOOKING), cells.take(own == half)
    sums = best_sums(looked)
    names = [*cells.values, *dict.fromkeys(sums.values())]
    on_looking = figures_of(looked, names, names[0], None)
    baseline = max((name for name in names if kind_of(name) == COUNT), key=lambda name: on_looking[f"{name}|tau"])
    found = ranking.bootstrap(lambda rng: figures_of(held, names, baseline, rng), study.draws, job.seed)
    table = table_of(held, found, names)
    job.run.write_table("score_rank", table)
    title = f"Best of the first 1 by each ranking, {job.data.name}, {len(held.depth)} cells ({half})"
    search_figures.regret_figure(table, job.run.folder("figures") / "regret.png", title)
    _report(job, study, table, (looked, held), (half, baseline), sums)
    return table


def _report(
    job: Job,
    study: Study,
    table: "pl.DataFrame",
    cells: tuple[Cells, Cells],
    chosen: tuple[str, str],
    sums: Mapping[str, str],
) -> None:
    import polars as pl

    (looked, held), (half, baseline) = cells, chosen
    spread = held.accuracy.mean(1)
    about = (
        f"{job.data.source}\n\n{len(held.depth)} cells of the half {half!r}, {held.accuracy.shape[1]} seeds; mean test "
        f"accuracies from {100 * spread.min():.1f} to {100 * spread.max():.1f} %. Retest τ of test accuracy between "
        f"seeds {ranking.retest(held.accuracy):.3f}. Scores at C = {study.spec.channels}, T = {study.spec.time_steps}, "
        f"{study.batch} images, R = {study.replicates}. Intervals: {study.draws} bootstrap samples of cells, seeds and "
        f"replicates. Sums of ranks and the baseline, {baseline}, were chosen on the {len(looked.depth)} cells for "
        "looking."
    )
    verdicts = {
        "better": table.filter(pl.col("over_low") > 0)["predictor"].to_list(),
        "worse": table.filter(pl.col("over_high") < 0)["predictor"].to_list(),
    }
    rest = [n for n in table["predictor"] if n != baseline and not any(n in own for own in verdicts.values())]
    said = [
        f"- better than {baseline}, the best count: {', '.join(verdicts['better']) or 'none'}",
        f"- no better than it, nor worse: {', '.join(rest) or 'none'}",
        f"- worse: {', '.join(verdicts['worse']) or 'none'}",
    ]
    shown = [
        {"predictor": row["predictor"], "kind": row["kind"], "ms a cell": f"{1000 * row['seconds']:.3g}",
         "tied pairs": f"{100 * row['tied']:.0f} %"}
        | {title: _text(row, column, scale) for title, column, scale in _SHOWN}
        for row in table.iter_rows(named=True)
    ]  # fmt: skip
    shown_table = pl.DataFrame(shown)
    parts = [f"- {what}: {name}" for what, name in sums.items()]
    pages.write_report(
        job.run,
        [
            ("Run", about),
            ("Against counting, by Kendall's τ", "\n".join(said)),
            ("Sums of ranks, chosen on the half for looking", "\n".join(parts)),
            ("All", pages.markdown_table(shown_table, shown_table.columns)),
        ],
    )


_SHOWN = (
    ("τ-b", "tau", 1), ("ρ", "rho", 1), ("τ within depth", "within_depth", 1),
    ("τ of the smaller half", "under_budget", 1),
    ("regret of 1, points", "regret_1", 100), ("of 5", "regret_5", 100),
)  # fmt: skip


def _text(row: Mapping[str, Any], column: str, scale: float) -> str:
    value, low, high = (scale * row[name] for name in (column, f"{column}_low", f"{column}_high"))
    return "-" if np.isnan(value) else f"{value:.2f} [{low:.2f}, {high:.2f}]"
