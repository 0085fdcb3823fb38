"""A model as a program of integers: batch norm folded, weights rounded, fractions as fine as the widths allow.

Weights are symmetric whole numbers of `bits`, with a scale for each output channel (`snn.rounding`). Currents and
membranes have `width` bits. A batch norm behind a convolution goes into its weights and bias; one without a convolution
before it stays as a scale and a bias. Running statistics are those of every time step.

Sources: Jacob et al., CVPR 2018 (multiplier and shift); Nagel et al., 2021, arXiv 2106.08295 (folding).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from spikernel_jax.embedded import program as ops
from spikernel_jax.embedded.bounds import ACCUMULATOR, TooWideError, check
from spikernel_jax.embedded.program import Buffer, Instruction, Program, Scale
from spikernel_jax.operations.operation import Operation
from spikernel_jax.snn import neurons, rounding
from spikernel_jax.snn.footprint import unwritable
from spikernel_jax.snn.model import Model
from spikernel_jax.snn.spec import CELLS, layer_name

Floats = NDArray[np.float64]
WEIGHT_BITS = rounding.BITS
WIDTHS = (8, 16)
_MULTIPLIER = 12  # bits of a scale's multiplier, at most
_LEAK_SHIFT = 12
_FINEST = 14  # bits behind the point of what needs fewer before it
_PIXEL = 8  # of a normalised pixel


def lower(model: Model, bits: int = 8, width: int = 16, before: Mapping[str, int] | None = None) -> Program:
    """The program of a model.

    Args:
      model: trained.
      bits: of weights, from 2 to 8.
      width: of currents and membranes, from 8 to 16.
      before: the point, bits that each buffer of currents has room for; what needs more is clipped. Without it nothing
        ever clips: there are as many as the worst image could need.

    Returns:
      A program that `bounds.check` has proven free of overflow.

    Raises:
      ValueError: on a width that cannot be, a neuron or an operation that has no such form, or a network whose currents
        do not fit.

    Example:
      >>> import jax
      >>> from spikernel_jax import CellSpace, Model, NetworkSpec
      >>> from spikernel_jax.embedded.lower import lower
      >>> from spikernel_jax.snn import network
      >>> spec = NetworkSpec((8, 8, 1), 2, CellSpace((3,)), channels=2, time_steps=1)
      >>> cell = tuple(spec.space.parse("0>3:conv3").tolist())
      >>> program = lower(Model(spec, cell, *network.init(jax.random.key(0), spec, cell), (0.5,), (0.3,)), bits=4)
      >>> program.buffers["cell1.node0"].shape
      (8, 8, 2)
    """
    for name, value, (least, most) in (("bits", bits, WEIGHT_BITS), ("width", width, WIDTHS)):
        if not (isinstance(value, int) and least <= value <= most):
            raise ValueError(f"{name}={value!r} must be a whole number from {least} to {most}")
    if why := unwritable(model.spec, model.genotype):
        raise ValueError(why)
    fractions: dict[str, int] = {}
    domains: dict[str, str] = {}
    if before is not None:
        first = _Builder(model, bits, width, fractions, domains).program
        fractions = _points(first, domains, before, width)
    while True:
        try:
            program = _Builder(model, bits, width, fractions, domains, clips=before is not None).program
            check(program)
        except TooWideError as error:
            domain = domains.get(error.buffer, "")
            if fractions.get(domain, 0) <= 0:
                raise ValueError(f"width={width}, bits={bits}: {error}; give wider ones") from None
            fractions[domain] -= 1
            continue
        return program


def _points(program: Program, domains: Mapping[str, str], before: Mapping[str, int], width: int) -> dict[str, int]:
    """Fractions of domains that leave as many bits before the point, and room for twice every threshold.

    Where spikes are rare, what makes them is: clipped below the threshold, a layer would be silent.
    """
    needed = {domain: max(before[name] for name, own in domains.items() if own == domain)
              for domain in domains.values()}  # fmt: skip
    for own in program.step:
        if isinstance(own, ops.Fire):
            domain, largest = domains[own.state], max(own.threshold, abs(own.reset))
            twice = 1 + (largest - 1).bit_length() - program.buffers[own.state].fraction
            needed[domain] = max(needed[domain], twice)
    return {domain: min(_FINEST, max(0, width - 1 - own)) for domain, own in needed.items()}


def scale_of(factor: Floats, largest: int) -> Scale:
    """Multipliers of 16 bits and shifts nearest to factors [C]; products with values up to `largest` fit 32 bits.

    Raises:
      OverflowError: if none does.
    """
    room = ACCUMULATOR - 2 - max(1, largest).bit_length()
    multipliers, shifts = [], []
    for own in np.atleast_1d(factor):
        bits = min(_MULTIPLIER, room)
        if bits < 1 or not math.isfinite(own):
            raise OverflowError
        shift = 0 if own == 0 else min(30, max(0, bits - math.frexp(abs(own))[1]))
        multiplier = int(np.rint(own * 2.0**shift))
        if abs(multiplier) > min(2**room, 2**15 - 1):
            raise OverflowError
        multipliers.append(multiplier)
        shifts.append(shift)
    return Scale(np.array(multipliers, np.int64), np.array(shifts, np.int64))


class _Builder:
    """One attempt, with the fractions that are given; those of domains that are not there yet begin at the finest.

    A domain is what shares a fraction: all currents and membranes of a cell, for example, since they are summed.
    """

    def __init__(
        self, model: Model, bits: int, width: int, fractions: dict[str, int], domains: dict[str, str], *,
        clips: bool = False,
    ):  # fmt: skip
        self.model, self.spec, self.bits, self.width, self.clips = model, model.spec, bits, width, clips
        self.fractions, self.domains = fractions, domains  # of domains; of buffers
        spec = self.spec
        self.params, self.stats = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (model.params, model.stats))
        self.buffers: dict[str, Buffer] = {}
        self.once: list[Instruction] = []
        self.step: list[Instruction] = []
        self.end: list[Instruction] = []
        table = self._image()
        self._stem()
        for index, cell in enumerate(CELLS):
            self._cell(index, cell)
            if index == 0:
                self._transition()
        logit = self._head()
        self.program = Program(
            table, self.buffers, tuple(self.once), tuple(self.step), tuple(self.end), spec.time_steps, bits, logit
        )

    # Buffers

    def fraction(self, domain: str) -> int:
        return self.fractions.setdefault(domain, min(_FINEST, self.width - 2))

    def currents(self, name: str, shape: tuple[int, int, int], domain: str, *, kept: bool = False) -> str:
        self.buffers[name] = Buffer(shape, self.width, self.fraction(domain), kept, self.clips)
        self.domains[name] = domain
        return name

    def spikes(self, name: str, shape: tuple[int, int, int], most: int) -> str:
        self.buffers[name] = Buffer(shape, 1, most=most)
        return name

    def shape(self, index: int) -> tuple[int, int, int]:
        return *self.spec.cell_size(index), self.spec.cell_channels(index)

    # Arithmetic

    def rounded(self, weights: Floats) -> tuple[NDArray[np.int64], Floats]:
        whole, unit = rounding.rounded(weights, self.bits)
        return whole.astype(np.int64), unit

    def scaled(self, factor: Floats, largest: int, target: str) -> Scale:
        try:
            return scale_of(factor, largest)
        except OverflowError:
            raise TooWideError(target, ACCUMULATOR) from None

    def convolve(
        self, source: str, target: str, layer: str, *, norm: bool = True, add: bool = False, **fields: Any
    ) -> ops.Convolve:
        weights, bias = self.params[layer]["kernel"], 0.0
        if norm:
            scale, bias = self.model.folded_norm(layer)
            weights = weights * scale
        whole, unit = self.rounded(weights)
        into, out = self.buffers[target].fraction, self.buffers[source].fraction
        largest = int(np.abs(whole).sum((0, 1, 2)).max()) * self.buffers[source].largest
        scale = self.scaled(unit * 2.0 ** (into - out), largest, target)
        bias = np.rint(np.broadcast_to(bias * 2.0**into, unit.shape)).astype(np.int64)
        return ops.Convolve(source, target, whole, scale, bias, add=add, **fields)

    def affine(self, source: str, target: str, layer: str) -> ops.Affine:
        scale, bias = self.model.folded_norm(layer)
        into, out = self.buffers[target].fraction, self.buffers[source].fraction
        factor = self.scaled(scale * 2.0 ** (into - out), self.buffers[source].largest, target)
        return ops.Affine(source, target, factor, np.rint(bias * 2.0**into).astype(np.int64))

    def fire(self, site: str, source: str, neuron: neurons.NeuronSpec, domain: str) -> ops.Fire:
        shape, unit = self.buffers[source].shape, 2.0 ** self.fraction(domain)
        leak, threshold = neurons.constants(neuron, self.params.get(site, {}))
        state = self.currents(f"{site}.membrane", shape, domain, kept=True)
        target = self.spikes(site, shape, neuron.max_spikes)
        # Held where a value can be: a threshold that rounds to 0 would let every neuron fire.
        return ops.Fire(source, target, state, round(leak * 2**_LEAK_SHIFT), _LEAK_SHIFT,
                        max(1, round(threshold * unit)), round(neuron.v_reset * unit),
                        neuron.reset == "soft")  # fmt: skip

    # Parts of the network

    def _image(self) -> NDArray[np.int64]:
        mean, std = (np.asarray(own, np.float64) for own in (self.model.mean, self.model.std))
        pixels = (np.arange(256)[:, None] / 255 - mean) / std
        table = np.rint(pixels * 2**_PIXEL).astype(np.int64)
        self.buffers["image"] = Buffer(self.spec.image_shape, 1 + int(np.abs(table).max()).bit_length(), _PIXEL)
        return table

    def _stem(self) -> None:
        self.currents("stem", self.shape(0), CELLS[0])
        self.once.append(self.convolve("image", "stem", "stem", stride=self.spec.stem_stride))

    def _cell(self, index: int, cell: str) -> None:
        spec, space, shape = self.spec, self.spec.space, self.shape(index)
        held = spec.held(self.model.genotype, index)
        sites = spec.sites(self.model.genotype)
        entry = "stem" if index == 0 else "transition.out"
        values = {0: entry}

        def total(node: int, sources: range, target: str, fed: Sequence[str] = ()) -> None:
            """What is fed to a node and what edges from these sources bring, summed into a buffer."""
            reading = [source for source in sources if (source, node) in held]
            for number, buffer in enumerate(fed):
                self.step.append(ops.Shift(buffer, target, add=number > 0))
            for number, source in enumerate(reading, start=len(fed)):
                self._edge(index, cell, (source, node), held[source, node], values[source], target, add=number > 0)
            if not (fed or reading):
                self.step.append(ops.Clear(target, target))

        if space.feedback:
            for node in range(3):
                self.currents(f"{cell}.feedback{node}", shape, cell, kept=True)
        for node in range(4):
            if node or space.feedback:
                values[node] = name = self.currents(f"{cell}.value{node}", shape, cell)
                fed = [entry] * (node == 0) + [f"{cell}.feedback{node}"] * (space.feedback and node < 3)
                total(node, range(node), name, fed)
            for reader in spec.readers:
                if (site := reader.site(cell, node)) in sites:
                    self.step.append(self.fire(site, values[node], reader.neuron, cell))
        for node in range(3 * space.feedback):
            total(node, range(node + 1, 4), f"{cell}.feedback{node}")

    def _edge(
        self, index: int, cell: str, edge: tuple[int, int], code: int, value: str, target: str, *, add: bool
    ) -> None:
        """What an edge's operation adds to its target, or begins it with."""
        operation = self.spec.space.operation(code)
        reader = self.spec.reader_of(code)
        source = value if reader is None else reader.site(cell, edge[0])
        spiking = self.buffers[source].spiking
        left = self.buffers[target].fraction if spiking else 0
        made: Instruction
        if operation.primitive == "identity":
            made = ops.Shift(source, target, left=left, add=add)
        elif operation.primitive == "average_pool":
            window = operation.window
            scale = self.scaled(np.array([2.0**left / window**2]), self.buffers[source].largest * window**2, target)
            made = ops.AveragePool(source, target, window, scale, add=add)
        elif operation.primitive == "max_pool":
            made = ops.MaxPool(source, target, operation.window, left, add=add)
        else:
            self._layers(index, layer_name(cell, edge, operation.name), operation, source, target, add=add)
            return
        self.step.append(made)

    def _layers(self, index: int, name: str, operation: Operation, source: str, target: str, *, add: bool) -> None:
        """Convolutions one after another; what is between them has a fraction of its own."""
        layers = operation.layers(self.spec.cell_channels(index))
        for number, (part, layer) in enumerate(layers.items(), start=1):
            own = f"{name}.{part}" if part else name
            last = number == len(layers)
            into = target if last else self.currents(own, (*self.shape(index)[:2], layer.channels), own)
            fields = {"dilation": layer.dilation, "groups": layer.groups, "norm": layer.norm}
            self.step.append(self.convolve(source, into, own, add=add and last, **fields))
            source = into

    def _transition(self) -> None:
        spec = self.spec
        self.currents("transition.current", self.shape(0), "transition")
        self.step.append(self.affine(f"{CELLS[0]}.value3", "transition.current", "transition.in"))
        self.step.append(self.fire("transition", "transition.current", spec.neuron, "transition"))
        wide = (*spec.cell_size(0), spec.cell_channels(1))
        self.currents("transition.wide", wide, CELLS[1])
        self.step.append(self.convolve("transition", "transition.wide", "transition.conv"))
        self.currents("transition.out", self.shape(1), CELLS[1])
        self.step.append(ops.Halve("transition.wide", "transition.out"))

    def _head(self) -> float:
        spec = self.spec
        self.currents("last.current", self.shape(1), "last")
        self.step.append(self.affine(f"{CELLS[1]}.value3", "last.current", "last"))
        self.step.append(self.fire("last", "last.current", spec.neuron, "last"))
        side = (spec.head_pool, spec.head_pool) if spec.head == "snasnet" else spec.cell_size(1)
        places = side[0] * side[1]
        pooled = (*spec.pooled_size, spec.cell_channels(1)) if spec.head == "snasnet" else (1, 1, spec.features)
        out = self.params["head.out"]
        counting, weights, bias = "head.count", out["kernel"], out["bias"]
        if spec.head == "snasnet":
            self.buffers["head.pooled"] = Buffer(pooled, ACCUMULATOR)
            self.step.append(ops.Count("last", "head.pooled", side))
            self.currents("head.current", (1, 1, spec.head_hidden), "head")
            whole, unit = self.rounded(self.params["head.hidden"]["kernel"])
            largest = int(np.abs(whole).sum(0).max()) * places * self.buffers["last"].largest
            into = self.buffers["head.current"].fraction
            scale = self.scaled(unit * 2.0**into / places, largest, "head.current")
            none = np.zeros(spec.head_hidden, np.int64)
            self.step.append(ops.Linear("head.pooled", "head.current", whole, scale, none))
            self.step.append(self.fire("head", "head.current", spec.neuron, "head"))
            # The mean over a class's neurons is linear: it goes into the weights.
            bias = rounding.class_means(bias, spec.num_classes)
            places, side, source = 1, (1, 1), "head"
            pooled = (1, 1, spec.head_hidden)
        else:
            source = "last"
        most = places * spec.time_steps
        self.buffers[counting] = Buffer(pooled, ACCUMULATOR, kept=True)
        self.step.append(ops.Count(source, counting, side, add=True))
        # One unit for all classes, so that their logits can be compared as they are.
        whole, unit = rounding.rounded_classes(weights, spec.num_classes, self.bits)
        one = Scale(np.ones(spec.num_classes, np.int64), np.zeros(spec.num_classes, np.int64))
        self.buffers["logits"] = Buffer((1, 1, spec.num_classes), ACCUMULATOR)
        constant = np.rint(bias * most / unit).astype(np.int64)
        self.end.append(ops.Linear(counting, "logits", whole.astype(np.int64), one, constant))
        return float(unit) / most
