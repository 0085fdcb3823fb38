"""Which operations of an edge are computed: the one of a fixed code, of a traced one, or a weighted sum of all.

Each way takes what a genotype says of the edge, what every operation would make, the shape of a sum, the sum so far
(None is nothing yet), and running statistics; it gives the sum with the edge's share, and the statistics after.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spikernel_jax.snn.layers import every_step

Array = jax.Array
Stats = dict[str, dict[str, Array]]  # layer name -> running {"mean", "var"}
# What one operation makes of an edge's source node, and running statistics of its layers after that.
Make = Callable[[], tuple[Array, Stats]]


def _added(y: Array, like: jax.ShapeDtypeStruct, total: Array | None) -> Array:
    y = every_step(y, like.shape[0])
    return y if total is None else total + y


def _fixed(
    code: int, makes: list[Make], like: jax.ShapeDtypeStruct, total: Array | None, stats: Stats
) -> tuple[Array | None, Stats]:
    """Adds the one operation that a fixed code names; code 0 is none."""
    if not code:
        return total, stats
    y, after = makes[code - 1]()
    return _added(y, like, total), stats | after


def _traced(
    code: Array, makes: list[Make], like: jax.ShapeDtypeStruct, total: Array | None, stats: Stats
) -> tuple[Array, Stats]:
    """Adds the operation that a code names at run time; statistics of the others stay as they are."""

    def none() -> tuple[Array, Stats]:
        return jnp.zeros(like.shape, like.dtype) if total is None else total, stats

    def added(make: Make) -> tuple[Array, Stats]:
        y, after = make()
        # The sum is a branch's own, so that it is one pass over memory with the operation's last.
        return _added(y, like, total), stats | after

    return lax.switch(code, [none, *(functools.partial(added, make) for make in makes)])


def _mixture(
    weights: Array, makes: list[Make], like: jax.ShapeDtypeStruct, total: Array | None, stats: Stats
) -> tuple[Array, Stats]:
    """Adds all operations by their weights; one of weight 0 is not computed. It keeps no statistics."""
    nothing = result = jnp.zeros(like.shape, like.dtype)
    for weight, make in zip(weights[1:], makes, strict=True):
        weighted = lambda w=weight, make=make: w * every_step(make()[0], like.shape[0])  # noqa: E731
        result += lax.cond(weight > 0, weighted, lambda: nothing)
    return _added(result, like, total), stats


def chooser(codes: Any) -> Callable[..., Any]:
    """The way for one cell's codes: a list of fixed ones, traced ones [E], or weights [E, num_ops]."""
    return _fixed if isinstance(codes, list) else _mixture if np.ndim(codes) == 2 else _traced
