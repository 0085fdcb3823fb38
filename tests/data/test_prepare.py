"""`tools/prepare_data.py`: official archives become prepared data, or are refused."""

import gzip
import runpy
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest

import prepare_data
from official_files import ROOT, cifar_files, idx, mnist_archive, splits, tar, truncate
from spikernel_jax.data import load_dataset


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_prepare_cifar_from_tar_and_folder(name, tmp_path):
    files = cifar_files(name)
    written = prepare_data.prepare(name, tmp_path / "a", tar(tmp_path / "official.tar.gz", files))
    (tmp_path / "unpacked" / "deep").mkdir(parents=True)
    for file, data in files.items():
        (tmp_path / "unpacked" / "deep" / file).write_bytes(data)
    prepare_data.prepare(name, tmp_path / "b", tmp_path / "unpacked")
    assert written == tmp_path / "a" / name / "3.0.2"
    assert {p.name for p in (tmp_path / "a").iterdir()} == {name}
    a, b = (load_dataset(name, tmp_path / folder) for folder in "ab")
    for field in ("train", "validation", "test"):
        np.testing.assert_array_equal(splits(a)[field].images, splits(b)[field].images)
    assert "lossless" in a.source
    # Oracle for channel order and labels: the official bytes of every test image, CHW.
    raw = np.frombuffer(files["test_batch.bin" if name == "cifar10" else "test.bin"], np.uint8).reshape(10, -1)
    expected = {row[-3072:].tobytes(): int(row[-3073]) for row in raw}
    found = {
        np.ascontiguousarray(image.transpose(2, 0, 1)).tobytes(): int(label)
        for image, label in zip(a.test.images, a.test.labels, strict=True)
    }
    assert found == expected
    assert "tensorflow" not in sys.modules


def test_prepare_twice_keeps_the_first(roots):
    assert prepare_data.prepare("mnist", roots("mnist"), Path("/nowhere")).name == "3.0.1"


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("cifar10", {"test_batch.bin": b"123"}, "test_batch.bin holds 3 bytes, not a whole number of 3073"),
        ("cifar100", {"train.bin": b""}, "train.bin holds 0 bytes"),
        ("cifar10", {"test_batch.bin": b"\x0a" + bytes(3072)}, "test labels reach 10"),
        (
            "cifar10",
            {"data_batch_3.bin": None, "batches.meta.txt": None},
            "lacks data_batch_3.bin, batches.meta",
        ),
    ],
)
def test_prepare_refuses_bad_cifar(name, change, match, tmp_path):
    files = {k: v for k, v in (cifar_files(name) | change).items() if v is not None}
    with pytest.raises(ValueError, match=match):
        prepare_data.prepare(name, tmp_path / "out", tar(tmp_path / "a.tar.gz", files))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "data", "match"),
    [
        ("train-images-idx3-ubyte.gz", b"no gzip", "train-images-idx3-ubyte.gz is truncated or not gzip"),
        ("t10k-labels-idx1-ubyte.gz", gzip.compress(b"ab", mtime=0), "is not an idx file of 1 axes, or is cut short"),
        ("train-labels-idx1-ubyte.gz", idx(np.zeros(3, np.uint8)), r"shape \(400, 28, 28\), .* \(3,\)"),
        ("train-images-idx3-ubyte.gz", idx(np.zeros((400, 5, 5), np.uint8)), r"shape \(400, 5, 5\)"),
    ],
    ids=["no gzip", "cut short", "too few labels", "small images"],  # bytes as names would differ by the second
)
def test_prepare_refuses_bad_mnist(file, data, match, tmp_path):
    (mnist_archive(tmp_path / "archive") / file).write_bytes(data)
    with pytest.raises(ValueError, match=match):
        prepare_data.prepare("mnist", tmp_path / "out", tmp_path / "archive")


def test_prepare_refuses_absent_and_broken_archives(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        prepare_data.prepare("cifar10", tmp_path, tmp_path / "none.tar.gz")
    archive = tar(tmp_path / "a.tar.gz", cifar_files("cifar10"))
    truncate(archive)
    with pytest.raises(ValueError, match="truncated or not a tar"):
        prepare_data.prepare("cifar10", tmp_path, archive)
    with pytest.raises(ValueError, match="unknown data set 'tiny'"):
        prepare_data.prepare("tiny", tmp_path)


def test_prepare_tells_bad_input_in_one_line(tmp_path, monkeypatch, capfd):
    archive = str(tmp_path / "none.tar.gz")
    options = ["cifar10", "--data-dir", str(tmp_path), "--archive", archive]
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *options])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "tools" / "prepare_data.py"), run_name="__main__")
    assert stop.value.code == 2
    assert capfd.readouterr().err == f"error: archive {archive} does not exist\n"


def test_prepare_without_a_network(tmp_path, monkeypatch):
    def refuse(url, timeout):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(ValueError, match=r"cannot download https://.*cifar-10.* \(no route\).*--archive"):
        prepare_data.prepare("cifar10", tmp_path)
