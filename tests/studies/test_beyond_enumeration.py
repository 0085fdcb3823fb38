"""The comparison of strategies: its tables, its figure, going on after a stop, and the script's answers."""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl
import pytest

import scripts
from quick_cases import mostly_slow
from spikernel_jax import CellSpace, costs, data, make_bank, score_population
from spikernel_jax.io.run_folder import RunFolder
from spikernel_jax.pipeline import job as job_module
from spikernel_jax.pipeline import presets
from spikernel_jax.pipeline.job import Job, Purpose
from spikernel_jax.pipeline.options import resolve
from spikernel_jax.report import search_figures
from spikernel_jax.scoring import replicates
from spikernel_jax.snn.spec import NetworkSpec
from spikernel_jax.studies import beyond_enumeration

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "beyond_enumeration.py"
start = functools.partial(scripts.start, SCRIPT)
NAN, INF = float("nan"), float("inf")
SMALL = ["--preset", "smoke", "--kernel-set", "3", "--budget", "14", "--seeds", "2", "--population", "8",
         "--sample", "4", "--children", "4"]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def data_read_once():
    """The digits are read from the package once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_module, "load_dataset", functools.cache(data.load_dataset))
        yield


def quickly(rows: np.ndarray, *_: Any, **__: Any) -> replicates.Scores:
    """Scores that take no time: the number of edges, and a little for which."""
    flat = rows.reshape(len(rows), -1).astype(np.int64)
    scores = (flat != 0).sum(1) + flat @ np.arange(1, flat.shape[1] + 1) / 1000
    return replicates.over_replicates(scores[:, None], np.ones(len(rows), np.int64))


@pytest.fixture
def quick(monkeypatch):
    """Nothing is computed with networks."""
    monkeypatch.setattr(beyond_enumeration, "make_bank", lambda *_: {})
    monkeypatch.setattr(beyond_enumeration, "score_population", quickly)
    monkeypatch.setattr(beyond_enumeration.pruning, "score_supernets", lambda masks, *_, **__: masks.sum((1, 2)) / 7)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("space", mostly_slow(["forward", "feedback", "two_cells"], lambda name: name == "feedback"))
def test_runs_stops_and_goes_on(space, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    start(*SMALL, "--space", space, "--out", str(whole))
    table = RunFolder.open(whole).read_table("evaluations", "beyond_enumeration.py")
    strategies = {"forward": ["exhaustive", "pruning"], "feedback": ["pruning"], "two_cells": []}[space]
    assert table["strategy"].unique(maintain_order=True).to_list() == [*strategies, "evolution", "random"]
    cells = CellSpace((3,), feedback=space == "feedback")
    record = RunFolder.open(whole).config
    assert table["memory_bytes"].max() <= record["study"]["memory_budget"]  # pyright: ignore[reportOperatorIssue]
    for name in ("evolution", "random"):
        for seed in (0, 1):
            own = table.filter((pl.col("strategy") == name) & (pl.col("seed") == seed))
            assert own["evaluation"].to_list() == list(range(1, 15))
            assert own["genotype"].n_unique() == 14
            rows = np.array([[cells.parse(part) for part in text.split(" | ")] for text in own["genotype"]])
            assert rows.shape[1] == 1 + (space == "two_cells")
            np.testing.assert_allclose(own["score"], quickly(rows).scores)
    text = (whole / "report.md").read_text()
    assert "| evolution | 2 | 14 |" in text
    assert "(figures/progress.png)" in text
    if space == "forward":
        every = table.filter(pl.col("strategy") == "exhaustive")["score"]
        assert len(every) == len(cells.enumerate())
        assert set(table["score"]) <= set(every)

    # Stopped in the middle of the second strategy.
    calls = 0

    def stops(rows: np.ndarray, *arguments: Any, **options: Any) -> replicates.Scores:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise KeyboardInterrupt
        return quickly(rows)

    monkeypatch.setattr(beyond_enumeration, "score_population", stops)
    broken = tmp_path / "broken"
    with pytest.raises(SystemExit) as stop:
        start(*SMALL, "--space", space, "--out", str(broken))
    assert stop.value.code == 130
    assert not (broken / "tables").exists()
    start(*SMALL, "--space", space, "--out", str(broken))
    assert RunFolder.open(broken).read_table("evaluations", "beyond_enumeration.py").equals(table)


def filled_bank(_: Any, spec: NetworkSpec, seeds: int) -> Any:
    """A bank drawn by NumPy: to compile every array's draw would take longer than the test."""
    rng = np.random.default_rng(3)

    def fill(leaf: Any) -> np.ndarray:
        return rng.uniform(-0.5, 1.0, leaf.shape).astype(np.float32)

    return jax.tree.map(fill, jax.eval_shape(lambda: make_bank(jax.random.key(0), spec, seeds)))


@pytest.mark.slow
def test_scores_a_real_network(tmp_path, monkeypatch):
    """Scores are those of the public call, memory that of the trained width."""
    monkeypatch.setattr(beyond_enumeration, "make_bank", filled_bank)
    start(*SMALL, "--space", "forward", "--out", str(tmp_path / "run"), "--memory-budget", "5.2KiB",
          "--fidelity", "full")  # fmt: skip
    run = RunFolder.open(tmp_path / "run")
    table = run.read_table("evaluations", "beyond_enumeration.py")
    known = dict(table.filter(pl.col("strategy") == "exhaustive").select("genotype", "score").iter_rows())
    assert all(known[cell] == score for cell, score in table.select("genotype", "score").iter_rows())

    space = CellSpace((3,))
    preset = presets.get_preset("mnist5k", "smoke")
    memory = costs(preset.network("mnist5k", space), space.enumerate(), 8).memory_bytes
    fitting = space.enumerate()[memory <= 5324]
    assert {space.explicit(row) for row in fitting} == set(known)
    assert 20 < len(fitting) < len(memory)

    digits = data.load_dataset("mnist5k", limit_train=64, limit_validation=32, limit_test=32)
    job = Job(run, digits, preset, 0, resolve({}, {}, preset), print)
    trained, fidelity = preset.network("mnist5k", space), preset.fidelities[2]
    spec = fidelity.network(trained)
    bank = filled_bank(None, spec, fidelity.seeds)
    images = fidelity.images(job.key(Purpose.STRATEGIES_IMAGES), digits, trained)
    rows = fitting[-4:]
    got = [known[space.explicit(row)] for row in rows]
    assert len(set(got)) == 4
    np.testing.assert_allclose(score_population(rows, bank, images, spec).scores, got, rtol=1e-5)


def test_summary_counts_by_hand():
    rows = [("exhaustive", 0, i + 1, f"e{i}", score, 1024) for i, score in enumerate([1.0, 5.0, 3.0, 4.0, -INF])]
    rows += [("evolution", 0, 1, "a", 3.0, 2048), ("evolution", 0, 2, "b", NAN, 1024)]
    rows += [("evolution", 1, 1, "c", 4.0, 4096), ("evolution", 1, 2, "d", 5.0, 3072)]
    rows += [("pruning", 0, 40, "e", 1.0, 512)]
    names = ["strategy", "seed", "evaluation", "genotype", "score", "memory_bytes"]
    summary = beyond_enumeration.over_seeds(pl.DataFrame(rows, schema=names, orient="row"))
    _, evolved, pruned = summary.iter_rows(named=True)
    assert evolved == {
        "strategy": "evolution", "seeds": 2, "scored": 2, "best score": 4.0, "sd": pytest.approx(2**0.5),
        "mean rank": 2.0, "best cell": "d", "memory KiB": 3.0,
    }  # fmt: skip
    text = beyond_enumeration.summary_markdown(summary)
    assert "| evolution | 2 | 2 | 4.000 ± 1.414 | 2 | d | 3 |" in text
    assert "| pruning | 1 | 40 | 1.000 | 4 | e | 0.5 |" in text
    assert (pruned["scored"], pruned["mean rank"], pruned["best cell"]) == (40, 4.0, "e")


def test_the_figure_draws_means_and_the_best_of_all(tmp_path):
    rows = [("random", seed, i + 1, value) for seed in (0, 1) for i, value in enumerate([seed, NAN, 3.0 * seed])]
    rows += [("exhaustive", 0, 1, 7.0), ("exhaustive", 0, 2, 6.0), ("pruning", 0, 9, 2.0)]
    table = pl.DataFrame(rows, schema=["strategy", "seed", "evaluation", "score"], orient="row", strict=False)
    figure = search_figures.progress_figure(table, tmp_path / "progress.png", "a title")
    (axis,) = figure.axes
    curve, line = axis.get_lines()
    np.testing.assert_allclose(np.asarray(curve.get_xydata()), [[1, 0.5], [2, 0.5], [3, 1.5]])
    assert list(np.asarray(line.get_ydata())) == [7.0, 7.0]
    assert axis.collections[-1].get_offsets().tolist() == [[9.0, 2.0]]  # pyright: ignore
    labels = [text.get_text() for text in axis.get_legend().get_texts()]  # pyright: ignore
    assert labels == ["random, mean ± sd (n = 2 seeds)", "best of all 2", "pruning"]
    assert "2 not finite" in axis.get_title()
    assert (tmp_path / "progress.png").read_bytes().startswith(b"\x89PNG")
