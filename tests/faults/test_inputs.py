"""Inputs that used to give a wrong result, a traceback or no answer: each is one line that names field and value."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from spikernel_jax import (
    CellSpace,
    Model,
    NetworkSpec,
    TrainConfig,
    load_dataset,
    load_model,
    load_snasnet,
    make_bank,
    make_dataset,
    save_model,
    score_population,
    train,
)
from spikernel_jax.data import Split
from spikernel_jax.pipeline.options import impact_genotypes, resolve
from spikernel_jax.pipeline.presets import get_preset
from spikernel_jax.snn import network, snasnet
from spikernel_jax.snn.spec import NetworkSpec as Spec
from spikernel_jax.training import checkpoint

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
SPEC = NetworkSpec((8, 8, 1), 2, CellSpace((3,)), channels=4, time_steps=2)
IMAGES = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (Spec((8, 8, 1), 2, CellSpace((3,)), channels=5, time_steps=2), "bank: cell1"),
        (Spec((8, 8, 1), 2, CellSpace((5,)), channels=4, time_steps=2), "bank has no 'cell1"),
        (Spec((8, 8, 1), 3, CellSpace((3,)), channels=4, time_steps=2), "bank: head.out's"),
    ],
)
def test_a_bank_of_another_network_scores_nothing(other, words):
    bank = jax.eval_shape(lambda: make_bank(jax.random.key(0), other, 1))
    bank = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), bank)
    with pytest.raises(ValueError, match=words) as error:
        score_population(SPEC.space.enumerate()[:2], bank, IMAGES, SPEC)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: make_bank(jax.random.key(0), SPEC, seeds=1.5), "seeds=1.5"),  # pyright: ignore
        (lambda: NetworkSpec((8, 8, 1), 2, channels=0), "channels=0"),
        (lambda: NetworkSpec((8, 8, 1), float("nan")), "num_classes=nan"),  # pyright: ignore
        (lambda: NetworkSpec((8, 8, 1), 2, time_steps=10**9), "time_steps=1000000000"),
        (lambda: NetworkSpec((8, 10**9, 1), 2), "1000000000"),
        (lambda: TrainConfig(flip="no"), "flip='no' must be True or False"),  # pyright: ignore
        (lambda: TrainConfig(cutout=float("nan")), "cutout=nan must be a whole number"),  # pyright: ignore
        (lambda: TrainConfig(epochs=True), "epochs=True must be a whole number"),
        (lambda: load_snasnet({}, "0003 0000 0000 0000", stem_stride=0), "state_dict has no"),
    ],
)
def test_settings_of_another_kind(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_narrow_integers_do_not_overflow():
    spec = NetworkSpec((8, 8, 1), 2, channels=np.int8(100))  # pyright: ignore
    assert spec.cell_channels(1) == 200


def test_masked_images_are_refused():
    images = np.random.default_rng(0).integers(0, 255, (6, 8, 8, 1), dtype=np.uint8)
    split = Split(images, np.arange(6) % 2)
    masked = Split(np.ma.masked_greater(images, 200), split.labels)
    with pytest.raises(ValueError, match="own train: images are a masked array"):
        make_dataset("own", masked, split, split, 2)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"sets": ["3,5"], "kernel_sizes": (1, 3)}, "--kernel-sizes 1 3 lacks 5"),
        ({"cell": "0>1:convK 0>3:skip"}, "edges that lead nowhere: what is left of it is '0>3:skip'"),
        ({"samples": 10**12}, "--samples 1000000000000 must be"),
        ({"sets": ["1,3,5,7,9,11,13,15"]}, "want at most 6 kernels in a set"),
        ({"bit": 8}, r"options \['bit'\] are unknown"),
    ],
)
def test_options_that_would_fail_late_or_never_end(given: dict[str, Any], words):
    with pytest.raises(ValueError, match=words):
        resolve(given, {}, get_preset("mnist5k", "smoke"))


def test_a_cell_with_a_live_node_is_taken():
    space = CellSpace((3, 5))
    rows = impact_genotypes(space, "0>1:convK 0>3:skip 1>3:convK")
    assert [space.explicit(row) for row in rows.values()] == [
        "0>1:conv3 0>3:skip 1>3:conv3",
        "0>1:conv5 0>3:skip 1>3:conv5",
    ]


@pytest.mark.slow
def test_a_terminal_of_another_alphabet_and_a_reader_that_leaves(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import dataclasses\n"
        "from spikernel_jax.pipeline import cli\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class Options:\n"
        "    lines: int = 3\n"
        "def body(options):\n"
        "    for i in range(options.lines):\n"
        "        cli.say(f'{i} µJ')\n"
        "    open('done', 'w').close()\n"
        "cli.main(Options, body, '')\n"
    )
    environment = os.environ | {"PYTHONPATH": str(EXPERIMENTS.parent), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, str(script)]
    told = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "2 ?J" in told.stdout
    (tmp_path / "done").unlink()
    piped = f"{sys.executable} {script} --lines 20000 | head -1; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", piped], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert (tmp_path / "done").exists()  # the work was done to its end


def a_model() -> Model:
    cell = tuple(SPEC.space.parse("0>1:conv3 0>3:skip 1>3:conv3").tolist())
    return Model(SPEC, cell, *network.init(jax.random.key(0), SPEC, cell), (0.5,), (0.3,), {"seed": 0})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mean": None}, "mean=None must be 1 finite numbers"),
        ({"mean": [float("nan")]}, "mean="),
        ({"std": [0.0]}, "must be 1 finite numbers above 0"),
        ({"std": [0.3, 0.3]}, "std="),
        ({"metrics": []}, "metrics="),
    ],
)
def test_a_model_whose_metadata_was_sealed_anew(change, words, tmp_path):
    save_model(tmp_path / "model", a_model())
    path = tmp_path / "model" / "_CHECKPOINT_METADATA"
    record = json.loads(path.read_text())
    record["custom_metadata"] |= change
    path.write_text(json.dumps(record))
    checkpoint._seal(tmp_path / "model")
    with pytest.raises(ValueError, match=words) as error:
        load_model(tmp_path / "model")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("what", ["pipe", "link"])
def test_a_model_with_a_file_that_is_none(what, tmp_path):
    save_model(tmp_path / "model", a_model())
    if what == "pipe":
        os.mkfifo(tmp_path / "model" / "pipe")
    else:
        (tmp_path / "model" / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=f"{what} is no file of its own"):
        load_model(tmp_path / "model")


def public_weights() -> dict[str, np.ndarray]:
    """A public checkpoint of the cell that is a skip alone: C = 2, 3-channel images of 8x8, 4 hidden, 10 outputs."""
    rng = np.random.default_rng(0)
    shapes = {"stem.0.weight": (2, 3, 3, 3), "downconv1.2.weight": (4, 2, 3, 3), "classifier.1.weight": (4, 16),
              "classifier.3.weight": (10, 4), "classifier.3.bias": (10,)}  # fmt: skip
    for norm, width in (("stem.1", 2), ("downconv1.0", 2), ("downconv1.3", 4), ("last_act.0", 4)):
        shapes |= {f"{norm}.{name}": (width,) for name in ("weight", "bias", "running_mean", "running_var")}
    return {name: rng.uniform(0.1, 1, shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda w: w.pop("stem.1.running_var"), "has no 'stem.1.running_var'"),
        (lambda w: w.update({"stem.0.weight": w["stem.0.weight"] * np.nan}), "stem.0.weight has dtype"),
        (lambda w: w.update({"stem.0.weight": w["stem.0.weight"] + 1j}), "stem.0.weight has dtype complex64"),
        (
            lambda w: w.update({"last_act.0.running_var": -w["last_act.0.running_var"]}),
            "running_var has values below 0",
        ),
    ],
)
def test_public_weights_that_are_none(spoil, words):
    sizes: Any = {"image_size": 8, "num_classes": 10}
    good, cell = public_weights(), "0001 0000 0000 0000"
    load_snasnet(good, cell, **sizes)
    spoil(good)
    with pytest.raises(ValueError, match=words):
        load_snasnet(good, cell, **sizes)
    with pytest.raises(ValueError, match="stem_stride=0"):
        load_snasnet(public_weights(), cell, **sizes, stem_stride=0)


def test_an_archive_that_unpacks_to_gigabytes(tmp_path, monkeypatch):
    monkeypatch.setattr(snasnet, "_LARGEST", 10_000)
    arrays: Any = public_weights() | {"unused": np.zeros(100_000)}
    np.savez_compressed(tmp_path / "w.npz", **arrays)
    with pytest.raises(ValueError, match=r"unused\.npy unpacks to over 10,000 bytes"):
        load_snasnet(tmp_path / "w.npz", "0001 0000 0000 0000")


def test_seeds_that_a_key_cannot_hold(tmp_path):
    data = load_dataset("mnist5k", limit_train=16, limit_validation=16, limit_test=16)
    spec = NetworkSpec((28, 28, 1), 10, CellSpace((3,)), channels=2, time_steps=1, stem_stride=2)
    with pytest.raises(ValueError, match="seed=4294967296 must be a whole number"):
        train(spec, spec.space.parse("0>3:skip"), data, TrainConfig(epochs=1, batch_size=8), seed=2**32)
