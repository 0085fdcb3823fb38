"""Candidates side by side: the same scores as one after another, and no operation for whom it is not."""

import collections
import functools
import os
import re
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
from scipy import stats

from spikernel_jax import Operation, make_bank, register_operation, score_population
from spikernel_jax.cells.space import CellSpace
from spikernel_jax.operations.convolution import conv
from spikernel_jax.operations.operation import Layer
from spikernel_jax.scoring import choice, room
from spikernel_jax.scoring import scorer as scorers
from spikernel_jax.scoring.batched import tile_scores
from spikernel_jax.scoring.engine import Program
from spikernel_jax.snn.cost import pairs
from spikernel_jax.snn.spec import NetworkSpec

KEY = jax.random.key(5)
RNG = np.random.default_rng(2)
WIDTH = 3
CALLS: collections.Counter[int] = collections.Counter()  # by width: 3 in cell 1, 6 in cell 2


def _counted(edge: Any, x_TBHWC: jax.Array) -> jax.Array:
    noted = functools.partial(lambda width, _: CALLS.update([width]), x_TBHWC.shape[-1])
    jax.debug.callback(noted, x_TBHWC[0, 0, 0, 0])  # once a candidate, under vmap too
    return edge.norm(conv(x_TBHWC, edge.weights()))


register_operation(Operation("counted", "generic", _counted, lambda c: {"": Layer((1, 1, c, c), c)}, reads_spikes=True))
_NAMES = "zero skip conv1 conv3@0.5 conv3~2.0 conv1x3 conv3d2 dwconv3 maxpool3 avgpool counted"
ALL = CellSpace(operations=tuple(_NAMES.split()))
SPEC = NetworkSpec((6, 6, 1), 3, ALL, channels=WIDTH, time_steps=2)
IMAGES = RNG.normal(size=(2, 4, 6, 6, 1)).astype(np.float32)


@pytest.fixture(scope="module")
def bank() -> Any:
    return make_bank(KEY, SPEC, 2)


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return ALL.sample(KEY, 24)


@pytest.fixture(scope="module")
def each(rows, bank) -> Any:
    return score_population(rows, bank, IMAGES, SPEC, method="each")


def assert_alike(found: Any, each: Any) -> None:
    finite = np.isfinite(each.replicates)
    np.testing.assert_array_equal(np.isfinite(found.replicates), finite)
    assert finite.mean() > 0.5
    np.testing.assert_allclose(found.replicates[finite], each.replicates[finite], rtol=1e-5)
    np.testing.assert_array_equal(found.lif_calls, each.lif_calls)


@pytest.mark.parametrize("tile", [pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(32, marks=pytest.mark.slow)])
def test_every_operation_scores_as_alone_in_tiles_of_any_size(tile, rows, bank, each):
    held = {int(code) for code in rows.ravel()}
    assert held == set(range(ALL.num_ops))
    assert_alike(score_population(rows, bank, IMAGES, SPEC, method="batched", chunk=32, tile=tile), each)


@pytest.mark.slow
@pytest.mark.parametrize(("rates", "taken"), [((1.0, 2.0), "batched"), ((2.0, 1.0), "shared")])
def test_a_population_goes_the_way_that_was_the_quicker(rates, taken, rows, bank, each, monkeypatch):
    monkeypatch.setattr(choice, "is_timed", lambda devices: True)
    monkeypatch.setattr(choice, "LEAST_CALLS", 1)
    monkeypatch.setattr(choice, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(choice, "_rate", lambda scorer, *_: rates[scorer.method == "batched"])
    went = []
    submit = scorers.Scorer.submit
    monkeypatch.setattr(scorers.Scorer, "submit", lambda self, *args: went.append(self.method) or submit(self, *args))
    assert_alike(score_population(rows, bank, IMAGES, SPEC, chunk=32), each)
    assert set(went) == {taken}
    went.clear()
    assert_alike(score_population(rows, bank, IMAGES, SPEC, chunk=32, method="each"), each)  # what is asked for, wins
    assert set(went) == {"each"}


@pytest.mark.slow
def test_nothing_is_computed_for_a_candidate_that_does_not_hold_it(rows, bank):
    code = ALL.operations.index("counted")
    CALLS.clear()
    score_population(rows, bank, IMAGES, SPEC, method="batched", chunk=32, tile=16)
    jax.effects_barrier()
    assert CALLS[2 * WIDTH] == 2 * (rows == code).sum()  # in cell 2, of two replicates
    assert 0 < CALLS[WIDTH] <= 2 * (rows == code).sum()  # in cell 1, candidates share


@pytest.mark.slow
def test_a_whole_space_is_ranked_alike():
    space = CellSpace((3,))
    spec = NetworkSpec((6, 6, 1), 3, space, channels=2, time_steps=2)
    bank, cells = make_bank(KEY, spec, 1), space.enumerate()
    each = score_population(cells, bank, IMAGES[:1], spec, method="each")
    found = score_population(cells, bank, IMAGES[:1], spec, method="batched")
    assert_alike(found, each)
    finite = np.isfinite(each.scores)
    tau: Any = stats.kendalltau(found.scores[finite], each.scores[finite])
    assert tau.statistic > 0.9995


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", [{}, {"head": "snasnet", "head_hidden": 8, "neurons_per_class": 2}, {"norm": "over_time"}]
)
def test_pairs_of_cells_heads_and_norms(change):
    space = CellSpace((3,))
    spec = NetworkSpec((6, 6, 1), 3, space, channels=2, time_steps=2, **change)
    bank = make_bank(KEY, spec, 1)
    cells = space.enumerate()[RNG.choice(185, 12, replace=False)]
    rows = np.stack([cells, cells[::-1]], 1)
    each = score_population(rows, bank, IMAGES[:1], spec, method="each", steps=2)
    assert_alike(score_population(rows, bank, IMAGES[:1], spec, method="batched", chunk=16, tile=8), each)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_a_cpu_factorises_one_matrix_at_a_time(platform):
    """jaxlib's CPU kernels share a batch between the threads that wait for it: with two devices for ever."""
    program = Program(SPEC, "sahd_code", 2, bfloat16=False, tile=8)
    rows = jax.ShapeDtypeStruct((8, 2, 6), np.int8)
    records = {site: jax.ShapeDtypeStruct((2, 8, 4, 4), np.float32) for site in SPEC.sites()}
    traced = jax.jit(tile_scores, static_argnums=0).trace(program, rows, records)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    found = re.findall(r"@\w*getrf\w*\(.*?: \(tensor<(\S*?)xf32>", text)
    assert found == [{"cpu": "4x4", "cuda": "8x4x4"}[platform]]


@pytest.mark.slow
def test_feedback_cells_go_through_time_as_a_batch():
    spec = NetworkSpec((6, 6, 1), 3, CellSpace((3,), feedback=True), channels=2, time_steps=3)
    bank, rows = make_bank(KEY, spec, 1), spec.space.sample(KEY, 12)
    assert rows[:, 6:].any()
    each = score_population(rows, bank, IMAGES[:1], spec, method="each")
    for tile in (1, 4, 16):
        assert_alike(score_population(rows, bank, IMAGES[:1], spec, method="batched", chunk=16, tile=tile), each)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "batched", "chunk": 8, "tile": 3}, "tile=3 must divide chunk=8"),
        ({"method": "batched", "chunk": 8, "tile": 0}, "tile=0 must divide chunk=8"),
        ({"method": "batched", "steps": 1}, "steps=1: a batch of candidates goes through all 2 together"),
        ({"method": "each", "tile": 4}, "tile=4: candidates go one after another; give method='batched'"),
    ],
)
def test_refuses_tiles_that_are_none(change, words, rows, bank):
    with pytest.raises(ValueError, match=words):
        score_population(rows, bank, IMAGES, SPEC, **change)


def test_a_tile_is_what_the_memory_holds():
    one = 9 * 2 * 4 * 6 * 6 * WIDTH * 4  # nine arrays of T·B·H·W·C float32
    assert room.tile_that_fits(SPEC, 4, 0, 32) == 1
    assert room.tile_that_fits(SPEC, 4, int(one * 5 / 0.4) + 1, 32) == 4  # 5 would not divide 32
    assert room.tile_that_fits(SPEC, 4, one * 10**4, 32) == 32


@pytest.mark.slow
def test_out_of_memory_halves_the_tile_and_says_so(rows, bank, each, monkeypatch):
    devices = jax.local_devices()[:1]
    programs = scorers._programs(scorers.Mesh(np.array(devices), ("lanes",)))

    def exhausted(plan: Any, *args: Any) -> Any:
        if plan.tile > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8589934592 bytes.")
        return programs.tile_groups(plan, *args)

    monkeypatch.setattr(scorers, "_programs", lambda mesh: programs._replace(tile_groups=exhausted))
    said: list[str] = []
    scorer = scorers.Scorer(bank, IMAGES, SPEC, chunk=24, method="batched", tile=8, devices=devices, say=said.append)
    order = scorer.order(rows)
    got = scorer.submit(0, [rows[order]])()[0]["scores"]
    np.testing.assert_allclose(got, each.replicates[order, 0], rtol=1e-5)
    assert [line.rpartition(": ")[2] for line in said] == ["going on with 4", "going on with 2"]
    assert said[0].startswith("out of memory with 8 candidates side by side")
    assert scorer.method == "batched"


@pytest.mark.slow
def test_devices_do_not_change_the_scores(with_devices, tmp_path):
    """On 1, 2 and 8 devices, in a process of its own: a CPU shows as many as jax starts with."""
    out = tmp_path / "scores.npz"
    code = f"""
import numpy as np, jax, test_batched as t
from spikernel_jax import CellSpace, NetworkSpec, make_bank, score_population
spec = NetworkSpec((6, 6, 1), 3, CellSpace((3,)), channels=2, time_steps=2)
bank, rows = make_bank(t.KEY, spec, 1), spec.space.enumerate()[::6]
np.savez({str(out)!r}, **{{str(count): score_population(rows, bank, t.IMAGES[:1], spec, method="batched", chunk=4,
    devices=jax.local_devices()[:count]).replicates for count in (1, 2, 8)}})
"""
    environment = with_devices(8) | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    found = np.load(out)
    for count in "28":
        np.testing.assert_array_equal(found[count], found["1"])
    assert len(pairs(CellSpace((3,)).enumerate()[::6])) == len(found["1"])
