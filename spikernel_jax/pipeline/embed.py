"""What becomes of the chosen model on a device: integers of several widths, their accuracy and memory, and C.

Nothing is chosen here: accuracies on test images are of every width asked for.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spikernel_jax.data import Split
from spikernel_jax.embedded import boards, build, c, integer
from spikernel_jax.embedded.lower import WEIGHT_BITS, WIDTHS, lower
from spikernel_jax.embedded.program import Program
from spikernel_jax.io.files import atomic_folder
from spikernel_jax.pipeline.job import Job
from spikernel_jax.pipeline.summary import write_summary_report
from spikernel_jax.report import device_figures
from spikernel_jax.snn import devices
from spikernel_jax.snn.model import Model
from spikernel_jax.training.checkpoint import load_model
from spikernel_jax.training.evaluation import evaluate, measure_spikes

if TYPE_CHECKING:
    import polars as pl

FLOAT = "float32"
PROCESSORS = "processors"
_EMULATED = 16  # images on a microcontroller
_MEASURED = ("what", "processor", "code_bytes", "constant_bytes", "written_bytes", "instructions", "verified_images")


def check(widths: Sequence[int], width: int, images: int) -> None:
    """Raises ValueError on settings that no device has, before any work."""
    (least, most), (narrowest, widest) = WEIGHT_BITS, WIDTHS
    if not widths or len(set(widths)) < len(widths) or not all(least <= own <= most for own in widths):
        given = " ".join(map(str, widths))
        raise ValueError(f"--widths {given}: want different widths of weights from {least} to {most}")
    if not narrowest <= width <= widest:
        raise ValueError(f"--membrane-bits {width} must be from {narrowest} to {widest}")
    if images < 0:
        raise ValueError(f"--images {images} must be at least 0")


def embed_model(job: Job, widths: Sequence[int], width: int, images: int, compiler: str) -> "pl.DataFrame":
    """Takes the chosen model to integers of each width of weights, writes their C, and verifies it.

    Leaves ``embedded/`` (a folder of C for each width, and ``manifest.json``), ``tables/embedded.parquet`` (a row for
    the float network and each width), ``tables/processors.parquet`` (a row for each width on each microcontroller,
    where their tools are; else none), ``figures/embedded.png``, and a section in ``report.md``.

    Args:
      job: of a run that has chosen a model.
      widths: of weights.
      width: of currents and membranes.
      images: test images that the C is verified on, at most; 0 verifies nothing.
      compiler: that it is built with; where there is none, nothing is verified.

    Raises:
      ValueError: if no model has been chosen, its checkpoint is damaged, or it has no form of integers.
      MismatchError: if C and specification differ.
    """
    import polars as pl

    check(widths, width, images)
    chosen = job.run.summary().get("chosen")
    if chosen is None:
        raise ValueError(f"{job.run.path} has no chosen model: run experiments/tradeoff.py --out {job.run.path} first")
    model = load_model(job.run.path / "finalists" / chosen["name"] / "checkpoint")
    compiler = compiler if shutil.which(compiler) else ""
    verified = images if compiler else 0
    with job.step("embed"):
        programs = {f"int{bits}": lower(model, bits, width) for bits in widths}
        rows, measured = [_of_float(job, model)], []
        with atomic_folder(target := job.run.path / "embedded") as fresh:
            fresh.mkdir()
            for (name, program), bits in zip(programs.items(), widths, strict=True):
                about = f"{model.text}, trained on {job.data.name}; weights of {bits} bits, currents of {width}."
                source = c.generate(program, about)
                c.write(source, fresh / name)
                found, tested = (integer.run(program, split.images) for split in (job.data.validation, job.data.test))
                accuracy = [_accuracy(*own) for own in ((found, job.data.validation), (tested, job.data.test))]
                some = job.data.test.images[:verified]
                if verified:
                    build.verify(program, fresh / name, some, compiler)
                    measured += _on_processors(job, name, program, fresh / name, some[:_EMULATED])
                spikes = sum(own.sum() for own in found.spikes.values()) / len(job.data.validation.labels)
                rows.append({
                    "what": name, "bits": bits, "validation_accuracy": accuracy[0], "test_accuracy": accuracy[1],
                    "spikes": float(spikes), "constant_bytes": source.constant_bytes,
                    "written_bytes": source.written_bytes, "verified_images": len(some),
                    "fits": _fitting(model, bits),
                })  # fmt: skip
                job.say(f"  {name}: validation {100 * accuracy[0]:.2f} %, {source.constant_bytes:,} bytes read and "
                        f"{source.written_bytes:,} written to, verified on {len(some)} images")  # fmt: skip
            _write_manifest(job, model, fresh, width)
        table = pl.DataFrame(rows)
        job.run.write_table("embedded", table)
        job.run.write_table(PROCESSORS, pl.DataFrame(measured, _MEASURED, orient="row"))
        title = f"The chosen model in integers, {job.data.name}, {len(job.data.validation.labels)} validation images"
        device_figures.embedded_figure(table, job.run.folder("figures") / "embedded.png", title)
    job.say(f"{target}: {'verified with ' + compiler if verified else 'C that is not verified'}")
    job.say(f"report: {write_summary_report(job)}")
    return table


def _on_processors(job: Job, name: str, program: Program, folder: Path, images: NDArray[np.uint8]) -> list[Any]:
    """What the C takes of each microcontroller, where there are tools for them and images to verify it on."""
    if not len(images):
        return []
    if lacking := boards.missing():
        job.say(f"  {name}: not measured on a microcontroller, for there is no {', '.join(lacking)}")
        return []
    rows = []
    for processor in boards.BOARDS:
        found = boards.measure(program, folder, images, processor)
        rows.append((name, processor, *found.sections, found.instructions, len(images)))
        job.say(f"  {name} on a {processor}: {found.instructions:,} instructions an image, {found.sections.code:,} "
                f"bytes of code, verified on {len(images)} images in an emulator")  # fmt: skip
    return rows


def _fitting(model: Model, bits: int) -> str:
    """Names of the devices whose limits the model keeps to."""
    every = devices.devices().items()
    return ", ".join(name for name, own in every if not devices.broken(own, model.spec, model.genotype, bits))


def _accuracy(found: integer.Result, split: Split) -> float:
    return float((found.logits_BK.argmax(1) == split.labels).mean())


def _of_float(job: Job, model: Model) -> dict[str, Any]:
    spikes = sum(own.sum() for own in measure_spikes(model, job.data.validation).values())
    parameters = sum(np.size(leaf) for own in model.params.values() for leaf in own.values())
    return {
        "what": FLOAT, "bits": 32, "validation_accuracy": evaluate(model, job.data.validation),
        "test_accuracy": evaluate(model, job.data.test), "spikes": float(spikes), "constant_bytes": 4 * parameters,
        "written_bytes": None, "verified_images": 0, "fits": "",
    }  # fmt: skip


def _write_manifest(job: Job, model: Model, folder: Path, width: int) -> None:
    """What was exported, of what, and the sum of every file."""
    sums = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}  # fmt: skip
    manifest = {
        "genotype": model.text, "data": job.data.name, "mean": list(model.mean), "std": list(model.std),
        "membrane_bits": width, "metrics": model.metrics, "environment": job.run.record()["environment"],
        "sha256": sums,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", "utf-8")
