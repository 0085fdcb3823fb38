"""Figures of a model on a device; conventions as those of `figures`."""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spikernel_jax.report.figures import BLUE, GREEN, GREY, ORANGE, RED, new_figure, numeric_columns, save

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.figure import Figure


def embedded_figure(table: "pl.DataFrame", path: str | Path, title: str, images: int) -> "Figure":
    """Draws the accuracy of a model in integers against the width of its weights and against its bytes.

    Beside it stand the float network's, also after as many epochs more where there is that row, and what rounding alone
    leaves where the model was trained for its few bits. Bars are standard errors of a share of so many images.

    The table has one row for each width: `bits` (32 of the float network), `validation_accuracy`, `rounded_accuracy`,
    `constant_bytes` and `written_bytes` (both null or NaN of the float network where not known).
    """
    wanted = ("bits", "validation_accuracy", "rounded_accuracy", "constant_bytes", "written_bytes")
    bits, accuracy, rounded, constants, written = numeric_columns(table, wanted)
    whole = bits < 32
    order = np.flatnonzero(whole)[np.argsort(bits[whole])]
    kib = (constants + written) / 1024
    figure, axes = new_figure(title, (8.6, 3.6), ncols=2, sharey=True)
    for axis, x in zip(axes, (bits, kib), strict=True):
        error = 100 * np.sqrt(accuracy * (1 - accuracy) / images)
        axis.errorbar(
            x[order], 100 * accuracy[order], error[order], color=BLUE, marker="o", capsize=3, label="as exported"
        )
        moved = order[rounded[order] < accuracy[order]]
        axis.scatter(
            x[moved], 100 * rounded[moved], facecolors="none", edgecolors=ORANGE, label="rounded alone", zorder=3
        )
        for exact, label, style in zip(accuracy[~whole], ("float32", "float32, trained on"), ("--", ":"), strict=False):
            axis.axhline(100 * exact, color=GREY, linestyle=style, label=label)
    for size in np.unique(kib[order]):  # widths that are stored alike share a place
        here = order[kib[order] == size]
        text = ", ".join(str(int(width)) for width in bits[here])
        axes[1].annotate(f" {text}", (size, 100 * accuracy[here].max()), fontsize=8, va="bottom")
    axes[0].set_ylabel("validation accuracy (%)")
    axes[0].set_xlabel("bits of a weight")
    axes[0].set_xticks(bits[order])
    axes[1].set_xlabel("static memory of the C (KiB), bits beside")
    axes[0].legend(fontsize=8, frameon=False)
    return save(figure, path)


def bits_figure(table: "pl.DataFrame", path: str | Path, title: str) -> "Figure":
    """Draws the test accuracy of finalists against the width of their weights, and against the bytes of their C.

    The table has one row for each finalist, width and training: `finalist`, `bits` (0 of float weights), `epochs` (0
    where it was rounded alone), `test_accuracy`, `constant_bytes` and `written_bytes` (null or NaN of float weights).
    """
    wanted = ("finalist", "bits", "epochs", "test_accuracy", "constant_bytes", "written_bytes")
    names, bits, epochs, accuracy, constants, written = numeric_columns(table, wanted)
    kib = (constants + written) / 1024
    places = {width: place for place, width in enumerate(sorted(set(bits[bits > 0].tolist())))} | {0.0: -1.0}
    places[0.0] = len(places) - 1.0
    figure, axes = new_figure(title, (9.6, 4.0), ncols=2, sharey=True)
    for name, colour in zip(dict.fromkeys(names.tolist()), itertools.cycle((BLUE, ORANGE, GREEN, RED, GREY))):
        for longer in (False, True):
            here = np.flatnonzero((names == name) & ((epochs > 0) == longer))
            here = here[np.argsort([places[own] for own in bits[here]])]
            style: dict[str, Any] = {"color": colour, "marker": "o", "linestyle": "-" if longer else ":"}
            style["markerfacecolor"] = colour if longer else "none"
            x = [places[own] for own in bits[here]]
            axes[0].plot(x, 100 * accuracy[here], label=name if longer == (epochs > 0).any() else None, **style)
            whole = here[bits[here] > 0]
            whole = whole[np.argsort(kib[whole])]
            axes[1].plot(kib[whole], 100 * accuracy[whole], **style)
    if (epochs > 0).any():  # where rounding alone breaks a network, nothing else could be told apart
        floor = 100 * accuracy[epochs > 0].min() - 4
        axes[0].set_ylim(bottom=max(floor, axes[0].get_ylim()[0]))
        if below := int((100 * accuracy < floor).sum()):
            axes[0].set_title(
                f"{below} points of rounding alone lie below, {100 * accuracy.min():.0f} % the least", fontsize=9
            )
    axes[0].set_xticks(list(places.values()), [f"{own:.0f}" if own else "float" for own in places])
    axes[0].set_xlabel("bits of a weight (dotted, open: rounded alone; filled: trained on)")
    axes[0].set_ylabel("test accuracy (%)")
    axes[1].set_xlabel("static memory of the C (KiB)")
    axes[0].legend(fontsize=8, frameon=False)
    return save(figure, path)
