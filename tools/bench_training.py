"""Benchmark of training one network: how near the machine's limit, against whom, and what spiking costs.

Use: ``python tools/bench_training.py --json bench.json`` (18 to 33 minutes on two cores), or with ``--quick`` (within 2
minutes, at a smaller batch: shows that everything runs, and roughly what comes out). Tables go to stdout, progress to
stderr.

- ours: seconds of a training step (forward pass, backward pass, SGD with momentum and weight decay, cross-entropy on
  the mean output), its FLOPs (`step_flops`) against the ceiling of matrix products measured in the same run, memory,
  and compilation, which is timed apart.
- peers: spikingjelly's SNASNet, as shipped and in multi-step mode (`peers_training`; skipped where it is not
  installed): the same cell, batch and SGD.
- parts: where a step of ours spends its time (`bench_step`), from a profile.
- memory: of a step of ours, by time steps and batch.
- kernels: a step by kernel size, called alone, in a call of many steps, and of a feedback cell (`bench_kernels`).
- conventional: the same macro-architecture by the same code with ReLU for LIF, one time step, and the width whose
  forward FLOPs are nearest (`equal_width`): the ratio of times is what spiking costs at equal FLOPs.

All take turns in rounds. A turn begins with a call that is not timed: after the others, it is up to a third slower
than those of a training, which has no others. Ours makes as many steps a call as `train` does. The steps that are
timed last at least ``--seconds`` together. Times are of a turn's mean step: the best of the turns, medians beside it.
Ratios are of the same round, and the median of the rounds: another program on the machine spoils one round, not all.
Images and labels are noise: no time depends on what they show. Ours also normalises uint8 images in each step; the
peers get theirs normalised.

Memory of a program is what its compiler says: arguments, results and temporary values; a state that is updated in
place counts once. The high-water mark of the device, where it tells one, is read before anything else has run.
"""

import dataclasses
import importlib
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

import ceilings
import peers
import peers_training
from bench_common import Settings, filled, report, say, seconds_of, table
from bench_kernels import MEAN, STD, compiled_step, measure_kernels, noise
from bench_step import measure_memory, measure_parts, program_bytes
from spikernel_jax.cells.space import CellSpace
from spikernel_jax.data import normalise
from spikernel_jax.pipeline import cli
from spikernel_jax.snn.conventional import relu_neurons
from spikernel_jax.snn.cost import nearest_width
from spikernel_jax.snn.spec import NetworkSpec
from spikernel_jax.training.devices import devices_for
from spikernel_jax.training.recipe import TrainConfig
from spikernel_jax.training.step import in_calls
from work import necessary_work

Section = Literal["ours", "peers", "conventional", "parts", "memory", "kernels"]
Turn = Callable[[int], Any]  # runs so many steps to their end
SPACE = CellSpace((1, 3))
_LABELS = {
    "ours": "ours",
    "shipped": "SNASNet as shipped, step by step",
    "multi_step": "the same in multi-step mode",
    "conventional": "conventional",
}


@dataclasses.dataclass(frozen=True)
class Options(cli.MachineOptions):
    """What is measured; options of default None have two defaults, the second that of --quick."""

    json: Path | None = None
    """Results as JSON."""
    quick: bool = False
    """Takes the quick defaults."""
    sections: tuple[Section, ...] = ("ours", "peers", "conventional", "parts", "memory", "kernels")
    """What is measured; ours always is, unless it is kernels alone."""
    cell: str = "0>1:conv3 0>2:skip 1>2:conv1 0>3:conv3 1>3:skip 2>3:conv3"
    """Of kernel sizes 1 and 3, forward edges."""
    channels: int = 32
    """C."""
    batch: int | None = None
    """Images B (64; quick 8)."""
    time_steps: int = 5
    """T."""
    side: int = 32
    """Height and width of images."""
    hidden: int = 1024
    """Hidden neurons of SNASNet's head."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of convolutions in ours, but for the table by kernel size; the peers compute in float32."""
    rounds: int | None = None
    """Turns of each (4; quick 2)."""
    seconds: float | None = None
    """Least time of the timed steps of a turn (4; quick 0.5)."""
    repeats: int | None = None
    """Of the ceilings (3; quick 2)."""
    widths: tuple[int, ...] | None = None
    """C of the table by kernel size (16 32; quick 16)."""
    sizes: tuple[int, ...] = (1, 3, 5, 7)
    """Kernel sizes of that table; 3 among them."""
    kernel_batch: int | None = None
    """Images of the table by kernel size (32; quick 8)."""
    memory_times: tuple[int, ...] | None = None
    """T of the memory's table (1 2 4 8; quick 1 2)."""
    memory_batches: tuple[int, ...] | None = None
    """B of the memory's table (32 64 128; quick 8)."""
    matmul_side: int | None = None
    """Of the matrices of the ceilings (3072 on a CPU, else 8192; quick 2048)."""
    bandwidth_mb: int = 256
    """Of the array whose passes give the bandwidth."""
    seed: int = 0
    """Of weights, images and labels."""


_DEFAULTS: dict[str, tuple[Any, Any]] = {  # full, quick
    "batch": (64, 8),
    "rounds": (4, 2),
    "seconds": (4.0, 0.5),
    "widths": ((16, 32), (16,)),
    "kernel_batch": (32, 8),
    "memory_times": ((1, 2, 4, 8), (1, 2)),
    "memory_batches": ((32, 64, 128), (8,)),
    "repeats": (3, 2),
    "matmul_side": (None, 2048),
}


def _convolution_flops(spec: NetworkSpec, genotype: ArrayLike, batch: int) -> tuple[int, int]:
    """FLOPs forward of the stem, and of all other convolutions and linear layers."""
    work, out = necessary_work(spec, np.asarray(genotype)[None], batch), spec.fixed_layers()["head.out"]
    return work.stem, work.convolution + 2 * batch * spec.time_steps * out.weights


def forward_flops(spec: NetworkSpec, genotype: ArrayLike, batch: int) -> int:
    """FLOPs of a forward pass: convolutions and linear layers alone, a multiply-add being 2, borders in full.

    Args:
      spec: the network; forward cells only.
      genotype: codes [E] or [2, E]; edges of dead nodes cost nothing.
      batch: images.
    """
    return sum(_convolution_flops(spec, genotype, batch))


def step_flops(spec: NetworkSpec, genotype: ArrayLike, batch: int) -> int:
    """FLOPs of a training step: 3 times those of a forward pass, but for the stem's.

    A layer's gradients by its input and by its weights cost as much as its forward pass, each. The stem reads images,
    whose gradient nobody needs: 2 times. It is the only exception, for every other layer reads what has weights
    before it. Not counted, as forward: norms, LIF, sums and pooling, nor SGD.

    Args:
      spec: the network; forward cells only.
      genotype: codes [E] or [2, E].
      batch: images.
    """
    stem, others = _convolution_flops(spec, genotype, batch)
    return 2 * stem + 3 * others


def equal_width(spec: NetworkSpec, genotype: ArrayLike) -> int:
    """The width C' at which one time step has forward FLOPs nearest to all T of the network.

    Args:
      spec: the network; forward cells only.
      genotype: codes [E] or [2, E].

    Returns:
      C', at least 1.
    """

    def at(width: int) -> int:
        return forward_flops(dataclasses.replace(spec, channels=width, time_steps=1), genotype, 1)

    return nearest_width(at, forward_flops(spec, genotype, 1))


def peak_bytes(device: Any) -> int | None:
    """The device's high-water mark so far; None where it does not tell."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use")


class Ours:
    """A network of ours in training."""

    def __init__(
        self, spec: NetworkSpec, genotype: ArrayLike, images: jax.Array, labels: jax.Array, seed: int, precision: str
    ):
        """Compiles, and times it."""
        start = time.perf_counter()
        at_once = len(next(in_calls(np.arange(1 << 10)))[0])  # steps of a call, as `train` makes them
        config = TrainConfig(batch_size=len(labels), precision=precision)
        self.program = compiled_step(spec, genotype, config, images, labels, seed, at_once)
        self.compile_seconds = time.perf_counter() - start
        self.spec, self.state = spec, self.program.state
        self.flops = step_flops(spec, genotype, len(labels))

    def run(self, steps: int) -> float:
        """At least so many steps to their end; returns the last loss."""
        losses = jnp.zeros(1)
        for _ in range(-(-steps // self.program.steps)):
            self.state, losses = self.program.call(self.state)
        jax.block_until_ready(self.state)
        return float(losses[-1])


def in_turns(
    turns: Mapping[str, Turn], rounds: int, seconds: float, at_once: Mapping[str, int] | None = None
) -> list[dict[str, float]]:
    """Seconds of a step of each in each round; all have run before. A turn's first call is not timed.

    Args:
      turns: what runs, by name; in this order in every round.
      rounds: turns of each.
      seconds: least time of a turn's timed steps; there is one at least.
      at_once: steps that one call of it makes, of those that make more than one.
    """
    calls = {name: (at_once or {}).get(name, 1) for name in turns}
    steps = {
        name: calls[name] * max(1, math.ceil(seconds / seconds_of(lambda run=run, n=calls[name]: run(n))))
        for name, run in turns.items()
    }
    found = []
    for _ in range(rounds):
        times = {}
        for name, run in turns.items():
            run(calls[name])  # gets back the memory that the others had
            times[name] = seconds_of(lambda r=run, n=steps[name]: r(n)) / steps[name]
        found.append(times)
        say("training: " + ", ".join(f"{name} {value:.3f} s" for name, value in found[-1].items()))
    return found


def measure(settings: Settings, genotype: ArrayLike) -> tuple[dict[str, Any], str]:
    """Everything that is asked for, in turns."""
    options, device = settings.options, settings.devices[0]
    spec = settings.network(SPACE, head="snasnet", head_hidden=options.hidden, dropout=0.5)
    images, labels = noise(spec, options.batch, options.seed)
    nets = {"ours": Ours(spec, genotype, images, labels, options.seed, options.precision)}
    nets["ours"].run(2)
    peak = peak_bytes(device)
    if "conventional" in options.sections:
        width = equal_width(spec, genotype)
        with relu_neurons() as neuron:
            like = dataclasses.replace(spec, neuron=neuron, time_steps=1, channels=width)
            nets["conventional"] = Ours(like, genotype, images, labels, options.seed, options.precision)
        nets["conventional"].run(1)
    for name, net in nets.items():
        say(f"training: {name}, C = {net.spec.channels}, compiled in {net.compile_seconds:.1f} s")
    turns: dict[str, Turn] = {name: net.run for name, net in nets.items()}
    skipped = peers.missing() if "peers" in options.sections else "not asked for"
    if not skipped:
        importlib.import_module("torch").set_num_threads(os.cpu_count())  # its own choice depends on the machine's load
        (matrix,) = peers.matrices(np.asarray(genotype)[None], spec)
        inputs = np.asarray(normalise(images, MEAN, STD))
        peer_nets = peers_training.trainers(matrix, spec, inputs, np.asarray(labels), TrainConfig(), options.seed)
        for name, net in peer_nets.items():
            net.run(1)
            turns[name] = net.run
    elif "peers" in options.sections:
        say(f"peers: {skipped}")
    settings = settings.measured_again()
    at_once = {name: net.program.steps for name, net in nets.items()}
    rounds = in_turns(turns, options.rounds, options.seconds, at_once)
    settings = settings.measured_again()

    entries = {}
    for name in turns:
        seconds = [times[name] for times in rounds]
        entries[name] = {"best_s": min(seconds), "median_s": statistics.median(seconds), "seconds": seconds}
        entries[name]["images_per_s"] = options.batch / min(seconds)
        if net := nets.get(name):
            entries[name] |= {
                "channels": net.spec.channels,
                "time_steps": net.spec.time_steps,
                "precision": net.program.precision,
                "forward_flops": forward_flops(net.spec, genotype, options.batch),
                "flops": net.flops,
                "flops_per_s": net.flops / min(seconds),
                "of_matmul": net.flops / min(seconds) / settings.ceiling(net.program.precision),
                "program_bytes": program_bytes(net.program.compiled),
                "compile_s": net.compile_seconds,
            }
        else:
            entries[name] |= _ratio(rounds, name, "ours")
    entries["ours"]["peak_bytes"] = peak
    if "conventional" in entries:
        entries["conventional"]["cost_of_spiking"] = _ratio(rounds, "ours", "conventional")
    results = {"cell": SPACE.explicit(genotype), "training": entries, "ceilings": settings.ceilings._asdict()}
    if "peers" in options.sections:
        results |= {"skipped": skipped, "peer": None if skipped else peers.describe()}
    text = _text(settings, results)
    if "parts" in options.sections:
        results["parts"], more = measure_parts(nets["ours"].program._replace(state=nets["ours"].state), settings)
        text += f"\n\n{more}"
    if "memory" in options.sections:
        results["memory"], more = measure_memory(settings, spec, genotype)
        text += f"\n\n{more}"
    return results, text


def _ratio(rounds: list[dict[str, float]], of: str, to: str) -> dict[str, Any]:
    """How many times longer one takes than another: the median of the rounds, and each."""
    ratios = [times[of] / times[to] for times in rounds]
    return {"ratio": statistics.median(ratios), "ratio_by_round": ratios}


def _text(settings: Settings, results: dict[str, Any]) -> str:
    options, limits, entries = settings.options, settings.ceilings, results["training"]

    def megabytes(value: int | None) -> str:
        return "unknown" if value is None else f"{value / 1e6:,.0f}"

    def between(ratio: dict[str, Any]) -> str:
        low, high = min(ratio["ratio_by_round"]), max(ratio["ratio_by_round"])
        return f"{ratio['ratio']:.2f} ({low:.2f} to {high:.2f})"

    header = ("", "C", "T", "GFLOP per step", "best s", "median s", "images/s", "GFLOP/s", "of matmul ceiling",
              "program MB", "compile s")  # fmt: skip
    rows = [
        (
            _LABELS[name], e["channels"], e["time_steps"], e["flops"] / 1e9, e["best_s"], e["median_s"],
            e["images_per_s"], e["flops_per_s"] / 1e9, f"{100 * e['of_matmul']:.1f} %", megabytes(e["program_bytes"]),
            e["compile_s"],
        )
        for name, e in entries.items()
        if name in ("ours", "conventional")
    ]  # fmt: skip
    ours = entries["ours"]
    peak = "" if ours["peak_bytes"] is None else f" The device's high-water mark: {megabytes(ours['peak_bytes'])} MB."
    parts = [
        f"### Training step\n\nCell `{results['cell']}`, B = {options.batch}, {options.side}×{options.side} images, "
        f"10 classes, SNASNet's head with {options.hidden} hidden neurons, dropout 0.5; SGD, momentum 0.9, weight "
        f"decay; {ours['precision']}, the batch shared by {len(settings.devices)} devices; {options.rounds} rounds in "
        f"turns. Ceilings, the best of those measured before and after: matrix products {limits.float32 / 1e9:,.0f} "
        f"GFLOP/s in float32, {limits.bfloat16 / 1e9:,.0f} in bfloat16. FLOPs are those of linear layers and, tap by "
        f"tap, of convolutions: 3 times the forward pass's, the stem's 2 times. Winograd's tiles, by which CPUs train "
        f"kernels of 3×3, need fewer products than are counted.{peak}\n\n{table(header, rows)}"
    ]
    if "conventional" in entries:
        e = entries["conventional"]
        parts.append(
            "### What spiking costs\n\nThe conventional network: ReLU, one time step, the width of nearest forward "
            f"FLOPs ({e['forward_flops'] / ours['forward_flops']:.4f} of the spiking network's). A spiking training "
            f"step takes **{between(e['cost_of_spiking'])} times** as long (the median of the rounds, and their range)."
        )
    if "peers" in options.sections:
        text = "### Peers\n\n"
        if results["skipped"]:
            parts.append(text + results["skipped"])
        else:
            peer, columns = results["peer"], ("", "best s", "median s", "images/s", "ours is faster by, median (range)")
            names = ("ours", *peers_training.PEERS)
            rows = [
                (_LABELS[name], e["best_s"], e["median_s"], e["images_per_s"], between(e) if name != "ours" else "")
                for name, e in ((name, entries[name]) for name in names)
            ]
            parts.append(
                f"{text}The same cell, batch and SGD. PyTorch {peer['torch']}, spikingjelly {peer['spikingjelly']}, "
                f"{peer['threads']} threads, on {peer['device']}.\n\n{table(columns, rows)}"
            )
    return "\n\n".join(parts)


def bench(options: Options) -> None:
    """Measures, prints tables, and writes the results."""
    began = time.perf_counter()
    jax.config.update("jax_enable_compilation_cache", False)  # compilation is measured
    options = filled(options, _DEFAULTS, jax.default_backend())
    devices = list(devices_for(options.batch or 1).devices.flat)
    genotype = SPACE.prune(SPACE.parse(options.cell))
    settings = Settings(options, devices, ceilings.Ceilings(0, 0, 0))
    settings.network(SPACE, head="snasnet")  # refuses sizes that no network has
    if 3 not in options.sizes:
        raise ValueError(f"--sizes {options.sizes}: want 3 among them, which the others are compared with")
    sections: dict[str, Any] = {"": lambda s: measure(s, genotype), "kernels": measure_kernels}
    if "kernels" not in options.sections:
        del sections["kernels"]
    elif options.sections == ("kernels",):
        del sections[""]
    report("Training benchmark", __file__, began, settings, sections)


if __name__ == "__main__":
    cli.main(Options, bench, __doc__ or "")
