"""Data sets keep one contract, whatever their source."""

import subprocess
import sys
import tarfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prepare_data
from official_files import ROOT, SHARED, idx, mnist_archive, splits, tiny_folder
from spikernel_jax.data import DATASETS, load_dataset, normalise

LIMITS: dict[str, Any] = {"limit_train": 200, "limit_validation": 100, "limit_test": 100}


@pytest.fixture(scope="session")
def loaded(roots):
    """Returns a function from a name to a small data set of it, cached."""
    cache = {}

    def load(name):
        if name not in cache:
            cache[name] = load_dataset(name, roots(name), validation=100, **LIMITS)
        return cache[name]

    return load


@pytest.fixture(params=sorted(DATASETS))
def dataset(request, loaded):
    return loaded(request.param)


def test_contract_shapes_and_dtypes(dataset):
    info = DATASETS[dataset.name]
    assert dataset.image_shape == info.image_shape
    assert (dataset.mean, dataset.std) == (info.mean, info.std)
    assert len(info.mean) == len(info.std) == info.image_shape[-1]
    assert dataset.num_classes == (5 if dataset.name == "tiny_imagenet" else info.num_classes)
    for field, split in splits(dataset).items():
        n = LIMITS[f"limit_{field}"]
        assert split.images.shape == (n, *info.image_shape)
        assert split.images.dtype == np.uint8
        assert split.labels.shape == (n,)
        assert split.labels.dtype == np.int32
        assert f"{n} {field}" in dataset.source
    assert "\n" not in dataset.source


def test_contract_no_image_in_two_splits(dataset):
    seen = [{image.tobytes() for image in split.images} for split in splits(dataset).values()]
    assert sum(map(len, seen)) == len(set.union(*seen)) == sum(LIMITS.values())


def test_contract_every_limit_is_balanced(dataset):
    for split in splits(dataset).values():
        for n in (1, 7, len(split.labels) // 2, len(split.labels)):
            counts = np.bincount(split.labels[:n], minlength=dataset.num_classes)
            # Only MNIST proper has classes of unequal size, and its stand-in here is balanced too.
            assert counts.max() - counts.min() <= 1, (n, counts)


def test_contract_limits_are_nested_and_calls_agree(dataset, roots):
    small = load_dataset(
        dataset.name, roots(dataset.name), validation=100, limit_train=37, limit_validation=11, limit_test=5
    )
    for n, (field, split) in zip((37, 11, 5), splits(small).items(), strict=True):
        whole = splits(dataset)[field]
        np.testing.assert_array_equal(split.images, whole.images[:n])
        np.testing.assert_array_equal(split.labels, whole.labels[:n])
        assert f"{n} {field} (of " in small.source


def test_contract_normalisation_oracle(dataset):
    images = dataset.train.images[:8]
    mean, std = np.array(dataset.mean), np.array(dataset.std)
    ours = jax.jit(lambda x: normalise(x, dataset.mean, dataset.std))(images)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, (images.astype(np.float64) / 255 - mean) / std, rtol=0, atol=2e-6)


def test_mnist5k_counts_and_uniqueness():
    dataset = load_dataset("mnist5k")
    for n, split in zip((300, 100, 100), splits(dataset).values(), strict=True):
        assert np.bincount(split.labels).tolist() == [n] * 10
    images = np.concatenate([split.images for split in splits(dataset).values()])
    assert len({image.tobytes() for image in images}) == 5000
    # Whole-set statistics agree with the registered ones, which are of the 60,000.
    assert abs(images.mean() / 255 - 0.1307) < 0.005
    assert abs(images.std() / 255 - 0.3081) < 0.005


def test_train_order_ignores_the_validation_size():
    few, many = (load_dataset("mnist5k", validation=n) for n in (50, 2000))
    np.testing.assert_array_equal(few.train.images[:2000], many.train.images)
    np.testing.assert_array_equal(few.test.images, many.test.images)
    assert (len(few.train.labels), len(few.validation.labels)) == (3950, 50)


def test_mnist5k_split_is_pinned():
    dataset = load_dataset("mnist5k", limit_train=12, limit_validation=5, limit_test=5)
    heads = [split.labels.tolist() for split in splits(dataset).values()]
    sums = [int(split.images.sum(dtype=np.int64)) for split in splits(dataset).values()]
    assert heads == [[0, 8, 4, 5, 6, 9, 2, 1, 3, 7, 2, 0], [7, 4, 9, 6, 5], [0, 9, 5, 2, 4]]
    assert sums == [317597, 98659, 125300]


def test_cifar10_default_split_is_official(caplog):
    tfds = pytest.importorskip("tensorflow_datasets")
    if not (SHARED / "tfds" / "cifar10").is_dir():
        pytest.skip("needs all of prepared CIFAR-10 beside the repository")
    dataset = load_dataset("cifar10", SHARED / "tfds")
    assert not caplog.records
    for n, split in zip((4500, 500, 1000), splits(dataset).values(), strict=True):
        assert np.bincount(split.labels).tolist() == [n] * 10
    assert "JPEG copy" in dataset.source
    # A fortieth of the images suffices for a mean this close.
    np.testing.assert_allclose(dataset.train.images[::40].mean(axis=(0, 1, 2)) / 255, dataset.mean, rtol=0, atol=0.02)
    # TFDS's own decoding, as an oracle for ours.
    source: Any = tfds.data_source("cifar10", split="test", data_dir=SHARED / "tfds", download=False)
    expected = {record["image"].tobytes(): record["label"] for record in source.__getitems__(list(range(50)))}
    pairs = zip(dataset.test.images, dataset.test.labels, strict=True)
    assert expected.items() <= {image.tobytes(): int(label) for image, label in pairs}.items()


def test_import_stays_light():
    code = "import sys, spikernel_jax.data; print({'tensorflow_datasets', 'cv2', 'mlxtend'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_unequal_classes_stay_proportional(tmp_path):
    archive = mnist_archive(tmp_path / "archive", n_train=200, n_test=20)
    labels = np.repeat(np.arange(3), (120, 60, 20))
    (archive / "train-labels-idx1-ubyte.gz").write_bytes(idx(labels))
    prepare_data.prepare("mnist", tmp_path, archive)
    dataset = load_dataset("mnist", tmp_path)
    assert np.bincount(dataset.train.labels).tolist() == [108, 54, 18]
    assert np.bincount(dataset.validation.labels).tolist() == [12, 6, 2]
    assert np.bincount(dataset.train.labels[:10]).tolist() == [6, 3, 1]
    assert "200 of the official 60,000 train images" in dataset.source


def test_tiny_imagenet_folder_itself_colours_and_greys(tmp_path):
    cv2 = pytest.importorskip("cv2")
    tiny_folder(tmp_path, classes=2, train=3, val=2)
    base = tmp_path / "tiny-imagenet-200"
    red = np.zeros((64, 64, 3), np.uint8)
    red[..., 2] = 255  # cv2 is BGR
    for i in range(4):
        path = base / "val" / "images" / f"val_{i}.JPEG"
        path.write_bytes(cv2.imencode(".jpg", red)[1].tobytes())
    dataset = load_dataset("tiny_imagenet", base)
    assert dataset.test.images[..., 0].min() > 250
    assert dataset.test.images[..., 1:].max() < 5
    images = np.concatenate([dataset.train.images, dataset.validation.images])
    grey = (images == images[..., :1]).all(axis=(1, 2, 3))
    assert grey.sum() == 2


def test_tiny_imagenet_official_subset(tmp_path):
    archive = SHARED / "tiny-imagenet-200-subset.tar"
    if not archive.is_file():
        pytest.skip("needs the Tiny ImageNet subset beside the repository")
    with tarfile.open(archive) as tar:
        members = {m.name.removeprefix("tiny-imagenet-200/"): m for m in tar.getmembers() if m.isfile()}

        def content(member):
            stream = tar.extractfile(member)
            assert stream is not None
            return stream.read()

        keep = content(members["wnids.txt"]).decode().split()[:4]
        annotations = content(members["val/val_annotations.txt"]).decode()
        lines = [line for line in annotations.splitlines(keepends=True) if line.split("\t")[1] in keep]
        images = {f"val/images/{line.split(chr(9))[0]}" for line in lines}
        chosen = [m for n, m in members.items() if n in images or n.startswith(tuple(f"train/{w}/" for w in keep))]
        for member in chosen:  # extractall knows no filter before Python 3.11.4, and 3.14 changed its default
            path = tmp_path / member.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content(member))
    base = tmp_path / "tiny-imagenet-200"
    (base / "wnids.txt").write_text("\n".join(keep))
    (base / "val" / "val_annotations.txt").write_text("".join(lines))
    dataset = load_dataset("tiny_imagenet", tmp_path)
    assert [np.bincount(s.labels).tolist() for s in splits(dataset).values()] == [
        [45] * 4,
        [5] * 4,
        [10] * 4,
    ]
    assert "official val images" in dataset.source
