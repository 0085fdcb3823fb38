"""A folder of images as a data set: what is read, how it is split, and what is refused."""

import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from spikernel_jax.data import dataset_info, load_dataset

CLASSES = ("ant", "bee", "cat")


def write(folder: Path, counts: dict[str, int], shape: tuple[int, ...] = (12, 10, 3), ending: str = "png") -> None:
    """Images whose first pixel's red is 10 times their number in the class, and green the class."""
    for label, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            image = np.random.default_rng([label, i]).integers(0, 255, shape, np.uint8)
            if len(shape) == 3:
                image[0, 0] = (7, label, 10 * i)  # OpenCV writes blue first
            cv2.imwrite(str(folder / name / f"{i:02d}.{ending}"), image)


def test_a_fifth_is_set_apart_for_testing(tmp_path):
    write(tmp_path / "all", dict.fromkeys(CLASSES, 20))
    data = load_dataset(str(tmp_path / "all"), validation=6)
    assert [len(split.labels) for split in (data.train, data.validation, data.test)] == [42, 6, 12]
    assert data.num_classes == 3
    assert data.image_shape == (12, 10, 3)
    for split, each in ((data.train, 14), (data.validation, 2), (data.test, 4)):
        assert np.bincount(split.labels).tolist() == [each] * 3
        assert (split.images[:, 0, 0, 1] == split.labels).all()  # pixels belong to their labels
        assert (split.images[:, 0, 0, 2] == 7).all()
    seen = [tuple(x[0, 0]) for split in (data.train, data.validation, data.test) for x in split.images]
    assert len(set(seen)) == 60  # no image twice
    np.testing.assert_allclose(data.mean, data.train.images.mean((0, 1, 2)) / 255)
    np.testing.assert_allclose(data.std, data.train.images.std((0, 1, 2)) / 255)
    again = load_dataset(str(tmp_path / "all"), validation=6)
    np.testing.assert_array_equal(again.test.images, data.test.images)


def test_a_test_folder_is_the_test_split(tmp_path):
    write(tmp_path / "own" / "train", dict.fromkeys(CLASSES, 6), (9, 9), "bmp")
    write(tmp_path / "own" / "test", {"ant": 2, "bee": 3, "cat": 4}, (9, 9), "bmp")
    data = load_dataset(str(tmp_path / "own"))
    assert np.bincount(data.test.labels).tolist() == [2, 3, 4]
    assert len(data.train.labels) + len(data.validation.labels) == 18
    assert data.image_shape == (9, 9, 1)
    assert dataset_info(str(tmp_path / "own")).flip is False


@pytest.mark.parametrize(
    ("counts", "words"),
    [({}, "has 0 folders of images"), ({"ant": 3}, "has 1 folders"), ({"ant": 3, "bee": 1}, "bee has 1 images")],
)
def test_other_layouts_are_refused(counts, words, tmp_path):
    (tmp_path / "own").mkdir()
    write(tmp_path / "own", counts)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        load_dataset(str(tmp_path / "own"))
    assert "a folder per class" in str(error.value)
    assert "\n" not in str(error.value)


def test_images_of_other_sizes_and_broken_ones_are_named(tmp_path):
    write(tmp_path / "own", dict.fromkeys(CLASSES, 5))
    small = tmp_path / "own" / "bee" / "03.png"
    cv2.imwrite(str(small), np.zeros((5, 10, 3), np.uint8))
    with pytest.raises(ValueError, match=r"03\.png has shape \(5, 10\), expected \(12, 10\)"):
        load_dataset(str(tmp_path / "own"))
    small.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"03\.png is truncated or not an image"):
        load_dataset(str(tmp_path / "own"))
    write(tmp_path / "large", dict.fromkeys(CLASSES, 2), (300, 300))
    with pytest.raises(ValueError, match="has 300x300 pixels; want at most 256 per side"):
        load_dataset(str(tmp_path / "large"))
    write(tmp_path / "split" / "train", dict.fromkeys(CLASSES, 2))
    write(tmp_path / "split" / "test", {"ant": 2, "dog": 2})
    with pytest.raises(ValueError, match=r"test has the classes \['ant', 'dog'\]; want those of"):
        load_dataset(str(tmp_path / "split"))
    with pytest.raises(ValueError, match="or the path of a folder of images"):
        load_dataset(str(tmp_path / "absent"))
