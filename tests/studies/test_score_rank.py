"""Rankings held against a table: what is compared, chosen where, and on which half; published tables."""

from pathlib import Path

import jax
import numpy as np
import polars as pl
import pytest

import scripts
from spikernel_jax import load_trained_cells
from spikernel_jax.cells.space import CellSpace
from spikernel_jax.report.ranking import kendall, ranks
from spikernel_jax.studies import score_rank
from spikernel_jax.studies.score_rank import Cells, best_sums, figures_of, kind_of, order_by
from spikernel_jax.studies.tables import HALVES, half_of, read_table

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "score_rank.py"
SPACE = CellSpace((1, 3, 5, 7), max_kernel_sizes=2)


def cells(n=40, seed=0):
    """Cells whose parameters say all of the truth, and whose depth nothing; seed 0 of their training is wrong."""
    rng = np.random.default_rng(seed)
    truth = rng.permutation(n).astype(float)
    values = {
        "parameters": np.repeat(truth[:, None], 2, 1),
        "depth": np.repeat(rng.integers(0, 3, n)[:, None].astype(float), 2, 1),
        "hamming": np.stack([truth, -truth], 1),
        "1 epoch": np.stack([-truth, truth], 1),
    }
    accuracy = np.stack([truth, truth + 0.25], 1) / n
    return Cells(values, accuracy, values["depth"][:, 0], truth, dict.fromkeys(values, 0.1))


def test_figures_of_what_is_known():
    found = figures_of(cells(), [*cells().values], "depth", None)
    assert found["parameters|tau"] == found["parameters|rho"] == found["parameters|within depth"] == 1
    assert found["parameters|regret 1"] == 0
    assert np.isnan(found["depth|within depth"])
    assert np.isnan(found["hamming|tau"])  # its replicates cancel
    assert found["1 epoch|tau"] == 0  # wrong by one seed, right by the other
    assert found["parameters|over"] == 1 - found["depth|tau"]


def test_a_short_training_is_held_against_other_seeds():
    """Of accuracies that are noise, a training's own final accuracy would say everything, and another's nothing."""
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(400, 2))
    known = cells(400)
    lucky = known._replace(accuracy=noise, values=known.values | {"4 epochs": noise})
    assert abs(figures_of(lucky, ["4 epochs", "depth"], "depth", None)["4 epochs|tau"]) < 0.1


def test_bootstrap_draws_cells_seeds_and_replicates():
    rng = np.random.default_rng(2)
    found = [figures_of(cells(), ["hamming", "1 epoch", "parameters"], "parameters", rng) for _ in range(40)]
    assert {own["1 epoch|tau"] for own in found} == {-1, 1}
    assert {round(own["hamming|tau"], 9) for own in found if not np.isnan(own["hamming|tau"])} == {-1, 1}
    assert all(own["parameters|tau"] == 1 for own in found)


def test_sums_of_ranks():
    known = cells()
    x = order_by(known, "parameters + depth", 0, [0])
    assert (x == ranks(known.values["parameters"][:, 0]) + ranks(known.values["depth"][:, 0])).all()
    chosen = best_sums(known)
    assert chosen["untrained"] == "parameters + hamming"  # hamming says nothing, and depth what is wrong
    assert kind_of(chosen["1 epoch"]) == score_rank.SUM
    assert "1 epoch" in chosen["1 epoch"]


@pytest.mark.slow
def test_sums_are_chosen_by_the_half_for_looking_alone(tmp_path, monkeypatch):
    seen = []
    real = score_rank.best_sums
    monkeypatch.setattr(score_rank, "best_sums", lambda cells: seen.append(cells) or real(cells))
    options = ("--table", "mnist5k", "--names", "depth", "parameters", "hamming", "--replicates", "2", "--batch", "8")
    scripts.start(SCRIPT, *options, "--draws", "20", "--out", str(tmp_path))
    table = load_trained_cells("mnist5k", "looking").pivot("seed", index="genotype", values="test_accuracy")
    assert sorted(seen[0].accuracy.tolist()) == sorted(map(list, table.drop("genotype").iter_rows()))
    found = pl.read_parquet(tmp_path / "tables" / "score_rank.parquet")
    held = load_trained_cells("mnist5k", "held_out")
    mean = held.group_by("genotype").agg(pl.col("parameters").first(), pl.col("test_accuracy"))
    taus = [kendall(mean["parameters"], mean["test_accuracy"].list.get(seed)) for seed in range(2)]
    assert found.filter(pl.col("predictor") == "parameters")["tau"][0] == pytest.approx(np.mean(taus))
    assert (found["tau_low"] <= found["tau"]).all()
    text = (tmp_path / "report.md").read_text()
    assert "held_out" in text
    assert "figures/regret.png" in text
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "scores").iterdir()}
    scripts.start(SCRIPT, *options, "--draws", "20", "--out", str(tmp_path))
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "scores").iterdir()}


@pytest.mark.parametrize("name", ["mnist5k", "cifar10"])
def test_published_tables(name):
    table, facts = read_table(name)
    assert table.group_by("genotype").agg(pl.len())["len"].unique().to_list() == [facts["seeds"]]
    assert table["genotype"].n_unique() == facts["cells"]
    rows = np.stack([SPACE.parse(text) for text in table["genotype"].unique()])
    assert (SPACE.canonical(rows) == rows).all()
    assert len(facts["environment"]["git"]["commit"]) == 40
    assert {len(own) for own in table["validation"]} == {facts["recipe"]["epochs"]}
    for own in table.iter_rows(named=True):
        assert own["half"] == half_of(SPACE, SPACE.parse(own["genotype"]))
    both = [load_trained_cells(name, half) for half in HALVES]
    assert sum(map(len, both)) == len(table)


def test_halves_are_as_large():
    rows = SPACE.sample(jax.random.key(0), 400)
    looking = np.mean([half_of(SPACE, row) == "looking" for row in rows])
    assert 0.4 < looking < 0.6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--table", "no"), "table 'no' is unknown; known: "),
        (("--table", "mnist5k", "--names", "magic"), "--names 'magic' is unknown; known: depth"),
        (("--table", "mnist5k", "--draws", "0"), "--draws 0 must be at least 1"),
        (("--table", "mnist5k", "--batch", "1000"), "is larger than the data: 1000 training images"),
        (("--table", __file__), "is no table of experiments/trained_cells.py"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(options, words, tmp_path, capsys):
    said = scripts.refused(SCRIPT, capsys, *options, "--out", str(tmp_path / "run"))
    assert words in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("half", ["looking", "held"])
def test_a_half_has_a_name(half):
    if half == "looking":
        assert set(load_trained_cells("mnist5k", half)["half"]) == {half}
    else:
        with pytest.raises(ValueError, match="half='held' is unknown; known: looking, held_out"):
            load_trained_cells("mnist5k", half)
