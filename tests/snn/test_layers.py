"""Weights at the start are what JAX draws for their shape, by programs that many shapes share; pooling, norms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracles import downsample_oracle
from spikernel_jax.snn import layers

SHAPES = [(1, 1, 16, 16), (3, 3, 1, 16), (5, 5, 7, 3), (4, 4, 16, 16), (3, 3, 16, 32), (7, 7, 32, 32)]


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_do_not_depend_on_how_many_are_drawn(shape):
    key = jax.random.fold_in(jax.random.key(3), 5)
    bound = math.sqrt(6 / (5 * math.prod(shape[:-1])))
    whole = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
    np.testing.assert_array_equal(layers.init_conv(key, shape), whole)
    rows = math.prod(shape[:-1]), shape[-1]
    np.testing.assert_array_equal(layers.init_linear(key, rows, 0.01), 0.01 * jax.random.normal(key, rows))


def test_small_kernels_are_drawn_by_one_program(monkeypatch):
    drawn, real = set(), jax.random.uniform
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape, *rest: drawn.add(shape) or real(key, shape, *rest))
    for shape in SHAPES[:4]:
        layers.init_conv(jax.random.key(0), shape)
    assert len(drawn) == 1


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_downsample(factor):
    x = np.random.default_rng(0).normal(size=(2, 3, 7, 6, 2))
    with jax.enable_x64(True):
        ours, backwards = jax.vjp(lambda x: layers.downsample(x, factor), jnp.asarray(x))
        dx = np.asarray(*backwards(ours))
    np.testing.assert_allclose(ours, downsample_oracle(x, factor), rtol=1e-12)
    np.testing.assert_allclose((dx * x).sum(), np.square(ours).sum(), rtol=1e-12)  # linear: <dx, x> = <ours, ours>


@pytest.mark.parametrize(("before", "steps"), [(1, 1), (1, 4), (4, 4)])
def test_every_step_sums_the_gradients_of_all(before, steps):
    x, g = (np.random.default_rng(0).normal(size=(n, 2, 3)).astype(np.float32) for n in (before, steps))
    ours, backwards = jax.vjp(lambda x: layers.every_step(x, steps), jnp.asarray(x))
    np.testing.assert_array_equal(ours, np.broadcast_to(x, (steps, 2, 3)))
    (dx,) = backwards(g)
    np.testing.assert_allclose(dx, g.reshape(before, -1, 2, 3).sum(1), rtol=1e-6)


def test_batch_norm_needs_statistics_to_evaluate():
    with pytest.raises(ValueError, match="train=False needs running statistics"):
        layers.batch_norm(jnp.zeros((1, 1, 2, 2, 1)), layers.init_affine(1), None, train=False)
