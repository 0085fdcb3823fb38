"""The network against a plain NumPy float64 one, and fixed against traced genotypes.

The oracle follows method's formulas: loops for convolutions, one LIF for every convolution edge, the
feedback recurrence spelt out. Its only shared ground with the package is the parameters' names.
"""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from network_cases import CASES, FORWARD, LOOPED, OVER_TIME, B, bank, fixed, frozen, images, keep, run_fixed, traced
from oracles import avgpool_oracle, conv_oracle, downsample_oracle
from quick_cases import mostly_slow
from spikernel_jax.cells.space import CellSpace
from spikernel_jax.snn import network
from spikernel_jax.snn.neurons import NeuronSpec
from spikernel_jax.snn.spec import NetworkSpec


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


@pytest.mark.parametrize(
    "name",
    [
        *mostly_slow(TRACED, lambda name: "looped_" not in name),
        *mostly_slow(["learning", "spiking", "spiking_looped"], lambda name: name == "spiking_looped"),
    ],
)
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


def test_shortcuts_of_spikes_change_nothing_without_shortcuts():
    row = [3, 2, 0, 2, 2, 3]
    spiking = dataclasses.replace(OVER_TIME, shortcut="spike")
    assert spiking.sites(row) == OVER_TIME.sites(row)
    jax.tree.map(np.testing.assert_array_equal, fixed(spiking, row), fixed(OVER_TIME, row))


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


def test_dropout_mask():
    mask = network.dropout_mask(jax.random.key(0), FORWARD, 200)
    assert mask is not None
    assert mask.shape == (200, FORWARD.features)
    assert mask.dtype == jnp.bool_
    assert abs(float(mask.mean()) - 0.5) < 0.1
    assert network.dropout_mask(jax.random.key(0), LOOPED, 2) is None


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
