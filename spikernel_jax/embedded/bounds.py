"""Proof that a program of integers cannot overflow: every instruction on intervals, channel by channel.

An interval holds all values that a buffer's channel can have for any image. Time steps are gone through one by one, so
what is kept from one to the next, a feedback that grows for example, is bounded by how many there are.
"""

import functools
from typing import Any, NamedTuple

import numpy as np

from spikernel_jax.embedded import program as ops
from spikernel_jax.embedded.program import Buffer, Instruction, Ints, Program, Scale

ACCUMULATOR = 32  # bits, with the sign, of sums and products
_ACCUMULATED = Buffer((1, 1, 1), ACCUMULATOR)


class Interval(NamedTuple):
    """Least and greatest values of each channel."""

    low: Ints  # [C]
    high: Ints


class TooWideError(ValueError):
    """A value may not fit.

    Attributes:
      buffer: that is written.
    """

    def __init__(self, buffer: str, bits: int):
        """Says where."""
        super().__init__(f"{buffer}: a value may need more than {bits} bits")
        self.buffer = buffer


def check(program: Program) -> dict[str, Interval]:
    """Intervals of every buffer, over all time steps and images.

    Raises:
      TooWideError: if a value may not fit its buffer, or a product or sum 32 bits.
    """
    table = Interval(program.table.min(0), program.table.max(0))
    now = {"image": table}
    ever: dict[str, Interval] = dict(now)

    def go(instructions: tuple[Instruction, ...]) -> None:
        for own in instructions:
            for name, found in _after(own, now, program.buffers).items():
                found = _held(found, program.buffers[name], name)
                now[name] = found
                ever[name] = _hull(ever[name], found) if name in ever else found

    for name, buffer in program.buffers.items():
        if buffer.kept:
            zeros = np.zeros(buffer.shape[2], np.int64)
            now[name] = ever[name] = Interval(zeros, zeros)
    go(program.once)
    for _ in range(program.time_steps):
        go(program.step)
    go(program.end)
    return ever


def _held(found: Interval, buffer: Buffer, name: str) -> Interval:
    """What is in a buffer after it was written."""
    least, most = buffer.range
    if buffer.clips:
        return Interval(found.low.clip(least, most), found.high.clip(least, most))
    if found.low.min() < least or found.high.max() > most:
        raise TooWideError(name, buffer.bits)
    return found


def _fits(found: Interval, name: str) -> Interval:
    """A sum or product, which has 32 bits."""
    return _held(found, _ACCUMULATED, name)


def _hull(one: Interval, other: Interval) -> Interval:
    return Interval(np.minimum(one.low, other.low), np.maximum(one.high, other.high))


def _times(own: Interval, factor: Any) -> Interval:
    """A product, of channels or numbers; the sign of a factor may turn an interval."""
    ends = own.low * factor, own.high * factor
    return Interval(np.minimum(*ends), np.maximum(*ends))


def _plus(own: Interval, other: Any) -> Interval:
    low, high = (other.low, other.high) if isinstance(other, Interval) else (other, other)
    return Interval(own.low + low, own.high + high)


def _scaled(own: Interval, scale: Scale, name: str) -> Interval:
    product = _plus(_times(own, scale.multiplier), half(scale.shift))
    _fits(product, name)
    return Interval(product.low >> scale.shift, product.high >> scale.shift)


def half(shift: Any) -> Any:
    """What rounds half up before a shift to the right."""
    return np.where(shift > 0, 1 << np.maximum(shift - 1, 0), 0)


def _after(own: Instruction, now: dict[str, Interval], buffers: dict[str, Buffer]) -> dict[str, Interval]:
    """Intervals of the buffers that an instruction writes."""
    if isinstance(own, ops.Fire):
        return _fire(own, now, buffers[own.target].most)
    made = _made(own, now, buffers)
    if own.add:
        made = _fits(_plus(made, now[own.target]), own.target)
    return {own.target: made}


def _fire(own: ops.Fire, now: dict[str, Interval], most: int) -> dict[str, Interval]:
    x, v = now[own.source], now[own.state]
    drive = _plus(x, _times(_plus(v, -own.reset), -1))
    product = _plus(_times(drive, own.leak), half(own.leak_shift))
    _fits(product, own.target)
    # Before the shift v · (2^s - leak) + (x + reset) · leak: both terms at their ends, which v alone is not.
    unit = 1 << own.leak_shift
    mixed = _plus(_times(v, unit - own.leak), _times(_plus(x, own.reset), own.leak))
    mixed = _plus(mixed, half(own.leak_shift))
    charged = Interval(mixed.low >> own.leak_shift, mixed.high >> own.leak_shift)
    _fits(charged, own.target)
    spikes = Interval(*((end // own.threshold).clip(0, most) for end in charged))
    if own.soft:
        # What is left grows with what was charged but for where there is a spike more: up to one below the threshold,
        # down to 0.
        low, high = (end - number * own.threshold for end, number in zip(charged, spikes, strict=True))
        more = spikes.high > spikes.low
        after = Interval(
            np.where(more, np.minimum(low, 0), low), np.where(more, np.maximum(high, own.threshold - 1), high)
        )
    else:
        fires, rests = spikes.high > 0, spikes.low == 0
        low, high = np.where(rests, charged.low, own.reset), np.minimum(charged.high, own.threshold - 1)
        after = Interval(
            np.where(fires, np.minimum(low, own.reset), low),
            np.where(fires, np.where(rests, np.maximum(high, own.reset), own.reset), high),
        )
    return {own.target: spikes, own.state: after}


@functools.singledispatch
def _made(own: Instruction, now: dict[str, Interval], buffers: dict[str, Buffer]) -> Interval:
    raise TypeError(type(own).__name__)


@_made.register
def _(own: ops.Convolve, now: dict[str, Interval], buffers: dict[str, Buffer]) -> Interval:
    x = now[own.source]
    channels = own.weights.shape[3]
    if own.groups > 1:  # depthwise: each channel reads itself
        low, high = (np.broadcast_to(end, (1, 1, 1, channels)) for end in x)
    else:
        low, high = (end[None, None, :, None] for end in x)
    # Padding is zero, so each tap may give nothing.
    ends = np.stack([own.weights * low, own.weights * high, np.zeros_like(own.weights)])
    sums = Interval(ends.min(0).sum((0, 1, 2)), ends.max(0).sum((0, 1, 2)))
    _fits(sums, own.target)
    return _plus(_scaled(sums, own.scale, own.target), own.bias)


@_made.register
def _(own: ops.Affine, now: dict[str, Interval], buffers: dict[str, Buffer]) -> Interval:
    return _plus(_scaled(now[own.source], own.scale, own.target), own.bias)


@_made.register
def _(own: ops.Shift, now: dict[str, Interval], buffers: dict[str, Buffer]) -> Interval:
    return _fits(_times(now[own.source], 1 << own.left), own.target)


@_made.register
def _(own: ops.AveragePool, now: dict[str, Interval], buffers: dict[str, Buffer]) -> Interval:
    x, places = now[own.source], own.window**2
    sums = Interval(np.minimum(x.low * places, 0), np.maximum(x.high * places, 0))  # padding is zero
    return _scaled(_hull(sums, x), own.scale, own.target)


@_made.register
def _(own: ops.MaxPool, now: dict[str, Interval], buffers: dict[str, Buffer]) -> Interval:
    return _times(now[own.source], 1 << own.left)


@_made.register
def _(own: ops.Halve, now: dict[str, Interval], buffers: dict[str, Buffer]) -> Interval:
    sums = _fits(_plus(_times(now[own.source], 4), 2), own.target)
    return Interval(sums.low >> 2, sums.high >> 2)


@_made.register
def _(own: ops.Count, now: dict[str, Interval], buffers: dict[str, Buffer]) -> Interval:
    return _fits(_times(now[own.source], own.side[0] * own.side[1]), own.target)


@_made.register
def _(own: ops.Linear, now: dict[str, Interval], buffers: dict[str, Buffer]) -> Interval:
    height, width, _ = buffers[own.source].shape
    low, high = (np.tile(end, height * width)[:, None] for end in now[own.source])
    ends = np.stack([own.weights * low, own.weights * high])
    # Partial sums are within the sum of what pulls down, and of what pulls up.
    sums = Interval(np.minimum(ends.min(0), 0).sum(0), np.maximum(ends.max(0), 0).sum(0))
    _fits(sums, own.target)
    return _plus(_scaled(sums, own.scale, own.target), own.bias)


@_made.register
def _(own: ops.Clear, now: dict[str, Interval], buffers: dict[str, Buffer]) -> Interval:
    zeros = np.zeros(buffers[own.target].shape[2], np.int64)
    return Interval(zeros, zeros)
