"""Parameters, memory and energy of a genotype in closed form; no arrays of weights are made.

Memory of a model on a device, all at the same width of `bits`::

    weights   every parameter: convolutions, linear layers, batch norms' scale and bias, what LIF layers learn
    state     one membrane potential a neuron of every LIF layer (edges that leave one node share a LIF),
              the stem's current, which every time step reads again, and a feedback cell's three feedbacks
    live      the largest of
              cell 1      the node values alive at its worst moment; node 0 of a forward cell does not
                          count, being the stem's current, which state holds, but node 0 of a feedback
                          cell does: it is the stem's current plus feedback, a new array
              transition  its input spikes, H·W·C, and its output after pooling, (H//2)·(W//2)·2C; the
                          convolution is pooled as it is made
              cell 2      the node values alive at its worst moment

H, W and C are the sides and channels of cell 1. A node value is alive while it is summed up, and from then
on until the last node, or feedback, that reads it.

Energy, after the field's 45 nm, 32-bit figures (Horowitz, ISSCC 2014): 4.6 pJ a multiply-accumulate (the
stem, whose input is an image, computed once; and at every time step what reads no spikes, as the second layer of a
depthwise-separable convolution) and 0.9 pJ a synaptic operation. Synaptic operations are counted as spikes times
fan-out (k·k·C_out for a convolution, less what falls on padding). Not counted: batch norm, sums, skips and pooling,
whether these hand on currents or spikes.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spikernel_jax.operations.convolution import taps
from spikernel_jax.snn.spec import CELLS, NetworkSpec, layer_name

PJ_PER_MAC = 4.6
PJ_PER_SYNOP = 0.9
# Whole numbers of 32 bits, as the exported C has them: a product is 3.1 pJ, a sum 0.1 (Horowitz, ISSCC 2014).
PJ_PER_INTEGER_MAC = 3.2
PJ_PER_INTEGER_SYNOP = 0.1


class Cost(NamedTuple):
    """What genotypes cost; every field int64 [n]."""

    parameters: NDArray[np.int64]
    state: NDArray[np.int64]  # values kept between time steps
    live: NDArray[np.int64]  # largest number of activation values alive at once
    memory_bytes: NDArray[np.int64]
    conv_edges: NDArray[np.int64]  # edges with weights, over both cells


def checked_genotypes(spec: NetworkSpec, genotypes: ArrayLike) -> NDArray[np.int8]:
    """Genotypes [n, E] or [n, 2, E] as int8; ValueError on another shape or rows that are no cells."""
    rows, edges = np.asarray(genotypes), len(spec.space.edges)
    if rows.ndim not in (2, 3) or rows.shape[1:] not in ((edges,), (2, edges)):
        raise ValueError(f"genotypes have shape {rows.shape}; want [n, {edges}] or [n, 2, {edges}]")
    spec.space.validate(rows.reshape(-1, edges))
    return rows.astype(np.int8)


def pairs(rows: NDArray[np.int8]) -> NDArray[np.int8]:
    """Genotypes [n, E] or [n, 2, E] as [n, 2, E]: one row serves both cells."""
    return np.stack([rows, rows], 1) if rows.ndim == 2 else rows


def costs(spec: NetworkSpec, genotypes: ArrayLike, bits: int = 8) -> Cost:
    """Cost of each genotype.

    Args:
      spec: the network.
      genotypes: codes [n, E], or [n, 2, E] for two cells of their own.
      bits: width of weights, membranes and activations, 1 to 64.

    Returns:
      The costs.

    Raises:
      ValueError: on a wrong shape or width, or rows that are no cells of the space.

    Example:
      >>> from spikernel_jax import CellSpace, NetworkSpec, costs
      >>> spec = NetworkSpec((32, 32, 3), 10, CellSpace((3, 5)), channels=16, time_steps=4)
      >>> cell = spec.space.parse("0>1:conv3 0>3:skip 1>3:conv5")
      >>> int(costs(spec, [cell], bits=8).memory_bytes[0]) // 1024  # KiB
      168
    """
    if not (isinstance(bits, int | np.integer) and 1 <= bits <= 64):
        raise ValueError(f"bits={bits!r} must be a whole number from 1 to 64")
    space, rows = spec.space, pairs(checked_genotypes(spec, genotypes))
    n = len(rows)
    parameters = np.full(n, sum(layer.parameters for layer in spec.fixed_layers().values()), np.int64)
    sizes = [h * w * spec.cell_channels(cell) for cell in range(2) for h, w in [spec.cell_size(cell)]]
    state = np.full(n, sizes[0], np.int64)  # the stem's current
    if spec.head == "snasnet":
        state += spec.head_hidden
    sites = np.full(n, 2 + (spec.head == "snasnet"), np.int64)  # LIF layers: transition and last, a head's
    live = np.full(n, sum(sizes), np.int64)  # the transition, whose pooled output is cell 2's input
    convs = np.zeros(n, np.int64)
    sources, targets = np.array(space.edges).T
    for cell in range(2):
        codes_NE = rows[:, cell]
        c, size = spec.cell_channels(cell), sizes[cell]
        layers = [list(space.operation(code).layers(c).values()) for code in range(space.num_ops)]
        convs += np.array([bool(own) for own in layers])[codes_NE].sum(1)
        parameters += np.array([sum(layer.parameters for layer in own) for own in layers], np.int64)[codes_NE].sum(1)
        lifs = np.zeros(n, np.int64)
        for reader in spec.readers:
            read_NE = np.array(reader.codes)[codes_NE]
            lifs += sum(read_NE[:, sources == node].any(1).astype(np.int64) for node in range(4))
        sites += lifs
        state += size * (lifs + 1 + 3 * space.feedback)  # the LIF after the cell is the 1
        used_NE = codes_NE != 0
        first = 0 if cell or space.feedback else 1  # a forward cell 1's node 0 is the stem's current
        for node in range(1, 4):  # while a node is summed up, all earlier ones that are still to be read
            alive = np.ones(n, np.int64)
            for earlier in range(first, node):  # feedback is read last of all, after node 3
                later = (targets >= node) | (targets < earlier)
                alive += used_NE[:, (sources == earlier) & later].any(1)
            live = np.maximum(live, size * alive)
    parameters += len(spec.neuron.learned) * sites
    memory = -(-(parameters + state + live) * bits // 8)
    return Cost(parameters, state, live, memory, convs)


def parameters_of(spec: NetworkSpec, genotype: ArrayLike) -> int:
    """Parameters of one genotype's network, [E] or [2, E]."""
    return int(costs(spec, np.asarray(genotype)[None]).parameters[0])


def nearest_width(at: Callable[[int], int], wanted: int) -> int:
    """The width C at which a quantity comes nearest to a number; of two as near, the smaller.

    Parameters and operations of a network are a quadratic P(C) that grows with C and has a positive second difference,
    so P(1), P(2) and P(3) give it whole, and the largest C with P(C) <= `wanted` is the floor of its root, taken in
    whole numbers.

    Args:
      at: P, of widths from 1.
      wanted: the number.

    Returns:
      The width, 1 where even P(1) is above the number.
    """
    one, two, three = map(at, (1, 2, 3))
    if wanted <= one:
        return 1
    slope, bend = two - one, three - 2 * two + one
    # 2·P(1 + x) = 2·one + 2·slope·x + bend·x·(x - 1).
    linear = 2 * slope - bend
    root = math.isqrt(linear**2 + 8 * bend * (wanted - one))
    below = 1 + (root - linear) // (2 * bend)
    return min((below, below + 1), key=lambda width: abs(at(width) - wanted))


def width_for(spec: NetworkSpec, genotype: ArrayLike, parameters: int) -> int:
    """The width at which a network's parameters come nearest to a number; of two as near, the smaller.

    Args:
      spec: the network; its own width does not matter.
      genotype: codes [E] or [2, E].
      parameters: wanted.

    Returns:
      The width C.

    Raises:
      ValueError: if the network has more parameters at width 1 already.
    """

    def at(channels: int) -> int:
        return parameters_of(dataclasses.replace(spec, channels=channels), genotype)

    if parameters < at(1):
        raise ValueError(f"parameters={parameters} must be at least {at(1)}, which the network has at width 1")
    return nearest_width(at, parameters)


class Connection(NamedTuple):
    """What the spikes of a LIF site drive."""

    name: str  # of an edge's operation, ``cell1.e01.conv3``, or of a layer outside the cells
    site: str
    fan_out: NDArray[np.int64]  # connections that a spike drives by the place of its neuron, [H, W]; [1, 1] of the head


def connections(spec: NetworkSpec, genotype: ArrayLike) -> list[Connection]:
    """Everything that reads spikes, in the order in which it runs.

    Near a border taps of a kernel fall on padding, and are no connections. Shortcuts of spikes have a fan-out of 0.

    Args:
      spec: the network.
      genotype: one, [E] or [2, E].
    """
    space, found = spec.space, []
    for index, (cell, codes) in enumerate(zip(CELLS, spec.codes(np.asarray(genotype)), strict=True)):
        for edge, code in zip(space.edges, codes, strict=True):
            for reader in spec.readers:
                if reader.codes[code]:
                    operation = space.operation(code)
                    reached = operation.fan_out(spec.cell_size(index), spec.cell_channels(index))
                    found.append(
                        Connection(layer_name(cell, edge, operation.name), reader.site(cell, edge[0]), reached)
                    )
        if index == 0:
            reached = taps(spec.cell_size(0), (3, 3)) * spec.cell_channels(1)
            found.append(Connection("transition.conv", "transition", reached))
    last = np.full(spec.cell_size(1), spec.head_hidden if spec.head == "snasnet" else spec.outputs)
    if spec.head == "snasnet":
        h, w = (side * spec.head_pool for side in spec.pooled_size)
        last[h:], last[:, w:] = 0, 0  # what pooling leaves over
        hidden = Connection("head.out", "head", np.full((1, 1), spec.outputs))
        return [*found, Connection("head.hidden", "last", last), hidden]
    return [*found, Connection("head.out", "last", last)]


def fan_out(spec: NetworkSpec, genotype: ArrayLike) -> dict[str, NDArray[np.int64]]:
    """`connections` that one spike of each LIF site drives, by the place of its neuron.

    Returns:
      int64 [H, W] by site, all channels alike; [1, 1] for the head's. 0 of shortcuts alone.
    """
    result: dict[str, NDArray[np.int64]] = {}
    for own in connections(spec, genotype):
        result[own.site] = result.get(own.site, 0) + own.fan_out
    return result


def synaptic_operations(spec: NetworkSpec, genotype: ArrayLike, spikes: Mapping[str, ArrayLike]) -> float:
    """Synaptic operations of one image.

    Args:
      spec: the network.
      genotype: [E] or [2, E].
      spikes: mean number of spikes of one image over all T steps and channels, by LIF site: [H, W], or one number that
        is spread evenly over the places.

    Returns:
      Sum over sites and places of spikes times fan-out.
    """
    fans = fan_out(spec, genotype)
    places = {site: np.asarray(count, np.float64) for site, count in spikes.items()}
    return float(sum((n * fans[s]).sum() if n.ndim else n * fans[s].mean() for s, n in places.items()))


def most_synaptic_operations(spec: NetworkSpec, genotypes: ArrayLike) -> NDArray[np.float64]:
    """Synaptic operations of one image if all neurons fire all they can at all time steps: the most there can be.

    Args:
      spec: the network.
      genotypes: [n, E] or [n, 2, E].

    Returns:
      float64 [n]; errors as `costs`.
    """
    rows = pairs(checked_genotypes(spec, genotypes))
    total, spikes = np.zeros(len(rows)), spec.time_steps * spec.neuron.max_spikes
    for cell in range(2):
        size, c = spec.cell_size(cell), spec.cell_channels(cell)
        of_codes = [
            spikes * c * float(spec.space.operation(code).fan_out(size, c).sum())
            if spec.reader_of(code) else 0.0
            for code in range(spec.space.num_ops)
        ]  # fmt: skip
        total += np.array(of_codes)[rows[:, cell]].sum(1)
    if len(rows):  # what is outside the cells is the same for all
        all_fire = {name: float(spikes * site.neurons) for name, site in spec.sites(rows[0]).items()}
        total += synaptic_operations(spec, rows[0], all_fire) - total[0]
    return total


def stem_macs(spec: NetworkSpec) -> int:
    """Multiply-accumulates of the stem, which is computed once an image; padding is not multiplied."""
    read = taps(spec.image_shape[:2], (3, 3), spec.stem_stride)
    return int(read.sum()) * spec.image_shape[2] * spec.channels


def macs(spec: NetworkSpec, genotype: ArrayLike) -> int:
    """Multiply-accumulates of one image: the stem's, and at every time step those of edges' layers without spikes."""
    each_step = sum(
        spec.space.operation(code).macs(spec.cell_size(cell), spec.cell_channels(cell))
        for cell, codes in enumerate(spec.codes(np.asarray(genotype)))
        for code in codes
    )
    return stem_macs(spec) + spec.time_steps * each_step


def energy_nj(spec: NetworkSpec, genotype: ArrayLike, synops: float, *, integers: bool = False) -> float:
    """Energy of one image in nJ, by the 45 nm figures.

    Args:
      spec: the network.
      genotype: [E] or [2, E].
      synops: synaptic operations of the image, measured (`synaptic_operations`).
      integers: of 32-bit whole numbers, else of floats.
    """
    mac, synop = (PJ_PER_INTEGER_MAC, PJ_PER_INTEGER_SYNOP) if integers else (PJ_PER_MAC, PJ_PER_SYNOP)
    return (mac * macs(spec, genotype) + synop * synops) / 1000
