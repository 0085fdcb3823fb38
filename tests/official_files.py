"""Data sets as their authors publish them, of few images and of noise."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"


def idx(array):
    head = np.array([0x0800 + array.ndim, *array.shape], ">i4").tobytes()
    return gzip.compress(head + array.astype(np.uint8).tobytes(), mtime=0)


def mnist_archive(folder, n_train=400, n_test=200):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, n in (("train", n_train), ("t10k", n_test)):
        images = rng.integers(0, 256, (n, 28, 28), np.uint8)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(images))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(np.arange(n) % 10))
    return folder


def cifar_files(name, n_train=20, n_test=10):
    """The official files with noise images."""
    rng = np.random.default_rng(1)

    def part(n):
        label = (np.arange(n) % 10).astype(np.uint8)[:, None]
        image = rng.integers(0, 256, (n, 3072), np.uint8)
        columns = [label, image] if name == "cifar10" else [label // 5, label, image]
        return np.concatenate(columns, axis=1).tobytes()

    if name == "cifar10":
        files = {f"data_batch_{i}.bin": part(n_train // 5) for i in range(1, 6)} | {"test_batch.bin": part(n_test)}
        return files | {"batches.meta.txt": "\n".join(f"c{i}" for i in range(10)).encode()}
    return {
        "train.bin": part(n_train),
        "test.bin": part(n_test),
        "fine_label_names.txt": "\n".join(f"f{i}" for i in range(100)).encode(),
        "coarse_label_names.txt": "\n".join(f"c{i}" for i in range(20)).encode(),
    }


def tar(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"folder/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def tiny_folder(root, classes=5, train=100, val=20):
    """A reduced tiny-imagenet-200 with noise images; the first train image of each class is greyscale."""
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(2)
    base = root / "tiny-imagenet-200"
    (base / "val" / "images").mkdir(parents=True)
    wnids, lines = [f"n{c:08d}" for c in range(classes)], []
    (base / "wnids.txt").write_text("\n".join(wnids) + "\n")
    (base / "words.txt").write_text("".join(f"{w}\tthing\n" for w in wnids))
    for c, wnid in enumerate(wnids):
        folder = base / "train" / wnid / "images"
        folder.mkdir(parents=True)
        for i in range(train):
            shape = (64, 64) if i == 0 else (64, 64, 3)
            assert cv2.imwrite(str(folder / f"{wnid}_{i}.jpg"), rng.integers(0, 256, shape, np.uint8))
            (folder / f"{wnid}_{i}.jpg").rename(folder / f"{wnid}_{i}.JPEG")
        for i in range(val):
            path = base / "val" / "images" / f"val_{c * val + i}.jpg"
            assert cv2.imwrite(str(path), rng.integers(0, 256, (64, 64, 3), np.uint8))
            path.rename(path.with_suffix(".JPEG"))
            lines.append(f"{path.stem}.JPEG\t{wnid}\t0\t0\t9\t9\n")
    (base / "val" / "val_annotations.txt").write_text("".join(lines))
    return root


def splits(dataset):
    return {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
