"""How many epochs fit into a given time on this machine.

The number of epochs decides the learning-rate schedule, so it must be known before the first step. A few steps of a
throwaway training tell what a step, an evaluation, a checkpoint and compilation take here; the plan follows from them.
"""

import dataclasses
import itertools
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from spikernel_jax.data import Dataset, Split
from spikernel_jax.io import files
from spikernel_jax.pipeline.job import check_seed, counts, load_images
from spikernel_jax.pipeline.presets import Timed
from spikernel_jax.snn.spec import NetworkSpec
from spikernel_jax.training.evaluation import evaluate
from spikernel_jax.training.loop import train
from spikernel_jax.training.recipe import TrainConfig

FINISH_SECONDS = 6.0  # figure, export and page after the last epoch
MARGIN = 0.05  # of the time left, kept back: steps are timed for seconds and run for minutes
_TIMED = "training"
_STEPS, _ROUNDS, _EVALUATED = 8, 4, 1024  # steps a round, rounds and images that are timed; the first round compiles


class Costs(NamedTuple):
    """Seconds that the parts of a training take on this machine."""

    start: float  # before the first step: data to the device, compilation
    step: float
    image: float  # evaluated
    save: float  # one checkpoint

    def epoch(self, steps: int, validation: int) -> float:
        """An epoch of so many steps, its evaluation on so many images, and its checkpoint."""
        return steps * self.step + validation * self.image + self.save

    def ends(self, test: int) -> float:
        """What comes before the first epoch and after the last, with a test on so many images."""
        return self.start + test * self.image + self.save + FINISH_SECONDS


def epochs_that_fit(costs: Costs, seconds: float, steps: int, validation: int, test: int) -> int:
    """Whole epochs that fit into a time, with all that goes before, after and with them.

    Args:
      costs: of the parts.
      seconds: left; `MARGIN` of them is kept back.
      steps: of an epoch.
      validation: images evaluated after each epoch.
      test: images evaluated at the end.

    Returns:
      Epochs; 0 where not even one fits.
    """
    left = (1 - MARGIN) * seconds - costs.ends(test)
    return max(0, math.floor(left / costs.epoch(steps, validation)))


@dataclasses.dataclass(frozen=True)
class TimedTraining:
    """What is to be trained: settings, checked, and images.

    Attributes:
      preset_name: of the preset that `preset` came from.
      preset: settings.
      data: images.
      spec: the network.
      genotype: its cell, [E].
      seed: of everything random.
      say: prints a line of progress.
      since: seconds of this process that were another training's.
    """

    preset_name: str
    preset: Timed
    data: Dataset
    spec: NetworkSpec
    genotype: np.ndarray
    seed: int
    say: Callable[[str], None]
    since: float = 0.0

    def seconds(self) -> float:
        """Since the process was started, or the last training was done."""
        return process_seconds() - self.since

    @property
    def validation_name(self) -> str:
        """What the accuracy on the validation images is to be called."""
        return "validation (trained on)" if self.preset.all_images else "validation"

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return len(self.data.train.labels) // self.preset.training.batch_size

    def config(self) -> dict[str, Any]:
        """What the run's folder is known by."""
        return {
            "data": self.data.name,
            "preset": self.preset_name,
            "seed": self.seed,
            "settings": dataclasses.asdict(self.preset),
            "images": counts(self.data),
        }


def open_training(
    data: str,
    preset_name: str,
    preset: Timed,
    *,
    seed: int = 0,
    data_dir: str | Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> TimedTraining:
    """Checks all settings and loads the images; nothing is written.

    Raises:
      ValueError: one line on the first thing that is wrong.
    """
    spec, genotype = preset.cell_network(data)
    images = load_images(data, data_dir, preset)
    if preset.all_images:
        parts = (images.train, images.validation)
        joined = Split(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("images", "labels")))
        images = dataclasses.replace(images, train=joined, source=f"{images.source}; trained on validation images too")
    if preset.training.batch_size > (available := len(images.train.labels)):
        raise ValueError(
            f"batch_size={preset.training.batch_size} is larger than the data: {available} training images"
        )
    return TimedTraining(preset_name, preset, images, spec, genotype, check_seed(seed), say)


def process_seconds() -> float:
    """Seconds since this process was started."""
    return time.time() - psutil.Process().create_time()


def measure(timed: TimedTraining, config: TrainConfig, folder: Path) -> Costs:
    """Times the parts of a training on a throwaway one of `_STEPS`·`_ROUNDS` steps, whose weights nobody sees.

    Args:
      timed: what will be trained.
      config: the recipe.
      folder: for its checkpoints, on the file system of the run; must not exist.

    Returns:
      The costs. The real training differs by its number of images and steps, so it is compiled anew: `start` is
      the whole of what this one took beyond its steps.
    """
    steps = min(_STEPS, timed.steps)
    cut = dataclasses.replace(
        timed.data,
        train=_first(timed.data.train, steps * config.batch_size),
        validation=_first(timed.data.validation, _EVALUATED),
    )
    images = len(cut.validation.labels)
    marks: list[tuple[float, float]] = []  # (when an epoch had been trained and validated, seconds of its steps)
    begun = time.perf_counter()
    model = train(
        timed.spec,
        timed.genotype,
        cut,
        # At a rate at which nothing diverges that would not have with the schedule's rise.
        dataclasses.replace(config, epochs=_ROUNDS, learning_rate=config.learning_rate / 1000),
        seed=timed.seed,
        folder=folder,
        progress=lambda record: marks.append((time.perf_counter(), float(record["seconds"]))),
    )
    evaluating = time.perf_counter()
    evaluate(model, cut.validation)
    evaluated = time.perf_counter() - evaluating
    rounds = list(itertools.pairwise(marks))  # between two marks: a save, the steps, a validation
    # The least of each: what else the machine does only adds, and `MARGIN` is there for it.
    step = min(seconds for _, (_, seconds) in rounds) / steps
    besides = min(then - before - seconds for (before, _), (then, seconds) in rounds)
    validation = min(evaluated, besides)
    start = marks[0][0] - begun - steps * step - validation
    return Costs(max(start, 0.0), step, validation / images, besides - validation)


def _first(split: Split, n: int) -> Split:
    return Split(split.images[:n], split.labels[:n])


def make_plan(timed: TimedTraining, beside: Path) -> dict[str, Any]:
    """Chooses the number of epochs.

    Args:
      timed: what will be trained.
      beside: the run's folder, to be; a throwaway folder stands beside it, or beside the lowest parent there is.

    Returns:
      `epochs` and `precision`, and where time is limited `minutes`, `costs` (of `measure`), `seconds_gone` when they
      were known, and `epoch_seconds`; where several precisions were timed, `steps`, seconds of one in each.

    Raises:
      ValueError: one line, where not even one epoch fits.
    """
    preset, images = timed.preset, counts(timed.data)
    if preset.minutes is None:
        return {"epochs": preset.training.epochs, "precision": preset.training.precision}
    timed.say("timing a few steps to plan the schedule")
    parent = next(path for path in beside.absolute().parents if path.exists())
    scratch = parent / f".{beside.name}.timing.tmp"
    scratch.mkdir(exist_ok=True)
    with files.lock(scratch, f"another process is planning this run: {beside}"):
        shutil.rmtree(scratch / _TIMED, ignore_errors=True)  # of a killed process
        found: dict[str, Costs] = {}
        try:
            for precision in preset.precisions or (preset.training.precision,):
                config = dataclasses.replace(preset.training, precision=precision)
                found[precision] = measure(timed, config, scratch / _TIMED / precision)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    precision, costs = min(found.items(), key=lambda item: item[1].step)
    gone = timed.seconds()
    seconds = 60 * preset.minutes - gone
    fit = epochs_that_fit(costs, seconds, timed.steps, images["validation"], images["test"])
    epoch = costs.epoch(timed.steps, images["validation"])
    if not fit:
        least = (gone + (costs.ends(images["test"]) + epoch) / (1 - MARGIN)) / 60
        raise ValueError(
            f"--minutes {preset.minutes:g}: not one epoch of {epoch:.1f} s fits; give at least {least + 0.05:.1f}"
        )
    return {
        "epochs": min(fit, preset.training.epochs),
        "precision": precision,
        **({"steps": {name: round(each.step, 6) for name, each in found.items()}} if len(found) > 1 else {}),
        "minutes": preset.minutes,
        "costs": {name: round(value, 6) for name, value in costs._asdict().items()},
        "seconds_gone": round(gone, 3),
        "epoch_seconds": round(epoch, 3),
    }
