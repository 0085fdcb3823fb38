"""The table of trained cells: which cells, each trained once, growing, and the same after a stop."""

from pathlib import Path

import jax
import numpy as np
import polars as pl
import pytest

import scripts
from spikernel_jax.cells.space import CellSpace
from spikernel_jax.studies import trained_cells
from spikernel_jax.studies.trained_cells import retest, stratified, stratum

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "trained_cells.py"
SMOKE = ("--preset", "smoke", "--channels", "2", "--epochs", "1")
SPACE = CellSpace((1, 3, 5, 7), max_kernel_sizes=2)
SMALL = CellSpace((1, 3))  # a fifth of the cells


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0>3:skip", (0, 0, 0)),
        ("0>3:conv5", (1, 1, 25)),
        ("0>1:conv3 0>3:skip 1>2:conv3 2>3:conv1", (3, 3, 9)),
        ("0>1:conv3 0>2:avgpool 0>3:conv7 1>3:skip 2>3:conv3", (1, 3, 49)),
        ("0>1:skip 0>3:skip 1>2:conv1 1>3:conv1 2>3:conv1", (2, 3, 1)),
    ],
)
def test_strata(text, expected):
    assert stratum(SPACE, SPACE.parse(text)) == expected


def test_every_stratum_in_turn_and_fewer_are_the_first_of_more():
    listed = SMALL.enumerate()
    key = jax.random.key(1)
    rows = stratified(SMALL, listed, 150, key)
    assert len(np.unique(rows, axis=0)) == 150
    assert (stratified(SMALL, listed, 20, key) == rows[:20]).all()
    strata = [stratum(SMALL, row) for row in rows]
    all_strata = {stratum(SMALL, row) for row in listed}
    assert len(set(strata[: len(all_strata)])) == len(all_strata)  # each once before any twice
    assert {stratum(SMALL, row)[0] for row in rows} == {0, 1, 2, 3}


def test_retest():
    same = pl.DataFrame(
        {"genotype": ["a", "b", "c"] * 2, "seed": [0] * 3 + [1] * 3, "validation_accuracy": [1, 2, 3] * 2}
    )
    assert retest(same) == 1
    turned = same.with_columns(validation_accuracy=pl.Series([1, 2, 3, 3, 2, 1]))
    assert retest(turned) == -1
    assert np.isnan(retest(same.filter(pl.col("seed") == 0)))


@pytest.mark.slow
def test_the_table_grows_and_nothing_is_trained_twice(tmp_path, monkeypatch):
    trained = []
    real = trained_cells.train
    monkeypatch.setattr(trained_cells, "train", lambda *a, **k: trained.append(k["seed"]) or real(*a, **k))
    options = (*SMOKE, "--out", str(tmp_path / "run"))
    scripts.start(SCRIPT, *options, "--cells", "2", "--seeds", "1")
    first = pl.read_parquet(tmp_path / "run" / "tables" / "trained_cells.parquet")
    scripts.start(SCRIPT, *options, "--cells", "3", "--seeds", "2")
    table = pl.read_parquet(tmp_path / "run" / "tables" / "trained_cells.parquet")
    assert trained == [0, 0, 0, 1, 1, 1]
    assert len(table) == 6
    assert table.filter(pl.col("seed") == 0)[:2].equals(first)
    assert table["validation"].list.last().to_list() == table["validation_accuracy"].to_list()
    assert table["firing_rate"].is_between(0, 1).all()
    assert "retest" in (tmp_path / "run" / "report.md").read_text()


def test_batches():
    wanted = [(0, 2), (0, 3), (1, 1), (1, 2), (1, 3)]
    assert trained_cells.batches(wanted, 1) == [[own] for own in wanted]
    assert trained_cells.batches(wanted, 2) == [wanted[:2], wanted[2:4], wanted[4:]]
    assert trained_cells.batches(wanted, None) == [[(0, 2), (1, 2)], [(0, 3), (1, 3)], [(1, 1)]]


@pytest.mark.slow
def test_cells_and_seeds_as_one_batch_make_the_same_table(tmp_path, monkeypatch):
    def table(name, *more):
        scripts.start(SCRIPT, *SMOKE, "--out", str(tmp_path / name), "--cells", "2", "--seeds", "2", *more)
        return pl.read_parquet(tmp_path / name / "tables" / "trained_cells.parquet")

    one_by_one = table("alone")
    monkeypatch.setattr(trained_cells, "train", None)
    at_once = table("together", "--at-once", "4")
    same = ["genotype", "seed", "half", "parameters", "memory_bytes"]
    assert at_once[same].equals(one_by_one[same])
    for name in ("synops", "firing_rate"):
        np.testing.assert_allclose(at_once[name], one_by_one[name], rtol=0.02)
    for name in ("validation_accuracy", "test_accuracy"):
        np.testing.assert_allclose(at_once[name], one_by_one[name], atol=0.05)
    assert (at_once["seconds"] > 0).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--cells", "0"), "--cells 0 must be from 1 to"),
        (("--cells", "100000"), "--cells 100000 must be"),
        (("--seeds", "0"), "--seeds 0 must be from 1 to 100"),
        (("--at-once", "0"), "--at-once 0 must be from 1 to"),
        (("--recipe", "mine"), "mine"),
        (("--time-steps", "0"), "time_steps=0"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(options, words, tmp_path, capsys):
    said = scripts.refused(SCRIPT, capsys, *SMOKE, *options, "--out", str(tmp_path / "run"))
    assert words in said
    assert not (tmp_path / "run").exists()
