"""A batch shared by devices trains as on one: same losses, same weights, in one process or two."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from spikernel_jax.training.devices import devices_for

_TRAIN = """
import json, sys
import jax
devices, folder, changes, processes, index, port = json.loads(sys.argv[1])
jax.config.update("jax_num_cpu_devices", devices)
if processes > 1:
    jax.distributed.initialize(f"localhost:{port}", processes, index)
from pathlib import Path
import small_training
from spikernel_jax.training.recipe import TrainConfig
named = {"devices": jax.local_devices()} if changes.pop("by_itself", False) else {}
config = TrainConfig(epochs=3, batch_size=16, learning_rate=0.2, padding=1, ema=0.9, **changes)
losses = []
named |= {"config": config, "progress": lambda record: losses.append(record["train_loss"])}
model = small_training.run(folder and Path(folder), **named)
assert len(jax.devices()) == devices * processes
sums = [float(abs(leaf).sum()) for leaf in jax.tree.leaves((model.params, model.stats))]
print(json.dumps({"losses": losses, "sums": sums, "validation": model.metrics["validation_accuracy"]}))
"""


def started(devices: int, folder: str | None, processes: int = 1, index: int = 0, port: int = 0, **changes: object):
    """A training in a process of its own, on so many devices."""
    arguments = json.dumps([devices, folder, changes, processes, index, port])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-c", _TRAIN, arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> dict[str, list[float]]:
    """What it came to."""
    out, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    return json.loads(out.splitlines()[-1])


def newest_state(folder: Path) -> Path:
    return max((path for path in (folder / "state").iterdir() if path.name.isdecimal()), key=lambda p: int(p.name))


def assert_alike(a: dict[str, list[float]], b: dict[str, list[float]]) -> None:
    for name in ("losses", "sums"):
        np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-6)
    assert a["validation"] == b["validation"]


@pytest.fixture(scope="module")
def alone() -> dict[str, list[float]]:
    return ended(started(1, None))


@pytest.fixture(scope="module")
def on_two(tmp_path_factory) -> tuple[dict[str, list[float]], Path]:
    """The training on two devices, and its folder."""
    folder = tmp_path_factory.mktemp("two") / "run"
    return ended(started(2, str(folder))), folder


@pytest.mark.slow
def test_the_number_of_devices_changes_rounding_only(alone, on_two):
    for there in (on_two[0], ended(started(8, None))):
        assert len(there["losses"]) == 3
        assert_alike(there, alone)


@pytest.mark.slow
def test_a_training_goes_on_on_another_number_of_devices(alone, on_two, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(on_two[1], folder)
    shutil.rmtree(newest_state(folder))
    resumed = ended(started(1, str(folder)))
    assert len(resumed["losses"]) == 1  # the last epoch alone
    np.testing.assert_allclose(resumed["sums"], alone["sums"], rtol=1e-4, atol=1e-6)


def both(folders: Sequence[str | None], **changes: object) -> list[subprocess.Popen[str]]:
    """A job of two processes, of two devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [started(2, folder, 2, index, port, **changes) for index, folder in enumerate(folders)]


@pytest.mark.slow
def test_two_processes_train_as_one(alone, tmp_path):
    first, second = (ended(process) for process in both((None, None)))
    assert_alike(first, alone)
    assert second["sums"] == first["sums"]
    for process in both((str(tmp_path / "run"),) * 2):
        errors = process.communicate(timeout=100)[1]
        assert process.returncode
        assert "2 processes train together without one" in errors
        assert "devices=jax.local_devices()" in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_each_of_two_processes_trains_by_itself(on_two, tmp_path):
    """What one of them saves alone, another job goes on from."""
    folders = str(tmp_path / "first"), str(tmp_path / "second")
    for process in both(folders, by_itself=True):
        assert ended(process)["sums"] == on_two[0]["sums"]
    shutil.rmtree(newest_state(tmp_path / "first"))
    resumed = ended(started(2, folders[0]))
    assert len(resumed["losses"]) == 1
    assert resumed["sums"] == on_two[0]["sums"]


@pytest.mark.slow
def test_bfloat16_trains_like_float32(alone):
    there = ended(started(1, None, precision="bfloat16"))
    np.testing.assert_allclose(there["losses"], alone["losses"], rtol=0.03)
    assert there["losses"] != alone["losses"]


@pytest.mark.parametrize(("batch_size", "count"), [(1, 1), (7, 1)])
def test_devices_divide_the_batch(batch_size, count):
    assert devices_for(batch_size).size == count
