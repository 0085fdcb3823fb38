"""Augmentation, normalisation and epoch order, all traceable by jit."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def require_batch(images: jax.Array) -> None:
    """Raises ValueError unless `images` has the four axes [B, H, W, C]."""
    if images.ndim != 4:
        raise ValueError(f"images must have shape [B, H, W, C], got shape {images.shape}")


def _checked(images: jax.Array, field: str, value: int) -> tuple[int, int, int]:
    """Batch, height and width of images [B, H, W, C]; ValueError on other axes, or a size below 0."""
    require_batch(images)
    if value < 0:
        raise ValueError(f"{field} must be at least 0, got {value}")
    batch, height, width, _ = images.shape
    return batch, height, width


def bits_by_image(key: jax.Array, batch: int, draws: int) -> jax.Array:
    """Draws uint32 [batch, draws]; row i depends on `key` and i alone, not on the size of the batch.

    Uniform integers below n are the bits modulo n: the bias is below n / 2**32, and it costs no rejection.
    """
    index = jnp.arange(batch, dtype=jnp.int32)
    return jax.vmap(lambda i: jax.random.bits(jax.random.fold_in(key, i), (draws,), jnp.uint32))(index)


def augment(key: jax.Array, images: jax.Array, padding: int, flip: bool) -> jax.Array:
    """Shifts each image by a random crop of its zero-padded self and may mirror it.

    Call it on raw pixels, before `normalise`: the border is black (pixel 0), as when a recipe pads the
    picture first and normalises afterwards. The result for image i depends on `key` and i alone, not on the
    size of the batch.

    Args:
      key: PRNG key; image i uses `jax.random.fold_in(key, i)`.
      images: uint8 or float32 [B, H, W, C].
      padding: Black pixels added on every side, so offsets are uniform on -padding..padding. Static.
      flip: Whether to mirror left to right with probability one half. Static.

    Returns:
      Array of the shape and dtype of `images`.

    Raises:
      ValueError: `images` has not four axes, or `padding` is negative.
    """
    batch, height, width = _checked(images, "padding", padding)
    index = jnp.arange(batch, dtype=jnp.int32)
    bits = bits_by_image(key, batch, 3)
    span = jnp.uint32(2 * padding + 1)
    offset_y = (bits[:, 0] % span).astype(jnp.int32)
    offset_x = (bits[:, 1] % span).astype(jnp.int32)
    row = jnp.broadcast_to(jnp.arange(height, dtype=jnp.int32)[None, :], (batch, height))
    column = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None, :], (batch, width))
    if flip:
        mirrored = ((bits[:, 2] & jnp.uint32(1)) == 1)[:, None]
        column = jnp.where(mirrored, width - 1 - column, column)
    row = row + offset_y[:, None]
    column = column + offset_x[:, None]
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    # Mirroring is folded into the indices, so crop and flip together are a single gather.
    return padded[index[:, None, None], row[:, :, None], column[:, None, :]]


def cutout(key: jax.Array, images: jax.Array, side: int) -> jax.Array:
    """Blackens a square of every image (DeVries & Taylor 2017, arXiv:1708.04552).

    The square's centre is uniform over the pixels and the square is clipped at the border, so fewer than
    side * side pixels may go. Call it on raw pixels, where black is 0. The result for image i depends on `key`
    and i alone, not on the size of the batch.

    Args:
      key: PRNG key; image i uses `jax.random.fold_in(key, i)`.
      images: uint8 or floating point [B, H, W, C], pixels 0..255.
      side: Pixels a side; 0 leaves the images as they are. Static.

    Returns:
      Array of the shape and dtype of `images`.

    Raises:
      ValueError: `images` has not four axes, or `side` is negative.
    """
    batch, height, width = _checked(images, "side", side)
    bits = bits_by_image(key, batch, 2)
    row_BH = _within(bits[:, 0], height, side)
    column_BW = _within(bits[:, 1], width, side)
    hidden_BHW = row_BH[:, :, None] & column_BW[:, None, :]
    return jnp.where(hidden_BHW[..., None], jnp.zeros((), images.dtype), images)


def _within(bits_B: jax.Array, length: int, side: int) -> jax.Array:
    """Marks, as bool [B, length], the `side` places about a centre drawn from 0..length - 1."""
    start_B = (bits_B % jnp.uint32(length)).astype(jnp.int32) - side // 2
    place = jnp.arange(length, dtype=jnp.int32)[None, :] - start_B[:, None]
    return (place >= 0) & (place < side)


def normalise(images: jax.Array | np.ndarray, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Maps pixels to (pixel / 255 - mean) / std.

    Args:
      images: uint8 (or float pixels on the same 0..255 scale) [..., C].
      mean: Per-channel mean of pixel / 255, length C.
      std: Per-channel standard deviation of pixel / 255, length C.

    Returns:
      float32 [..., C].

    Raises:
      ValueError: `mean` or `std` has not one value per channel.
    """
    channels = images.shape[-1]
    if len(mean) != channels or len(std) != channels:
        raise ValueError(f"images have {channels} channels, got {len(mean)} means and {len(std)} deviations")
    # Explicit leading axes keep this legal under jax_numpy_rank_promotion="raise".
    shape = (1,) * (images.ndim - 1) + (channels,)
    mean_C = jnp.asarray(mean, jnp.float32).reshape(shape)
    std_C = jnp.asarray(std, jnp.float32).reshape(shape)
    return (jnp.asarray(images, jnp.float32) / 255.0 - mean_C) / std_C


def epoch_batches(key: jax.Array, n: int, batch_size: int) -> jax.Array:
    """Draws the order of one epoch; the remainder that fills no batch is dropped.

    Args:
      key: PRNG key.
      n: Number of images. Static.
      batch_size: Images per step. Static.

    Returns:
      int32 [n // batch_size, batch_size], each index at most once.

    Raises:
      ValueError: `batch_size` is below 1 or above `n`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if batch_size > n:
        raise ValueError(f"batch larger than the data: batch_size {batch_size} > {n} images")
    steps = n // batch_size
    order = jax.random.permutation(key, jnp.arange(n, dtype=jnp.int32))
    return order[: steps * batch_size].reshape(steps, batch_size)
