"""Training for weights of few bits, and from weights that are there."""

import jax
import numpy as np
import pytest

from spikernel_jax import CellSpace, NetworkSpec, TrainConfig, evaluate, load_dataset, train
from spikernel_jax.snn.rounding import rounded, rounded_classes

SPEC = NetworkSpec((28, 28, 1), 10, CellSpace((3,)), channels=3, time_steps=2, stem_stride=2)
CELL = SPEC.space.parse("0>1:conv3 0>3:skip 1>3:conv3")
STILL = TrainConfig(epochs=1, batch_size=32, learning_rate=1e-9, weight_decay=0.0)


@pytest.fixture(scope="module")
def data():
    return load_dataset("mnist5k", limit_train=256, limit_validation=128, limit_test=16)


@pytest.fixture(scope="module")
def model(data):
    return train(SPEC, CELL, data, TrainConfig(epochs=3, batch_size=32, learning_rate=0.2))


def test_a_training_begins_with_what_it_is_given(data, model):
    found = train(SPEC, CELL, data, STILL, start=model, seed=7)
    for ours, its in zip(jax.tree.leaves(found.params), jax.tree.leaves(model.params), strict=True):
        np.testing.assert_allclose(ours, its, atol=1e-6)
    assert found.metrics["start"] != train(SPEC, CELL, data, STILL, start=found, seed=7).metrics["start"]


@pytest.mark.slow
def test_a_start_in_the_program_of_all_cells(data, model):
    found = train(SPEC, CELL, data, STILL, start=model, one_program=True)
    for ours, its in zip(jax.tree.leaves(found.params), jax.tree.leaves(model.params), strict=True):
        np.testing.assert_allclose(ours, its, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 4])
def test_what_is_exported_is_worth_so_many_bits(data, model, bits):
    config = TrainConfig(epochs=4, batch_size=32, learning_rate=0.05, weight_bits=bits)
    found = train(SPEC, CELL, data, config, start=model)
    for name, entry in found.params.items():
        if "kernel" in entry:
            kernel = np.asarray(entry["kernel"], np.float64)
            whole, unit = rounded_classes(kernel, 10, bits) if name == "head.out" else rounded(kernel, bits)
            np.testing.assert_allclose(kernel, whole * unit, atol=1e-6)
    assert found.metrics["validation_accuracy"] == evaluate(found, data.validation)
    untrained = train(SPEC, CELL, data, TrainConfig(**vars(STILL) | {"weight_bits": bits}), start=model)
    assert evaluate(found, data.train) > evaluate(untrained, data.train)


def test_a_start_of_another_network_is_refused(data, model):
    other = SPEC.space.parse("0>1:conv3 0>3:skip 1>2:conv3 2>3:conv3")
    with pytest.raises(ValueError, match="start is a model of another network"):
        train(SPEC, other, data, STILL, start=model)
    with pytest.raises(ValueError, match="weight_bits=9 must be a whole number of at least 2"):
        TrainConfig(weight_bits=9)
