"""The data land in the axes, what is not finite is counted, and the page links its figures."""

import io
import math

import numpy as np
import polars as pl
import pytest
from matplotlib.collections import PathCollection
from matplotlib.text import Text
from rich.console import Console

from spikernel_jax.io.run_folder import RunFolder
from spikernel_jax.report import figures, pages

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def impact():
    rows = [
        (str(k), s, 0.5 + 0.01 * k + 0.02 * s, 100 * k, 1024 * k, 1e6 * k * k, 500.0 * k)
        for k in (1, 3, 5)
        for s in (0, 1)
    ]
    names = ["kernel", "seed", "accuracy", "parameters", "memory_bytes", "synops", "energy_nj"]
    return pl.DataFrame(rows, schema=names, orient="row")


@pytest.fixture
def search():
    cell = "0303 0030 2002 0200"
    rows = [
        ("1,3", cell, 10.0, 0.5, 1024, 2, True, True),
        ("1,3", cell, -INF, 0.5, 2048, 3, True, False),
        ("1,3", cell, 8.0, 0.5, 4096, 4, False, False),
        ("3,5", cell, 9.0, NAN, 2048, 1, True, True),
        ("3,5", cell, 7.0, 0.5, 3072, 2, True, False),
    ]
    names = ["kernel_set", "genotype", "score", "score_se", "memory_bytes", "conv_edges", "fits", "finalist"]
    return pl.DataFrame(rows, schema=names, orient="row")


@pytest.fixture
def tradeoff():
    cell = "0303 0030 2002 0200"
    rows = [
        ("c", "finalist", cell, 2, 0.8, 0.75, 0.01, 4096, 1000, True, False),
        ("a", "finalist", cell, 2, 0.5, 0.55, 0.02, 1024, 250, True, True),
        ("b", "random", cell, 2, 0.4, None, None, 2048, 500, False, False),
        ("d", "finalist", cell, 2, NAN, 0.1, NAN, 3072, 750, False, False),
    ]
    names = ["name", "role", "genotype", "n", "validation_accuracy", "test_accuracy", "test_sd", "memory_bytes"]
    return pl.DataFrame(rows, schema=[*names, "parameters", "on_front", "chosen"], orient="row")


TRAINING = {
    "a": [
        {"epoch": e, "train_loss": 1 / e, "train_accuracy": 0.1 * e, "validation_accuracy": 0.05 * e} for e in (1, 2)
    ],
    "b": [
        {"epoch": 1, "train_loss": None, "train_accuracy": 0.2},
        {"epoch": 2, "train_loss": 0.5, "train_accuracy": 0.4, "validation_accuracy": 0.3},
    ],
}


def offsets(axis):
    """Points of all scatters of an axis."""
    scatters = [artist for artist in axis.collections if isinstance(artist, PathCollection)]
    return {tuple(point) for scatter in scatters for point in curve(scatter).round(6).tolist()}


def curve(artist) -> np.ndarray:
    """Points [n, 2] of a line or a scatter."""
    return np.asarray(artist.get_offsets() if isinstance(artist, PathCollection) else artist.get_xydata())


def is_png(path):
    data = path.read_bytes()
    return data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 10_000 and b"IEND" in data[-12:]


def screen(table):
    file = io.StringIO()
    Console(width=160, file=file).print(table)
    return file.getvalue()


def test_impact_figure(tmp_path, impact):
    impact = impact.with_columns(accuracy=pl.when(kernel="5", seed=1).then(NAN).otherwise("accuracy"))
    figure = figures.impact_figure(impact, tmp_path / "impact.png", "MNIST (n = 10)")
    assert is_png(tmp_path / "impact.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["impact.pdf", "impact.png"]
    first = (tmp_path / "impact.pdf").read_bytes()
    assert first.startswith(b"%PDF-")
    figures.impact_figure(impact, tmp_path / "impact.png", "MNIST (n = 10)")
    assert (tmp_path / "impact.pdf").read_bytes() == first  # no time in it: a run made again has the same bytes
    accuracy, memory, synops = figure.axes
    np.testing.assert_allclose(curve(accuracy.lines[0]), [[1, 52], [3, 54], [5, 55]])
    assert sorted(y for _, y in offsets(accuracy)) == [51, 53, 53, 55, 55]
    assert "1 not finite" in accuracy.get_title()
    np.testing.assert_allclose(curve(memory.lines[0])[:, 1], [1, 3, 5])
    assert "KiB" in memory.get_title()
    np.testing.assert_allclose(curve(synops.lines[0])[:, 1], [1, 9, 25])
    assert "not finite" not in synops.get_title()
    assert figure.get_suptitle() == "MNIST (n = 10)"
    assert "n = 2 seeds" in figure.get_supxlabel()


def test_search_figure(tmp_path, search):
    figure = figures.search_figure(search, tmp_path / "search.png", "SAHD")
    assert is_png(tmp_path / "search.png")
    first, second = figure.axes[:2]
    over, within = first.collections[:2]
    assert curve(over).tolist() == [[4, 8]]
    assert curve(within).tolist() == []
    assert [curve(line).tolist() for line in first.lines if line.get_marker() == "*"] == [[[1, 10]]]
    assert curve(second.collections[1]).tolist() == [[3, 7]]
    assert first.get_title() == "sizes 1,3: 3 cells\n(1 not finite, not drawn)"
    assert second.get_title() == "sizes 3,5: 2 cells"
    assert first.get_ylim() == second.get_ylim()


@pytest.mark.parametrize("sets", [1, 4])
def test_search_figure_of_any_number_of_sets(tmp_path, search, sets):
    parts = [search.filter(kernel_set="3,5").with_columns(kernel_set=pl.lit(f"3,{k}")) for k in range(sets)]
    wide = pl.concat(parts).with_columns(memory_bytes=pl.col("memory_bytes") ** 2)
    figure = figures.search_figure(wide, tmp_path / "search.png", "SAHD")
    assert len(figure.axes) == sets + 1  # and the colour bar


def test_tradeoff_figure(tmp_path, tradeoff):
    figure = figures.tradeoff_figure(tradeoff, tmp_path / "t.png", "MNIST", 3072)
    assert is_png(tmp_path / "t.png")
    (axis,) = figure.axes
    assert {(1, 50), (2, 40), (4, 80), (1, 55), (4, 75)} <= offsets(axis)
    assert not {x for x, _ in offsets(axis)} & {3.0}  # the one that failed, whatever its test accuracy
    front, budget = axis.lines
    assert curve(front).tolist() == [[1, 50], [4, 80]]
    assert front.get_drawstyle() == "steps-post"
    assert curve(budget)[:, 0].tolist() == [3, 3]
    chosen = next(c for c in axis.collections if c.get_label() == "chosen")
    assert curve(chosen).tolist() == [[1, 50]]
    assert [text.get_text() for text in axis.texts] == ["a", "c"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()][:2] == ["finalist", "random"]
    assert "1 not finite" in axis.get_title()
    untested = tradeoff.with_columns(test_accuracy=pl.lit(None), chosen=pl.lit(False))
    without = figures.tradeoff_figure(untested, tmp_path / "t.png", "MNIST", None).axes[0]
    assert len(without.lines) == 1
    assert {y for _, y in offsets(without)} == {50, 40, 80}


def test_labels_of_close_front_points_do_not_meet(tmp_path, tradeoff):
    rows = {"validation_accuracy": [0.5, 0.501, 0.502, 0.8], "memory_bytes": [10000, 10100, 10200, 40000]}
    close = tradeoff.with_columns(**{k: pl.Series(v) for k, v in rows.items()}, on_front=pl.lit(True))
    close = close.with_columns(name=pl.Series(["first model", "second model", "third model", "last"]))
    figure = figures.tradeoff_figure(close, tmp_path / "t.png", "MNIST", None)
    boxes = [Text.get_window_extent(text) for text in figure.axes[0].texts]  # without the leader lines
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_training_figure(tmp_path):
    figure = figures.training_figure(TRAINING, tmp_path / "m.png", "MNIST")
    assert is_png(tmp_path / "m.png")
    loss, accuracy = figure.axes
    assert [curve(line).tolist() for line in loss.lines] == [[[1, 1], [2, 0.5]], [[2, 0.5]]]
    assert "1 not finite" in loss.get_title()
    curves = [curve(line) for line in accuracy.lines]
    np.testing.assert_allclose(curves[0], [[1, 10], [2, 20]])
    np.testing.assert_allclose(curves[1], [[1, 5], [2, 10]])
    np.testing.assert_allclose(curves[3], [[2, 30]])
    with pytest.raises(ValueError, match="the records of 'b' lack the column 'validation_accuracy'"):
        figures.training_figure({"b": TRAINING["b"][:1]}, tmp_path / "m.png", "")
    with pytest.raises(ValueError, match="no training records"):
        figures.training_figure({}, tmp_path / "m.png", "")


DRAWN = {
    "impact": ("kernel", "seed", "accuracy", "memory_bytes", "synops"),
    "search": ("kernel_set", "score", "score_se", "memory_bytes", "conv_edges", "fits", "finalist"),
    "tradeoff": figures.TRADEOFF_COLUMNS,
}


@pytest.mark.parametrize(("kind", "column"), [(kind, name) for kind, names in DRAWN.items() for name in names])
def test_a_missing_column_is_named_and_nothing_written(tmp_path, request, kind, column):
    table = request.getfixturevalue(kind)
    draw = getattr(figures, f"{kind}_figure")
    more = (None,) if kind == "tradeoff" else ()
    with pytest.raises(ValueError, match=f"lacks the column '{column}'"):
        draw(table.drop(column), tmp_path / "x.png", "", *more)
    with pytest.raises(ValueError, match="no rows"):
        draw(table.clear(), tmp_path / "x.png", "", *more)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "make", "column"),
    [
        ("impact", pages.impact_table, "energy_nj"),
        ("search", pages.finalists_table, "genotype"),
        ("tradeoff", pages.tradeoff_table, "parameters"),
    ],
)
def test_tables_name_a_missing_column(request, kind, make, column):
    with pytest.raises(ValueError, match=f"lacks the column '{column}'"):
        make(request.getfixturevalue(kind).drop(column))


def test_tables_for_the_screen(impact, search, tradeoff):
    text = screen(pages.impact_table(impact))
    assert f"52.00 ± {100 * 0.02 / math.sqrt(2):.2f}" in text
    assert "µJ/image" in text
    text = screen(pages.finalists_table(search))
    assert "10.00 ± 0.50" in text
    assert "9.00 ± -" in text
    assert "7.00" not in text
    odd = tradeoff.with_columns(name=pl.concat_str(pl.lit("[red]"), "name"))
    lines = screen(pages.tradeoff_table(odd)).splitlines()
    assert [line.split()[1] for line in lines if "[red]" in line] == ["[red]a", "[red]b", "[red]d", "[red]c"]
    assert [word for line in lines for word in line.split() if word in ("chosen", "front")] == [
        "chosen",
        "front",
    ]


def test_markdown_table(tradeoff):
    odd = tradeoff.with_columns(name=pl.concat_str(pl.lit("x|"), "name", pl.lit("\n")))
    text = pages.markdown_table(odd, ["name", "validation_accuracy", "test_accuracy", "memory_bytes", "chosen"])
    assert text.splitlines() == [
        "| name | validation_accuracy | test_accuracy | memory_bytes | chosen |",
        "| --- | ---: | ---: | ---: | --- |",
        "| x\\|c | 0.8 | 0.75 | 4096 | no |",
        "| x\\|a | 0.5 | 0.55 | 1024 | yes |",
        "| x\\|b | 0.4 | - | 2048 | no |",
        "| x\\|d | - | 0.1 | 3072 | no |",
    ]
    with pytest.raises(ValueError, match="lacks the column 'speed'"):
        pages.markdown_table(tradeoff, ["speed"])


def test_report_links_every_figure_once(tmp_path):
    run = RunFolder.create(tmp_path / "run", {"a": 1})
    for name in ("impact.png", "search.png", ".search.png.1-0.tmp"):
        (run.folder("figures") / name).touch()
    sections = [("Impact", "![impact](figures/impact.png)\n"), ("Choice", "| a |\n| --- |\n| 1 |")]
    path = pages.write_report(RunFolder.create(tmp_path / "run", {"a": 1}), sections)
    text = path.read_text()
    assert path == run.path / "report.md"
    assert text.startswith("# Run run\n\nBegun 2")
    assert text.count("(figures/impact.png)") == text.count("(figures/search.png)") == 1
    assert "tmp" not in text
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Impact",
        "## Choice",
        "## Figures",
    ]
    assert text.count(" x ") == 1  # the same device twice is said once
