"""Training steps of ours, compiled; and how fast they are by kernel size and by what surrounds them.

XLA computes a convolution that is not in channels-last layout by a naive loop on a CPU where it stands in a loop body
(jax-ml/jax issue 12868), and its own gradient for a kernel is one. So for each size a step is timed called alone, in a
call of several steps, and of a feedback cell, whose time steps are a loop: all three should be as fast.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from bench_common import Settings, say, table
from spikernel_jax.cells.space import CellSpace
from spikernel_jax.snn.model import hashable
from spikernel_jax.snn.spec import NetworkSpec
from spikernel_jax.training.devices import devices_for, to_all
from spikernel_jax.training.recipe import TrainConfig
from spikernel_jax.training.step import Program as Step
from spikernel_jax.training.step import TrainState, one_step, train_steps

MEAN = STD = (0.5, 0.5, 0.5)
CELL = "0>1:convK 1>3:convK 0>3:skip"
FEEDBACK = "0>1:convK 1>2:convK 2>0:convK 1>3:convK 0>3:skip"
ALONE, SCAN, LOOP = "step alone", "steps in a scan", "feedback cell"
_TOGETHER = 4  # steps of a call


class Program(NamedTuple):
    """A compiled training step of ours."""

    call: Callable[[TrainState], tuple[TrainState, jax.Array]]  # the new state, and its losses
    steps: int  # of one call
    state: TrainState
    compiled: Any
    precision: str  # of convolutions: a ceiling's name


def compiled_step(
    spec: NetworkSpec,
    genotype: ArrayLike,
    config: TrainConfig,
    images: jax.Array,
    labels: jax.Array,
    seed: int,
    steps: int = 1,
) -> Program:
    """Compiles what `train` trains with: the one place that knows how it makes a step.

    Args:
      spec: the network.
      genotype: codes [E].
      config: the recipe.
      images: uint8 [B, H, W, C], one batch.
      labels: int32 [B].
      seed: of weights and dropout.
      steps: of a call, in a scan; 0 is one step without a scan around it.
    """
    codes = hashable(genotype)
    devices = devices_for(len(labels))
    program = Step(spec, codes, config, 1_000_000, MEAN, STD, devices)  # so long a cosine is a constant
    init, key = jax.random.split(jax.random.key(seed))
    state = program.start(init)
    chosen = jnp.arange(len(labels))
    chosen = jnp.tile(chosen, (steps, 1)) if steps else chosen
    rest = ((), *to_all(devices, (key, images, labels, chosen)))

    def alone(program: Step, state: TrainState, cell: Any, key: Any, images: Any, labels: Any, chosen_B: Any) -> Any:
        return one_step(program, cell, key, images, labels, state, chosen_B)

    step = train_steps if steps else jax.jit(alone, static_argnames=("program",), donate_argnames=("state",))
    compiled = step.lower(program, state, *rest).compile()
    return Program(lambda state: compiled(state, *rest), steps or 1, state, compiled, config.precision)


def noise(spec: NetworkSpec, batch: int, seed: int) -> tuple[jax.Array, jax.Array]:
    """A batch that shows nothing: images uint8 [B, H, W, C], and labels int32 [B]."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (batch, *spec.image_shape), np.uint8)
    return jnp.asarray(images), jnp.asarray(rng.integers(0, spec.num_classes, batch).astype(np.int32))


def convolution_flops(spec: NetworkSpec, genotype: ArrayLike, batch: int) -> int:
    """FLOPs of a training step's convolutions and linear layers: 3 times the forward pass's, the stem's 2 times.

    Unlike `bench_training.step_flops` of feedback cells too. Borders in full; a multiply-add is 2.

    Args:
      spec: the network, with head gap.
      genotype: codes [E], no edges of dead nodes.
      batch: images.
    """
    (h1, w1), (h2, w2) = spec.cell_size(0), spec.cell_size(1)
    c1, c2 = spec.cell_channels(0), spec.cell_channels(1)
    taps = sum(operation.weights(1) for *_, operation in spec.space.held(np.asarray(genotype)))
    cells = taps * (h1 * w1 * c1 * c1 + h2 * w2 * c2 * c2)
    transition = h1 * w1 * 9 * c1 * c2
    each_step = cells + transition + spec.features * spec.outputs
    stem = h1 * w1 * 9 * spec.image_shape[2] * c1
    return 2 * batch * (3 * spec.time_steps * each_step + 2 * stem)


def measure_kernels(settings: Settings) -> tuple[dict[str, Any], str]:
    """A row for each width and kernel size: seconds of a step, the best of some turns, and its share of the ceiling."""
    options = settings.options
    settings = settings.measured_again()
    rows: list[dict[str, Any]] = []
    for channels in options.widths:
        for k in options.sizes:
            times, flops = {}, {}
            for name, text, steps in ((ALONE, CELL, 0), (SCAN, CELL, _TOGETHER), (LOOP, FEEDBACK, _TOGETHER)):
                space = CellSpace((k,), feedback=name == LOOP)
                spec = settings.network(space, channels=channels)
                row = space.parse(text.replace("convK", f"conv{k}"))
                images, labels = noise(spec, options.kernel_batch, options.seed)
                config = TrainConfig(batch_size=options.kernel_batch)
                times[name] = _stepper(compiled_step(spec, row, config, images, labels, options.seed, steps))
                flops[name] = convolution_flops(spec, row, options.kernel_batch)
            best = dict.fromkeys(times, float("inf"))
            for _ in range(options.rounds):  # in turns
                for name, step in times.items():
                    best[name] = min(best[name], step())
            for name, seconds in best.items():
                rate = flops[name] / seconds
                of = rate / settings.ceilings.float32
                entry = {
                    "channels": channels,
                    "kernel_size": k,
                    "program": name,
                    "seconds": seconds,
                    "flops": flops[name],
                }
                rows.append(entry | {"flops_per_s": rate, "of_matmul": of})
            say(f"kernels: C = {channels}, k = {k}: " + ", ".join(f"{n} {s:.3f} s" for n, s in best.items()))
    return {"rows": rows, "ceilings": settings.ceilings._asdict()}, _text(settings, rows)


def _stepper(program: Program) -> Callable[[], float]:
    """Seconds of a step of the program, the mean of some, after one call that is not timed."""
    state = [program.state]

    def call() -> None:
        state[0], _ = program.call(state[0])
        jax.block_until_ready(state[0])

    def seconds() -> float:
        call()
        began, calls = time.perf_counter(), 0
        while calls < 2 or time.perf_counter() - began < 0.5:
            call()
            calls += 1
        return (time.perf_counter() - began) / calls / program.steps

    return seconds


def _text(settings: Settings, rows: list[dict[str, Any]]) -> str:
    options = settings.options
    found = {(row["channels"], row["kernel_size"], row["program"]): row for row in rows}
    lines = []
    for channels in options.widths:
        for k in options.sizes:
            alone, scan, loop = (found[channels, k, name] for name in (ALONE, SCAN, LOOP))
            lines.append([
                channels, k, *(f"{row['seconds']:.3f} s, {row['flops_per_s'] / 1e9:.0f}, {100 * row['of_matmul']:.1f} %"
                               for row in (alone, scan, loop)),
                scan["seconds"] / alone["seconds"], scan["of_matmul"] / found[channels, 3, SCAN]["of_matmul"],
            ])  # fmt: skip
    header = ("C", "k", ALONE, SCAN, LOOP, "scan / alone", "share of k = 3's fraction")
    return (
        f"### A step by kernel size\n\n`{CELL}` and, with feedback, `{FEEDBACK}`; B = {options.kernel_batch}, T = "
        f"{options.time_steps}, {options.side}×{options.side} images, head gap, SGD; {_TOGETHER} steps a scan. Seconds "
        f"of a step (best of {options.rounds} turns), GFLOP/s, and of the matmul ceiling of "
        f"{settings.ceilings.float32 / 1e9:,.0f} GFLOP/s.\n\n{table(header, lines)}"
    )
