"""bfloat16 as whole numbers of 16 bits, which XLA's CPU programs move and widen faster than the type itself."""

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def movable(x: Array) -> Array:
    """The same bytes, of a type that is copied as it is."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def moved(x: Array, dtype: jnp.dtype) -> Array:
    """What `movable` made something of."""
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)


def widened(x: Array) -> Array:
    """What `movable` made of bfloat16 as float32; anything else as it is."""
    return lax.bitcast_convert_type(x.astype(jnp.uint32) << 16, jnp.float32) if x.dtype == jnp.uint16 else x
