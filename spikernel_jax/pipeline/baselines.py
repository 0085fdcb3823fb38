"""What a search is to be measured by: cells that it did not choose, trained as its finalists are.

Step 1's cell at every kernel size, a random cell for each finalist (of its kernel set, under its budget), and the
reference's published cell. The verdict says whether the finalists are better, with an interval.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from spikernel_jax.cells.kernels import kernel_set
from spikernel_jax.cells.space import CellSpace
from spikernel_jax.pipeline import impact, trials
from spikernel_jax.pipeline.job import Job, Purpose
from spikernel_jax.report.intervals import Interval, interval
from spikernel_jax.snn.spec import NetworkSpec

if TYPE_CHECKING:
    import polars as pl

SEARCHED, UNSEARCHED, RANDOM, PUBLISHED = "finalist", "unsearched", "random", "published"
# SNASNet's cell for CIFAR-100, 0302 0030 3003 0000 of its README, without its feedback edge: cells are forward here.
_SNASNET = "0>1:conv3 0>3:conv1 1>2:conv3 2>3:conv3"


class Baseline(NamedTuple):
    """A cell that no search chose."""

    role: str
    kernel_set: str  # its kernels, "3,5"
    of: str | None  # name of the finalist that it is drawn for
    space: CellSpace
    row: NDArray[np.int8]


def cells(job: Job, finalists: "pl.DataFrame") -> dict[str, Baseline]:
    """Random and published cells, by name.

    A random cell is uniform over the distinct cells of its finalist's kernel set that fit the search's budget, but for
    the finalists and cells already drawn; where no other cell fits, there is none.

    Args:
      job: the run.
      finalists: `name`, `kernel_set` and `genotype`.
    """
    budget = job.options.budget
    result: dict[str, Baseline] = {}
    taken = set(finalists["genotype"].to_list())
    for index, row in enumerate(finalists.unique("name", keep="first", maintain_order=True).iter_rows(named=True)):
        space = job.options.space.restricted(kernel_set(row["kernel_set"]))
        rows = space.enumerate()
        rows = rows[budget.fits(job.network(space), rows)]
        order = jax.random.permutation(jax.random.fold_in(job.key(Purpose.RANDOM_BASELINES), index), len(rows))
        free = (rows[i] for i in np.asarray(order) if space.explicit(rows[i]) not in taken)
        if (drawn := next(free, None)) is not None:
            taken.add(space.explicit(drawn))
            result[f"random-{row['name']}"] = Baseline(RANDOM, row["kernel_set"], row["name"], space, drawn)
    if {*CellSpace().operations} <= {*job.options.space.operations}:
        space = CellSpace((1, 3))
        result["snasnet"] = Baseline(PUBLISHED, "1,3", None, space, space.parse(_SNASNET))
    return result


def cell_of(job: Job, row: Mapping[str, Any]) -> tuple[NetworkSpec, NDArray[np.int8]]:
    """Network and genotype of a baseline's row."""
    space = job.options.space.restricted(kernel_set(row["kernel_set"]))
    return job.network(space), space.parse(row["genotype"])


def train_baselines(job: Job) -> "pl.DataFrame":
    """What the finalists are to be compared with, trained as they are: see `cells`.

    Leaves ``tables/baselines.parquet``, a row for each cell and seed. Step 1's networks are those of step 1.
    """
    import polars as pl

    run = job.run
    with job.step("baselines"):
        finalists = run.read_table("finalists", "experiments/train.py", ("name", "kernel_set", "genotype"))
        unsearched, others = impact.trainings(job), cells(job, finalists)
        job.say(f"baselines: step 1's cell with every kernel, {', '.join(others)}; as many seeds and epochs")
        found = []
        for k, own in unsearched.items():
            columns = {"role": UNSEARCHED, "kernel_set": str(k), "of": None}
            columns["genotype"] = own[0].spec.space.explicit(own[0].genotype)
            found += trials.rows(job, trials.run_all(job, own), **columns)
        results = trials.run_all(job, trials.of_cells(job, {n: (c.space, c.row) for n, c in others.items()}))
        for name, cell in others.items():
            columns = {"role": cell.role, "kernel_set": cell.kernel_set, "of": cell.of}
            columns["genotype"] = cell.space.explicit(cell.row)
            found += trials.rows(job, {t: r for t, r in results.items() if t.kind == name}, **columns)
        table = pl.DataFrame(found, infer_schema_length=None)
        run.write_table("baselines", table)
    return table


def over_seeds(table: "pl.DataFrame") -> "pl.DataFrame":
    """A row for each network: `role`, `name`, `kernel_set`, `genotype`, `n`, means and standard deviations."""
    import polars as pl

    return table.group_by("name", maintain_order=True).agg(
        pl.col("role").first(),
        pl.col("kernel_set").first(),
        pl.col("genotype").first(),
        pl.len().cast(pl.Int64).alias("n"),
        pl.col("validation_accuracy").mean(),
        pl.col("validation_accuracy").std().alias("validation_sd"),
        pl.col("test_accuracy").mean(),
        pl.col("test_accuracy").std().alias("test_sd"),
        pl.col("parameters").first(),
        pl.col("synops").mean(),
        pl.col("energy_nj").mean(),
    )


def verdict(finalists: "pl.DataFrame", baselines: "pl.DataFrame", tradeoff: "pl.DataFrame") -> dict[str, Any]:
    """Whether the search helped, by test accuracy.

    Args:
      finalists: a row for each finalist (or set) and seed.
      baselines: a row for each baseline and seed.
      tradeoff: of `tradeoff.choose_model`, which says what was chosen and what fits.

    Returns:
      `over_random`: each finalist's mean over seeds less that of its random cell; mean, `low`, `high` (95 % t-interval
      over pairs of cells) and `n`. `over_unsearched`: the chosen finalist less the unsearched cell of step 1 that fits
      and has the best validation accuracy (`name`), seed by seed, with the t-interval over seeds; None where none
      fits. `text`: both in words.
    """
    import polars as pl

    test = {row["name"]: row["test_accuracy"] for row in tradeoff.iter_rows(named=True)}
    drawn = baselines.filter(pl.col("role") == RANDOM).unique("name", maintain_order=True)
    pairs = [test[row["of"]] - test[row["name"]] for row in drawn.iter_rows(named=True)]
    over_random = interval(pairs) if pairs else None
    chosen = tradeoff.filter(pl.col("chosen"))["name"][0]
    rivals = tradeoff.filter(pl.col("role") == UNSEARCHED, pl.col("fits"))
    over_unsearched, rival = None, None
    if len(rivals):
        rival = rivals.sort("validation_accuracy", descending=True, maintain_order=True)["name"][0]
        own = dict(finalists.filter(pl.col("name") == chosen).select("seed", "test_accuracy").iter_rows())
        its = dict(baselines.filter(pl.col("name") == rival).select("seed", "test_accuracy").iter_rows())
        over_unsearched = interval([own[seed] - its[seed] for seed in sorted(own)])
    text = "**" + _answer(over_random) + "** "
    if over_random:
        text += (
            f"Finalists less random cells of the same kernel set and budget: {_points(over_random)} of test accuracy, "
            f"over {over_random.n} pairs of cells. "
        )
    if over_unsearched:
        text += (
            f"The chosen {chosen} less {rival}, the unsearched cell under the budget with the best validation "
            f"accuracy: {_points(over_unsearched)}, over {over_unsearched.n} seeds."
        )
    return {
        "text": text.strip(),
        "over_random": _plain(over_random),
        "over_unsearched": over_unsearched and {"name": rival} | (_plain(over_unsearched) or {}),
    }


def _answer(over_random: Interval | None) -> str:
    """One sentence: yes, no, or not shown."""
    if over_random is None or math.isnan(over_random.low):
        return "Whether the search helped is not known: fewer than two pairs of cells."
    if over_random.low > 0:
        return "The search helped against random cells."
    return "The search did worse than random cells." if over_random.high < 0 else "No gain over random cells is shown."


def _points(i: Interval) -> str:
    bounds = "no interval" if math.isnan(i.low) else f"95 % [{100 * i.low:+.2f}, {100 * i.high:+.2f}]"
    return f"{100 * i.mean:+.2f} points ({bounds})"


def _plain(i: Interval | None) -> dict[str, Any] | None:
    if i is None:
        return None
    return {name: None if math.isnan(value) else value for name, value in i._asdict().items()}
