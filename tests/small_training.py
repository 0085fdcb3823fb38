"""A training of seconds, which several tests and the processes they start run alike."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from spikernel_jax import make_dataset
from spikernel_jax.cells.space import CellSpace
from spikernel_jax.data import Dataset, Split
from spikernel_jax.snn.model import Model
from spikernel_jax.snn.spec import NetworkSpec
from spikernel_jax.training.loop import train
from spikernel_jax.training.recipe import TrainConfig

SPEC = NetworkSpec((8, 8, 1), 2, CellSpace((3,)), channels=2, time_steps=2, dropout=0.1)
CELL = SPEC.space.parse("0>1:skip 0>3:conv3 1>3:avgpool")
CONFIG = TrainConfig(epochs=6, batch_size=6, learning_rate=0.2, padding=1)  # 11 steps an epoch: calls of 4, 4 and 3


def halves(n: int, seed: int) -> Split:
    """Noise with a bright left (class 0) or right half (class 1)."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    images = rng.integers(60, size=(n, 8, 8, 1))
    images[labels == 0, :, :4] += 150
    images[labels == 1, :, 4:] += 150
    return Split(images.astype(np.uint8), labels)


def data(held_out: int = 10) -> Dataset:
    return make_dataset("halves", halves(70, 0), halves(24, held_out), halves(40, held_out + 1), 2)


def run(folder: Path | None = None, **changes: Any) -> Model:
    """The training of this file; killed processes run the same."""
    arguments: dict[str, Any] = {"spec": SPEC, "genotype": CELL, "data": data(), "config": CONFIG, "seed": 1}
    return train(**(arguments | changes), folder=folder)


def assert_same_weights(a: Model, b: Model) -> None:
    assert jax.tree.structure((a.params, a.stats)) == jax.tree.structure((b.params, b.stats))
    jax.tree.map(np.testing.assert_array_equal, (a.params, a.stats), (b.params, b.stats))
