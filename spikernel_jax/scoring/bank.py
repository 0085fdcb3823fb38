"""Banks of random weights: every operation on every edge, for all candidates alike."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spikernel_jax.io.checks import whole
from spikernel_jax.scoring.scores import scored_spec
from spikernel_jax.snn import network
from spikernel_jax.snn.spec import NetworkSpec

Array = jax.Array


def make_bank(key: Array, spec: NetworkSpec, seeds: int = 1) -> network.Params:
    """R banks of random weights, each leaf with a leading axis R.

    Weights are drawn on bfloat16's grid (float32 values of 8 significant bits), as good a random draw as any:
    so convolutions of spikes, 0 or 1, lose nothing where they read bfloat16.

    Args:
      key: a typed PRNG key.
      spec: the network.
      seeds: R.

    Returns:
      Weights of every operation on every edge, and of the rest of the network; nothing of what neurons learn,
      since a score is of the spec's own.

    Raises:
      ValueError: on less than one bank, or a network that `scores.scored_spec` refuses.

    Example:
      >>> import jax
      >>> from spikernel_jax import CellSpace, NetworkSpec, make_bank
      >>> spec = NetworkSpec((8, 8, 1), 2, CellSpace((3,)), channels=4, time_steps=2)
      >>> make_bank(jax.random.key(0), spec, seeds=2)["stem"]["kernel"].shape
      (2, 3, 3, 1, 4)
    """
    return _draw_bank(key, scored_spec(spec), whole("seeds", seeds, 1, 1_000_000))


@functools.partial(jax.jit, static_argnames=("spec", "seeds"))  # op by op it takes seconds
def _draw_bank(key: Array, spec: NetworkSpec, seeds: int) -> network.Params:
    keys = jax.vmap(lambda r: jax.random.fold_in(key, r))(jnp.arange(seeds))
    bank = jax.vmap(lambda k: network.init(k, spec)[0])(keys)
    return jax.tree.map(lambda leaf: lax.reduce_precision(leaf, exponent_bits=8, mantissa_bits=7), bank)


@functools.cache
def _bank_shapes(spec: NetworkSpec) -> network.Params:
    """Shapes of one bank; kept, because a search makes a scorer for every few candidates."""
    return jax.eval_shape(functools.partial(_draw_bank, spec=spec, seeds=1), jax.random.key(0))


def seeds_of(bank: network.Params, spec: NetworkSpec) -> int:
    """R of R banks; ValueError where they are not of this network, which would score others than are asked for."""
    wanted = _bank_shapes(spec)
    if missing := sorted(wanted.keys() - bank.keys()):
        raise ValueError(f"bank has no {missing[0]!r}: want one of make_bank with the spec of these sizes")
    seeds = {len(leaf) for leaf in jax.tree.leaves(bank)}
    for layer, arrays in wanted.items():
        for name, array in arrays.items():
            shape = np.shape(bank[layer][name])[1:] if name in bank[layer] else None
            if shape != array.shape[1:]:
                raise ValueError(f"bank: {layer}'s {name} is [R, *{shape}], this network's [R, *{array.shape[1:]}]")
    if len(seeds) != 1:
        raise ValueError(f"bank: its arrays are of {sorted(seeds)} replicates; want one number")
    return seeds.pop()
