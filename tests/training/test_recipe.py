"""Recipes: optimisers, schedules, losses and averages against their definitions."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spikernel_jax import make_dataset, train
from spikernel_jax.cells.space import CellSpace
from spikernel_jax.data import Split
from spikernel_jax.snn.neurons import NeuronSpec
from spikernel_jax.snn.spec import NetworkSpec
from spikernel_jax.training import recipe
from spikernel_jax.training.recipe import TrainConfig

PARAMS = {"conv": {"kernel": np.arange(24.0).reshape(1, 2, 3, 4) / 10 - 1}, "norm": {"scale": np.array([1.0, 2.0])}}
GRADS = {
    "conv": {"kernel": np.random.default_rng(3).normal(size=(1, 2, 3, 4)) * [5, 1, 1, 0.2]},
    "norm": {"scale": np.array([0.5, -0.5])},
}


def steps(config: TrainConfig, count: int) -> list[dict[str, np.ndarray]]:
    """Parameters after each of so many steps of constant gradients."""
    optimiser = recipe.optimiser(config, 10)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), PARAMS)
    grads = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), GRADS)
    state, seen = optimiser.init(params), []
    for _ in range(count):
        updates, state = optimiser.update(grads, state, params)
        params = jax.tree.map(lambda a, b: a + b, params, updates)
        seen.append({"kernel": np.asarray(params["conv"]["kernel"]), "scale": np.asarray(params["norm"]["scale"])})
    return seen


def cosine(t: int, total: int = 10, final: float = 0.0) -> float:
    return final + (1 - final) * (1 + np.cos(np.pi * min(t / total, 1))) / 2


@pytest.mark.parametrize("decayed", ["all", "kernels"])
def test_nesterov_looks_ahead(decayed):
    config = TrainConfig(
        learning_rate=0.1, final_fraction=0.0, weight_decay=0.1, optimiser="nesterov", decayed=decayed, momentum=0.8
    )
    got = steps(config, 3)
    for name, w, g in (("kernel", PARAMS["conv"]["kernel"], GRADS["conv"]["kernel"]),
                       ("scale", PARAMS["norm"]["scale"], GRADS["norm"]["scale"])):  # fmt: skip
        velocity = np.zeros_like(w)
        for t in range(3):
            d = g + (0.1 * w if decayed == "all" or name == "kernel" else 0)
            velocity = 0.8 * velocity + d
            w = w - 0.1 * cosine(t) * (d + 0.8 * velocity)
            np.testing.assert_allclose(got[t][name], w, rtol=1e-5, atol=1e-6)


def test_adamw_decays_apart_from_its_moments():
    got = steps(TrainConfig(learning_rate=0.1, final_fraction=0.0, weight_decay=0.1, optimiser="adamw"), 3)
    w, g = PARAMS["conv"]["kernel"], GRADS["conv"]["kernel"]
    for t in range(3):  # of constant gradients both corrected moments are constant
        w = w - 0.1 * cosine(t) * (g / (np.abs(g) + 1e-8) + 0.1 * w)
        np.testing.assert_allclose(got[t]["kernel"], w, rtol=1e-4, atol=1e-5)


def test_muon_turns_a_kernel_by_a_nearly_orthogonal_matrix():
    config = TrainConfig(learning_rate=0.1, weight_decay=0.0, optimiser="muon")
    step = (PARAMS["conv"]["kernel"] - steps(config, 1)[0]["kernel"]).reshape(6, 4)
    singular = np.linalg.svd(step, compute_uv=False)
    assert (singular > 0.5 * singular[0]).all()  # Newton-Schulz brings singular values to about one size
    gradient = np.linalg.svd(GRADS["conv"]["kernel"].reshape(6, 4), compute_uv=False)
    assert gradient[-1] < 0.1 * gradient[0]  # which they were not


def orthogonalised(matrix: np.ndarray) -> np.ndarray:
    """Five quintic Newton-Schulz steps of a matrix of Frobenius norm 1 (Jordan et al. 2024), on its singular values."""
    u, s, v = np.linalg.svd(matrix / np.linalg.norm(matrix), full_matrices=False)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u * s @ v


@pytest.mark.parametrize("decayed", ["all", "kernels"])
@pytest.mark.parametrize("shape", [(3, 3, 2, 4), (1, 1, 2, 6)])  # more rows than columns, and fewer
def test_muon_by_hand(shape, decayed):
    """Sign, scale, momentum and decay of kernels; all else by Adam that looks ahead, at the same rate."""
    rate, beta, decay = 0.1, 0.8, 0.3
    config = TrainConfig(
        learning_rate=rate, final_fraction=0.0, weight_decay=decay, momentum=beta, optimiser="muon", decayed=decayed
    )
    optimiser, rng = recipe.optimiser(config, 10), np.random.default_rng(0)
    w, b = rng.normal(size=shape), rng.normal(size=5)
    params: Any = {"conv": {"kernel": jnp.asarray(w, jnp.float32)}, "norm": {"scale": jnp.asarray(b, jnp.float32)}}
    state, mean = optimiser.init(params), np.zeros(shape)
    first, second = np.zeros(5), np.zeros(5)
    rows, columns = int(np.prod(shape[:-1])), shape[-1]
    for t in range(1, 4):
        g, h = rng.normal(size=shape), rng.normal(size=5)
        grads = {"conv": {"kernel": jnp.asarray(g, jnp.float32)}, "norm": {"scale": jnp.asarray(h, jnp.float32)}}
        updates, state = optimiser.update(grads, state, params)
        params = jax.tree.map(lambda p, u: p + u, params, updates)
        lr = rate * cosine(t - 1)
        mean = beta * mean + (1 - beta) * g
        ahead = beta * mean / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
        step = orthogonalised(ahead.reshape(rows, columns)) * max(1, columns / rows) ** 0.5
        w = w - lr * (step.reshape(shape) + decay * w)
        np.testing.assert_allclose(params["conv"]["kernel"], w, rtol=2e-4, atol=2e-5)
        first, second = 0.9 * first + 0.1 * h, 0.999 * second + 0.001 * h * h
        ahead = 0.9 * first / (1 - 0.9 ** (t + 1)) + 0.1 * h / (1 - 0.9**t)
        moved = ahead / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
        b = b - lr * (moved + (decay if decayed == "all" else 0) * b)
        np.testing.assert_allclose(params["norm"]["scale"], b, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("optimiser", recipe.OPTIMISERS)
@pytest.mark.parametrize("decayed", recipe.DECAYED)
def test_what_neurons_learn_is_moved_but_never_decayed(optimiser, decayed):
    config = TrainConfig(learning_rate=0.1, weight_decay=0.5, optimiser=optimiser, decayed=decayed)
    transformation = recipe.optimiser(config, 10)

    def moved(gradient: float) -> dict[str, np.ndarray]:
        params: Any = {
            "last": {"scale": jnp.ones(3), "leak_logit": jnp.float32(1.5)},
            "conv": {"kernel": jnp.ones((2, 3))},
        }
        grads = jax.tree.map(jnp.zeros_like, params)
        grads["last"]["leak_logit"] = jnp.float32(gradient)
        updates: Any = transformation.update(grads, transformation.init(params), params)[0]
        return {name: np.asarray(leaf) for entry in updates.values() for name, leaf in entry.items()}

    still = moved(0.0)
    assert still["leak_logit"] == 0
    assert (still["kernel"] < 0).all()
    assert (still["scale"] < 0).all() == (decayed == "all")
    # Adam's step is that of the gradient's sign; Muon's Adam looks ahead, with moments of 0.9.
    size = {"sgd": 0.25, "nesterov": 0.25 * 1.9, "adamw": 1, "muon": 1 + 0.9 * 0.1 / (1 - 0.9**2)}[optimiser]
    assert moved(0.25)["leak_logit"] == pytest.approx(-0.1 * size, rel=1e-4)


def test_a_network_of_learning_neurons_trains():
    rng = np.random.default_rng(0)

    def noise(n: int) -> Split:
        labels = np.arange(n) % 2
        return Split(
            (rng.integers(100, size=(n, 4, 4, 1)) + 150 * labels[:, None, None, None]).astype(np.uint8), labels
        )

    neuron = NeuronSpec(learn_tau=True, learn_threshold=True)
    spec = NetworkSpec((4, 4, 1), 2, CellSpace((3,)), channels=2, time_steps=2, neuron=neuron, shortcut="spike")
    data = make_dataset("noise", noise(32), noise(8), noise(8), 2)
    config = TrainConfig(epochs=2, batch_size=8, learning_rate=0.02)
    model = train(spec, spec.space.parse("0>1:skip 0>3:conv3 1>3:avgpool"), data, config)
    sites = [f"cell{i}.node{node}" for i in (1, 2) for node in (0, 1)] + ["transition", "last"]
    learned = np.array([[float(model.params[site][name]) for name in neuron.learned] for site in sites])
    start = np.array([*neuron.learned.values()])
    assert (np.abs(learned - start) > 1e-6).all()
    assert len(np.unique(learned[:, 0])) == len(sites)  # each layer its own


def test_the_rate_rises_and_falls():
    rates = recipe.learning_rates(TrainConfig(learning_rate=0.4, final_fraction=0.1, warmup=0.2), 20)
    expected = [0.4 * t / 4 if t < 4 else 0.4 * cosine(t - 4, 16, 0.1) for t in range(21)]
    np.testing.assert_allclose(np.array([rates(t) for t in range(21)], float), expected, rtol=1e-5, atol=1e-7)
    cycle = recipe.learning_rates(TrainConfig(learning_rate=0.4, schedule="one_cycle"), 20)
    values = np.array([cycle(t) for t in range(21)], float)
    assert np.argmax(values) == 6
    assert values[6] == pytest.approx(0.4)
    assert values[0] == pytest.approx(0.4 / 25)
    assert values[20] < 1e-5
    assert (np.diff(values[:7]) > 0).all()
    assert (np.diff(values[6:]) < 0).all()


def test_losses():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(3, 4, 5)), rng.dirichlet(np.ones(5), 4)

    def cross_entropy(logits: np.ndarray) -> np.ndarray:
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return -(targets * log_p).sum(-1)

    mean = recipe.loss(TrainConfig(), jnp.asarray(logits), jnp.asarray(targets))
    tet = recipe.loss(TrainConfig(loss="tet"), jnp.asarray(logits), jnp.asarray(targets))
    assert float(mean) == pytest.approx(cross_entropy(logits.mean(0)).mean(), rel=1e-5)
    assert float(tet) == pytest.approx(cross_entropy(logits).mean(), rel=1e-5)
    assert float(tet) > float(mean)  # Jensen


def test_the_average_follows_fast_at_first_and_slowly_then():
    config = TrainConfig(ema=0.99)
    average, value = jnp.zeros(2), jnp.array([1.0, -2.0])
    early = recipe.averaged(config, average, value, jnp.int32(0))
    late = recipe.averaged(config, average, value, jnp.int32(10**6))
    np.testing.assert_allclose(early, 0.9 * value, rtol=1e-5)
    np.testing.assert_allclose(late, 0.01 * value, rtol=1e-4)


def batch(config: TrainConfig, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    images = np.random.default_rng(1).integers(1, 256, (6, 8, 8, 3)).astype(np.uint8)
    key, labels = jax.random.key(seed), jnp.arange(6) % 3
    x, targets = recipe.inputs(config, key, jnp.asarray(images), labels, 3, (0.5,) * 3, (0.25,) * 3)
    assert x.dtype == targets.dtype == jnp.float32
    return np.asarray(x), np.asarray(targets)


def test_plain_inputs_are_normalised_images_and_classes():
    x, targets = batch(TrainConfig())
    images = np.random.default_rng(1).integers(1, 256, (6, 8, 8, 3))
    np.testing.assert_allclose(x, (images / 255 - 0.5) / 0.25, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(targets, np.eye(3)[np.arange(6) % 3])


@pytest.mark.parametrize(
    "changes",
    [
        {"trivial": True},
        {"cutout": 3},
        {"padding": 2, "flip": True},
        {"mix": "mixup"},
        {"mix": "cutmix"},
        {"label_smoothing": 0.1},
        {"trivial": True, "padding": 2, "flip": True, "cutout": 3, "mix": "cutmix", "label_smoothing": 0.1},
    ],
)
def test_every_augmentation_is_applied_and_follows_its_key(changes):
    config, plain = TrainConfig(**changes), batch(TrainConfig())
    x, targets = batch(config)
    np.testing.assert_array_equal(x, batch(config)[0])
    if set(changes) - {"label_smoothing"}:
        assert (x != plain[0]).any()
        assert (x != batch(config, 1)[0]).any()
    soft = {"mix", "label_smoothing"} & set(changes)
    assert (targets != plain[1]).any() == bool(soft)
    np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-5)
    black = (x == -2).all(-1).any((1, 2))
    assert black.all() if changes.keys() == {"cutout"} else True


ALL = TrainConfig(
    learning_rate=0.1, warmup=0.2, weight_decay=0.1, padding=2, flip=True, label_smoothing=0.1, trivial=True,
    cutout=3, mix="mixup", mix_alpha=0.4, ema=0.9,
)  # fmt: skip
CHANGED = {
    "learning_rate": 0.2, "final_fraction": 0.5, "momentum": 0.5, "weight_decay": 0.3, "padding": 0, "flip": False,
    "optimiser": "adamw", "schedule": "one_cycle", "warmup": 0.0, "loss": "tet", "label_smoothing": 0.0,
    "trivial": False, "cutout": 0, "mix": "cutmix", "mix_alpha": 4.0, "decayed": "kernels", "ema": 0.0,
}  # fmt: skip
ELSEWHERE = {"epochs", "batch_size", "precision", "weight_bits", "stem_init"}  # in test_train.py, or files of their own


def test_every_field_is_looked_at():
    assert {field.name for field in dataclasses.fields(TrainConfig)} == CHANGED.keys() | ELSEWHERE


@pytest.mark.parametrize("field", CHANGED)
def test_every_field_does_something(field):
    """A training is its parts (test_train.py), so what no part reads has no effect."""
    base = dataclasses.replace(ALL, warmup=0.0) if field == "schedule" else ALL
    logits, targets = np.random.default_rng(0).normal(size=(3, 4, 5)), np.full((4, 5), 0.2)

    def parts(config: TrainConfig) -> list[np.ndarray]:
        loss = recipe.loss(config, jnp.asarray(logits), jnp.asarray(targets))
        average = recipe.averaged(config, jnp.zeros(2), jnp.ones(2), jnp.int32(50))
        return [*batch(config), *steps(config, 6)[-1].values(), np.asarray(loss), np.asarray(average)]

    pairs = zip(parts(base), parts(dataclasses.replace(base, **{field: CHANGED[field]})), strict=True)
    assert any(not np.allclose(a, b, rtol=1e-5) for a, b in pairs)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimiser": "lion"}, "optimiser='lion' is unknown; known: sgd, nesterov, adamw, muon"),
        ({"schedule": "step"}, "schedule='step' is unknown"),
        ({"loss": "mse"}, "loss='mse' is unknown"),
        ({"mix": "both"}, "mix='both' is unknown"),
        ({"decayed": "none"}, "decayed='none' is unknown"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0 must be in"),
        ({"warmup": -0.1}, "warmup=-0.1 must be in"),
        ({"ema": 1.0}, "ema=1.0 must be in"),
        ({"cutout": -1}, "cutout=-1 must be a whole number of at least 0"),
        ({"mix_alpha": 0.0}, "mix_alpha=0.0 must be finite and above 0"),
        ({"schedule": "one_cycle", "warmup": 0.1}, "warmup=0.1: the one_cycle schedule has a rise of its own"),
    ],
)
def test_a_wrong_recipe_is_one_line(changes, words):
    with pytest.raises(ValueError, match=words) as error:
        TrainConfig(**changes)
    assert "\n" not in str(error.value)
