"""Weights of few bits: the numbers and units of an oracle, and gradients that go straight through."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spikernel_jax import CellSpace, NetworkSpec
from spikernel_jax.snn import network
from spikernel_jax.snn.rounding import rounded, rounded_classes, straight_through

SHARES = [1 - 0.05 * i for i in range(13)]


def oracle(channel: list[float], bits: int) -> tuple[float, list[int]]:
    """Unit and numbers of one channel, of the share with the least error; of equals the largest."""
    most = 2 ** (bits - 1) - 1
    if not any(channel):
        return 1.0, [0] * len(channel)
    found = []
    for share in SHARES:
        unit = share * max(map(abs, channel)) / most
        numbers = [max(-most, min(most, round(w / unit))) for w in channel]
        found.append((sum((n * unit - w) ** 2 for n, w in zip(numbers, channel, strict=True)), -share, unit, numbers))
    return min(found)[2:]


@given(st.integers(2, 8), st.integers(0, 99))
def test_numbers_and_units_by_hand(bits, seed):
    weights = np.random.default_rng(seed).standard_t(3, size=(3, 2, 4, 5))
    weights[..., 1] = 0
    whole, unit = rounded(weights, bits)
    for channel in range(5):
        expected = oracle(weights[..., channel].ravel().tolist(), bits)
        assert unit[channel] == pytest.approx(expected[0])
        assert whole[..., channel].ravel().tolist() == expected[1]
    assert np.abs(whole).max((0, 1, 2)).tolist() == [0 if c == 1 else 2 ** (bits - 1) - 1 for c in range(5)]


@given(st.integers(2, 8), st.integers(0, 9))
def test_what_was_rounded_stays_as_it_is(bits, seed):
    """Also behind a norm, which scales channels: what was trained for integers is those integers."""
    rng = np.random.default_rng(seed)
    whole, unit = rounded(rng.normal(size=(3, 3, 4, 6)), bits)
    scale = rng.normal(size=6)
    again, its = rounded(whole * unit * scale, bits)
    np.testing.assert_array_equal(again, whole * np.sign(scale))
    np.testing.assert_allclose(its, unit * np.abs(scale))


@pytest.mark.parametrize("head", ["gap", "snasnet"])
def test_gradients_go_straight_through(head):
    spec = NetworkSpec((8, 8, 1), 3, CellSpace((3,)), channels=2, head=head, head_hidden=4, neurons_per_class=2)
    cell = tuple(spec.space.parse("0>1:conv3 0>3:skip 1>3:conv3").tolist())
    params, _ = network.init(jax.random.key(0), spec, cell)
    weigh = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)

    def value(params):
        products = jax.tree.map(lambda a, b: (a * b).sum(), straight_through(spec, params, 3), weigh)
        return sum(jax.tree.leaves(products))

    for ours, expected in zip(jax.tree.leaves(jax.jit(jax.grad(value))(params)), jax.tree.leaves(weigh), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-6)
    found = straight_through(spec, params, 3)
    for name, entry in found.items():
        for part, leaf in entry.items():
            if part != "kernel":
                np.testing.assert_array_equal(leaf, params[name][part])
            elif name == "head.out":
                whole, unit = rounded_classes(jnp.asarray(params[name][part]), 3, 3)
                mean = np.asarray(leaf).reshape(len(leaf), 3, -1).mean(-1)
                np.testing.assert_allclose(mean, whole * unit, atol=1e-6)
            else:
                whole, unit = rounded(params[name][part], 3)
                np.testing.assert_allclose(leaf, whole * unit, atol=1e-6)
