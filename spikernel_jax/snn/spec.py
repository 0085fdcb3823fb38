"""The macro-architecture as a frozen specification: sizes, layers and neuron sites in closed form."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from spikernel_jax.cells.canonical import NOTHING
from spikernel_jax.cells.space import CellSpace
from spikernel_jax.io.checks import require_known, whole
from spikernel_jax.operations.operation import Layer, Operation, edge_name
from spikernel_jax.snn.layers import NORMS
from spikernel_jax.snn.neurons import NeuronSpec

HEADS = ("snasnet", "gap")
SHORTCUTS = ("membrane", "spike")
CELLS: tuple[str, str] = ("cell1", "cell2")
Codes = Sequence[Any]  # one operation code an edge: ints (fixed genotype) or traced scalars


class Site(NamedTuple):
    """A LIF layer: its neurons in one image, and for how many edges that read spikes it stands.

    Edges that leave the same node through equal neurons see the same LIF output, so one site serves them all; SNASNet
    has a LIF for every conv edge, hence `calls` (an int, or traced) in everything that counts LIF calls.
    """

    neurons: int
    calls: Any
    neuron: NeuronSpec


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
        _readers(self)  # refuses operations whose neurons cannot be

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
        if self.is_mixture(genotype):
            return rows, rows  # pyright: ignore[reportReturnType]
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

    def is_mixture(self, genotype: Any) -> bool:
        """Whether a genotype is a mixture, as `codes` takes it."""
        shape = (len(self.space.edges), self.space.num_ops)
        return hasattr(genotype, "ndim") and not isinstance(genotype, np.ndarray) and genotype.shape == shape

    def in_use(self, genotype: Any) -> dict[str, Any]:
        """Whether each layer of the bank's edges is a traced genotype's: bool scalars by name."""
        used = {}
        for cell, codes in zip(CELLS, self.codes(genotype), strict=True):
            for position, edge in enumerate(self.space.edges):
                for code, name in enumerate(self.space.operations):
                    for part in self.space.operation(code).layers(self.channels):
                        used[layer_name(cell, edge, name, part)] = codes[position] == code
        return used

    @property
    def readers(self) -> "tuple[Reader, ...]":
        """The LIFs that operations of the space read a node through: one, unless some have neurons of their own."""
        return _readers(self)

    def reader_of(self, code: int) -> "Reader | None":
        """The LIF that an operation reads a node through; None where it reads the current."""
        return next((own for own in self.readers if own.codes[code]), None)

    def held(self, genotype: Any, cell: int) -> dict[tuple[int, int], int]:
        """The edges of a cell of a fixed genotype that hold an operation, and its code."""
        edges = zip(self.space.edges, self.codes(genotype)[cell], strict=True)
        return {edge: int(code) for edge, code in edges if code}

    def fixed_layers(self) -> dict[str, Layer]:
        """Layers outside the cells, without what LIF layers learn."""
        c, c2, c_image = self.channels, 2 * self.channels, self.image_shape[2]
        layers = {
            "stem": Layer((3, 3, c_image, c), c),
            "transition.in": Layer((), c),
            "transition.conv": Layer((3, 3, c, c2), c2),
            "last": Layer((), c2),
        }
        if self.head == "snasnet":
            layers["head.hidden"] = Layer((self.features, self.head_hidden), self.head_hidden, norm=False)
            layers["head.out"] = Layer((self.head_hidden, self.outputs), self.outputs, norm=False, bias=True)
        else:
            layers["head.out"] = Layer((self.features, self.outputs), self.outputs, norm=False, bias=True)
        return layers

    def layers(self, genotype: Any = None) -> dict[str, Layer]:
        """Every layer that has weights or a norm, by name: of one genotype, or of the whole bank if None.

        The bank holds the layers of each (cell, edge, operation), named like ``cell1.e01.conv3`` or
        ``cell1.e01.dwconv5.pointwise``; a genotype's layers are a subset of the bank's. What LIF layers learn
        (`NeuronSpec.learned`) comes on top, for each of `sites`.
        """
        layers = self.fixed_layers()
        pair = (None, None) if genotype is None else self.codes(genotype)
        for index, (cell, codes) in enumerate(zip(CELLS, pair, strict=True)):
            of_codes = [self.space.operation(op).layers(self.cell_channels(index)) for op in range(self.space.num_ops)]
            for position, edge in enumerate(self.space.edges):
                for code in range(self.space.num_ops) if codes is None else (codes[position],):
                    for part, layer in of_codes[code].items():
                        layers[layer_name(cell, edge, self.space.operations[code], part)] = layer
        return layers

    def sites(self, genotype: Any = None) -> dict[str, Site]:
        """Every LIF layer by name, for a fixed or a traced genotype, or of the whole bank if None."""
        sites = {}
        pair = (None, None) if genotype is None else self.codes(genotype)
        for index, (cell, codes) in enumerate(zip(CELLS, pair, strict=True)):
            h, w = self.cell_size(index)
            c = self.cell_channels(index)
            for node in range(4):
                leaving = [i for i, (source, _) in enumerate(self.space.edges) if source == node]
                for reader in self.readers:  # in the bank, every edge can read spikes
                    calls = len(leaving) if codes is None else sum(reader.calls(codes[i]) for i in leaving)
                    sites[reader.site(cell, node)] = Site(h * w * c, calls, reader.neuron)
            sites[("transition", "last")[index]] = Site(h * w * c, 1, self.neuron)
        if self.head == "snasnet":
            sites["head"] = Site(self.head_hidden, 1, self.neuron)
        return {name: s for name, s in sites.items() if not (isinstance(s.calls, int) and s.calls == 0)}


@dataclasses.dataclass(frozen=True)
class Reader:
    """A LIF that operations read nodes through.

    Attributes:
      neuron: of it.
      codes: bool [num_ops], which codes of the space read through it.
      suffix: of its sites' names; empty for the network's own neuron.
    """

    neuron: NeuronSpec
    codes: tuple[bool, ...]
    suffix: str

    def site(self, cell: str, node: int) -> str:
        """Name of its LIF layer at a node: ``cell1.node0``, or ``cell1.node0@0.5`` of a threshold of its own."""
        return f"{cell}.node{node}{self.suffix}"

    def calls(self, code: Any) -> Any:
        """How many operations of an edge read through it: 0 or 1 for a code, for a mixture's weights those above 0."""
        if isinstance(code, int | np.integer):
            return int(self.codes[code])
        mask = jnp.asarray(self.codes)
        return ((code > 0) & mask).sum() if np.ndim(code) == 1 else mask[code] + 0


@functools.cache
def _readers(spec: NetworkSpec) -> tuple[Reader, ...]:
    """`NetworkSpec.readers`; ValueError for an operation whose neuron cannot be."""
    neurons = [_neuron_of(spec, code, spec.space.operation(code)) for code in range(spec.space.num_ops)]
    own = spec.neuron
    result = []
    for neuron in dict.fromkeys(neuron for neuron in neurons if neuron is not None):
        suffix = "" if neuron.v_threshold == own.v_threshold else f"@{neuron.v_threshold}"
        suffix += "" if neuron.tau == own.tau else f"~{neuron.tau}"
        result.append(Reader(neuron, tuple(other == neuron for other in neurons), suffix))
    return tuple(result)


def _neuron_of(spec: NetworkSpec, code: int, operation: Operation) -> NeuronSpec | None:
    if not operation.reads_spikes:
        return spec.neuron if spec.shortcut == "spike" and code != NOTHING else None
    given = {"v_threshold": operation.threshold, "tau": operation.tau}
    try:
        return dataclasses.replace(spec.neuron, **{name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        raise ValueError(f"operation {operation.name!r}: {error}") from None


def edge_prefix(cell: str, edge: tuple[int, int]) -> str:
    """What the names of all layers on an edge begin with: ``cell1.e01.``."""
    return f"{cell}.e{edge[0]}{edge[1]}."


def layer_name(cell: str, edge: tuple[int, int], operation: str, part: str = "") -> str:
    """Name of the parameters of an operation's layer: ``cell1.e01.conv3``."""
    return edge_prefix(cell, edge) + edge_name(operation, part)


def spec_to_json(spec: NetworkSpec) -> dict[str, Any]:
    """The specification as plain JSON types."""
    return dataclasses.asdict(spec)


def spec_from_json(fields: dict[str, Any]) -> NetworkSpec:
    """The specification that `spec_to_json` wrote; ValueError or TypeError where fields are wrong."""
    lists = {name: tuple(fields["space"].get(name, ())) for name in ("kernel_sizes", "operations")}
    space = CellSpace(**{**fields["space"], **lists})
    return NetworkSpec(**{**fields, "space": space, "neuron": NeuronSpec(**fields["neuron"])})
