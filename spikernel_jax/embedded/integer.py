"""Runs a program of integers in JAX: the executable specification of what a device computes."""

import functools
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spikernel_jax.embedded import program as ops
from spikernel_jax.embedded.bounds import half
from spikernel_jax.embedded.program import Buffer, Instruction, Program, Scale

Array = jax.Array
Values = dict[str, Array]  # buffers, int32 [B, H, W, C]
_WIDEST = 16  # bits of currents and membranes
_EXACT = 1 << 24  # whole numbers up to here are float32's


class Result(NamedTuple):
    """What comes out."""

    logits_BK: np.ndarray  # int32, in units of `Program.logit`
    spikes: dict[str, np.ndarray]  # of each image and time step, [T, B] by LIF site
    places: dict[str, np.ndarray]  # of a mean image over all time steps and channels, [H, W] by LIF site


def run(program: Program, images_BHWC: Any, batch_size: int = 256) -> Result:
    """Logits and spike counts of images.

    Args:
      program: of `lower.lower`.
      images_BHWC: uint8 pixels.
      batch_size: images at a time; results do not depend on it.

    Returns:
      The result, as NumPy arrays.

    Raises:
      ValueError: where images are not uint8, or of another shape.
    """
    logits, spikes, places = [], {site: [] for site in program.sites}, dict.fromkeys(program.sites, np.zeros(()))
    for some, fired, _ in _batches(program, images_BHWC, batch_size, None):
        logits.append(some)
        for site, own_TBHW in fired.items():
            spikes[site].append(own_TBHW.sum((2, 3)))
            places[site] = places[site] + own_TBHW.sum((0, 1), np.float64)
    return Result(
        np.concatenate(logits),
        {site: np.concatenate(own, 1) for site, own in spikes.items()},
        {site: own / len(images_BHWC) for site, own in places.items()},
    )


def bits_needed(program: Program, images_BHWC: Any, share: float) -> dict[str, int]:
    """Of currents and membranes: bits, without the sign, that all but a share of what is written has room in.

    Args:
      program: of `lower.lower`.
      images_BHWC: uint8 pixels, what a device will see.
      share: of all values of a buffer, over images, time steps and places; 0 leaves none out.

    Returns:
      Bits by buffer, no more than the buffer has.
    """
    more, values = {}, {}
    for _, _, records in _batches(program, images_BHWC, 64, _more_than):
        for name, (own, all_of_them) in records.items():
            more[name] = more.get(name, 0) + own.astype(np.int64).sum(0)
            values[name] = values.get(name, 0) + int(all_of_them.astype(np.int64).sum())
    return {name: int((own > share * values[name]).sum()) for name, own in more.items()}


def _more_than(values: Array) -> tuple[Array, Array]:
    """How many values of each image do not fit 0, 1, 2 … bits, and how many there are."""
    magnitudes = jnp.where(values < 0, ~values, values).reshape(len(values), -1)
    counts = (magnitudes[:, :, None] >> jnp.arange(_WIDEST) > 0).sum(1)  # one sum for all widths: quick to compile
    return counts, jnp.full(len(values), magnitudes.shape[1])


def _batches(program: Program, images_BHWC: Any, batch_size: int, observe: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Logits, spikes by time step and place, and what was observed, of so many images at a time."""
    images = np.asarray(images_BHWC)
    if images.dtype != np.uint8 or images.shape[1:] != program.buffers["image"].shape:
        want = f"uint8 [B, {', '.join(map(str, program.buffers['image'].shape))}]"
        raise ValueError(f"images are {images.dtype} {list(images.shape)}: want {want}")
    forward = _compiled(program, observe)
    for start in range(0, len(images), batch_size):
        some = images[start : start + batch_size]
        padded = np.concatenate([some, np.zeros((min(batch_size, len(images)) - len(some), *some.shape[1:]), np.uint8)])
        logits, spikes, records = jax.device_get(forward(padded))
        yield (
            logits[: len(some)],
            {site: own[:, : len(some)] for site, own in spikes.items()},
            jax.tree.map(operator.itemgetter(slice(len(some))), records),
        )


@functools.lru_cache(maxsize=16)  # programs are compared by identity
def _compiled(program: Program, observe: Any) -> Any:
    return jax.jit(functools.partial(_forward, program, observe))


def _forward(program: Program, observe: Any, images_BHWC: Array) -> tuple[Array, dict[str, Array], Any]:
    table, channels = jnp.asarray(program.table, jnp.int32), jnp.arange(images_BHWC.shape[-1])
    batch = len(images_BHWC)
    now: Values = {"image": table[images_BHWC.astype(jnp.int32), channels]}
    kept = {
        name: jnp.zeros((batch, *buffer.shape), jnp.int32) for name, buffer in program.buffers.items() if buffer.kept
    }
    now, before = _go(program, program.once, now | kept, observe)
    static = {name: value for name, value in now.items() if name not in kept}

    def step(kept: Values, _: None) -> tuple[Values, tuple[dict[str, Array], Any]]:
        then, records = _go(program, program.step, static | kept, observe)
        counts = {site: then[site].sum(3) for site in program.sites}
        return {name: then[name] for name in kept}, (counts, records)

    kept, (spikes, during) = lax.scan(step, {name: now[name] for name in kept}, None, length=program.time_steps)
    now, _ = _go(program, program.end, static | kept, None)
    return now["logits"][:, 0, 0], spikes, before | jax.tree.map(lambda own: own.sum(0), during)


def _go(
    program: Program, instructions: tuple[Instruction, ...], now: Values, observe: Any
) -> tuple[Values, dict[str, Any]]:
    """Buffers after the instructions; of currents and membranes, what is observed of all that is written to each."""
    now, records = dict(now), {}

    def written(name: str, values: Array) -> None:
        buffer = program.buffers[name]
        now[name] = values.clip(*buffer.range) if buffer.clips else values
        if observe is not None and not buffer.spiking and buffer.bits <= _WIDEST:
            found = observe(now[name])
            records[name] = jax.tree.map(jnp.add, records[name], found) if name in records else found

    for own in instructions:
        if isinstance(own, ops.Fire):
            spikes, state = _fire(own, now[own.source], now[own.state], program.buffers[own.target].most)
            written(own.target, spikes)
            written(own.state, state)
            continue
        made = _made(own, now, program.buffers)
        written(own.target, now[own.target] + made if own.add else made)
    return now, records


def _fire(own: ops.Fire, x: Array, v: Array, most: int) -> tuple[Array, Array]:
    rounding = int(half(own.leak_shift))
    v = v + (((x - (v - own.reset)) * own.leak + rounding) >> own.leak_shift)
    spikes = functools.reduce(operator.add, [(v >= n * own.threshold).astype(jnp.int32) for n in range(1, most + 1)])
    return spikes, v - spikes * own.threshold if own.soft else jnp.where(spikes > 0, own.reset, v)


def _scaled(x: Array, scale: Scale) -> Array:
    multiplier, shift, rounding = (jnp.asarray(own, jnp.int32) for own in (*scale, half(scale.shift)))
    return (x * multiplier + rounding) >> shift


@functools.singledispatch
def _made(own: Instruction, now: Values, buffers: dict[str, Buffer]) -> Array:
    raise TypeError(type(own).__name__)


@_made.register
def _(own: ops.Convolve, now: Values, buffers: dict[str, Buffer]) -> Array:
    sums = _convolved(now[own.source], own, _largest(own.weights, buffers[own.source]))
    return _scaled(sums, own.scale) + jnp.asarray(own.bias, jnp.int32)


def _largest(weights: np.ndarray, buffer: Buffer) -> int:
    """What no partial sum passes."""
    return int(np.abs(weights).sum(tuple(range(weights.ndim - 1))).max()) * buffer.largest


def _convolved(x: Array, own: ops.Convolve, largest: int) -> Array:
    """Sums of products; by float32, whose convolutions are fast, where every partial sum is a whole number of its."""
    dtype = jnp.float32 if largest < _EXACT else jnp.int32
    down, across = (own.dilation * (k - 1) // 2 for k in own.weights.shape[:2])
    y = lax.conv_general_dilated(
        x.astype(dtype),
        jnp.asarray(own.weights, dtype),
        (own.stride, own.stride),
        ((down, down), (across, across)),
        rhs_dilation=(own.dilation, own.dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=own.groups,
        precision=lax.Precision.HIGHEST,
    )
    return y.astype(jnp.int32)


@_made.register
def _(own: ops.Affine, now: Values, buffers: dict[str, Buffer]) -> Array:
    return _scaled(now[own.source], own.scale) + jnp.asarray(own.bias, jnp.int32)


@_made.register
def _(own: ops.Shift, now: Values, buffers: dict[str, Buffer]) -> Array:
    return now[own.source] << own.left


def _windows(x: Array, window: int, join: Any) -> Array:
    pad, (height, width) = window // 2, x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    rows = functools.reduce(join, (x[:, i : i + height] for i in range(window)))
    return functools.reduce(join, (rows[:, :, i : i + width] for i in range(window)))


@_made.register
def _(own: ops.AveragePool, now: Values, buffers: dict[str, Buffer]) -> Array:
    return _scaled(_windows(now[own.source], own.window, jnp.add), own.scale)


@_made.register
def _(own: ops.MaxPool, now: Values, buffers: dict[str, Buffer]) -> Array:
    return _windows(now[own.source], own.window, jnp.maximum) << own.left


def _blocks(x: Array, high: int, wide: int) -> Array:
    """Sums over blocks, [B, H/high, W/wide, C]."""
    batch, height, width, channels = x.shape
    rows, columns = height // high, width // wide
    x = x[:, : rows * high, : columns * wide].reshape(batch, rows, high, columns, wide, channels)
    return x.sum((2, 4))


@_made.register
def _(own: ops.Halve, now: Values, buffers: dict[str, Buffer]) -> Array:
    return (_blocks(now[own.source], 2, 2) + 2) >> 2


@_made.register
def _(own: ops.Count, now: Values, buffers: dict[str, Buffer]) -> Array:
    return _blocks(now[own.source], *own.side)


@_made.register
def _(own: ops.Linear, now: Values, buffers: dict[str, Buffer]) -> Array:
    x = now[own.source].reshape(len(now[own.source]), -1)
    # A dot of whole numbers in float32 would not be exact where counts are large.
    sums = jnp.einsum("bi,io->bo", x, jnp.asarray(own.weights, jnp.int32))
    return (_scaled(sums, own.scale) + jnp.asarray(own.bias, jnp.int32))[:, None, None]


@_made.register
def _(own: ops.Clear, now: Values, buffers: dict[str, Buffer]) -> Array:
    return jnp.zeros((len(next(iter(now.values()))), *buffers[own.target].shape), jnp.int32)
