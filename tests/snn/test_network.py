"""The network against a plain NumPy float64 one, and fixed against traced genotypes.

The oracle follows method's formulas: loops for convolutions, one LIF for every convolution edge, the
feedback recurrence spelt out. Its only shared ground with the package is the parameters' names.
"""

import collections
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spikernel_jax.cells.space import CellSpace
from spikernel_jax.operations import convolution, pooling
from spikernel_jax.snn import layers, network
from spikernel_jax.snn.neurons import NeuronSpec
from spikernel_jax.snn.spec import NetworkSpec, spec_from_json, spec_to_json

FORWARD = NetworkSpec(
    (8, 6, 2), 3, channels=2, time_steps=3, head="snasnet", head_hidden=5, neurons_per_class=2, dropout=0.5
)
OVER_TIME = NetworkSpec(
    (6, 6, 1),
    3,
    channels=2,
    time_steps=3,
    norm="over_time",
    neuron=NeuronSpec(tau=2.0, v_threshold=0.8, v_reset=-0.1),
)
STRIDED = NetworkSpec(
    (9, 8, 2), 2, CellSpace((3, 5)), channels=2, time_steps=2, stem_stride=2, neuron=NeuronSpec(reset="soft")
)
LOOPED = NetworkSpec((6, 6, 2), 3, CellSpace((1, 3), feedback=True), channels=2, time_steps=4)
LEARNING = dataclasses.replace(FORWARD, neuron=NeuronSpec(tau=2.0, learn_tau=True, learn_threshold=True))
LEARNING_OVER_TIME = dataclasses.replace(
    OVER_TIME, neuron=NeuronSpec(v_threshold=0.8, v_reset=0.1, reset="soft", learn_threshold=True)
)
# Averages of nine spikes are never at this neuron's threshold, where rounding would decide.
SPIKING = dataclasses.replace(FORWARD, shortcut="spike", dropout=0.0, neuron=NeuronSpec(tau=1.37, v_threshold=0.83))
SPIKING_LOOPED = dataclasses.replace(LOOPED, shortcut="spike", neuron=NeuronSpec(learn_tau=True))
CASES = {
    "mixed": (FORWARD, [2, 4, 3, 1, 3, 2]),
    "two_cells": (FORWARD, [[3, 0, 2, 4, 1, 3], [0, 2, 0, 3, 0, 1]]),
    "over_time": (OVER_TIME, [3, 1, 0, 2, 4, 3]),
    "strided": (STRIDED, [3, 2, 1, 1, 4, 2]),
    "looped": (LOOPED, LOOPED.space.parse("0303 0030 2002 0200").tolist()),
    "looped_more": (LOOPED, LOOPED.space.parse("0402 0000 1302 0200").tolist()),
    "looped_two": (
        LOOPED,
        [LOOPED.space.parse(t).tolist() for t in ("0002 4030 2003 0100", "0304 0032 0002 0000")],
    ),
    "learning": (LEARNING, [2, 4, 3, 1, 3, 2]),
    "learning_over_time": (LEARNING_OVER_TIME, [3, 1, 0, 2, 4, 3]),
    "spiking": (SPIKING, [[3, 1, 4, 1, 2, 4], [1, 1, 1, 4, 1, 1]]),
    "spiking_looped": (SPIKING_LOOPED, LOOPED.space.parse("0142 0010 0002 0100").tolist()),
}
B = 3


@functools.cache
def bank(spec):
    """Parameters and statistics of every operation, away from their start, float64."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        layer, name = path[0].key, path[1].key
        if name in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape)
        if name in ("bias", "mean"):
            return rng.normal(0.2, 0.3, leaf.shape)
        if name in spec.neuron.learned:
            return rng.normal(0, 0.4, leaf.shape)
        size = 0.6 if layer.startswith("head.") else np.sqrt(0.4 / np.prod(leaf.shape[:-1]))
        return rng.normal(0, size, leaf.shape)

    shapes = jax.eval_shape(lambda key: network.init(key, spec), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes[0]), jax.tree_util.tree_map_with_path(draw, shapes[1])


def images(spec):
    return np.random.default_rng(1).normal(size=(B, *spec.image_shape))


def keep(spec):
    return np.random.default_rng(2).random((B, spec.features)) < 0.5 if spec.dropout else None


def frozen(row):
    return tuple(tuple(r) for r in row) if isinstance(row[0], list) else tuple(row)


@functools.partial(jax.jit, static_argnames=("spec", "row", "train", "step_by_step"))
def run_fixed(spec, row, params, stats, x, mask, *, train=True, step_by_step=None):
    return network.apply(
        spec,
        row,
        params,
        x,
        stats=stats,
        train=train,
        dropout_keep=mask,
        step_by_step=step_by_step,
        observe=lambda s: s,
    )


@functools.partial(jax.jit, static_argnames="spec")
def run_traced(spec, row, params, x, mask):
    return network.apply(spec, row, params, x, train=True, dropout_keep=mask, observe=lambda s: s)


def fixed(spec, row, **options):
    row = frozen(row)
    params, stats = bank(spec)
    params, stats = network.subnetwork(spec, params, row), network.subnetwork(spec, stats, row)
    with jax.enable_x64(True):
        return jax.device_get(run_fixed(spec, row, params, stats, images(spec), keep(spec), **options))


def traced(spec, row, params=None):
    with jax.enable_x64(True):
        params = bank(spec)[0] if params is None else params
        return jax.device_get(run_traced(spec, jnp.asarray(row), params, images(spec), keep(spec)))


def conv_oracle(x, kernel, stride=1):
    """[..., H, W, C], padded with (k-1)/2 zeros on every side, one output pixel at a time."""
    k, pad = kernel.shape[0], kernel.shape[0] // 2
    h, w = x.shape[-3:-1]
    padded = np.zeros((*x.shape[:-3], h + 2 * pad, w + 2 * pad, x.shape[-1]))
    padded[..., pad : pad + h, pad : pad + w, :] = x
    out = np.zeros((*x.shape[:-3], (h - 1) // stride + 1, (w - 1) // stride + 1, kernel.shape[-1]))
    for i, j in np.ndindex(*out.shape[-3:-1]):
        window = padded[..., i * stride : i * stride + k, j * stride : j * stride + k, :]
        out[..., i, j, :] = np.tensordot(window, kernel, 3)
    return out


def avgpool_oracle(x):
    out = np.zeros_like(x)
    h, w = x.shape[-3:-1]
    for i, j in np.ndindex(h, w):
        window = x[..., max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2, :]
        out[..., i, j, :] = window.sum((-3, -2)) / 9
    return out


def downsample_oracle(x, p):
    h, w = x.shape[-3] // p, x.shape[-2] // p
    out = np.zeros((*x.shape[:-3], h, w, x.shape[-1]))
    for i, j in np.ndindex(h, w):
        out[..., i, j, :] = x[..., i * p : (i + 1) * p, j * p : (j + 1) * p, :].mean((-3, -2))
    return out


def site_of(name):
    """The LIF site that stands for an edge's LIF; others have its name."""
    return f"{name[:5]}.node{name[7]}" if ".e" in name else name


class Oracle:
    """One forward pass; spikes by LIF (each edge that reads spikes has its own), running statistics, logits."""

    def __init__(self, spec, row, train=True):
        params, stats = bank(spec)
        self.spec, self.params, self.train = spec, params, train
        self.running = {name: dict(entry) for name, entry in stats.items()}
        self.membrane, self.spikes = {}, collections.defaultdict(list)
        self.feedback = {"cell1": [np.zeros(())] * 3, "cell2": [np.zeros(())] * 3}
        rows = row if isinstance(row[0], list) else [row, row]
        self.ops = [dict(zip(spec.space.edges, r, strict=True)) for r in rows]
        x = conv_oracle(images(spec), params["stem"]["kernel"], spec.stem_stride)
        x0 = self.norm("stem", x[None], over_time=False)[0]
        steps, chunk = (spec.time_steps, 1) if spec.space.feedback else (1, spec.time_steps)
        self.logits = np.concatenate([self.chunk(np.stack([x0] * chunk)) for _ in range(steps)]).mean(0)

    def norm(self, name, x, over_time=None):
        over_time = self.spec.norm == "over_time" if over_time is None else over_time
        p, run, out = self.params[name], self.running[name], []
        for part in [x] if over_time else [step[None] for step in x]:
            gain = self.spec.neuron.v_threshold if over_time else 1.0
            mean, var = run["mean"], run["var"]
            if self.train:
                flat = part.reshape(-1, part.shape[-1])
                mean, var = flat.mean(0), flat.var(0)
                run["mean"] = 0.9 * run["mean"] + 0.1 * mean
                run["var"] = 0.9 * run["var"] + 0.1 * flat.var(0, ddof=1)
            out.append(gain * p["scale"] * (part - mean) / np.sqrt(var + 1e-5) + p["bias"])
        return np.concatenate(out)

    def fire(self, name, x):
        n, out = self.spec.neuron, []
        v = self.membrane.get(name, np.zeros(x.shape[1:]))
        tau, threshold = n.tau, n.v_threshold
        if n.learn_tau:
            tau = 1 + np.exp(-self.params[site_of(name)]["leak_logit"])
        if n.learn_threshold:
            floor = max(n.v_reset, 0)
            threshold = floor + (threshold - floor) * np.log2(1 + np.exp(self.params[site_of(name)]["threshold_raw"]))
        for current in x:
            v = v + (current - (v - n.v_reset)) / tau
            s = np.where(v - threshold >= 0, 1.0, 0.0)
            v = (1 - s) * v + s * n.v_reset if n.reset == "hard" else v - s * threshold
            out.append(s)
        self.membrane[name] = v
        self.spikes[name] += out
        return np.stack(out)

    def edge(self, index, source, target, x):
        cell = ("cell1", "cell2")[index]
        op = self.spec.space.operations[self.ops[index].get((source, target), 0)]
        if op == "zero":
            return np.zeros_like(x)
        name = f"{cell}.e{source}{target}.{op}"
        if op in ("skip", "avgpool"):
            x = self.fire(name, x) if self.spec.shortcut == "spike" else x
            return x if op == "skip" else avgpool_oracle(x)
        return self.norm(name, conv_oracle(self.fire(name, x), self.params[name]["kernel"]))

    def cell(self, index, x0):
        e = functools.partial(self.edge, index)
        f0, f1, f2 = self.feedback[("cell1", "cell2")[index]]
        y0 = x0 + f0
        y1 = e(0, 1, y0) + f1
        y2 = e(0, 2, y0) + e(1, 2, y1) + f2
        x3 = e(0, 3, y0) + e(1, 3, y1) + e(2, 3, y2)
        if self.spec.space.feedback:
            self.feedback[("cell1", "cell2")[index]] = [
                e(1, 0, y1) + e(2, 0, y2) + e(3, 0, x3),
                e(2, 1, y2) + e(3, 1, x3),
                e(3, 2, x3),
            ]
        return x3

    def chunk(self, x0):
        spec = self.spec
        x = self.fire("transition", self.norm("transition.in", self.cell(0, x0)))
        x = self.norm("transition.conv", conv_oracle(x, self.params["transition.conv"]["kernel"]))
        x = self.fire("last", self.norm("last", self.cell(1, downsample_oracle(x, 2))))
        out = self.params["head.out"]
        if spec.head == "gap":
            return x.mean((2, 3)) @ out["kernel"] + out["bias"]
        x = downsample_oracle(x, spec.head_pool)
        x = x.reshape(*x.shape[:2], -1)
        mask = keep(spec)
        x = x if mask is None or not self.train else x * mask * 2
        y = self.fire("head", x @ self.params["head.hidden"]["kernel"]) @ out["kernel"] + out["bias"]
        groups = np.split(y, spec.num_classes, axis=-1)
        return np.stack([group.mean(-1) for group in groups], -1)


def assert_oracle(oracle, out):
    np.testing.assert_allclose(out.logits_BK, oracle.logits, rtol=1e-9, atol=1e-11)
    seen = set()
    for name, spikes in oracle.spikes.items():
        site = site_of(name)
        seen.add(site)
        np.testing.assert_array_equal(out.records[site], np.stack(spikes), err_msg=name)
        np.testing.assert_allclose(out.state[site], oracle.membrane[name], rtol=1e-9, atol=1e-11)
    assert 0 < np.mean([np.mean(s) for s in oracle.spikes.values()]) < 1
    return seen


@pytest.mark.parametrize("name", CASES)
def test_equals_a_plain_network(name):
    spec, row = CASES[name]
    oracle, out = Oracle(spec, row), fixed(spec, row)
    assert assert_oracle(oracle, out) == set(out.records)
    for layer, expected in out.stats.items():
        for leaf, value in expected.items():
            np.testing.assert_allclose(value, oracle.running[layer][leaf], rtol=1e-9, atol=1e-12, err_msg=layer)
    if spec.space.feedback:
        for cell, expected in oracle.feedback.items():
            for ours, theirs in zip(out.state[f"{cell}.feedback"], expected, strict=True):
                np.testing.assert_allclose(ours, theirs[0], rtol=1e-9, atol=1e-11)


TRACED = ["mixed", "two_cells", "over_time", "looped", "looped_more", "looped_two"]


@pytest.mark.parametrize("name", [*TRACED, "learning", "spiking", "spiking_looped"])
def test_traced_genotypes_give_the_same(name):
    spec, row = CASES[name]
    out = traced(spec, row)
    assert out.stats is None
    seen = assert_oracle(Oracle(spec, row), out)
    assert all(not spikes.any() for site, spikes in out.records.items() if site not in seen)


@pytest.mark.parametrize("spec", [FORWARD, LOOPED], ids=["forward", "looped"])
def test_random_traced_genotypes(spec):
    for row in spec.space.sample(jax.random.key(3), 4).tolist():
        assert_oracle(Oracle(spec, row), traced(spec, row))


@pytest.mark.parametrize("name", ["two_cells", "looped"])
def test_evaluation_by_running_statistics(name):
    spec, row = CASES[name]
    row = frozen(row)
    params, stats = bank(spec)
    with jax.enable_x64(True):
        out = run_fixed(spec, row, params, stats, images(spec), None, train=False)
        out = jax.device_get(out)
    assert_oracle(Oracle(spec, CASES[name][1], train=False), out)
    jax.tree.map(np.testing.assert_array_equal, out.stats, stats)


@pytest.mark.parametrize("name", ["mixed", "strided", "learning", "spiking"])
def test_step_by_step_equals_layer_by_layer(name):
    spec, row = CASES[name]
    whole, stepped = fixed(spec, row), fixed(spec, row, step_by_step=True)
    for site, spikes in whole.records.items():
        np.testing.assert_array_equal(stepped.records[site], spikes)
    np.testing.assert_allclose(stepped.logits_BK, whole.logits_BK, rtol=1e-10, atol=1e-12)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12)
    jax.tree.map(close, stepped.stats, whole.stats)
    jax.tree.map(close, dict(stepped.state), dict(whole.state))


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (FORWARD, "0>1:conv1 0>2:conv3 0>3:skip 1>3:conv3 2>3:conv1"),
        (FORWARD, "0>1:conv3 0>2:avgpool 0>3:avgpool 1>3:conv3 2>3:conv3"),
        (LOOPED, "0>1:conv3 2>0:conv1 0>3:conv3 3>1:avgpool 2>3:conv1"),
    ],
)
def test_exchanged_nodes_compute_the_same(spec, text):
    trade = str.maketrans("12", "21")
    row = spec.space.parse(text)
    exchanged = spec.space.parse(" ".join(e[:3].translate(trade) + e[3:] for e in text.split()))
    assert row.tolist() != exchanged.tolist()
    np.testing.assert_array_equal(spec.space.canonical(row), spec.space.canonical(exchanged))

    def moved(name):
        return name[:6] + name[6:9].translate(trade) + name[9:] if ".e" in name else name

    params = bank(spec)[0]
    params = params | {moved(name): entry for name, entry in params.items() if moved(name) in params}
    ours, theirs = traced(spec, row), traced(spec, exchanged, params)
    np.testing.assert_allclose(ours.logits_BK, theirs.logits_BK, rtol=1e-9, atol=1e-11)
    for site, spikes in ours.records.items():
        other = site[:-1] + site[-1].translate(trade) if ".node" in site else site
        np.testing.assert_array_equal(theirs.records[other], spikes)


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


def test_shortcuts_of_spikes_change_nothing_without_shortcuts():
    row = [3, 2, 0, 2, 2, 3]
    spiking = dataclasses.replace(OVER_TIME, shortcut="spike")
    assert spiking.sites(row) == OVER_TIME.sites(row)
    jax.tree.map(np.testing.assert_array_equal, fixed(spiking, row), fixed(OVER_TIME, row))


@pytest.mark.parametrize("spec", [SPIKING, SPIKING_LOOPED, LEARNING, FORWARD], ids=str)
def test_a_spec_comes_back_from_json(spec):
    written = json.loads(json.dumps(spec_to_json(spec)))
    assert spec_from_json(written) == spec
    older = {name: value for name, value in written.items() if name != "shortcut"}
    older["neuron"] = {name: value for name, value in written["neuron"].items() if not name.startswith("learn_")}
    plain = dataclasses.replace(spec.neuron, learn_tau=False, learn_threshold=False)
    assert spec_from_json(older) == dataclasses.replace(spec, shortcut="membrane", neuron=plain)


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


EVERY_CODE = NetworkSpec((4, 4, 1), 2, CellSpace((1, 7)), channels=2, time_steps=2, neuron=NeuronSpec(v_threshold=0.5))


@functools.partial(jax.jit, static_argnames="spec")
def loss_and_grad(spec, row, params, x):
    def loss(params):
        out = network.apply(spec, row, params, x, train=True)
        return (out.logits_BK * jnp.arange(spec.num_classes)).sum(), out.logits_BK

    return jax.value_and_grad(loss, has_aux=True)(params)


@pytest.mark.parametrize("code", range(1, EVERY_CODE.space.num_ops))
def test_every_operation_keeps_the_contract(code):
    spec, row = EVERY_CODE, [0, code, 0, 1, 0, code]
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), bank(spec)[0])
    x = jnp.asarray(images(spec), jnp.float32)
    (_, logits), grads = jax.device_get(loss_and_grad(spec, jnp.asarray(row), params, x))
    assert logits.shape == (B, spec.num_classes)
    assert logits.dtype == jnp.float32
    assert np.isfinite(logits).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    own = spec.layers(row)
    for name, entry in grads.items():
        if name not in own:
            assert not any(leaf.any() for leaf in entry.values()), name
        elif name.startswith("cell"):
            assert entry["kernel"].any(), name
    assert {name for name in own if name.startswith("cell")} == {
        f"cell{i}.e{edge}.{spec.space.operations[code]}"
        for i in (1, 2)
        for edge in ("02", "23")
        if "conv" in spec.space.operations[code]
    }


@functools.partial(jax.jit, static_argnames="stride")
def conv_and_gradients(x, kernel, g, stride=1):
    out, backwards = jax.vjp(functools.partial(convolution.conv, stride=stride), x, kernel)
    return out, *backwards(g)


@pytest.mark.parametrize("k", [1, 3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(6, 7), (9, 8)])
def test_conv(k, stride, size):
    rng = np.random.default_rng(k)
    x, kernel = rng.normal(size=(2, 2, *size, 3)), rng.normal(size=(k, k, 3, 4))
    want = conv_oracle(x, kernel, stride)
    g = rng.normal(size=want.shape)
    with jax.enable_x64(True):
        ours, dx, dkernel = jax.device_get(conv_and_gradients(x, kernel, g, stride=stride))
    np.testing.assert_allclose(ours, want, rtol=1e-10, atol=1e-12)
    for _ in range(3):  # linear in each: the gradients are the transposes
        x_too, kernel_too = rng.normal(size=x.shape), rng.normal(size=kernel.shape)
        np.testing.assert_allclose((dx * x_too).sum(), (g * conv_oracle(x_too, kernel, stride)).sum(), rtol=1e-9)
        np.testing.assert_allclose(
            (dkernel * kernel_too).sum(), (g * conv_oracle(x, kernel_too, stride)).sum(), rtol=1e-9
        )


@pytest.mark.parametrize(("channels", "width"), [((3, 1), 8), ((8, 8), 12), ((8, 16), 6), ((16, 16), 7), ((16, 32), 8)])
@pytest.mark.parametrize("k", [3, 7])
def test_conv_of_few_channels(k, channels, width):
    """On a CPU, narrow convolutions run another way: same values, same gradients."""
    rng = np.random.default_rng(k)
    x, kernel = rng.normal(size=(2, 5, width, channels[0])), rng.normal(size=(k, k, *channels))
    g = rng.normal(size=(2, 5, width, channels[1]))
    with jax.enable_x64(True):
        ours, dx, dkernel = jax.device_get(conv_and_gradients(x, kernel, g))
    np.testing.assert_allclose(ours, conv_oracle(x[None], kernel)[0], rtol=1e-10, atol=1e-12)
    turned = kernel[::-1, ::-1].swapaxes(2, 3)  # the gradient of a convolution is one with the turned kernel
    np.testing.assert_allclose(dx, conv_oracle(g[None], turned)[0], rtol=1e-10, atol=1e-12)
    moved = kernel + rng.normal(size=kernel.shape)
    difference = conv_oracle(x[None], moved)[0] - conv_oracle(x[None], kernel)[0]  # linear in the kernel
    np.testing.assert_allclose((dkernel * (moved - kernel)).sum(), (difference * g).sum(), rtol=1e-10)


@pytest.mark.parametrize(("k", "dilation", "n", "channels"), [(1, 1, 3, (5, 7)), (3, 1, 4, (3, 40)), (5, 1, 3, (33, 2)),
                                                              (7, 1, 2, (8, 8)), (3, 2, 5, (40, 33))])  # fmt: skip
@pytest.mark.parametrize("at_once", [1, 1 << 20])
def test_conv_of_bfloat16(k, dilation, n, channels, at_once, monkeypatch):
    """Its products are exact in float32, and so are their sums, but for rounding; gradients are read in bfloat16."""
    monkeypatch.setattr(convolution, "_FACTOR_BYTES", at_once)  # image by image, and all at once
    rng = np.random.default_rng(k)

    def narrow(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

    x, kernel, g = narrow(n, 7, 9, channels[0]), narrow(k, k, *channels), narrow(n, 7, 9, channels[1])
    of = lambda x, kernel: convolution.conv(x, kernel, dilation=dilation)  # noqa: E731
    ours, backwards = jax.vjp(jax.jit(of), x, kernel.astype(jnp.float32))
    with jax.enable_x64(True):
        want, want_backwards = jax.vjp(of, *(a.astype(jnp.float64) for a in (x, kernel)))
        dx, dkernel = want_backwards(g.astype(jnp.float64))
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, want, rtol=1e-5, atol=1e-4)
    dx_ours, dkernel_ours = backwards(g.astype(jnp.float32))
    assert dx_ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(dx_ours.astype(jnp.float32), dx, rtol=1e-2, atol=1e-2)
    assert dkernel_ours.dtype == jnp.float32
    np.testing.assert_allclose(dkernel_ours, dkernel, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 6)])
def test_avgpool(size):
    x = np.random.default_rng(0).normal(size=(2, 3, *size, 2))
    with jax.enable_x64(True):
        ours = pooling.average_pool(jnp.asarray(x))
    np.testing.assert_allclose(ours, avgpool_oracle(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_downsample(factor):
    x = np.random.default_rng(0).normal(size=(2, 3, 7, 6, 2))
    with jax.enable_x64(True):
        ours, backwards = jax.vjp(lambda x: layers.downsample(x, factor), jnp.asarray(x))
        dx = np.asarray(*backwards(ours))
    np.testing.assert_allclose(ours, downsample_oracle(x, factor), rtol=1e-12)
    np.testing.assert_allclose((dx * x).sum(), np.square(ours).sum(), rtol=1e-12)  # linear: <dx, x> = <ours, ours>


def test_batch_norm_needs_statistics_to_evaluate():
    with pytest.raises(ValueError, match="train=False needs running statistics"):
        layers.batch_norm(jnp.zeros((1, 1, 2, 2, 1)), layers.init_affine(1), None, train=False)


def test_dropout_mask():
    mask = network.dropout_mask(jax.random.key(0), FORWARD, 200)
    assert mask is not None
    assert mask.shape == (200, FORWARD.features)
    assert mask.dtype == jnp.bool_
    assert abs(float(mask.mean()) - 0.5) < 0.1
    assert network.dropout_mask(jax.random.key(0), LOOPED, 2) is None


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"channels": 0}, "channels=0 must be a whole number of at least 1"),
        ({"channels": 1.5}, "channels=1.5"),
        ({"time_steps": 0}, "time_steps=0"),
        ({"head_pool": 0}, "head_pool=0"),
        ({"head_hidden": -1}, "head_hidden=-1"),
        ({"neurons_per_class": 0}, "neurons_per_class=0"),
        ({"image_shape": (8, 8)}, r"image_shape=\(8, 8\) must be \(height, width, channels\)"),
        ({"image_shape": (8, 0, 3)}, r"image_shape=\(8, 0, 3\)"),
        ({"image_shape": (1, 1, 3)}, "too small for stem_stride=1"),
        ({"image_shape": (8, 8, 3), "head": "snasnet", "head_pool": 5}, "head_pool=5"),
        ({"num_classes": 1}, "num_classes=1 must be a whole number of at least 2"),
        ({"stem_stride": 3}, "stem_stride=3 must be a whole number of at least 1, and at most 2"),
        ({"norm": "layer"}, "norm='layer' is unknown; known: per_step, over_time"),
        ({"head": "mlp"}, "head='mlp' is unknown; known: snasnet, gap"),
        ({"shortcut": "skip"}, "shortcut='skip' is unknown; known: membrane, spike"),
        ({"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"norm": "over_time", "space": CellSpace(feedback=True)}, "feedback cells run step by step"),
    ],
)
def test_spec_refuses(fields, match):
    with pytest.raises(ValueError, match=match):
        NetworkSpec(**{"image_shape": (8, 8, 3), "num_classes": 10} | fields)


@pytest.mark.parametrize(
    ("spec", "row", "options", "match"),
    [
        (FORWARD, [3, 0, 2], {}, r"genotype has shape \(3,\); a cell of this space has 6 edges"),
        (FORWARD, [[0, 0, 0, 1, 0, 0]] * 3, {}, r"genotype has shape \(3, 6\)"),
        (LOOPED, [0, 0, 0, 1, 0, 0], {}, "12 edges"),
        (FORWARD, [0, 0, 0, 0, 0, 0], {}, "must not be zero"),
        (FORWARD, [0, 0, 0, 9, 0, 0], {}, "codes must be 0 to 4"),
        (OVER_TIME, [0, 0, 0, 1, 0, 0], {"step_by_step": True}, "needs all time steps at once"),
        (LOOPED, [0, 0, 0, 1] + [0] * 8, {"step_by_step": False}, "only run step by step"),
        (FORWARD, jnp.ones((6, 5)), {"stats": {}}, "keeps no running statistics"),
        (FORWARD, jnp.array([0, 0, 1]), {}, r"genotype has shape \(3,\)"),
        (FORWARD, [0, 0, 0, 1, 0, 0], {"train": False}, "needs running statistics"),
    ],
)
def test_apply_refuses(spec, row, options, match):
    params = jax.tree.map(np.float32, bank(spec)[0])
    with pytest.raises(ValueError, match=match):
        network.apply(spec, row, params, jnp.zeros((1, *spec.image_shape)), **{"train": True} | options)
