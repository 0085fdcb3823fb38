"""Short trainings as the last rungs of a search: who is trained, who goes on, who wins, and nothing twice."""

import contextlib
import dataclasses
import types

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spikernel_jax.cells.space import CellSpace
from spikernel_jax.data import load_dataset
from spikernel_jax.io import files
from spikernel_jax.scoring.counts import receptive_field
from spikernel_jax.search import shorts
from spikernel_jax.search.halving import Cells
from spikernel_jax.search.shorts import RUNGS, Shorts, Training, best_of, line_of, plan, prior, train_rungs, winner
from spikernel_jax.snn.cost import parameters_of
from spikernel_jax.snn.spec import NetworkSpec
from spikernel_jax.training.loop import TrainingDivergedError
from spikernel_jax.training.recipe import TrainConfig

SPACE = CellSpace((1, 3))
SPEC = NetworkSpec((28, 28, 1), 10, SPACE, channels=2, time_steps=1, stem_stride=2)
MEMBERS = [np.arange(0, 20), np.arange(15, 40)]


@pytest.fixture(scope="module")
def rows():
    return np.unique(SPACE.sample(jax.random.key(0), 80), axis=0)[:40]


@pytest.fixture
def training(tmp_path):
    return Training(SPEC, TrainConfig(epochs=RUNGS[-1], batch_size=8), 0, tmp_path / "search")


def cells_of(rows, members):
    return Cells([rows[own] for own in members], rows, members)


@given(st.integers(1, 500), st.integers(1, 9))
def test_a_plan_keeps_to_its_budget(epochs, sets):
    cells = plan(epochs, sets).cells
    spent = sets * sum(n * steps for n, steps in zip(cells, np.diff((0, *RUNGS)), strict=True))
    assert cells[0] >= 2
    assert (np.diff(cells) <= 0).all()
    assert cells[-1] >= 1
    if cells[0] > 2:
        assert spent <= epochs
        assert epochs - spent <= sets * (2 * RUNGS[-1])


def test_prior_is_the_sum_of_ranks(rows):
    fields = [receptive_field(SPACE, row) for row in rows]
    sizes = [parameters_of(SPEC, row) for row in rows]
    found = prior(SPEC, rows)
    for i, j in ((0, 1), (3, 17), (20, 39)):
        by_hand = [
            sum((values[k] > other) + 0.5 * (values[k] == other) for values in (fields, sizes) for other in values)
            for k in (i, j)
        ]
        assert found[i] - found[j] == pytest.approx(by_hand[0] - by_hand[1])


def test_best_of():
    value = np.array([1.0, 3, 3, -np.inf, 2, -np.inf])
    tie = np.array([0.0, 1, 2, 9, 0, 9])
    own = np.array([0, 1, 2, 3])
    assert best_of(own, value[own], tie, 1).tolist() == [2]
    assert best_of(own, value[own], tie, 4).tolist() == [2, 1, 0]
    assert best_of(np.array([3, 5]), value[[3, 5]], tie, 4).tolist() == []


def test_the_winner_is_the_most_accurate_of_those_trained_longest():
    found = Shorts(np.array([2, 4, 4, 4, 0]), np.array([0.9, 0.5, 0.6, -np.inf, np.nan]))
    assert winner(np.arange(5), found) == 2
    assert winner(np.array([0, 1]), found) == 1
    assert winner(np.array([0, 3]), found) == 0  # 3 diverged
    assert winner(np.array([3, 4]), found) is None


def test_who_is_trained_and_who_goes_on(rows, training, monkeypatch):
    """By a loop over each set; accuracies are made up, and of one cell the training diverges."""
    rng = np.random.default_rng(0)
    first, scores = prior(SPEC, rows), rng.normal(size=len(rows))
    scores[np.argmax(first)] = -np.inf  # first in line, without a score
    made_up = {tuple(row): rng.random(2) for row in rows.tolist()}
    lost = np.lexsort((-scores, -np.where(np.isfinite(scores), first, -np.inf)))[0]
    made_up[tuple(rows[lost].tolist())][:] = -np.inf
    asked = []

    def reach(training, row, until, data):
        asked.append((tuple(row.tolist()), until))
        return made_up[tuple(row.tolist())][RUNGS.index(until)]

    monkeypatch.setattr(shorts, "_reach", reach)
    line = line_of(SPEC, cells_of(rows, MEMBERS), scores)
    found = train_rungs(training, line, 64, load_dataset("mnist5k", limit_train=8), print)
    counts = plan(64, 2).cells
    trained, further = set(), set()
    for own in MEMBERS:
        able = sorted((i for i in own if np.isfinite(scores[i])), key=lambda i: (-first[i], -scores[i]))
        here = able[: counts[0]]  # a cell that another set has trained does not count here
        trained |= set(here)
        accuracy = {i: made_up[tuple(rows[i].tolist())][0] for i in here}

        def place(values, i):
            return sum((values[i] > v) + 0.5 * (values[i] == v) for v in values.values())

        able = [i for i in here if np.isfinite(accuracy[i])]
        both = {i: place(accuracy, i) + place({k: first[k] for k in here}, i) for i in able}
        further |= set(sorted(able, key=lambda i: (-both[i], -scores[i]))[: counts[1]])
    assert {key for key, until in asked if until == RUNGS[0]} == {tuple(rows[i].tolist()) for i in trained}
    assert {key for key, until in asked if until == RUNGS[1]} == {tuple(rows[i].tolist()) for i in further}
    assert set(np.flatnonzero(found.epochs == RUNGS[1])) == further
    assert np.isnan(found.accuracy[found.epochs == 0]).all()
    assert len(asked) == len(set(asked))
    assert lost not in further


@pytest.fixture
def trained(monkeypatch):
    """Trainings that take no time, by their folders; they leave nothing."""
    begun = []

    def train(spec, row, data, config, *, folder, until, **_):
        begun.append(folder)
        return types.SimpleNamespace(metrics={"validation_accuracy": until / 10})

    monkeypatch.setattr(shorts, "train", train)
    return begun


@contextlib.contextmanager
def held(training, row):
    """Another process, that trains a cell."""
    folder = training.folder / f"{int(SPACE.identity(row)):016x}"
    folder.mkdir(parents=True, exist_ok=True)
    with files.lock(folder, "held"):
        yield folder


def test_a_cell_in_the_hands_of_another_process_is_awaited(rows, training, trained, monkeypatch):
    data, line = load_dataset("mnist5k", limit_train=8), line_of(SPEC, cells_of(rows, MEMBERS), np.zeros(len(rows)))
    mine = contextlib.ExitStack()
    folder = mine.enter_context(held(training, rows[np.argmax(line.first)]))
    waited = []

    def sleep(seconds):
        assert folder not in trained
        waited.append(len(trained))
        mine.close()  # the other process dies, and leaves the cell as it is

    monkeypatch.setattr(shorts.time, "sleep", sleep)
    found = train_rungs(training, line, 1, data, print)
    assert folder in trained
    assert waited == [np.count_nonzero(found.epochs) - 1]
    assert set(found.accuracy[found.epochs > 0].tolist()) <= {0.2, 0.4}


def test_another_process_shares_what_nobody_has_in_hand(rows, training, trained):
    told = {f"shorts/{RUNGS[0]}": [3, 1, 4], f"shorts/{RUNGS[1]}": [4]}
    training = dataclasses.replace(training, processes=types.SimpleNamespace(hear=told.get))
    with held(training, rows[1]):
        shorts.share_rungs(training, rows, load_dataset("mnist5k", limit_train=8))
    assert trained == [training.folder / f"{int(SPACE.identity(rows[place])):016x}" for place in (3, 4, 4)]


def test_a_training_that_diverged_is_not_tried_again(rows, training, monkeypatch):
    tried = []

    def train(*_, folder, **__):
        tried.append(folder)
        raise TrainingDivergedError("the loss is nan at step 3")

    monkeypatch.setattr(shorts, "train", train)
    line = line_of(SPEC, cells_of(rows[:4], [np.arange(4)]), np.zeros(4))
    for _ in range(2):
        found = train_rungs(training, line, 1, load_dataset("mnist5k", limit_train=8), print)
        assert winner(np.arange(4), found) is None
    assert len(tried) == len(set(tried)) == 2


def test_trainings_go_on_from_disk_and_validation_alone_decides(rows, training, monkeypatch):
    data = load_dataset("mnist5k", limit_train=16, limit_validation=16, limit_test=16)
    line = line_of(SPEC, cells_of(rows[:4], [np.arange(4)]), np.zeros(4))
    lines = []
    found = train_rungs(training, line, 1, data, lines.append)
    assert sorted(found.epochs.tolist()) == [0, 0, 2, 4]
    assert any("left" in line for line in lines)

    def none(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(shorts, "train", none)
    turned = dataclasses.replace(data.test, labels=(data.test.labels + 1) % 10)
    again = train_rungs(training, line, 1, dataclasses.replace(data, test=turned), lines.append)
    assert again.epochs.tolist() == found.epochs.tolist()
    np.testing.assert_array_equal(again.accuracy, found.accuracy)
    assert shorts.pace(training, line, data) > 0
