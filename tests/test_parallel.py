"""A batch shared by devices trains as on one: same losses, same weights, in one process or two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

TESTS = Path(__file__).parent
_TRAIN = """
import json, sys
import jax
devices, folder = int(sys.argv[1]), sys.argv[2] or None
jax.config.update("jax_num_cpu_devices", devices)
sys.path.insert(0, {tests!r})
import test_train as t
config = t.TrainConfig(epochs=3, batch_size=16, learning_rate=0.2, padding=1, ema=0.9, **json.loads(sys.argv[3]))
losses = []
model = t.run(folder and t.Path(folder), config=config, progress=lambda record: losses.append(record["train_loss"]))
assert len(jax.devices()) == devices
flat = [float(abs(leaf).sum()) for leaf in jax.tree.leaves((model.params, model.stats))]
print(json.dumps({{"losses": losses, "sums": flat, "validation": model.metrics["validation_accuracy"]}}))
"""


def trained(devices: int, folder: str = "", **changes: object) -> dict[str, list[float]]:
    """What a training in a process of its own, on so many devices, came to."""
    done = subprocess.run(
        [sys.executable, "-c", _TRAIN.format(tests=str(TESTS)), str(devices), folder, json.dumps(changes)],
        capture_output=True, text=True, check=True, timeout=300, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def alone() -> dict[str, list[float]]:
    return trained(1)


@pytest.mark.parametrize("devices", [2, 8])
def test_the_number_of_devices_changes_rounding_only(devices, alone):
    there = trained(devices)
    assert len(there["losses"]) == 3
    for name in ("losses", "sums"):
        np.testing.assert_allclose(there[name], alone[name], rtol=1e-4)
    assert there["validation"] == alone["validation"]


def test_a_training_goes_on_on_another_number_of_devices(alone, tmp_path):
    folder = str(tmp_path / "run")
    first = trained(2, folder)
    for path in (tmp_path / "run" / "state").iterdir():  # the last epoch's checkpoint is lost
        if path.name == "12":
            import shutil

            shutil.rmtree(path)
    resumed = trained(1, folder)
    assert len(resumed["losses"]) < len(first["losses"])
    np.testing.assert_allclose(resumed["sums"], alone["sums"], rtol=1e-4)
