"""The operations that are there from the start, most of them families of a size.

``zero``, ``skip`` and SNASNet's ``conv1``, ``conv3``, ``avgpool``; further

    conv5        LIF, 5×5 convolution, batch norm; any odd size up to 15
    conv1x5      1 pixel high and 5 wide
    conv3d2      dilated: its 3×3 taps lie 2 pixels apart
    dwconv5      depthwise-separable: LIF, 5×5 on each channel for itself, 1×1 over channels, batch norm
    maxpool3     LIF, maximum over 3×3: whether any neuron in the window fired
    avgpool5     average over 5×5; ``avgpool`` is that over 3×3

Whatever reads spikes can have a LIF of its own: ``conv3@0.5`` has threshold 0.5, ``conv3@0.5~2.0`` also tau = 2.

Sources: Kim et al., ECCV 2022 (SNASNet); Howard et al., 2017, arXiv 1704.04861 (depthwise-separable); Yu & Koltun, ICLR
2016 (dilated); Abdennadher et al., 2025, arXiv 2503.21846 (max pooling).
"""

import math
import re
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from spikernel_jax.operations import pooling
from spikernel_jax.operations.convolution import conv, taps
from spikernel_jax.operations.operation import (
    GENERIC,
    IDENTITY,
    LINEAR,
    ZERO,
    Array,
    Edge,
    Layer,
    Layers,
    Operation,
    Size,
    register_family,
    register_operation,
)

LARGEST_KERNEL = 15
_LIF = r"(?:@(?P<threshold>[0-9]+(?:\.[0-9]+)?))?(?:~(?P<tau>[0-9]+(?:\.[0-9]+)?))?"


def chain(layers: Callable[[int], Layers]) -> dict[str, Callable[..., object]]:
    """Fields of an operation that puts spikes through convolutions, one after another: all but its name.

    Args:
      layers: width C -> the convolutions in their order; a norm comes behind each that has one.

    Returns:
      ``apply``, ``layers``, ``fan_out`` (of the first, which reads spikes) and ``macs`` (of the others).

    Example:
      >>> from spikernel_jax import Layer, Operation, chain
      >>> layers = lambda c: {"a": Layer((1, 1, c, c), c), "b": Layer((3, 3, c, c), c)}
      >>> two = Operation("two_convs", "generic", reads_spikes=True, **chain(layers))
      >>> two.fan_out((5, 5), 8).max(), two.macs((5, 5), 8)  # 8 connections a spike; 169 taps within the image
      (np.int64(8), 10816)
    """

    def apply(edge: Edge, x_TBHWC: Array) -> Array:
        for part, layer in layers(x_TBHWC.shape[-1]).items():
            x_TBHWC = conv(x_TBHWC, edge.weights(part), dilation=layer.dilation, groups=layer.groups)
            x_TBHWC = edge.norm(x_TBHWC, part) if layer.norm else x_TBHWC
        return x_TBHWC

    def reached(layer: Layer, size: Size) -> NDArray[np.int64]:
        return taps(size, layer.shape[:2], dilation=layer.dilation)

    def fan_out(size: Size, channels: int) -> NDArray[np.int64]:
        first = next(iter(layers(channels).values()))
        return reached(first, size) * (first.shape[3] // first.groups)

    def macs(size: Size, channels: int) -> int:
        _, *others = layers(channels).values()
        return sum(int(reached(layer, size).sum()) * math.prod(layer.shape[2:]) for layer in others)

    return {"apply": apply, "layers": layers, "fan_out": fan_out, "macs": macs}


def _odd(match: re.Match[str], group: str, default: int | None = None) -> int:
    """A window's size from a name; ValueError where it is none."""
    size = int(match[group]) if match[group] else default
    if size is None or size % 2 == 0 or size > LARGEST_KERNEL:
        raise ValueError(f"operation {match[0]!r}: want odd sizes from 1 to {LARGEST_KERNEL}, such as conv3")
    return size


def _lif(match: re.Match[str]) -> tuple[str, float | None, float | None]:
    """What a name says of its LIF: as it is written best, threshold, time constant."""
    threshold, tau = (None if match[name] is None else float(match[name]) for name in ("threshold", "tau"))
    text = ("" if threshold is None else f"@{threshold}") + ("" if tau is None else f"~{tau}")
    return text, threshold, tau


register_operation(Operation("zero", ZERO, lambda edge, x: x * 0))
register_operation(Operation("skip", IDENTITY, lambda edge, x: x, primitive="identity"))


@register_family(r"(?P<depthwise>dw)?conv(?P<high>[1-9][0-9]*)(?:x(?P<wide>[1-9][0-9]*))?(?:d(?P<apart>[1-9]))?" + _LIF)
def convolution(match: re.Match[str]) -> Operation:
    """LIF, convolution, batch norm."""
    high = _odd(match, "high")
    wide = _odd(match, "wide", high)
    apart = int(match["apart"] or 1)
    lif, threshold, tau = _lif(match)
    # Names that stand for one and the same thing are written in one way.
    size = str(high) if high == wide else f"{high}x{wide}"
    far = f"d{apart}" if apart > 1 and max(high, wide) > 1 else ""

    def whole(channels: int) -> Layers:
        return {"": Layer((high, wide, channels, channels), channels, dilation=apart)}

    def separable(channels: int) -> Layers:
        return {
            "depthwise": Layer((high, wide, 1, channels), channels, norm=False, dilation=apart, groups=channels),
            "pointwise": Layer((1, 1, channels, channels), channels),
        }

    return Operation(
        f"{match['depthwise'] or ''}conv{size}{far}{lif}",
        GENERIC,
        reads_spikes=True,
        threshold=threshold,
        tau=tau,
        primitive="layers",
        **chain(separable if match["depthwise"] else whole),  # pyright: ignore[reportArgumentType]
    )


@register_family(r"avgpool(?P<window>[1-9][0-9]*)?")
def average_pooling(match: re.Match[str]) -> Operation:
    """Average over a window, zero padded."""
    window = _odd(match, "window", 3)
    return Operation(
        "avgpool" if window == 3 else f"avgpool{window}",
        LINEAR,
        lambda edge, x: pooling.average_pool(x, window),
        flops=2 * (window - 1) + 1,  # two passes, and the division
        primitive="average_pool",
        window=window,
    )


@register_family(r"maxpool(?P<window>[1-9][0-9]*)" + _LIF)
def max_pooling(match: re.Match[str]) -> Operation:
    """LIF, then the maximum over a window: whether a neuron there fired."""
    window = _odd(match, "window")
    lif, threshold, tau = _lif(match)
    return Operation(
        f"maxpool{window}{lif}",
        GENERIC,
        lambda edge, x: pooling.max_pool(x, window),
        reads_spikes=True,
        threshold=threshold,
        tau=tau,
        flops=2 * (window - 1),
        primitive="max_pool",
        window=window,
    )
