"""Cutout, mixup, cutmix and TrivialAugment against their definitions and, where it has them, against Pillow."""

import collections
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps  # matplotlib requires Pillow

from spikernel_jax.data import cutmix, cutout, mixup, trivial_augment
from spikernel_jax.data.trivial import OPERATIONS, STRENGTHS, apply_operations

TRACES = collections.Counter()


def _jit(function, static=()):
    """Compiles as a whole (op by op, every small step would compile on its own) and counts how often."""

    @functools.wraps(function)
    def counted(*args):
        TRACES[function] += 1
        return function(*args)

    return jax.jit(counted, static_argnums=static)


jit_cutout = _jit(cutout, 2)
jit_mixup = _jit(mixup, 3)
jit_cutmix = _jit(cutmix, 3)
jit_trivial = _jit(trivial_augment)
jit_apply = _jit(apply_operations)

MIXUP_ALPHA = 0.4


@pytest.fixture(autouse=True)
def _without_promotion():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


def _images(batch, height, width, channels, seed=3, low=0):
    return np.random.default_rng(seed).integers(low, 256, (batch, height, width, channels), np.uint8)


# --- cutout --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "side"), [(jnp.uint8, 1), (jnp.uint8, 2), (jnp.float32, 3), (jnp.bfloat16, 3), (jnp.uint8, 40)]
)
def test_cutout_blackens_one_square_about_a_pixel(dtype, side):
    images = jnp.asarray(_images(60, 6, 5, 3, low=1), dtype)
    out = jit_cutout(jax.random.key(0), images, side)
    assert out.shape == images.shape
    assert out.dtype == dtype
    seen = set()
    for image, result in zip(np.asarray(images), np.asarray(out), strict=True):
        hits = set()
        for y, x in itertools.product(range(6), range(5)):
            expected = image.copy()
            top, left = y - side // 2, x - side // 2
            expected[max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = 0
            if np.array_equal(expected, result):
                hits.add((y, x))
        assert hits
        seen |= hits
    assert len(seen) > 20


def test_cutout_centres_are_uniform():
    out = np.asarray(jit_cutout(jax.random.key(2), jnp.ones((6000, 2, 3, 1), jnp.uint8), 1))
    np.testing.assert_allclose(1 - out.mean(0)[..., 0], np.full((2, 3), 1 / 6), atol=0.02)


def test_cutout_depends_on_the_key_and_not_on_the_batch():
    key, images = jax.random.key(1), jnp.asarray(_images(12, 8, 8, 1, low=1))
    whole = jit_cutout(key, images, 4)
    np.testing.assert_array_equal(whole[:5], jit_cutout(key, images[:5], 4))
    assert not np.array_equal(whole, jit_cutout(jax.random.key(2), images, 4))


def test_cutout_of_side_0_is_the_identity_and_of_a_single_pixel_is_black():
    images = jnp.asarray(_images(3, 4, 4, 2))
    np.testing.assert_array_equal(jit_cutout(jax.random.key(0), images, 0), images)
    assert not jit_cutout(jax.random.key(0), jnp.ones((2, 1, 1, 1)), 1).any()


@pytest.mark.parametrize(
    ("shape", "side", "match"),
    [((4, 4, 1), 1, r"got shape \(4, 4, 1\)"), ((1, 4, 4, 1), -1, "side must be at least 0, got -1")],
)
def test_cutout_refuses(shape, side, match):
    with pytest.raises(ValueError, match=match):
        jit_cutout(jax.random.key(0), jnp.zeros(shape), side)


# --- mixup and cutmix ----------------------------------------------------------------------------------


def _tagged(batch, height=8, width=6, channels=2, dtype=jnp.float32):
    """Image i is i everywhere and its target the i-th unit vector, so results tell who went into them."""
    images = jnp.broadcast_to(jnp.arange(batch, dtype=dtype)[:, None, None, None], (batch, height, width, channels))
    return images, jnp.eye(batch, dtype=jnp.float32)


def _partners(targets):
    """Partner and own share of every row of mixed unit vectors."""
    own = np.diag(targets)
    others = targets - np.diag(own)
    return np.where(others.max(1) > 0, others.argmax(1), np.arange(len(targets))), own


@pytest.mark.parametrize("seed", range(6))
def test_mixup_blends_images_and_targets_by_one_share(seed):
    images, targets = _tagged(7)
    mixed, mixed_targets = map(np.asarray, jit_mixup(jax.random.key(seed), images, targets, MIXUP_ALPHA))
    partner, own = _partners(mixed_targets)
    assert sorted(partner) == list(range(7))
    paired = partner != np.arange(7)
    share = own[paired][0]
    assert 0 < share < 1
    np.testing.assert_allclose(own, np.where(paired, share, 1), atol=1e-6)
    np.testing.assert_allclose(mixed_targets.sum(1), 1, atol=1e-6)
    expected = share * np.arange(7) + (1 - share) * partner
    np.testing.assert_allclose(mixed, np.broadcast_to(expected[:, None, None, None], mixed.shape), atol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_cutmix_pastes_one_box_and_mixes_targets_by_its_area(seed):
    images, targets = _tagged(7, dtype=jnp.uint8)
    mixed, mixed_targets = map(np.asarray, jit_cutmix(jax.random.key(seed), images, targets, 1.0))
    assert mixed.dtype == np.uint8
    partner, own = _partners(mixed_targets)
    paired = partner != np.arange(7)
    boxes = (mixed != np.asarray(images))[paired]
    assert len(boxes) > 0
    assert (boxes == boxes[:1, :, :, :1]).all()
    box = boxes[0, :, :, 0]
    rows, columns = np.flatnonzero(box.any(1)), np.flatnonzero(box.any(0))
    assert box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    np.testing.assert_allclose(own[paired], 1 - box.sum() / box.size, atol=1e-6)
    expected = np.where(box[None, :, :, None], partner[:, None, None, None], np.asarray(images))
    np.testing.assert_array_equal(mixed, expected)


def _own_shares(mix, images, targets, alpha, draws=1500):
    """The share of its own target that is left in each of many draws' first paired image."""
    shares = []
    for key in jax.random.split(jax.random.key(0), draws):
        partner, own = _partners(np.asarray(mix(key, images, targets, alpha)[1]))
        shares.extend(own[partner != np.arange(len(own))][:1])
    return np.array(shares)


def test_mixup_shares_follow_the_beta_distribution():
    # The mean of Beta(a, a) is 1/2 and its variance 1 / (4 (2 a + 1)). Shares of 1 leave no trace, but are rare.
    share = _own_shares(jit_mixup, *_tagged(7), MIXUP_ALPHA)
    assert len(share) > 1400
    assert abs(share.mean() - 0.5) < 0.03
    assert abs(share.var() * 4 * (2 * MIXUP_ALPHA + 1) - 1) < 0.1


def test_cutmix_boxes_have_the_size_the_share_asks_for():
    # Alpha 1: shares are uniform. The expected area is the mean over shares and centres of what the clip leaves.
    pasted = 1 - _own_shares(jit_cutmix, *_tagged(7, dtype=jnp.uint8), 1.0)
    part = np.sqrt((np.arange(1000) + 0.5) / 1000)
    area = np.ones(1000)
    for length in (8, 6):
        size = np.floor(length * part).astype(int)[:, None]
        start = np.arange(length) - size // 2
        area *= (np.minimum(start + size, length) - np.maximum(start, 0)).mean(1) / length
    assert abs(pasted.mean() - area[area > 0].mean()) < 0.02


def test_cutmix_of_single_pixels_takes_all_or_nothing():
    # An alpha whose draws are 0 or 1 to all digits: the box is the pixel or empty.
    images, targets = _tagged(4, 1, 1, 1)
    swapped = []
    for seed in range(12):
        mixed, mixed_targets = map(np.asarray, jit_cutmix(jax.random.key(seed), images, targets, 1e-3))
        partner = mixed[:, 0, 0, 0].astype(int)
        np.testing.assert_array_equal(mixed_targets, np.eye(4)[partner])
        assert sorted(partner) == list(range(4))
        swapped.append((partner != np.arange(4)).any())
    assert 0 < sum(swapped) < 12


@pytest.mark.parametrize("mix", [mixup, cutmix])
@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan, math.inf])
def test_mixing_refuses_alpha(mix, alpha):
    with pytest.raises(ValueError, match=f"alpha must be a positive finite number, got {alpha}"):
        mix(jax.random.key(0), *_tagged(2), alpha)


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_mixing_refuses_arrays(mix):
    images, targets = _tagged(3)
    with pytest.raises(ValueError, match=r"images must have shape \[B, H, W, C\], got shape \(8, 6, 2\)"):
        mix(jax.random.key(0), images[0], targets, 1.0)
    with pytest.raises(ValueError, match=r"targets must have shape \[3, K\], one row an image, got shape \(2, 3\)"):
        mix(jax.random.key(0), images, targets[:2], 1.0)
    with pytest.raises(ValueError, match="targets must be floating point class probabilities, got dtype int32"):
        mix(jax.random.key(0), images, targets.astype(jnp.int32), 1.0)


def test_mixup_refuses_integer_pixels():
    images, targets = _tagged(3, dtype=jnp.uint8)
    with pytest.raises(ValueError, match="images must be floating point to be blended, got dtype uint8"):
        mixup(jax.random.key(0), images, targets, 1.0)


# --- TrivialAugment ------------------------------------------------------------------------------------


def _settings(name):
    """Every strength of an operation, with both signs."""
    strength, negative = np.divmod(np.arange(2 * STRENGTHS, dtype=np.int32), 2)
    return np.full_like(strength, OPERATIONS.index(name)), strength, negative


def _transformed(name, images):
    """Each of 2 * STRENGTHS images under one strength and sign."""
    return np.asarray(jit_apply(jnp.asarray(images), *_settings(name)))


def _pillow(name, pixels, strength, negative):
    """TorchVision's TrivialAugmentWide on a Pillow image."""
    image = Image.fromarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0])
    s = strength / 30 * (-1 if negative else 1)
    moved = int(32 * s)
    if name in ("brightness", "color", "contrast", "sharpness"):
        image = getattr(ImageEnhance, name.title())(image).enhance(1 + 0.99 * s)
    elif name == "posterize":
        image = ImageOps.posterize(image, 8 - round(strength / 5))
    elif name == "solarize":
        image = ImageOps.solarize(image, 255 - 8.5 * strength)  # pyright: ignore[reportArgumentType]
    elif name in ("autocontrast", "equalize"):
        image = getattr(ImageOps, name)(image)
    elif name == "rotate":
        image = image.rotate(135 * s, Image.Resampling.NEAREST)
    elif name != "identity":
        matrix = {
            "shear_x": (1, 0.99 * s, 0, 0, 1, 0),
            "shear_y": (1, 0, 0, 0.99 * s, 1, 0),
            "translate_x": (1, 0, -moved, 0, 1, 0),
            "translate_y": (1, 0, 0, 0, 1, -moved),
        }[name]
        image = image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)
    return np.asarray(image).reshape(pixels.shape)


def _cases(shape):
    """Noise of every range, so that stretching and equalizing have work, and smooth images."""
    batch = 2 * STRENGTHS
    images = _images(batch, *shape).astype(int)
    low = np.random.default_rng(1).integers(0, 120, (batch, 1, 1, shape[-1]))
    high = low + np.random.default_rng(2).integers(0, 136, (batch, 1, 1, shape[-1]))
    images[::2] = (low + images * (high - low) // 255)[::2]
    y, x = np.mgrid[: shape[0], : shape[1]]
    images[1::4] = ((3 * y + 5 * x) % 256)[None, :, :, None]
    return images.astype(np.uint8)


SHAPES = [(28, 28, 1), (19, 40, 3)]
INEXACT = ("brightness", "color", "contrast", "sharpness", "autocontrast")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in INEXACT])
def test_trivial_is_pillows_to_the_pixel(name, shape):
    images = _cases(shape)
    expected = [_pillow(name, image, s, n) for image, s, n in zip(images, *_settings(name)[1:], strict=True)]
    np.testing.assert_array_equal(_transformed(name, images), np.stack(expected))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", INEXACT)
def test_trivial_is_pillows_but_for_whole_numbers(name, shape):
    # Pillow truncates a floating-point value, which for a result that is a whole number may be just below it.
    images = _cases(shape)
    expected = np.stack([_pillow(name, im, s, n) for im, s, n in zip(images, *_settings(name)[1:], strict=True)])
    above = _transformed(name, images).astype(int) - expected
    assert above.min() >= 0
    assert above.max() <= 1
    assert (above == 0).mean() > 0.95
    if name == "brightness":
        _, strength, negative = _settings(name)
        thousandths = (1000 + 33 * strength * (1 - 2 * negative))[:, None, None, None] * images.astype(int)
        assert (thousandths[above == 1] % 1000 == 0).all()


def test_trivial_by_its_definition():
    # Independent of Pillow; strengths chosen so that results can be said in one line.
    pixels = _images(1, 12, 12, 3)[0]
    grey = (pixels @ np.array([19595, 38470, 7471]) + 32768) >> 16

    def shifted(y, x):
        return np.pad(pixels, ((y, 0), (x, 0), (0, 0)))[:12, :12]

    cases: list[tuple[str, int, int, np.ndarray]] = [
        ("translate_x", 3, 0, shifted(0, 3)),
        ("translate_y", 10, 0, shifted(10, 0)),
        ("translate_x", 3, 1, np.pad(pixels, ((0, 0), (0, 3), (0, 0)))[:, 3:]),
        ("translate_y", 30, 1, np.zeros_like(pixels)),
        ("rotate", 20, 0, np.rot90(pixels)),
        ("rotate", 20, 1, np.rot90(pixels, -1)),
        ("brightness", 30, 1, pixels // 100),
        ("brightness", 30, 0, np.minimum(pixels * 199.0001 // 100, 255)),
        ("color", 30, 1, (99 * grey[..., None] + pixels.astype(int)) // 100),
        ("contrast", 30, 1, (99 * math.floor(grey.mean() + 0.5) + pixels.astype(int)) // 100),
        ("posterize", 30, 0, pixels & 0b11000000),
        ("solarize", 30, 0, 255 - pixels),
        ("solarize", 10, 1, np.where(pixels < 170, pixels, 255 - pixels)),
    ]
    names, strength, negative, expected = zip(*cases, strict=True)
    operation = jnp.array([OPERATIONS.index(name) for name in names])
    batch = jnp.asarray(np.stack([pixels] * len(cases)))
    out = jit_apply(batch, operation, jnp.array(strength), jnp.array(negative))
    for name, result, wanted in zip(names, np.asarray(out), expected, strict=True):
        np.testing.assert_array_equal(result, wanted, err_msg=name)


def test_trivial_stretches_to_the_full_range():
    levels = np.array([50, 60, 70, 150], np.uint8)
    image = jnp.asarray(np.tile(levels, 255)[None, :, None, None])
    operation = jnp.array([OPERATIONS.index("autocontrast")]), jnp.array([OPERATIONS.index("equalize")])
    zero = jnp.zeros(1, jnp.int32)
    np.testing.assert_array_equal(np.unique(jit_apply(image, operation[0], zero, zero)), [0, 25, 51, 255])
    # Equal counts: levels end up evenly spaced.
    np.testing.assert_array_equal(np.unique(jit_apply(image, operation[1], zero, zero)), [0, 85, 170, 255])


def test_trivial_draws_every_setting_equally_often():
    batch = 14 * 1000
    pixels = _images(1, 6, 6, 1, seed=8)
    out = np.asarray(jit_trivial(jax.random.key(4), jnp.asarray(np.repeat(pixels, batch, 0))))
    settings = np.stack(np.meshgrid(range(14), range(STRENGTHS), range(2), indexing="ij")).reshape(3, -1)
    every = np.asarray(jit_apply(jnp.asarray(np.repeat(pixels, settings.shape[1], 0)), *jnp.asarray(settings)))
    # How often a result should come up: as often as settings lead to it.
    results, setting_of = np.unique(every.reshape(len(every), -1), axis=0, return_inverse=True)
    expected = np.bincount(setting_of) / len(every)
    index = {row.tobytes(): i for i, row in enumerate(results)}
    seen = np.bincount([index[row.tobytes()] for row in out.reshape(batch, -1)], minlength=len(results)) / batch
    assert (seen > 0).all()
    error = np.sqrt(expected * (1 - expected) / batch)
    assert (np.abs(seen - expected) < 5 * error).all()
    # Pearson's statistic over the results has as many degrees of freedom as results, about.
    statistic = (batch * (seen - expected) ** 2 / expected).sum()
    assert abs(statistic - len(results)) < 5 * math.sqrt(2 * len(results))


def test_trivial_depends_on_the_key_and_not_on_the_batch():
    key, images = jax.random.key(1), jnp.asarray(_images(30, 9, 7, 3))
    whole = np.asarray(jit_trivial(key, images))
    np.testing.assert_array_equal(whole[:8], jit_trivial(key, images[:8]))
    # Nor on the other images of the batch.
    np.testing.assert_array_equal(whole[:15], jit_trivial(key, images.at[15:].set(7))[:15])
    assert not np.array_equal(whole, jit_trivial(jax.random.key(2), images))


@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 2, 3), (1, 9, 1)], ids=str)
def test_trivial_takes_any_shape(shape):
    pixels = _images(1, *shape, low=1)
    settings = np.stack(np.meshgrid(range(14), range(STRENGTHS), range(2), indexing="ij")).reshape(3, -1)
    out = np.asarray(jit_apply(jnp.asarray(np.repeat(pixels, settings.shape[1], 0)), *jnp.asarray(settings)))
    assert out.shape == (settings.shape[1], *shape)
    assert out.dtype == np.uint8
    for name, s, n, result in zip(np.array(OPERATIONS)[settings[0]], *settings[1:], out, strict=True):
        expected = _pillow(name, pixels[0], int(s), int(n))
        np.testing.assert_allclose(result.astype(int), expected, atol=1 if name in INEXACT else 0, err_msg=name)


@pytest.mark.parametrize(
    ("shape", "dtype", "match"),
    [
        ((4, 4, 3), jnp.uint8, r"images must have shape \[B, H, W, C\], got shape \(4, 4, 3\)"),
        ((1, 4, 4, 3), jnp.float32, "images must be uint8 pixels, got dtype float32"),
        ((1, 4, 4, 2), jnp.uint8, "images must have 1 or 3 channels, got 2"),
        ((1, 4, 2049, 1), jnp.uint8, r"at most 2048 pixels a side, got shape \(1, 4, 2049, 1\)"),
    ],
)
def test_trivial_refuses(shape, dtype, match):
    with pytest.raises(ValueError, match=match):
        trivial_augment(jax.random.key(0), jnp.zeros(shape, dtype))


# --- all -----------------------------------------------------------------------------------------------


def test_another_key_is_no_other_trace():
    # Shapes of tests above: nothing new is compiled here.
    pixels = jnp.asarray(_images(30, 9, 7, 3))

    def run(key):
        jit_cutout(key, jnp.ones((2, 1, 1, 1)), 1)
        jit_mixup(key, *_tagged(7), MIXUP_ALPHA)
        jit_cutmix(key, *_tagged(7, dtype=jnp.uint8), 1.0)
        jit_trivial(key, pixels)

    run(jax.random.key(0))
    before = dict(TRACES)
    run(jax.random.key(1))
    assert before.keys() >= {cutout, mixup, cutmix, trivial_augment}
    assert before == TRACES
