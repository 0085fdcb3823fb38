"""A data set of the user's own: a folder of image files, a folder per class.

Either ``PATH/CLASS/*.png``, from which a fifth of every class is set apart for testing, or ``PATH/train/CLASS`` and
``PATH/test/CLASS``. PNG, JPEG or BMP files, all of one size; grey where the first one is.
"""

import functools
from pathlib import Path

import numpy as np

from spikernel_jax.data.sources import DatasetInfo, Pool, Pools, decode

_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp")
_SPLITS = ("train", "test")
_TEST_FRACTION = 0.2
_LARGEST_SIDE = 256
_LAYOUT = "want a folder per class with PNG, JPEG or BMP files in each, or train/ and test/ with such folders"


def _classes(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _listed(folder: Path, classes: list[str]) -> tuple[list[Path], np.ndarray]:
    """Paths and labels of a folder's images; ValueError where a class has none."""
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        inside = (folder / name).iterdir() if (folder / name).is_dir() else ()
        # Sorted, because the order of a folder's listing differs between file systems.
        own = sorted(path for path in inside if path.suffix.lower() in _ENDINGS)
        if len(own) < 2:
            raise ValueError(f"{folder / name} has {len(own)} images; {_LAYOUT}, at least 2 of each class")
        paths += own
        labels += [label] * len(own)
    return paths, np.array(labels, np.int32)


def _layout(root: Path) -> tuple[Path, Path | None, list[str]]:
    """Folders of the images to train on and to test on (None: set apart), and the names of the classes."""
    split = all((root / name).is_dir() for name in _SPLITS)
    train, test = (root / "train", root / "test") if split else (root, None)
    classes = _classes(train)
    if len(classes) < 2:
        raise ValueError(f"{train} has {len(classes)} folders of images; {_LAYOUT}, at least 2 of them")
    if test is not None and (other := _classes(test)) != classes:
        raise ValueError(f"{test} has the classes {other}; want those of {train}: {classes}")
    return train, test, classes


@functools.cache
def folder_info(name: str) -> DatasetInfo:
    """What a folder holds, by its listing and its first image.

    Args:
      name: its path, which is the data set's name.

    Raises:
      ValueError: naming the folder, if it is not laid out as this module says or its first image cannot be used.
    """
    import cv2

    train, test, classes = _layout(Path(name))
    paths, _ = _listed(train, classes)
    first = cv2.imdecode(np.frombuffer(paths[0].read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED)
    if first is None:
        raise ValueError(f"{paths[0]} is truncated or not an image")
    height, width = first.shape[:2]
    if max(height, width) > _LARGEST_SIDE:
        size = f"{height}x{width} pixels; want at most {_LARGEST_SIDE} per side"
        raise ValueError(f"{paths[0]} has {size}: scale all images down")
    held_out = 0 if test is not None else max(1, round(_TEST_FRACTION * len(paths)))
    return DatasetInfo(
        name,
        "images",
        "",
        (height, width, 1 if first.ndim == 2 else 3),
        len(classes),
        mean=(),
        std=(),
        statistics="its own training images",
        padding=max(1, min(height, width) // 8),
        flip=False,
        train_size=len(paths) - held_out,
        test_size=held_out or len(_listed(test or train, classes)[0]),
        validation_fraction=0.1,
        how_to_get=_LAYOUT,
    )


def read_image_folder(info: DatasetInfo) -> Pools:
    """Labels of a folder's images, and access to their pixels; errors as `folder_info`."""
    train, test, classes = _layout(Path(info.name))

    def pool(folder: Path) -> Pool:
        paths, labels = _listed(folder, classes)

        def fetch(indices: np.ndarray) -> np.ndarray:
            return decode(lambda i: paths[i].read_bytes(), lambda i: str(paths[i]), info.image_shape, indices)

        return Pool(labels, fetch)

    origin = f"folder {Path(info.name).name}, {len(classes)} classes, flips are not made, " + (
        "test images from its test folder" if test is not None else "a fifth of the images set apart for testing"
    )
    return Pools(pool(train), None if test is None else pool(test), len(classes), origin)
