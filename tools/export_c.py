"""Exports a checkpoint as C99: integers alone, no heap, static memory, spikes as events.

    python tools/export_c.py runs/mnist5k-cpu-seed0/finalists/k3-5/checkpoint exported

Where there is a compiler, the C is built and held against its specification in JAX, to the bit, on validation images.
"""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import tyro

from spikernel_jax.data import load_dataset
from spikernel_jax.embedded import build, c
from spikernel_jax.embedded.calibration import CALIBRATED, calibrated
from spikernel_jax.embedded.lower import WIDTHS
from spikernel_jax.io.units import format_bytes
from spikernel_jax.pipeline import cli
from spikernel_jax.training.checkpoint import load_model


@dataclasses.dataclass(frozen=True)
class Options:
    """What is exported, and where to."""

    model: tyro.conf.Positional[Path]
    """Folder of a checkpoint."""
    out: tyro.conf.Positional[Path]
    """Folder to make."""
    bits: int = 8
    """Width of weights, 2 to 8."""
    width: int = 8
    """Width of currents and membranes, 8 to 16; below 16 those are clipped that training images show to be rare."""
    compiler: str = "gcc"
    """That the C is built with to verify it."""
    images: int = 1000
    """Validation images that it is verified on, at most; 0 verifies nothing."""
    data_dir: Path | None = None
    """Where prepared data lie; default the environment's TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    load: tuple[Path, ...] = ()
    """Python files that are run first, which register operations of one's own."""


def export_c(options: Options) -> None:
    """Writes the C, and says what it was verified on."""
    if options.images < 0:
        raise ValueError(f"--images {options.images} must be at least 0")
    if not options.out.resolve().parent.is_dir():
        raise ValueError(f"{options.out}: the folder that is to hold it is not there")
    model = load_model(options.model)
    trained_on = model.metrics.get("data", "other images")
    verified = options.images and shutil.which(options.compiler)
    data = load_dataset(trained_on, options.data_dir) if verified or options.width < WIDTHS[1] else None
    program = calibrated(model, data.train.images[:CALIBRATED] if data else (), options.bits, options.width)
    about = f"{model.text}, trained on {trained_on}; weights of {options.bits} bits, currents of {options.width}."
    source = c.generate(program, about)
    c.write(source, options.out)
    cli.say(
        f"{options.out}: writes to {format_bytes(source.written_bytes)} of static memory, reads "
        f"{format_bytes(source.constant_bytes)} of constants"
    )
    if not (data and verified):
        why = "no images were asked for" if not options.images else f"there is no {options.compiler}"
        cli.say(f"not verified: {why}")
        return
    images, labels = (own[: options.images] for own in (data.validation.images, data.validation.labels))
    found = build.verify(program, options.out, images, options.compiler)
    exact = np.asarray(model(images)).argmax(1)
    cli.say(
        f"verified: built by {options.compiler}, the same classes, logits and spikes as in JAX on {len(labels)} "
        f"validation images of {data.name}"
    )
    cli.say(
        f"accuracy there {100 * np.mean(found.classes_B == labels):.2f} %, of the float32 network "
        f"{100 * np.mean(exact == labels):.2f} %"
    )


if __name__ == "__main__":
    cli.main(Options, export_c, __doc__ or "")
