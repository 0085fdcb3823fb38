"""Figures of devices show what the table holds, and say what rounding alone would have left."""

from typing import Any, cast

import matplotlib.colors
import numpy as np
import polars as pl

from spikernel_jax.report.device_figures import embedded_figure
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
