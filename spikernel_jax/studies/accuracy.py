"""One cell, trained as accurately as a given time allows: the plan that ends in time, training, test, report.

The plan (`time_plan`) is written down before training, and used again by a start that goes on.

Validation accuracy is the curve; the test split is touched once, after the last epoch.
"""

import dataclasses
import math
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from spikernel_jax.io.run_folder import RunFolder
from spikernel_jax.io.units import duration
from spikernel_jax.io.voice import Moving
from spikernel_jax.pipeline.job import counts, open_folder
from spikernel_jax.report import figures, pages
from spikernel_jax.snn.conventional import RELU
from spikernel_jax.snn.cost import parameters_of
from spikernel_jax.snn.model import Model
from spikernel_jax.snn.neurons import NeuronSpec
from spikernel_jax.studies.time_plan import TimedTraining, make_plan
from spikernel_jax.training.checkpoint import save_model
from spikernel_jax.training.evaluation import evaluate
from spikernel_jax.training.keep import epochs_of
from spikernel_jax.training.loop import train

_MODEL = "checkpoint"
_PLAN, _TEST, _TRAINING = "plan.json", "test.json", "training"


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
