"""The macro-architecture as a frozen specification: sizes, layers and neuron sites in closed form."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from spikernel_jax.cells.canonical import FIRST_CONV, SKIP, ZERO
from spikernel_jax.cells.space import CellSpace
from spikernel_jax.io.checks import require_known, whole
from spikernel_jax.snn.neurons import NeuronSpec
from spikernel_jax.snn.operations import NORMS

HEADS = ("snasnet", "gap")
SHORTCUTS = ("membrane", "spike")
CELLS: tuple[str, str] = ("cell1", "cell2")
Codes = Sequence[Any]  # one operation code an edge: ints (fixed genotype) or traced scalars


class Layer(NamedTuple):
    """Shapes of one layer's parameters; `kernel` is 0 where the layer is a norm only."""

    kernel: int
    c_in: int
    c_out: int
    norm: bool
    bias: bool


class Site(NamedTuple):
    """A LIF layer: its neurons in one image, and for how many edges that read spikes it stands.

    Edges that leave the same node see the same LIF output, so one site serves them all; SNASNet has
    a LIF for every conv edge, hence `calls` (an int, or traced) in everything that counts LIF calls.
    """

    neurons: int
    calls: Any


_RANGES = {
    "channels": (1, 65_536),
    "time_steps": (1, 10_000),
    "num_classes": (2, 1_000_000),
    "stem_stride": (1, 2),
    "head_pool": (1, 4096),
    "head_hidden": (1, 1_000_000),
    "neurons_per_class": (1, 10_000),
}


@dataclasses.dataclass(frozen=True)
class NetworkSpec:
    """The network around the cells (stem, two cells, transition, head); hashable, static under ``jit``.

    Attributes:
      image_shape: (height, width, channels) of an image.
      num_classes: number of classes.
      space: the cell space whose codes genotypes are written in.
      channels: C, the width of cell 1; cell 2 has 2C.
      time_steps: T.
      neuron: every neuron of the network.
      stem_stride: 1, or 2 for large images (SNASNet on TinyImageNet).
      norm: batch norm ``"per_step"`` (SNASNet) or ``"over_time"`` (tdBN; forward cells only).
      head: ``"snasnet"`` (linear, LIF, linear, mean over each class's neurons) or ``"gap"``
        (global average pooling, linear).
      head_pool: the last average pooling p of the snasnet head.
      head_hidden: hidden neurons of the snasnet head.
      neurons_per_class: output neurons a class of the snasnet head.
      dropout: rate before the head's first linear layer, one mask for all time steps.
      shortcut: what skips and average pooling hand on of their source node: its current, ``"membrane"``
        (SNASNet), or its LIF's spikes, ``"spike"`` (spike-element-wise addition: Fang et al., NeurIPS 2021).

    Raises:
      ValueError: naming the field, its value, and what would be right.

    Example:
      >>> from spikernel_jax import CellSpace, NetworkSpec
      >>> spec = NetworkSpec((32, 32, 3), 10, CellSpace((3, 5)), channels=16, time_steps=4)
      >>> spec.cell_size(0), spec.cell_size(1)
      ((32, 32), (16, 16))
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    space: CellSpace = CellSpace()
    channels: int = 16
    time_steps: int = 5
    neuron: NeuronSpec = NeuronSpec()
    stem_stride: int = 1
    norm: str = "per_step"
    head: str = "gap"
    head_pool: int = 2
    head_hidden: int = 128
    neurons_per_class: int = 10
    dropout: float = 0.0
    shortcut: str = "membrane"

    def __post_init__(self) -> None:
        """Refuses what no network can be."""
        if len(tuple(self.image_shape)) != 3:
            raise ValueError(f"image_shape={self.image_shape} must be (height, width, channels), each >= 1")
        shape = tuple(whole(f"image_shape={tuple(self.image_shape)}: side", n, 1, 4096) for n in self.image_shape)
        object.__setattr__(self, "image_shape", shape)
        for name, (least, most) in _RANGES.items():  # as Python's ints: NumPy's narrow ones overflow in products
            object.__setattr__(self, name, whole(name, getattr(self, name), least, most))
        require_known(self, norm=NORMS, head=HEADS, shortcut=SHORTCUTS)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")
        if self.norm == "over_time" and self.space.feedback:
            raise ValueError(
                "norm='over_time' needs all time steps at once, but feedback cells run step by step: "
                "give norm='per_step'"
            )
        if min(self.cell_size(1)) < 1 or (self.head == "snasnet" and min(self.pooled_size) < 1):
            raise ValueError(
                f"image_shape={self.image_shape} is too small for stem_stride={self.stem_stride} and "
                f"head_pool={self.head_pool}: cell 2 works on {self.cell_size(1)}"
            )

    def cell_size(self, cell: int) -> tuple[int, int]:
        """(height, width) of cell 0 or 1."""
        h, w = (-(-side // self.stem_stride) for side in self.image_shape[:2])
        return (h // 2, w // 2) if cell else (h, w)

    def cell_channels(self, cell: int) -> int:
        """Channels of cell 0 or 1."""
        return self.channels * (cell + 1)

    @property
    def pooled_size(self) -> tuple[int, int]:
        """(height, width) that the snasnet head flattens."""
        h, w = self.cell_size(1)
        return h // self.head_pool, w // self.head_pool

    @property
    def features(self) -> int:
        """Inputs of the head's first linear layer, which dropout acts on."""
        h, w = self.pooled_size if self.head == "snasnet" else (1, 1)
        return h * w * self.cell_channels(1)

    @property
    def outputs(self) -> int:
        """Output neurons of the head."""
        return self.num_classes * (self.neurons_per_class if self.head == "snasnet" else 1)

    def codes(self, genotype: Any) -> tuple[Codes, Codes]:
        """The two cells' codes: one row [E] serves both cells, a pair of rows [2, E] gives each its own.

        A NumPy array, tuple or list is a fixed genotype (Python ints come out); a jax array, traced or
        not, gives traced scalars. A jax array [E, num_ops] is a mixture for both cells: every edge the sum
        of all operations by these weights, of which those of weight 0 do not exist.

        Raises:
          ValueError: on a wrong length.
        """
        rows = genotype if hasattr(genotype, "ndim") else np.asarray(genotype)
        edges = len(self.space.edges)
        if not isinstance(rows, np.ndarray) and rows.shape == (edges, self.space.num_ops):
            return rows, rows
        if rows.shape not in ((edges,), (2, edges)):
            raise ValueError(
                f"genotype has shape {rows.shape}; a cell of this space has {edges} edges: "
                f"give [{edges}], or [2, {edges}] for two cells"
            )
        pair = (rows, rows) if rows.ndim == 1 else (rows[0], rows[1])
        if isinstance(rows, np.ndarray):
            for row in pair:
                self.space.validate(row)
            return pair[0].tolist(), pair[1].tolist()
        return pair  # pyright: ignore[reportReturnType]

    def is_conv(self, code: Any) -> Any:
        """Whether a code is a convolution; bool for an int, elementwise for an array, traced or not."""
        return (code >= FIRST_CONV) & (code < self.space.avgpool)

    def reads_spikes(self, code: Any) -> Any:
        """Whether an operation reads its source node's LIF; bool for an int, elementwise for an array."""
        return code != ZERO if self.shortcut == "spike" else self.is_conv(code)

    def lif_calls(self, code: Any) -> Any:
        """How many operations of an edge read spikes: 0 or 1 for a code, for a mixture's weights those above 0."""
        if np.ndim(code) == 1:
            read = code[SKIP:] if self.shortcut == "spike" else code[FIRST_CONV : self.space.avgpool]
            return (read > 0).sum()
        return self.reads_spikes(code) + 0

    def fixed_layers(self) -> dict[str, Layer]:
        """Layers outside the cells, without what LIF layers learn."""
        c, c2, c_image = self.channels, 2 * self.channels, self.image_shape[2]
        layers = {
            "stem": Layer(3, c_image, c, norm=True, bias=False),
            "transition.in": Layer(0, c, c, norm=True, bias=False),
            "transition.conv": Layer(3, c, c2, norm=True, bias=False),
            "last": Layer(0, c2, c2, norm=True, bias=False),
        }
        if self.head == "snasnet":
            layers["head.hidden"] = Layer(1, self.features, self.head_hidden, norm=False, bias=False)
            layers["head.out"] = Layer(1, self.head_hidden, self.outputs, norm=False, bias=True)
        else:
            layers["head.out"] = Layer(1, self.features, self.outputs, norm=False, bias=True)
        return layers

    def layers(self, genotype: Any = None) -> dict[str, Layer]:
        """Every layer that has weights or a norm, by name: of one genotype, or of the whole bank if None.

        The bank holds one convolution for each (cell, edge, kernel size), named like
        ``cell1.e01.conv3``; a genotype's layers are a subset of the bank's. What LIF layers learn
        (`NeuronSpec.learned`) comes on top, for each of `sites`.
        """
        layers = self.fixed_layers()
        pair = (None, None) if genotype is None else self.codes(genotype)
        for index, (cell, codes) in enumerate(zip(CELLS, pair, strict=True)):
            c = self.cell_channels(index)
            for position, edge in enumerate(self.space.edges):
                for k in self.space.kernel_sizes:
                    if codes is None or codes[position] == self.space.conv_code(k):
                        layers[layer_name(cell, edge, k)] = Layer(k, c, c, norm=True, bias=False)
        return layers

    def sites(self, genotype: Any = None) -> dict[str, Site]:
        """Every LIF layer by name, for a fixed or a traced genotype, or of the whole bank if None."""
        sites = {}
        every = (FIRST_CONV,) * len(self.space.edges)  # in the bank, every edge can read spikes
        pair = (every, every) if genotype is None else self.codes(genotype)
        for index, (cell, codes) in enumerate(zip(CELLS, pair, strict=True)):
            h, w = self.cell_size(index)
            c = self.cell_channels(index)
            for node in range(4):
                calls = sum(
                    self.lif_calls(code)
                    for code, (source, _) in zip(codes, self.space.edges, strict=True)
                    if source == node
                )
                sites[f"{cell}.node{node}"] = Site(h * w * c, calls)
            sites[("transition", "last")[index]] = Site(h * w * c, 1)
        if self.head == "snasnet":
            sites["head"] = Site(self.head_hidden, 1)
        return {name: s for name, s in sites.items() if not (isinstance(s.calls, int) and s.calls == 0)}


def layer_name(cell: str, edge: tuple[int, int], kernel_size: int) -> str:
    """Name of a convolution's parameters: ``cell1.e01.conv3``."""
    return f"{cell}.e{edge[0]}{edge[1]}.conv{kernel_size}"


def spec_to_json(spec: NetworkSpec) -> dict[str, Any]:
    """The specification as plain JSON types."""
    return dataclasses.asdict(spec)


def spec_from_json(fields: dict[str, Any]) -> NetworkSpec:
    """The specification that `spec_to_json` wrote; ValueError or TypeError where fields are wrong."""
    space = CellSpace(**{**fields["space"], "kernel_sizes": tuple(fields["space"]["kernel_sizes"])})
    return NetworkSpec(**{**fields, "space": space, "neuron": NeuronSpec(**fields["neuron"])})
