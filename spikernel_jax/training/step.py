"""One step of a training, and some of them as one compiled call."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.struct
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax

from spikernel_jax.snn import network, rounding
from spikernel_jax.snn.spec import NetworkSpec
from spikernel_jax.training import recipe
from spikernel_jax.training.devices import BATCH, shared, to_all
from spikernel_jax.training.recipe import TrainConfig

Array = jax.Array


@flax.struct.dataclass
class TrainState:
    """All that changes while training."""

    params: network.Params
    stats: network.Stats
    optimiser: Any  # optax state
    average: Any  # moving averages of (params, stats); () where the recipe has none
    step: Array  # int32 scalar, steps done
    loss_sum: Array  # float32 scalar, of the steps of this epoch
    right: Array  # int32 scalar, images classified rightly in this epoch


@dataclasses.dataclass(frozen=True)
class Program:
    """What a training step is compiled for; seeds are not in it, so they share one program."""

    spec: NetworkSpec
    genotype: tuple[Any, ...] | None  # None where it is data, so that all cells of the space share one program
    config: TrainConfig
    total_steps: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    devices: jax.sharding.Mesh

    @property
    def optimiser(self) -> optax.GradientTransformation:
        """What makes updates of gradients."""
        return recipe.optimiser(self.config, self.total_steps, together=self.genotype is None)

    def start(self, key: Array, begun: tuple[network.Params, network.Stats] | None = None) -> TrainState:
        """The state before the first step, on all devices: what has begun, else weights drawn with a key."""
        # States are donated, so nothing in them may be anyone else's.
        params, stats = jax.tree.map(jnp.copy, begun) if begun else network.init(key, self.spec, self.genotype)
        average = jax.tree.map(jnp.copy, (params, stats)) if self.config.ema else ()
        moments = self.optimiser.init(params)
        state = TrainState(params, stats, moments, average, jnp.int32(0), jnp.float32(0), jnp.int32(0))
        return to_all(self.devices, state)


_STEPS_A_CALL = 32  # at most; a second or less on an accelerator
_STEPS_A_CALL_OF_A_CPU = 4  # a program's memory is fresh in each call, and costs a step a tenth of its time


def in_calls(order: np.ndarray, begun: int = 0) -> Iterator[tuple[np.ndarray, int | None]]:
    """An epoch's steps as calls of one compiled program make them.

    An accelerator does not wait for its host where all calls make as many steps as they have. A CPU takes so long for
    a step that it need not, and the fewer there are in a call, the sooner it stops when asked to.

    Args:
      order: what each step is given, [steps, ...].
      begun: steps that have been made.

    Yields:
      What the next steps are given, always as many; and how many of them are to be made, None where that is all.
    """
    left = len(order) - begun
    if jax.default_backend() == "cpu":
        size = min(_STEPS_A_CALL_OF_A_CPU, len(order))
    else:
        size = next(number for number in range(min(_STEPS_A_CALL, len(order)), 0, -1) if len(order) % number == 0)
    for first in range(begun, len(order), size):
        rows = order[first : first + size]
        yield np.resize(rows, (size, *rows.shape[1:])), len(rows) if left % size else None


def _steps(step: Callable[..., tuple[Any, Array]], state: Any, fed: Array, count: Array | None) -> tuple[Any, Array]:
    """A scan over what steps are given, of which only so many are made; values of others are 0."""
    if count is None:
        return jax.lax.scan(step, state, fed)

    def made(index: Array, carry: tuple[Any, Array]) -> tuple[Any, Array]:
        state, values = carry
        state, value = step(state, fed[index])
        return state, values.at[index].set(value)

    value = jax.eval_shape(step, state, fed[0])[1]
    return jax.lax.fori_loop(0, count, made, (state, jnp.zeros((len(fed), *value.shape), value.dtype)))


@functools.partial(jax.jit, static_argnames=("program",), donate_argnames=("state",))
def train_steps(
    program: Program,
    state: TrainState,
    cell: Any,
    key: Array,
    images: Array,
    labels: Array,
    chosen_SB: Array,
    count: Array | None = None,
) -> tuple[TrainState, Array]:
    """Some steps, the first `count` of those chosen; returns the new state and the mean losses, [S]."""
    return _steps(functools.partial(one_step, program, cell, key, images, labels), state, chosen_SB, count)


@functools.partial(jax.jit, static_argnames=("program", "apart"), donate_argnames=("states",))
def train_steps_together(
    program: Program,
    apart: bool,
    states: TrainState,
    cells: Any,
    keys_K: Array,
    images: Array,
    labels: Array,
    chosen_SKB: Array,
    count: Array | None = None,
) -> tuple[TrainState, Array]:
    """The same of K trainings as one batch: states with a leading axis, as cells have if `apart`; losses [S, K]."""

    def one(cell: Any, key: Array, state: TrainState, chosen_B: Array) -> tuple[TrainState, Array]:
        return one_step(program, cell, key, images, labels, state, chosen_B)

    all_of_them = jax.vmap(one, (0 if apart else None, 0, 0, 0))
    return _steps(lambda states, chosen_KB: all_of_them(cells, keys_K, states, chosen_KB), states, chosen_SKB, count)


def one_step(
    program: Program, cell: Any, key: Array, images: Array, labels: Array, state: TrainState, chosen_B: Array
) -> tuple[TrainState, Array]:
    """The next step; returns the new state and the mean loss."""
    config = program.config
    drawn, mask = jax.random.split(jax.random.fold_in(key, state.step))
    y = labels[chosen_B]
    x, targets_BK = recipe.inputs(
        config, drawn, images[chosen_B], y, program.spec.num_classes, program.mean, program.std
    )
    keep = network.dropout_mask(mask, program.spec, len(chosen_B))
    differentiated = shared(program.devices, functools.partial(_differentiated, program), whole=3, out=False)
    value, stats, right, grads = differentiated(state.params, state.stats, cell, x, y, targets_BK, keep)
    updates, moments = program.optimiser.update(grads, state.optimiser, state.params)
    if program.genotype is None:  # weight decay would move what the cell does not use
        updates = _of_cell(program.spec, cell, updates)
    params: Any = optax.apply_updates(state.params, updates)
    average = recipe.averaged(config, state.average, (params, stats), state.step) if config.ema else ()
    new = TrainState(params, stats, moments, average, state.step + 1, state.loss_sum + value, state.right + right)
    return new, value


def _of_cell(spec: NetworkSpec, cell: Array, updates: Any) -> Any:
    """Updates of the layers that a traced genotype uses; zeros of others."""
    used = spec.in_use(cell)

    def own(name: str, entry: dict[str, Array]) -> dict[str, Array]:
        return jax.tree.map(lambda leaf: leaf * used[name], entry) if name in used else entry

    return {name: own(name, entry) for name, entry in updates.items()}


def _differentiated(
    program: Program,
    params: network.Params,
    stats: network.Stats,
    cell: Any,
    x: Array,
    y: Array,
    targets_BK: Array,
    keep: Any,
) -> tuple[Array, network.Stats, Array, network.Params]:
    """Mean loss, running statistics, images classified rightly and gradients, of the batch, from a device's part."""
    spike_dtype = jnp.bfloat16 if program.config.precision == "bfloat16" else None

    bits = program.config.weight_bits

    def loss(params: network.Params) -> Any:
        params = rounding.straight_through(program.spec, params, bits) if bits else params
        out = network.apply(
            program.spec,
            cell if program.genotype is None else program.genotype,
            params,
            x,
            stats=stats,
            train=True,
            dropout_keep=keep,
            spike_dtype=spike_dtype,
            axis_name=BATCH,
        )
        right = (out.logits_BK.argmax(-1) == y).sum(dtype=jnp.int32)
        return recipe.loss(program.config, out.logits_TBK, targets_BK), (out.stats, right)

    (value, (stats, right)), grads = jax.value_and_grad(loss, has_aux=True)(params)
    if program.genotype is None:  # a bank has many small arrays, and each would be a meeting of all devices
        flat, unflatten = jax.flatten_util.ravel_pytree(grads)
        grads = unflatten(jax.lax.pmean(flat, BATCH))
        value = jax.lax.pmean(value, BATCH)
    else:
        value, grads = jax.lax.pmean((value, grads), BATCH)
    return value, stats, jax.lax.psum(right, BATCH), grads
