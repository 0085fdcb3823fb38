"""What becomes of the chosen model on a device: integers of several widths, their accuracy and memory, and C.

Nothing is chosen here: accuracies on test images are of every width asked for.
"""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nir
import numpy as np
from numpy.typing import NDArray

from spikernel_jax.embedded import boards, build, c, integer, stablehlo
from spikernel_jax.embedded.nir_graph import graph_of
from spikernel_jax.embedded.program import Program
from spikernel_jax.io.files import atomic_folder
from spikernel_jax.pipeline import fitting
from spikernel_jax.pipeline.fitting import Fitted, float_bytes
from spikernel_jax.pipeline.job import Job
from spikernel_jax.pipeline.summary import write_summary_report
from spikernel_jax.report import device_figures
from spikernel_jax.snn import devices
from spikernel_jax.snn.cost import energy_nj, synaptic_operations
from spikernel_jax.snn.model import Model
from spikernel_jax.training.checkpoint import load_model
from spikernel_jax.training.evaluation import evaluate, measure_spikes

if TYPE_CHECKING:
    import polars as pl

FLOAT, LONGER = "float32", "float32, trained on"
PROCESSORS = "processors"
_EMULATED = 16  # images on a microcontroller
_TOLERATED = 0.005  # what rounding may lose
_MEASURED = ("what", "processor", "code_bytes", "constant_bytes", "written_bytes", "instructions", "verified_images")


@dataclasses.dataclass(frozen=True)
class Settings(fitting.Settings):
    """How a model is taken to a device; `tune` where rounding alone loses more than half a point.

    Attributes:
      images: test images that the C is verified on, at most; 0 verifies nothing.
      compiler: that it is built with; where there is none, nothing is verified.

    Raises:
      ValueError: naming the option, its value and what would be right.
    """

    images: int
    compiler: str

    def __post_init__(self) -> None:
        """Refuses what no device has, before any work."""
        super().__post_init__()
        if self.images < 0:
            raise ValueError(f"--images {self.images} must be at least 0")

    @property
    def verified(self) -> int:
        """Images that C is verified on."""
        return self.images if shutil.which(self.compiler) else 0


def embed_model(job: Job, settings: Settings) -> "pl.DataFrame":
    """Takes the chosen model to integers of each width of weights, writes their C, and verifies it.

    Leaves ``embedded/`` (a folder of C for each width, the float network's StableHLO and NIR, and ``manifest.json``),
    ``tables/embedded.parquet`` (a row for the float network, one for it after as many epochs more if any width had
    them, and one for each width), ``tables/processors.parquet`` (a row for each width on each microcontroller, where
    their tools are; else none), ``figures/embedded.png``, and a section in ``report.md``.

    Args:
      job: of a run that has chosen a model.
      settings: how.

    Raises:
      ValueError: if no model has been chosen, its checkpoint is damaged, or it has no form of integers.
      MismatchError: if C and specification differ.
    """
    import polars as pl

    chosen = job.run.summary().get("chosen")
    if chosen is None:
        raise ValueError(f"{job.run.path} has no chosen model: run experiments/tradeoff.py --out {job.run.path} first")
    name = chosen["name"]
    model = load_model(job.run.path / "finalists" / name / "checkpoint")
    with job.step("embed"):
        # Before anything is trained.
        programs = [fitting.program_of(job, model, bits, settings.width) for bits in settings.widths]
        rows, measured = [_of_float(job, model, FLOAT)], []
        with atomic_folder(target := job.run.path / "embedded") as fresh:
            fresh.mkdir()
            for program in programs:
                fitted, alone = _fitted(job, name, model, program, settings, rows[0]["validation_accuracy"])
                row, on_processors = _written(job, fitted, fresh / f"int{program.bits}", settings)
                tuned = {"tuned_epochs": 0 if fitted.model is model else settings.tune}
                rows.append(row | tuned | {"rounded_accuracy": alone})
                measured += on_processors
            if any(row["tuned_epochs"] for row in rows):  # their equal: as many epochs, without rounding
                job.say("  float32: as many epochs more")
                longer = fitting.trained_on(job, name, model, 0, settings.tune)
                rows.insert(1, _of_float(job, longer, LONGER) | {"tuned_epochs": settings.tune})
            _write_float(job, model, fresh)
            _write_manifest(job, model, fresh, settings.width)
        table = pl.DataFrame(rows)
        job.run.write_table("embedded", table)
        job.run.write_table(PROCESSORS, pl.DataFrame(measured, _MEASURED, orient="row"))
        images = len(job.data.validation.labels)
        title = f"The chosen model in integers, {job.data.name}, {images} validation images, ± SE of these"
        device_figures.embedded_figure(table, job.run.folder("figures") / "embedded.png", title, images)
    job.say(f"{target}: {'verified with ' + settings.compiler if settings.verified else 'C that is not verified'}")
    job.say(f"report: {write_summary_report(job)}")
    return table


def _fitted(
    job: Job, name: str, model: Model, program: Program, settings: Settings, exact: float
) -> tuple[Fitted, float]:
    """The model, or where rounding loses too much one trained on for so few bits, if validation finds it better.

    Beside it the accuracy on validation images that rounding alone leaves.
    """
    plain, bits = fitting.rounded(job, model, program), program.bits
    lost = exact - plain.accuracy
    if lost <= _TOLERATED or not settings.tune:
        return plain, plain.accuracy
    job.say(f"  int{bits}: {100 * lost:.1f} points lost by rounding alone; training for {bits} bits")
    tuned = fitting.trained_on(job, name, model, bits, settings.tune)
    other = fitting.rounded(job, tuned, fitting.program_of(job, tuned, bits, settings.width))
    return max(plain, other, key=lambda own: own.accuracy), plain.accuracy


def _written(job: Job, fitted: Fitted, folder: Path, settings: Settings) -> tuple[dict[str, Any], list[Any]]:
    """Writes and verifies the C of a program; its row of the table, and those of microcontrollers."""
    model, program, found, validated = fitted
    name, bits, data = folder.name, program.bits, job.data
    about = f"{model.text}, trained on {data.name}; weights of {bits} bits, currents of {settings.width}."
    source = c.generate(program, about)
    c.write(source, folder)
    tested = integer.run(program, data.test.images)
    some, measured = data.test.images[: settings.verified], []
    if len(some):
        build.verify(program, folder, some, settings.compiler)
        measured = _on_processors(job, name, program, folder, some[:_EMULATED])
    synops = synaptic_operations(model.spec, model.genotype, found.places)
    row = {
        "what": name,
        "bits": bits,
        "validation_accuracy": validated,
        "test_accuracy": fitting.accuracy(tested, data.test),
        "spikes": float(sum(own.sum() for own in found.places.values())),
        "energy_nj": energy_nj(model.spec, model.genotype, synops, integers=True),
        "constant_bytes": source.constant_bytes,
        "written_bytes": source.written_bytes,
        "verified_images": len(some),
        "fits": _fits(model, bits, settings.width),
    }
    job.say(
        f"  {name}: validation {100 * row['validation_accuracy']:.2f} %, {source.constant_bytes:,} bytes read and "
        f"{source.written_bytes:,} written to, verified on {len(some)} images"
    )
    return row, measured


def _on_processors(job: Job, name: str, program: Program, folder: Path, images: NDArray[np.uint8]) -> list[Any]:
    """What the C takes of each microcontroller, where there are tools for them."""
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


def _fits(model: Model, bits: int, width: int) -> str:
    """Names of the devices whose limits the model keeps to."""
    every = devices.broken_of_all(model.spec, model.genotype, bits, width).items()
    return ", ".join(name for name, broken in every if not broken)


def _of_float(job: Job, model: Model, what: str) -> dict[str, Any]:
    places = measure_spikes(model, job.data.validation)
    spikes = sum(own.sum() for own in places.values())
    synops = synaptic_operations(model.spec, model.genotype, places)
    return {
        "what": what, "bits": 32, "validation_accuracy": evaluate(model, job.data.validation),
        "test_accuracy": evaluate(model, job.data.test), "spikes": float(spikes),
        "energy_nj": energy_nj(model.spec, model.genotype, synops), "constant_bytes": float_bytes(model),
        "written_bytes": None, "verified_images": 0, "fits": "", "tuned_epochs": 0, "rounded_accuracy": None,
    }  # fmt: skip


def _write_float(job: Job, model: Model, folder: Path) -> None:
    """The float network for other programs: StableHLO, and NIR where that can say it."""
    (folder / "float32.stablehlo").write_bytes(stablehlo.export(model))
    try:
        nir.write(folder / "float32.nir", graph_of(model))
    except ValueError as error:
        job.say(f"  not written as NIR: {error}")


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
