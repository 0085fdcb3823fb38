"""One compiled training serves every cell of a space, and gives what a cell's own program gives."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spikernel_jax import CellSpace, NetworkSpec, NeuronSpec, TrainConfig, evaluate, load_dataset, train
from spikernel_jax.snn import network
from spikernel_jax.training import evaluation, loop

SPACE = CellSpace(operations=("zero", "skip", "conv3", "dwconv1@0.5"))
SPEC = NetworkSpec((28, 28, 1), 10, SPACE, channels=2, time_steps=2, stem_stride=2)
CELLS = ("0>1:conv3 0>2:dwconv1@0.5 1>2:conv3 0>3:skip 2>3:conv3", "0>1:dwconv1@0.5 1>3:skip 0>3:conv3")
RECIPES = {
    "sgd": TrainConfig(epochs=2, batch_size=16, flip=True, padding=2),
    "nesterov": TrainConfig(epochs=2, batch_size=16, optimiser="nesterov", ema=0.9, decayed="kernels"),
}


@pytest.fixture(scope="module")
def data():
    return load_dataset("mnist5k", limit_train=32, limit_validation=24, limit_test=8)


def both(cell, data, config, spec=SPEC, **options):
    return [train(spec, SPACE.parse(cell), data, config, one_program=one, **options) for one in (False, True)]


def assert_close(one, other):
    for tree in ("params", "stats"):
        ours, theirs = getattr(one, tree), getattr(other, tree)
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "cell"), [("sgd", CELLS[0]), ("nesterov", CELLS[1])])
def test_the_same_weights_as_a_program_of_its_own(name, cell, data):
    own, shared = both(cell, data, RECIPES[name])
    assert_close(own, shared)
    assert shared.genotype == own.genotype
    assert shared.metrics["train_loss"] == pytest.approx(own.metrics["train_loss"], rel=1e-4)


@pytest.mark.slow
def test_what_neurons_learn_and_two_cells(data):
    spec = NetworkSpec(**{**vars(SPEC), "neuron": NeuronSpec(learn_tau=True, learn_threshold=True)})
    pair = np.stack([SPACE.parse(cell) for cell in CELLS])
    own, shared = (train(spec, pair, data, RECIPES["sgd"], one_program=one) for one in (False, True))
    assert_close(own, shared)


@pytest.mark.slow
def test_one_compilation_for_all(data):
    config = RECIPES["sgd"]
    train(SPEC, SPACE.parse(CELLS[0]), data, config, one_program=True)

    def sizes() -> list[int]:
        programs: list[Any] = [loop.train_steps, evaluation._right]
        return [program._cache_size() for program in programs]

    compiled = sizes()
    for number, row in enumerate(SPACE.sample(jax.random.key(0), 3)):
        train(SPEC, row, data, config, one_program=True, seed=number)
    assert sizes() == compiled


@pytest.mark.slow
def test_what_a_cell_does_not_use_stays_as_it_was(data):
    row = SPACE.parse(CELLS[0])
    program = loop.Program(SPEC, None, RECIPES["nesterov"], 4, data.mean, data.std, loop.devices_for(16))
    start = program.start(jax.random.key(0))
    before, used = jax.device_get(start.params), SPEC.layers(row).keys()
    chosen = jnp.arange(16)[None]
    fed = (jnp.asarray(row, jnp.int32), jax.random.key(1), data.train.images, data.train.labels, chosen)
    after, _ = loop.train_steps(program, start, *fed)
    for layer, entry in jax.device_get(after.params).items():
        moved = any((entry[name] != before[layer][name]).any() for name in entry)
        assert moved == (layer in used), layer


@pytest.mark.slow
def test_it_goes_on_and_is_not_taken_for_another(data, tmp_path):
    config = RECIPES["sgd"]
    _, whole = both(CELLS[0], data, config)
    halves = []

    def stop(record):
        halves.append(record)
        if len(halves) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(SPEC, SPACE.parse(CELLS[0]), data, config, one_program=True, folder=tmp_path, progress=stop)
    again = train(SPEC, SPACE.parse(CELLS[0]), data, config, one_program=True, folder=tmp_path)
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="one_program"):
        train(SPEC, SPACE.parse(CELLS[0]), data, config, folder=tmp_path)


@pytest.mark.slow
def test_a_model_is_measured_alike(data):
    model, _ = both(CELLS[1], data, RECIPES["sgd"])
    assert evaluate(model, data.validation, one_program=True) == evaluate(model, data.validation)
    own, shared = (evaluation.measure_spikes(model, data.validation, one_program=one) for one in (False, True))
    assert own.keys() == shared.keys()
    for site, counts in own.items():
        np.testing.assert_allclose(shared[site], counts, rtol=1e-3, atol=1e-2, err_msg=site)
    bank = jax.eval_shape(lambda: network.init(jax.random.key(0), SPEC))[0]
    there = network.in_bank(model.params, bank)
    assert jax.tree.structure(there) == jax.tree.structure(bank)
    jax.tree.map(np.testing.assert_array_equal, network.subnetwork(SPEC, there, model.genotype), model.params)
