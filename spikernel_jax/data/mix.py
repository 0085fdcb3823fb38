"""Augmentations that mix pairs of images and their targets, traceable by jit."""

import math

import jax
import jax.numpy as jnp

from spikernel_jax.data.augment import require_batch


def mixup(key: jax.Array, images: jax.Array, targets: jax.Array, alpha: float) -> tuple[jax.Array, jax.Array]:
    """Blends every image and its target with a partner's (Zhang et al. 2018, arXiv:1710.09412).

    One share, drawn from Beta(alpha, alpha), and one permutation, which gives the partners, serve the whole batch.

    Args:
      key: PRNG key.
      images: Floating point [B, H, W, C], on any scale: blending and `normalise` may be swapped.
      targets: Floating point [B, K], class probabilities (one-hot or smoothed).
      alpha: Both parameters of the Beta distribution: small values mix little. Static.

    Returns:
      Images and targets, of the shapes and dtypes given: share * own + (1 - share) * partner's.

    Raises:
      ValueError: `alpha` is not a positive finite number, or shapes or dtypes are not those above.
    """
    _check(images, targets, alpha)
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images must be floating point to be blended, got dtype {images.dtype}")
    share_key, partner_key = jax.random.split(key)
    share = jax.random.beta(share_key, alpha, alpha, dtype=jnp.float32)
    partner_B = jax.random.permutation(partner_key, jnp.arange(len(images), dtype=jnp.int32))
    return _blend(share, images, images[partner_B]), _blend(share, targets, targets[partner_B])


def cutmix(key: jax.Array, images: jax.Array, targets: jax.Array, alpha: float) -> tuple[jax.Array, jax.Array]:
    """Pastes a box of a partner's image and mixes the targets by area (Yun et al. 2019, arXiv:1905.04899).

    With a share drawn from Beta(alpha, alpha), the box has sqrt(1 - share) of the height and of the width, rounded
    down; its centre is uniform over the pixels and it is clipped at the border. The targets are mixed by the share
    of the pixels that are left. Box and permutation, which gives the partners, serve the whole batch.

    Args:
      key: PRNG key.
      images: uint8 or floating point [B, H, W, C], on any scale: no pixel changes its value.
      targets: Floating point [B, K], class probabilities (one-hot or smoothed).
      alpha: Both parameters of the Beta distribution: small values mix little or all. Static.

    Returns:
      Images and targets, of the shapes and dtypes given.

    Raises:
      ValueError: `alpha` is not a positive finite number, or shapes or dtypes are not those above.
    """
    _check(images, targets, alpha)
    batch, height, width, _ = images.shape
    share_key, partner_key, row_key, column_key = jax.random.split(key, 4)
    side = jnp.sqrt(1.0 - jax.random.beta(share_key, alpha, alpha, dtype=jnp.float32))
    row_H = _stretch(row_key, height, side)
    column_W = _stretch(column_key, width, side)
    inside = row_H[:, None] & column_W[None, :]
    partner_B = jax.random.permutation(partner_key, jnp.arange(batch, dtype=jnp.int32))
    share = 1.0 - inside.sum(dtype=jnp.float32) / (height * width)
    mixed = jnp.where(inside[None, :, :, None], images[partner_B], images)
    return mixed, _blend(share, targets, targets[partner_B])


def _check(images: jax.Array, targets: jax.Array, alpha: float) -> None:
    """Raises ValueError for what `mixup` and `cutmix` both refuse."""
    require_batch(images)
    if targets.ndim != 2 or len(targets) != len(images):
        raise ValueError(f"targets must have shape [{len(images)}, K], one row an image, got shape {targets.shape}")
    if not jnp.issubdtype(targets.dtype, jnp.floating):
        raise ValueError(f"targets must be floating point class probabilities, got dtype {targets.dtype}")
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha must be a positive finite number, got {alpha}")


def _blend(share: jax.Array, own: jax.Array, other: jax.Array) -> jax.Array:
    """Returns share * own + (1 - share) * other in the arrays' dtype."""
    share = share.astype(own.dtype)
    return share * own + (1 - share) * other


def _stretch(key: jax.Array, length: int, fraction: jax.Array) -> jax.Array:
    """Marks, as bool [length], `fraction` of the places about a centre drawn from all, clipped at the ends."""
    size = (length * fraction).astype(jnp.int32)
    place = jnp.arange(length, dtype=jnp.int32) - (jax.random.randint(key, (), 0, length) - size // 2)
    return (place >= 0) & (place < size)
