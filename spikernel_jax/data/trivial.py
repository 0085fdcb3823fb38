"""TrivialAugment for a whole batch at once, in integers: the same result on every device.

Each image of a batch wants another operation. Under vmap a switch runs every branch on every image, so the
operations are grouped by what they are: one nearest-neighbour warp (the geometric ones), one table of 256 values
per image and channel, one blend with a degenerate image. What an image does not want is its group's identity.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from spikernel_jax.data.augment import bits_by_image, require_batch

OPERATIONS = (
    "identity",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)
STRENGTHS = 31

# Beyond it the sums below (16.16 coordinates, pixel sums of an image) leave 32 bits.
_MAX_SIDE = 2048


def trivial_augment(key: jax.Array, images: jax.Array) -> jax.Array:
    """Changes every image by one random operation (TrivialAugment, wide; Müller & Hutter 2021, arXiv:2103.10158).

    Operation, strength and sign are uniform over `OPERATIONS`, `STRENGTHS` bins and two. The result for image i
    depends on `key` and i alone, not on the size of the batch.

    Args:
      key: PRNG key; image i uses `jax.random.fold_in(key, i)`.
      images: uint8 [B, H, W, C], C = 1 or 3, sides up to 2,048 pixels.

    Returns:
      uint8 [B, H, W, C].

    Raises:
      ValueError: Another dtype, number of axes or channels, or larger images.
    """
    _check(images)
    bits = bits_by_image(key, len(images), 3)
    operation_B, strength_B, negative_B = (
        (bits[:, i] % jnp.uint32(n)).astype(jnp.int32) for i, n in enumerate((len(OPERATIONS), STRENGTHS, 2))
    )
    return apply_operations(images, operation_B, strength_B, negative_B)


def apply_operations(
    images: jax.Array, operation_B: jax.Array, strength_B: jax.Array, negative_B: jax.Array
) -> jax.Array:
    """Applies to every image its operation of `OPERATIONS`.

    Strength 0 is the weakest of `STRENGTHS` evenly spaced ones, s = strength / 30 below. What each does, with
    positive sign (a negative one swaps the directions and lowers the factors):

    - shear_x, shear_y: reads the pixel 0.99 s y to the right (0.99 s x below); the upper left corner stays.
    - translate_x, translate_y: moves by 32 s pixels, rounded down, to the right (down).
    - rotate: by 135 s degrees, counter-clockwise about the centre.
    - brightness, color, contrast, sharpness: moves away, by a factor of 1 + 0.99 s, from black, from the grey
      image, from its mean, from the smoothed image. Color leaves single-channel images alone.
    - posterize: keeps 8 - round(6 s) bits. No sign.
    - solarize: inverts pixels from 255 - 255 s upwards. No sign.
    - autocontrast, equalize: each channel over its full range, or to a flat histogram. No strength, no sign.

    Ranges and meaning are torchvision's `TrivialAugmentWide` on Pillow images, black where nothing is known. Pillow
    blends and stretches in floating point, where a result that is a whole number may come out one below.

    Args:
      images: uint8 [B, H, W, C], C = 1 or 3, sides up to 2,048 pixels.
      operation_B: int32 [B], indices into `OPERATIONS`.
      strength_B: int32 [B], 0..STRENGTHS - 1.
      negative_B: int32 [B], 1 for a negative sign, 0 for a positive one.

    Returns:
      uint8 [B, H, W, C].

    Raises:
      ValueError: Another dtype, number of axes or channels, or larger images.
    """
    _check(images)
    warped = _warp(jnp.asarray(images), operation_B, strength_B, negative_B).astype(jnp.int32)
    mapped = _map(warped, operation_B, strength_B)
    return _blend(mapped, operation_B, strength_B, negative_B).astype(jnp.uint8)


def _check(images: jax.Array) -> None:
    """Raises ValueError for images that this module does not take."""
    require_batch(images)
    if images.dtype != jnp.uint8:
        raise ValueError(f"images must be uint8 pixels, got dtype {images.dtype}")
    if images.shape[-1] not in (1, 3):
        raise ValueError(f"images must have 1 or 3 channels, got {images.shape[-1]}")
    if max(images.shape[1:3]) > _MAX_SIDE:
        raise ValueError(f"images must be at most {_MAX_SIDE} pixels a side, got shape {images.shape}")


def _is(operation_B: jax.Array, name: str) -> jax.Array:
    """Marks, as bool [B, 1, 1, 1], the images whose operation has this name."""
    return (operation_B == OPERATIONS.index(name))[:, None, None, None]


def _coefficients(height: int, width: int) -> np.ndarray:
    """Tabulates where warps read: int32 [operations, strengths, signs, 6], 16.16 fixed point as in Pillow.

    Output pixel (x, y) is read at (c0 x + c1 y + c2, c3 x + c4 y + c5), whole parts taken: pixel centres lie at
    halves, so truncation is rounding to the nearest.
    """
    table = np.empty((len(OPERATIONS), STRENGTHS, 2, 2, 3))
    table[...] = [[1, 0, 0], [0, 1, 0]]
    for strength in range(STRENGTHS):
        s = strength / (STRENGTHS - 1)
        pixels, angle = 32 * strength // (STRENGTHS - 1), math.radians(135 * s)
        for negative, sign in enumerate((1, -1)):
            # Rounded as in Pillow, so that quarter turns are exact.
            cos, sin = round(math.cos(angle), 15), sign * round(math.sin(angle), 15)
            turn = np.array([[cos, -sin], [sin, cos]])
            centre = np.array([width / 2, height / 2])
            for name, matrix in {
                "shear_x": [[1, sign * 0.99 * s, 0], [0, 1, 0]],
                "shear_y": [[1, 0, 0], [sign * 0.99 * s, 1, 0]],
                "translate_x": [[1, 0, -sign * pixels], [0, 1, 0]],
                "translate_y": [[1, 0, 0], [0, 1, -sign * pixels]],
                "rotate": np.column_stack([turn, centre - turn @ centre]),
            }.items():
                table[OPERATIONS.index(name), strength, negative] = matrix
    table[..., 2] += table[..., :2].sum(-1) / 2
    return np.floor(table * 65536 + 0.5).astype(np.int32).reshape(*table.shape[:3], 6)


def _warp(images: jax.Array, operation_B: jax.Array, strength_B: jax.Array, negative_B: jax.Array) -> jax.Array:
    """Shears, translates and rotates by one gather, nearest neighbour, 0 outside; uint8 [B, H, W, C]."""
    batch, height, width, _ = images.shape
    c = jnp.asarray(_coefficients(height, width))[operation_B, strength_B, negative_B][:, :, None, None]
    x = jnp.arange(width, dtype=jnp.int32)[None, None, :]
    y = jnp.arange(height, dtype=jnp.int32)[None, :, None]
    column = (c[:, 0] * x + c[:, 1] * y + c[:, 2]) >> 16
    row = (c[:, 3] * x + c[:, 4] * y + c[:, 5]) >> 16
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    index = jnp.arange(batch, dtype=jnp.int32)[:, None, None]
    # Outside, any pixel serves.
    read = images.at[index, jnp.where(inside, row, 0), jnp.where(inside, column, 0)].get(mode="promise_in_bounds")
    return jnp.where(inside[..., None], read, jnp.uint8(0))


def _map(pixels: jax.Array, operation_B: jax.Array, strength_B: jax.Array) -> jax.Array:
    """Posterizes, solarizes, stretches and equalizes by one table an image and channel; int32 [B, H, W, C]."""
    batch, _, _, channels = pixels.shape
    value = jnp.arange(256, dtype=jnp.int32)[None, None, None, :]
    strength = strength_B[:, None, None, None]

    # round(6 * strength / 30): no halves occur.
    dropped = (2 * strength + 5) // 10
    posterized = (value >> dropped) << dropped
    solarized = jnp.where(2 * value < 510 - 17 * strength, value, 255 - value)

    low = pixels.min((1, 2))[:, None, :, None]
    span = pixels.max((1, 2))[:, None, :, None] - low
    stretched = jnp.where(span > 0, jnp.clip((value - low) * 255 // jnp.maximum(span, 1), 0, 255), value)

    # Flat indices: a table is a row of 256, image by image and channel by channel.
    row = jnp.arange(batch * channels, dtype=jnp.int32).reshape(batch, 1, 1, channels)
    at = row * 256 + pixels
    count = jnp.zeros(batch * channels * 256, jnp.int32).at[at].add(1, mode="promise_in_bounds")
    count = count.reshape(batch, 1, channels, 256)
    below = jnp.cumsum(count, -1) - count
    # The brightest level's pixels do not count: they go to 255 whatever their number.
    brightest = jnp.take_along_axis(below, low + span, -1)
    step = brightest // 255
    equalized = jnp.where(step > 0, jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255), value)

    table = jnp.broadcast_to(value, (batch, 1, channels, 256))
    for name, other in {
        "posterize": posterized,
        "solarize": solarized,
        "autocontrast": stretched,
        "equalize": equalized,
    }.items():
        table = jnp.where(_is(operation_B, name), other, table)
    return table.reshape(-1).at[at].get(mode="promise_in_bounds")


def _blend(pixels: jax.Array, operation_B: jax.Array, strength_B: jax.Array, negative_B: jax.Array) -> jax.Array:
    """Changes brightness, color, contrast and sharpness by one blend; int32 [B, H, W, C]."""
    _, height, width, channels = pixels.shape
    grey = pixels
    if channels == 3:
        # ITU-R 601 luma in 16 bits.
        luma = jnp.array([19595, 38470, 7471], jnp.int32)[None, None, None, :]
        grey = ((pixels * luma).sum(-1, keepdims=True) + 32768) >> 16
    area = height * width
    mean = (2 * grey.sum((1, 2), keepdims=True) + area) // (2 * area)

    padded = jnp.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * pixels
    x = jnp.arange(width, dtype=jnp.int32)[None, :]
    y = jnp.arange(height, dtype=jnp.int32)[:, None]
    inner = (x > 0) & (x < width - 1) & (y > 0) & (y < height - 1)
    # The border is not smoothed.
    smooth = jnp.where(inner[None, :, :, None], (2 * total + 13) // 26, pixels)

    # The image itself as its own degenerate is the identity.
    degenerate = pixels
    for name, other in {"brightness": jnp.int32(0), "color": grey, "contrast": mean, "sharpness": smooth}.items():
        degenerate = jnp.where(_is(operation_B, name), other, degenerate)
    # Thousandths are exact (0.99 / 30 = 0.033), so no rounding differs between devices.
    factor = (1000 + 33 * jnp.where(negative_B == 1, -strength_B, strength_B))[:, None, None, None]
    return jnp.clip((1000 * degenerate + factor * (pixels - degenerate)) // 1000, 0, 255)
