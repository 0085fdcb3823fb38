"""The caller's own arrays become a data set, or are refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from spikernel_jax.data import Split, check_images, make_dataset


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
