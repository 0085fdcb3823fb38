"""Searches played on a table: what each may know, what it pays, and what it is held against."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

import scripts
from spikernel_jax.studies.score_rank import Cells
from spikernel_jax.studies.search_compare import SEARCHES, Known, over_repeats, play

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "search_compare.py"
N = 30


def known(seconds=1.0, seed=0):
    """Cells whose prior says all; SAHD says the contrary, the first epoch nothing, the last all."""
    rng = np.random.default_rng(seed)
    truth = rng.permutation(N).astype(float)
    validation = np.stack([rng.random(N), truth / N, truth / N, truth / N], 1)
    scores = {"depth": np.zeros(N), "sahd_paper": -truth}
    return Known(truth, scores, {"sahd_paper": 0.5, "depth": 0.0}, validation, np.full(N, seconds)), truth


@pytest.mark.parametrize("name", SEARCHES)
def test_with_time_for_everything(name):
    cells, truth = known()
    chosen = SEARCHES[name](cells, 1e9, np.random.default_rng(1))
    assert chosen == (cells.validation[:, 0] if name == "one epoch" else truth).argmax()


@pytest.mark.parametrize("name", SEARCHES)
def test_with_time_for_nothing_one_cell_is_trained(name):
    cells, truth = known()
    chosen = SEARCHES[name](cells, 0.0, np.random.default_rng(1))
    if name in ("prior", "trainings"):
        assert truth[chosen] == N - 1
    if name == "SAHD":
        assert truth[chosen] == 0


def test_a_search_sees_what_it_paid_for():
    """The k-th cell of an order is trained once k trainings of four epochs are paid, scores of all cells before."""
    cells, truth = known()
    for trained in (1, 2, 7):
        seconds = 0.5 * N + 4 * trained + 0.1
        chosen = SEARCHES["SAHD"](cells, seconds, np.random.default_rng(0))
        assert truth[chosen] == trained - 1  # its order is from worst to best
    order = np.random.default_rng(5).permutation(N)
    first = order[:6]
    assert SEARCHES["one epoch"](cells, 6.5, np.random.default_rng(5)) == first[cells.validation[first, 0].argmax()]


def test_rungs_pay_for_every_epoch_once():
    """As soon as 2 cells for 2 epochs and 1 of them for 2 more are paid, and no earlier, a second one is looked at."""
    cells, truth = known(seconds=2.0)
    second = truth.argsort()[-2]
    cells.validation[second] = 2  # the first epochs' best
    for seconds, expected in ((11.9, truth.argmax()), (12.0, second)):
        assert SEARCHES["trainings"](cells, seconds, np.random.default_rng(0)) == expected


def test_equals_come_in_any_order():
    cells, _ = known()
    chosen = {SEARCHES["depth"](cells, 0.0, np.random.default_rng(seed)) for seed in range(40)}
    assert len(chosen) > 10


def table_cells(noise):
    values = {name: np.zeros((N, 2)) for name in ("depth", "receptive_field", "parameters")}
    values["sahd_paper"] = np.zeros((N, 2))
    return Cells(values, noise, np.zeros(N), np.zeros(N), dict.fromkeys(values, 0.0))


def test_what_is_chosen_is_held_against_other_seeds():
    """Of accuracies that are noise no search is better than any other, though each trains cells to the end."""
    noise = np.random.default_rng(3).normal(size=(N, 2))
    validation = np.repeat(noise[:, :, None], 4, 2)
    played = play(table_cells(noise), validation, np.ones((N, 2)), 60, 0, (8,))
    found = over_repeats(played)
    expected = np.mean([noise[:, s].max() - noise[:, s].mean() for s in range(2)])
    for row in found.iter_rows(named=True):
        assert row["regret"] == pytest.approx(expected, abs=0.6)
        assert row["n"] == 60
    own = played.filter(played["search"] == "random cells")["regret"]
    assert (own.to_numpy() > 0).mean() > 0.5  # the best of what it saw is not the best


def test_a_better_prior_wins(tmp_path):
    truth = np.random.default_rng(4).permutation(N) / N
    cells = table_cells(np.stack([truth, truth], 1))
    cells.values["parameters"][:] = truth[:, None]
    validation = np.repeat(np.stack([truth, truth], 1)[:, :, None], 4, 2)
    found = over_repeats(play(cells, validation, np.ones((N, 2)), 30, 0, (2,)))
    leads = {row["search"]: (row["regret"], row["lead_low"]) for row in found.iter_rows(named=True)}
    assert leads["trainings"][0] == leads["prior"][0] == 0
    assert leads["random cells"][1] < 0


@pytest.mark.slow
def test_the_small_table_is_played(tmp_path):
    options = ("--table", "mnist5k", "--replicates", "2", "--batch", "8", "--repeats", "3", "--out", str(tmp_path))
    scripts.start(SCRIPT, *options)
    table = pl.read_parquet(tmp_path / "tables" / "search_compare.parquet")
    assert set(table["search"]) == {*SEARCHES}
    assert (table["regret"] >= 0).all()
    assert table["n"].unique().to_list() == [3]
    assert "figures/searches.png" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--table", "no"), "table 'no' is unknown"),
        (("--table", "mnist5k", "--repeats", "1"), "--repeats 1 must be at least 2"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(options, words, tmp_path, capsys):
    said = scripts.refused(SCRIPT, capsys, *options, "--out", str(tmp_path / "run"))
    assert words in said
    assert not (tmp_path / "run").exists()
