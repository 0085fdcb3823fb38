"""Trainings that are compared: run one by one and kept once done, and the time left.

A comparison trains several kinds of network over several seeds. Trainings of one seed see the same images in the same
order, so kinds are compared seed by seed, as pairs.
"""

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from spikernel_jax.cells.space import CellSpace
from spikernel_jax.io.files import differences
from spikernel_jax.io.units import duration
from spikernel_jax.io.voice import Moving
from spikernel_jax.pipeline.job import Job
from spikernel_jax.snn import cost
from spikernel_jax.snn.model import Model
from spikernel_jax.snn.spec import NetworkSpec, spec_to_json
from spikernel_jax.training.evaluation import evaluate, measure_spikes
from spikernel_jax.training.keep import epochs_of
from spikernel_jax.training.loop import TrainingDivergedError, train
from spikernel_jax.training.recipe import TrainConfig


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training of a comparison.

    Attributes:
      kind: what is trained; part of a folder's name. Trainings of one kind differ in their seed alone.
      seed: of the training.
      spec: the network.
      genotype: its cell [E], as a tuple.
      config: the recipe.
    """

    kind: str
    seed: int
    spec: NetworkSpec
    genotype: tuple[int, ...]
    config: TrainConfig

    @property
    def name(self) -> str:
        """Of the folder."""
        return f"{self.kind}-seed{self.seed}"

    def settings(self) -> dict[str, Any]:
        """All that the result follows from but the seed and the images, as JSON gives it back."""
        config = dataclasses.asdict(self.config)
        return json.loads(json.dumps({"spec": spec_to_json(self.spec), "genotype": self.genotype, "config": config}))


class Clock:
    """Time left: the epochs left of each training times the median epoch of its kind, and compilation.

    The first epoch of a kind compiles its program. What it took beyond the median of its later epochs is ahead of each
    kind that is not seen yet, too. A kind of which no later epoch was seen is taken to be as fast for its work as those
    together of which there was one; before any, first epochs are all that is known, and the time left is too long.
    """

    def __init__(self, trials: Iterable[Trial]):
        """Counts all epochs of all trainings as left."""
        trials = tuple(trials)
        self._epochs_left = {trial: trial.config.epochs for trial in trials}
        self._operations = {trial.kind: _operations(trial) for trial in trials}
        self._seconds: dict[str, list[float]] = {}

    def epoch(self, trial: Trial, epochs_left: int, seconds: float) -> None:
        """Notes an epoch that took so long."""
        self._epochs_left[trial] = epochs_left
        self._seconds.setdefault(trial.kind, []).append(seconds)

    def done(self, trial: Trial) -> None:
        """Notes that nothing is left of a training."""
        self._epochs_left[trial] = 0

    def left(self) -> float:
        """Seconds."""
        first = {kind: seconds[0] for kind, seconds in self._seconds.items()}
        later = {kind: float(np.median(seconds[1:])) for kind, seconds in self._seconds.items() if len(seconds) > 1}
        known = later or first
        rate = sum(known.values()) / sum(self._operations[kind] for kind in known)
        each = {kind: later.get(kind, rate * operations) for kind, operations in self._operations.items()}
        compilation = np.mean([max(0.0, seconds - each[kind]) for kind, seconds in first.items()])
        unseen = {trial.kind for trial, epochs in self._epochs_left.items() if epochs} - first.keys()
        training = sum(epochs * each[trial.kind] for trial, epochs in self._epochs_left.items())
        return training + len(unseen) * float(compilation)


def _operations(trial: Trial) -> float:
    """Operations of one image if every neuron fired at every time step, to guess times by."""
    row = np.asarray(trial.genotype, np.int8)
    return cost.macs(trial.spec, row) + float(cost.most_synaptic_operations(trial.spec, row[None])[0])


def _file(trial: Trial, what: str) -> str:
    """A file of a training, as its run names it."""
    return f"trainings/{trial.name}/{what}.json"


def folder(job: Job, trial: Trial) -> Path:
    """Where a training is kept."""
    return job.run.path / "trainings" / trial.name


def fit(job: Job, trial: Trial, progress: Callable[[dict[str, Any]], None] | None = None) -> Model:
    """Trains a network, goes on with it, or gives it back as it was trained; errors as `train.train`."""
    path = folder(job, trial)
    path.mkdir(parents=True, exist_ok=True)
    named = {"seed": trial.seed, "folder": path, "progress": progress, "say": job.say}
    try:
        return train(trial.spec, trial.genotype, job.data, trial.config, **named)
    except TrainingDivergedError as error:
        raise TrainingDivergedError(f"{trial.name}: {error}") from None


def finished(job: Job, trial: Trial) -> dict[str, Any] | None:
    """The result of a training that is done; None where it is not.

    Raises:
      ValueError: the folder's result is of other settings, or damaged.
    """
    path = job.run.path / (name := _file(trial, "result"))
    if not path.exists():
        return None
    kept = job.run.read_json(name)
    if differing := differences(kept["settings"], trial.settings()):
        raise ValueError(f"{path} is of other settings ({'; '.join(differing)}): remove {path.parent} to train again")
    return kept["result"]


def measured(job: Job, model: Model) -> dict[str, Any]:
    """Parameters, memory, and what one validation image costs."""
    row = np.asarray(model.genotype, np.int8)
    total = cost.costs(model.spec, row[None], job.options.bits)
    synops = cost.synaptic_operations(model.spec, row, measure_spikes(model, job.data.validation))
    return {
        "parameters": int(total.parameters[0]),
        "memory_bytes": int(total.memory_bytes[0]),
        "synops": synops,
        "energy_nj": cost.energy_nj(model.spec, row, synops),
    }


def tested(job: Job, trial: Trial) -> float:
    """Test accuracy of a trained network; asked for once, and then kept in its folder."""
    name = _file(trial, "test")
    if not (job.run.path / name).exists():
        job.run.write_json(name, {"test_accuracy": evaluate(fit(job, trial), job.data.test)})
    return float(job.run.read_json(name)["test_accuracy"])


def run(job: Job, trial: Trial, clock: Clock, place: str, *, keep_diverged: bool = False) -> dict[str, Any]:
    """Trains one network, or goes on with it, and keeps its result in its folder; a line is printed an epoch.

    Args:
      job: its run folder, data, option `bits`, and `say`.
      trial: the training.
      clock: of all trainings.
      place: of this training among them, as ``"3/12"``.
      keep_diverged: make divergence a result, instead of an error; either way it is not left out, which would make a
        comparison kinder to its kind.

    Returns:
      `parameters`, `memory_bytes`, `synops` and `energy_nj` (an image, measured on validation images), `macs` (an
      image), `seconds` (of training, with compilation), `validation_accuracy` (0 to 1, after the last epoch)
      and `diverged_epoch` (None). Of a training that diverged that epoch, from 1, and None for what cannot be measured.

    Raises:
      ValueError: as `finished` and `train.train`; TrainingDivergedError unless `keep_diverged`.
    """
    if (there := finished(job, trial)) is not None:
        clock.done(trial)
        return there
    path = folder(job, trial)
    line = functools.partial(_epoch_line, job, trial, clock, f"{place}  {trial.name}", [time.perf_counter()])
    try:
        model = fit(job, trial, line)
        result = measured(job, model)
        accuracy, diverged = float(model.metrics["validation_accuracy"]), None
    except TrainingDivergedError as error:
        if not keep_diverged:
            raise
        job.say(f"  {place}  {error}")
        total = cost.costs(trial.spec, np.asarray(trial.genotype)[None], job.options.bits)
        result: dict[str, Any] = {"parameters": int(total.parameters[0]), "memory_bytes": int(total.memory_bytes[0])}
        result |= {"synops": None, "energy_nj": None}
        accuracy, diverged = None, len(epochs_of(path)) + 1
    clock.done(trial)
    seconds = sum(float(record["seconds"]) for record in epochs_of(path))
    result |= {"macs": cost.macs(trial.spec, trial.genotype), "seconds": round(seconds, 3)}
    result |= {"validation_accuracy": accuracy, "diverged_epoch": diverged}
    job.run.write_json(_file(trial, "result"), {"settings": trial.settings(), "result": result})
    return result


def _epoch_line(job: Job, trial: Trial, clock: Clock, name: str, last: list[float], record: dict[str, Any]) -> None:
    """Prints an epoch's line; `last` holds when the one before it was printed."""
    now, epochs = time.perf_counter(), trial.config.epochs
    clock.epoch(trial, epochs - record["epoch"], now - last[0])
    last[0] = now
    left = clock.left()
    job.say(Moving(
        f"  {name}  epoch {record['epoch']}/{epochs}  loss {record['train_loss']:.3f}  validation "
        f"{100 * record['validation_accuracy']:.1f} %  {duration(left)} left",
        name=trial.name, of=epochs, left_seconds=left, **record,
    ))  # fmt: skip


def of_cells(job: Job, cells: Mapping[str, tuple[CellSpace, ArrayLike]]) -> list[Trial]:
    """The trainings of named cells in the four steps, all seeds of one after another."""
    config = job.preset.training(job.data.name, job.options.recipe)
    return [
        Trial(name, seed, job.network(space), tuple(np.asarray(row).tolist()), config)
        for (name, (space, row)), seed in itertools.product(cells.items(), job.seeds)
    ]


def run_all(job: Job, trainings: Iterable[Trial]) -> dict[Trial, dict[str, Any]]:
    """Trains what is not trained yet; results as `run` gives them."""
    trainings = list(trainings)
    clock = Clock(trainings)
    return {
        trial: run(job, trial, clock, f"{number}/{len(trainings)}") for number, trial in enumerate(trainings, start=1)
    }


def rows(job: Job, results: Mapping[Trial, Mapping[str, Any]], **columns: Any) -> list[dict[str, Any]]:
    """Rows of a table of trained networks: what was measured of each, its test accuracy now too."""
    names = ("validation_accuracy", "parameters", "memory_bytes", "synops", "energy_nj")
    return [
        {"name": trial.kind, **columns, "seed": trial.seed, **{name: result[name] for name in names},
         "test_accuracy": tested(job, trial)}
        for trial, result in results.items()
    ]  # fmt: skip
