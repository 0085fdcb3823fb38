"""Figures of how well searches and scores do; conventions as those of `figures`."""

from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spikernel_jax.report.figures import (
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    MARKERS,
    ORANGE,
    RED,
    mean_sd,
    new_figure,
    numeric_columns,
    save,
    say_skipped,
)

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.figure import Figure


def progress_figure(table: "pl.DataFrame", path: str | Path, title: str) -> "Figure":
    """Draws the best score so far against the number of candidates scored, mean ± sd over seeds.

    The table has one row for each scored candidate: `strategy`, `seed`, `evaluation` (from 1) and `score`. The
    strategy "exhaustive" is drawn as the line of its best, a strategy of one row as a point. Scores that are
    not finite are no progress.
    """
    from spikernel_jax.search.evolution import best_so_far

    strategies, seeds, evaluation, score = numeric_columns(table, ("strategy", "seed", "evaluation", "score"))
    figure, (axis,) = new_figure(title, (8.2, 4.6))
    axis.set_xscale("log")
    styles = zip(cycle(COLOURS), cycle(MARKERS), strict=False)
    for name, (colour, marker) in zip(dict.fromkeys(strategies.tolist()), styles, strict=False):
        here = strategies == name
        own = np.unique(seeds[here])
        curves = [best_so_far(score[here & (seeds == seed)]) for seed in own]
        if name == "exhaustive":
            axis.axhline(curves[0][-1], color=colour, linestyle="--", label=f"best of all {here.sum():,}")
        elif len(curves[0]) == 1:
            axis.scatter(evaluation[here], score[here], c=colour, marker=marker, s=60, zorder=4, label=name)
        else:
            length = min(map(len, curves))
            mean, sd = np.array([mean_sd(at) for at in np.array([curve[:length] for curve in curves]).T]).T
            steps = np.arange(1, length + 1)
            axis.step(steps, mean, where="post", color=colour, label=f"{name}, mean ± sd (n = {len(own)} seeds)")
            axis.fill_between(steps, mean - sd, mean + sd, color=colour, alpha=0.2, linewidth=0, step="post")
    axis.set_xlabel("candidates scored (pruning: supernets)")
    axis.set_ylabel("best training-free score so far")
    say_skipped(axis, int((~np.isfinite(score)).sum()))
    axis.legend(fontsize=8, frameon=False)
    return save(figure, path)


def halving_figure(table: "pl.DataFrame", path: str | Path, title: str) -> "Figure":
    """Draws each cell's score at full size against that at low fidelity, by how far halving took it.

    The table has one row for each cell of one set: `first_score`, `full_score`, `fidelity` (the highest that halving
    scored it at) and `finalist`.
    """
    low, full, fidelity, finalist = numeric_columns(table, ("first_score", "full_score", "fidelity", "finalist"))
    figure, (axis,) = new_figure(title, (6, 4.6))
    for name, colour, size in (("low", GREY, 6), ("medium", BLUE, 12), ("full", RED, 18)):
        own = (fidelity == name) & np.isfinite(low) & np.isfinite(full)
        axis.scatter(low[own], full[own], s=size, color=colour, label=f"{name} ({own.sum()} cells)", alpha=0.7)
    chosen = finalist.astype(bool)
    axis.scatter(low[chosen], full[chosen], s=90, facecolors="none", edgecolors="black", label="halving's choice")
    axis.set_xlabel("score at low fidelity")
    axis.set_ylabel("score at full size")
    axis.legend(fontsize=8, loc="lower right")
    say_skipped(axis, int((~(np.isfinite(low) & np.isfinite(full))).sum()))
    return save(figure, path)


def fidelity_figure(table: "pl.DataFrame", path: str | Path, title: str) -> "Figure":
    """Draws rank correlation with the reference against cost, and the front of the settings worth taking.

    The table has one row for each setting: `channels`, `batch`, `time_steps`, `side`, `seeds`, `ms_a_cell`, `tau`,
    `tau_top_half` and `on_front`.
    """
    names = ("channels", "batch", "time_steps", "side", "seeds", "ms_a_cell", "tau", "tau_top_half", "on_front")
    channels, batch, steps, side, seeds, cost, tau, top, front = numeric_columns(table, names)
    front = front.astype(bool)
    figure, axes = new_figure(title, (11, 4.6), nrows=1, ncols=2)
    for axis, values, label in zip(axes, (tau, top), ("all cells", "the reference's better half"), strict=True):
        for index, width in enumerate(np.unique(channels)):
            own = channels == width
            marker, colour = MARKERS[index % len(MARKERS)], COLOURS[index % len(COLOURS)]
            axis.scatter(cost[own], values[own], s=20, marker=marker, color=colour, label=f"C = {width:.0f}", alpha=0.8)
        axis.set_xscale("log")
        axis.set_xlabel("milliseconds per cell")
        axis.set_title(f"Kendall's tau, {label}", fontsize=10)
    order = np.flatnonzero(front)[np.argsort(cost[front])]
    axes[0].plot(cost[order], tau[order], color=GREY, zorder=0)
    labelled = 0.0
    for i in order:
        if cost[i] < 1.6 * labelled:  # no room for another label
            continue
        labelled = cost[i]
        text = f"B{batch[i]:.0f} T{steps[i]:.0f} S{side[i]:.0f} R{seeds[i]:.0f}"
        axes[0].annotate(text, (cost[i], tau[i]), fontsize=6, xytext=(3, -8), textcoords="offset points")
    axes[1].legend(fontsize=8, loc="lower right")
    return save(figure, path)


def regret_figure(table: "pl.DataFrame", path: str | Path, title: str) -> "Figure":
    """Draws what the first cell by each ranking lacks of the best against what a cell's rating takes.

    The table has one row for each predictor: `predictor`, `kind`, `seconds` a cell, and `regret_1` with its bounds
    `regret_1_low` and `regret_1_high`, as shares.
    """
    names = ("predictor", "kind", "seconds", "regret_1", "regret_1_low", "regret_1_high")
    predictor, kind, seconds, regret, low, high = numeric_columns(table, names)
    figure, (axis,) = new_figure(title, (9, 5))
    axis.set_xscale("log")
    for name, colour, marker in zip(dict.fromkeys(kind.tolist()), (BLUE, ORANGE, RED, GREEN), MARKERS, strict=False):
        own = (kind == name) & np.isfinite(regret)
        bars = 100 * np.stack([regret - low, high - regret])[:, own].clip(0)
        axis.errorbar(seconds[own], 100 * regret[own], bars, fmt=marker, color=colour, label=name, elinewidth=0.5, ms=5)
        for x, y, text in zip(seconds[own], regret[own], predictor[own], strict=True):
            axis.annotate(text, (x, 100 * y), fontsize=6, xytext=(4, 3), textcoords="offset points")
    axis.set_xlabel("seconds a cell")
    axis.set_ylabel("regret of the first cell, points of test accuracy")
    say_skipped(axis, int((~np.isfinite(regret)).sum()))
    axis.legend(fontsize=8, frameon=False)
    return save(figure, path)


def searches_figure(table: "pl.DataFrame", path: str | Path, title: str) -> "Figure":
    """Draws the regret of what each search chooses against the seconds that it had.

    The table has one row for each search and budget: `search`, `seconds`, and `regret`, `low` and `high`, as shares.
    """
    search, seconds, regret, low, high = numeric_columns(table, ("search", "seconds", "regret", "low", "high"))
    figure, (axis,) = new_figure(title, (7.5, 4.6))
    axis.set_xscale("log")
    for name, colour, marker in zip(dict.fromkeys(search.tolist()), COLOURS, MARKERS, strict=False):
        own = search == name
        axis.plot(seconds[own], 100 * regret[own], color=colour, marker=marker, ms=5, label=name)
        axis.fill_between(seconds[own], 100 * low[own], 100 * high[own], color=colour, alpha=0.15, linewidth=0)
    axis.set_xlabel("seconds of the search")
    axis.set_ylabel("regret, points of test accuracy")
    axis.legend(fontsize=8, frameon=False)
    return save(figure, path)
