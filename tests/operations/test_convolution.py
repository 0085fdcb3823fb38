"""Every way of convolving against an oracle, with its gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracles import conv_oracle
from spikernel_jax.operations import convolution


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
