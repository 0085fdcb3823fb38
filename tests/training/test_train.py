"""Training: that it learns, from the training images alone, and survives being killed at any instant."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import scripts
from spikernel_jax import make_dataset
from spikernel_jax.cells.space import CellSpace
from spikernel_jax.data import Dataset, Split, epoch_batches, normalise
from spikernel_jax.snn import cost, network
from spikernel_jax.snn.model import Model, hashable
from spikernel_jax.snn.spec import NetworkSpec
from spikernel_jax.training import devices, recipe
from spikernel_jax.training import loop as training
from spikernel_jax.training.evaluation import evaluate, measure_spikes
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


@pytest.fixture(scope="module")
def model() -> Model:
    """Trained without interruption, nothing saved."""
    return run()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    """The folder of a finished training."""
    folder = tmp_path_factory.mktemp("training") / "run"
    folder.mkdir()
    seen = []
    assert_same_weights(run(folder, progress=seen.append), model)  # saving changes nothing
    assert [record["epoch"] for record in seen] == [1, 2, 3, 4, 5, 6]
    assert scripts.read_jsonl(folder / "metrics.jsonl") == seen
    return folder


def test_it_learns(model):
    assert evaluate(model, data().test) >= 0.9
    assert model.metrics["validation_accuracy"] >= 0.9
    assert model.metrics["train_loss"] < 0.5 < np.log(2)
    assert model.metrics["epoch"] == CONFIG.epochs


def test_validation_and_test_images_do_not_train(model):
    other = run(data=data(held_out=77))
    assert_same_weights(other, model)
    empty = Split(np.zeros((1, 8, 8, 1), np.uint8), np.zeros(1, np.int32))
    given = data()
    without = make_dataset("halves", given.train, empty, empty, 2)
    assert_same_weights(run(data=without), model)


def test_training_never_looks_at_test_images(model):
    """Nor does its validation accuracy, by which models are chosen."""
    blind = run(data=dataclasses.replace(data(), test=cast(Any, None)))
    assert_same_weights(blind, model)
    assert blind.metrics["validation_accuracy"] == model.metrics["validation_accuracy"]


def test_the_seed_decides(model):
    other = run(seed=2)
    assert (other.params["stem"]["kernel"] != model.params["stem"]["kernel"]).any()
    assert_same_weights(run(seed=2), other)


def test_accuracy_does_not_depend_on_the_batch(model):
    split = data().test
    logits = np.asarray(model(split.images))
    expected = float((logits.argmax(-1) == split.labels).mean())
    assert [evaluate(model, split, batch) for batch in (7, 256)] == [expected, expected]


def test_spikes_do_not_depend_on_the_batch(model):
    split = data().test
    a, b = (measure_spikes(model, split, batch) for batch in (7, 256))
    assert set(a) == {"cell1.node0", "transition", "cell2.node0", "last"} == set(b)
    for site, neurons in SPEC.sites(CELL).items():
        np.testing.assert_allclose(a[site], b[site])
        assert (a[site] >= 0).all()
        assert a[site].sum() <= neurons.neurons * SPEC.time_steps
        assert a[site].shape == cost.fan_out(SPEC, CELL)[site].shape
    assert a["cell1.node0"].sum() > 0


def test_a_loss_that_is_no_number_stops_at_once(tmp_path, monkeypatch):
    steps = []
    step = training.train_steps

    def counted(*arguments: Any) -> Any:
        steps.append(1)
        return step(*arguments)

    monkeypatch.setattr(training, "train_steps", counted)
    config = TrainConfig(epochs=50, batch_size=4, learning_rate=1e30)
    with pytest.raises(training.TrainingDivergedError, match=r"the loss is (nan|inf) at step \d+") as error:
        run(tmp_path, config=config)
    told = int(str(error.value).split("step ")[1].split()[0])
    assert len(steps) <= told + 2 < 17  # within the first epoch, one step late
    assert "\n" not in str(error.value)
    assert not (tmp_path / "metrics.jsonl").exists()
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config": TrainConfig(batch_size=71)}, "batch_size=71 is larger than the data: 70 training images"),
        ({"spec": NetworkSpec((8, 8, 3), 2, SPEC.space)}, "image_shape"),
        ({"spec": NetworkSpec((8, 8, 1), 3, SPEC.space)}, "num_classes=3"),
        ({"genotype": [0, 0, 0, 0, 0, 1]}, "edge 0>3"),
        ({"genotype": [0, 0, 0, 1]}, "4"),
    ],
)
def test_refuses_what_does_not_fit(changes, words, tmp_path):
    with pytest.raises(ValueError, match=words) as error:
        run(tmp_path / "new", **changes)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("epochs", 1.5),
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("final_fraction", 1.5),
        ("momentum", 1.0),
        ("weight_decay", -1.0),
        ("weight_decay", float("inf")),
        ("padding", -1),
    ],
)
def test_a_recipe_names_its_wrong_field(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}"):
        TrainConfig(**{field: value})


# Resume

_CHILD = """
import os, signal, sys, threading
from pathlib import Path
import test_train as t
from spikernel_jax.training.checkpoint import TrainingCheckpoints
from spikernel_jax.io.signals import StoppedError
moment, count, delay = sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
ask = lambda: os.kill(os.getpid(), signal.SIGTERM)
left = [count]
def counted(function, before):
    def call(*arguments):
        left[0] -= 1
        if left[0] == 0:
            before()
        return function(*arguments)
    return call
if moment == "step":
    t.training.train_steps = counted(t.training.train_steps, die)
elif moment == "asked":
    t.training.train_steps = counted(t.training.train_steps, ask)
elif moment == "before save":
    TrainingCheckpoints.save = counted(TrainingCheckpoints.save, die)
else:
    TrainingCheckpoints.save = counted(TrainingCheckpoints.save, lambda: threading.Timer(delay, die).start())
try:
    t.run(Path(sys.argv[1]))
except StoppedError as stopped:
    sys.exit(stopped.exit_status)
"""


def killed_run(folder: Path, moment: str, count: int, delay: float = 0.0) -> None:
    """Runs the training in a process that kills itself at the `count`-th such moment."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _CHILD, str(folder), moment, str(count), str(delay)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if moment == "asked":
        assert result.returncode == 128 + signal.SIGTERM, result.stderr
    else:
        assert result.returncode == -signal.SIGKILL or (moment == "in save" and not result.returncode), result.stderr


def without_seconds(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in scripts.read_jsonl(path)]


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_weights(model, saved, tmp_path):
    pick = random.Random(5)
    moments = [
        ("step", pick.randint(1, 3), 0.0),  # within the first epoch: nothing saved yet
        ("step", pick.randint(4, 6), 0.0),  # within the second epoch
        ("in save", 1, pick.uniform(0, 0.02)),
        ("before save", pick.randint(1, 2), 0.0),  # its metrics are written, its state is not
        ("in save", 1, pick.uniform(0, 0.05)),
    ]
    for moment in moments:
        killed_run(tmp_path / "run", *moment)
    assert_same_weights(run(tmp_path / "run"), model)
    records = without_seconds(tmp_path / "run" / "metrics.jsonl")
    assert [record["epoch"] for record in records] == [1, 2, 3, 4, 5, 6], moments
    assert records == without_seconds(saved / "metrics.jsonl")


@pytest.mark.slow
def test_asked_to_stop_it_saves_within_the_epoch_and_goes_on_to_the_same_weights(model, saved, tmp_path):
    killed_run(tmp_path / "run", "asked", 2)
    assert (tmp_path / "run" / "state" / "8").is_dir()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    killed_run(tmp_path / "run", "asked", 1)  # the last of the first epoch: its metrics are whole
    assert (tmp_path / "run" / "state" / "11").is_dir()
    killed_run(tmp_path / "run", "asked", 3)
    assert_same_weights(run(tmp_path / "run"), model)
    assert without_seconds(tmp_path / "run" / "metrics.jsonl") == without_seconds(saved / "metrics.jsonl")


def test_trained_so_far_it_goes_on_to_the_same_weights(model, saved, tmp_path):
    there = run(tmp_path / "run", until=2)
    assert there.metrics["epoch"] == 2
    assert [record["epoch"] for record in scripts.read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    assert_same_weights(run(tmp_path / "run", until=1), there)  # further than that already
    assert_same_weights(run(tmp_path / "run"), model)
    assert without_seconds(tmp_path / "run" / "metrics.jsonl") == without_seconds(saved / "metrics.jsonl")
    with pytest.raises(ValueError, match="until=7 must be a whole number of at least 1, and at most 6"):
        run(tmp_path / "run", until=7)


def test_a_finished_run_is_not_trained_again(model, saved, monkeypatch):
    monkeypatch.setattr(training, "train_steps", None)
    before = (saved / "metrics.jsonl").read_bytes()
    again = run(saved)
    assert_same_weights(again, model)
    assert again.metrics | {"seconds": 0} == model.metrics | {"seconds": 0}
    assert (saved / "metrics.jsonl").read_bytes() == before


def test_lines_after_the_last_checkpoint_are_written_once(model, saved, tmp_path):
    """As a kill between the two leaves it: metrics of an epoch whose state was not saved, the last line torn."""
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    last = scripts.read_jsonl(folder / "metrics.jsonl")[-1]
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(last | {"epoch": 7}) + "\n" + '{"epoch": 8, "tr')
    assert_same_weights(run(folder), model)
    assert scripts.read_jsonl(folder / "metrics.jsonl") == scripts.read_jsonl(saved / "metrics.jsonl")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 2}, "seed differ"),
        ({"config": TrainConfig(epochs=7, batch_size=16, learning_rate=0.2, padding=1)}, "config differ"),
        ({"genotype": SPEC.space.parse("0>3:conv3")}, "genotype differ"),
        ({"data": make_dataset("halves", halves(70, 9), halves(24, 10), halves(40, 11), 2)}, "train_digest differ"),
    ],
)
def test_a_folder_of_another_run_is_refused(changes, words, saved):
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=f"holds another training run .*{words}") as error:
        run(saved, **changes)
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("damage", ["half", "a bit", "metadata", "absent"])
def test_corrupt_checkpoints_are_one_line(damage, saved, tmp_path, capfd):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    for state in (folder / "state" / "55", folder / "state" / "66"):
        if damage == "metadata":
            path = state / "_CHECKPOINT_METADATA"
            path.write_bytes(path.read_bytes()[:300])
        else:
            path = max((p for p in (state / "state" / "d").iterdir()), key=lambda p: p.stat().st_size)
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 4
            path.write_bytes(content[: len(content) // 2] if damage == "half" else content)
            if damage == "absent":
                path.unlink()
    log = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="training checkpoint cannot be read") as error:
        run(folder)
    assert "\n" not in str(error.value)
    assert str(folder / "state") in str(error.value)
    assert capfd.readouterr().err == ""  # what orbax would have to say is not said
    assert (folder / "metrics.jsonl").read_bytes() == log


def test_a_corrupt_last_checkpoint_costs_only_what_came_after_the_one_before(model, saved, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    (folder / "state" / "66" / "_CHECKPOINT_METADATA").unlink()
    epochs = []
    assert_same_weights(run(folder, progress=lambda record: epochs.append(record["epoch"])), model)
    assert epochs == [6]
    assert without_seconds(folder / "metrics.jsonl") == without_seconds(saved / "metrics.jsonl")


@pytest.mark.parametrize(
    "log",
    [None, "", '{"epoch": 5}\n', '{"loss": 1}\n{"epoch": 6}\n', '{"epoch": 6, "validation_accuracy": 0.99}', "torn"],
)
def test_the_log_is_a_copy_of_what_is_sealed_and_is_written_anew(log, saved, tmp_path):
    folder, model = tmp_path / "run", run(saved)
    shutil.copytree(saved, folder)
    (folder / "metrics.jsonl").unlink()
    if log is not None:
        (folder / "metrics.jsonl").write_text(log)
    assert run(folder).metrics == model.metrics
    assert (folder / "metrics.jsonl").read_bytes() == (saved / "metrics.jsonl").read_bytes()


def test_weights_that_the_last_update_breaks_are_not_saved(tmp_path, monkeypatch):
    """The loss of a step is that before its update, so it tells nothing of the last one."""
    step, last = training.train_steps, 2 * (70 // 16)

    def breaking(*arguments: Any) -> Any:
        state, loss = step(*arguments)
        if int(state.step) == last:
            state = state.replace(params=jax.tree.map(lambda leaf: leaf.at[..., 0].set(jnp.nan), state.params))
        return state, loss

    monkeypatch.setattr(training, "train_steps", breaking)
    config = TrainConfig(epochs=2, batch_size=16)
    with pytest.raises(
        training.TrainingDivergedError, match=r"not finite after epoch 2: .*checkpoint: step 4"
    ) as error:
        run(tmp_path, config=config)
    assert "\n" not in str(error.value)
    assert [record["epoch"] for record in scripts.read_jsonl(tmp_path / "metrics.jsonl")] == [1]
    assert [entry.name for entry in (tmp_path / "state").iterdir() if entry.is_dir()] == ["4"]
    with pytest.raises(training.TrainingDivergedError, match="epoch 2"):
        run(None, config=config)


# The optimiser


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


# Every field of the recipe reaches the weights

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
    [EVERYTHING, TrainConfig(epochs=2, batch_size=16, optimiser="muon", learning_rate=0.02, schedule="one_cycle")],
    ids=["everything", "muon"],
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
