"""Which way of searching finds the best cell in as many seconds, played on a table of trained cells.

A search knows of a cell what it has paid for: a score costs what it was measured to cost, an epoch what the table's
epochs took. It is held against test accuracies of other seeds than the one it trained with. Each repeat draws half of
the cells, a seed and replicates of scores anew.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spikernel_jax.pipeline.job import Job
from spikernel_jax.report import pages, search_figures
from spikernel_jax.report.intervals import interval
from spikernel_jax.search.shorts import PRIOR, RUNGS, Line, halve, shape, winner
from spikernel_jax.studies.score_rank import Cells, Study, order_by, rate
from spikernel_jax.studies.tables import HALVES, HELD_OUT

if TYPE_CHECKING:
    import polars as pl

Values = NDArray[np.float64]
PREDICTORS = ("depth", "sahd_paper", *PRIOR)
BUDGETS = (1, 2, 4, 8, 16)  # in trainings of a mean cell


class Known(NamedTuple):
    """What one repeat's search can learn of its cells."""

    prior: Values  # sum of ranks, [n]
    scores: dict[str, Values]  # [n]
    score_seconds: dict[str, float]  # a cell
    validation: Values  # after each epoch, [n, epochs]
    seconds: Values  # of an epoch, [n]


Search = Callable[[Known, float, np.random.Generator], int]


def _in_full(order: NDArray[np.int64], known: Known, seconds: float) -> int:
    """The best of the first cells of an order, trained to the end while seconds last; one in any case."""
    spent = np.cumsum(known.seconds[order]) * known.validation.shape[1]
    tried = order[: max(1, np.count_nonzero(spent <= seconds))]
    return int(tried[known.validation[tried, -1].argmax()])


def random(known: Known, seconds: float, rng: np.random.Generator) -> int:
    """Random cells, trained in full."""
    return _in_full(rng.permutation(len(known.seconds)), known, seconds)


def by(name: str) -> Search:
    """The first cells by a score that all cells are rated with, trained in full; the first alone is the paper's way."""

    def search(known: Known, seconds: float, rng: np.random.Generator) -> int:
        mixed = rng.permutation(len(known.seconds))  # so that equals come in any order
        value = known.prior if name == "prior" else known.scores[name]
        left = seconds - known.score_seconds.get(name, 0.0) * len(known.seconds)
        return _in_full(mixed[np.argsort(-value[mixed], kind="stable")], known, left)

    return search


def short(known: Known, seconds: float, rng: np.random.Generator) -> int:
    """Random cells, trained for one epoch."""
    order = rng.permutation(len(known.seconds))
    tried = order[: max(1, np.count_nonzero(np.cumsum(known.seconds[order]) <= seconds))]
    return int(tried[known.validation[tried, 0].argmax()])


def trainings(known: Known, seconds: float, rng: np.random.Generator) -> int:
    """The first cells by the prior, trained shortly, a third of them further: the default search (`search.shorts`)."""
    n = len(known.seconds)
    line = Line(np.empty((n, 0), np.int8), [np.arange(n)], known.prior, rng.random(n))
    best = 0
    for first in range(1, n + 1):
        found = halve(line, shape(first), lambda at, until: known.validation[at, until - 1])
        chosen = winner(line.members[0], found)
        if chosen is None or (first > 1 and found.epochs @ known.seconds > seconds):
            break
        best = chosen
    return best


SEARCHES: dict[str, Search] = {
    "random cells": random,
    "SAHD": by("sahd_paper"),
    "depth": by("depth"),
    "one epoch": short,
    "prior": by("prior"),
    "trainings": trainings,
}


def known_of(cells: Cells, validation: Values, seconds: Values, seed: int, replicates: NDArray[np.int64]) -> Known:
    """What a search with one seed can learn; validation [n, seeds, epochs], seconds of an epoch [n, seeds]."""
    scores = {name: order_by(cells, name, seed, replicates) for name in PREDICTORS}
    prior = order_by(cells, " + ".join(PRIOR), seed, replicates)
    return Known(prior, scores, cells.seconds, validation[:, seed], seconds[:, seed])


def play(
    cells: Cells, validation: Values, seconds: Values, repeats: int, seed: int, budgets: Sequence[float] = BUDGETS
) -> "pl.DataFrame":
    """Regrets of every search with every budget; in one repeat all have the same cells and draws."""
    import polars as pl

    n, seeds = cells.accuracy.shape
    replicates = cells.values["sahd_paper"].shape[1]
    mean = float(seconds.mean()) * validation.shape[2]
    rows = []
    for repeat in range(repeats):
        rng = np.random.default_rng([seed, repeat])
        at, own = rng.permutation(n)[: math.ceil(n / 2)], int(rng.integers(seeds))
        drawn = rng.integers(replicates, size=replicates)
        known = known_of(cells.take(at), validation[at], seconds[at], own, drawn)
        truth = np.delete(cells.accuracy[at], own, 1).mean(1)
        for budget in budgets:
            for name, search in SEARCHES.items():
                chosen = search(known, budget * mean, np.random.default_rng([seed, repeat, 1]))
                rows.append({"search": name, "budget": budget, "seconds": budget * mean, "repeat": repeat,
                             "regret": float(truth.max() - truth[chosen])})  # fmt: skip
    return pl.DataFrame(rows)


def over_repeats(played: "pl.DataFrame") -> "pl.DataFrame":
    """A row for each search and budget: mean regret, its 95 % interval, and that of its paired lead of the others.

    `lead` is another search's regret less this one's, of the other that has the least.
    """
    import polars as pl

    rows = []
    for (budget, seconds), own in played.group_by("budget", "seconds", maintain_order=True):
        wide = own.pivot("search", index="repeat", values="regret")
        for name in SEARCHES:
            regret = interval(wide[name])
            rival = min((other for other in SEARCHES if other != name), key=lambda other: wide[other].sum())
            lead = interval(wide[rival] - wide[name])
            rows.append({"search": name, "budget": budget, "seconds": seconds, "n": regret.n, "regret": regret.mean,
                         "low": regret.low, "high": regret.high, "rival": rival, "lead": lead.mean,
                         "lead_low": lead.low, "lead_high": lead.high})  # fmt: skip
    return pl.DataFrame(rows)


def compare(job: Job, study: Study, half: str, repeats: int) -> "pl.DataFrame":
    """Plays all searches on a half; leaves ``tables/search_compare.parquet``, a figure and ``report.md``."""
    if half not in HALVES:
        raise ValueError(f"--half {half!r} is unknown; known: {', '.join(HALVES)}")
    if (lasting := min(map(len, study.table["validation"]))) < RUNGS[-1]:
        raise ValueError(f"the table's trainings have {lasting} epochs: want {RUNGS[-1]}")
    texts, cells = rate(job, study)
    seeds = study.table["seed"].unique().sort().to_list()
    rows = {(row["genotype"], row["seed"]): row for row in study.table.iter_rows(named=True)}
    halves = dict(study.table.select("genotype", "half").iter_rows())
    validation = np.array([[rows[text, seed]["validation"] for seed in seeds] for text in texts])
    seconds = np.array([[rows[text, seed]["seconds"] for seed in seeds] for text in texts]) / validation.shape[2]
    at = np.flatnonzero([halves[text] == half for text in texts])
    table = over_repeats(play(cells.take(at), validation[at], seconds[at], repeats, job.seed))
    job.run.write_table("search_compare", table)
    title = f"Regret of what a search chooses, {job.data.name}, {len(at)} cells ({half})"
    search_figures.searches_figure(table, job.run.folder("figures") / "searches.png", title)
    shown = table.with_columns(**{name: 100 * table[name] for name in ("regret", "low", "high", "lead", "lead_low",
                                                                       "lead_high")})  # fmt: skip
    looked = "" if half == HELD_OUT else " **This is the half that the prior was chosen on.**"
    about = (
        f"{job.data.source}\n\n{len(at)} cells of the half {half!r}, half of them drawn in each of {repeats} repeats, "
        f"{len(seeds)} seeds.{looked} Regret: points of test accuracy that the chosen cell lacks of the best drawn, "
        "over seeds that the search did not see. Budget: in trainings of a mean cell, as many seconds for all. Lead of "
        "the rival with the least regret, paired. Intervals: 95 %, over repeats, which share cells."
    )
    sections = [("Run", about), ("Searches", pages.markdown_table(shown, shown.columns))]
    pages.write_report(job.run, sections)
    return table
