"""What a network costs, part by part: parameters, memory, operations and energy, and the equal conventional network's.

    python tools/inspect_model.py runs/mnist5k-cpu-seed0/finalists/k3-5/checkpoint
    python tools/inspect_model.py --cell '0>1:conv3 1>3:conv5 0>3:skip'

A checkpoint, its spikes measured on validation images, or any cell in closed form. Energy is by 45 nm, 32-bit figures:
4.6 pJ a multiply-accumulate, 0.9 pJ a synaptic operation (Horowitz, ISSCC 2014); it says nothing of memory accesses.
"""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from bench_common import table
from spikernel_jax.cells.space import CellSpace
from spikernel_jax.data import Split, load_dataset
from spikernel_jax.embedded.lower import WEIGHT_BITS
from spikernel_jax.io.units import format_bytes
from spikernel_jax.pipeline import cli
from spikernel_jax.pipeline.presets import get_preset
from spikernel_jax.snn.breakdown import NOT_COUNTED, Part, Whole, parts_of, whole_of
from spikernel_jax.snn.cost import PJ_PER_MAC, PJ_PER_SYNOP
from spikernel_jax.snn.devices import broken, devices, needs
from spikernel_jax.snn.spec import NetworkSpec
from spikernel_jax.training.checkpoint import load_model
from spikernel_jax.training.evaluation import measure_spikes


@dataclasses.dataclass(frozen=True)
class Options:
    """What is looked at."""

    model: tyro.conf.Positional[Path | None] = None
    """Folder of a checkpoint; leave it out where --cell is given."""
    cell: str | None = None
    """A cell, as '0>1:conv3 1>3:conv5 0>3:skip'."""
    data: str | None = None
    """Data set; default the checkpoint's, else mnist5k."""
    preset: str = "cpu"
    """Of that data set: sizes of the network of --cell."""
    channels: int | None = None
    """Width C; default the preset's."""
    time_steps: int | None = None
    """T; default the preset's."""
    bits: int = 8
    """Width of weights, membranes and activations."""
    images: int = 500
    """Validation images that spikes of a checkpoint are measured on, at most; 0 measures none."""
    data_dir: Path | None = None
    """Where prepared data lie; default the environment's TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    json: Path | None = None
    """Where to write all of it, too."""
    load: tuple[Path, ...] = ()
    """Python files that are run first, which register operations of one's own."""


def inspect(options: Options) -> None:
    """Prints the parts and what they come to."""
    if (options.model is None) == (options.cell is None):
        raise ValueError("give the folder of a checkpoint, or --cell, one of both")
    if options.images < 0:
        raise ValueError(f"--images {options.images} must be at least 0")
    spikes, measured = None, ""
    if options.model is not None:
        if options.channels or options.time_steps:
            raise ValueError("--channels and --time-steps are of --cell; a checkpoint has its own")
        model = load_model(options.model)
        spec, genotype = model.spec, np.asarray(model.genotype)
        if options.images:
            if (name := options.data or model.metrics.get("data")) is None:
                raise ValueError(
                    f"{options.model} does not say which data it was trained on: give --data, or --images 0"
                )
            data = load_dataset(name, options.data_dir)
            if data.image_shape != spec.image_shape:
                raise ValueError(f"--data {name}: images are {data.image_shape}, the checkpoint's {spec.image_shape}")
            chosen = Split(data.validation.images[: options.images], data.validation.labels[: options.images])
            spikes = measure_spikes(model, chosen)
            measured = f"of {len(chosen.labels)} validation images of {data.name}"
    else:
        spec = _network(options)
        genotype = spec.space.parse(options.cell or "")
    parts = parts_of(spec, genotype, spikes)
    whole = whole_of(spec, genotype, parts, options.bits)
    if options.json:
        found = {"bits": options.bits, "measured": measured, "whole": whole._asdict(),
                 "parts": [part._asdict() | {"energy_nj": part.energy_nj} for part in parts]}  # fmt: skip
        options.json.write_text(json.dumps(_plain(found), indent=2) + "\n", "utf-8")
    _show(spec, genotype, options.bits, parts, whole, measured)


def _network(options: Options) -> NetworkSpec:
    named = re.findall(r":(\S+)", options.cell or "")
    data = options.data or "mnist5k"
    preset = get_preset(data, options.preset, channels=options.channels, time_steps=options.time_steps)
    return preset.network(data, CellSpace(operations=tuple(dict.fromkeys(("zero", "skip", *named))), direct="any"))


def _plain(value: Any) -> Any:
    """What was not measured is null."""
    if isinstance(value, dict):
        return {name: _plain(own) for name, own in value.items()}
    if isinstance(value, list):
        return [_plain(own) for own in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _show(spec: NetworkSpec, genotype: np.ndarray, bits: int, parts: list[Part], whole: Whole, measured: str) -> None:
    header = ("part", "reads", "parameters", "bytes", "neurons", "state, bytes", "firing rate", "MACs", "connections",
              "synops", "nJ", "conventional MACs")  # fmt: skip
    rows = []
    for part in parts:
        rate = part.spikes / (part.neurons * spec.time_steps) if part.neurons else math.nan
        done = part.macs, part.connections, part.synops, part.energy_nj, part.conventional
        weights, state = part.parameters * bits / 8, part.state * bits / 8
        row = (part.name, part.reads or "-", part.parameters, weights, part.neurons, state, rate, *done)
        rows.append(["-" if isinstance(value, float) and math.isnan(value) else value for value in row])
    print(table(header, rows))
    ratio = whole.conventional_nj / whole.energy_nj
    lines = [
        ("memory", f"{format_bytes(whole.memory_bytes)} at {bits} bits: {whole.parameters:,} parameters, "
                   f"{whole.state:,} values of state, {whole.live:,} alive at once"),
        ("spikes", measured or "not measured: synaptic operations and energy are not known"),
        ("firing rate", f"{_number(whole.firing_rate)} spikes a neuron and time step"),
        ("operations of an image", f"{whole.macs:,} MACs, {_number(whole.synops)} synaptic operations"),
        ("energy of an image", f"{_number(whole.energy_nj)} nJ; the equal conventional network "
                               f"{_number(whole.conventional_nj)} nJ, {_number(ratio)} times as much"),
        ("break-even", f"the spiking network takes less below a firing rate of {whole.break_even_rate:.3f}"),
        ("assumed", f"{PJ_PER_MAC} pJ a MAC, {PJ_PER_SYNOP} pJ a synaptic operation (45 nm, 32 bits); borders exact"),
        ("not counted", NOT_COUNTED),
    ]  # fmt: skip
    if WEIGHT_BITS[0] <= bits <= WEIGHT_BITS[1]:
        lines += _on_devices(spec, genotype, bits)
    print("\n" + "\n".join(f"- {name}: {text}" for name, text in lines))


def _on_devices(spec: NetworkSpec, genotype: np.ndarray, bits: int) -> list[tuple[str, str]]:
    """What the exported C takes, and which devices have as much."""
    taken = needs(spec, genotype, bits)
    found = {name: broken(device, spec, genotype, bits) for name, device in devices().items()}
    shown = f"{format_bytes(taken['flash'])} of constants, {format_bytes(taken['sram'])} written to"
    fits = ", ".join(name for name, limits in found.items() if not limits)
    return [
        ("as exported C", f"{shown} (currents and membranes of 8 bits); code and stack on top"),
        ("fits", fits or "no device that is known"),
        *((f"not {name}", "; ".join(limits)) for name, limits in found.items() if limits),
    ]


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"


if __name__ == "__main__":
    cli.main(Options, inspect, __doc__ or "")
