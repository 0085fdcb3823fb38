"""How accurate does one cell get in a given time? One training that ends in time, tested once.

    python experiments/accuracy.py                                          # MNIST digits, 10 minutes on 2 CPU cores
    python experiments/accuracy.py --preset smoke                           # seconds; proves only that it runs
    python experiments/accuracy.py --data cifar10 --data-dir DIR --preset cpu-1h
    python experiments/accuracy.py --data cifar10 --data-dir DIR --preset h100-10min --seeds 3

Times a few steps, chooses as many epochs as fit into --minutes (compilation, validation, checkpoints and test
included), writes that plan down and trains. A killed run goes on with the same schedule to the same result when the
same command is given again; the time limit is the first start's.

The h100-10min presets aim at 94.5 % on CIFAR-10 and 74 % on CIFAR-100, with T = 4 and below 10 M parameters. Sized by
their FLOPs for an H100 (`presets.py`), they have not been run there; an H200 reached 90.92 % on CIFAR-10 after 44
epochs (results/accuracy-cifar10-h200-seed0).
"""

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import Any

from spikernel_jax.pipeline import cli
from spikernel_jax.pipeline.job import default_folder
from spikernel_jax.pipeline.presets import Timed, get_timed_preset
from spikernel_jax.report.intervals import points
from spikernel_jax.snn.conventional import RELU, relu_neurons
from spikernel_jax.snn.neurons import NeuronSpec
from spikernel_jax.studies.accuracy import train_in_time
from spikernel_jax.studies.over_seeds import train_over_seeds
from spikernel_jax.studies.time_plan import open_training

_DEFAULTS = {"mnist5k": "cpu-10min", "mnist": "cpu-10min"}
_OF_NEURON = ("v_threshold", "surrogate", "surrogate_scale", "max_spikes")
_OF_RECIPE = (
    "epochs", "batch_size", "learning_rate", "weight_decay", "label_smoothing", "padding", "trivial", "cutout", "mix",
    "ema", "precision", "stem_init",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options(cli.OutputOptions, cli.MachineOptions, cli.SizeOptions):
    """Options of the training; those of a preset are the preset's where not given."""

    data: str = "mnist5k"
    """Data set: mnist5k (embedded), mnist, cifar10, cifar100, tiny_imagenet."""
    preset: str | None = None
    """smoke, cpu-10min (digits), cpu-1h or h100-10min; default the CPU's."""
    data_dir: Path | None = None
    """Where prepared data lie; default the environment's TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    out: Path | None = None
    """Run folder; default runs/accuracy-DATA-PRESET-seedSEED."""
    seed: int = 0
    """Seed of everything random."""
    conventional: bool = False
    """ReLU for LIF and one time step: what the same network reaches without spikes, to be put beside it."""
    seeds: int = 1
    """Trainings, with this seed and the ones after it: mean, standard deviation and interval; --minutes are those of
    one, and all have as many epochs."""
    precision: str | None = None
    """Of convolutions, float32 or bfloat16; on a CPU the faster of the two unless given."""
    minutes: float | None = None
    """Time from the start of the process to the report; inf sets no limit."""
    epochs: int | None = None
    """The most epochs that are trained, as far as they fit into the minutes."""
    cell: str | None = None
    """Cell, as '0>1:conv3 1>3:conv5 0>3:skip' or SNASNet's four words."""
    time_steps: int | None = None
    """T."""
    stem_stride: int | None = None
    """1 or 2."""
    head: str | None = None
    """gap or snasnet."""
    dropout: float | None = None
    """Before the head."""
    norm: str | None = None
    """over_time (tdBN) or per_step."""
    v_threshold: float | None = None
    """Firing threshold."""
    surrogate: str | None = None
    """Stand-in for a spike's derivative: atan, sigmoid, triangle or straight_through."""
    surrogate_scale: float | None = None
    """Its slope; default its customary one."""
    max_spikes: int | None = None
    """How often a neuron fires in a time step at most; above 1, what is left above the threshold fires again."""
    batch_size: int | None = None
    """Images a step."""
    learning_rate: float | None = None
    """The largest of the schedule."""
    weight_decay: float | None = None
    """Of all weights; with Muon and AdamW, times the learning rate."""
    label_smoothing: float | None = None
    """Share of the target that goes to all classes alike."""
    padding: int | None = None
    """Of the random crop, in pixels; 0 is none."""
    trivial: bool = False
    """TrivialAugment too."""
    cutout: int | None = None
    """Side of a black square, in pixels; 0 is none."""
    mix: str | None = None
    """none, mixup or cutmix."""
    ema: float | None = None
    """Decay a step of the moving average of weights that is evaluated; 0 is none."""
    stem_init: str | None = None
    """How the stem begins: random, or whitened, which whitens patches of the training images."""
    all_images: bool = False
    """Train on the validation images too, once all is chosen; validation accuracy tells nothing then."""
    limit_validation: int | None = None
    """Validation images."""
    limit_test: int | None = None
    """Test images."""
    compilation_cache: str | None = "off"
    """Folder of compiled programs, reused by later runs. Off unless given: the plan takes compiling the training
    to last as long as compiling the timed steps did, which a folder that holds the latter would belie."""


def settings(options: Options) -> tuple[str, Timed]:
    """Name of the preset, and its settings with what the command line changes."""
    name = options.preset or _DEFAULTS.get(options.data, "cpu-1h")
    preset = get_timed_preset(options.data, name)
    fields = {field.name for field in dataclasses.fields(preset)} - {"training", "neuron"}
    given: dict[str, Any] = {
        field: value
        for field in (*fields, *_OF_RECIPE, *_OF_NEURON)
        if (value := getattr(options, field, None)) is not None and value is not False  # a flag that is not given
    }
    if given.get("minutes") == math.inf:
        given["minutes"] = None
    if options.precision:
        given["precisions"] = ()
    base = preset.neuron
    if options.conventional:
        for field in (*_OF_NEURON, "time_steps"):
            if field in given:
                option = f"--{field.replace('_', '-')}"
                raise ValueError(f"{option}: a --conventional network has no spikes; give one of the two")
        base, given["time_steps"] = NeuronSpec(RELU), 1
    if given.get("max_spikes", 1) != 1:
        base = dataclasses.replace(base, reset="soft")  # what is left after a spike is what may fire again
    training, neuron = (
        dataclasses.replace(part, **{field: given.pop(field) for field in own if field in given})
        for part, own in ((preset.training, _OF_RECIPE), (base, _OF_NEURON))
    )
    return name, dataclasses.replace(preset, training=training, neuron=neuron, **given)


def accuracy(options: Options) -> None:
    """Trains, tests once, and prints the accuracies."""
    with relu_neurons() if options.conventional else contextlib.nullcontext():
        _accuracy(options)


def _accuracy(options: Options) -> None:
    name, preset = settings(options)
    timed = open_training(options.data, name, preset, seed=options.seed, data_dir=options.data_dir, say=cli.say)
    kind = "accuracy-conventional" if options.conventional else "accuracy"
    kind += "" if options.seeds == 1 else f"-{options.seeds}seeds"
    out = options.out or default_folder(options.data, name, options.seed, kind)
    if options.seeds != 1:
        result = train_over_seeds(timed, out, options.seeds)
        cli.present(
            f"{options.data}: {timed.validation_name} {points(result, 'validation_accuracy')} %, "
            f"test {points(result, 'test_accuracy')} %, n = {result['n']}; report: {out / 'report.md'}"
        )
        return
    result = train_in_time(timed, out)
    cli.present(
        f"{options.data}: {timed.validation_name} {100 * result['validation_accuracy']:.2f} %, "
        f"test {100 * result['test_accuracy']:.2f} %, {result['parameters']:,} parameters, T = {preset.time_steps}, "
        f"{result['epochs']} epochs; report: {out / 'report.md'}"
    )


if __name__ == "__main__":
    cli.main(Options, accuracy, __doc__ or "")
