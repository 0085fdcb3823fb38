"""Data sets keep one contract, whatever their source; augmentation is a crop of the padded image."""

import gzip
import io
import runpy
import shutil
import subprocess
import sys
import tarfile
import urllib.error
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prepare_data
from spikernel_jax.data import (
    DATASETS,
    DataNotFoundError,
    Split,
    augment,
    check_images,
    epoch_batches,
    load_dataset,
    make_dataset,
    normalise,
)

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
LIMITS: dict[str, Any] = {"limit_train": 200, "limit_validation": 100, "limit_test": 100}


def _idx(array):
    head = np.array([0x0800 + array.ndim, *array.shape], ">i4").tobytes()
    return gzip.compress(head + array.astype(np.uint8).tobytes(), mtime=0)


def _mnist_archive(folder, n_train=400, n_test=200):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, n in (("train", n_train), ("t10k", n_test)):
        images = rng.integers(0, 256, (n, 28, 28), np.uint8)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(_idx(images))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(_idx(np.arange(n) % 10))
    return folder


def _cifar_files(name, n_train=20, n_test=10):
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


def _tar(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"folder/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def _tiny_folder(root, classes=5, train=100, val=20):
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


@pytest.fixture(scope="session")
def roots(tmp_path_factory):
    """Returns a function from a name to the folder with its data, made at the first call."""
    made = {}

    def root(name):
        if DATASETS[name].kind == "embedded":
            return None
        if name == "cifar10":
            return Path(__file__).parent  # real images, a few (tools/make_test_data.py)
        if name == "cifar100":
            if not (SHARED / "tfds" / name).is_dir():
                pytest.skip("needs prepared CIFAR-100 beside the repository")
            return SHARED / "tfds"
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            if name == "tiny_imagenet":
                _tiny_folder(folder)
            else:
                prepare_data.prepare(name, folder, _mnist_archive(folder / "archive"))
            made[name] = folder
        return made[name]

    return root


@pytest.fixture(scope="session")
def loaded(roots):
    """Returns a function from a name to a small data set of it, cached."""
    cache = {}

    def load(name):
        if name not in cache:
            cache[name] = load_dataset(name, roots(name), validation=100, **LIMITS)
        return cache[name]

    return load


def _splits(dataset):
    return {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}


@pytest.fixture(params=sorted(DATASETS))
def dataset(request, loaded):
    return loaded(request.param)


def test_contract_shapes_and_dtypes(dataset):
    info = DATASETS[dataset.name]
    assert dataset.image_shape == info.image_shape
    assert (dataset.mean, dataset.std) == (info.mean, info.std)
    assert len(info.mean) == len(info.std) == info.image_shape[-1]
    assert dataset.num_classes == (5 if dataset.name == "tiny_imagenet" else info.num_classes)
    for field, split in _splits(dataset).items():
        n = LIMITS[f"limit_{field}"]
        assert split.images.shape == (n, *info.image_shape)
        assert split.images.dtype == np.uint8
        assert split.labels.shape == (n,)
        assert split.labels.dtype == np.int32
        assert f"{n} {field}" in dataset.source
    assert "\n" not in dataset.source


def test_contract_no_image_in_two_splits(dataset):
    seen = [{image.tobytes() for image in split.images} for split in _splits(dataset).values()]
    assert sum(map(len, seen)) == len(set.union(*seen)) == sum(LIMITS.values())


def test_contract_every_limit_is_balanced(dataset):
    for split in _splits(dataset).values():
        for n in (1, 7, len(split.labels) // 2, len(split.labels)):
            counts = np.bincount(split.labels[:n], minlength=dataset.num_classes)
            # Only MNIST proper has classes of unequal size, and its stand-in here is balanced too.
            assert counts.max() - counts.min() <= 1, (n, counts)


def test_contract_limits_are_nested_and_calls_agree(dataset, roots):
    small = load_dataset(
        dataset.name, roots(dataset.name), validation=100, limit_train=37, limit_validation=11, limit_test=5
    )
    for n, (field, split) in zip((37, 11, 5), _splits(small).items(), strict=True):
        whole = _splits(dataset)[field]
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
    for n, split in zip((300, 100, 100), _splits(dataset).values(), strict=True):
        assert np.bincount(split.labels).tolist() == [n] * 10
    images = np.concatenate([split.images for split in _splits(dataset).values()])
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
    heads = [split.labels.tolist() for split in _splits(dataset).values()]
    sums = [int(split.images.sum(dtype=np.int64)) for split in _splits(dataset).values()]
    assert heads == [[0, 8, 4, 5, 6, 9, 2, 1, 3, 7, 2, 0], [7, 4, 9, 6, 5], [0, 9, 5, 2, 4]]
    assert sums == [317597, 98659, 125300]


def test_cifar10_default_split_is_official(caplog):
    tfds = pytest.importorskip("tensorflow_datasets")
    if not (SHARED / "tfds" / "cifar10").is_dir():
        pytest.skip("needs all of prepared CIFAR-10 beside the repository")
    dataset = load_dataset("cifar10", SHARED / "tfds")
    assert not caplog.records
    for n, split in zip((4500, 500, 1000), _splits(dataset).values(), strict=True):
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
    archive = _mnist_archive(tmp_path / "archive", n_train=200, n_test=20)
    labels = np.repeat(np.arange(3), (120, 60, 20))
    (archive / "train-labels-idx1-ubyte.gz").write_bytes(_idx(labels))
    prepare_data.prepare("mnist", tmp_path, archive)
    dataset = load_dataset("mnist", tmp_path)
    assert np.bincount(dataset.train.labels).tolist() == [108, 54, 18]
    assert np.bincount(dataset.validation.labels).tolist() == [12, 6, 2]
    assert np.bincount(dataset.train.labels[:10]).tolist() == [6, 3, 1]
    assert "200 of the official 60,000 train images" in dataset.source


# --- the caller's own arrays ---------------------------------------------------------------------------


def _split(n=6, shape=(8, 8, 3), classes=3, seed=0):
    rng = np.random.default_rng(seed)
    return Split(rng.integers(0, 256, (n, *shape), np.uint8), np.arange(n, dtype=np.int64) % classes)


def test_make_dataset_statistics_oracle():
    train = _split()
    dataset = make_dataset("mine", train, _split(3, seed=1), _split(4, seed=2), 3)
    np.testing.assert_allclose(dataset.mean, (train.images / 255.0).mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(dataset.std, (train.images / 255.0).std(axis=(0, 1, 2)), rtol=1e-12)
    assert dataset.train.labels.dtype == np.int32
    assert dataset.source.endswith("6 train, 3 validation, 4 test")


_GOOD = _split()


@pytest.mark.parametrize(
    ("split", "match"),
    [
        (
            Split(np.full((2, 8, 8, 3), np.nan, np.float32), np.zeros(2, int)),
            r"mine test: .*384 values .* NaN",
        ),
        (
            Split(np.zeros((2, 8, 8, 3), np.float32), np.zeros(2, int)),
            "must be uint8 pixels, got dtype float32",
        ),
        (Split(np.zeros((2, 8, 8, 3), np.int64), np.zeros(2, int)), "got dtype int64"),
        (Split(_GOOD.images[0], _GOOD.labels[:1]), r"shape \[N, H, W, C\], got shape \(8, 8, 3\)"),
        (Split(_GOOD.images[:0], _GOOD.labels[:0]), "no images"),
        (Split(_GOOD.images[:, :4], _GOOD.labels), r"must have shape \(8, 8, 3\), got \(4, 8, 3\)"),
        (Split(_GOOD.images, _GOOD.labels + 1), r"must lie in 0\.\.2, got 1\.\.3"),
        (Split(_GOOD.images, _GOOD.labels - 1), r"must lie in 0\.\.2, got -1\.\.1"),
        (
            Split(_GOOD.images, _GOOD.labels[:-1]),
            r"labels must be integers of shape \(6,\), got int64 \(5,\)",
        ),
        (Split(_GOOD.images, _GOOD.labels.astype(float)), "labels must be integers .* got float64"),
    ],
)
def test_make_dataset_refuses(split, match):
    with pytest.raises(ValueError, match=match):
        make_dataset("mine", _GOOD, _GOOD, split, 3)


def test_make_dataset_refuses_a_constant_channel():
    images = _GOOD.images.copy()
    images[..., 1] = 7
    with pytest.raises(ValueError, match=r"channel 1 .* never varies"):
        make_dataset("mine", Split(images, _GOOD.labels), _GOOD, _GOOD, 3)


def test_make_dataset_refuses_no_classes():
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        make_dataset("mine", _GOOD, _GOOD, _GOOD, 0)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.float32, jnp.bfloat16, np.float64])
def test_check_images_accepts(dtype):
    check_images(np.zeros((1, 4, 4, 1), dtype))


@pytest.mark.parametrize(
    ("images", "match"),
    [
        (np.full((1, 2, 2, 1), np.inf), "4 values that are NaN or infinite"),
        (jnp.full((1, 2, 2, 1), jnp.nan, jnp.bfloat16), "4 values that are NaN or infinite"),
        (np.zeros((1, 2, 2, 0)), r"no images in an array of shape \(1, 2, 2, 0\)"),
        (np.zeros((2, 2, 1), np.uint8), r"got shape \(2, 2, 1\)"),
        (np.zeros((1, 2, 2, 1), bool), "got dtype bool"),
        ([["a"]], "got dtype <U1"),
    ],
)
def test_check_images_refuses(images, match):
    with pytest.raises(ValueError, match=match):
        check_images(images)


# --- absent, partial and damaged data ------------------------------------------------------------------


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


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda d: _truncate(next(d.glob("mnist-train*"))), id="truncated"),
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
            lambda b: _truncate(b / "train" / "n00000001" / "images" / "n00000001_0.JPEG"),
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
    _tiny_folder(tmp_path, classes=2, train=3, val=2)
    assert load_dataset("tiny_imagenet", tmp_path).num_classes == 2
    damage(tmp_path / "tiny-imagenet-200")
    with pytest.raises(ValueError, match=match):
        load_dataset("tiny_imagenet", tmp_path)


def test_tiny_imagenet_wrong_image_size(tmp_path):
    cv2 = pytest.importorskip("cv2")
    _tiny_folder(tmp_path, classes=2, train=3, val=2)
    path = tmp_path / "tiny-imagenet-200" / "val" / "images" / "val_1.JPEG"
    path.write_bytes(cv2.imencode(".jpg", np.zeros((32, 64, 3), np.uint8))[1].tobytes())
    with pytest.raises(ValueError, match=r"val_1.JPEG has shape \(32, 64\), expected \(64, 64\)"):
        load_dataset("tiny_imagenet", tmp_path)


def test_tiny_imagenet_folder_itself_colours_and_greys(tmp_path):
    cv2 = pytest.importorskip("cv2")
    _tiny_folder(tmp_path, classes=2, train=3, val=2)
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
    assert [np.bincount(s.labels).tolist() for s in _splits(dataset).values()] == [
        [45] * 4,
        [5] * 4,
        [10] * 4,
    ]
    assert "official val images" in dataset.source


# --- preparation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_prepare_cifar_from_tar_and_folder(name, tmp_path):
    files = _cifar_files(name)
    written = prepare_data.prepare(name, tmp_path / "a", _tar(tmp_path / "official.tar.gz", files))
    (tmp_path / "unpacked" / "deep").mkdir(parents=True)
    for file, data in files.items():
        (tmp_path / "unpacked" / "deep" / file).write_bytes(data)
    prepare_data.prepare(name, tmp_path / "b", tmp_path / "unpacked")
    assert written == tmp_path / "a" / name / "3.0.2"
    assert {p.name for p in (tmp_path / "a").iterdir()} == {name}
    a, b = (load_dataset(name, tmp_path / folder) for folder in "ab")
    for field in ("train", "validation", "test"):
        np.testing.assert_array_equal(_splits(a)[field].images, _splits(b)[field].images)
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
    files = {k: v for k, v in (_cifar_files(name) | change).items() if v is not None}
    with pytest.raises(ValueError, match=match):
        prepare_data.prepare(name, tmp_path / "out", _tar(tmp_path / "a.tar.gz", files))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "data", "match"),
    [
        ("train-images-idx3-ubyte.gz", b"no gzip", "train-images-idx3-ubyte.gz is truncated or not gzip"),
        ("t10k-labels-idx1-ubyte.gz", gzip.compress(b"ab", mtime=0), "is not an idx file of 1 axes, or is cut short"),
        ("train-labels-idx1-ubyte.gz", _idx(np.zeros(3, np.uint8)), r"shape \(400, 28, 28\), .* \(3,\)"),
        ("train-images-idx3-ubyte.gz", _idx(np.zeros((400, 5, 5), np.uint8)), r"shape \(400, 5, 5\)"),
    ],
    ids=["no gzip", "cut short", "too few labels", "small images"],  # bytes as names would differ by the second
)
def test_prepare_refuses_bad_mnist(file, data, match, tmp_path):
    (_mnist_archive(tmp_path / "archive") / file).write_bytes(data)
    with pytest.raises(ValueError, match=match):
        prepare_data.prepare("mnist", tmp_path / "out", tmp_path / "archive")


def test_prepare_refuses_absent_and_broken_archives(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        prepare_data.prepare("cifar10", tmp_path, tmp_path / "none.tar.gz")
    archive = _tar(tmp_path / "a.tar.gz", _cifar_files("cifar10"))
    _truncate(archive)
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


# --- augmentation --------------------------------------------------------------------------------------

# Compiled as a whole: op by op, every small step would compile on its own.
jit_augment = jax.jit(augment, static_argnums=(2, 3))


def _images(dtype, batch=12, height=7, width=5, channels=2):
    pixels = np.random.default_rng(3).integers(1, 256, (batch, height, width, channels), np.uint8)
    return jnp.asarray(pixels, dtype)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.float32])
def test_augment_is_a_crop_of_the_padded_image(dtype, flip):
    padding, images = 2, _images(dtype)
    out = np.asarray(jit_augment(jax.random.key(0), images, padding, flip))
    assert out.shape == images.shape
    assert out.dtype == images.dtype
    seen = set()
    for image, result in zip(np.asarray(images), out, strict=True):
        padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
        hits = [
            (y, x, mirrored)
            for y in range(2 * padding + 1)
            for x in range(2 * padding + 1)
            for mirrored in ((False, True) if flip else (False,))
            if np.array_equal(padded[y : y + 7, x : x + 5][:, :: -1 if mirrored else 1], result)
        ]
        assert len(hits) == 1
        seen.add(hits[0])
    assert len(seen) > 6


def test_augment_offsets_and_flips_are_uniform():
    batch, padding = 4000, 1
    images = np.zeros((batch, 3, 4, 1), np.uint8)
    images[:, 1, 1] = 1
    out = np.asarray(jit_augment(jax.random.key(5), jnp.asarray(images), padding, True))[..., 0]
    _, y, x = np.nonzero(out)
    # The dot is never cropped away; mirrored images show it one column to the right on average.
    assert len(y) == batch
    np.testing.assert_allclose(np.bincount(y) / batch, [1 / 3] * 3, atol=0.03)
    np.testing.assert_allclose(np.bincount(x) / batch, [1 / 6, 2 / 6, 2 / 6, 1 / 6], atol=0.03)


def test_augment_depends_on_the_key_and_not_on_the_batch():
    key, images = jax.random.key(1), _images(jnp.uint8)
    whole = jit_augment(key, images, 2, True)
    np.testing.assert_array_equal(whole, jit_augment(key, images, 2, True))
    np.testing.assert_array_equal(whole[:5], jit_augment(key, images[:5], 2, True))
    assert not np.array_equal(whole, jit_augment(jax.random.key(2), images, 2, True))


def test_augment_without_padding_or_flip_is_the_identity():
    images = _images(jnp.float32)
    np.testing.assert_array_equal(jit_augment(jax.random.key(0), images, 0, False), images)


@pytest.mark.parametrize(
    ("shape", "padding", "match"),
    [((4, 4, 1), 1, r"got shape \(4, 4, 1\)"), ((1, 4, 4, 1), -1, "padding must be at least 0, got -1")],
)
def test_augment_refuses(shape, padding, match):
    with pytest.raises(ValueError, match=match):
        jit_augment(jax.random.key(0), jnp.zeros(shape), padding, False)


def test_normalise_refuses_other_channel_counts():
    with pytest.raises(ValueError, match="images have 2 channels, got 1 means and 2 deviations"):
        normalise(_images(jnp.uint8), (0.5,), (0.5, 0.5))


def test_data_functions_need_no_rank_or_dtype_promotion():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        images = jit_augment(jax.random.key(0), _images(jnp.uint8), 1, True)
        jax.jit(lambda x: normalise(x, (0.5, 0.5), (0.2, 0.2)))(images)
        epoch_batches(jax.random.key(0), 10, 3)


def test_epoch_batches_is_a_permutation():
    batches = epoch_batches(jax.random.key(0), 103, 10)
    assert batches.shape == (10, 10)
    assert batches.dtype == jnp.int32
    flat = np.asarray(batches).ravel()
    assert len(set(flat.tolist())) == 100
    assert flat.min() >= 0
    assert flat.max() < 103
    assert not np.array_equal(batches, epoch_batches(jax.random.key(1), 103, 10))


@pytest.mark.parametrize(
    ("n", "batch_size", "match"),
    [(3, 4, "batch larger than the data: batch_size 4 > 3 images"), (3, 0, "at least 1, got 0")],
)
def test_epoch_batches_refuses(n, batch_size, match):
    with pytest.raises(ValueError, match=match):
        epoch_batches(jax.random.key(0), n, batch_size)
