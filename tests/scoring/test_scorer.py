"""Scores of populations: common random numbers, and that nobody's score depends on the others."""

import dataclasses
import os
import subprocess
import sys
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from convolutions import conv_edges
from quick_cases import mostly_slow
from spikernel_jax import make_bank, score_population
from spikernel_jax.cells.space import CellSpace
from spikernel_jax.scoring import engine, room
from spikernel_jax.scoring import scorer as scorers
from spikernel_jax.scoring.replicates import over_replicates, paired_standard_errors
from spikernel_jax.scoring.scores import get_score, spike_terms
from spikernel_jax.snn import network
from spikernel_jax.snn.neurons import NeuronSpec
from spikernel_jax.snn.spec import NetworkSpec

KEY = jax.random.key(3)
SPACE = CellSpace((1, 3))
SPEC = NetworkSpec((8, 8, 1), 4, SPACE, channels=2, time_steps=2)
# One kernel size, so that fewer branches have to be compiled.
NARROW = NetworkSpec((8, 8, 1), 4, CellSpace((3,)), channels=2, time_steps=2)
LOOPED = NetworkSpec((6, 6, 1), 4, CellSpace((3,), feedback=True), channels=2, time_steps=2, head="snasnet",
                     head_hidden=8, neurons_per_class=2)  # fmt: skip
drawn_bank = jax.jit(make_bank, static_argnums=(1, 2))
CHUNK = 8
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(2, 4, 8, 8, 1)).astype(np.float32)
POOL = RNG.integers(256, size=(12, 8, 8, 1), dtype=np.uint8)


def eight_cells() -> np.ndarray:
    """Distinct ones, one of them without any convolution."""
    cells = SPACE.enumerate()
    found = cells[np.random.default_rng(1).choice(len(cells), CHUNK, replace=False)]
    found[0] = SPACE.parse("0>3:skip")
    return found


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return eight_cells()


@pytest.fixture(scope="module")
def bank() -> Any:
    return make_bank(KEY, SPEC, 2)


@pytest.fixture(scope="module")
def scores(rows, bank) -> Any:
    return score_population(rows, bank, IMAGES, SPEC)


def test_every_cell_has_a_finite_score_and_counted_calls(rows, scores):
    assert np.isfinite(scores.scores).all()
    assert len(set(scores.scores)) == CHUNK  # eight different cells, eight scores
    convs = np.array([2 * len(conv_edges(SPACE, row)) for row in rows])  # both cells
    assert (scores.lif_calls == SPEC.time_steps * (convs + 2)).all()  # and transition and last


@pytest.mark.parametrize("chosen", [[5], [6, 1, 4], [7, 6, 5, 4, 3, 2, 1, 0], [2, 2, 0, 2]])
def test_a_score_depends_on_nobody_else(chosen, rows, bank, scores):
    part = score_population(rows[chosen], bank, IMAGES, SPEC)
    assert (part.replicates == scores.replicates[chosen]).all()
    assert (part.scores == scores.scores[chosen]).all()
    assert (part.lif_calls == scores.lif_calls[chosen]).all()


def test_every_way_of_evaluating_gives_the_same(rows, bank, scores):
    """One whole network a candidate, all time steps together, spikes in bfloat16: other programs, the same scores."""
    changes: list[dict[str, Any]] = [
        {"method": "each"},
        {"steps": 2},
        {"precision": "bfloat16"},
        {"steps": 2, "precision": "bfloat16"},
    ]
    for change in changes:
        other = score_population(rows, bank, IMAGES, SPEC, **change)
        np.testing.assert_allclose(other.replicates, scores.replicates, rtol=1e-4, atol=1e-4)
        assert (other.lif_calls == scores.lif_calls).all()


def test_every_cell_of_a_space_scores_as_alone(bank):
    """Whole groups: no candidate reads what was shared for another."""
    space = CellSpace((3,))
    spec = NetworkSpec((4, 4, 1), 3, space, channels=2, time_steps=2)
    own = make_bank(KEY, spec, 1)
    images = RNG.normal(size=(4, 4, 4, 1)).astype(np.float32)
    cells = space.enumerate()
    shared = score_population(cells, own, images, spec)
    each = score_population(cells, own, images, spec, method="each")
    np.testing.assert_array_equal(shared.lif_calls, each.lif_calls)
    np.testing.assert_array_equal(np.isfinite(shared.scores), np.isfinite(each.scores))
    finite = np.isfinite(each.scores)
    assert finite.mean() > 0.5
    np.testing.assert_allclose(shared.scores[finite], each.scores[finite], rtol=1e-3, atol=1e-3)


def test_groups_cut_rows_where_the_prefix_changes():
    space = CellSpace((1, 3))
    cells = space.enumerate()[np.random.default_rng(2).choice(4243, 300, replace=False)]
    rows = np.stack([cells, cells[::-1]], 1)
    rows = rows[engine.order(rows)]
    groups = engine.group(rows, 320, space.num_ops)
    count = int(groups.groups)
    starts = groups.starts[: count + 1]
    assert starts[0] == 0
    assert starts[-1] == len(rows)
    prefixes = [tuple(row[engine.PREFIX]) for row in rows[:, 0]]
    assert count == len(set(prefixes))  # in order, each prefix is one run
    for g in range(count):
        members = range(starts[g], starts[g + 1])
        assert len({prefixes[i] for i in members}) == 1
        for side, edge in enumerate((4, 5)):  # (1,3) and (2,3)
            assert set(np.flatnonzero(groups.needs[g, side])) == {int(rows[i, 0, edge]) for i in members}
    assert not groups.needs[count:].any()
    assert engine.group(rows[:0], 4, space.num_ops).groups == 0


def test_bfloat16_reads_the_banks_weights_without_loss(bank):
    for leaf in jax.tree.leaves(bank):
        np.testing.assert_array_equal(np.asarray(leaf, ml_dtypes.bfloat16).astype(np.float32), leaf)


def test_equals_the_fixed_genotype_with_the_banks_weights(rows, bank, scores):
    for i in (0, 3, 6):
        genotype = tuple(rows[i].tolist())

        @jax.jit
        def fixed(params: Any, images: Any, genotype: Any = genotype) -> Any:
            terms, _ = spike_terms(SPEC, genotype, params, images)
            return get_score("sahd_paper")(terms), terms.calls

        for r in range(2):
            weights = network.subnetwork(SPEC, jax.tree.map(lambda leaf, r=r: leaf[r], bank), rows[i])
            score, calls = fixed(weights, IMAGES[r])
            np.testing.assert_allclose(scores.replicates[i, r], float(score), rtol=1e-5)
            assert scores.lif_calls[i] == int(calls)


def test_one_batch_serves_all_banks(rows, bank, scores):
    got = score_population(rows, bank, IMAGES[0], SPEC)
    assert (got.replicates[:, 0] == scores.replicates[:, 0]).all()
    assert (got.replicates[:, 1] != scores.replicates[:, 1]).all()


def test_banks_are_the_networks_own_weights(bank):
    """Replicate r is what the network's own initialisation draws, so more replicates begin with the fewer."""
    one, _ = network.init(jax.random.fold_in(KEY, 1), SPEC, SPACE.parse("0>3:conv3"))
    for name, entry in one.items():
        for drawn, leaf in zip(jax.tree.leaves(bank[name]), jax.tree.leaves(entry), strict=True):
            rounded = np.asarray(leaf, ml_dtypes.bfloat16).astype(np.float32)
            np.testing.assert_array_equal(drawn[1], rounded)


LEARNING = dataclasses.replace(SPEC, neuron=NeuronSpec(learn_tau=True, learn_threshold=True))


@pytest.mark.parametrize("method", mostly_slow(scorers.METHODS, lambda name: name != "batched"))
def test_neurons_that_have_learned_nothing_yet_score_as_fixed_ones(method, rows, bank):
    """To the bit, whatever a bank holds for them."""
    want = score_population(rows, bank, IMAGES, SPEC, method=method)
    own = make_bank(KEY, LEARNING, 2)
    jax.tree.map(np.testing.assert_array_equal, own, bank)
    wrong = {site: {name: np.full(2, 9.0, np.float32) for name in LEARNING.neuron.learned} for site in LEARNING.sites()}
    more = {name: {**bank.get(name, {}), **wrong.get(name, {})} for name in bank.keys() | wrong.keys()}
    for weights in (own, more):
        got = score_population(rows, weights, IMAGES, LEARNING, method=method)
        np.testing.assert_array_equal(got.replicates, want.replicates)
        np.testing.assert_array_equal(got.lif_calls, want.lif_calls)


def test_neurons_that_fire_more_than_once_score_by_their_first_spike(rows, bank):
    neurons = NeuronSpec(reset="soft"), NeuronSpec(reset="soft", max_spikes=4)
    specs = (dataclasses.replace(SPEC, neuron=neuron) for neuron in neurons)
    want, got = (score_population(rows, bank, IMAGES, spec) for spec in specs)
    np.testing.assert_array_equal(got.replicates, want.replicates)


def test_shortcuts_of_spikes_have_no_scores(bank):
    spiking = dataclasses.replace(SPEC, shortcut="spike")
    words = "shortcut='spike': scores and searches take skips for identities .* score with shortcut='membrane'"
    with pytest.raises(ValueError, match=words) as error:
        score_population(GOOD_ROW, bank, IMAGES, spiking)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=words):
        make_bank(KEY, spiking, 1)


def test_standard_error(scores, rows, bank):
    values = scores.replicates
    np.testing.assert_allclose(scores.scores, values.sum(1) / 2)
    squares = ((values - values.mean(1, keepdims=True)) ** 2).sum(1)
    np.testing.assert_allclose(scores.standard_errors, np.sqrt(squares / (2 - 1) / 2))
    alone = score_population(rows[:1], jax.tree.map(lambda leaf: leaf[:1], bank), IMAGES[:1], SPEC)
    assert np.isnan(alone.standard_errors).all()  # one replicate tells no spread
    assert alone.scores[0] == scores.replicates[0, 0]


def test_paired_standard_errors_equal_an_oracle():
    values = RNG.normal(size=(6, 4))
    values[1, 2], values[4, 0] = -np.inf, np.nan  # these two take no part
    good = [0, 2, 3, 5]
    want = np.full(6, np.nan)
    for i in good:
        left = [values[i, r] - sum(values[j, r] for j in good) / 4 for r in range(4)]
        centre = sum(left) / 4
        want[i] = np.sqrt(sum((d - centre) ** 2 for d in left) / 3) / 2
    np.testing.assert_allclose(paired_standard_errors(values), want, rtol=1e-12)
    assert np.isfinite(want[good]).all()


def test_noise_common_to_all_candidates_leaves_paired_errors_alone():
    own = RNG.normal(size=(5, 4))
    noisy = own + 100 * RNG.normal(size=4)
    calls = np.ones(5, np.int64)
    np.testing.assert_allclose(paired_standard_errors(noisy), paired_standard_errors(own), rtol=1e-9)
    assert (over_replicates(noisy, calls).standard_errors > 10 * over_replicates(own, calls).standard_errors).all()


@pytest.mark.parametrize("values", [np.ones((3, 1)), np.full((2, 3), -np.inf)])
def test_no_paired_error_without_a_spread(values):
    assert np.isnan(paired_standard_errors(values)).all()


def test_paired_errors_are_of_a_matrix():
    with pytest.raises(ValueError, match=r"replicates have shape \(3,\); want \[n, R\]"):
        paired_standard_errors(np.ones(3))


def test_two_equal_images_score_minus_infinity(rows, bank):
    images = IMAGES.copy()
    images[:, 1] = images[:, 0]
    got = score_population(rows, bank, images, SPEC)
    assert np.isneginf(got.scores).all()  # kept as it is, not turned into a bad number


def test_equal_cells_score_alike(bank):
    conv3 = SPACE.code("conv3")
    equal = np.array([[0, 0, 0, conv3, 0, 0], [1, 0, 0, conv3, 0, 0]], np.int8)  # node 1 leads nowhere
    assert np.ptp(score_population(equal, bank, IMAGES, SPEC).scores) == 0


@pytest.mark.slow
def test_feedback_cells_and_pairs_of_cells():
    space = LOOPED.space
    cells = space.sample(KEY, 12)
    looped = cells[cells[:, 6:].any(1)][:3]
    images = RNG.normal(size=(1, 4, 6, 6, 1)).astype(np.float32)
    bank = drawn_bank(KEY, LOOPED, 1)
    singles = score_population(looped, bank, images, LOOPED, score="sahd_code")
    twins = np.stack([looped, looped], 1)
    mixed = np.stack([looped, looped[[1, 2, 0]]], 1)
    pairs = score_population(np.concatenate([twins, mixed]), bank, images, LOOPED, score="sahd_code")
    assert np.isfinite(singles.scores).all()
    np.testing.assert_allclose(pairs.scores[:3], singles.scores, rtol=1e-5)
    assert (pairs.lif_calls[:3] == singles.lif_calls).all()
    convs = [sum(len(conv_edges(space, row)) for row in pair) for pair in mixed]
    assert (pairs.lif_calls[3:] == 2 * (np.array(convs) + 3)).all()  # transition, last, head
    assert (pairs.scores[3:] != pairs.scores[:3]).any()


GOOD_ROW = [[0, 0, 0, 1, 0, 0]]
WITH_NAN = np.where(np.arange(4)[None, :, None, None, None] == 2, np.nan, IMAGES)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"score": "zen"}, "score='zen' is unknown; known: sahd_paper"),
        ({"method": "loop"}, "method='loop' is unknown; known: shared, batched, each"),
        ({"precision": "float16"}, "precision='float16' is unknown; known: float32, bfloat16"),
        ({"steps": 3}, "steps=3 must divide T=2"),
        ({"steps": 0}, "steps=0 must divide T=2"),
        ({"images": WITH_NAN}, "NaN"),
        ({"images": IMAGES[:, :, :7]}, "images have shape"),
        ({"images": np.concatenate([IMAGES, IMAGES])}, r"images have shape \(4, .* for 2 banks"),
        ({"images": IMAGES[0, 0]}, "images have shape"),
        ({"images": POOL[:4]}, "uint8"),
        ({"genotypes": [[0, 0, 0, 0, 0, 1]]}, "edge 0>3"),
        ({"genotypes": [[0, 0, 0, 9, 0, 0]]}, "codes must be"),
        ({"genotypes": [[0, 0, 0, 257, 0, 0]]}, "codes must be"),
        ({"genotypes": [[0, 0, 0, 1.5, 0, 0]]}, "dtype"),
        ({"genotypes": [0, 0, 0, 1, 0, 0]}, "genotypes have shape"),
        ({"genotypes": np.zeros((0, 6), np.int8)}, "n >= 1"),
        ({"genotypes": [[0, 0, 0, 1]]}, "shape"),
        ({"genotypes": [GOOD_ROW * 3]}, "shape"),
    ],
)
def test_refuses_bad_input(change, words, bank):
    arguments = {"genotypes": GOOD_ROW, "bank": bank, "images": IMAGES, "spec": SPEC} | change
    with pytest.raises(ValueError, match=words) as error:
        score_population(**arguments)
    assert "\n" not in str(error.value)


def test_a_bank_has_at_least_one_seed():
    with pytest.raises(ValueError, match="seeds=0 must be a whole number of at least 1"):
        make_bank(KEY, SPEC, 0)


@pytest.fixture(scope="module")
def scores_on_devices(with_devices, tmp_path_factory) -> dict[int, np.ndarray]:
    """The second bank's, by number of devices, from a process of its own: a CPU shows as many as jax starts with."""
    out = tmp_path_factory.mktemp("devices") / "scores.npz"
    code = f"""
import numpy as np, jax, test_scorer as t
from spikernel_jax.scoring.scorer import Scorer
rows, bank, found = t.eight_cells(), t.make_bank(t.KEY, t.SPEC, 2), {{}}
for count in (1, 2, None):
    devices = jax.local_devices()[:count] if count else None  # all that there are
    scorer = Scorer(bank, t.IMAGES, t.SPEC, chunk=1, devices=devices)
    lanes = scorer.lanes
    parts = [[rows[j : j + 1] for j in range(i, i + lanes)] for i in range(0, t.CHUNK, lanes)]
    found[str(lanes)] = [part["scores"][0] for part in parts for part in scorer.submit(1, part)()]
np.savez({str(out)!r}, **found)
"""
    environment = with_devices(CHUNK) | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    return {int(count): values for count, values in np.load(out).items()}


@pytest.mark.slow
def test_devices_do_not_change_the_scores(scores, scores_on_devices):
    assert scores_on_devices.keys() == {1, 2, CHUNK}
    for count, values in scores_on_devices.items():
        np.testing.assert_array_equal(values, scores.replicates[:, 1], err_msg=f"{count} devices")


@pytest.mark.parametrize("when", ["at once", "while it runs"])
def test_out_of_memory_goes_on_without_tables_and_says_so(when, rows, bank, scores, monkeypatch):
    programs = scorers._programs(scorers.Mesh(np.array(jax.local_devices()[:1]), ("lanes",)))
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8589934592 bytes.")

    class Late:
        def __array__(self, *_: Any, **__: Any) -> Any:
            raise full

    def exhausted(*_: Any) -> Any:
        if when == "at once":
            raise full
        return Late(), Late()

    monkeypatch.setattr(scorers, "_programs", lambda mesh: programs._replace(score_groups=exhausted))
    said = []
    scorer = scorers.Scorer(bank, IMAGES, SPEC, chunk=CHUNK, devices=jax.local_devices()[:1], say=said.append)
    got = scorer.submit(0, [rows])()[0]["scores"]
    np.testing.assert_allclose(got, scores.replicates[:, 0], rtol=1e-4, atol=1e-4)
    assert scorer.method == "each"
    assert len(said) == 1
    assert "out of memory with tables of shared work" in said[0]


def test_out_of_memory_without_tables_goes_on_step_by_step_and_then_gives_up(rows, bank, scores, monkeypatch):
    devices = jax.local_devices()[:1]
    programs = scorers._programs(scorers.Mesh(np.array(devices), ("lanes",)))
    enough = SPEC.time_steps  # memory for fewer time steps together than this

    def exhausted(plan: Any, *args: Any) -> Any:
        if plan.steps >= enough:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8589934592 bytes.")
        return programs.score_each(plan, *args)

    monkeypatch.setattr(scorers, "_programs", lambda mesh: programs._replace(score_each=exhausted))
    said = []
    scorer = scorers.Scorer(
        bank, IMAGES, SPEC, chunk=CHUNK, devices=devices, method="each", steps=SPEC.time_steps, say=said.append
    )
    got = scorer.submit(0, [rows])()[0]["scores"]
    np.testing.assert_allclose(got, scores.replicates[:, 0], rtol=1e-4, atol=1e-4)
    assert said == ["out of memory with all 2 time steps together: going on step by step"]
    enough = 1
    with pytest.raises(ValueError, match="out of memory with one candidate at a time: C=2, B=4, T=2"):
        scorer.submit(0, [rows])()


def test_other_errors_of_the_device_are_not_taken_for_a_lack_of_memory(rows, bank, monkeypatch):
    def broken(*_: Any) -> Any:
        raise jax.errors.JaxRuntimeError("INTERNAL: cable unplugged")

    programs = scorers._programs(scorers.Mesh(np.array(jax.local_devices()[:1]), ("lanes",)))
    monkeypatch.setattr(scorers, "_programs", lambda mesh: programs._replace(score_groups=broken))
    scorer = scorers.Scorer(bank, IMAGES, SPEC, chunk=CHUNK, devices=jax.local_devices()[:1])
    with pytest.raises(jax.errors.JaxRuntimeError, match="cable unplugged"):
        scorer.submit(0, [rows])


@pytest.mark.parametrize(
    ("free", "one_memory", "lanes"),
    [
        (1999, True, 0),
        (2000, True, 1),
        (3999, True, 1),
        (4000, True, 2),
        (10**6, True, 8),
        (1999, False, 0),
        (2000, False, 8),
    ],
)
def test_as_many_lanes_as_half_the_free_memory_holds(free, one_memory, lanes):
    assert room.lanes_that_fit(8, 1000, free, one_memory) == lanes


def test_without_room_for_tables_candidates_run_each_by_itself(bank, monkeypatch):
    tables = room.table_bytes(SPEC, IMAGES.shape[1])
    assert tables == 3 * SPACE.num_ops * SPEC.time_steps * 4 * 8 * 8 * 2 * 4  # three edges of T·B·H·W·C float32
    monkeypatch.setattr(scorers, "free_bytes", lambda device: 2 * tables - 1)
    assert scorers.Scorer(bank, IMAGES, SPEC).method == "each"
    monkeypatch.setattr(scorers, "free_bytes", lambda device: 2 * tables)
    assert scorers.Scorer(bank, IMAGES, SPEC).method == "shared"
