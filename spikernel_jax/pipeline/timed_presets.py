"""Presets of trainings that end in a given time: network, recipe and minutes for each data set.

``smoke`` takes seconds and proves only that everything runs. Which choices are best has not been measured: `h100-10min`
was sized by its FLOPs for an H100, where it has not been run (44 epochs of cifar10 took 6.5 minutes on an H200:
results/accuracy-cifar10-h200-seed0). At 35 % of 800 TFLOP/s, and 440 s of 540 left for steps:

| | parameters | TFLOP an epoch | seconds an epoch | epochs |
| --- | --- | --- | --- | --- |
| cifar10, C = 128, T = 4 | 3.25 M | 1,631 | 5.8 | 75 |
| cifar100, C = 160, T = 4 | 5.11 M | 2,549 | 9.1 | 48 |
| tiny_imagenet, C = 160, T = 4, stem stride 2 | 5.14 M | 5,098 | 18.2 | 24 |
"""

import dataclasses
import math
import re
from typing import Any

import numpy as np

from spikernel_jax.cells.space import CellSpace
from spikernel_jax.data import DATASETS
from spikernel_jax.snn import cost
from spikernel_jax.snn.spec import NetworkSpec
from spikernel_jax.training.recipe import TrainConfig, named_recipe

PARAMETER_LIMIT = 10_000_000  # of the published networks that ours are compared with


@dataclasses.dataclass(frozen=True)
class Timed:
    """Settings of one training.

    Attributes:
      training: the recipe; its epochs are the most that are trained, as many as `minutes` allow.
      cell: in explicit notation or SNASNet's four words.
      channels: width C.
      time_steps: T.
      stem_stride: 1 or 2.
      head: ``"gap"`` or ``"snasnet"``.
      dropout: before the head.
      norm: ``"per_step"`` or ``"over_time"``.
      minutes: from the start of the process to the end of the report; None sets no limit.
      limit_train: training images used; None uses all.
      limit_validation: validation images used.
      limit_test: test images used.
      all_images: train on the validation images too.

    Raises:
      ValueError: on minutes that are not above 0.
    """

    training: TrainConfig
    cell: str = "0>1:conv3 0>2:skip 1>2:conv3 0>3:skip 1>3:conv3 2>3:conv3"
    channels: int = 128
    time_steps: int = 4
    stem_stride: int = 1
    head: str = "gap"
    dropout: float = 0.0
    norm: str = "over_time"
    minutes: float | None = None
    limit_train: int | None = None
    limit_validation: int | None = None
    limit_test: int | None = None
    all_images: bool = False

    def __post_init__(self) -> None:
        """Refuses a time that is none."""
        if self.minutes is not None and not (math.isfinite(self.minutes) and self.minutes > 0):
            raise ValueError(f"minutes={self.minutes} must be finite and above 0")

    def network(self, data: str) -> tuple[NetworkSpec, np.ndarray]:
        """The network on a data set, and its genotype [E].

        Raises:
          ValueError: one line, on a cell or a size that is none, or too many parameters.
        """
        sizes = {int(k) for k in re.findall(r"conv(\d+)", self.cell)} or {1, 3}  # four words name 1×1 and 3×3
        space = CellSpace(tuple(sorted(sizes)))
        info = DATASETS[data]
        spec = NetworkSpec(
            image_shape=info.image_shape,
            num_classes=info.num_classes,
            space=space,
            channels=self.channels,
            time_steps=self.time_steps,
            stem_stride=self.stem_stride,
            norm=self.norm,
            head=self.head,
            dropout=self.dropout,
        )
        genotype = space.parse(self.cell)
        if (parameters := parameter_count(spec, genotype)) >= PARAMETER_LIMIT:
            raise ValueError(
                f"channels={self.channels}: {parameters:,} parameters must be below {PARAMETER_LIMIT:,}; give fewer"
            )
        return spec, genotype


def _smoke(data: str) -> Timed:
    training = TrainConfig(2, 16, padding=DATASETS[data].padding, flip=DATASETS[data].flip, loss="tet")
    return Timed(training, "0>1:conv3 0>3:skip 1>3:conv3", 4, 2, 2,
                 limit_train=64, limit_validation=32, limit_test=32)  # fmt: skip


def _presets(data: str, named: dict[str, Timed]) -> dict[str, Timed]:
    """Presets of a data set: crops and flips are its own, and all have a smoke test."""
    crops = {"padding": DATASETS[data].padding, "flip": DATASETS[data].flip}
    return {
        name: dataclasses.replace(preset, training=dataclasses.replace(preset.training, **crops))
        for name, preset in named.items()
    } | {"smoke": _smoke(data)}


_RECIPE = TrainConfig(
    epochs=200, batch_size=64, final_fraction=0.0, label_smoothing=0.1, **named_recipe("tuned"),
)  # fmt: skip
_DIGITS_RECIPE = dataclasses.replace(_RECIPE, epochs=150, batch_size=32)
_H100_RECIPE = dataclasses.replace(_RECIPE, batch_size=256, cutout=8, precision="bfloat16")

_H100 = Timed(_H100_RECIPE, minutes=9.0)
_CPU_HOUR = Timed(_RECIPE, channels=32, time_steps=2, stem_stride=2, minutes=58.0)
_CPU_DIGITS = Timed(_DIGITS_RECIPE, channels=16, time_steps=2, minutes=9.5)

TIMED_PRESETS: dict[str, dict[str, Timed]] = {
    data: _presets(data, named)
    for data, named in {
        "mnist5k": {"cpu-10min": _CPU_DIGITS},
        "mnist": {"cpu-10min": _CPU_DIGITS},
        "cifar10": {"cpu-1h": _CPU_HOUR, "h100-10min": _H100},
        "cifar100": {"cpu-1h": _CPU_HOUR, "h100-10min": dataclasses.replace(_H100, channels=160)},
        "tiny_imagenet": {
            "cpu-1h": dataclasses.replace(_CPU_HOUR, channels=16),
            "h100-10min": dataclasses.replace(_H100, channels=160, stem_stride=2),
        },
    }.items()
}


def get_timed_preset(data: str, name: str) -> Timed:
    """The preset of that name for a data set; ValueError naming the known ones."""
    if data not in TIMED_PRESETS:
        raise ValueError(f"--data {data!r} is unknown; known: {', '.join(TIMED_PRESETS)}")
    if name not in TIMED_PRESETS[data]:
        raise ValueError(f"--preset {name!r} is unknown for {data}; known: {', '.join(TIMED_PRESETS[data])}")
    return TIMED_PRESETS[data][name]


def parameter_count(spec: NetworkSpec, genotype: Any) -> int:
    """Parameters of a network."""
    return int(cost.costs(spec, np.asarray(genotype)[None]).parameters[0])
