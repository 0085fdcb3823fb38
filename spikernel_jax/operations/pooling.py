"""Pooling that keeps the size: means and maxima over a window around every pixel."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def _along_both(x: Array, window: int, beyond: float, join: Callable[[Array, Array], Array]) -> Array:
    """Joins what lies in a window around each pixel, rows first and then columns; slices fuse into one pass each."""
    pad, sides = window // 2, x.shape[-3:-1]
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(pad, pad), (pad, pad), (0, 0)], constant_values=beyond)
    for axis, side in zip((x.ndim - 3, x.ndim - 2), sides, strict=True):
        x = functools.reduce(join, (lax.slice_in_dim(x, i, i + side, axis=axis) for i in range(window)))
    return x


def average_pool(x: Array, window: int = 3) -> Array:
    """Mean over a window of ``[..., H, W, C]``, stride 1, zero padding, divisor always the window's pixels."""
    return _along_both(x, window, 0, jnp.add) / window**2


def max_pool(x: Array, window: int = 3) -> Array:
    """Maximum over a window of ``[..., H, W, C]``, stride 1; beyond the border is nothing.

    Of equal values all that reach a maximum share its gradient.
    """
    lowest = float(jnp.finfo(x.dtype).min)
    return _along_both(x, window, lowest, jnp.maximum)
