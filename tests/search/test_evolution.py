"""Evolution and random search: who may be a parent, what is proposed, what is never scored, and resuming."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from spikernel_jax.cells.space import CellSpace
from spikernel_jax.search import evolution
from spikernel_jax.search.evolution import Evolution, RandomSearch, State, begin, drive, tell

KEY = jax.random.key(5)
FORWARD = CellSpace((3,))
LOOPED = CellSpace((1, 3), feedback=True)
SMALL = Evolution(population=8, sample=3, children=5, retries=20)
NAN, INF = float("nan"), float("inf")
Rows = np.ndarray


def hamming(space: CellSpace, cells: int = 1) -> Callable[[Rows], Rows]:
    """A smooth score: minus the number of edges in which a candidate differs from one cell."""
    drawn = space.sample(jax.random.key(99), 20)
    target = drawn[np.argsort((drawn != 0).sum(1), kind="stable")[-cells:]].reshape(-1)  # many edges: seldom drawn
    return lambda rows: -(rows.reshape(len(rows), -1) != target).sum(1).astype(np.float64)


def history(space: CellSpace, scores: list[float], cells: int = 1) -> State:
    """A state with these scores, of the sampler's distinct cells."""
    drawn = np.unique(space.sample(KEY, 40), axis=0)
    drawn = drawn[np.argsort(-(drawn != 0).sum(1), kind="stable")]  # cells of many edges have many neighbours
    rows = drawn[: len(scores)] if cells == 1 else np.stack([drawn[: len(scores)], drawn[::-1][: len(scores)]], 1)
    return tell(begin(space, cells), rows, np.array(scores))


def mutants(space: CellSpace, row: Rows) -> set[bytes]:
    """Every mutation of a cell, as far as many draws tell."""
    return {space.mutate(jax.random.key(i), row).tobytes() for i in range(300)}


# Parents


def test_the_population_is_the_youngest_with_a_finite_score():
    state = history(FORWARD, [9.0, 1.0, NAN, 2.0, -INF, 3.0, INF])
    assert Evolution(population=3, sample=1).parents(state).tolist() == [1, 3, 5]
    assert Evolution(population=4, sample=1).parents(state).tolist() == [0, 1, 3, 5]
    assert state.scores[[2, 4, 6]].tolist()[1:] == [-INF, INF]  # recorded as they are
    assert np.isnan(state.scores[2])


def test_children_are_mutations_of_the_one_parent_there_is():
    # The best is too old, the youngest three have no finite score.
    state = history(FORWARD, [9.0, 1.0, NAN, INF, -INF])
    rows = Evolution(population=1, sample=1).propose(KEY, state, FORWARD, 8)
    assert len(rows) == 8
    assert {row.tobytes() for row in rows} <= mutants(FORWARD, state.rows[1])
    assert {row.tobytes() for row in rows} - mutants(FORWARD, state.rows[0])


def test_the_best_of_the_tournament_is_the_parent():
    state = history(LOOPED, [1.0, 4.0, 2.0, 3.0])
    rows = Evolution(population=4, sample=4).propose(KEY, state, LOOPED, 24)
    near = [len({row.tobytes() for row in rows} & mutants(LOOPED, parent)) for parent in state.rows]
    # Of four draws with replacement the best is among them in 68 of 100, the worst is alone in 0.4.
    assert sum(near) >= 24
    assert near[1] > 12 > near[3] > 0
    assert near[0] <= 1


def test_without_parents_candidates_are_drawn_at_random():
    bad = history(FORWARD, [NAN, -INF, INF])
    config = Evolution(population=3, sample=2)
    drawn = config.propose(KEY, bad, FORWARD, 6)
    fresh = config.propose(KEY, begin(FORWARD)._replace(generation=1), FORWARD, 6)
    seen = {row.tobytes() for row in bad.rows}
    assert len(drawn) == 6
    assert not seen & {row.tobytes() for row in drawn}
    assert [row.tobytes() for row in fresh if row.tobytes() not in seen][:1] == [drawn[0].tobytes()]


@pytest.mark.parametrize("row", range(3))
def test_of_a_pair_one_cell_is_changed_and_over_children_either(row):
    state = history(FORWARD, [1.0, 2.0, 3.0][: row + 1], cells=2)
    parent = state.rows[-1]
    rows = Evolution(population=1, sample=1).propose(KEY, state, FORWARD, 12)
    changed = (rows != parent).any(2)
    assert (changed.sum(1) == 1).all()
    assert changed.any(0).all()


# Children


@pytest.mark.parametrize(("space", "cells"), [(LOOPED, 1), (FORWARD, 2)], ids=["feedback", "pairs"])
@pytest.mark.parametrize("scored", [0, 8], ids=["random", "mutated"])
def test_a_child_does_not_depend_on_how_many_follow(space, cells, scored):
    state = begin(space, cells) if not scored else history(space, [float(i) for i in range(scored)], cells)
    many, few = (SMALL.propose(KEY, state, space, n) for n in (9, 4))
    assert len(many) == 9
    assert (few == many[:4]).all()
    assert (SMALL.propose(KEY, state, space, 9) == many).all()
    later = SMALL.propose(KEY, state._replace(generation=state.generation + 1), space, 9)
    other = SMALL.propose(jax.random.key(6), state, space, 9)
    assert (later != many).any()
    assert (other != many).any()


def test_a_state_remembers_when_each_was_born():
    state = tell(history(FORWARD, [1.0, 2.0]), FORWARD.enumerate()[:1], np.array([NAN]))
    assert state.born.tolist() == [0, 0, 1]
    assert state.generation == 2


@pytest.mark.parametrize("strategy", [Evolution(), RandomSearch()], ids=["evolution", "random"])
@pytest.mark.parametrize("cells", [1, 2])
def test_nothing_is_scored_twice_and_all_is_canonical(strategy, cells):
    state = drive(strategy, FORWARD, hamming(FORWARD, cells), budget=90, key=KEY, cells=cells)
    assert len(np.unique(state.rows, axis=0)) == len(state.scores) == 90
    flat = state.rows.reshape(-1, 6)
    assert (FORWARD.canonical(flat) == flat).all()
    assert (state.scores == hamming(FORWARD, cells)(state.rows)).all()


def test_both_searches_begin_alike():
    evolved = drive(SMALL, LOOPED, hamming(LOOPED), budget=30, key=KEY)
    drawn = drive(RandomSearch(children=5, retries=20), LOOPED, hamming(LOOPED), budget=30, key=KEY)
    assert (evolved.rows[:10] == drawn.rows[:10]).all()  # two generations fill the population of 8
    assert (evolved.rows[10:] != drawn.rows[10:]).any()


# The memory budget


def light(rows: Rows) -> Rows:
    """Candidates with at most one convolution in all."""
    convs = (rows >= 2) & (rows < FORWARD.code("avgpool"))
    return convs.reshape(len(rows), -1).sum(1) <= 1


@pytest.mark.parametrize("strategy", [Evolution(), RandomSearch()], ids=["evolution", "random"])
@pytest.mark.parametrize("cells", [1, 2])
def test_a_candidate_over_budget_is_never_scored(strategy, cells):
    seen = []

    def score(rows: Rows) -> Rows:
        assert light(rows).all()
        seen.append(len(rows))
        return rows.reshape(len(rows), -1).sum(1).astype(np.float64)

    state = drive(strategy, FORWARD, score, budget=40, key=KEY, cells=cells, fits=light)
    assert sum(seen) == len(state.scores) == 40
    assert not light(FORWARD.sample(KEY, 40)).all()  # many draws do not fit


def test_a_space_that_runs_out_ends_the_search():
    every = FORWARD.enumerate()
    few = {row.tobytes() for row in every if not ((row == 2).any() or (row == 3).sum() > 1)}
    fits = lambda rows: np.array([row.tobytes() in few for row in rows])  # noqa: E731
    state = drive(SMALL, FORWARD, hamming(FORWARD), budget=200, key=KEY, fits=fits)
    assert {row.tobytes() for row in state.rows} <= few
    assert len(few) >= len(state.scores) > 0.5 * len(few)


@pytest.mark.parametrize("strategy", [Evolution(), RandomSearch()], ids=["evolution", "random"])
def test_nothing_fits(strategy):
    never = lambda rows: np.zeros(len(rows), bool)  # noqa: E731
    with pytest.raises(ValueError, match=r"fits: none of \d+ candidates drawn fits") as error:
        drive(strategy, FORWARD, hamming(FORWARD), budget=9, key=KEY, fits=never)
    assert "\n" not in str(error.value)


# What it is for


def test_evolution_finds_better_cells_than_as_many_draws():
    better = 0
    for seed in range(3):
        asked: dict[str, Any] = {"budget": 160, "key": jax.random.key(seed)}
        evolved = drive(Evolution(24, 8, 8), LOOPED, hamming(LOOPED), **asked)
        drawn = drive(RandomSearch(children=8), LOOPED, hamming(LOOPED), **asked)
        best = [state.scores.max() for state in (evolved, drawn)]
        assert best[0] > best[1]
        better += best[0] - best[1]
    assert better >= 6  # edges, of 3 · 12


def test_best_so_far():
    got = evolution.best_so_far(np.array([NAN, 1.0, -INF, 0.0, INF, 2.0]))
    np.testing.assert_array_equal(got, [NAN, 1, 1, 1, 1, 2])


# On disk


class StopError(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("cells", [1, 2])
@pytest.mark.parametrize("strategy", [SMALL, RandomSearch(children=5)], ids=["evolution", "random"])
def test_goes_on_to_the_same_result(strategy, cells, tmp_path):
    arguments: dict[str, Any] = {"budget": 33, "key": KEY, "cells": cells, "fits": light}
    scores = hamming(FORWARD, cells)
    whole = drive(strategy, FORWARD, scores, **arguments)
    calls = 0

    def stops(rows: Rows) -> Rows:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise StopError
        return scores(rows)

    folder, seen = tmp_path / "search", []
    with pytest.raises(StopError):
        drive(strategy, FORWARD, stops, **arguments, folder=folder)
    assert len(list(folder.glob("chunk-*.npz"))) == 3
    calls = 10
    resumed = drive(strategy, FORWARD, stops, **arguments, folder=folder, progress=seen.append)
    for got, want in zip(resumed, whole, strict=True):
        np.testing.assert_array_equal(got, want)
    assert calls == 10 + 4  # 7 generations, 3 of them from the disk
    assert (seen[-1].done, seen[-1].total, seen[-1].scored) == (33, 33, 33 - 15)
    assert seen[-1].best == scores(whole.rows).max()
    again = drive(strategy, FORWARD, stops, **arguments, folder=folder)
    assert calls == 14
    np.testing.assert_array_equal(again.rows, whole.rows)


@pytest.mark.parametrize(
    "changes",
    [
        {"budget": 11},
        {"key": jax.random.key(6)},
        {"settings": {"seed": 1}},
        {"strategy": Evolution(8, 3, 4, 20)},
        {"cells": 2},
        {"space": CellSpace((5,))},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_refuses_the_folder_of_another_search(changes, tmp_path):
    arguments: dict[str, Any] = {"budget": 10, "key": KEY, "strategy": SMALL, "folder": tmp_path / "s"}
    arguments |= {"settings": {"seed": 0}, "space": FORWARD, "score": lambda rows: np.zeros(len(rows))}
    drive(**arguments)
    before = {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()}
    with pytest.raises(ValueError, match="holds results of another computation") as error:
        drive(**(arguments | changes))
    assert "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()} == before


# Bad input


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"population": 0}, "population=0 must be a whole number of at least 1"),
        ({"sample": 1.5}, "sample=1.5 must be"),
        ({"children": -1}, "children=-1 must be"),
        ({"retries": True}, "retries=True must be"),
        ({"population": 4, "sample": 5}, "sample=5 must be at most population=4"),
    ],
)
def test_settings_refuse_bad_values(changes, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Evolution(**changes)
    if not changes.keys() - {"children", "retries"}:
        with pytest.raises(ValueError, match=re.escape(words)):
            RandomSearch(**changes)


@pytest.mark.parametrize("strategy", [Evolution(), RandomSearch()], ids=["evolution", "random"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget": 0}, "budget=0 must be"),
        ({"cells": 3}, "cells=3 must be 1"),
        ({"score": lambda rows: np.zeros(len(rows) + 1)}, "score gave shape"),
        ({"fits": lambda rows: True}, "fits gave shape ()"),
        ({"fits": lambda rows: np.ones(len(rows))}, "dtype float64"),
    ],
)
def test_searches_refuse_bad_input(strategy, changes, words, tmp_path):
    arguments: dict[str, Any] = {"space": FORWARD, "score": lambda rows: np.zeros(len(rows)), "budget": 4, "key": KEY}
    folder: Path = tmp_path / "search"
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        drive(strategy, **(arguments | changes), folder=folder)
    assert "\n" not in str(error.value)
    assert not list(folder.glob("chunk-*"))


@pytest.mark.parametrize(
    ("rows", "scores", "words"),
    [
        (FORWARD.enumerate()[:2], np.zeros(3), "scores have shape (3,); want [2]"),
        (LOOPED.sample(KEY, 2), np.zeros(2), "rows have shape (2, 12)"),
        (np.ones((2, 6)), np.zeros(2), "dtype float64; want ints"),
    ],
)
def test_tell_refuses_what_was_not_asked(rows, scores, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        tell(begin(FORWARD), rows, scores)
