"""Kernel sizes compared over lengths of training: pairs by hand, verdicts, what is refused, and the script."""

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import scripts
from spikernel_jax.io.run_folder import RunFolder
from spikernel_jax.report import figures
from spikernel_jax.studies.kernel_order import pairs_of, read_runs, verdicts

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "experiments" / "kernel_order.py"
start = functools.partial(scripts.start, SCRIPT)
refused = functools.partial(scripts.refused, SCRIPT)
SPREAD = (-0.01, 0.0, 0.01)  # of seeds, common to all sizes: no difference has any of it
CONFIG = {"data": "mnist5k", "preset": "smoke", "seed": 0, "settings": {"epochs": 2, "channels": 4}}


def drawn(means: dict[int, float], noise: dict[int, tuple[float, ...]] | None = None) -> pl.DataFrame:
    """A table of one comparison with these mean accuracies; seeds and sizes are mixed, test accuracies reversed."""
    rows = [
        {
            "comparison": "equal width", "kernel_size": k, "channels": 4, "parameters": 100 * k, "seed": seed,
            "validation_accuracy": mean + SPREAD[seed] + (noise or {}).get(k, (0, 0, 0))[seed], "test_accuracy": -mean,
        }
        for seed in (2, 0, 1) for k, mean in reversed(means.items())
    ]  # fmt: skip
    return pl.DataFrame(rows)


def test_pairs_by_hand():
    noise = (0.00, 0.02, 0.01)
    pairs = pairs_of({2: drawn({1: 0.5, 3: 0.6}, {3: noise}), 4: drawn({1: 0.5, 3: 0.65})})
    short, long = pairs.to_dicts()
    named = ("comparison", "smaller", "larger", "epochs", "n")
    assert tuple(short[name] for name in named) == ("equal width", 1, 3, 2, 3)
    # 0.10, 0.12, 0.11: paired, so that the seeds' common spread is not in it
    assert (short["difference"], short["difference_sd"]) == pytest.approx((0.11, 0.01))
    half = 4.30265 * 0.01 / math.sqrt(3)
    assert (short["difference_low"], short["difference_high"]) == pytest.approx((0.11 - half, 0.11 + half), rel=1e-4)
    assert short["apart"]
    assert (short["change"], short["change_low"]) == (None, None)
    # 0.15 less 0.10, 0.12, 0.11, seed by seed
    assert (long["change"], long["change_sd"]) == pytest.approx((0.04, 0.01))
    assert long["change_high"] == pytest.approx(0.04 + half, rel=1e-4)


@pytest.mark.parametrize(("wide", "apart"), [(0.01, True), (0.05, False)])
def test_told_apart_is_an_interval_on_one_side_of_zero(wide, apart):
    (row,) = pairs_of({2: drawn({1: 0.5, 3: 0.45}, {3: (-wide, 0, wide)})}).to_dicts()
    low, high = (-0.05 + sign * 4.30265 * wide / math.sqrt(3) for sign in (-1, 1))
    assert (row["difference_low"], row["difference_high"]) == pytest.approx((low, high), rel=1e-4)
    assert row["apart"] == apart == (high < 0)


REST, CHANCE, OTHER = "**at rest**", "**at rest but for those that neither run tells apart**", "**not at rest**"
WIDE = {3: (-0.1, 0.0, 0.1)}


@pytest.mark.parametrize(
    ("short", "long", "noise", "words", "changed"),
    [
        ({1: 0.5, 3: 0.6, 5: 0.7}, {1: 0.6, 3: 0.7, 5: 0.71}, None, REST, ()),
        ({1: 0.5, 3: 0.6, 5: 0.7}, {1: 0.6, 3: 0.7, 5: 0.69}, None, OTHER, ((3, 5),)),
        ({1: 0.5, 3: 0.6, 5: 0.61}, {1: 0.4, 3: 0.7, 5: 0.69}, WIDE, CHANCE, ((3, 5),)),
        # Told apart in one of the two runs is enough: here the shorter one, which has no noise.
        ({1: 0.5, 3: 0.55, 5: 0.9}, {1: 0.5, 3: 0.49, 5: 0.9}, WIDE, OTHER, ((1, 3),)),
    ],
)
def test_verdict(short, long, noise, words, changed):
    lengths = {2: drawn({1: 0.9, 3: 0.5, 5: 0.1}), 4: drawn(short, noise if words == CHANCE else None)}
    (verdict,) = verdicts(pairs_of({**lengths, 8: drawn(long, noise)}))
    assert verdict.lengths == (4, 8)  # the shortest, whose order is another, does not count
    by_mean = [tuple(sorted(means, key=lambda k, m=means: -m[k])) for means in (short, long)]
    assert list(verdict.orders) == by_mean
    assert verdict.changed == changed
    assert verdict.told_apart == (changed if words == OTHER else ())
    assert words in verdict.text
    level = {pair for pair in ((1, 3), (3, 5)) if noise and abs(long[pair[0]] - long[pair[1]]) < 0.24}
    assert set(verdict.level) == level  # 4.3 · 0.1 / √3 = 0.25
    assert ("all are told apart" in verdict.text) == (not level)


def run_of(path: Path, epochs: int, table: pl.DataFrame, **settings: Any) -> Path:
    config = CONFIG | {"settings": CONFIG["settings"] | {"epochs": epochs} | settings}
    RunFolder.create(path, config).write_table("kernel_controlled", table)
    return path


def test_runs_by_epochs(tmp_path):
    table = drawn({1: 0.5, 3: 0.6})
    long, short = run_of(tmp_path / "a", 4, table), run_of(tmp_path / "b", 2, table)
    assert list(read_runs([long, short])) == [2, 4]
    unfinished = run_of(tmp_path / "c", 8, table.with_columns(test_accuracy=pl.lit(None, pl.Float64)))
    wider = run_of(tmp_path / "d", 8, table, channels=5)
    other = run_of(tmp_path / "e", 8, table.filter(pl.col("seed") < 2))
    again = run_of(tmp_path / "f", 4, table)
    lacks = RunFolder.create(tmp_path / "g", CONFIG).path
    for folders, words in (
        ([long], "1 given; want the folders of two or more"),
        ([long, tmp_path / "h"], "is not a folder"),
        ([long, lacks], "run experiments/kernel_controlled.py"),
        ([long, unfinished], "c is not finished"),
        ([long, wider], "in more than its epochs: settings.channels: 4 there, 5 here"),
        ([long, other], r"has other networks than .*: \('equal width', 1, 4, 100, 2\) is in one alone"),
        ([long, again], "f has 4 epochs, as .*a has"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            read_runs(folders)
        assert "\n" not in str(error.value)


def test_figure(tmp_path):
    table = pl.concat(
        [
            drawn(means).with_columns(epochs=pl.lit(epochs))
            for epochs, means in {2: {1: 0.5, 3: 0.6}, 8: {1: 0.7, 3: 0.65}}.items()
        ]
    )
    figure = figures.order_figure(table, tmp_path / "figure.png", "digits")
    (axis,) = figure.axes
    lines = [container.lines[0].get_xydata() for container in axis.containers]  # pyright: ignore
    np.testing.assert_allclose(lines, [[[2, 50], [8, 70]], [[2, 60], [8, 65]]])
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["1x1", "3x3"]  # pyright: ignore
    assert "n = 3 seeds" in figure.get_supxlabel()


def test_the_script_on_published_runs(tmp_path, capsys):
    """Of the published 2 and 4 epochs; at equal width two sizes changed places and 4 epochs tell them apart."""
    runs = [str(ROOT / "results" / f"kernel-controlled-cifar10-e{epochs}") for epochs in (4, 2)]
    out = tmp_path / "order"
    start(*runs, "--out", str(out))
    shown = " ".join(capsys.readouterr().out.split())
    assert "5x5 > 7x7 > 3x3 > 1x1 after 2 epochs, 7x7 > 5x5 > 3x3 > 1x1 after 4" in shown
    table = RunFolder.open(out).read_table("kernel_order", "kernel_order.py")
    assert len(table) == 2 * 6 * 2
    text = (out / "report.md").read_text()
    for words in ("**not at rest**", "| equal width | 5x5 less 3x3 | +2.04 ", "figures/kernel_order.png"):
        assert words in text
    start(*runs, "--out", str(out))  # once more, in the same folder


def test_refused_before_anything_is_written(tmp_path, capsys):
    out = tmp_path / "order"
    assert "runs: 0 given; want the folders of two or more" in refused(capsys, "--out", str(out))
    assert not out.exists()
