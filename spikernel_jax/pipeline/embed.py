"""What becomes of the chosen model on a device: integers of several widths, their accuracy and memory, and C.

Nothing is chosen here: accuracies on test images are of every width asked for.
"""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import nir
import numpy as np
from numpy.typing import NDArray

from spikernel_jax.data import Split
from spikernel_jax.embedded import boards, build, c, integer, stablehlo
from spikernel_jax.embedded.lower import WEIGHT_BITS, WIDTHS, lower
from spikernel_jax.embedded.nir_graph import graph_of
from spikernel_jax.embedded.program import Program
from spikernel_jax.io.files import atomic_folder
from spikernel_jax.pipeline.job import Job
from spikernel_jax.pipeline.summary import write_summary_report
from spikernel_jax.report import device_figures
from spikernel_jax.snn import devices
from spikernel_jax.snn.model import Model
from spikernel_jax.training.checkpoint import load_model
from spikernel_jax.training.evaluation import evaluate, measure_spikes
from spikernel_jax.training.loop import train
from spikernel_jax.training.recipe import TrainConfig

if TYPE_CHECKING:
    import polars as pl

FLOAT = "float32"
PROCESSORS = "processors"
_EMULATED = 16  # images on a microcontroller
_TOLERATED = 0.005  # what rounding may lose
_SLOWER = 0.25  # a share of the learning rate that the model was trained with
_MEASURED = ("what", "processor", "code_bytes", "constant_bytes", "written_bytes", "instructions", "verified_images")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a model is taken to a device.

    Attributes:
      widths: of weights.
      width: of currents and membranes.
      images: test images that the C is verified on, at most; 0 verifies nothing.
      compiler: that it is built with; where there is none, nothing is verified.
      tune: epochs of training for weights of few bits, where rounding alone loses more than half a point.

    Raises:
      ValueError: naming the option, its value and what would be right.
    """

    widths: tuple[int, ...]
    width: int
    images: int
    compiler: str
    tune: int

    def __post_init__(self) -> None:
        """Refuses what no device has, before any work."""
        (least, most), (narrowest, widest), given = WEIGHT_BITS, WIDTHS, self.widths
        if not given or len(set(given)) < len(given) or not all(least <= own <= most for own in given):
            shown = " ".join(map(str, given))
            raise ValueError(f"--widths {shown}: want different widths of weights from {least} to {most}")
        if not narrowest <= self.width <= widest:
            raise ValueError(f"--membrane-bits {self.width} must be from {narrowest} to {widest}")
        for name in ("images", "tune"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 0")

    @property
    def verified(self) -> int:
        """Images that C is verified on."""
        return self.images if shutil.which(self.compiler) else 0


def embed_model(job: Job, settings: Settings) -> "pl.DataFrame":
    """Takes the chosen model to integers of each width of weights, writes their C, and verifies it.

    Leaves ``embedded/`` (a folder of C for each width, the float network's StableHLO and NIR, and ``manifest.json``),
    ``tables/embedded.parquet`` (a row for the float network and each width), ``tables/processors.parquet`` (a row for
    each width on each microcontroller, where their tools are; else none), ``figures/embedded.png``, and a section in
    ``report.md``.

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
    model = load_model(job.run.path / "finalists" / chosen["name"] / "checkpoint")
    with job.step("embed"):
        programs = [lower(model, bits, settings.width) for bits in settings.widths]  # before anything is trained
        rows, measured = [_of_float(job, model)], []
        with atomic_folder(target := job.run.path / "embedded") as fresh:
            fresh.mkdir()
            for program in programs:
                fitted = _fitted(job, chosen["name"], model, program, settings, rows[0]["validation_accuracy"])
                row, on_processors = _written(job, fitted, fresh / f"int{program.bits}", settings)
                tuned = {"tuned_epochs": 0 if fitted.model is model else settings.tune}
                rows.append(row | tuned | {"rounded_accuracy": fitted.rounded})
                measured += on_processors
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


class _Fitted(NamedTuple):
    """A model, its program, what that says of validation images, and the accuracy there that rounding alone left."""

    model: Model
    program: Program
    found: integer.Result
    rounded: float


def _fitted(job: Job, name: str, model: Model, program: Program, settings: Settings, exact: float) -> _Fitted:
    """The model, or where rounding loses too much one trained on for so few bits, if validation finds it better."""
    validation, bits = job.data.validation, program.bits
    found = integer.run(program, validation.images)
    plain = _Fitted(model, program, found, _accuracy(found, validation))
    lost = exact - plain.rounded
    if lost <= _TOLERATED or not settings.tune:
        return plain
    job.say(f"  int{bits}: {100 * lost:.1f} points lost by rounding alone; training for {bits} bits")
    was = TrainConfig(**model.metrics["config"])
    config = dataclasses.replace(
        was, epochs=settings.tune, learning_rate=_SLOWER * was.learning_rate, warmup=0.0, weight_bits=bits
    )
    tuned = train(
        model.spec,
        model.genotype,
        job.data,
        config,
        seed=model.metrics["seed"],
        folder=job.run.folder("tuning") / f"{name}-int{bits}-{settings.tune}",
        start=model,
        progress=lambda record: job.say(
            f"    epoch {record['epoch']}/{settings.tune}  validation {100 * record['validation_accuracy']:.1f} %"
        ),
        say=job.say,
    )
    other = lower(tuned, bits, settings.width)
    found = integer.run(other, validation.images)
    better = _accuracy(found, validation) > plain.rounded
    return _Fitted(tuned, other, found, plain.rounded) if better else plain


def _written(job: Job, fitted: _Fitted, folder: Path, settings: Settings) -> tuple[dict[str, Any], list[Any]]:
    """Writes and verifies the C of a program; its row of the table, and those of microcontrollers."""
    model, program, found, _ = fitted
    name, bits, data = folder.name, program.bits, job.data
    about = f"{model.text}, trained on {data.name}; weights of {bits} bits, currents of {settings.width}."
    source = c.generate(program, about)
    c.write(source, folder)
    tested = integer.run(program, data.test.images)
    some, measured = data.test.images[: settings.verified], []
    if len(some):
        build.verify(program, folder, some, settings.compiler)
        measured = _on_processors(job, name, program, folder, some[:_EMULATED])
    row = {
        "what": name,
        "bits": bits,
        "validation_accuracy": _accuracy(found, data.validation),
        "test_accuracy": _accuracy(tested, data.test),
        "spikes": float(sum(own.sum() for own in found.spikes.values()) / len(data.validation.labels)),
        "constant_bytes": source.constant_bytes,
        "written_bytes": source.written_bytes,
        "verified_images": len(some),
        "fits": _fitting(model, bits),
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
