"""Presets: network, recipe and budgets for each data set, of the four steps and of trainings in a given time.

Of the four steps, ``cpu`` fits two CPU cores (minutes on mnist5k, an hour at most elsewhere) and ``gpu`` is the width
at which models below 10 M parameters are trained in full. ``smoke`` takes seconds and proves nothing but that
everything runs.

Of trainings in a given time, ``cpu-1h`` was chosen by short trainings on validation images of CIFAR-10, one seed each
(88.13 % test: results/accuracy-cifar10-cpu-1h-seed0); for the others, which choices are best has not been measured.
``h100-10min`` was sized by its FLOPs for an H100, where it has not been run (44 epochs of cifar10 took 6.5 minutes on
an H200: results/accuracy-cifar10-h200-seed0). At 35 % of 800 TFLOP/s, and 440 s of 540 left for steps:

| | parameters | TFLOP per epoch | seconds per epoch | epochs |
| --- | --- | --- | --- | --- |
| cifar10, C = 128, T = 4 | 3.25 M | 1,631 | 5.8 | 75 |
| cifar100, C = 160, T = 4 | 5.11 M | 2,549 | 9.1 | 48 |
| tiny_imagenet, C = 160, T = 4, stem stride 2 | 5.14 M | 5,098 | 18.2 | 24 |
"""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from spikernel_jax.cells.space import CellSpace
from spikernel_jax.data import DATASETS, dataset_info
from spikernel_jax.scoring.fidelity import FIDELITIES, Fidelity
from spikernel_jax.snn.cost import parameters_of
from spikernel_jax.snn.neurons import NeuronSpec
from spikernel_jax.snn.spec import NetworkSpec
from spikernel_jax.training.recipe import PRECISIONS, TrainConfig, named_recipe

Kind = TypeVar("Kind")

OWN = "a folder of images"  # of the user's own
PARAMETER_LIMIT = 10_000_000  # of the published networks that ours are compared with


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What every preset has: the sizes of a network, and how many images are used.

    Attributes:
      channels: width C of the networks that are trained.
      time_steps: T.
      stem_stride: 2 halves height and width before cell 1.
      head: ``"gap"`` or ``"snasnet"``.
      dropout: before the head.
      limit_train: training images used; None uses all.
      limit_validation: validation images used.
      limit_test: test images used.
    """

    channels: int
    time_steps: int
    stem_stride: int
    head: str = "gap"
    dropout: float = 0.0
    limit_train: int | None = None
    limit_validation: int | None = None
    limit_test: int | None = None

    def network(self, data: str, space: CellSpace, num_classes: int | None = None) -> NetworkSpec:
        """The network of a space's cells on a data set, as it is trained; None takes all classes."""
        info = dataset_info(data)
        sizes = {name: getattr(self, name) for name in ("channels", "time_steps", "stem_stride", "head", "dropout")}
        return NetworkSpec(info.image_shape, num_classes or info.num_classes, space, **sizes)

    @property
    def limits(self) -> dict[str, int | None]:
        """Images used of each split, as `load_dataset` takes them."""
        return {f"limit_{split}": getattr(self, f"limit_{split}") for split in ("train", "validation", "test")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset(Sizes):
    """Settings of the four steps for one data set, besides `Sizes`.

    Attributes:
      kernel_sizes: of step 1.
      sets: kernel sets of step 2; None takes all pairs of the sizes.
      keep: which of them are searched, ``"rule"`` or ``"all"``.
      impact_cell: the cell of step 1, in explicit notation, with K for the kernel size.
      seeds: trainings of every network of the four steps.
      epochs: of each of them, so that any two of them can be compared.
      batch_size: of training.
      learning_rate: of SGD; a recipe may set another.
      score: a registered training-free score.
      search_epochs: that the search's short trainings may take together.
      fidelities: sizes of the score at low, medium and full fidelity.
      memory_budget: bytes (as text) that the chosen model may take.
      bits: width of weights, membranes and activations on the device.
    """

    kernel_sizes: tuple[int, ...] = (1, 3, 5, 7)
    sets: tuple[tuple[int, ...], ...] | None = None
    keep: str = "rule"
    channels: int = 8
    time_steps: int = 2
    stem_stride: int = 2
    impact_cell: str = "0>1:convK 1>3:convK 0>3:skip"
    seeds: int = 2
    epochs: int = 5
    batch_size: int = 32
    learning_rate: float = 0.2
    score: str = "sahd_paper"
    search_epochs: int = 30
    fidelities: tuple[Fidelity, Fidelity, Fidelity] = FIDELITIES
    memory_budget: str = "32KiB"
    bits: int = 8

    def training(self, data: str, recipe: str) -> TrainConfig:
        """A recipe on a data set; ValueError if its name is unknown."""
        info = dataset_info(data)
        ours = {"epochs": self.epochs, "batch_size": self.batch_size, "learning_rate": self.learning_rate}
        return TrainConfig(**ours | {"padding": info.padding, "flip": info.flip} | named_recipe(recipe))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timed(Sizes):
    """Settings of one training in a given time, besides `Sizes`.

    Attributes:
      training: the recipe; its epochs are the most that are trained, as many as `minutes` allow.
      cell: in explicit notation or SNASNet's four words.
      norm: ``"per_step"`` or ``"over_time"``.
      neuron: of every LIF layer.
      padding: of the random crop, in pixels; None is the data set's own.
      precisions: those that are timed where `minutes` are limited: the faster one is trained in; none is the recipe's.
      minutes: from the start of the process to the end of the report; None sets no limit.
      all_images: train on the validation images too.

    Raises:
      ValueError: on minutes that are not above 0.
    """

    training: TrainConfig
    cell: str = "0>1:conv3 0>2:skip 1>2:conv3 0>3:skip 1>3:conv3 2>3:conv3"
    channels: int = 128
    time_steps: int = 4
    stem_stride: int = 1
    norm: str = "over_time"
    neuron: NeuronSpec = NeuronSpec()
    padding: int | None = None
    precisions: tuple[str, ...] = ()
    minutes: float | None = None
    all_images: bool = False

    def __post_init__(self) -> None:
        """Refuses a time that is none."""
        if self.minutes is not None and not (math.isfinite(self.minutes) and self.minutes > 0):
            raise ValueError(f"minutes={self.minutes} must be finite and above 0")

    def network(self, data: str, space: CellSpace, num_classes: int | None = None) -> NetworkSpec:
        """As of `Sizes`, with the norm and the neurons of these settings."""
        spec = super().network(data, space, num_classes)
        return dataclasses.replace(spec, norm=self.norm, neuron=self.neuron)

    def cell_network(self, data: str) -> tuple[NetworkSpec, np.ndarray]:
        """The network on a data set, and its genotype [E].

        Raises:
          ValueError: one line, on a cell or a size that is none, or too many parameters.
        """
        sizes = {int(k) for k in re.findall(r"conv(\d+)", self.cell)} or {1, 3}  # four words name 1×1 and 3×3
        space = CellSpace(tuple(sorted(sizes)))
        spec, genotype = self.network(data, space), space.parse(self.cell)
        if (parameters := parameters_of(spec, genotype)) >= PARAMETER_LIMIT:
            raise ValueError(
                f"channels={self.channels}: {parameters:,} parameters must be below {PARAMETER_LIMIT:,}; give fewer"
            )
        return spec, genotype


_SMOKE_LIMITS: dict[str, Any] = {"limit_train": 64, "limit_validation": 32, "limit_test": 32}

_CPU = Preset()
_CPU_LARGE = dataclasses.replace(
    _CPU,
    channels=16,
    epochs=5,
    batch_size=64,
    memory_budget="96KiB",
    limit_train=12_000,
)
_GPU = dataclasses.replace(
    _CPU,
    channels=128,
    time_steps=5,
    stem_stride=1,
    dropout=0.1,
    epochs=100,
    batch_size=64,
    learning_rate=0.1,
    memory_budget="8MiB",
)
_SMOKE = dataclasses.replace(
    _CPU,
    kernel_sizes=(1, 3),
    sets=((1,), (3,)),  # two finalists, at the price of one
    keep="all",
    channels=4,
    epochs=2,
    batch_size=16,
    search_epochs=1,
    fidelities=(Fidelity(2, 4, 2, 8, 2), Fidelity(2, 4, None, None, 2), Fidelity(None, 4, None, None, 2)),
    memory_budget="16KiB",
    **_SMOKE_LIMITS,
)
PRESETS: dict[str, dict[str, Preset]] = {
    "mnist5k": {"cpu": _CPU, "gpu": dataclasses.replace(_GPU, channels=64), "smoke": _SMOKE},
    "mnist": {"cpu": _CPU_LARGE, "gpu": _GPU, "smoke": _SMOKE},
    "fashion_mnist": {"cpu": _CPU_LARGE, "gpu": _GPU, "smoke": _SMOKE},
    "cifar10": {"cpu": _CPU_LARGE, "gpu": _GPU, "smoke": _SMOKE},
    "cifar100": {"cpu": _CPU_LARGE, "gpu": _GPU, "smoke": _SMOKE},
    "tiny_imagenet": {  # four times the pixels: more membranes, so more memory
        "cpu": dataclasses.replace(_CPU_LARGE, memory_budget="192KiB"),
        "gpu": dataclasses.replace(_GPU, stem_stride=2),
        "smoke": dataclasses.replace(_SMOKE, memory_budget="64KiB"),
    },
    OWN: {"cpu": dataclasses.replace(_CPU_LARGE, memory_budget="192KiB"), "gpu": _GPU, "smoke": _SMOKE},
}


_TIMED_SMOKE = Timed(
    training=TrainConfig(2, 16, loss="tet"),
    cell="0>1:conv3 0>3:skip 1>3:conv3",
    channels=4,
    time_steps=2,
    stem_stride=2,
    **_SMOKE_LIMITS,
)
_RECIPE = TrainConfig(
    epochs=200, batch_size=64, final_fraction=0.0, label_smoothing=0.1, **named_recipe("tuned"),
)  # fmt: skip
_DIGITS_RECIPE = dataclasses.replace(_RECIPE, epochs=150, batch_size=32)
_H100_RECIPE = dataclasses.replace(_RECIPE, batch_size=256, cutout=8, precision="bfloat16")

_H100 = Timed(training=_H100_RECIPE, minutes=9.0)
_CPU_HOUR = Timed(
    training=dataclasses.replace(_RECIPE, learning_rate=0.04, batch_size=256),
    cell="0>1:conv3 0>2:skip 1>2:conv3 0>3:skip 1>3:skip 2>3:conv3",
    channels=96,
    time_steps=1,
    stem_stride=2,
    norm="per_step",
    neuron=NeuronSpec(v_threshold=0.5, surrogate="triangle"),
    padding=2,
    precisions=PRECISIONS,  # bfloat16 is faster where cores multiply matrices of it, and slower where they do not
    minutes=58.0,
)
_CPU_MNIST = dataclasses.replace(
    _CPU_HOUR,
    training=dataclasses.replace(_CPU_HOUR.training, learning_rate=0.03, batch_size=128),
    channels=32,
    minutes=9.5,
)
_CPU_DIGITS = Timed(training=_DIGITS_RECIPE, channels=16, time_steps=2, precisions=PRECISIONS, minutes=9.5)

TIMED_PRESETS: dict[str, dict[str, Timed]] = {
    data: named | {"smoke": _TIMED_SMOKE}
    for data, named in {
        "mnist5k": {"cpu-10min": _CPU_DIGITS},
        "mnist": {"cpu-10min": _CPU_MNIST},
        "cifar10": {"cpu-1h": _CPU_HOUR, "h100-10min": _H100},
        "cifar100": {"cpu-1h": _CPU_HOUR, "h100-10min": dataclasses.replace(_H100, channels=160)},
        "tiny_imagenet": {
            "cpu-1h": dataclasses.replace(_CPU_HOUR, channels=48, padding=None),
            "h100-10min": dataclasses.replace(_H100, channels=160, stem_stride=2),
        },
        OWN: {"cpu-1h": _CPU_HOUR, "h100-10min": _H100},
    }.items()
}


def get_preset(data: str, name: str, **changes: Any) -> Preset:
    """The preset of the four steps of that name for a data set.

    Args:
      data: a known data set, or the path of a folder of images.
      name: of the preset.
      **changes: fields with other values; None keeps the preset's.

    Raises:
      ValueError: naming the known data sets or presets.
    """
    given = {field: value for field, value in changes.items() if value is not None}
    return dataclasses.replace(_named(PRESETS, data, name), **given)


def get_timed_preset(data: str, name: str) -> Timed:
    """The preset of a training in a given time of that name; crops and flips are the data set's own.

    Errors as `get_preset`.
    """
    preset, info = _named(TIMED_PRESETS, data, name), dataset_info(data)
    padding = info.padding if preset.padding is None else preset.padding
    training = dataclasses.replace(preset.training, padding=padding, flip=info.flip)
    return dataclasses.replace(preset, training=training)


def is_timed(name: str) -> bool:
    """Whether a preset of that name is one of trainings in a given time alone."""
    there = {name for named in TIMED_PRESETS.values() for name in named}
    return name in there.difference(*PRESETS.values())


def _named(presets: dict[str, dict[str, Kind]], data: str, name: str) -> Kind:
    kind = OWN if data not in DATASETS and Path(data).is_dir() else data
    if kind not in presets:
        known = ", ".join(known for known in presets if known != OWN)
        raise ValueError(f"--data {data!r} is unknown; known: {known}, or the path of a folder of images")
    if name not in presets[kind]:
        raise ValueError(f"--preset {name!r} is unknown for {data}; known: {', '.join(presets[kind])}")
    return presets[kind][name]
