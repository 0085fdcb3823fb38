"""Absent, partial and damaged data are told in a line that names them."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from official_files import tiny_folder, truncate
from spikernel_jax.data import DATASETS, DataNotFoundError, load_dataset


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"'cifar'; known: cifar10, cifar100, .*tiny_imagenet"):
        load_dataset("cifar")


@pytest.mark.parametrize("field", ["limit_train", "limit_validation", "limit_test", "validation"])
@pytest.mark.parametrize("value", [0, -1, 5001, 2.0, True])
def test_counts_out_of_range(field, value):
    high = {"limit_train": 3000, "limit_validation": 1000, "limit_test": 1000, "validation": 3999}[field]
    with pytest.raises(ValueError, match=rf"{field} must be a whole number from 1 to {high}, got {value}"):
        load_dataset("mnist5k", **{field: value})


@pytest.mark.parametrize("name", sorted(n for n, info in DATASETS.items() if info.kind != "embedded"))
def test_absent_data_says_how_to_get_it(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "there"))
    with pytest.raises(DataNotFoundError) as error:
        load_dataset(name)
    text = str(error.value)
    assert str(tmp_path / "there") in text
    assert "\n" not in text
    if DATASETS[name].kind == "tfds":
        assert text.endswith(f"python tools/prepare_data.py {name} --data-dir {tmp_path / 'there'}")
        assert str(Path(name) / DATASETS[name].version) in text
    else:
        assert str(Path("tiny-imagenet-200") / "wnids.txt") + " is missing" in text
    assert not (tmp_path / "there").exists()


def test_data_dir_falls_back_to_home(tmp_path, monkeypatch):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(DataNotFoundError, match=str(tmp_path / "tensorflow_datasets")):
        load_dataset("mnist")


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda d: truncate(next(d.glob("mnist-train*"))), id="truncated"),
        pytest.param(lambda d: next(d.glob("mnist-test*")).write_bytes(b""), id="empty"),
        pytest.param(lambda d: next(d.glob("mnist-train*")).unlink(), id="missing-shard"),
        pytest.param(lambda d: (d / "dataset_info.json").write_text('{"a":'), id="broken-json"),
        pytest.param(lambda d: (d / "dataset_info.json").write_text("{}"), id="empty-json"),
    ],
)
def test_damaged_tfds_names_the_folder(damage, roots, tmp_path):
    shutil.copytree(roots("mnist") / "mnist", tmp_path / "mnist")
    folder = tmp_path / "mnist" / "3.0.1"
    damage(folder)
    with pytest.raises(ValueError, match=r"images in .* cannot be read") as error:
        load_dataset("mnist", tmp_path)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda b: (b / "wnids.txt").unlink(), "wnids.txt is missing"),
        (lambda b: (b / "val" / "val_annotations.txt").unlink(), "val_annotations.txt is missing"),
        (lambda b: (b / "val" / "images" / "val_0.JPEG").unlink(), "val_0.JPEG is missing"),
        (lambda b: shutil.rmtree(b / "train" / "n00000001"), "n00000001.images is missing"),
        (
            lambda b: truncate(b / "train" / "n00000001" / "images" / "n00000001_0.JPEG"),
            "_0.JPEG is truncated",
        ),
        (lambda b: (b / "val" / "images" / "val_0.JPEG").write_bytes(b""), "val_0.JPEG is truncated"),
        (lambda b: (b / "wnids.txt").write_text("n00000000\n"), "val_annotations.txt line 3 names no image"),
        (lambda b: (b / "wnids.txt").write_text("a\na\n"), "each once, got 2 lines"),
        (lambda b: (b / "wnids.txt").write_bytes(b"\xff\xfe\xff"), "is not text"),
        (lambda b: (b / "val" / "val_annotations.txt").write_text(""), "names no images"),
    ],
)
def test_damaged_tiny_imagenet(damage, match, tmp_path):
    tiny_folder(tmp_path, classes=2, train=3, val=2)
    assert load_dataset("tiny_imagenet", tmp_path).num_classes == 2
    damage(tmp_path / "tiny-imagenet-200")
    with pytest.raises(ValueError, match=match):
        load_dataset("tiny_imagenet", tmp_path)


def test_tiny_imagenet_wrong_image_size(tmp_path):
    cv2 = pytest.importorskip("cv2")
    tiny_folder(tmp_path, classes=2, train=3, val=2)
    path = tmp_path / "tiny-imagenet-200" / "val" / "images" / "val_1.JPEG"
    path.write_bytes(cv2.imencode(".jpg", np.zeros((32, 64, 3), np.uint8))[1].tobytes())
    with pytest.raises(ValueError, match=r"val_1.JPEG has shape \(32, 64\), expected \(64, 64\)"):
        load_dataset("tiny_imagenet", tmp_path)
