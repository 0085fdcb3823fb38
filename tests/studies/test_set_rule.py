"""Step 2's rule held against a table: what a set's best cell is worth, what is lost, and that chance stands beside."""

import itertools
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import scripts
from spikernel_jax.pipeline.kernel_sets import SetVerdict
from spikernel_jax.studies.set_rule import BUDGETS, Known, figures_of, known_of, value
from spikernel_jax.studies.tables import ABOUT, read_table

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "set_rule.py"
PAIRS = list(itertools.combinations((1, 3, 5, 7), 2))
N = 24


def known(seed=0):
    """Cells, four of each pair, whose accuracy is known without noise."""
    rng = np.random.default_rng(seed)
    truth, memory = rng.permutation(N) / N, rng.permutation(N)
    held = np.array([np.arange(N) % len(PAIRS) == index for index in range(len(PAIRS))])
    both = np.stack([truth, truth], 1)
    return Known(both, both, memory, held)


def test_what_is_lost_is_what_the_best_of_a_dropped_set_is_worth():
    cells = known()
    truth = cells.accuracy[:, 0]
    kept = np.array([index != truth.argmax() % len(PAIRS) for index in range(len(PAIRS))])
    found = figures_of(cells, kept, None)
    for quantile in BUDGETS:
        fits = cells.memory <= np.quantile(cells.memory, quantile)
        each = [truth[fits & own].max(initial=-1) for own in cells.held]
        assert found[f"{quantile}|all"] == max(each)
        assert found[f"{quantile}|rule"] == max(each) - max(b for b, k in zip(each, kept, strict=True) if k)
        chance = [max(each) - max(choice) for choice in itertools.combinations(each, int(kept.sum()))]
        assert found[f"{quantile}|random"] == pytest.approx(np.mean(chance))
        for index, best in enumerate(each):
            own = found[f"{quantile}|{index}"]
            assert own == best or (best == -1 and np.isnan(own))
    assert found["1.0|rule"] > 0
    assert figures_of(cells, np.ones(len(PAIRS), bool), None)["1.0|rule"] == 0


def test_a_cell_is_chosen_by_one_seed_and_held_against_the_others():
    cells = known()._replace(validation=np.random.default_rng(1).random((N, 3)),
                             accuracy=np.random.default_rng(2).random((N, 3)))  # fmt: skip
    able = np.arange(N) < 10
    for seed in range(3):
        chosen = cells.validation[:10, seed].argmax()
        assert value(cells, able, seed) == np.delete(cells.accuracy[chosen], seed).mean()
    assert np.isnan(value(cells, np.zeros(N, bool), 0))


def test_resampling_draws_cells_and_seeds():
    cells = known()._replace(validation=np.random.default_rng(1).random((N, 2)))
    rng = np.random.default_rng(3)
    found = [figures_of(cells, np.ones(len(PAIRS), bool), rng)["1.0|all"] for _ in range(40)]
    assert len(set(found)) > 2


def test_cells_of_a_table_are_of_the_sets_that_hold_all_their_sizes():
    sizes = ["3", "1,5", "", "7", "3,5"]
    table = pl.DataFrame([
        {"genotype": f"cell {n}", "seed": seed, "kernel_sizes": text, "memory_bytes": 100 + n,
         "validation_accuracy": n / 10 + seed, "test_accuracy": n / 20 + seed}
        for seed in (0, 1) for n, text in enumerate(sizes)
    ]).filter((pl.col("genotype") != "cell 3") | (pl.col("seed") == 0))  # fmt: skip
    found = known_of(table, [SetVerdict(pair, True, "") for pair in PAIRS])
    assert found.memory.tolist() == [100, 101, 102, 104]  # a cell without one of the seeds is left out
    np.testing.assert_allclose(found.validation[:, 1], [1, 1.1, 1.2, 1.4])
    np.testing.assert_allclose(found.accuracy[:, 0], [0, 0.05, 0.1, 0.2])
    for pair, own in zip(PAIRS, found.held, strict=True):
        assert own.tolist() == [3 in pair, pair == (1, 5), True, pair == (3, 5)]


@pytest.mark.slow
def test_the_small_table(tmp_path):
    published, facts = read_table("mnist5k")
    facts["recipe"]["epochs"] = 1
    facts["spec"]["channels"] = 2
    facts["limits"] = {"limit_train": 64, "limit_validation": 32, "limit_test": 32}
    published.write_parquet(tmp_path / "own.parquet", metadata={ABOUT: json.dumps(facts)})
    out = tmp_path / "run"
    options = ("--table", str(tmp_path / "own.parquet"), "--seeds", "2", "--draws", "20", "--out", str(out))
    scripts.start(SCRIPT, *options)
    table = pl.read_parquet(out / "tables" / "set_rule.parquet")
    assert set(table["kernel_set"]) == {f"{a},{b}" for a, b in PAIRS}
    assert table.group_by("quantile").len()["len"].to_list() == [len(PAIRS)] * len(BUDGETS)
    report = (out / "report.md").read_text()
    assert f"keeps {table.filter(pl.col('quantile') == 1)['kept'].sum()} of 6 sets" in report
    assert "at random" in report
    pieces = {path.name: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    scripts.start(SCRIPT, *options)
    assert pieces == {path.name: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--table", "no"), "table 'no' is unknown"),
        (("--table", "mnist5k", "--seeds", "1"), "--seeds 1 must be at least 2"),
        (("--table", "mnist5k", "--draws", "0"), "--draws 0 must be at least 1"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(options, words, tmp_path, capsys):
    said = scripts.refused(SCRIPT, capsys, *options, "--out", str(tmp_path / "run"))
    assert words in said
    assert not (tmp_path / "run").exists()
