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
from disk import contents
from small_training import CELL, CONFIG, SPEC, assert_same_weights, data, halves, run
from spikernel_jax import make_dataset
from spikernel_jax.data import Split
from spikernel_jax.snn import cost
from spikernel_jax.snn.model import Model
from spikernel_jax.snn.spec import NetworkSpec
from spikernel_jax.training import loop as training
from spikernel_jax.training.evaluation import evaluate, measure_spikes
from spikernel_jax.training.recipe import TrainConfig


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


_CHILD = """
import os, signal, sys, threading
from pathlib import Path
import small_training
from spikernel_jax.training import loop
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
    loop.train_steps = counted(loop.train_steps, die)
elif moment == "asked":
    loop.train_steps = counted(loop.train_steps, ask)
elif moment == "before save":
    TrainingCheckpoints.save = counted(TrainingCheckpoints.save, die)
else:
    TrainingCheckpoints.save = counted(TrainingCheckpoints.save, lambda: threading.Timer(delay, die).start())
try:
    small_training.run(Path(sys.argv[1]))
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
    before = contents(saved)
    with pytest.raises(ValueError, match=f"holds another training run .*{words}") as error:
        run(saved, **changes)
    assert "\n" not in str(error.value)
    assert contents(saved) == before


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
