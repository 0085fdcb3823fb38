"""One contract for every operation that is registered, and for members of every family."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quick_cases import mostly_slow
from spikernel_jax import check_operation, make_bank, score_population
from spikernel_jax.cells.space import CellSpace
from spikernel_jax.operations.operation import Operation, get_operation, registered
from spikernel_jax.scoring import scores
from spikernel_jax.snn import cost, network
from spikernel_jax.snn.neurons import NeuronSpec
from spikernel_jax.snn.spec import NetworkSpec, spec_from_json, spec_to_json

MEMBERS = ("conv1", "conv3@0.5~2.0", "conv3d2", "conv1x5", "dwconv5@0.5", "avgpool", "avgpool5", "maxpool3")
NAMES = [name for name in (*registered(), *MEMBERS) if name != "zero"]
every = pytest.mark.parametrize("name", NAMES)
# Where each compiles programs of its own.
most = pytest.mark.parametrize("name", mostly_slow(NAMES, ("skip", "conv1x5", "dwconv5@0.5", "maxpool3").__contains__))
H, W, C, T, B = 7, 6, 2, 3, 3
KEY = jax.random.key(0)


def spec_with(name: str, **fields: Any) -> NetworkSpec:
    """A network whose cells hold the operation beside others that read and hand on in their own ways."""
    others = [other for other in ("skip", "conv3", "avgpool") if other != name]
    space = CellSpace(operations=("zero", name, *others), **fields)
    return NetworkSpec((H, W, 2), 3, space, channels=C, time_steps=T)


def row_with(spec: NetworkSpec) -> tuple[int, ...]:
    """The operation on edges of nodes 0, 1 and 2, and plain convolutions that read the same nodes."""
    own = spec.space.operations[1]
    text = f"0>1:{own} 0>2:conv3 0>3:{own} 1>2:{own} 1>3:conv3 2>3:{own}"
    return tuple(spec.space.parse(text).tolist())


@functools.cache
def drawn(name: str) -> tuple[NetworkSpec, tuple[int, ...], Any, Any]:
    spec = spec_with(name)
    return spec, row_with(spec), *network.init(KEY, spec)


def images(batch: int = B) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(batch, H, W, 2)).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("spec", "row", "step_by_step"))
def run_fixed(spec, row, params, x, step_by_step=None):
    return network.apply(spec, row, params, x, train=True, step_by_step=step_by_step, observe=lambda s: s)


@functools.partial(jax.jit, static_argnames="spec")
def run_traced(spec, row, params, x):
    return network.apply(spec, row, params, x, train=True, observe=lambda s: s)


@every
def test_is_what_it_says(name):
    check_operation(get_operation(name))


@every
def test_name_parses_back(name):
    operation = get_operation(name)
    assert operation.name == name
    assert get_operation(name) is operation
    spec = spec_with(name)
    row = np.array(row_with(spec))
    assert np.array_equal(spec.space.parse(spec.space.format(row)), row)
    assert spec_from_json(spec_to_json(spec)) == spec


@most
def test_fixed_equals_traced_to_the_bit(name):
    spec, row, params, _ = drawn(name)
    own = network.subnetwork(spec, params, row)
    fixed, traced = run_fixed(spec, row, own, images()), run_traced(spec, jnp.asarray(row), params, images())
    for site, spikes in fixed.records.items():
        np.testing.assert_array_equal(traced.records[site], spikes, err_msg=site)
    np.testing.assert_array_equal(traced.logits_TBK, fixed.logits_TBK)


@most
def test_all_time_steps_at_once_equal_one_after_another(name):
    spec, row, params, _ = drawn(name)
    own = network.subnetwork(spec, params, row)
    whole, stepped = (run_fixed(spec, row, own, images(), step_by_step) for step_by_step in (False, True))
    for site, spikes in whole.records.items():
        assert np.mean(np.asarray(stepped.records[site]) != np.asarray(spikes)) < 0.01, site  # but for rounding
    np.testing.assert_allclose(stepped.logits_TBK.mean(), whole.logits_TBK.mean(), atol=0.05)


@every
def test_declared_parameters_are_the_real_ones(name):
    spec = dataclasses.replace(spec_with(name), neuron=NeuronSpec(learn_tau=True))
    row = row_with(spec)
    params, stats = jax.eval_shape(lambda key: network.init(key, spec, row), KEY)
    assert int(cost.costs(spec, [row]).parameters[0]) == network.parameter_count(params)
    assert {layer for layer, entry in params.items() if "scale" in entry} == stats.keys()
    bank = jax.eval_shape(lambda key: network.init(key, spec)[0], KEY)
    assert network.subnetwork(spec, bank, row) == params


def walked(operation: Operation, place: tuple[int, int], size: tuple[int, int]) -> int:
    """Connections that one spike at a place of one channel drives, by walking the taps of the first layer."""
    layers = list(operation.layers(C).values())
    if not layers:
        return 0
    first = layers[0]
    high, wide = (range(-(k // 2), k // 2 + 1) for k in first.shape[:2])
    inside = [(place[0] + i * first.dilation, place[1] + j * first.dilation) for i, j in itertools.product(high, wide)]
    reached = sum(0 <= y < size[0] and 0 <= x < size[1] for y, x in inside)
    return reached * (C if first.groups == 1 else 1)


@most
def test_synaptic_operations_are_a_walk_over_every_spike(name):
    spec, row, params, _ = drawn(name)
    operation = get_operation(name)
    out = run_fixed(spec, row, network.subnetwork(spec, params, row), images(1))
    spikes = {site: np.asarray(s)[:, 0] for site, s in out.records.items()}
    fans = cost.fan_out(spec, row)
    assert set(fans) == set(spikes)
    if not operation.reads_spikes:
        return
    lone = tuple(spec.space.parse(f"0>3:{name}").tolist())
    (site,) = [site for site in spec.sites(lone) if site.startswith("cell1")]
    total = sum(walked(operation, (y, x), (H, W)) for _, y, x, _ in np.argwhere(spikes[site]))
    counts = {site: spikes[site].sum((0, 3))}
    assert cost.synaptic_operations(spec, lone, counts) == total
    assert spikes[site].any()


@every
def test_gradients_are_differences_in_float64(name):
    operation = get_operation(name)
    rng = np.random.default_rng(2)
    weights = {part: rng.normal(size=layer.shape) for part, layer in operation.layers(C).items() if layer.shape}
    x = rng.normal(size=(T, B, H, W, C)) if not operation.reads_spikes else (rng.random((T, B, H, W, C)) < 0.5) * 1.0
    x = x + 0.01 * rng.normal(size=x.shape)  # no two values are equal, so that a maximum has one place

    class Plain:
        def __init__(self, weights):
            self.all = weights

        def weights(self, part=""):
            return self.all[part]

        def norm(self, y_TBHWC, part=""):
            return y_TBHWC * 1.3

    def loss(weights, x):
        return jnp.sin(operation.apply(Plain(weights), x)).sum()

    with jax.enable_x64(True):
        arguments = jax.tree.map(jnp.asarray, (weights, x))
        gradients = jax.jit(jax.grad(loss, (0, 1)))(*arguments)
        moves = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), arguments)
        step = 1e-6
        ahead, behind = (
            loss(*jax.tree.map(lambda leaf, move, s=sign: leaf + s * step * move, arguments, moves)) for sign in (1, -1)
        )
        along = sum(float((g * m).sum()) for g, m in zip(*map(jax.tree.leaves, (gradients, moves)), strict=True))
        difference = float(ahead - behind) / (2 * step)
    assert np.isfinite(along)
    np.testing.assert_allclose(along, difference, rtol=1e-6)


@pytest.fixture(scope="module")
def scored() -> tuple[NetworkSpec, Any, np.ndarray, Any, Any]:
    """Network and bank of all operations, rows, and their scores with shared work and without: two programs for all."""
    names = ("zero", *dict.fromkeys([*NAMES, "conv3"]))
    spec = dataclasses.replace(spec_with("skip"), space=CellSpace(operations=names))
    rows = []
    for name in NAMES:
        own = spec_with(name)
        some = np.unique(own.space.canonical(np.array([row_with(own), *own.space.sample(KEY, 5)])), axis=0)
        rows += [spec.space.parse(own.space.format(row)) for row in some] + [spec.space.parse(f"0>3:{name}")]
    bank = make_bank(KEY, spec, 1)
    shared, each = (
        score_population(np.array(rows), bank, images(4), spec, chunk=8, method=way) for way in ("shared", "each")
    )
    return spec, bank, np.array(rows), shared, each


@pytest.mark.slow
@every
def test_shared_work_gives_the_same_scores(name, scored):
    spec, bank, rows, shared, each = scored
    own = (rows == spec.space.operations.index(name)).any(1)
    assert own.sum() >= 2
    np.testing.assert_allclose(shared.scores[own], each.scores[own], rtol=1e-4)
    assert (shared.lif_calls[own] == each.lif_calls[own]).all()
    first = int(own.argmax())
    row, weights = tuple(rows[first].tolist()), jax.tree.map(lambda leaf: leaf[0], bank)
    alone = jax.jit(lambda weights, x: scores.spike_terms(spec, row, weights, x)[0])(weights, images(4))
    assert shared.lif_calls[first] == int(alone.calls)
    np.testing.assert_allclose(shared.scores[first], scores.sahd_paper(alone), rtol=1e-4)


@most
def test_runs_with_feedback_and_over_time(name):
    looped = spec_with(name, feedback=True)
    row = looped.space.parse(f"0>1:{name} 0>3:conv3 2>1:{name} 2>3:{name} 0>2:skip" if name != "skip" else "0>3:skip")
    params, _ = network.init(KEY, looped, row)
    assert np.isfinite(run_fixed(looped, tuple(row.tolist()), params, images()).logits_BK).all()
    timed = dataclasses.replace(spec_with(name), norm="over_time")
    params, _ = network.init(KEY, timed, row_with(timed))
    assert np.isfinite(run_fixed(timed, row_with(timed), params, images()).logits_BK).all()
