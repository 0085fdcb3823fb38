"""Presets: widths, time steps, budgets and epochs for each data set.

``cpu`` fits two CPU cores (minutes on mnist5k, an hour at most elsewhere), ``gpu`` is the width at which
models below 10 M parameters are trained in full, and ``smoke`` takes seconds and proves nothing but that
everything runs.
"""

import dataclasses
from typing import Any

from spikernel_jax.cells.space import CellSpace
from spikernel_jax.data import DATASETS
from spikernel_jax.scoring.fidelity import FIDELITIES, Fidelity
from spikernel_jax.snn.spec import NetworkSpec
from spikernel_jax.training.recipe import TrainConfig, named_recipe


@dataclasses.dataclass(frozen=True)
class Preset:
    """Settings of the four steps for one data set.

    Attributes:
      kernel_sizes: of step 1.
      sets: kernel sets of step 2; None takes all pairs of the sizes.
      keep: which of them are searched, ``"rule"`` or ``"all"``.
      channels: width C of the networks that are trained.
      time_steps: T.
      stem_stride: 2 halves height and width before cell 1.
      head: ``"gap"`` or ``"snasnet"``.
      dropout: before the head.
      impact_cell: the cell of step 1, in explicit notation, with K for the kernel size.
      seeds: trainings of every network of the four steps.
      epochs: of each of them, so that any two of them can be compared.
      batch_size: of training.
      learning_rate: of SGD; a recipe may set another.
      score: a registered training-free score.
      fidelities: sizes of the score at low, medium and full fidelity.
      memory_budget: bytes (as text) that the chosen model may take.
      bits: width of weights, membranes and activations on the device.
      limit_train: training images used; None uses all.
      limit_validation: validation images used.
      limit_test: test images used.
    """

    kernel_sizes: tuple[int, ...] = (1, 3, 5, 7)
    sets: tuple[tuple[int, ...], ...] | None = None
    keep: str = "rule"
    channels: int = 8
    time_steps: int = 2
    stem_stride: int = 2
    head: str = "gap"
    dropout: float = 0.0
    impact_cell: str = "0>1:convK 1>3:convK 0>3:skip"
    seeds: int = 2
    epochs: int = 5
    batch_size: int = 32
    learning_rate: float = 0.2
    score: str = "sahd_paper"
    fidelities: tuple[Fidelity, Fidelity, Fidelity] = FIDELITIES
    memory_budget: str = "32KiB"
    bits: int = 8
    limit_train: int | None = None
    limit_validation: int | None = None
    limit_test: int | None = None

    def network(self, data: str, num_classes: int, space: CellSpace) -> NetworkSpec:
        """The network on a data set, as it is trained."""
        return NetworkSpec(
            image_shape=DATASETS[data].image_shape,
            num_classes=num_classes,
            space=space,
            channels=self.channels,
            time_steps=self.time_steps,
            stem_stride=self.stem_stride,
            head=self.head,
            dropout=self.dropout,
        )

    def training(self, data: str, recipe: str) -> TrainConfig:
        """A recipe on a data set; ValueError if its name is unknown."""
        info = DATASETS[data]
        ours = {"epochs": self.epochs, "batch_size": self.batch_size, "learning_rate": self.learning_rate}
        return TrainConfig(**ours | {"padding": info.padding, "flip": info.flip} | named_recipe(recipe))


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
    fidelities=(Fidelity(2, 4, 2, 8, 2), Fidelity(2, 4, None, None, 2), Fidelity(None, 4, None, None, 2)),
    memory_budget="16KiB",
    limit_train=64,
    limit_validation=32,
    limit_test=32,
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
}


def get_preset(data: str, name: str, **changes: Any) -> Preset:
    """The preset of that name for a data set.

    Args:
      data: a known data set.
      name: of the preset.
      **changes: fields with other values; None keeps the preset's.

    Raises:
      ValueError: naming the known data sets or presets.
    """
    if data not in PRESETS:
        raise ValueError(f"--data {data!r} is unknown; known: {', '.join(PRESETS)}")
    if name not in PRESETS[data]:
        raise ValueError(f"--preset {name!r} is unknown for {data}; known: {', '.join(PRESETS[data])}")
    given = {field: value for field, value in changes.items() if value is not None}
    return dataclasses.replace(PRESETS[data][name], **given)
