"""Where a network's parameters, memory, operations and energy are, part by part, and the equal conventional network's.

Sums over parts are what `cost` says of the whole: its assumptions hold here. The conventional network has the same
layers with ReLUs in the place of LIFs and computes everything once: a multiply-accumulate for every connection, at
4.6 pJ, borders left out as in the spiking one, pooling before a head's linear layer.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from spikernel_jax.snn.cost import PJ_PER_MAC, PJ_PER_SYNOP, connections, costs, macs, stem_macs
from spikernel_jax.snn.spec import CELLS, NetworkSpec, layer_name

NOT_COUNTED = "batch norm, sums, skips, pooling, membrane updates, and what memory accesses cost"


class Part(NamedTuple):
    """One part of a network, in one image.

    Attributes:
      name: of a layer, of an edge's operation, of a LIF site, or of what a cell keeps.
      reads: the LIF site whose spikes it reads; empty where it reads currents or the image.
      parameters: weights, norms, and what a LIF has learned.
      neurons: of a LIF site.
      state: values that are kept between time steps.
      macs: multiply-accumulates over all time steps.
      connections: synaptic operations of a time step in which every neuron that is read fires.
      conventional: multiply-accumulates in the equal conventional network.
      spikes: of a LIF site, over all time steps; NaN where they were not measured.
      synops: synaptic operations; NaN likewise.
    """

    name: str
    reads: str = ""
    parameters: int = 0
    neurons: int = 0
    state: int = 0
    macs: int = 0
    connections: int = 0
    conventional: int = 0
    spikes: float = 0.0
    synops: float = 0.0

    @property
    def energy_nj(self) -> float:
        """By the 45 nm figures of `cost`."""
        return (PJ_PER_MAC * self.macs + PJ_PER_SYNOP * self.synops) / 1000


class Whole(NamedTuple):
    """A network's sums.

    Attributes:
      parameters: of all parts.
      state: values kept between time steps.
      live: largest number of activation values alive at once.
      memory_bytes: of these three at the width asked for.
      macs: multiply-accumulates.
      synops: synaptic operations; NaN where spikes were not measured.
      energy_nj: of an image.
      firing_rate: spikes a neuron and time step; NaN likewise.
      conventional_macs: of the equal conventional network.
      conventional_nj: its energy.
      break_even_rate: firing rate, the same at all neurons, below which the spiking network takes less energy; above
        1 it does at any, below 0 at none.
    """

    parameters: int
    state: int
    live: int
    memory_bytes: int
    macs: int
    synops: float
    energy_nj: float
    firing_rate: float
    conventional_macs: int
    conventional_nj: float
    break_even_rate: float


def parts_of(spec: NetworkSpec, genotype: ArrayLike, spikes: Mapping[str, ArrayLike] | None = None) -> list[Part]:
    """The parts of one genotype's network, in the order in which they run.

    Args:
      spec: the network.
      genotype: [E] or [2, E].
      spikes: mean number of spikes of one image over all time steps and channels, [H, W] by LIF site
        (`training.evaluation.measure_spikes`); None leaves them NaN.

    Example:
      >>> from spikernel_jax import CellSpace, NetworkSpec
      >>> from spikernel_jax.snn.breakdown import parts_of
      >>> spec = NetworkSpec((28, 28, 1), 10, CellSpace((3,)), channels=4, time_steps=2)
      >>> parts = parts_of(spec, spec.space.parse("0>1:conv3 0>3:skip 1>3:conv3"))
      >>> [part.name for part in parts][:4]
      ['stem', 'cell1.node0', 'cell1.node1', 'cell1.e01.conv3']
    """
    genotype = np.asarray(genotype)
    learned, layers, sites = len(spec.neuron.learned), spec.layers(genotype), spec.sites(genotype)
    driven = {own.name: own for own in connections(spec, genotype)}

    def counted(site: str) -> np.ndarray:
        return np.asarray(np.nan if spikes is None else spikes[site], np.float64)

    def lif(site: str) -> Part:
        neurons = sites[site].neurons
        return Part(site, parameters=learned, neurons=neurons, state=neurons, spikes=float(counted(site).sum()))

    def layer(name: str, parameters: int, each_step: int = 0, conventional: int | None = None) -> Part:
        if (own := driven.get(name)) is None:
            done = spec.time_steps * each_step
            return Part(name, parameters=parameters, macs=done, conventional=each_step)
        channels = sites[own.site].neurons // own.fan_out.size
        reached, spiked = int(own.fan_out.sum()) * channels, counted(own.site)
        synops = float((spiked * own.fan_out).sum() if spiked.ndim else spiked * own.fan_out.mean())
        dense = reached if conventional is None else conventional
        return Part(name, own.site, parameters, macs=spec.time_steps * each_step, connections=reached,
                    conventional=dense + each_step, synops=synops)  # fmt: skip

    def fixed(name: str) -> Part:
        linear = layers[name].weights if name.startswith("head.") else None
        return layer(name, layers[name].parameters, conventional=linear)

    h, w = spec.cell_size(0)
    first = stem_macs(spec)
    parts = [Part("stem", parameters=layers["stem"].parameters, state=h * w * spec.channels, macs=first,
                  conventional=first)]  # fmt: skip
    for index, (cell, codes) in enumerate(zip(CELLS, spec.codes(genotype), strict=True)):
        size, channels = spec.cell_size(index), spec.cell_channels(index)
        parts += [lif(site) for site in sites if site.startswith(f"{cell}.")]
        for edge, code in zip(spec.space.edges, codes, strict=True):
            operation = spec.space.operation(code)
            own = operation.layers(channels)
            if own:
                name = layer_name(cell, edge, operation.name)
                weights = sum(part.parameters for part in own.values())
                parts.append(layer(name, weights, operation.macs(size, channels)))
        if spec.space.feedback:
            parts.append(Part(f"{cell}.feedback", state=3 * size[0] * size[1] * channels))
        if index == 0:
            parts += [fixed("transition.in"), lif("transition"), fixed("transition.conv")]
    parts += [fixed("last"), lif("last")]
    if spec.head == "snasnet":
        parts += [fixed("head.hidden"), lif("head")]
    return [*parts, fixed("head.out")]


def whole_of(spec: NetworkSpec, genotype: ArrayLike, parts: list[Part], bits: int = 8) -> Whole:
    """What parts come to.

    Args:
      spec: the network.
      genotype: [E] or [2, E].
      parts: of `parts_of`.
      bits: width of weights, membranes and activations.

    Raises:
      ValueError: as `costs`.
    """
    total = costs(spec, np.asarray(genotype)[None], bits)
    fixed, conventional = macs(spec, genotype), sum(part.conventional for part in parts)
    reached = spec.time_steps * sum(part.connections for part in parts)
    neurons, fired = sum(part.neurons for part in parts), sum(part.spikes for part in parts)
    synops = sum(part.synops for part in parts)
    return Whole(
        parameters=int(total.parameters[0]),
        state=int(total.state[0]),
        live=int(total.live[0]),
        memory_bytes=int(total.memory_bytes[0]),
        macs=fixed,
        synops=synops,
        energy_nj=sum(part.energy_nj for part in parts),
        firing_rate=fired / (neurons * spec.time_steps),
        conventional_macs=conventional,
        conventional_nj=PJ_PER_MAC * conventional / 1000,
        break_even_rate=PJ_PER_MAC * (conventional - fixed) / (PJ_PER_SYNOP * reached) if reached else math.nan,
    )
