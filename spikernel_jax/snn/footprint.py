"""Bytes that a network takes as exported C, in closed form: what it only reads, and what it writes to.

Unlike `cost`, which counts everything at one width after the paper's fashion, this counts a program of integers as the
room `embedded` writes it::

    constants   weights of 2, 4 or 8 bits, the least that holds them, each row of outputs ending with a whole byte;
                7 bytes an output of every layer and norm (a multiplier, a shift, a bias); 2 a value of a pixel
    written     membranes, feedbacks and currents of 1 or 2 bytes; spikes, a bit for each that a neuron may
                fire in a time step, of whole words for each place;
                sums and counts of the head of 4. Of what does not outlive a time step, as much as is alive at the
                worst moment, for each type of C on its own.

Code and stack come on top. What is written here is a promise: tests hold the compiler's sections against it.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spikernel_jax.snn.cost import checked_genotypes, pairs
from spikernel_jax.snn.spec import CELLS, NetworkSpec

_WORD, _SUM = 4, 4  # bytes of 32 spikes, of a sum
_OF_OUTPUT = 7  # a multiplier of 2 bytes, a shift of 1, a bias of 4
_PRIMITIVES = ("identity", "average_pool", "max_pool", "layers")  # that C is written of


class Footprint(NamedTuple):
    """Bytes of genotypes' networks; every field int64 [n]."""

    constants: NDArray[np.int64]
    written: NDArray[np.int64]


def stored_bits(bits: int) -> int:
    """What a weight of so many bits takes in memory."""
    return next(own for own in (2, 4, 8) if bits <= own)


def unwritable(spec: NetworkSpec, genotype: ArrayLike) -> str:
    """Why a network has no program of integers, and so no C; empty where it has.

    Args:
      spec: the network.
      genotype: [E] or [2, E].

    Example:
      >>> from spikernel_jax import CellSpace, NetworkSpec, NeuronSpec
      >>> from spikernel_jax.snn.footprint import unwritable
      >>> spec = NetworkSpec((8, 8, 1), 2, CellSpace((3,)), neuron=NeuronSpec("spyx_lif", reset="soft"))
      >>> unwritable(spec, spec.space.parse("0>3:conv3"))
      "neuron 'spyx_lif' has no form of integers: want 'lif'"
    """
    if spec.neuron.model != "lif":
        return f"neuron {spec.neuron.model!r} has no form of integers: want 'lif'"
    for code in sorted({code for index in range(2) for code in spec.held(genotype, index).values()}):
        operation = spec.space.operation(code)
        of_currents = operation.primitive == "max_pool" and spec.reader_of(code) is None
        if of_currents or operation.primitive not in _PRIMITIVES:
            return f"operation {operation.name!r} has no form of integers: its primitive is {operation.primitive!r}"
    return ""


def footprints(spec: NetworkSpec, genotypes: ArrayLike, bits: int = 8, width: int = 8) -> Footprint:
    """Bytes of the C of each genotype.

    Args:
      spec: the network.
      genotypes: codes [n, E], or [n, 2, E] for two cells of their own.
      bits: of a weight, 2 to 8.
      width: of currents and membranes, 8 to 16.

    Raises:
      ValueError: on a wrong shape or width, rows that are no cells of the space, or what is `unwritable`.

    Example:
      >>> from spikernel_jax import CellSpace, NetworkSpec
      >>> from spikernel_jax.snn.footprint import footprints
      >>> spec = NetworkSpec((28, 28, 1), 10, CellSpace((3, 5)), channels=8, time_steps=4, stem_stride=2)
      >>> found = footprints(spec, [spec.space.parse("0>1:conv3 0>3:skip 1>3:conv5")], bits=4)
      >>> int(found.constants[0]), int(found.written[0])
      (7386, 26024)
    """
    for name, value, least, most in (("bits", bits, 2, 8), ("width", width, 8, 16)):
        if not (isinstance(value, int | np.integer) and least <= value <= most):
            raise ValueError(f"{name}={value!r} must be a whole number from {least} to {most}")
    rows = pairs(checked_genotypes(spec, genotypes))
    if why := next(filter(None, (unwritable(spec, row) for row in rows)), ""):
        raise ValueError(why)
    found = [(_constants(spec, row, stored_bits(bits)), _written(spec, row, 1 + (width > 8))) for row in rows]
    return Footprint(*np.array(found, np.int64).reshape(-1, 2).T)


def _constants(spec: NetworkSpec, genotype: Any, stored: int) -> int:
    total = 2 * 256 * spec.image_shape[2]
    for name, layer in spec.layers(genotype).items():
        out = spec.num_classes if name == "head.out" else layer.channels  # the mean over a class's neurons is folded
        rows = math.prod(layer.shape[:-1]) if layer.shape else 0
        total += rows * -(-out * stored // 8) + _OF_OUTPUT * out
    return total


_CURRENTS, _SPIKES, _SUMS = 0, 1, 2  # types of C, which share no memory


class _Walk:
    """A network's instructions one after another, and when each buffer is first and last in use."""

    def __init__(self, spec: NetworkSpec, genotype: Any, current: int):
        self.spec, self.genotype, self.sites = spec, genotype, spec.sites(genotype)
        self.current = current  # bytes of a current or membrane
        self.now = 0
        self.kept = 0  # bytes that outlive a time step
        self.kinds: dict[str, int] = {}
        self.sizes: dict[str, int] = {}  # bytes
        self.used: dict[str, tuple[int, int]] = {}  # first and last instruction

    def step(self, *names: str) -> None:
        """An instruction that reads or writes these."""
        for name in names:
            self.used[name] = (self.used.get(name, (self.now, self.now))[0], self.now)
        self.now += 1

    def buffer(self, name: str, kind: int, places: int, channels: int) -> str:
        self.kinds[name] = kind
        words = -(-channels // 32) * self.spec.neuron.max_spikes
        self.sizes[name] = places * (self.current * channels, _WORD * words, _SUM * channels)[kind]
        return name

    def fire(self, site: str, source: str, places: int, channels: int) -> None:
        self.kept += self.current * places * channels
        self.step(source, self.buffer(site, _SPIKES, places, channels))

    def cell(self, index: int, entry: str) -> str:
        """One of the two cells; the name of what leaves it."""
        spec, space, cell = self.spec, self.spec.space, CELLS[index]
        places, channels = math.prod(spec.cell_size(index)), spec.cell_channels(index)
        held = spec.held(self.genotype, index)
        values = {0: entry}

        def edges(node: int, sources: range, *target: str) -> int:
            """Instructions of what leads to a node; how many edges do."""
            reading = [source for source in sources if (source, node) in held]
            for source in reading:
                code = held[source, node]
                reader = spec.reader_of(code)
                read = values[source] if reader is None else reader.site(cell, source)
                for number, layer in enumerate(list(space.operation(code).layers(channels).values())[:-1]):
                    between = self.buffer(f"{cell}.{source}{node}.{number}", _CURRENTS, places, layer.channels)
                    self.step(read, between)
                    read = between
                self.step(read, *target)
            return len(reading)

        self.kept += 3 * space.feedback * self.current * places * channels
        for node in range(4):
            if node or space.feedback:
                values[node] = own = self.buffer(f"{cell}.value{node}", _CURRENTS, places, channels)
                if node == 0:
                    self.step(entry, own)
                if fed := space.feedback and node < 3:
                    self.step(own)
                if not edges(node, range(node), own) and node and not fed:
                    self.step(own)  # zeros
            for reader in spec.readers:
                if (site := reader.site(cell, node)) in self.sites:
                    self.fire(site, values[node], places, channels)
        for node in range(3 * space.feedback):
            if not edges(node, range(node + 1, 4)):  # feedbacks are kept, and so in no arena
                self.step()
        return values[3]

    def norm_and_fire(self, site: str, source: str, index: int) -> None:
        places, channels = math.prod(self.spec.cell_size(index)), self.spec.cell_channels(index)
        self.step(source, self.buffer(f"{site}.current", _CURRENTS, places, channels))
        self.fire(site, f"{site}.current", places, channels)

    def network(self) -> None:
        spec, wide = self.spec, self.spec.cell_channels(1)
        self.step(self.buffer("stem", _CURRENTS, math.prod(spec.cell_size(0)), spec.channels))
        self.norm_and_fire("transition", self.cell(0, "stem"), 0)
        self.step("transition", self.buffer("wide", _CURRENTS, math.prod(spec.cell_size(0)), wide))
        self.step("wide", self.buffer("narrow", _CURRENTS, math.prod(spec.cell_size(1)), wide))
        self.norm_and_fire("last", self.cell(1, "narrow"), 1)
        if spec.head == "snasnet":
            self.step("last", self.buffer("pooled", _SUMS, 1, spec.features))
            self.step("pooled", self.buffer("head.current", _CURRENTS, 1, spec.head_hidden))
            self.fire("head", "head.current", 1, spec.head_hidden)
        self.step("head" if spec.head == "snasnet" else "last")
        self.kept += _SUM * (spec.head_hidden if spec.head == "snasnet" else spec.features)
        if self.used["stem"][1]:  # what a time step reads of before, all of them read
            self.used["stem"] = (0, self.now - 1)

    def peak(self) -> int:
        """Bytes that are alive at the worst moment, of each type on its own, together."""
        change = np.zeros((3, self.now + 1), np.int64)
        for name, (begin, end) in self.used.items():
            change[self.kinds[name], begin] += self.sizes[name]
            change[self.kinds[name], end + 1] -= self.sizes[name]
        return int(change.cumsum(1).max(1).sum())


def _written(spec: NetworkSpec, genotype: Any, current: int) -> int:
    walk = _Walk(spec, genotype, current)
    walk.network()
    inner = (layer.channels for name, layer in spec.layers(genotype).items() if name != "head.out")
    pooled = () if spec.head == "snasnet" else (spec.features,)
    widest = max(spec.image_shape[2], spec.num_classes, *pooled, *inner)  # that are summed at a time
    return walk.kept + walk.peak() + _SUM * (len(walk.sites) + 4 * -(-widest // 4))
