"""Exported models: the same bits back, in any process, or one line that says why not."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from orbax.checkpoint import v1

from disk import contents, flip_a_bit
from spikernel_jax import Model, NNXModel, load_model, save_model
from spikernel_jax.cells.space import CellSpace
from spikernel_jax.snn import network
from spikernel_jax.snn.neurons import NeuronSpec
from spikernel_jax.snn.spec import NetworkSpec
from spikernel_jax.training import checkpoint as checkpoint_module

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
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"{path} is there and is no exported model"):
        save_model(path, make_model("gap"))
    assert contents(tmp_path) == before


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
