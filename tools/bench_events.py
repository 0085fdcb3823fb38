"""Instructions of the exported C against firing rate, beside a loop that multiplies every spike, 0 or 1.

    python tools/bench_events.py runs/mnist5k-cpu-seed0/finalists/k3-5/checkpoint --json events.json

Every threshold of the network is scaled, so that it fires more or less; each program runs in an emulated processor, and
is held against JAX there. Instructions are counted, not timed: other work on the machine changes nothing.
"""

import dataclasses
import json
import re
import tempfile
from pathlib import Path

import tyro

from spikernel_jax.data import load_dataset
from spikernel_jax.embedded import boards, bounds, c
from spikernel_jax.embedded.integer import run
from spikernel_jax.embedded.lower import lower
from spikernel_jax.embedded.program import Fire, Instruction, Program
from spikernel_jax.io.run_folder import environment
from spikernel_jax.pipeline import cli
from spikernel_jax.training.checkpoint import load_model

_EVENTS = re.compile(
    r"( *)while \(word\) \{\n *add_row\(weights \+ (.*?) \+ 32 \* \(k / SPIKES\) \+ lowest\(word\)\).*?\n\1\}\n", re.S
)
_DENSE = """for (int i32 = 0; i32 < 32 && 32 * k + i32 < c; i32++) {
    add_times(weights + PLACE + 32 * k + i32) * ROW(out), out, (int32_t)(word >> i32 & 1u));
}
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """What runs, and where."""

    model: tyro.conf.Positional[Path]
    """Folder of a checkpoint."""
    bits: int = 8
    """Width of weights, 2 to 8."""
    processor: str = "cortex-m4"
    """Of the emulated board."""
    thresholds: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    """What thresholds are multiplied by."""
    images: int = 16
    """Validation images."""
    data_dir: Path | None = None
    """Where prepared data lie; default the environment's TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    json: Path | None = None
    """Where to write the rows, too."""


def scaled(program: Program, factor: float) -> Program:
    """A program whose neurons have other thresholds; ValueError if one could overflow."""

    def own(instruction: Instruction) -> Instruction:
        if not isinstance(instruction, Fire):
            return instruction
        return dataclasses.replace(instruction, threshold=max(1, round(factor * instruction.threshold)))

    other = dataclasses.replace(program, step=tuple(own(instruction) for instruction in program.step))
    bounds.check(other)
    return other


def dense(source: c.Source) -> c.Source:
    """The same C, whose convolutions of spikes go through all channels and multiply."""
    text, count = _EVENTS.subn(
        lambda found: "".join(found[1] + line + "\n" for line in _DENSE.replace("PLACE", found[2]).splitlines()),
        source.files["spikernel.c"],
    )
    if not count:
        raise ValueError("no convolution of spikes in this network")
    return source._replace(files=source.files | {"spikernel.c": text})


def bench(options: Options) -> None:
    """Prints a row for each factor."""
    if options.images < 1:
        raise ValueError(f"--images {options.images} must be at least 1")
    model = load_model(options.model)
    if (most := model.spec.neuron.max_spikes) > 1:
        raise ValueError(f"{options.model}: max_spikes={most}, and the loop beside it multiplies by 0 or 1: want 1")
    program = lower(model, options.bits)
    name = str(model.metrics.get("data", "mnist5k"))
    images = load_dataset(name, options.data_dir).validation.images[: options.images]
    neurons = sum(site.neurons for site in model.spec.sites(model.genotype).values()) * program.time_steps
    rows = []
    for factor in options.thresholds:
        other = scaled(program, factor)
        rate = sum(own.sum() for own in run(other, images).spikes.values()) / (neurons * len(images))
        events, found = c.generate(other), {}
        for kind, source in (("events", events), ("dense", dense(events))):
            with tempfile.TemporaryDirectory() as scratch:
                c.write(source, folder := Path(scratch) / "c")
                found[kind] = boards.measure(other, folder, images, options.processor).instructions
        rows.append({"threshold": factor, "firing_rate": round(float(rate), 4), **found})
        cli.say(
            f"threshold x{factor:g}: firing rate {rate:.3f}, {found['events']:,} instructions an image, "
            f"{found['dense']:,} dense ({found['dense'] / found['events']:.2f} times as many)"
        )
    if options.json:
        about = {"genotype": model.text, "bits": options.bits, "processor": options.processor, "images": len(images)}
        record = about | {"data": name, "rows": rows, "git": environment()["git"]}
        options.json.write_text(json.dumps(record, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    cli.main(Options, bench, __doc__ or "")
