"""Does the order of kernel sizes come to rest as networks are trained longer? Runs of `kernel_controlled` in one table.

Every pair of kernel sizes is compared within each run, seed by seed, and its difference between runs that differ in
nothing but their epochs. The verdict is of the two longest: the order is at rest if no pair of sizes has changed places
there, and not if a pair has that either run tells apart, so that its 95 % interval is to one side of 0. What changes
places without being told apart in either run is chance or equality, and the verdict names it.

Validation accuracy is what is compared; of test accuracies, whether there are any.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spikernel_jax.io.files import differences
from spikernel_jax.io.run_folder import RunFolder, commit_text
from spikernel_jax.report import figures, pages
from spikernel_jax.report.figures import kernel_text
from spikernel_jax.report.intervals import columns, interval, points

if TYPE_CHECKING:
    import polars as pl

_NETWORK = ("comparison", "kernel_size", "channels", "parameters", "seed")
_SCRIPT = "experiments/kernel_controlled.py"


def read_runs(folders: Sequence[Path]) -> "dict[int, tuple[RunFolder, pl.DataFrame]]":
    """Finished runs of `kernel_controlled` that differ in their epochs alone.

    Args:
      folders: of two runs or more.

    Returns:
      Folder and table of each by its epochs, the shortest first.

    Raises:
      ValueError: one line on the first that is no such run, not finished, or differs in anything else.
    """
    if len(folders) < 2:
        raise ValueError(f"runs: {len(folders)} given; want the folders of two or more of {_SCRIPT}")
    found: dict[int, tuple[RunFolder, pl.DataFrame]] = {}
    first: dict[str, Any] = {}
    networks: set[tuple[Any, ...]] = set()
    for folder in folders:
        run = RunFolder.open(folder)
        table = run.read_table("kernel_controlled", _SCRIPT, (*_NETWORK, "validation_accuracy", "test_accuracy"))
        if table["test_accuracy"].has_nulls():
            raise ValueError(f"{folder} is not finished: give its command again")
        epochs = run.config["settings"]["epochs"]
        settings = run.config | {"settings": run.config["settings"] | {"epochs": None}}
        own = set(table.select(_NETWORK).iter_rows())
        first, networks = first or settings, networks or own
        if differing := differences(first, settings):
            raise ValueError(f"{folder} differs from {folders[0]} in more than its epochs: {'; '.join(differing)}")
        if own != networks:
            raise ValueError(f"{folder} has other networks than {folders[0]}: {min(own ^ networks)} is in one alone")
        if epochs in found:
            raise ValueError(f"{folder} has {epochs} epochs, as {found[epochs][0].path} has: want one run of each")
        found[epochs] = run, table
    return dict(sorted(found.items()))


def pairs_of(tables: "Mapping[int, pl.DataFrame]") -> "pl.DataFrame":
    """Every two kernel sizes against each other, by epochs.

    Args:
      tables: of `kernel_controlled.compare` by epochs, the shortest first, all of the same networks.

    Returns:
      A row for each comparison, pair and length: `comparison`, `smaller`, `larger`, `epochs`, `n`; `difference`, the
      larger size's validation accuracy less the smaller's (0 to 1), paired by seed, with ``_sd``, ``_low`` and
      ``_high`` of its 95 % t-interval; `apart`, whether that interval is to one side of 0; and `change`, what of the
      difference came since the next shorter run, paired by seed, with its interval too; null in the shortest.
    """
    import polars as pl

    rows = []
    before: dict[tuple[str, int, int], np.ndarray] = {}
    for epochs, table in tables.items():
        for (name,), part in table.group_by("comparison", maintain_order=True):
            values = {
                k: own["validation_accuracy"].to_numpy()
                for (k,), own in part.sort("kernel_size", "seed").group_by("kernel_size", maintain_order=True)
            }
            for smaller, larger in itertools.combinations(values, 2):
                pair = (str(name), int(smaller), int(larger))
                difference = values[larger] - values[smaller]
                found = interval(difference)
                row = dict(zip(("comparison", "smaller", "larger"), pair, strict=True))
                row |= {"epochs": epochs, "n": found.n, **columns("difference", found)}
                row["apart"] = found.low > 0 or found.high < 0
                change = columns("change", interval(difference - before.get(pair, 0.0)))
                rows.append(row | (change if pair in before else dict.fromkeys(change)))
                before[pair] = difference
    return pl.DataFrame(rows, infer_schema_length=None)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether the order of kernel sizes is at rest, in one comparison.

    Attributes:
      comparison: its name.
      lengths: epochs of the two longest runs.
      orders: kernel sizes of both, the most accurate first.
      changed: pairs that changed places between them.
      told_apart: those of `changed` that one of the two runs tells apart.
      level: pairs that the longest run does not tell apart.
    """

    comparison: str
    lengths: tuple[int, int]
    orders: tuple[tuple[int, ...], tuple[int, ...]]
    changed: tuple[tuple[int, int], ...]
    told_apart: tuple[tuple[int, int], ...]
    level: tuple[tuple[int, int], ...]

    @property
    def text(self) -> str:
        """The verdict as a sentence."""
        short, long = self.lengths
        before, after = (" > ".join(map(kernel_text, order)) for order in self.orders)
        if not self.changed:
            text = f"{after}, after {short} epochs as after {long}: **at rest**"
        else:
            rest = "**not at rest**" if self.told_apart else "**at rest but for those that neither run tells apart**"
            text = f"{before} after {short} epochs, {after} after {long}; {_pairs(self.changed)} changed places: {rest}"
        level = f"not told apart after {long} epochs: {_pairs(self.level)}" if self.level else "all are told apart"
        return f"{self.comparison}: {text}; {level}."


def _pairs(pairs: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{kernel_text(a)} and {kernel_text(b)}" for a, b in pairs)


def verdicts(pairs: "pl.DataFrame") -> list[Verdict]:
    """The verdict on each comparison.

    Args:
      pairs: of `pairs_of`, with two lengths at least.

    Returns:
      One for each comparison, in the table's order.
    """
    import polars as pl

    found = []
    for (name,), own in pairs.group_by("comparison", maintain_order=True):
        short, long = own["epochs"].unique().sort().to_list()[-2:]
        by_length = []
        for epochs in (short, long):
            rows = own.filter(pl.col("epochs") == epochs).iter_rows(named=True)
            by_length.append({(row["smaller"], row["larger"]): row for row in rows})
        before, after = by_length
        changed = [pair for pair in after if np.sign(before[pair]["difference"]) != np.sign(after[pair]["difference"])]
        told = [pair for pair in changed if before[pair]["apart"] or after[pair]["apart"]]
        level = [pair for pair, row in after.items() if not row["apart"]]
        orders = (_order(before), _order(after))
        found.append(Verdict(str(name), (short, long), orders, tuple(changed), tuple(told), tuple(level)))
    return found


def _order(rows: Mapping[tuple[int, int], Mapping[str, Any]]) -> tuple[int, ...]:
    """Kernel sizes, the most accurate first: each by how far the first of them is ahead of it."""
    first = min(min(pair) for pair in rows)
    ahead = {first: 0.0} | {b: row["difference"] for (a, b), row in rows.items() if a == first}
    return tuple(sorted(ahead, key=lambda k: -ahead[k]))


def compare_lengths(run: RunFolder, runs: "Mapping[int, tuple[RunFolder, pl.DataFrame]]") -> list[Verdict]:
    """Compares the runs; leaves ``tables/kernel_order.parquet``, ``figures/kernel_order.png`` and ``report.md``.

    Args:
      run: where that goes.
      runs: of `read_runs`.

    Returns:
      The verdicts.
    """
    import polars as pl

    pairs = pairs_of({epochs: table for epochs, (_, table) in runs.items()})
    found = verdicts(pairs)
    run.write_table("kernel_order", pairs)
    accuracies = pl.concat([table.with_columns(epochs=pl.lit(epochs)) for epochs, (_, table) in runs.items()])
    title = f"Validation accuracy of kernel sizes by epochs, {run.config['data']}"
    figures.order_figure(accuracies, run.folder("figures") / "kernel_order.png", title)
    pages.write_report(run, _sections(run, runs, pairs, accuracies, found))
    return found


def _sections(
    run: RunFolder,
    runs: "Mapping[int, tuple[RunFolder, pl.DataFrame]]",
    pairs: "pl.DataFrame",
    accuracies: "pl.DataFrame",
    found: Sequence[Verdict],
) -> list[tuple[str, str]]:
    import polars as pl

    about = (
        f"`{' '.join(run.record()['environment']['command'])}`\n\nRuns of `{_SCRIPT}` that differ in their epochs:\n\n"
    )
    for epochs, (own, _) in runs.items():
        about += f"- {epochs} epochs: {own.path.name}, commit {commit_text(own.record()['environment'])}\n"
    order = "".join(f"- {verdict.text}\n" for verdict in found)
    order += (
        "\nAt rest: no two sizes changed places between the two longest runs. Told apart: the 95 % interval of their "
        "difference is to one side of 0. Intervals are not corrected for their number."
    )
    wide, means = [], []
    for (name, smaller, larger), own in pairs.group_by("comparison", "smaller", "larger", maintain_order=True):
        shown = {"": name, "pair": f"{kernel_text(int(larger))} less {kernel_text(int(smaller))}"}
        shown |= {f"{row['epochs']} epochs": points(row, "difference", "+") for row in own.iter_rows(named=True)}
        wide.append(shown | {"change, the last two": points(own.row(-1, named=True), "change", "+")})
    for (name, k), own in accuracies.group_by("comparison", "kernel_size", maintain_order=True):
        shown = {
            "": name,
            "kernel": kernel_text(int(k)),
            "C": own["channels"][0],
            "parameters": f"{own['parameters'][0]:,}",
        }
        for epochs in runs:
            here = own.filter(pl.col("epochs") == epochs)["validation_accuracy"]
            shown[f"{epochs} epochs"] = points(columns("share", interval(here)), "share")
        means.append(shown)
    tables = [pl.DataFrame(rows) for rows in (wide, means)]
    differ, accurate = (pages.markdown_table(table, table.columns) for table in tables)
    scale = "Points of validation accuracy, mean ± sd [95 % t-interval over seeds]"
    return [
        ("Run", about),
        ("Order", order),
        ("Differences", f"{scale}; differences and their change are taken seed by seed.\n\n{differ}"),
        ("Validation accuracy", f"After the last epoch. {scale}.\n\n{accurate}"),
    ]
