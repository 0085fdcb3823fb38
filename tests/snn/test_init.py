"""How a network begins: by layer, whatever else is there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from network_cases import CASES, bank, images
from spikernel_jax.cells.space import CellSpace
from spikernel_jax.snn import network
from spikernel_jax.snn.spec import NetworkSpec


@pytest.mark.parametrize("name", ["two_cells", "looped_more"])
def test_init_is_a_subnetwork_of_the_bank(name):
    spec, row = CASES[name]
    key = jax.random.key(7)
    params, stats = network.init(key, spec, row)
    bank_params, bank_stats = network.init(key, spec)
    assert params.keys() == spec.layers(row).keys()
    jax.tree.map(np.testing.assert_array_equal, params, network.subnetwork(spec, bank_params, row))
    jax.tree.map(np.testing.assert_array_equal, stats, network.subnetwork(spec, bank_stats, row))
    rows = row if isinstance(row[0], list) else [row, row]
    own = {
        f"cell{i}.e{s}{t}.{spec.space.operations[code]}"
        for i, r in enumerate(rows, 1)
        for (s, t), code in zip(spec.space.edges, r, strict=True)
        if "conv" in spec.space.operations[code]
    }
    assert {layer for layer in params if layer.startswith("cell")} == own
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((params, stats)))
    assert network.parameter_count(params) == sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("name", ["learning", "learning_over_time", "spiking_looped"])
def test_what_neurons_learn_comes_on_top(name):
    """By site, for sites that are there; nothing else is drawn otherwise than for fixed neurons."""
    spec, row = CASES[name]
    key, fixed_neuron = jax.random.key(7), dataclasses.replace(spec.neuron, learn_tau=False, learn_threshold=False)
    params, stats = network.init(key, spec, row)
    plain, plain_stats = network.init(key, dataclasses.replace(spec, neuron=fixed_neuron), row)
    reading = [  # operations that read spikes
        code for code, op in enumerate(spec.space.operations)
        if op.startswith("conv") or (spec.shortcut == "spike" and op != "zero")
    ]  # fmt: skip
    nodes = {source for (source, _), code in zip(spec.space.edges, row, strict=True) if code in reading}
    sites = {f"cell{i}.node{node}" for i in (1, 2) for node in nodes} | {"transition", "last"}
    sites |= {"head"} if spec.head == "snasnet" else set()
    own = {site: {name: entry for name, entry in params[site].items() if name in spec.neuron.learned} for site in sites}
    for entry in own.values():
        assert entry.keys() == spec.neuron.learned.keys()
        assert all(leaf.shape == () and leaf.dtype == jnp.float32 for leaf in entry.values())
        if spec.neuron.learn_tau:
            np.testing.assert_allclose(1 / jax.nn.sigmoid(entry["leak_logit"]), spec.neuron.tau, rtol=1e-6)
        assert entry.get("threshold_raw", 0) == 0
    rest = {
        layer: {name: leaf for name, leaf in entry.items() if name not in spec.neuron.learned}
        for layer, entry in params.items()
    }
    jax.tree.map(np.testing.assert_array_equal, {layer: entry for layer, entry in rest.items() if entry}, plain)
    jax.tree.map(np.testing.assert_array_equal, stats, plain_stats)
    assert {layer for layer, entry in params.items() if entry.keys() & spec.neuron.learned.keys()} == sites

    bank_params, _ = network.init(key, spec)
    jax.tree.map(np.testing.assert_array_equal, params, network.subnetwork(spec, bank_params, row))
    last = 4 if spec.space.feedback else 3  # no edge leaves node 3 of a forward cell
    every = {f"cell{i}.node{node}" for i in (1, 2) for node in range(last)}
    assert {site for site in bank_params if ".node" in site} == every


@pytest.mark.parametrize("name", ["learning", "spiking_looped"])
def test_every_learned_scalar_has_a_gradient(name):
    spec, row = CASES[name]
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), bank(spec)[0])
    x = jnp.asarray(images(spec), jnp.float32)

    def loss(params):
        logits_BK = network.apply(spec, row, params, x, train=True).logits_BK
        return (logits_BK * jnp.arange(spec.num_classes)).sum()

    grads = jax.jit(jax.grad(loss))(params)
    for site in spec.sites(row):
        for scalar in spec.neuron.learned:
            assert np.isfinite(grads[site][scalar])
            assert grads[site][scalar] != 0, (site, scalar)


def test_init_draws_as_the_public_code():
    spec = NetworkSpec((8, 8, 3), 10, CellSpace((3,)), channels=16, head="snasnet", head_hidden=64)
    params, stats = network.init(jax.random.key(0), spec)
    kernels = [entry["kernel"] for entry in params.values() if entry.get("kernel") is not None]
    for kernel in (k for k in kernels if k.ndim == 4):
        bound = np.sqrt(6 / (5 * np.prod(kernel.shape[:3])))
        assert 0.9 * bound < np.abs(kernel).max() <= bound
    assert abs(float(params["head.hidden"]["kernel"].std()) - 0.01) < 5e-4
    assert not params["head.out"]["bias"].any()
    for name, entry in stats.items():
        assert not entry["mean"].any()
        assert (entry["var"] == 1).all()
        assert (params[name]["scale"] == 1).all()
        assert not params[name]["bias"].any()
    shapes = [k.shape for k in kernels]
    for i, one in enumerate(kernels):  # no two layers share their draw
        assert not any(
            shape == one.shape and bool((kernels[j] == one).all()) for j, shape in enumerate(shapes) if j > i
        )
