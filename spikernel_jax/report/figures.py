"""Figures of a run.

A `..._figure` function writes a PNG and a PDF beside it, atomically, and returns the matplotlib figure; its
`title` should say the data set and the number of images. A row whose value is missing or not finite is left
out of its panel, which says how many were. A column that a table lacks is a `ValueError` that names it.
Memory is drawn in KiB (1024 bytes), accuracy in per cent.
"""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spikernel_jax.io.files import atomic_path

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by people with any of the usual colour-vision deficiencies.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
COLOURS = (BLUE, RED, GREEN, "#CC79A7", ORANGE, "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#B0B0B0"

TRADEOFF_COLUMNS = (
    "name", "role", "validation_accuracy", "test_accuracy", "memory_bytes", "on_front", "chosen",
)  # fmt: skip


def numeric_columns(table: "pl.DataFrame", names: Iterable[str]) -> list[np.ndarray]:
    """The named columns; numbers as float64 with nulls as NaN."""
    import polars as pl

    names = list(names)
    if missing := [name for name in names if name not in table.columns]:
        raise ValueError(f"the table lacks the column {', '.join(map(repr, missing))}; it has {table.columns}")
    if table.is_empty():
        raise ValueError("the table has no rows")
    columns = [table[name] for name in names]
    numbers = [column.dtype.is_numeric() or column.dtype == pl.Null for column in columns]
    return [
        column.cast(pl.Float64).to_numpy() if number else column.to_numpy()
        for column, number in zip(columns, numbers, strict=True)
    ]


def new_figure(title: str, size: tuple[float, float], **grid: Any) -> "tuple[Figure, np.ndarray]":
    """A figure that belongs to no window, and its axes as a vector."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = np.atleast_1d(figure.subplots(**grid)).ravel()
    for axis in axes:
        axis.grid(True, color="#E6E6E6", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=12)
    return figure, axes


def save(figure: "Figure", path: str | Path) -> "Figure":
    """Writes a figure as PNG and, for a paper, as PDF beside it, each atomically, and gives it back."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    figure.set_layout_engine("none")  # all stays where it is: finding places takes as long as drawing
    with atomic_path(Path(path).with_suffix(".pdf")) as temporary:
        figure.savefig(temporary, format="pdf", dpi=150, metadata={"CreationDate": None})
    return figure


def say_skipped(axis: "Axes", skipped: int) -> None:
    """Says so in the panel's title, the one place where no point can lie."""
    if skipped:
        axis.set_title(f"{axis.get_title()}\n({skipped} not finite, not drawn)", fontsize=9)


def mean_sd(values: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation (n - 1) of the finite values; NaN where there are too few."""
    values = values[np.isfinite(values)]
    mean = float(values.mean()) if values.size else math.nan
    return mean, float(values.std(ddof=1)) if values.size > 1 else math.nan


def kernel_text(kernel: str | int) -> str:
    """A kernel as figures and tables show it: ``3x3`` of ``3``, and an operation's name as it is."""
    text = str(kernel)
    return f"{text}x{text}" if text.isdecimal() else text


def impact_figure(table: "pl.DataFrame", path: str | Path, title: str) -> "Figure":
    """Draws accuracy, memory and synaptic operations against the kernel.

    The table has one row for each kernel and seed: `kernel` (text, the size ``3`` or an operation's name), `seed`,
    `accuracy` (0 to 1), `memory_bytes` and `synops` (synaptic operations per image). Sizes are drawn to scale.
    """
    names = ("kernel", "seed", "accuracy", "memory_bytes", "synops")
    kernels, seeds, accuracy, memory, synops = numeric_columns(table, names)
    order = list(dict.fromkeys(kernels.tolist()))
    places = [int(kernel) for kernel in order] if all(map(str.isdecimal, order)) else [*range(1, 2 * len(order), 2)]
    sizes = np.array([places[order.index(kernel)] for kernel in kernels.tolist()], float)
    figure, axes = new_figure(title, (10.5, 3.6), nrows=1, ncols=3)
    panels = (
        ("validation accuracy (%)", 100 * accuracy, BLUE),
        ("memory (KiB)", memory / 1024, GREEN),
        ("synaptic operations per image (millions)", synops / 1e6, RED),
    )
    ticks = np.array(places)
    words = max(map(len, order)) > 3
    for axis, (label, values, colour) in zip(axes, panels, strict=True):
        finite = np.isfinite(values)
        means, sds = np.array([mean_sd(values[sizes == size]) for size in ticks]).T
        line = "none" if words else "-"  # names have no order
        axis.errorbar(ticks, means, yerr=np.nan_to_num(sds), color=colour, marker="o", capsize=4, linestyle=line)
        beside = sizes[finite] + 0.28  # a seed's point is not to hide under the mean's bar
        axis.scatter(beside, values[finite], s=16, facecolors="none", edgecolors=colour, alpha=0.8)
        axis.set_xticks(ticks, list(map(kernel_text, order)), rotation=30 * words)
        axis.set_xlim(ticks.min() - 0.7, ticks.max() + 0.9)
        axis.set_xlabel("every convolution" if words else "kernel size of every convolution")
        axis.set_title(label, fontsize=10)
        say_skipped(axis, int((~finite).sum()))
    for axis in axes[1:]:
        axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
    note = f"filled: mean ± sd, open: each seed (n = {np.unique(seeds).size} seeds)"
    figure.supxlabel(note, fontsize=8, color="#555555")
    return save(figure, path)


def controlled_figure(table: "pl.DataFrame", path: str | Path, title: str) -> "Figure":
    """Draws validation accuracy against the kernel size, one panel for each comparison, on a common axis.

    The table has one row for each comparison, kernel size and seed: `comparison` (the panel's title), `kernel_size`,
    `channels`, `parameters`, `seed` and `validation_accuracy` (0 to 1).
    """
    names = ("comparison", "kernel_size", "channels", "parameters", "seed", "validation_accuracy")
    comparison, sizes, channels, parameters, seeds, accuracy = numeric_columns(table, names)
    panels = list(dict.fromkeys(comparison.tolist()))
    figure, axes = new_figure(title, (4.6 * len(panels), 4.2), nrows=1, ncols=len(panels), sharey=True)
    for axis, name, colour, marker in zip(axes, panels, cycle(COLOURS), cycle(MARKERS), strict=False):
        here = comparison == name
        finite = here & np.isfinite(accuracy)
        ticks = np.unique(sizes[here])
        own = [here & (sizes == size) for size in ticks]
        means, sds = 100 * np.array([mean_sd(accuracy[rows]) for rows in own]).T
        axis.errorbar(ticks, means, yerr=np.nan_to_num(sds), color=colour, marker=marker, capsize=4)
        beside = sizes[finite] + 0.28  # a seed's point is not to hide under the mean's bar
        axis.scatter(beside, 100 * accuracy[finite], s=16, facecolors="none", edgecolors=colour, alpha=0.8)
        labels = [
            f"{kernel_text(int(size))}\nC = {channels[rows][0]:.0f}\n{parameters[rows][0]:,.0f}"
            for size, rows in zip(ticks, own, strict=True)
        ]
        axis.set_xticks(ticks, labels, fontsize=8)
        axis.set_xlim(ticks.min() - 0.7, ticks.max() + 0.9)
        axis.set_title(name, fontsize=10)
        say_skipped(axis, int((here & ~finite).sum()))
    axes[0].set_ylabel("validation accuracy (%)")
    note = (
        f"cells' kernel size, width, parameters; filled: mean ± sd, open: each seed (n = {np.unique(seeds).size} seeds)"
    )
    figure.supxlabel(note, fontsize=8, color="#555555")
    return save(figure, path)


def order_figure(table: "pl.DataFrame", path: str | Path, title: str) -> "Figure":
    """Draws validation accuracy against epochs, a line for each kernel size, a panel for each comparison.

    The table has one row for each comparison, kernel size, number of epochs and seed: `comparison` (the panel's title),
    `kernel_size`, `epochs`, `seed` and `validation_accuracy` (0 to 1). Bars are standard deviations over seeds.
    """
    names = ("comparison", "kernel_size", "epochs", "seed", "validation_accuracy")
    comparison, sizes, epochs, seeds, accuracy = numeric_columns(table, names)
    panels, lengths = list(dict.fromkeys(comparison.tolist())), np.unique(epochs)
    figure, axes = new_figure(title, (4.6 * len(panels), 4.2), nrows=1, ncols=len(panels), sharey=True)
    for axis, name in zip(axes, panels, strict=True):
        here = comparison == name
        for size, colour, marker in zip(np.unique(sizes[here]), cycle(COLOURS), cycle(MARKERS), strict=False):
            own = here & (sizes == size)
            means, sds = 100 * np.array([mean_sd(accuracy[own & (epochs == length)]) for length in lengths]).T
            bars = np.nan_to_num(sds)
            axis.errorbar(lengths, means, bars, color=colour, marker=marker, capsize=4, label=kernel_text(int(size)))
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [f"{length:.0f}" for length in lengths])
        axis.minorticks_off()
        axis.set_xlabel("epochs of a training")
        axis.set_title(name, fontsize=10)
        say_skipped(axis, int((here & ~np.isfinite(accuracy)).sum()))
    axes[0].set_ylabel("validation accuracy (%)")
    axes[0].legend(fontsize=8, frameon=False)
    note = f"each point is trained anew, to its own end; mean ± sd (n = {np.unique(seeds).size} seeds)"
    figure.supxlabel(note, fontsize=8, color="#555555")
    return save(figure, path)


def spaced(kernels: str) -> str:
    """A kernel set that may break over lines where it is long."""
    return kernels.replace(",", ", ") if len(kernels) > 9 else kernels


def _wrapped(kernels: str) -> str:
    """A kernel set in a title."""
    return textwrap.fill(spaced(kernels), 40) if len(kernels) > 9 else f"sizes {kernels}"


def search_figure(table: "pl.DataFrame", path: str | Path, title: str) -> "Figure":
    """Draws the score of every cell against its memory, one panel for each kernel set, on common axes.

    The table has one row for each scored cell of each set: `kernel_set` ("1,3"), `score`, `score_se` (its
    standard error), `memory_bytes`, `conv_edges`, `fits` (within the budget) and `finalist`.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm

    wanted = ("kernel_set", "score", "score_se", "memory_bytes", "conv_edges", "fits", "finalist")
    sets, score, error, memory, edges, fits, finalist = numeric_columns(table, wanted)
    fits, finalist = fits.astype(bool), finalist.astype(bool)
    names = sorted(set(sets.tolist()))
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    size = (max(3.4 * columns + 1.2, 7), 2.7 * rows + 0.9)
    figure, axes = new_figure(title, size, nrows=rows, ncols=columns, sharex=True, sharey=True)
    kib = memory / 1024
    finite = np.isfinite(score)
    norm = BoundaryNorm(np.arange(edges.min(), edges.max() + 2) - 0.5, 256)
    for axis, name in zip(axes, names, strict=False):
        here = finite & (sets == name)
        over, within, best = here & ~fits, here & fits & ~finalist, here & finalist
        axis.scatter(kib[over], score[over], s=8, color=GREY, linewidths=0, label="over budget", rasterized=True)
        colours = {"c": edges[within], "cmap": "viridis", "norm": norm}
        axis.scatter(kib[within], score[within], s=10, linewidths=0, rasterized=True, **colours)
        bars = np.where(np.isfinite(error[best]), error[best], 0.0)
        axis.errorbar(
            kib[best], score[best], yerr=bars, fmt="*", color=RED, markeredgecolor="black",
            markeredgewidth=0.6, markersize=10, ecolor="black",
            elinewidth=1, capsize=3, label="finalist ± SE", zorder=5,
        )  # fmt: skip
        axis.set_title(f"{_wrapped(name)}: {int((sets == name).sum()):,} cells", fontsize=10)
        say_skipped(axis, int(((sets == name) & ~finite).sum()))
    for axis in axes[len(names) :]:
        axis.remove()
    if kib.min() > 0 and kib.max() / kib.min() > 8:
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

        axes[0].set_xscale("log")
        axes[0].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes[0].xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes[0].xaxis.set_minor_formatter(NullFormatter())
    figure.supxlabel("memory (KiB)", fontsize=10)
    figure.supylabel("training-free score", fontsize=10)
    bar = figure.colorbar(ScalarMappable(norm, "viridis"), ax=list(axes[: len(names)]))
    bar.set_ticks([int(count) for count in np.arange(edges.min(), edges.max() + 1)])
    bar.set_label("convolution edges of the cell")
    entries = axes[0].get_legend_handles_labels()
    figure.legend(*entries, loc="outside lower right", ncols=2, fontsize=8, frameon=False)
    return save(figure, path)


def tradeoff_figure(table: "pl.DataFrame", path: str | Path, title: str, budget: int | None) -> "Figure":
    """Draws accuracy against memory, finalists and baselines, the finalists' Pareto front, the budget and the choice.

    The front and the choice go by validation accuracy; test accuracy is drawn beside it. The table has one
    row for each network: `name`, `role` (finalist, or which baseline), `validation_accuracy`, `test_accuracy`
    (0 to 1; may be null), `memory_bytes`, `on_front` and `chosen`. The budget is in bytes, or None.
    """
    names, roles, validation, test, memory, on_front, chosen = numeric_columns(table, TRADEOFF_COLUMNS)
    on_front, chosen = on_front.astype(bool), chosen.astype(bool)
    figure, (axis,) = new_figure(title, (8.2, 4.8))
    kib, validation, test = memory / 1024, 100 * validation, 100 * test
    finite = np.isfinite(validation)
    both = finite & np.isfinite(test)
    axis.vlines(kib[both], validation[both], test[both], color=GREY, linewidth=0.8, zorder=1)
    styles = zip(cycle(COLOURS), cycle(MARKERS), strict=False)
    for role, (colour, marker) in zip(dict.fromkeys(roles.tolist()), styles, strict=False):
        here = finite & (roles == role)
        style = {"marker": marker, "edgecolors": colour}
        axis.scatter(kib[here], validation[here], s=44, c=colour, label=role, zorder=3, **style)
        here &= both
        axis.scatter(kib[here], test[here], s=26, c="white", zorder=2, **style)
    front = np.flatnonzero(on_front & finite)
    front = front[np.lexsort((validation[front], kib[front]))]
    axis.step(
        kib[front], validation[front], where="post", color="black", linewidth=1, linestyle="--", zorder=1,
        label="finalists' front (validation)",
    )  # fmt: skip
    axis.scatter(
        kib[chosen & finite], validation[chosen & finite], s=190, facecolors="none", edgecolors="black",
        linewidths=1.8, label="chosen", zorder=4,
    )  # fmt: skip
    if budget is not None:
        axis.axvline(budget / 1024, color=ORANGE, linewidth=1.6, label=f"budget {budget / 1024:,.1f} KiB")
    axis.margins(x=0.1, y=0.12)
    # Front points rise to the right, so a label that would meet the one before it is lifted above it.
    wide, high = np.ptp(axis.get_xlim()), np.ptp(axis.get_ylim())
    lift, last = 0, None
    for index in front:
        near = last is not None and kib[index] - kib[last] < 0.09 * wide
        near = near and validation[index] - validation[last] < 0.05 * high
        lift, last = (lift + 11 if near else 0), index
        axis.annotate(
            str(names[index]), (kib[index], validation[index]), xytext=(0, 11 + lift), fontsize=8,
            textcoords="offset points", ha="center", va="bottom", zorder=6,
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.8} if lift else None,
        )  # fmt: skip
    axis.set_xlabel("memory (KiB), counted")
    axis.set_ylabel("accuracy (%) in float32: filled validation, open test")
    say_skipped(axis, int((~finite).sum()))
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return save(figure, path)


def training_figure(records: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path, title: str) -> "Figure":
    """Draws the loss and the accuracies of each model against the epoch.

    `records` holds for each model's name its records of `epoch`, `train_loss`, `train_accuracy` and
    `validation_accuracy` (0 to 1); an epoch without evaluation may lack the last.

    Raises:
      ValueError: there are no records, or none of a model's has one of these fields.
    """
    if not records:
        raise ValueError("there are no training records to draw")
    figure, (left, right) = new_figure(title, (10.5, 4.2), nrows=1, ncols=2)
    skipped = [0, 0]
    curves = ((left, "train_loss"), (right, "train_accuracy"), (right, "validation_accuracy"))
    styles = zip(cycle(COLOURS), cycle(MARKERS[:6]), strict=False)
    for (name, lines), (colour, marker) in zip(records.items(), styles, strict=False):
        for axis, field in curves:
            points = [(line["epoch"], line[field]) for line in lines if "epoch" in line and field in line]
            if not points:
                raise ValueError(f"the records of {name!r} lack the column {field!r} or 'epoch'")
            epochs, values = np.array(points, dtype=np.float64).T
            finite = np.isfinite(values)
            skipped[axis is right] += int((~finite).sum())
            scale, solid = (1 if axis is left else 100), field != "train_accuracy"
            axis.plot(
                epochs[finite], scale * values[finite], "-" if solid else ":", color=colour, linewidth=1.4,
                marker=marker if solid else None, markersize=4, markevery=max(1, len(points) // 10),
                label=name if axis is left else None,
            )  # fmt: skip
    titles = ("training loss", "accuracy (%): solid validation, dotted training")
    for axis, label, count in zip((left, right), titles, skipped, strict=True):
        axis.set_xlabel("epoch")
        axis.set_title(label, fontsize=10)
        say_skipped(axis, count)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return save(figure, path)
