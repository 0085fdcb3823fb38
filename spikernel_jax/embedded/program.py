"""A network as a program of integers: instructions on named buffers, once an image, at every time step, and at the end.

Every number is a whole one. A buffer of currents or membranes holds values in units of 2^-f, f being its fraction; one
of spikes holds how many of them each neuron fires. Where a scale comes in, it is a multiplier and a shift to the right,
rounded half up::

    scaled(x) = (x · multiplier + 2^(shift - 1)) >> shift

(no half where the shift is 0; >> rounds down). A buffer that clips keeps the nearest value that its width has, whenever
it is written. Every product and sum fits 32 bits with its sign, and every other buffer its width: `bounds.check` proves
both for all images.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Buffer(NamedTuple):
    """Where values are.

    Attributes:
      shape: (height, width, channels).
      bits: that a value may have, with its sign; 1 of spikes, which have none.
      most: of spikes, how many a neuron fires in a time step at most; it has as many bits, the n-th set where it fired
        at least n times, so that each bit is one spike.
      fraction: bits behind the point.
      kept: whether it lives from one time step to the next; zero before the first one.
      clips: whether what is written is first brought to what its bits can say.
    """

    shape: tuple[int, int, int]
    bits: int
    fraction: int = 0
    kept: bool = False
    clips: bool = False
    most: int = 1

    @property
    def spiking(self) -> bool:
        """Whether it holds spikes."""
        return self.bits == 1

    @property
    def range(self) -> tuple[int, int]:
        """Least and greatest value."""
        return (0, self.most) if self.spiking else (-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)

    @property
    def largest(self) -> int:
        """Magnitude that no value passes."""
        return max(map(abs, self.range))


class Scale(NamedTuple):
    """Of each channel: value -> (value · multiplier + half) >> shift."""

    multiplier: Ints  # [C]
    shift: Ints  # [C]


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    """Reads one buffer and writes, or where `add` says so adds to, another."""

    source: str
    target: str
    add: bool = dataclasses.field(default=False, kw_only=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Convolve(Instruction):
    """SAME convolution, scaled, plus a bias; weights [k_h, k_w, C_in / groups, C_out]."""

    weights: Ints
    scale: Scale
    bias: Ints
    stride: int = 1
    dilation: int = 1
    groups: int = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Affine(Instruction):
    """Scaled, plus a bias, channel by channel."""

    scale: Scale
    bias: Ints


@dataclasses.dataclass(frozen=True, eq=False)
class Shift(Instruction):
    """The same values, shifted to the left."""

    left: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class AveragePool(Instruction):
    """Sum over a window around each place, zero beyond the border, scaled."""

    window: int
    scale: Scale


@dataclasses.dataclass(frozen=True, eq=False)
class MaxPool(Instruction):
    """Most spikes of a neuron in the window around each place, shifted to the left."""

    window: int
    left: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Halve(Instruction):
    """Mean over 2 by 2 places, rounded half up; a row or column that is left over is dropped."""


@dataclasses.dataclass(frozen=True, eq=False)
class Count(Instruction):
    """Sum over `side` by `side` places; what is left over is dropped."""

    side: tuple[int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Linear(Instruction):
    """All values of the source, row by row, times weights [in, out], scaled, plus a bias."""

    weights: Ints
    scale: Scale
    bias: Ints


@dataclasses.dataclass(frozen=True, eq=False)
class Clear(Instruction):
    """Zeros; reads nothing."""


@dataclasses.dataclass(frozen=True, eq=False)
class Fire(Instruction):
    """A LIF layer: v += scaled(x - (v - reset)); a spike where v >= threshold.

    Where the target's neurons fire more than once, `soft`, what is left of v may be another spike.

    Attributes:
      state: buffer of the membranes v, which becomes `reset` where a neuron fires, or threshold less if `soft`.
      leak: of the drive, 1/tau, in units of 2^-`leak_shift`.
    """

    state: str
    leak: int
    leak_shift: int
    threshold: int
    reset: int
    soft: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """What a device runs for one image.

    Attributes:
      table: what a pixel from 0 to 255 stands for, [256, C_image], in units of 2^-`buffers["image"].fraction`.
      buffers: by name; ``"image"`` is filled from the table, ``"logits"`` holds what comes out, [1, 1, classes].
      once: before the first time step.
      step: at each.
      end: after the last.
      time_steps: T.
      bits: width of weights.
      logit: what one unit of the logits is worth.
    """

    table: Ints
    buffers: dict[str, Buffer]
    once: tuple[Instruction, ...]
    step: tuple[Instruction, ...]
    end: tuple[Instruction, ...]
    time_steps: int
    bits: int
    logit: float

    @property
    def sites(self) -> tuple[str, ...]:
        """LIF layers, in the order in which they fire."""
        return tuple(own.target for own in self.step if isinstance(own, Fire))
