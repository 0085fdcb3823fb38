"""Exported models and training checkpoints: the same bits back, in any process, or one line that says why not."""

import json
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
from flax import nnx
from orbax.checkpoint import v1

from spikernel_jax import Model, NNXModel, load_model, save_model
from spikernel_jax.cells.space import CellSpace
from spikernel_jax.snn import network
from spikernel_jax.snn.neurons import NeuronSpec
from spikernel_jax.snn.spec import NetworkSpec
from spikernel_jax.training import checkpoint as checkpoint_module

ROOT = Path(__file__).resolve().parents[2]
OPERATIONS = CellSpace(operations=("zero", "skip", "conv3@0.5", "dwconv3", "maxpool3~2.0"))
FORWARD, FEEDBACK = CellSpace((1, 5)), CellSpace((3,), feedback=True)
SPYX = NeuronSpec("spyx_lif", tau=2.0, reset="soft")
PLIF = NeuronSpec(learn_tau=True, learn_threshold=True)
CASES: dict[str, tuple[NetworkSpec, Any]] = {
    "gap": (NetworkSpec((6, 6, 3), 3, FORWARD, channels=2, time_steps=2), (2, 0, 0, 3, 3, 0)),
    "snasnet head": (
        NetworkSpec((6, 6, 1), 3, FORWARD, channels=1, time_steps=2, head="snasnet", head_hidden=4,
                    neurons_per_class=2, dropout=0.5),
        (0, 0, 0, 3, 0, 0),
    ),
    "feedback": (
        NetworkSpec((6, 6, 1), 3, FEEDBACK, channels=1, time_steps=3),
        tuple(FEEDBACK.parse("0>3:conv3 0>1:skip 1>3:conv3 3>2:conv3 2>0:avgpool").tolist()),
    ),
    "two cells": (
        NetworkSpec((6, 6, 1), 3, FORWARD, channels=1, time_steps=2, norm="over_time"),
        ((0, 0, 0, 2, 0, 0), (1, 0, 0, 3, 4, 0)),
    ),
    "operations": (
        NetworkSpec((6, 6, 1), 3, OPERATIONS, channels=2, time_steps=2, neuron=PLIF),
        (2, 0, 0, 4, 3, 0),
    ),
    "spyx neuron": (NetworkSpec((6, 6, 1), 3, FORWARD, channels=1, time_steps=2, neuron=SPYX), (0, 0, 0, 2, 0, 0)),
    "learning neurons": (
        NetworkSpec((6, 6, 1), 3, FORWARD, channels=1, time_steps=2, neuron=PLIF, shortcut="spike"),
        (1, 0, 0, 2, 4, 0),
    ),
}  # fmt: skip
METRICS = {"test_accuracy": 0.1 + 0.2, "epoch": 7, "source": "noise", "config": {"padding": 0}, "none": None}


def make_model(case: str, seed: int = 0) -> Model:
    """A model whose every array, running statistics too, holds other numbers than at the start."""
    spec, genotype = CASES[case]
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), spec, genotype))
    rng = np.random.default_rng(seed)
    params, stats = jax.tree.map(lambda leaf: jax.numpy.asarray(rng.uniform(0.1, 2, leaf.shape), "float32"), shapes)
    channels = spec.image_shape[2]
    return Model(spec, genotype, params, stats, (0.4,) * channels, (1 / 3,) * channels, METRICS)


def images(model: Model) -> np.ndarray:
    return np.random.default_rng(1).integers(256, size=(5, *model.spec.image_shape), dtype=np.uint8)


def assert_same(a: Model, b: Model) -> None:
    assert (a.spec, a.genotype, a.mean, a.std, a.metrics) == (b.spec, b.genotype, b.mean, b.std, b.metrics)
    assert jax.tree.structure((a.params, a.stats)) == jax.tree.structure((b.params, b.stats))
    for x, y in zip(jax.tree.leaves((a.params, a.stats)), jax.tree.leaves((b.params, b.stats)), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "gap"
    save_model(path, make_model("gap"))
    return path


@pytest.mark.parametrize("case", CASES)
def test_comes_back_to_the_bit(case, tmp_path):
    model = make_model(case)
    save_model(tmp_path / "deep" / "model", model)
    back = load_model(tmp_path / "deep" / "model")
    assert_same(back, model)
    assert back.text == model.text
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["model"]  # nothing left beside it


def test_gives_the_same_logits(exported):
    model, back = make_model("gap"), load_model(str(exported))
    pixels = images(model)
    np.testing.assert_array_equal(back(pixels), model(pixels))
    assert back(pixels).shape == (5, 3)
    scaled = (pixels / np.float32(255) - np.array(model.mean)) / np.array(model.std)
    np.testing.assert_allclose(back(scaled.astype(np.float32)), model(pixels), rtol=1e-4, atol=1e-5)


def test_three_lines_in_another_process(exported, tmp_path):
    model = make_model("gap")
    np.save(tmp_path / "images.npy", images(model))
    code = (
        "import numpy as np; from spikernel_jax import load_model\n"
        f"model = load_model({os.fspath(exported)!r})\n"
        f"np.save({os.fspath(tmp_path / 'logits.npy')!r}, model(np.load({os.fspath(tmp_path / 'images.npy')!r})))"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), model(images(model)))


def test_a_new_export_replaces_the_old_one(tmp_path):
    path = tmp_path / "model"
    save_model(path, make_model("gap"))
    second = make_model("spyx neuron", seed=1)
    save_model(path, second)
    assert_same(load_model(path), second)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("moment", ["while writing", "before the move"])
def test_a_failed_export_leaves_the_old_one(moment, tmp_path, monkeypatch):
    path = tmp_path / "model"
    first = make_model("gap")
    save_model(path, first)

    class Stopped(BaseException):
        pass

    def stop(*_: Any, **__: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        if moment == "while writing":
            patch.setattr(v1, "save", stop)
        else:
            patch.setattr(checkpoint_module, "_seal", stop)
        with pytest.raises(Stopped):
            save_model(path, make_model("gap", seed=1))
    assert_same(load_model(path), first)
    save_model(path, make_model("gap", seed=1))  # what the failed one left behind is no hindrance
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("there", ["a folder", "a file", "a training checkpoint", "a link to nothing"])
def test_what_is_no_model_is_not_replaced(there, tmp_path):
    path = tmp_path / "precious"
    if there == "a folder":
        path.mkdir()
        (path / "thesis.txt").write_text("x")
    elif there == "a file":
        path.write_text("x")
    elif there == "a link to nothing":
        path.symlink_to("absent")
    else:
        with checkpoint_module.training_checkpoints(tmp_path, {"seed": 0}) as checkpoints:
            checkpoints.save(1, {"w": jax.numpy.ones(2)})
        path = tmp_path / "1"
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=f"{path} is there and is no exported model"):
        save_model(path, make_model("gap"))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_an_empty_folder_is_taken_and_neighbours_are_let_be(tmp_path):
    for name in ("model", "model.new", "model.old"):
        (tmp_path / name).mkdir()
    (tmp_path / "model.new" / "thesis.txt").write_text("x")
    (tmp_path / "model.old" / "thesis.txt").write_text("y")
    for seed in (0, 1):
        save_model(tmp_path / "model", make_model("gap", seed))
    assert_same(load_model(tmp_path / "model"), make_model("gap", 1))
    assert {entry.name for entry in tmp_path.iterdir()} == {"model", "model.new", "model.old"}
    assert (tmp_path / "model.new" / "thesis.txt").read_text() == "x"
    assert (tmp_path / "model.old" / "thesis.txt").read_text() == "y"


def damaged(exported: Path, folder: Path, damage: str) -> Path:
    path = folder / "model"
    shutil.copytree(exported, path)
    files = sorted((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    if damage == "halves":
        for file in files:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif damage == "one bit":
        array = max((p for p in files if p.parent.name == "d"), key=lambda p: p.stat().st_size)
        flip_a_bit(array)
    elif damage == "no metadata":
        (path / "_CHECKPOINT_METADATA").unlink()
    elif damage == "empty folder":
        shutil.rmtree(path)
        path.mkdir()
    elif damage == "absent":
        shutil.rmtree(path)
    elif damage == "a file":
        shutil.rmtree(path)
        path.write_text("model")
    elif damage == "another format":
        record = json.loads((path / "_CHECKPOINT_METADATA").read_text())
        record["custom_metadata"]["format"] = "something else"
        (path / "_CHECKPOINT_METADATA").write_text(json.dumps(record))
        checkpoint_module._seal(path)
    elif damage == "another genotype":
        record = json.loads((path / "_CHECKPOINT_METADATA").read_text())
        record["custom_metadata"]["genotype"] = [0, 0, 0, 0, 0, 0]
        (path / "_CHECKPOINT_METADATA").write_text(json.dumps(record))
        checkpoint_module._seal(path)
    elif damage in ("endless time", "an operation that is not registered"):
        record = json.loads((path / "_CHECKPOINT_METADATA").read_text())
        spec = record["custom_metadata"]["spec"]
        if damage == "endless time":
            spec["time_steps"] = 10**9
        else:
            spec["space"]["operations"][2] = "elsewhere3"
        (path / "_CHECKPOINT_METADATA").write_text(json.dumps(record))
        checkpoint_module._seal(path)
    return path


@pytest.mark.parametrize(
    "damage",
    ["halves", "one bit", "no metadata", "empty folder", "absent", "a file", "another format", "another genotype",
     "endless time", "an operation that is not registered"],
)  # fmt: skip
def test_damage_is_told_in_one_line(damage, exported, tmp_path, capfd):
    path = damaged(exported, tmp_path, damage)
    with pytest.raises(ValueError, match=str(path)) as error:
        load_model(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
    if damage not in ("empty folder",):  # of a folder that never was a model, orbax logs a line
        assert capfd.readouterr().err == ""


def test_a_training_checkpoint_is_no_model(tmp_path):
    with checkpoint_module.training_checkpoints(tmp_path / "state", {"seed": 0}) as checkpoints:
        checkpoints.save(1, {"w": jax.numpy.ones(2)})
    with pytest.raises(ValueError, match="cannot be loaded") as error:
        load_model(tmp_path / "state" / "1")
    assert "\n" not in str(error.value)


# Training checkpoints

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
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    step, (line,) = restored(tmp_path)
    assert step == 10
    assert line.startswith(f"{tmp_path}: the checkpoint of step 20 is damaged (")
    assert line.endswith("): going on from step 10")
    assert "\n" not in line
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before  # restoring changes nothing
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
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=r"step 20 is damaged .* step 10 is damaged .*; remove that folder") as error:
        restored(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}: the training checkpoint cannot be read")
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


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
        ("before the move", [1, 2]),
        ("before dropping", [1, 2, 3]),
        ("while dropping", [2, 3]),
    ],
)
def test_kill_9_while_saving(moment, left, tmp_path):
    folder = tmp_path / "state"
    command = [sys.executable, "-c", _KILLED, str(folder), moment]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "training")])}
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


@pytest.mark.parametrize("case", ["gap", "feedback"])
def test_nnx_wrapper(case):
    model = make_model(case)
    wrapped = NNXModel(model)
    x = jax.numpy.asarray(np.random.default_rng(2).normal(size=(4, *model.spec.image_shape)), "float32")
    np.testing.assert_allclose(wrapped(x), model(np.asarray(x)), rtol=1e-5, atol=1e-6)
    graph, params, rest = nnx.split(wrapped, nnx.Param, ...)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == network.parameter_count(model.params)
    assert sum(leaf.size for leaf in jax.tree.leaves(rest)) == network.parameter_count(model.stats)
    doubled = nnx.merge(graph, jax.tree.map(lambda leaf: 2 * leaf, params), rest)
    assert float(abs(doubled(x) - wrapped(x)).max()) > 0


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (np.zeros((2, 6, 6, 1), np.uint8), "takes"),
        (np.zeros((6, 6, 3), np.uint8), "shape"),
        (np.full((1, 6, 6, 3), np.nan, np.float32), "NaN"),
        (np.zeros((1, 6, 6, 3), np.int64), "dtype"),
    ],
)
def test_a_model_refuses_what_are_no_images_of_its(bad, words):
    with pytest.raises(ValueError, match=words):
        make_model("gap")(bad)
