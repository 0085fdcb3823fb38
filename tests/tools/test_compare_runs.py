"""What differs between two runs is said, and nothing else."""

import math

import jax
import numpy as np
import polars as pl
import pytest

import compare_runs
from spikernel_jax import CellSpace, Model, NetworkSpec, save_model
from spikernel_jax.io.run_folder import RunFolder
from spikernel_jax.snn import network

SPEC = NetworkSpec((8, 8, 1), 2, CellSpace((3,)), channels=2, time_steps=1)
CELL = tuple(SPEC.space.parse("0>3:conv3").tolist())
TABLE = pl.DataFrame({"name": ["a", "b"], "score": [1.0, float("nan")], "n": [1, 2], "seconds": [1.0, 2.0]})


def make(path, table: pl.DataFrame, seed: int = 0, **config) -> RunFolder:
    run = RunFolder.create(path, {"seed": 0} | config)
    run.write_table("scores", table)
    params, stats = network.init(jax.random.key(seed), SPEC, CELL)
    folder = run.folder("finalists") / "k3"
    folder.mkdir()
    save_model(folder / "checkpoint", Model(SPEC, CELL, params, stats, (0.1,), (0.3,)))
    return run


def test_equal_runs_are_the_same_however_long_they_took(tmp_path):
    a, b = make(tmp_path / "a", TABLE), make(tmp_path / "b", TABLE.with_columns(seconds=pl.lit(9.0)))
    lines, alike = compare_runs.compare(a, b, 0.0)
    assert alike
    assert [line for line in lines if not line.startswith("same")] == []
    assert {line.split()[1] for line in lines} >= {"configuration", "versions", "device", "table", "model"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"score": [1.0 + 2**-10, math.nan]}, "score by 9.8e-04"),
        ({"score": [1.0, 3.0]}, "table scores: score"),  # a number in the place of none
        ({"name": ["a", "c"]}, "table scores: name"),
    ],
)
def test_columns_that_differ_are_named(change, words, tmp_path):
    a, b = make(tmp_path / "a", TABLE), make(tmp_path / "b", TABLE.with_columns(**{
        name: pl.Series(values) for name, values in change.items()
    }))  # fmt: skip
    lines, alike = compare_runs.compare(a, b, 0.0)
    assert not alike
    (line,) = [line for line in lines if line.startswith("differs")]
    assert words in line
    assert "n" not in line.partition("scores: ")[2].split(", ")
    assert compare_runs.compare(a, b, 1e-3)[1] == (words == "score by 9.8e-04")


def test_rows_columns_settings_and_weights(tmp_path):
    a = make(tmp_path / "a", TABLE)
    b = make(tmp_path / "b", TABLE.head(1), seed=1, data="other")
    b.write_table("more", TABLE)
    lines, alike = compare_runs.compare(a, b, 0.0)
    text = "\n".join(line for line in lines if line.startswith("differs"))
    assert not alike
    for words in (
        "configuration: data: absent there",
        "2 rows and 1",
        "model finalists/k3: by",
        "more: in one run alone",
    ):
        assert words in text
    assert compare_runs.compare_tables(TABLE, TABLE.drop("n"))[0] == math.inf


def test_differences_are_relative_to_the_larger_value():
    assert compare_runs.largest_difference(np.array([4.0, 0.0]), np.array([5.0, 0.0])) == pytest.approx(0.2)
    assert compare_runs.largest_difference(np.array([np.inf]), np.array([np.inf])) == 0
    assert compare_runs.largest_difference(np.array([np.inf]), np.array([1.0])) == math.inf
