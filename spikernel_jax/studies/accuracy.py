"""One cell, trained as accurately as a given time allows: the plan that ends in time, training, test, report.

The number of epochs decides the learning-rate schedule, so it must be known before the first step. A few steps of a
throwaway training tell what a step, an evaluation, a checkpoint and compilation take here; the plan that follows from
them is written down before training, and used again by a start that goes on.

Validation accuracy is the curve; the test split is touched once, after the last epoch.
"""

import dataclasses
import itertools
import math
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from spikernel_jax.data import Dataset, Split
from spikernel_jax.io import files
from spikernel_jax.io.run_folder import RunFolder
from spikernel_jax.io.units import duration
from spikernel_jax.io.voice import Moving
from spikernel_jax.pipeline.job import check_seed, counts, load_images, open_folder
from spikernel_jax.pipeline.presets import Timed
from spikernel_jax.report import figures, pages
from spikernel_jax.snn.conventional import RELU
from spikernel_jax.snn.cost import parameters_of
from spikernel_jax.snn.model import Model
from spikernel_jax.snn.neurons import NeuronSpec
from spikernel_jax.snn.spec import NetworkSpec
from spikernel_jax.training.checkpoint import save_model
from spikernel_jax.training.evaluation import evaluate
from spikernel_jax.training.keep import epochs_of
from spikernel_jax.training.loop import train
from spikernel_jax.training.recipe import TrainConfig

FINISH_SECONDS = 6.0  # figure, export and page after the last epoch
MARGIN = 0.05  # of the time left, kept back: steps are timed for seconds and run for minutes
_MODEL = "checkpoint"
_PLAN, _TEST, _TRAINING = "plan.json", "test.json", "training"
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
    validation = time.perf_counter() - evaluating
    rounds = list(itertools.pairwise(marks))  # between two marks: a save, the steps, a validation
    step = statistics.median(seconds for _, (_, seconds) in rounds) / steps
    save = statistics.median(then - before - seconds for (before, _), (then, seconds) in rounds) - validation
    start = marks[0][0] - begun - steps * step - validation
    return Costs(max(start, 0.0), step, validation / images, max(save, 0.0))


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
        shutil.rmtree(scratch / _TRAINING, ignore_errors=True)  # of a killed process
        found: dict[str, Costs] = {}
        try:
            for precision in preset.precisions or (preset.training.precision,):
                config = dataclasses.replace(preset.training, precision=precision)
                found[precision] = measure(timed, config, scratch / _TRAINING / precision)
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


def train_in_time(timed: TimedTraining, out: str | Path) -> dict[str, Any]:
    """Plans, trains, tests and exports, or goes on where an earlier start stopped.

    Leaves ``plan.json`` (before training), ``training/`` (checkpoints, ``metrics.jsonl``), ``test.json``,
    ``checkpoint`` (for `load_model`), ``figures/accuracy.png``, ``summary.json`` and ``report.md``.

    Args:
      timed: of `open_training`.
      out: the run's folder.

    Returns:
      The summary: `parameters`, `epochs`, `precision`, `validation_accuracy` (after the last epoch), `test_accuracy`
      (0 to 1), `minutes_planned`, `minutes_taken` (of the first start; None where the run was resumed),
      `training_minutes`, `compilation_minutes`.

    Raises:
      ValueError: one line, if the folder is another run's or no epoch fits; nothing has been trained then.
      StoppedError: a signal asked to stop; the same command goes on.
    """
    out, plan = Path(out), None
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        plan = make_plan(timed, out)  # before the folder is made: a time that is too short leaves nothing behind
    run = open_folder(out, timed.config(), timed.data, timed.say)
    with run.lock():
        if (run.path / _PLAN).exists():
            plan = run.read_json(_PLAN)
            timed.say(f"resumed: {plan['epochs']} epochs as planned at the first start" + (
                f"; its limit of {plan['minutes']:g} minutes was planned for that start alone" if "minutes" in plan
                else ""))  # fmt: skip
        else:
            plan = plan or make_plan(timed, out)
            run.write_json(_PLAN, plan)
        model = _train(timed, run, plan)
        test = _test(timed, run, model)
        model = dataclasses.replace(model, metrics=model.metrics | {"test_accuracy": test, "source": timed.data.source})
        save_model(run.path / _MODEL, model)
        return _conclude(timed, run, plan, model)


def _train(timed: TimedTraining, run: RunFolder, plan: dict[str, Any]) -> Model:
    config = dataclasses.replace(timed.preset.training, epochs=plan["epochs"], precision=plan["precision"])
    parameters = parameters_of(timed.spec, timed.genotype)
    about = f" of about {plan['epoch_seconds']:.1f} s" if "epoch_seconds" in plan else ""
    timed.say(
        f"{timed.preset.cell!r}, C = {timed.spec.channels}, T = {timed.spec.time_steps}: {parameters:,} parameters, "
        f"{config.epochs} epochs{about}, convolutions of {config.precision}"
    )
    marks, best = [time.perf_counter()], [0.0]

    def line(record: dict[str, Any]) -> None:
        marks.append(time.perf_counter())
        taken = np.diff(marks)
        # The first epoch compiles.
        each = np.median(taken[1:]) if len(taken) > 1 else plan.get("epoch_seconds", taken[0])
        left = float(each) * (config.epochs - record["epoch"])
        best[0] = max(best[0], record["validation_accuracy"])
        timed.say(Moving(
            f"  epoch {record['epoch']}/{config.epochs}  loss {record['train_loss']:.3f}  "
            f"train {100 * record['train_accuracy']:.1f} %  "
            f"{timed.validation_name} {100 * record['validation_accuracy']:.2f} %  "
            f"{record['seconds']:.1f} s  {duration(left, 1)} left",
            name=f"seed{timed.seed}", of=config.epochs, left_seconds=left, best=best[0], **record,
        ))  # fmt: skip

    folder = run.path / _TRAINING
    folder.mkdir(exist_ok=True)
    return train(
        timed.spec, timed.genotype, timed.data, config, seed=timed.seed, folder=folder, progress=line, say=timed.say
    )


def _test(timed: TimedTraining, run: RunFolder, model: Model) -> float:
    """Test accuracy; asked for once, and then kept in the run's folder."""
    if not (run.path / _TEST).exists():
        run.write_json(_TEST, {"test_accuracy": evaluate(model, timed.data.test)})
    return float(run.read_json(_TEST)["test_accuracy"])


def _conclude(timed: TimedTraining, run: RunFolder, plan: dict[str, Any], model: Model) -> dict[str, Any]:
    """Figure, summary and page."""
    records = epochs_of(run.path / _TRAINING)
    seconds = [float(record["seconds"]) for record in records]
    compilation = plan.get("costs", {}).get("start", 0.0)
    if len(seconds) > 1:
        compilation += max(0.0, seconds[0] - statistics.median(seconds[1:]))
    there = run.summary()
    resumed = len(run.record()["resumed"])
    title = (
        f"{timed.data.name}, {timed.preset_name}, seed {timed.seed}, {len(timed.data.train.labels):,} training images"
    )
    if timed.preset.all_images:
        title += ", those of validation too"
    figures.training_figure({timed.preset.cell: records}, run.folder("figures") / "accuracy.png", title)
    summary = {
        "parameters": parameters_of(timed.spec, timed.genotype),
        "epochs": plan["epochs"],
        "precision": plan["precision"],
        "validation_accuracy": float(model.metrics["validation_accuracy"]),
        "test_accuracy": float(model.metrics["test_accuracy"]),
        "minutes_planned": plan.get("minutes"),
        "training_minutes": round(sum(seconds) / 60, 3),
        "compilation_minutes": round(compilation / 60, 3),
        # A finished run that is started again took as long as it took.
        "minutes_taken": there.get("minutes_taken") if resumed else round(timed.seconds() / 60, 3),
    }
    run.update_summary(**summary)
    pages.write_report(run, _sections(timed, run, plan, summary))
    return summary


def _sections(
    timed: TimedTraining, run: RunFolder, plan: dict[str, Any], summary: dict[str, Any]
) -> list[tuple[str, str]]:
    preset, images = timed.preset, counts(timed.data)
    command = " ".join(run.record()["environment"]["command"])
    recipe = dataclasses.asdict(preset.training) | {name: plan[name] for name in ("epochs", "precision")}
    planned, taken = summary["minutes_planned"], summary["minutes_taken"]
    about = (
        f"`{command}`\n\n{timed.data.source}\n\nCell `{preset.cell}`, C = {preset.channels}, T = {preset.time_steps}, "
        f"stem stride {preset.stem_stride}, head {preset.head}, dropout {preset.dropout:g}, norm {preset.norm}, "
        f"{_neurons(preset.neuron)}: **{summary['parameters']:,} parameters**. Seed {timed.seed}, n = 1 training.\n\n"
        "Recipe: " + ", ".join(f"{name} {value}" for name, value in recipe.items()) + "."
    )
    validation = _per_cent(summary["validation_accuracy"], images["validation"])
    accuracy = (
        f"- {timed.validation_name}, after the last epoch: {validation}\n"
        f"- test, touched once, after training: {_per_cent(summary['test_accuracy'], images['test'])}\n\n"
        f'`load_model("{run.path / _MODEL}")` gives the model back.\n\n![validation accuracy](figures/accuracy.png)'
    )
    minutes = (
        (f"Planned: at most {planned:g} minutes from the start of the process to this page, for the first start alone, "
         f"which gave {plan['epochs']} epochs (`{_PLAN}`). " if planned else "No limit was set. ")
        + (f"Taken: {taken:.2f} minutes. " if taken is not None
           else "The run was resumed, so no single start took it all. ")
        + ("**Longer than planned**: steps became slower than when they were timed. "
           if planned and (taken or 0) > planned else "")
        + "".join(f"A step took {1000 * seconds:.0f} ms in {name} when timed. "
                  for name, seconds in plan.get("steps", {}).items())
        + f"Steps alone: {summary['training_minutes']:.2f} minutes; starting and compiling, before and in the first "
        f"epoch: about {summary['compilation_minutes']:.2f}."
    )  # fmt: skip
    return [("Run", about), ("Accuracy", accuracy), ("Time", minutes)]


def _neurons(neuron: NeuronSpec) -> str:
    if neuron.model == RELU:
        return "**conventional: ReLU in the place of neurons, no spikes**"
    more = f", **up to {neuron.max_spikes} spikes a time step**" if neuron.max_spikes > 1 else ""
    return (
        f"{neuron.model} neurons of threshold {neuron.v_threshold:g}, tau {neuron.tau:g}, {neuron.reset} reset, "
        f"surrogate {neuron.surrogate}{more}"
    )


def _per_cent(accuracy: float, n: int) -> str:
    """An accuracy in per cent with its binomial standard error."""
    error = 100 * math.sqrt(accuracy * (1 - accuracy) / n)
    return f"**{100 * accuracy:.2f} %** of {n:,} images (standard error {error:.2f})"
