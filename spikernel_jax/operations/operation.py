"""What an edge of a cell may hold: an operation as a value, and the registry of their names.

A search space names its operations; what a name stands for, in every room from the listing of cells to a model's cost,
is the `Operation` that is registered under it.
"""

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from numpy.typing import NDArray

Array = jax.Array

ZERO, IDENTITY, LINEAR, GENERIC = KINDS = ("zero", "identity", "linear", "generic")
_NAME = re.compile(r"[a-z][a-z0-9_]*([@~][0-9]+(\.[0-9]+)?)*")


class Layer(NamedTuple):
    """Parameters of one layer: a convolution of stride 1 that keeps the size, a linear layer, or a norm alone.

    Example:
      >>> from spikernel_jax import Layer
      >>> Layer((3, 3, 16, 16), 16).parameters  # with batch norm
      2336
      >>> Layer((5, 5, 1, 16), 16, norm=False, groups=16).weights  # depthwise
      400
    """

    shape: tuple[int, ...]  # of the weights, [k_h, k_w, C_in / groups, C_out] or [in, out]; () where there are none
    channels: int  # that come out
    norm: bool = True  # batch norm behind it: a scale and a bias a channel
    bias: bool = False  # where there is no norm
    dilation: int = 1
    groups: int = 1  # of channels that do not mix; as many as channels is depthwise

    @property
    def weights(self) -> int:
        """How many, without norm and bias."""
        return math.prod(self.shape) if self.shape else 0

    @property
    def parameters(self) -> int:
        """How many, all together."""
        return self.weights + (2 * self.channels if self.norm else self.channels * self.bias)


Layers = Mapping[str, Layer]  # part -> layer, in the order in which data go through them


class Edge(Protocol):
    """What an operation finds on the edge that it works on."""

    def weights(self, part: str = "") -> Array:
        """Weights of one of the operation's layers."""
        ...

    def norm(self, y_TBHWC: Array, part: str = "") -> Array:
        """Batch norm of one of the operation's layers."""
        ...


Apply = Callable[[Edge, Array], Array]  # x [T, B, H, W, C] -> y of the same shape
Size = tuple[int, int]


def _no_layers(channels: int) -> Layers:
    return {}


@dataclasses.dataclass(frozen=True)
class Operation:
    """What one edge does to what leaves its source node.

    Attributes:
      name: as genotypes write it: a letter, then letters, digits and underscores; ``@`` and ``~`` introduce numbers.
      kind: what canonical forms may do with it. ``"zero"`` is no edge; ``"identity"`` hands on its input;
        ``"linear"`` commutes with sums, holds no parameters, and is the same map on every edge, so its powers compose;
        ``"generic"`` is a function of its own on every edge.
      apply: (edge, x) -> y, both [T, B, H, W, C], every time step for itself; pure.
      layers: width C -> the layers whose parameters each edge owns.
      reads_spikes: whether x are the source node's spikes, else its current; a generic operation's alone.
      threshold: of the LIF that it reads its source node through; None is the network's.
      tau: time constant of that LIF, likewise. Operations that leave one node share a LIF if both agree.
      fan_out: (size, C) -> connections that one spike drives, int64 [H, W] by place: its synaptic operations.
      macs: (size, C) -> multiply-accumulates of one image and time step beside those, of layers that read no spikes.
      flops: arithmetic of one output value beside its layers' multiply-adds, for the count of necessary work.
      primitive: what an exporter writes: ``"layers"``, one after another, ``"identity"``, ``"average_pool"`` or
        ``"max_pool"`` of `window`; ``""`` where `apply` alone knows.
      window: of a pooling.

    Raises:
      ValueError: naming the field, its value, and what would be right.

    Example:
      >>> from spikernel_jax import get_operation
      >>> conv = get_operation("conv3@0.5")
      >>> conv.kind, conv.threshold, conv.layers(16)[""].parameters
      ('generic', 0.5, 2336)
    """

    name: str
    kind: str
    apply: Apply
    layers: Callable[[int], Layers] = _no_layers
    reads_spikes: bool = False
    threshold: float | None = None
    tau: float | None = None
    fan_out: Callable[[Size, int], NDArray[np.int64]] = lambda size, channels: np.zeros(size, np.int64)
    macs: Callable[[Size, int], int] = lambda size, channels: 0
    flops: int = 0
    primitive: str = ""
    window: int = 0

    def __post_init__(self) -> None:
        """Refuses what no edge can hold."""
        if not (isinstance(self.name, str) and _NAME.fullmatch(self.name)):
            raise ValueError(f"name={self.name!r}: want a small letter, then letters, digits or _, such as 'conv3'")
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} of {self.name!r} is unknown; known: {', '.join(KINDS)}")
        if self.kind != GENERIC and (self.reads_spikes or self.layers(1)):
            raise ValueError(
                f"kind={self.kind!r} of {self.name!r}: an operation that reads spikes or has parameters is 'generic'"
            )
        for field, least in (("threshold", 0.0), ("tau", 1.0)):
            value = getattr(self, field)
            if value is None:
                continue
            if not self.reads_spikes:
                raise ValueError(f"{field}={value} of {self.name!r}: it reads no spikes, so no LIF; give None")
            if not (math.isfinite(value) and value > least):
                raise ValueError(f"{field}={value} of {self.name!r} must be finite and above {least:g}")

    def weights(self, channels: int) -> int:
        """How many weights its layers have at a width, without norms and biases."""
        return sum(layer.weights for layer in self.layers(channels).values())

    @property
    def neuron(self) -> tuple[float | None, float | None] | None:
        """Threshold and time constant of its LIF; None where it reads no spikes."""
        return (self.threshold, self.tau) if self.reads_spikes else None


Family = Callable[[re.Match[str]], Operation]
_FAMILIES: dict[re.Pattern[str], Family] = {}
_REGISTERED: dict[str, Operation] = {}
_EXAMPLES = ("conv3", "conv5@0.5", "conv3~2.0", "conv3d2", "conv1x5", "dwconv5", "avgpool", "avgpool5", "maxpool3")


def register_operation(operation: Operation) -> Operation:
    """Makes an operation known under its name, to every space, script and checkpoint of this process.

    Returns:
      The operation.

    Raises:
      ValueError: if the name is taken.

    Example:
      >>> from spikernel_jax import CellSpace, Operation, register_operation
      >>> flipped = register_operation(Operation("flip_width", "linear", lambda edge, x: x[..., ::-1, :]))
      >>> CellSpace(operations=("zero", "skip", "flip_width")).num_ops
      3
    """
    if not isinstance(operation, Operation):
        raise ValueError(f"operation is {operation!r}: want an Operation")
    if operation.name in _REGISTERED or any(pattern.fullmatch(operation.name) for pattern in _FAMILIES):
        raise ValueError(f"operation {operation.name!r} is registered already: give it another name")
    _REGISTERED[operation.name] = operation
    return operation


def register_family(pattern: str) -> Callable[[Family], Family]:
    """Makes all operations known whose names match a pattern, as ``conv3``, ``conv5@0.5``.

    The decorated function makes one of the match. Its name is the canonical one of its spellings (``conv3@1`` is
    ``conv3@1.0``).
    """

    def add(family: Family) -> Family:
        _FAMILIES[re.compile(pattern)] = family
        return family

    return add


def get_operation(name: str) -> Operation:
    """The operation of that name.

    Raises:
      ValueError: naming the nearest known ones.

    Example:
      >>> from spikernel_jax import get_operation
      >>> get_operation("conv3@1").name  # as it is written best
      'conv3@1.0'
      >>> get_operation("conv33")
      Traceback (most recent call last):
          ...
      ValueError: operation 'conv33': want odd sizes from 1 to 15, such as conv3
    """
    if isinstance(name, str) and (known := _REGISTERED.get(name) or _of_family(name)):
        return known
    known_names = (*_REGISTERED, *_EXAMPLES)
    near = difflib.get_close_matches(str(name), known_names, n=1, cutoff=0.3)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"operation {name!r} is unknown: {hint}known are {', '.join(known_names)}")


@functools.cache  # so that one name is one value
def _of_family(name: str) -> Operation | None:
    for pattern, family in _FAMILIES.items():
        if match := pattern.fullmatch(name):
            made = family(match)
            return made if made.name == name else _of_family(made.name)
    return None


def registered() -> tuple[str, ...]:
    """Names that are registered one by one."""
    return tuple(_REGISTERED)


def edge_name(operation: str, part: str) -> str:
    """Name of an operation's layer on an edge: ``conv3``, ``dwconv5.depthwise``."""
    return f"{operation}.{part}" if part else operation


def export_facts(operation: Operation, channels: int) -> dict[str, Any]:
    """What an exporter needs to know of an operation at a width, in plain types."""
    return {
        "name": operation.name,
        "primitive": operation.primitive,
        "window": operation.window,
        "reads_spikes": operation.reads_spikes,
        "threshold": operation.threshold,
        "tau": operation.tau,
        "layers": {part: layer._asdict() for part, layer in operation.layers(channels).items()},
    }
