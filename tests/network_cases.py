"""Networks of every kind, small, with weights away from their start."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from spikernel_jax.cells.space import CellSpace
from spikernel_jax.snn import network
from spikernel_jax.snn.neurons import NeuronSpec
from spikernel_jax.snn.spec import NetworkSpec

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
