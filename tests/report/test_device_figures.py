"""Figures of devices show what the table holds, and say what rounding alone would have left."""

from typing import Any, cast

import matplotlib.colors
import numpy as np
import polars as pl

from spikernel_jax.report.device_figures import bits_figure, embedded_figure
from spikernel_jax.report.figures import ORANGE


def test_integers_beside_the_float_network(tmp_path):
    table = pl.DataFrame(
        {
            "bits": [32, 8, 4, 2],
            "validation_accuracy": [0.95, 0.95, 0.94, 0.93],
            "rounded_accuracy": [None, 0.95, 0.94, 0.5],
            "constant_bytes": [4096, 1024, 512, 256],
            "written_bytes": [None, 1024, 1024, 1024],
        }
    )
    figure = embedded_figure(table, tmp_path / "embedded.png", "title", 1000)
    assert (tmp_path / "embedded.png").read_bytes().startswith(b"\x89PNG")
    for axis, x in zip(figure.axes, ([2, 4, 8], [1.25, 1.5, 2.0]), strict=True):
        drawn: Any = cast("Any", axis.containers[0])[0]
        assert np.asarray(drawn.get_xdata()).tolist() == x
        np.testing.assert_allclose(drawn.get_ydata(), [93, 94, 95])
        hollow: list[Any] = [c for c in axis.collections if len(c.get_edgecolor()) and c.get_label() == "rounded alone"]
        assert [c.get_offsets().tolist() for c in hollow] == [[[x[0], 50.0]]]  # of the trained one alone
        np.testing.assert_allclose(hollow[0].get_edgecolor()[0], matplotlib.colors.to_rgba(ORANGE))


def test_finalists_at_every_width(tmp_path):
    rows = [
        ("a", 0, 0, 0.90), ("a", 0, 5, 0.92), ("a", 8, 0, 0.91), ("a", 8, 5, 0.93), ("a", 2, 0, 0.3), ("a", 2, 5, 0.85),
        ("b", 0, 0, 0.80), ("b", 0, 5, 0.88), ("b", 8, 0, 0.81), ("b", 8, 5, 0.87), ("b", 2, 0, 0.4), ("b", 2, 5, 0.86),
    ]  # fmt: skip
    table = pl.DataFrame(rows, ["finalist", "bits", "epochs", "test_accuracy"], orient="row").with_columns(
        constant_bytes=1024 * pl.col("bits"), written_bytes=pl.when(pl.col("bits") > 0).then(1024)
    )
    figure = bits_figure(table, tmp_path / "bits.png", "title")
    by_bits, by_memory = figure.axes
    assert [own.get_text() for own in by_bits.get_xticklabels()] == ["2", "8", "float"]
    lines = [np.asarray(own.get_ydata(), float).round(6).tolist() for own in by_bits.lines]
    assert lines == [[30, 91, 90], [85, 93, 92], [40, 81, 80], [86, 87, 88]]
    assert [own.get_markerfacecolor() == "none" for own in by_bits.lines] == [True, False, True, False]
    places = [np.asarray(own.get_xdata(), float).tolist() for own in by_memory.lines]
    assert places == [[3, 9]] * 4
    assert by_bits.get_ylim()[0] == 81
    assert by_bits.get_title() == "3 points of rounding alone lie below, 30 % the least"
    legend = by_bits.get_legend()
    assert legend
    assert [own.get_text() for own in legend.get_texts()] == ["a", "b"]
