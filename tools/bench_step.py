"""Where a training step's time goes, by part and direction, and what memory it takes by time steps and batch."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from numpy.typing import ArrayLike

import trace_parts
from bench_common import Settings, say, table
from bench_kernels import Program, compiled_step, noise
from spikernel_jax.snn.spec import NetworkSpec
from spikernel_jax.training.devices import devices_for
from spikernel_jax.training.recipe import TrainConfig

FORWARD, BACKWARD, KERNELS = "forward", "backward", "kernel gradients"
PHASES: tuple[str, ...] = (FORWARD, BACKWARD, KERNELS)
CONVOLUTION = "convolution"
UPDATE = "images, optimiser"  # what is in neither pass
PARTS = (*(part for part in trace_parts.PARTS if part != "gram"), UPDATE)


def phase_of(part: str, source: str) -> tuple[str, str]:
    """Part and phase of an instruction of a training step.

    Args:
      part: of `trace_parts.PARTS`.
      source: the operation it came from, as JAX names it.
    """
    if "jvp(" not in source:
        return (UPDATE, FORWARD) if part == trace_parts.REST else (part, FORWARD)
    if "kernel_gradient" in source:
        return part, KERNELS
    return part, BACKWARD if "transpose(" in source else FORWARD


class StepProfile(NamedTuple):
    """A step on one device, the devices' mean, by part and phase."""

    seconds: dict[str, dict[str, float]]
    moved: dict[str, dict[str, float]]  # bytes of arrays read and written; of loops over slices far too many
    devices: int


def profiled(program: Program) -> StepProfile:
    """A profile of a program of `compiled_step`, whose state is used up."""
    state, _ = jax.block_until_ready(program.call(program.state))
    devices = len(jax.tree.leaves(state)[0].devices())
    text = program.compiled.as_text()
    name = text.split("HloModule ")[1].split(",")[0]
    events, _ = trace_parts.profile(lambda: jax.block_until_ready(program.call(state)))
    programs = {name: trace_parts.instructions(text)}

    def by_part(sources: Mapping[tuple[str, str], float]) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {part: dict.fromkeys(PHASES, 0.0) for part in PARTS}
        for (part, source), value in sources.items():
            part, phase = phase_of(part, source)
            found[part][phase] += value / program.steps / devices
        return found

    _, seconds = trace_parts.device_seconds(events, programs)
    return StepProfile(by_part(seconds), by_part(trace_parts.device_bytes(events, programs)), devices)


def measure_parts(program: Program, settings: Settings) -> tuple[dict[str, Any], str]:
    """A profile of a program, whose state is used up; of what does not convolve, how fast it goes through memory."""
    parts, moved, devices = profiled(program)
    total = sum(sum(phases.values()) for phases in parts.values())
    passing = {part: phases for part, phases in moved.items() if part != CONVOLUTION}

    def text(part: str, phase: str) -> str:
        seconds, passed = parts[part][phase], passing.get(part, {}).get(phase, 0)
        rate = f", {devices * passed / seconds / 1e9:.0f} GB/s" if seconds and passed else ""
        return f"{seconds:.3f} s, {100 * seconds / total:.1f} %{rate}"

    rows = [(part, *(text(part, phase) for phase in PHASES)) for part in parts]
    say(f"parts: {total:.2f} s a step on each device")
    passed, bandwidth = devices * sum(sum(phases.values()) for phases in passing.values()), settings.ceilings.bandwidth
    return {"seconds": parts, "bytes": passing, "devices": devices, "total": total}, (
        f"### Where a step's time goes\n\nDevice time of a step, from a profile of one: {total:.2f} s in all. What was "
        f"compiled into one instruction counts for its last part; sums and the head are in {trace_parts.REST!r}. GB/s: "
        f"arrays that instructions read and write, on all {devices} devices; {passed / 1e9:.2f} GB a step "
        f"beside convolutions, which would take {passed / bandwidth:.3f} s at the bandwidth of {bandwidth / 1e9:.0f} "
        f"GB/s.\n\n"
        f"{table(('', *PHASES), rows)}"
    )


def program_bytes(compiled: Any) -> int | None:
    """Arguments, results and temporary values of a compiled program; None where its backend does not tell."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    sizes = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    return sizes - found.alias_size_in_bytes  # results in the place of arguments


def measure_memory(settings: Settings, spec: NetworkSpec, genotype: ArrayLike) -> tuple[dict[str, Any], str]:
    """What a compiled step needs, by T and B: programs are compiled, none runs.

    Args:
      settings: of the benchmark.
      spec: the network.
      genotype: codes [E].
    """
    options = settings.options
    found: dict[tuple[int, int], int | None] = {}
    for steps in options.memory_times:
        for batch in options.memory_batches:
            images, labels = noise(spec, batch, options.seed)
            timed = dataclasses.replace(spec, time_steps=steps)
            config = TrainConfig(batch_size=batch, precision=options.precision)
            program = compiled_step(timed, genotype, config, images, labels, options.seed)
            found[steps, batch] = program_bytes(program.compiled)
            say(f"memory: T = {steps}, B = {batch}: {(found[steps, batch] or 0) / 1e6:,.0f} MB")
    rows = [
        (steps, *(_megabytes(found[steps, batch], batch) for batch in options.memory_batches))
        for steps in options.memory_times
    ]
    entries = [{"time_steps": t, "batch": b, "program_bytes": value} for (t, b), value in found.items()]
    return {"rows": entries}, (
        "### Memory\n\nOf a compiled step on one device, and of that an image of its share of the batch.\n\n"
        f"{table(('T', *(f'B = {batch}' for batch in options.memory_batches)), rows)}"
    )


def _megabytes(value: int | None, batch: int) -> str:
    share = batch / devices_for(batch).size
    return "unknown" if value is None else f"{value / 1e6:,.0f} MB, {value / 1e6 / share:.1f} an image"
