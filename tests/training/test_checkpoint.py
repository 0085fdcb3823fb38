"""Training checkpoints: the same bits back, in any process, or one line that says why not."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from disk import contents, flip_a_bit
from spikernel_jax import load_model
from spikernel_jax.training import checkpoint as checkpoint_module


def test_a_training_checkpoint_is_no_model(tmp_path):
    with checkpoint_module.training_checkpoints(tmp_path / "state", {"seed": 0}) as checkpoints:
        checkpoints.save(1, {"w": jax.numpy.ones(2)})
    with pytest.raises(ValueError, match="cannot be loaded") as error:
        load_model(tmp_path / "state" / "1")
    assert "\n" not in str(error.value)


LIKE = {"w": jax.numpy.zeros(3), "step": jax.numpy.zeros((), "int32")}


def state_after(step: int) -> dict[str, Any]:
    return {"w": jax.numpy.full(3, step / 3, "float32"), "step": jax.numpy.int32(step)}


def steps_in(folder: Path) -> list[int]:
    """Steps that are there; nothing else is, but the lock."""
    names = {entry.name for entry in folder.iterdir()} - {".lock"}
    assert all(name.isdigit() for name in names), names
    return sorted(map(int, names))


def save_steps(folder: Path, *steps: int, seed: int = 0) -> None:
    with checkpoint_module.training_checkpoints(folder, {"seed": seed}) as checkpoints:
        checkpoints.restore(LIKE)
        for step in steps:
            checkpoints.save(step, state_after(step))


def restored(folder: Path) -> tuple[int, list[str]]:
    """The step that is restored, its state being right, and what is said."""
    said: list[str] = []
    with checkpoint_module.training_checkpoints(folder, {"seed": 0}) as checkpoints:
        step, state, _ = checkpoints.restore(LIKE, said.append)
    jax.tree.map(np.testing.assert_array_equal, state, state_after(step))
    return step, said


def spoil(folder: Path, damage: str) -> None:
    """Damages one training checkpoint."""
    array = max((folder / "state" / "d").iterdir(), key=lambda path: path.stat().st_size)
    if damage == "half an array":
        array.write_bytes(array.read_bytes()[: array.stat().st_size // 2])
    elif damage == "one bit":
        flip_a_bit(array)
    elif damage == "no metadata":
        (folder / "_CHECKPOINT_METADATA").unlink()
    elif damage == "no seal":
        (folder / "sha256.json").unlink()
    elif damage == "another seal":
        (folder / "sha256.json").write_text("[]")
    elif damage == "half a seal":
        (folder / "sha256.json").write_bytes((folder / "sha256.json").read_bytes()[:99])
    else:
        shutil.rmtree(folder)
        folder.mkdir()


DAMAGES = ["half an array", "one bit", "no metadata", "no seal", "half a seal", "another seal", "empty folder"]


def test_the_newest_two_states_are_kept(tmp_path):
    with checkpoint_module.training_checkpoints(tmp_path, {"seed": 0}) as checkpoints:
        step, state, _ = checkpoints.restore(LIKE)
        assert (step, state) == (0, LIKE)
        kept = []
        for step in (1, 2, 37, 1_000_000, 1_000_000):  # again where a signal comes just after saving
            checkpoints.save(step, state_after(step))
            kept.append(steps_in(tmp_path))
    assert kept == [[1], [1, 2], [2, 37], [37, 1_000_000], [37, 1_000_000]]
    assert restored(tmp_path) == (1_000_000, [])


def test_training_goes_on_where_it_was_restored(tmp_path):
    save_steps(tmp_path, 1, 2)
    save_steps(tmp_path, 3)
    assert steps_in(tmp_path) == [2, 3]
    with checkpoint_module.training_checkpoints(tmp_path, {"seed": 0}) as checkpoints:
        with pytest.raises(ValueError, match="restore before saving step 9"):
            checkpoints.save(9, LIKE)
        checkpoints.restore(LIKE)
        with pytest.raises(ValueError, match="step=2 must not be before the last one saved, 3"):
            checkpoints.save(2, LIKE)
    assert restored(tmp_path) == (3, [])


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_passed_over_and_told(damage, tmp_path, capfd):
    save_steps(tmp_path, 10, 20)
    spoil(tmp_path / "20", damage)
    before = contents(tmp_path)
    step, (line,) = restored(tmp_path)
    assert step == 10
    assert line.startswith(f"{tmp_path}: the checkpoint of step 20 is damaged (")
    assert line.endswith("): going on from step 10")
    assert "\n" not in line
    assert contents(tmp_path) == before  # restoring changes nothing
    assert capfd.readouterr().err == ""  # what orbax would have to say is not said


@pytest.mark.parametrize("step", [15, 20, 25])
def test_a_damaged_checkpoint_does_not_count_as_kept(step, tmp_path):
    """Whatever is saved next: before it, at its step, after it."""
    save_steps(tmp_path, 5, 10, 20)
    spoil(tmp_path / "20", "one bit")
    save_steps(tmp_path, step)
    assert steps_in(tmp_path) == [10, step]
    assert restored(tmp_path) == (step, [])
    spoil(tmp_path / str(step), "one bit")
    assert restored(tmp_path)[0] == 10


@pytest.mark.parametrize("damage", DAMAGES)
def test_two_damaged_checkpoints_are_an_error(damage, tmp_path, capfd):
    save_steps(tmp_path, 10, 20)
    for step in (10, 20):
        spoil(tmp_path / str(step), damage)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"step 20 is damaged .* step 10 is damaged .*; remove that folder") as error:
        restored(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}: the training checkpoint cannot be read")
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""
    assert contents(tmp_path) == before


def test_another_run_is_refused_though_its_newest_checkpoint_is_damaged(tmp_path):
    save_steps(tmp_path, 10, 20, seed=1)
    spoil(tmp_path / "20", "one bit")
    with pytest.raises(ValueError, match=r"holds another training run \(seed differ\)"):
        restored(tmp_path)
    assert steps_in(tmp_path) == [10, 20]


def test_a_whole_checkpoint_that_does_not_fit_is_no_damage(tmp_path):
    """A state of other shapes is an error of the program; to go on from an older one would lose the newer."""
    save_steps(tmp_path, 10, 20)
    with checkpoint_module.training_checkpoints(tmp_path, {"seed": 0}) as checkpoints:
        with pytest.raises(ValueError, match=r"cannot be read \(step 20: ") as error:
            checkpoints.restore({"v": jax.numpy.zeros(3)})
        assert "\n" not in str(error.value)


_KILLED = """
import os, signal, sys
from pathlib import Path
import test_checkpoint as t
folder, moment = Path(sys.argv[1]), sys.argv[2]
t.save_steps(folder, 1, 2)
kill = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
if moment == "before the seal":
    t.checkpoint_module._seal = kill
elif moment == "before the move":
    t.checkpoint_module.files._sync = kill
elif moment == "before dropping":
    drop = t.checkpoint_module.TrainingCheckpoints._drop_but
    def dropping(self, kept):
        if 3 in kept:
            kill()
        drop(self, kept)
    t.checkpoint_module.TrainingCheckpoints._drop_but = dropping
elif moment == "while dropping":
    remove = t.checkpoint_module.shutil.rmtree
    def removing(path, **options):
        if path.name == ".1.old.tmp" and path.exists():
            (path / "sha256.json").unlink()
            kill()
        remove(path, **options)
    t.checkpoint_module.shutil.rmtree = removing
t.save_steps(folder, 3)
"""


@pytest.mark.parametrize(
    ("moment", "left"),
    [
        ("before the seal", [1, 2]),
        pytest.param("before the move", [1, 2], marks=pytest.mark.slow),
        pytest.param("before dropping", [1, 2, 3], marks=pytest.mark.slow),
        ("while dropping", [2, 3]),
    ],
)
def test_kill_9_while_saving(moment, left, tmp_path):
    folder = tmp_path / "state"
    command = [sys.executable, "-c", _KILLED, str(folder), moment]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert bool(list(folder.glob(".*.tmp"))) == (moment != "before dropping")
    assert restored(folder) == (left[-1], [])
    assert steps_in(folder) == left  # and what was half written is gone
    save_steps(folder, 4)
    assert steps_in(folder) == [left[-1], 4]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_the_earlier_checkpoints(small_disk):
    folder = small_disk / "state"
    save_steps(folder, 1, 2)
    large = {"w": jax.numpy.asarray(np.random.default_rng(0).normal(size=200_000))}
    with checkpoint_module.training_checkpoints(folder, {"seed": 0}) as checkpoints:
        checkpoints.restore(LIKE)
        with pytest.raises(ValueError, match=rf"{folder} needs \d+ bytes, but \d+ are free there"):
            checkpoints.check_room(large)
        with pytest.raises(OSError, match="the checkpoint of step 3 cannot be written") as error:
            checkpoints.save(3, large)
        assert "\n" not in str(error.value)
    assert steps_in(folder) == [1, 2]
    assert restored(folder) == (2, [])


def test_room_is_wanted_for_three_states_less_those_that_are_there(tmp_path, monkeypatch):
    state = {"w": np.zeros(1_000_000, np.float32), "step": np.int32(0)}
    wanted = []
    with checkpoint_module.training_checkpoints(tmp_path, {"seed": 0}) as checkpoints:
        checkpoints.restore(LIKE)
        monkeypatch.setattr(checkpoint_module.files, "check_room", lambda _, needed: wanted.append(needed))
        for step in (1, 2, 3):
            checkpoints.check_room(state)
            checkpoints.save(step, state_after(step))
        checkpoints.check_room(state)
    one = 4_000_004 + 2**20
    assert wanted == [3 * one, 2 * one, one, one]


def test_one_process_at_a_time_trains_in_a_folder(tmp_path):
    with (
        checkpoint_module.training_checkpoints(tmp_path, {}),
        pytest.raises(ValueError, match=f"another process is training in {tmp_path}"),
        checkpoint_module.training_checkpoints(tmp_path, {}),
    ):
        pass


def test_a_file_where_the_checkpoints_belong(tmp_path):
    (tmp_path / "state").write_text("precious")
    with pytest.raises(ValueError, match=f"{tmp_path / 'state'} .*cannot be written to"):
        save_steps(tmp_path / "state", 1)
    assert (tmp_path / "state").read_text() == "precious"
