"""A stem that whitens: what its channels see, and that a training begins with it."""

import dataclasses

import jax
import numpy as np
import pytest

from small_training import CELL, CONFIG, SPEC, data, run
from spikernel_jax import make_dataset
from spikernel_jax.data import Dataset, Split
from spikernel_jax.snn import network
from spikernel_jax.training import loop, whitening
from spikernel_jax.training.recipe import TrainConfig
from spikernel_jax.training.whitening import whitened_stem

WHITENED = dataclasses.replace(CONFIG, stem_init="whitened")


def smooth_images(n: int = 200, side: int = 12) -> Dataset:
    """Images whose neighbouring pixels and whose channels are alike, as in photographs."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, side + 4, side + 4, 3)) + rng.normal(size=(n, side + 4, side + 4, 1))
    for axis in (1, 2):
        x = sum(np.take(x, range(shift, shift + side), axis) for shift in range(5))
    images = np.clip(128 + 12 * x, 0, 255).astype(np.uint8)
    split = Split(images, np.arange(n, dtype=np.int32) % 2)
    return make_dataset("smooth", split, split, split, num_classes=2)


def responses(kernel: np.ndarray, given: Dataset, stride: int) -> np.ndarray:
    """Of each channel to each whole patch, [N, C], by the definition of a convolution."""
    mean, std = np.asarray(given.mean), np.asarray(given.std)
    x = (given.train.images / 255.0 - mean) / std
    k, side = kernel.shape[0], x.shape[1]
    starts = range(0, side - k + 1, stride)
    patches = [x[:, top : top + k, left : left + k].reshape(len(x), -1) for top in starts for left in starts]
    return np.concatenate(patches) @ np.asarray(kernel, np.float64).reshape(-1, kernel.shape[-1])


@pytest.mark.parametrize("stride", [1, 2])
def test_channels_have_unit_variance_and_are_not_correlated(stride):
    given = smooth_images()
    kernel = np.asarray(whitened_stem(np.zeros((3, 3, 3, 60)), given, stride))
    seen = responses(kernel[..., :27], given, stride)
    second = seen.T @ seen / len(seen)
    # 5e-4 is added to each variance, and the last axes have little more.
    np.testing.assert_allclose(second - np.diag(np.diag(second)), 0, atol=0.02)
    assert (np.diag(second) < 1.01).all()
    np.testing.assert_allclose(np.diag(second)[:9], 1, atol=0.02)
    plain = responses(np.eye(27).reshape(3, 3, 3, 27), given, stride)
    assert abs(np.corrcoef(plain.T)[0, 1]) > 0.3  # so there was something to whiten


def test_each_channel_stands_beside_its_negative_and_others_stay():
    given, start = smooth_images(), np.random.default_rng(1).normal(size=(3, 3, 3, 60)).astype(np.float32)
    kernel = np.asarray(whitened_stem(start, given))
    np.testing.assert_array_equal(kernel[..., :27], -kernel[..., 27:54])
    np.testing.assert_array_equal(kernel[..., 54:], start[..., 54:])
    assert kernel.dtype == np.float32


def test_few_channels_take_the_axes_of_the_largest_variance():
    given = smooth_images()
    whole, few = (np.asarray(whitened_stem(np.zeros((3, 3, 3, c)), given)) for c in (60, 8))
    np.testing.assert_allclose(few[..., :4], whole[..., :4], rtol=1e-5)
    along = whole[..., :27] / np.linalg.norm(whole[..., :27].reshape(27, 27), axis=0)
    variances = responses(along, given, 1).var(0)
    assert (np.diff(variances) < 1e-6).all()


@pytest.mark.parametrize("one_program", [False, True])
def test_a_training_begins_with_it_and_with_nothing_else_changed(one_program):
    given = data()
    _, state = loop.begin(SPEC, CELL, given, WHITENED, 3, one_program=one_program)
    params, stats = network.init(jax.random.fold_in(jax.random.key(3), 0), SPEC, None if one_program else CELL)
    stem = whitened_stem(params["stem"]["kernel"], given, SPEC.stem_stride)
    assert (np.asarray(stem) != np.asarray(params["stem"]["kernel"])).any()
    wanted = params | {"stem": params["stem"] | {"kernel": stem}}
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.stats), (wanted, stats))


def test_what_a_training_is_begun_with_is_not_whitened():
    given, start = data(), run()
    _, state = loop.begin(SPEC, CELL, given, WHITENED, 0, one_program=False, start=start)
    jax.tree.map(np.testing.assert_array_equal, state.params, start.params)


def test_only_training_images_are_looked_at():
    given, rng = smooth_images(), np.random.default_rng(2)
    other = Split(rng.integers(0, 256, given.test.images.shape, np.uint8), given.test.labels)
    changed = dataclasses.replace(given, validation=other, test=other)
    kernel = np.zeros((3, 3, 3, 8))
    np.testing.assert_array_equal(whitened_stem(kernel, given), whitened_stem(kernel, changed))


@pytest.mark.parametrize("stride", [1, 2])
def test_a_bounded_number_of_patches_is_looked_at(stride, monkeypatch):
    given = smooth_images()
    of_an_image = 10**2 if stride == 1 else 5**2
    monkeypatch.setattr(whitening, "_PATCHES", 20 * of_an_image + 1)
    first = dataclasses.replace(given, train=Split(given.train.images[:20], given.train.labels[:20]))
    bounded, of_20 = (whitened_stem(np.zeros((3, 3, 3, 8)), some, stride) for some in (given, first))
    np.testing.assert_array_equal(bounded, of_20)
    monkeypatch.undo()
    assert not np.array_equal(bounded, whitened_stem(np.zeros((3, 3, 3, 8)), given, stride))


@pytest.mark.parametrize(("channels", "side"), [(1, 12), (8, 2)])
def test_a_stem_that_cannot_whiten_is_one_line(channels, side):
    with pytest.raises(ValueError, match=rf"channels={channels} and images of {side}x{side}: want 2 channels or more"):
        whitened_stem(np.zeros((3, 3, 3, channels)), smooth_images(side=side))


def test_another_beginning_is_one_line():
    with pytest.raises(ValueError, match="stem_init='zero' is unknown; known: random, whitened"):
        TrainConfig(stem_init="zero")
