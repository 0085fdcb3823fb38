"""Augmentation is a crop of the padded image; an epoch is a permutation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spikernel_jax.data import augment, epoch_batches, normalise

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
