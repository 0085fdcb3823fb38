"""Trainings as one batch are those that would have been made one by one."""

from typing import Any

import jax
import numpy as np
import pytest

from spikernel_jax import CellSpace, NetworkSpec, TrainConfig, evaluate, load_dataset, train, train_together
from spikernel_jax.training import step
from spikernel_jax.training.loop import TrainingDivergedError

SPACE = CellSpace(operations=("zero", "skip", "conv3", "avgpool3"))
SPEC = NetworkSpec((28, 28, 1), 10, SPACE, channels=2, time_steps=2, stem_stride=2, dropout=0.2)
CELLS = ("0>1:conv3 0>2:avgpool3 1>2:conv3 0>3:skip 2>3:conv3", "0>1:conv3 1>3:skip 0>3:conv3")
RECIPES = {
    "sgd": TrainConfig(epochs=2, batch_size=16, flip=True, padding=2, mix="mixup"),
    "nesterov": TrainConfig(epochs=2, batch_size=16, optimiser="nesterov", ema=0.9),
    "muon": TrainConfig(epochs=2, batch_size=16, optimiser="muon", learning_rate=0.02),
}
SEEDS = (3, 0, 7)


@pytest.fixture(scope="module")
def data():
    return load_dataset("mnist5k", limit_train=40, limit_validation=24, limit_test=8)


@pytest.mark.parametrize(
    ("recipe", "one_program"),
    [
        ("sgd", False),
        pytest.param("nesterov", True, marks=pytest.mark.slow),
        pytest.param("muon", False, marks=pytest.mark.slow),
    ],
)
def test_each_is_the_training_of_its_seed(recipe, one_program, data):
    row, config = SPACE.parse(CELLS[0]), RECIPES[recipe]
    records = []
    models = train_together(SPEC, [row] * 3, data, config, SEEDS, one_program=one_program, progress=records.append)
    assert [[own["epoch"] for own in record] for record in records] == [[1] * 3, [2] * 3]
    for number, (seed, ours) in enumerate(zip(SEEDS, models, strict=True)):
        alone = []
        theirs = train(SPEC, row, data, config, seed=seed, one_program=one_program, progress=alone.append)
        assert jax.tree.structure(ours.params) == jax.tree.structure(theirs.params)
        leaves = jax.tree.leaves_with_path((ours.params, ours.stats))
        for (path, a), b in zip(leaves, jax.tree.leaves((theirs.params, theirs.stats)), strict=True):
            # A bias before a norm has a gradient of rounding alone, of which Adam makes a step, and statistics follow.
            if recipe == "muon" and "kernel" not in str(path[-1]):
                continue
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
        assert ours.genotype == theirs.genotype
        assert ours.metrics.keys() == theirs.metrics.keys()
        for epoch, record in enumerate(alone):
            assert records[epoch][number]["train_loss"] == pytest.approx(record["train_loss"], rel=1e-4)
        assert ours.metrics["validation_accuracy"] == evaluate(ours, data.validation)
    assert len({model.metrics["train_loss"] for model in models}) == len(SEEDS)


@pytest.mark.slow
def test_cells_share_one_program(data):
    program: Any = step.train_steps_together
    sizes = []
    for cell in CELLS:
        train_together(SPEC, [SPACE.parse(cell)] * 3, data, RECIPES["nesterov"], SEEDS, one_program=True)
        sizes.append(program._cache_size())
    assert sizes[0] == sizes[1] > 0


def test_one_that_diverges_is_said(data):
    wild = TrainConfig(epochs=1, batch_size=16, learning_rate=1e30)
    with pytest.raises(TrainingDivergedError, match="lower learning_rate"):
        train_together(SPEC, [SPACE.parse(CELLS[1])] * 2, data, wild, (0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["sgd", "nesterov"])
def test_cells_that_differ_are_trained_as_one_by_one(recipe, data):
    """Each with a seed of its own; what a cell does not use stays out of its model."""
    rows, config = [SPACE.parse(cell) for cell in (*CELLS, CELLS[0])], RECIPES[recipe]
    models = train_together(SPEC, rows, data, config, SEEDS, one_program=True)
    for row, seed, ours in zip(rows, SEEDS, models, strict=True):
        theirs = train(SPEC, row, data, config, seed=seed, one_program=True)
        assert ours.genotype == theirs.genotype == tuple(row.tolist())
        assert ours.metrics.keys() == theirs.metrics.keys()
        assert ours.metrics["train_loss"] == pytest.approx(theirs.metrics["train_loss"], rel=1e-4)
        assert jax.tree.structure((ours.params, ours.stats)) == jax.tree.structure((theirs.params, theirs.stats))
        for a, b in zip(*(jax.tree.leaves((model.params, model.stats)) for model in (ours, theirs)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("cells", "seeds", "words"),
    [
        ((), (), "must hold at least one"),
        (CELLS[:1], (0, 1), "1 genotypes and 2 seeds: want a cell and a seed of each"),
        (CELLS, (0, 1), "one_program=False: cells that differ"),
    ],
)
def test_what_cannot_be_one_batch_is_refused(cells, seeds, words, data):
    with pytest.raises(ValueError, match=words):
        train_together(SPEC, [SPACE.parse(cell) for cell in cells], data, RECIPES["sgd"], seeds)
