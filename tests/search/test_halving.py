"""Successive halving: who goes on to the next fidelity, and who wins."""

import math
from pathlib import Path

import jax
import numpy as np
import pytest

from spikernel_jax.cells.space import CellSpace
from spikernel_jax.data import load_dataset
from spikernel_jax.io.processes import ALONE
from spikernel_jax.scoring import choice
from spikernel_jax.scoring.fidelity import FIDELITIES, Fidelity
from spikernel_jax.scoring.replicates import over_replicates
from spikernel_jax.scoring.scorer import Scorer
from spikernel_jax.search import halving
from spikernel_jax.snn.devices import Budget
from spikernel_jax.snn.spec import NetworkSpec

SPACE = CellSpace((1, 3, 5))
SPEC = NetworkSpec((32, 32, 3), 10, SPACE, channels=16, time_steps=5)
SETS = ((1, 3), (3, 5))


def cells_of(*sets: tuple[int, ...]) -> halving.Cells:
    members = [SPACE.convert(CellSpace(s).enumerate(), CellSpace(s)) for s in sets]
    return halving.gather(members)


CELLS = cells_of(*SETS)


def best_by_loop(cells: halving.Cells, at: np.ndarray, scores: np.ndarray, fraction: float) -> set[int]:
    """The rule, one set and one cell at a time."""
    identity = [tuple(row) for row in cells.rows.tolist()]
    score = dict(zip(at.tolist(), scores.tolist(), strict=True))
    kept = set()
    for members in cells.members:
        own = [identity.index(tuple(row)) for row in members.tolist()]
        ranked = sorted((i for i in own if math.isfinite(score.get(i, math.nan))), key=lambda i: (-score[i], i))
        kept |= set(ranked[: max(8, math.ceil(fraction * len(own)))])
    return kept


@pytest.mark.parametrize("fraction", [1.0, 0.1, 0.01, 0.0001])
def test_the_best_of_each_set_go_on(fraction):
    rng = np.random.default_rng(0)
    at = np.sort(rng.choice(len(CELLS.rows), 3000, replace=False))
    scores = rng.normal(size=len(at))
    scores[rng.choice(len(at), 200, replace=False)] = rng.choice([np.nan, -np.inf, np.inf], 200)
    got = halving.promoted(CELLS, at, scores, fraction)
    assert (np.diff(got) > 0).all()
    assert set(got.tolist()) == best_by_loop(CELLS, at, scores, fraction)


def test_a_set_without_finite_scores_sends_nobody():
    at = np.arange(len(CELLS.rows))
    assert len(halving.promoted(CELLS, at, np.full(len(at), -np.inf), 0.1)) == 0


def test_the_winner_is_the_best_at_the_highest_fidelity_that_has_one_of_the_set():
    def rung(name: str, at: list[int], scores: list[float]) -> halving.Rung:
        return halving.Rung(name, np.array(at), over_replicates(np.array(scores)[:, None], np.ones(len(at), np.int64)))

    rungs = [
        rung("low", [0, 1, 2, 3, 4, 5], [9.0, 1.0, 2.0, 3.0, 8.0, 7.0]),
        rung("medium", [1, 2, 3, 5], [1.0, 5.0, 4.0, 6.0]),
        rung("full", [1, 2], [1.0, 0.5]),
    ]
    memory = np.array([10, 10, 10, 10, 99, 10])

    def winner(own: list[int]) -> int | None:
        return halving.winner(np.array(own), rungs, memory, memory <= 50)

    assert winner([0, 1, 2, 3]) == 1  # at full, though 0 was first at low
    assert winner([0, 3]) == 3  # neither reached full
    assert winner([0, 4]) == 0  # 4 does not fit
    assert winner([4]) is None


def test_fidelities_shrink_the_network_and_never_enlarge_it():
    low, medium, full = (f.network(SPEC) for f in FIDELITIES)
    assert full == SPEC
    assert low.channels <= medium.channels <= full.channels
    assert low.image_shape[0] <= medium.image_shape[0] <= full.image_shape[0]
    narrow = NetworkSpec((28, 28, 1), 10, SPACE, channels=4, time_steps=1, stem_stride=2)
    for fidelity in FIDELITIES:
        scored = fidelity.network(narrow)
        assert scored.channels <= 4
        assert scored.time_steps == 1
        assert scored.image_shape == (28, 28, 1)  # cell 1 is 14 wide already
    assert Fidelity(side=8).network(SPEC).image_shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("field", "value"), [("channels", 0), ("batch", 1), ("time_steps", 0), ("side", 1), ("seeds", 0)]
)
def test_fidelities_refuse_sizes_that_nothing_can_have(field, value):
    with pytest.raises(ValueError, match=f"{field}={value} must be at least"):
        Fidelity(**{field: value})


def search(folder: Path, method: str | None = None) -> halving.Search:
    return halving.Search(
        sets=((1,),), trained=NetworkSpec((28, 28, 1), 10, CellSpace((1,)), channels=2, time_steps=1, stem_stride=2),
        strategy="halving", samples=1, budget=Budget(1, 8), score="sahd_paper", method=method,
        rungs=(("low", Fidelity(batch=2, seeds=1)),), cells_key=jax.random.key(0), banks_key=jax.random.key(1),
        images_key=jax.random.key(2), folder=folder, origin={}, processes=ALONE, say=print,
    )  # fmt: skip


def test_on_an_accelerator_a_run_keeps_to_the_way_that_was_the_quicker_at_its_first_start(tmp_path, monkeypatch):
    data, cells = load_dataset("mnist5k", limit_train=8), cells_of((1,))
    timed = iter(["each"])  # once

    def way(method: str | None = None) -> str:
        units = halving.units(search(tmp_path, method), cells, data, "low", np.arange(len(cells.rows)))
        assert isinstance(units.scorer, Scorer)
        return units.scorer.method

    assert way() == "shared"  # on a CPU, where nothing is timed or written
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(choice, "is_timed", lambda: True)
    monkeypatch.setattr(choice, "quickest", lambda *_: next(timed))
    assert way() == "each"
    assert way() == "each"
    assert way("batched") == "batched"  # what is asked for, wins
