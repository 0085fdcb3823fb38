"""Images: named data sets, checked arrays of the caller's own, and augmentation inside jit.

Splits are fixed, stratified by class and nested: they depend on the data alone, never on a run's seed.
"""

import dataclasses
import numbers
import os
from pathlib import Path
from typing import Any

import numpy as np

from spikernel_jax.data.augment import augment, cutout, epoch_batches, normalise
from spikernel_jax.data.image_folder import folder_info, read_image_folder
from spikernel_jax.data.mix import cutmix, mixup
from spikernel_jax.data.sources import DATASETS, DataNotFoundError, DatasetInfo, read_pools
from spikernel_jax.data.trivial import trivial_augment

__all__ = [
    "DATASETS",
    "DataNotFoundError",
    "Dataset",
    "DatasetInfo",
    "Split",
    "augment",
    "check_images",
    "cutmix",
    "cutout",
    "dataset_info",
    "epoch_batches",
    "load_dataset",
    "make_dataset",
    "mixup",
    "normalise",
    "trivial_augment",
]

# The split's own seed: it must not move with a run's seed, or two runs would compare different test sets.
_SPLIT_SEED = 20_240_229


@dataclasses.dataclass(frozen=True)
class Split:
    """Images with their labels.

    Attributes:
      images: uint8 [N, H, W, C], pixels 0..255.
      labels: int32 [N], classes 0..num_classes - 1.
    """

    images: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Three disjoint splits and what is needed to normalise them.

    Attributes:
      name: The registered name, or the caller's.
      train: Images to fit on.
      validation: Images to choose with, taken from the training images.
      test: Images to report on.
      num_classes: Number of classes.
      mean: Per-channel mean of pixel / 255, length C.
      std: Per-channel standard deviation of pixel / 255, length C.
      source: One line: where the images came from and how they were split, with counts.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape (H, W, C) of one image."""
        _, height, width, channels = self.train.images.shape
        return height, width, channels


def check_images(images: Any) -> None:
    """Checks that an array can be used as a batch of images.

    Args:
      images: Array [N, H, W, C], uint8 or floating point. Concrete: call this outside jit.

    Raises:
      ValueError: Another dtype, not four axes, no images (or an empty axis), a NaN or an infinity.
    """
    if isinstance(images, np.ma.MaskedArray):
        raise ValueError("images are a masked array: fill what is masked, or leave those images out")
    array = np.asarray(images)
    # jax's narrow floats (bfloat16) report kind "V" to NumPy, so they are recognised by name.
    floating = array.dtype.kind == "f" or array.dtype.name == "bfloat16"
    if array.dtype != np.uint8 and not floating:
        raise ValueError(f"images must be uint8 or floating point, got dtype {array.dtype}")
    if array.ndim != 4:
        raise ValueError(f"images must have shape [N, H, W, C], got shape {array.shape}")
    if array.size == 0:
        raise ValueError(f"there are no images in an array of shape {array.shape}")
    if floating:
        bad = int(array.size - np.count_nonzero(np.isfinite(array)))
        if bad:
            raise ValueError(f"images hold {bad} values that are NaN or infinite")


def make_dataset(name: str, train: Split, validation: Split, test: Split, num_classes: int) -> Dataset:
    """Builds a data set from the caller's arrays; mean and deviation come from the training images.

    Args:
      name: Any name.
      train: Training images, uint8 [N, H, W, C], labels of any integer dtype [N].
      validation: The same for validation.
      test: The same for test.
      num_classes: Number of classes; labels lie in 0..num_classes - 1.

    Returns:
      The checked data set, its labels as int32.

    Raises:
      ValueError: Images of another dtype, shape or count than described, labels out of range, splits whose
        images differ in shape, or a channel that never varies.

    Example:
      >>> import numpy as np
      >>> from spikernel_jax import make_dataset
      >>> from spikernel_jax.data import Split
      >>> rng = np.random.default_rng(0)
      >>> def split(n):
      ...     return Split(rng.integers(0, 256, (n, 8, 8, 1), dtype=np.uint8), rng.integers(0, 2, n))
      >>> make_dataset("noise", split(20), split(5), split(5), num_classes=2).image_shape
      (8, 8, 1)
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    train, validation, test = (
        _checked(split, f"{name} {field}", num_classes, np.shape(train.images)[1:])
        for field, split in (("train", train), ("validation", validation), ("test", test))
    )
    mean, std = _statistics(name, train.images)
    counts = f"{len(train.labels):,} train, {len(validation.labels):,} validation, {len(test.labels):,} test"
    return Dataset(name, train, validation, test, num_classes, mean, std, f"arrays given by the caller: {counts}")


def dataset_info(name: str) -> DatasetInfo:
    """What is known of a data set before it is read.

    Args:
      name: a key of `DATASETS`, or the path of a folder of images (`spikernel_jax.data.image_folder`).

    Raises:
      ValueError: if it is neither, or the folder is not laid out as it should be.
    """
    if name in DATASETS:
        return DATASETS[name]
    if Path(name).is_dir():
        return folder_info(name)
    known = ", ".join(sorted(DATASETS))
    raise ValueError(f"unknown data set {name!r}; known: {known}, or the path of a folder of images")


def load_dataset(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    validation: int | None = None,
    limit_train: int | None = None,
    limit_validation: int | None = None,
    limit_test: int | None = None,
    clip: bool = False,
) -> Dataset:
    """Loads a named data set, split in the same way on every call and every machine.

    Every split is shuffled and class-stratified once and for all, so the first n images of it (the limits)
    are nested and as balanced as n allows. Validation images are taken from the training images; the official
    test images (for `tiny_imagenet`, whose test labels are not public, the official val folder) are the test
    split. Official duplicates (CIFAR-100 has a few) are kept as they are.

    Args:
      name: A key of `DATASETS`, or the path of a folder of images.
      data_dir: Folder to look in; None means the environment's TFDS_DATA_DIR, else ~/tensorflow_datasets.
        Unused by the embedded set and by folders of images.
      validation: Number of validation images; None means the set's default share (10 %, or 1,000 for mnist5k).
        The order of the training images does not depend on it.
      limit_train: Keep only the first n training images.
      limit_validation: Keep only the first n validation images.
      limit_test: Keep only the first n test images.
      clip: Where a split has fewer images than its limit, take all of them instead of raising.

    Returns:
      The checked data set.

    Raises:
      DataNotFoundError: The data is not there; the message says how to get it. A ValueError.
      ValueError: Unknown name, a count out of range, or data that cannot be read.

    Example:
      >>> from spikernel_jax import load_dataset
      >>> data = load_dataset("mnist5k", limit_train=100)
      >>> data.train.images.shape, data.num_classes
      ((100, 28, 28, 1), 10)
    """
    info = dataset_info(name)
    root = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    pools = read_image_folder(info) if info.kind == "images" else read_pools(info, root)
    order = _stratified_order(pools.train.labels)
    if pools.test is None:
        order, test_order = order[: info.train_size], order[info.train_size :]
        test_pool = pools.train
    else:
        test_pool, test_order = pools.test, _stratified_order(pools.test.labels)
    if len(order) < 2:
        raise ValueError(f"{name} has {len(order)} training images, too few to hold some out for validation")
    default = max(1, round(len(order) * info.validation_fraction))
    held_out = _count("validation", validation, default, len(order) - 1)
    # Held out from the end: the training images keep their order whatever the size of the validation split.
    chosen = {
        "train": (pools.train, order[: len(order) - held_out], limit_train),
        "validation": (pools.train, order[len(order) - held_out :], limit_validation),
        "test": (test_pool, test_order, limit_test),
    }
    # All limits are checked before the first image is decoded.
    kept_by = {
        field: at[: _count(f"limit_{field}", min(limit, len(at)) if clip and limit else limit, len(at), len(at))]
        for field, (_, at, limit) in chosen.items()
    }
    splits, counts = {}, []
    for field, (pool, at, _) in chosen.items():
        kept = kept_by[field]
        split = Split(pool.fetch(kept), pool.labels[kept])
        splits[field] = _checked(split, f"{name} {field}", pools.num_classes, info.image_shape)
        counts.append(f"{len(kept):,} {field}" + (f" (of {len(at):,})" if len(kept) < len(at) else ""))
    source = f"{pools.origin}; stratified by class with a fixed seed: {', '.join(counts)}"
    mean, std = (info.mean, info.std) if info.mean else _statistics(name, splits["train"].images)
    return Dataset(name, **splits, num_classes=pools.num_classes, mean=mean, std=std, source=source)


def _count(field: str, value: int | None, default: int, high: int) -> int:
    """Returns `value`, or `default` for None, after checking that it is an integer in 1..high."""
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not 1 <= value <= high:
        raise ValueError(f"{field} must be a whole number from 1 to {high}, got {value!r}")
    return int(value)


def _checked(split: Split, what: str, num_classes: int, image_shape: tuple[int, ...]) -> Split:
    """Returns the split with int32 labels, or raises ValueError saying `what` is wrong."""
    try:
        check_images(split.images)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    images, labels = np.asarray(split.images), np.asarray(split.labels)
    if images.dtype != np.uint8:
        raise ValueError(f"{what}: images must be uint8 pixels, got dtype {images.dtype}")
    if images.shape[1:] != image_shape:
        raise ValueError(f"{what}: images must have shape {tuple(image_shape)}, got {images.shape[1:]}")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{what}: labels must be integers of shape {images.shape[:1]}, got {labels.dtype} {labels.shape}"
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"{what}: labels must lie in 0..{num_classes - 1}, got {labels.min()}..{labels.max()}")
    return Split(images, labels.astype(np.int32))


def _statistics(name: str, images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Exact per-channel mean and deviation of pixel / 255, by histogram: no float copy; ValueError where one is 0."""
    value = np.arange(256) / 255.0
    mean, std = [], []
    for channel in range(images.shape[-1]):
        share = np.bincount(images[..., channel].ravel(), minlength=256) / images[..., channel].size
        mean.append(float(share @ value))
        std.append(float(np.sqrt(share @ (value - mean[-1]) ** 2)) if np.count_nonzero(share) > 1 else 0.0)
    if 0.0 in std:
        raise ValueError(f"{name}: channel {std.index(0.0)} of the training images never varies")
    return tuple(mean), tuple(std)


def _stratified_order(labels: np.ndarray) -> np.ndarray:
    """Orders images so that every prefix holds the classes in their overall proportions.

    Image k (of c) in its class, in random order, sits at (k + 1/2) / c of the way; ties are broken at random.
    With classes of equal size the order is thus a round of all classes, each time in a fresh order.

    Args:
      labels: int32 [N].

    Returns:
      int64 [N], a permutation.
    """
    # NumPy freezes the raw output of bit generators, not what Generator's methods make of it.
    noise = np.random.PCG64(_SPLIT_SEED).random_raw(len(labels))
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        shuffled = members[np.argsort(noise[members], kind="stable")]
        place[shuffled] = (np.arange(len(members)) + 0.5) / len(members)
    # A second stream: within a class the first is already sorted, so as a tie-break it would not be random.
    tie = np.random.PCG64(_SPLIT_SEED + 1).random_raw(len(labels))
    return np.lexsort((tie, place))
