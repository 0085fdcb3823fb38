"""What a network needs of a device, and which of a device's limits it breaks.

Figures of devices, each with its source, are in ``devices.toml``; a file of one's own has the same form.
"""

import dataclasses
import functools
import math
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spikernel_jax.io.units import format_bytes
from spikernel_jax.snn.breakdown import parts_of
from spikernel_jax.snn.cost import checked_genotypes, costs, pairs, stem_macs
from spikernel_jax.snn.footprint import footprints, unwritable
from spikernel_jax.snn.spec import NetworkSpec

_FILE = Path(__file__).with_name("devices.toml")
_BYTES = ("sram", "flash", "memory")
LIMITS = (*_BYTES, "neurons", "synapses", "fan_in", "kernel", "channels", "side", "layers")
NO_LIMIT = 2**50


@dataclasses.dataclass(frozen=True)
class Device:
    """What a device has; limits as in ``devices.toml``, in the order of `LIMITS`.

    Attributes:
      name: that it is asked for by.
      title: what it is.
      limits: name and greatest value of each that is known.
      weight_bits: widths of weights that it can hold; empty where that is not known.
      source: of the figures.
      note: what they leave out.
    """

    name: str
    title: str
    limits: tuple[tuple[str, int], ...]
    weight_bits: tuple[int, ...]
    source: str
    note: str


@functools.cache
def devices(path: Path = _FILE) -> dict[str, Device]:
    """The devices of a file, by name.

    Raises:
      ValueError: one line, if the file is missing or no such file.
    """
    try:
        tables = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no file of devices ({error})") from None
    return {name: _device(path, name, table) for name, table in tables.items()}


def _device(path: Path, name: str, table: Any) -> Device:
    texts, where = ("title", "source", "note"), f"{path}: device {name!r}"
    if not isinstance(table, dict):
        raise ValueError(f"{where} must be a table")
    if unknown := sorted(table.keys() - {*LIMITS, *texts, "weight_bits"}):
        raise ValueError(f"{where}: {', '.join(unknown)} unknown; known: {', '.join((*LIMITS, 'weight_bits', *texts))}")
    limits = tuple((limit, table[limit]) for limit in LIMITS if limit in table)
    for limit, value in limits:
        if not (isinstance(value, int) and value > 0):
            raise ValueError(f"{where}: {limit}={value!r} must be a whole number above 0")
    bits = table.get("weight_bits", [])
    if not (isinstance(bits, list) and all(isinstance(own, int) and own > 0 for own in bits)):
        raise ValueError(f"{where}: weight_bits={bits!r} must be whole numbers above 0")
    if not all(isinstance(table.get(text, ""), str) for text in texts) or not table.get("source"):
        raise ValueError(f"{where}: want texts, and a source of its figures")
    title, source, note = (table.get(text, "") for text in texts)
    return Device(name, title or name, limits, tuple(bits), source, note)


def device_of(text: str) -> Device:
    """The device of a name, or of FILE.toml:NAME.

    Raises:
      ValueError: one line, if there is none.

    Example:
      >>> from spikernel_jax.snn.devices import device_of
      >>> dict(device_of("cortex-m4").limits)["sram"] // 1024
      192
    """
    path, _, name = text.rpartition(":")
    known = devices(Path(path) if path else _FILE)
    if name not in known:
        raise ValueError(f"device {text!r} is unknown; known: {', '.join(known)}, or FILE.toml:NAME")
    return known[name]


def needs(
    spec: NetworkSpec, genotype: ArrayLike, bits: int = 8, limits: Collection[str] = LIMITS, width: int = 8
) -> dict[str, int]:
    """What a network takes of some of `LIMITS`.

    Args:
      spec: the network.
      genotype: [E] or [2, E].
      bits: of a weight, 2 to 8.
      limits: which.
      width: of currents and membranes, 8 to 16.

    Raises:
      ValueError: as `footprints`.

    Example:
      >>> from spikernel_jax import CellSpace, NetworkSpec
      >>> from spikernel_jax.snn.devices import needs
      >>> spec = NetworkSpec((28, 28, 1), 10, CellSpace((3, 5)), channels=8, time_steps=4, stem_stride=2)
      >>> found = needs(spec, spec.space.parse("0>1:conv3 0>3:skip 1>3:conv5"))
      >>> found["kernel"], found["fan_in"]
      (5, 400)
    """
    row = np.asarray(genotype)
    layers = [layer for layer in spec.layers(row).values() if layer.shape]
    found = {
        "neurons": sum(site.neurons for site in spec.sites(row).values()),
        "fan_in": max(math.prod(layer.shape[:-1]) for layer in layers),
        "kernel": max(max(layer.shape[:2]) for layer in layers if len(layer.shape) == 4),
        "channels": max(layer.channels for layer in layers),
        "side": max(max(spec.cell_size(index)) for index in range(2)),
        "layers": len(layers),
    }
    if not {*_BYTES}.isdisjoint(limits):
        bytes_of = footprints(spec, row[None], bits, width)
        sram, flash = int(bytes_of.written[0]), int(bytes_of.constants[0])
        found |= {"sram": sram, "flash": flash, "memory": sram + flash}
    if "synapses" in limits:
        found["synapses"] = stem_macs(spec) + sum(part.connections for part in parts_of(spec, row))
    return {limit: found[limit] for limit in limits}


def broken(device: Device, spec: NetworkSpec, genotype: ArrayLike, bits: int = 8, width: int = 8) -> list[str]:
    """A phrase for each limit of a device that a network breaks; empty where it fits. Arguments as of `needs`.

    What is `unwritable` fits no device.
    """
    if why := unwritable(spec, genotype):
        return [why]
    return exceeded(device, needs(spec, genotype, bits, [limit for limit, _ in device.limits], width), bits)


def broken_of_all(spec: NetworkSpec, genotype: ArrayLike, bits: int = 8, width: int = 8) -> dict[str, list[str]]:
    """`broken` of each known device, by its name.

    Example:
      >>> from spikernel_jax import CellSpace, NetworkSpec
      >>> from spikernel_jax.snn.devices import broken_of_all
      >>> spec = NetworkSpec((28, 28, 1), 10, CellSpace((3, 5)), channels=8, time_steps=4, stem_stride=2)
      >>> broken_of_all(spec, spec.space.parse("0>1:conv3 0>3:skip 1>3:conv5"))["cortex-m4"]
      []
    """
    if why := unwritable(spec, genotype):
        return {name: [why] for name in devices()}
    needed = needs(spec, genotype, bits, width=width)
    return {name: exceeded(device, needed, bits) for name, device in devices().items()}


def exceeded(device: Device, needed: Mapping[str, int], bits: int) -> list[str]:
    """The same of what a network needs at a width of weights, as `needs` tells."""
    found = []
    if device.weight_bits and bits not in device.weight_bits:
        found.append(f"weights of {bits} bits, where it has {', '.join(map(str, device.weight_bits))}")
    for limit, most in device.limits:
        if needed[limit] > most:
            shown = format_bytes if limit in _BYTES else "{:,}".format
            found.append(f"{limit.replace('_', '-')} {shown(needed[limit])} of {shown(most)}")
    return found


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a model may take: bytes as `costs` counts them at a width, and the limits of a device.

    Attributes:
      memory_bytes: at most.
      bits: of weights, and in `costs` of everything.
      device: whose limits hold, too; None for none.
    """

    memory_bytes: int
    bits: int
    device: Device | None = None

    @property
    def text(self) -> str:
        """How one would say it."""
        memory = f"{format_bytes(self.memory_bytes)} at {self.bits} bits"
        if self.device is None:
            return memory
        return self.device.name + (f" and {memory}" if self.memory_bytes < NO_LIMIT else f" at {self.bits} bits")

    def fits(self, spec: NetworkSpec, rows: ArrayLike) -> NDArray[np.bool_]:
        """Whether each genotype [n, E] or [n, 2, E] fits: [n]."""
        cells = pairs(checked_genotypes(spec, rows))
        fit = costs(spec, cells, self.bits).memory_bytes <= self.memory_bytes
        if self.device is not None:
            for index in np.flatnonzero(fit):
                fit[index] = not broken(self.device, spec, cells[index], self.bits)
        return fit
