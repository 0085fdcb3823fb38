"""Every preset of every data set makes networks that can be built, and that can meet its own budget."""

import numpy as np
import pytest

from spikernel_jax.cells.space import CellSpace
from spikernel_jax.data import DATASETS
from spikernel_jax.io.units import parse_bytes
from spikernel_jax.pipeline.presets import OWN, PRESETS, get_preset
from spikernel_jax.snn.cost import costs
from spikernel_jax.training.recipe import DEFAULT_RECIPE, RECIPES, TrainConfig


def test_every_data_set_has_presets():
    assert PRESETS.keys() == {*DATASETS, OWN}


@pytest.mark.parametrize(("data", "name"), [(data, name) for data in DATASETS for name in PRESETS[data]])
def test_a_third_of_the_cells_of_each_preset_fit_its_budget(data, name):
    preset = get_preset(data, name)
    space = CellSpace((1, 3))
    spec = preset.network(data, space)
    memory = costs(spec, space.enumerate(), preset.bits).memory_bytes
    assert np.mean(memory <= parse_bytes(preset.memory_budget)) > 1 / 3
    assert preset.training(data, DEFAULT_RECIPE).flip == DATASETS[data].flip


@pytest.mark.parametrize(("data", "name", "known"), [("mars", "cpu", "mnist5k"), ("cifar10", "huge", "smoke")])
def test_unknown_names(data, name, known):
    with pytest.raises(ValueError, match=known):
        get_preset(data, name)


def test_recipes_by_name():
    preset = get_preset("cifar10", "gpu", epochs=7)
    plain = TrainConfig(epochs=7, batch_size=64, learning_rate=0.1, padding=4, flip=True)
    assert preset.training("cifar10", "snasnet") == plain  # the defaults are the paper's
    tuned = preset.training("cifar10", "tuned")
    changed = {name for name, value in vars(tuned).items() if value != getattr(plain, name)}
    assert changed
    assert {name: getattr(tuned, name) for name in RECIPES["tuned"]} == RECIPES["tuned"]
    assert changed <= RECIPES["tuned"].keys()
    with pytest.raises(ValueError, match="--recipe 'magic' is unknown; known: snasnet, tuned"):
        preset.training("cifar10", "magic")


def test_changes_to_a_preset():
    changed = get_preset("mnist5k", "smoke", channels=9, bits=None)
    assert (changed.channels, changed.bits) == (9, get_preset("mnist5k", "smoke").bits)
