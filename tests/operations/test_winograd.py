"""Winograd's convolution against sums written out in float64, and where training takes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracles import conv_oracle
from spikernel_jax.operations import winograd
from spikernel_jax.operations.convolution import conv


def oracle_gradients(x: np.ndarray, kernel: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For the input, and for the kernel, tap by tap."""
    _, h, w, _ = x.shape
    padded = np.pad(x.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    of_padded, of_kernel = np.zeros_like(padded), np.zeros(kernel.shape)
    for i in range(3):
        for j in range(3):
            of_padded[:, i : i + h, j : j + w] += g @ kernel[i, j].T.astype(np.float64)
            of_kernel[i, j] = np.einsum("nhwc,nhwk->ck", padded[:, i : i + h, j : j + w], g)
    return of_padded[:, 1:-1, 1:-1], of_kernel


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("shape", "out", "together"),
    [((2, 2, 2, 1), 1, 2), ((6, 4, 8, 3), 5, 2), ((3, 8, 6, 4), 2, 1), ((4, 10, 10, 8), 8, 4)],
)
def test_it_is_the_convolution_and_its_gradient(shape, out, together):
    x, kernel, g = drawn(*shape), drawn(3, 3, shape[3], out, seed=1), drawn(*shape[:3], out, seed=2)
    np.testing.assert_allclose(
        winograd.convolved(jnp.asarray(x), jnp.asarray(kernel), together), conv_oracle(x, kernel), rtol=1e-5, atol=2e-5
    )
    _, of_kernel = oracle_gradients(x, kernel, g)
    np.testing.assert_allclose(
        winograd.kernel_gradient(jnp.asarray(x), jnp.asarray(g), together), of_kernel, rtol=1e-5, atol=5e-5
    )


def test_whole_numbers_stay_whole():
    """Nothing is rounded: halves and quarters of kernels are exact too."""
    draw = np.random.default_rng(0)
    x, kernel = draw.integers(0, 5, (4, 8, 8, 32)), draw.integers(-8, 9, (3, 3, 32, 32))
    found = winograd.convolved(jnp.float32(x), jnp.float32(kernel), 2)
    np.testing.assert_array_equal(found, conv_oracle(x, kernel))


def test_factors_of_bfloat16_are_rounded_once():
    """Tiles of spikes are exact, whichever type spikes come in; only the transformed kernel is rounded."""
    x, kernel = np.random.default_rng(0).integers(0, 5, (2, 8, 8, 32)), drawn(3, 3, 32, 32) / 16
    exact = winograd.convolved(jnp.float32(x), jnp.asarray(kernel), 1)
    found = winograd.convolved(jnp.asarray(x, jnp.bfloat16), jnp.asarray(kernel), 1, jnp.bfloat16)
    np.testing.assert_array_equal(
        found, winograd.convolved(jnp.float32(x), jnp.asarray(kernel), 1, jnp.bfloat16), strict=True
    )
    error = np.sqrt(np.mean(np.square(found - exact)) / np.mean(np.square(exact)))
    assert 2**-11 < error < 2**-8


def program(function, *arguments) -> str:
    return jax.jit(function).lower(*arguments).compile().as_text() or ""


def gradient(x, kernel):
    return jax.grad(lambda x, kernel: jnp.square(conv(x, kernel)).sum(), (0, 1))(x, kernel)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="how a CPU convolves")
@pytest.mark.parametrize(
    ("side", "channels", "out", "dtype", "taken"),
    [
        (8, 32, 32, "float32", True),
        (8, 64, 96, "float32", True),
        (7, 32, 32, "float32", False),
        (8, 16, 64, "float32", False),
        (8, 32, 32, "bfloat16", True),
        (8, 16, 64, "bfloat16", False),
    ],
)
def test_training_takes_it_where_it_pays(side, channels, out, dtype, taken):
    x = jnp.asarray(drawn(2, side, side, channels) > 1, dtype)
    kernel = jnp.asarray(drawn(3, 3, channels, out, seed=1)) / 16
    convolutions, tiles = " convolution(", f"[2,{side // 2},{side // 2},{channels}]"
    assert convolutions in program(conv, x, kernel) or dtype == "bfloat16"  # alone it rounds as published code does
    text = program(gradient, x, kernel)
    assert (tiles in text) == taken
    assert taken <= (convolutions not in text)

    y = np.asarray(conv(x, kernel))
    found = gradient(x, kernel)
    g = np.asarray(jnp.asarray(2 * y, dtype), np.float64)
    rtol, atol = (1e-4, 1e-4) if dtype == "float32" else (0.02, 0.2)
    for own, want in zip(found, oracle_gradients(np.asarray(x, np.float64), np.asarray(kernel), g), strict=True):
        np.testing.assert_allclose(np.asarray(own, np.float64), want, rtol=rtol, atol=atol)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="how a CPU convolves")
def test_several_trainings_at_once():
    """What `vmap` makes of it, kernels and images apart."""
    x = jnp.asarray(drawn(3, 2, 4, 4, 64))
    kernel = jnp.asarray(drawn(3, 3, 3, 64, 64, seed=1)) / 24
    together = jax.vmap(gradient)(x, kernel)
    alone = [gradient(*one) for one in zip(x, kernel, strict=True)]
    for own, want in zip(jax.tree.leaves(together), zip(*alone, strict=True), strict=True):
        np.testing.assert_allclose(own, np.stack(want), rtol=1e-4, atol=1e-4)
