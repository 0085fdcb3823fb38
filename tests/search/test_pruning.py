"""Pruning: a supernet of one cell is that cell, every removal is the best one, and the budget holds."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spikernel_jax import make_bank, score_population
from spikernel_jax.cells.canonical import EDGES, FORWARD_EDGES
from spikernel_jax.cells.space import CellSpace
from spikernel_jax.scoring import scores
from spikernel_jax.search import queue
from spikernel_jax.search.pruning import Masks, full_mask, mixture, prune, score_supernets
from spikernel_jax.snn import network
from spikernel_jax.snn.spec import NetworkSpec

KEY = jax.random.key(2)
NARROW, BOTH, LOOPED = CellSpace((3,)), CellSpace((1, 3)), CellSpace((3,), feedback=True)
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(2, 4, 6, 6, 1)).astype(np.float32)
INF = float("inf")


def tiny(space: CellSpace, **options: Any) -> NetworkSpec:
    return NetworkSpec((6, 6, 1), 3, space, channels=2, time_steps=2, **options)


def filled_bank(spec: NetworkSpec) -> Any:
    """Two banks drawn by NumPy: to compile every array's draw would take longer than the tests."""
    rng = np.random.default_rng(3)

    def fill(path: Any, leaf: Any) -> np.ndarray:
        if path[-1].key == "kernel":
            return rng.uniform(-0.5, 0.5, leaf.shape).astype(np.float32)
        return np.full(leaf.shape, path[-1].key == "scale", np.float32)

    return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(lambda: make_bank(KEY, spec, 2)))


def alone(space: CellSpace, row: np.ndarray) -> np.ndarray:
    """The supernet that holds nothing but one cell."""
    mask = np.zeros((len(space.edges), space.num_ops), bool)
    for column, (source, target) in enumerate(FORWARD_EDGES):
        back = EDGES.index((target, source))
        if space.feedback and row[back]:
            mask[back, row[back]] = True
        else:
            mask[column, row[column]] = True
    return mask


def hashed(masks: Masks) -> np.ndarray:
    """A score without rhyme or reason, the same for the same mask."""
    return np.array([np.random.default_rng(np.packbits(mask)).normal() for mask in masks])


# The supernet


@pytest.mark.parametrize(
    ("space", "score", "options"),
    [
        pytest.param(NARROW, "sahd_paper", {}, id="forward"),
        pytest.param(
            LOOPED,
            "sahd_code",
            {"head": "snasnet", "head_hidden": 4, "neurons_per_class": 1},
            id="feedback",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_supernet_of_one_cell_scores_as_the_cell(space, score, options):
    spec = tiny(space, **options)
    bank = filled_bank(spec)
    drawn = np.unique(space.sample(KEY, 60), axis=0)
    rows = drawn[np.argsort(-(drawn != 0).sum(1), kind="stable")][:4]
    assert rows[:, 6:].any() == space.feedback
    got = score_supernets([alone(space, row) for row in rows], bank, IMAGES, spec, score=score)
    want = score_population(rows, bank, IMAGES, spec, score=score).scores
    assert np.isfinite(want).all()
    assert len(set(want)) == 4
    np.testing.assert_allclose(got, want, rtol=1e-5)
    learning = dataclasses.replace(spec, neuron=dataclasses.replace(spec.neuron, learn_tau=True))
    again = score_supernets([alone(space, rows[0])], bank, IMAGES, learning, score=score)
    np.testing.assert_array_equal(again, got[:1])


def test_an_edge_of_several_operations_is_their_weighted_sum():
    """conv1 + 2·conv3 + avgpool on edge (0, 3), against the cell that has them side by side, one on each path."""
    spec = tiny(BOTH)
    params = jax.tree.map(lambda leaf: leaf[0], filled_bank(spec))
    weights = np.zeros((6, BOTH.num_ops), np.float32)
    weights[3, [2, 3, 4]] = 1, 2, 1
    side_by_side = BOTH.parse("0>1:skip 0>2:skip 0>3:conv1 1>3:conv3 2>3:avgpool")
    moved = dict(params)
    for cell in ("cell1", "cell2"):
        conv = params[f"{cell}.e03.conv3"]
        moved[f"{cell}.e13.conv3"] = conv | {"scale": 2 * conv["scale"]}  # its bias is 0

    def run(genotype: Any, bank: Any) -> Any:
        terms, out = scores.spike_terms(spec, genotype, bank, jnp.asarray(IMAGES[0]))
        return terms, out.logits_BK

    got, logits = jax.jit(run)(jnp.asarray(weights), params)
    own = network.subnetwork(spec, moved, side_by_side)
    want, expected = jax.jit(lambda bank: run(side_by_side, bank))(own)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert int(got.calls) == spec.time_steps * (2 * 2 + 2)  # both convolutions of both cells, transition, last


def test_a_pair_of_nodes_takes_the_mean_of_what_it_holds():
    mask = full_mask(NARROW)
    mask[0] = [True, False, True, False]
    mask[5] = [False, False, False, True]
    weights = mixture(NARROW, mask)
    assert weights[0].tolist() == [0.5, 0, 0.5, 0]
    assert weights[5].tolist() == [0, 0, 0, 1]
    assert weights[1].tolist() == [0.25] * 4
    np.testing.assert_allclose(weights[3], [0, 1 / 3, 1 / 3, 1 / 3])  # the direct edge is never zero
    looped = mixture(LOOPED, full_mask(LOOPED))
    for column, (source, target) in enumerate(FORWARD_EDGES):
        both = looped[[column, EDGES.index((target, source))]]
        options = 3 if column == 3 else 7  # zero, and three operations in each direction
        np.testing.assert_allclose(both[both > 0], np.full(options, 1 / options))


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (np.ones((6, 5), bool), "mask has shape (6, 5)"),
        (np.ones((6, 4)), "dtype float64; want bool [6, 4]"),
        (np.ones((6, 4), bool), "mask holds zero on edge (0, 3)"),
        (full_mask(NARROW) & (np.arange(6) != 2)[:, None], "mask leaves no operation on edge (1, 2)"),
    ],
)
def test_masks_that_are_no_supernets(mask, words):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        mixture(NARROW, mask)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def bank() -> Any:
    return filled_bank(tiny(NARROW))


def test_scores_refuse_bad_input(bank):
    spec = tiny(NARROW)
    with pytest.raises(ValueError, match="score='zen' is unknown"):
        score_supernets([full_mask(NARROW)], bank, IMAGES, spec, score="zen")
    with pytest.raises(ValueError, match="images have shape"):
        score_supernets([full_mask(NARROW)], bank, IMAGES[:1], spec)
    with pytest.raises(ValueError, match="shortcut='spike'"):
        score_supernets([full_mask(NARROW)], bank, IMAGES, dataclasses.replace(spec, shortcut="spike"))


# The removals


def by_hand(space: CellSpace, score: Any) -> tuple[list[set[tuple[int, int]]], np.ndarray, int]:
    """Forward pruning in plain loops: what goes in each round as (edge, code), the row, supernets scored."""
    left = [set(range(space.num_ops)) for _ in range(6)]
    left[3].remove(0)
    rounds, count = [], 0
    while any(len(ops) > 1 for ops in left):
        gone = set()
        for edge in range(6):
            if len(left[edge]) == 1:
                continue
            worth = {}
            for code in left[edge]:
                mask = np.array([[o in ops for o in range(space.num_ops)] for ops in left])
                mask[edge, code] = False
                worth[code] = score(mask[None])[0]
                count += 1
            gone.add((edge, max(worth, key=lambda code: worth[code])))
        for edge, code in gone:
            left[edge].remove(code)
        rounds.append(gone)
    return rounds, np.array([min(ops) for ops in left]), count


@pytest.mark.parametrize("space", [NARROW, BOTH, CellSpace((1, 3, 5))], ids=lambda space: str(space.kernel_sizes))
def test_every_removal_is_the_best_of_its_edge(space):
    rounds, row, count = by_hand(space, hashed)
    found = prune(space, hashed)
    here = {edge: column for column, edge in enumerate(space.edges)}
    for index, gone in enumerate(rounds):
        assert {(here[r.edge], r.code) for r in found.removals if r.round == index} == gone
    assert (found.cell == space.canonical(row)).all()
    assert found.evaluations == count
    assert len(found.removals) == 6 * (space.num_ops - 1) - 1


def test_prunes_a_network_as_by_hand(bank):
    spec = tiny(NARROW)
    score = lambda masks: score_supernets(masks, bank, IMAGES, spec)  # noqa: E731
    rounds, row, count = by_hand(NARROW, score)
    found = prune(NARROW, score)
    assert (found.cell == NARROW.canonical(row)).all()
    assert found.evaluations == count == (5 * 4 + 3) + (5 * 3 + 2) + 5 * 2
    here = {edge: column for column, edge in enumerate(NARROW.edges)}
    assert [{(here[r.edge], r.code) for r in found.removals if r.round == i} for i in range(3)] == rounds
    assert np.isfinite([removal.score for removal in found.removals]).all()


@pytest.mark.parametrize("seed", range(8))
def test_feedback_cells_come_out_valid(seed):
    found = prune(LOOPED, lambda masks: hashed(masks) * np.cos(seed) + np.arange(len(masks)) * np.sin(7 * seed) / 9)
    LOOPED.validate(found.cell)
    assert (LOOPED.canonical(found.cell) == found.cell).all()
    assert len(found.removals) == 5 * 6 + 2


def test_equal_scores_remove_the_later_operation():
    found = prune(BOTH, lambda masks: np.zeros(len(masks)))
    assert [r.code for r in found.removals if r.round == 0] == [BOTH.code("avgpool")] * 6
    assert BOTH.explicit(found.cell) == "0>3:skip"


def test_scores_that_are_not_finite_are_the_worst():
    def score(masks: Masks) -> np.ndarray:
        without_skip = ~masks[:, :, 1].all(1)
        return np.where(without_skip, np.resize([np.nan, INF, -INF], len(masks)), hashed(masks))

    found = prune(NARROW, score)
    skips = [r for r in found.removals if r.code == 1]
    assert all(np.isfinite(r.score) for r in found.removals if r.round == 0)
    assert not [r for r in skips if r.round == 0]
    prune(NARROW, lambda masks: np.full(len(masks), np.nan))  # comes to an end all the same


# The memory budget


@pytest.mark.parametrize("space", [BOTH, CellSpace((1, 3, 5), max_kernel_sizes=1), LOOPED], ids=str)
def test_the_cell_fits_whatever_the_budget(space):
    spec = tiny(space)
    memory = queue.memory_of(spec, np.unique(space.sample(KEY, 300), axis=0), 8)
    free = prune(space, hashed).cell
    differs = 0
    for budget in np.quantile(memory, [0, 0.05, 0.2, 0.5], method="nearest"):
        found = prune(space, hashed, fits=lambda rows, budget=budget: queue.memory_of(spec, rows, 8) <= budget)
        assert queue.memory_of(spec, found.cell[None], 8)[0] <= budget
        space.validate(found.cell)
        differs += (found.cell != free).any()
    assert differs


def test_a_budget_that_all_cells_fit_changes_nothing():
    free, fitted = (prune(BOTH, hashed, fits=fits) for fits in (None, lambda rows: np.ones(len(rows), bool)))
    assert free.removals == fitted.removals


def test_nothing_fits():
    with pytest.raises(ValueError, match=r"fits: no cell of .* fits") as error:
        prune(NARROW, hashed, fits=lambda rows: np.zeros(len(rows), bool))
    assert "\n" not in str(error.value)


# On disk


def test_goes_on_to_the_same_result(tmp_path):
    calls = 0

    def stops(masks: Masks) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return hashed(masks)

    folder, rounds = tmp_path / "pruning", []
    with pytest.raises(KeyboardInterrupt):
        prune(BOTH, stops, folder=folder)
    resumed = prune(BOTH, stops, folder=folder, progress=lambda *seen: rounds.append(seen))
    whole = prune(BOTH, hashed)
    assert (resumed.cell == whole.cell).all()
    assert resumed[1:] == whole[1:]
    assert calls == 3 + 2
    assert rounds == [(1, 17), (2, 11), (3, 5), (4, 0)]
    with pytest.raises(ValueError, match="holds results of another computation"):
        prune(BOTH, hashed, folder=folder, settings={"seed": 1})


def test_refuses_another_number_of_scores(tmp_path):
    with pytest.raises(ValueError, match=re.escape("score gave shape (2,) for 23 masks")):
        prune(NARROW, lambda masks: np.zeros(2), folder=tmp_path / "pruning")
    assert not list((tmp_path / "pruning").glob("chunk-*"))
