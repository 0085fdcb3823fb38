"""A training is its recipe's parts put together, and the optimiser's steps are the published ones."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from small_training import CELL, SPEC, data, run
from spikernel_jax.data import Dataset, epoch_batches, normalise
from spikernel_jax.snn import network
from spikernel_jax.snn.model import hashable
from spikernel_jax.snn.spec import NetworkSpec
from spikernel_jax.training import devices, recipe
from spikernel_jax.training import loop as training
from spikernel_jax.training.loop import train
from spikernel_jax.training.recipe import TrainConfig


def optimiser_of(config: Any, total: int) -> Any:
    return recipe.optimiser(config, total)


def test_the_learning_rate_falls_on_a_cosine_to_its_final_fraction():
    config = TrainConfig(learning_rate=0.4, final_fraction=0.05, momentum=0.0, weight_decay=0.0)
    optimiser = optimiser_of(config, 20)
    weights = {"w": jnp.zeros(1)}
    state, rates = optimiser.init(weights), []
    for _ in range(23):
        updates, state = optimiser.update({"w": jnp.ones(1)}, state, weights)
        rates.append(-float(updates["w"][0]))
    progress = np.minimum(np.arange(23) / 20, 1)
    expected = 0.4 * (0.05 + 0.95 * (1 + np.cos(np.pi * progress)) / 2)
    np.testing.assert_allclose(rates, expected, rtol=1e-5)
    assert rates[0] == pytest.approx(0.4)
    assert rates[20] == rates[22] == pytest.approx(0.4 * 0.05)


def test_a_step_is_momentum_sgd_with_weight_decay_in_the_gradient():
    """PyTorch's order, which the published recipe means: decay joins the gradient before the momentum."""
    config = TrainConfig(learning_rate=0.3, final_fraction=0.1, momentum=0.9, weight_decay=0.01)
    optimiser = optimiser_of(config, 6)
    rng = np.random.default_rng(0)
    w = rng.normal(size=(3, 2))
    velocity = np.zeros_like(w)
    weights: Any = {"w": jnp.asarray(w, jnp.float32)}
    state = optimiser.init(weights)
    for t in range(6):
        gradient = rng.normal(size=w.shape)
        updates, state = optimiser.update({"w": jnp.asarray(gradient, jnp.float32)}, state, weights)
        weights = jax.tree.map(lambda a, b: a + b, weights, updates)
        rate = 0.3 * (0.1 + 0.9 * (1 + np.cos(np.pi * t / 6)) / 2)
        velocity = 0.9 * velocity + (gradient + 0.01 * w)
        w = w - rate * velocity
        np.testing.assert_allclose(weights["w"], w, rtol=1e-5, atol=1e-6)


EVERYTHING = TrainConfig(
    epochs=3,
    batch_size=8,
    learning_rate=0.05,
    final_fraction=0.3,
    momentum=0.7,
    weight_decay=0.2,
    padding=2,
    flip=True,
    optimiser="nesterov",
    warmup=0.25,
    loss="tet",
    label_smoothing=0.2,
    trivial=True,
    cutout=3,
    mix="mixup",
    mix_alpha=0.4,
    decayed="kernels",
    ema=0.6,
)


def by_hand(config: Any, total: int, given: Dataset, seed: int) -> tuple[Any, Any]:
    """Weights and statistics that are exported, from the recipe's parts and the definition of a training."""
    init_key, order_key, step_key = (jax.random.fold_in(jax.random.key(seed), i) for i in range(3))
    params, stats = network.init(init_key, SPEC, CELL)
    optimiser = recipe.optimiser(config, total)
    state, average = optimiser.init(params), (params, stats)

    @jax.jit
    def step(params: Any, stats: Any, state: Any, average: Any, number: Any, chosen: Any) -> Any:
        drawn, mask = jax.random.split(jax.random.fold_in(step_key, number))
        images, labels = jnp.asarray(given.train.images)[chosen], jnp.asarray(given.train.labels)[chosen]
        x, targets = recipe.inputs(config, drawn, images, labels, 2, given.mean, given.std)
        keep = network.dropout_mask(mask, SPEC, len(chosen))

        def loss(params: Any) -> Any:
            out = network.apply(SPEC, CELL, params, x, stats=stats, train=True, dropout_keep=keep)
            return recipe.loss(config, out.logits_TBK, targets), out.stats

        grads, stats = jax.grad(loss, has_aux=True)(params)
        updates, state = optimiser.update(grads, state, params)
        params = jax.tree.map(lambda a, b: a + b, params, updates)
        decay = jnp.minimum(config.ema, (1 + number) / (10 + number))
        average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, (params, stats))
        return params, stats, state, average

    orders = [
        np.asarray(epoch_batches(jax.random.fold_in(order_key, epoch), len(given.train.labels), config.batch_size))
        for epoch in range(config.epochs)
    ]
    for number, chosen in enumerate(np.concatenate(orders)):
        params, stats, state, average = step(params, stats, state, average, number, chosen)
    return average if config.ema else (params, stats)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(EVERYTHING, id="everything"),
        pytest.param(
            TrainConfig(epochs=2, batch_size=16, optimiser="muon", learning_rate=0.02, schedule="one_cycle"),
            id="muon",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_training_is_its_recipes_parts_put_together(config):
    """No part is left out, whatever it is: each is compared with its definition in test_recipe.py."""
    given = data()
    model = run(config=config)
    params, stats = by_hand(config, config.epochs * (70 // config.batch_size), given, 1)
    # Behind a convolution in a cell stands another norm, so the bias has no gradient but rounding, and Muon's Adam
    # makes steps of any gradient's sign.
    compared = [leaf.ndim > 1 or config.optimiser != "muon" for leaf in jax.tree.leaves(params)]
    pairs = [*zip(jax.tree.leaves(model.params), jax.tree.leaves(params), compared, strict=True)]
    pairs += [
        (a, b, config.optimiser != "muon") for a, b in zip(*map(jax.tree.leaves, (model.stats, stats)), strict=True)
    ]
    for ours, other, look in pairs:
        if look:
            np.testing.assert_allclose(ours, other, rtol=1e-3, atol=1e-4)
    start, _ = network.init(jax.random.fold_in(jax.random.key(1), 0), SPEC, CELL)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), model.params, start)
    assert max(jax.tree.leaves(moved)) > 1e-2  # the tolerance is small beside what a training does


@pytest.mark.parametrize("precision", recipe.PRECISIONS)
def test_the_precision_is_that_of_the_program(precision):
    config = TrainConfig(batch_size=8, precision=precision)
    plan = training.Program(SPEC, hashable(CELL), config, 10, (0.5,), (0.2,), devices.devices_for(8))
    images, labels = jnp.zeros((8, 8, 8, 1), jnp.uint8), jnp.zeros(8, jnp.int32)
    chosen = jnp.zeros((1, 8), jnp.int32)
    state = jax.eval_shape(lambda: plan.start(jax.random.key(0)))
    program = training.train_steps.lower(plan, state, (), jax.random.key(0), images, labels, chosen).as_text()
    assert ("bf16" in program) == (precision == "bfloat16")


def test_the_first_loss_by_hand():
    config = TrainConfig(epochs=1, batch_size=70, padding=0)
    spec = NetworkSpec((8, 8, 1), 2, SPEC.space, channels=2, time_steps=2)
    given = data()
    record: list[dict[str, Any]] = []
    train(spec, CELL, given, config, seed=1, progress=record.append)
    params, stats = network.init(jax.random.fold_in(jax.random.key(1), 0), spec, CELL)
    x = normalise(jnp.asarray(given.train.images), given.mean, given.std)
    forward = jax.jit(lambda p, s, x: network.apply(spec, CELL, p, x, stats=s, train=True).logits_BK)
    logits = np.asarray(forward(params, stats, x), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = -log_p[np.arange(70), given.train.labels].mean()
    assert record[0]["train_loss"] == pytest.approx(expected, rel=1e-4)
    assert record[0]["train_accuracy"] == pytest.approx((logits.argmax(1) == given.train.labels).mean(), abs=0.02)
