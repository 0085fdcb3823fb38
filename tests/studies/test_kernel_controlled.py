"""Kernel sizes at equal width and equal parameters: the summary, and the script from start to finish."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import scripts
from spikernel_jax import costs
from spikernel_jax.cells.space import CellSpace
from spikernel_jax.data import load_dataset
from spikernel_jax.io.run_folder import RunFolder
from spikernel_jax.pipeline import job, presets, trials
from spikernel_jax.report import figures
from spikernel_jax.snn.cost import parameters_of
from spikernel_jax.studies import kernel_controlled

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "kernel_controlled.py"
start = functools.partial(scripts.start, SCRIPT)
refused = functools.partial(scripts.refused, SCRIPT)
CELL = "0>3:convK"
SMALL = ["--preset", "smoke", "--cell", CELL, "--channels", "2", "--epochs", "2", "--limit-train", "32"]
SMALL += ["--kernel-sizes", "1", "3"]
SPACE = CellSpace((1, 3, 5, 7))


@pytest.fixture(autouse=True, scope="module")
def data_read_once():
    """The digits are read from the package once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "load_dataset", functools.cache(job.load_dataset))
        yield


def drawn() -> pl.DataFrame:
    """Two comparisons of sizes 1 and 3, seeds out of order; made so that pairing matters."""
    accuracies = {
        ("equal width", 1): (0.2, 0.4, 0.3), ("equal width", 3): (0.5, 0.8, 0.65),
        ("equal parameters", 1): (0.5, 0.7, 0.6), ("equal parameters", 3): (0.5, 0.8, 0.65),
    }  # fmt: skip
    rows = [
        {
            "comparison": name, "kernel_size": k, "channels": 4 * k, "seed": seed, "parameters": 100 * k,
            "mismatch": 0.25 * (k - 3), "memory_bytes": 2048, "macs": 5, "synops": 10.0 * (seed + 1),
            "energy_nj": 1.0, "seconds": 3.0, "validation_accuracy": values[seed], "test_accuracy": values[seed] / 2,
        }
        for (name, k), values in accuracies.items() for seed in (2, 0, 1)
    ]  # fmt: skip
    mixed = [rows[i] for i in (1, 0, 2, 4, 5, 3, *range(6, 12))]
    return pl.DataFrame(mixed)


def test_summary_by_hand():
    summary = kernel_controlled.over_seeds(drawn())
    assert summary.select("comparison", "kernel_size").rows() == [
        ("equal width", 1), ("equal width", 3), ("equal parameters", 1), ("equal parameters", 3),
    ]  # fmt: skip
    first, reference, third, _ = summary.to_dicts()
    assert (first["n"], first["synops"], first["parameters"]) == (3, pytest.approx(20), 100)
    assert (first["validation"], first["validation_sd"]) == pytest.approx((0.3, 0.1))
    assert first["validation_high"] == pytest.approx(0.3 + 4.303 * 0.1 / math.sqrt(3), rel=1e-4)
    # 0.2 - 0.5, 0.4 - 0.8, 0.3 - 0.65: mean -0.35, sd 0.05, less than the 0.18 of unpaired samples
    assert (first["difference"], first["difference_sd"]) == pytest.approx((-0.35, 0.05))
    assert first["difference_low"] == pytest.approx(-0.35 - 4.303 * 0.05 / math.sqrt(3), rel=1e-4)
    assert (third["difference"], third["difference_sd"]) == pytest.approx((-0.05, 0.05))
    assert (first["test"], first["test_sd"]) == pytest.approx((0.15, 0.05))
    assert [reference[f"difference{end}"] for end in ("", "_sd", "_low", "_high")] == [None] * 4
    text = kernel_controlled.accuracy_markdown(summary)
    assert "| equal width | 1x1 | 4 | 100 | -50.00 % | 3 | 30.00 ± 10.00 [5.16, 54.84] | -35.00 ± 5.00 [" in text
    assert text.count("| - |") == 2
    assert "15.00 ± 5.00" in kernel_controlled.accuracy_markdown(summary, "test")
    for gone in (pl.col("kernel_size") != 3, (pl.col("kernel_size") != 3) | (pl.col("seed") != 1)):
        with pytest.raises(ValueError, match="has no kernel size 3 of the same seeds"):
            kernel_controlled.over_seeds(drawn().filter(gone))


def test_figure(tmp_path):
    figure = figures.controlled_figure(drawn(), tmp_path / "figure.png", "digits")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    left, right = figure.axes
    assert (left.get_title(), right.get_title()) == ("equal width", "equal parameters")
    assert left.get_ylim() == right.get_ylim()
    np.testing.assert_allclose(np.asarray(left.lines[0].get_xydata()), [[1, 30], [3, 65]])
    points = np.concatenate([np.asarray(c.get_offsets()) for c in right.collections if len(c.get_offsets()) > 2])  # pyright: ignore
    np.testing.assert_allclose(sorted(points[:, 1]), [50, 50, 60, 65, 70, 80])
    assert left.get_xticklabels()[1].get_text() == "3x3\nC = 12\n300"
    assert "n = 3 seeds" in figure.get_supxlabel()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_read_once) -> tuple[Path, list[Any]]:
    """A whole run, and the splits that were evaluated beyond the trainings' own validation."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, scripts.evaluated_splits(trials, functools.partial(start, *SMALL, "--out", str(out)))


def table_of(out: Path) -> pl.DataFrame:
    return RunFolder.open(out).read_table("kernel_controlled", "kernel_controlled.py").drop("seconds")


def test_the_table_says_what_was_trained(finished):
    out, splits = finished
    table = table_of(out)
    preset = presets.get_preset("mnist5k", "smoke")
    spec = preset.network("mnist5k", CellSpace((1, 3)))
    cells = {k: spec.space.parse(CELL.replace("convK", f"conv{k}")) for k in (1, 3)}
    assert table.select("comparison", "kernel_size", "seed").rows() == [
        (name, k, seed) for name in ("equal width", "equal parameters") for seed in range(3) for k in (1, 3)
    ]

    def at(k: int, channels: int) -> int:
        return parameters_of(dataclasses.replace(spec, channels=channels), cells[k])

    reference = at(3, 2)
    for row in table.iter_rows(named=True):
        k, c = row["kernel_size"], row["channels"]
        others = {w: abs(at(k, w) - reference) for w in range(1, 12)}
        assert c == (2 if row["comparison"] == "equal width" else min(others, key=lambda w: others[w]))
        assert row["parameters"] == at(k, c)
        assert row["mismatch"] == pytest.approx(row["parameters"] / reference - 1)
        assert row["macs"] == (2 + 13 * 3) ** 2 * c  # padding is not multiplied
        assert row["energy_nj"] == pytest.approx((4.6 * row["macs"] + 0.9 * row["synops"]) / 1000)
        at_width = dataclasses.replace(spec, channels=c)
        assert row["memory_bytes"] == costs(at_width, cells[k][None], 8).memory_bytes[0]
    shared = table.filter(pl.col("kernel_size") == 3).drop("comparison")
    assert shared[:3].equals(shared[3:])  # trained once, in both comparisons
    folders = sorted(path.name for path in (out / "trainings").iterdir())
    assert folders == sorted(
        {f"k{k}-c{c}-seed{s}" for k, c, s in table.select("kernel_size", "channels", "seed").rows()}
    )
    assert len(folders) == 9
    images = load_dataset("mnist5k", limit_train=32, limit_validation=32, limit_test=32)
    assert len(splits) == 9  # each trained network once, and test images only
    assert all(np.array_equal(split.images, images.test.images) for split in splits)
    text = (out / "report.md").read_text()
    for words in ("stem and transition are 3x3", "## Validation accuracy", "## Test accuracy", "kernel_controlled.png"):
        assert words in text
    assert len(RunFolder.open(out).read_json("summary.json")["kernel_controlled"]) == 4


def test_a_finished_run_is_not_trained_or_tested_again(finished, monkeypatch):
    out, _ = finished
    before = table_of(out)
    monkeypatch.setattr(trials, "train", None)
    monkeypatch.setattr(trials, "evaluate", None)
    start(*SMALL, "--out", str(out))
    assert table_of(out).equals(before)


@pytest.mark.slow
def test_stopped_it_goes_on_to_the_same_table(finished, tmp_path, monkeypatch):
    out, (real_train, real_evaluate) = tmp_path / "broken", (trials.train, trials.evaluate)
    trained, tested = [], []

    def stops_in_training(*arguments: Any, progress: Any, **named: Any) -> Any:
        trained.append(named["folder"].name)

        def stop(record: dict[str, Any]) -> None:
            progress(record)
            if len(trained) == 5:  # after the first of two epochs
                raise KeyboardInterrupt

        return real_train(*arguments, progress=stop, **named)

    def stops_in_testing(*arguments: Any) -> float:
        tested.append(0)
        if len(tested) == 4:
            raise KeyboardInterrupt
        return real_evaluate(*arguments)

    stops = ((trials, "train", stops_in_training), (trials, "evaluate", stops_in_testing))
    for seeds, (module, name, stopping) in enumerate(stops, start=1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, stopping)
            with pytest.raises(SystemExit) as stop:
                start(*SMALL, "--out", str(out))
        assert stop.value.code == 130
        partial, whole = table_of(out), table_of(finished[0])
        assert partial["test_accuracy"].null_count() == len(partial) == 4 * seeds
        rest = whole.filter(pl.col("seed") < seeds).drop("test_accuracy")
        assert partial.drop("test_accuracy").equals(rest)
        assert f"**Not yet: {seeds} of 3 seeds are trained.**" in (out / "report.md").read_text()
    assert len(set(trained)) == 5
    assert len(list(out.glob("trainings/*/result.json"))) == 9
    assert len(list(out.glob("trainings/*/test.json"))) == 3
    monkeypatch.setattr(trials, "evaluate", lambda *a: tested.append(0) or real_evaluate(*a))
    start(*SMALL, "--out", str(out))
    assert len(tested) == 4 + 6
    assert "Not yet" not in (out / "report.md").read_text()
    assert table_of(out).equals(table_of(finished[0]))
