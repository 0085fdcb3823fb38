"""A stem that whitens: its first channels see patches of the training images along their principal axes.

Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single A100" (2024, arXiv:2404.00498), section 3.2, after Page (2019);
there the whitening layer is frozen, here it is what training begins with.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from spikernel_jax.data import Dataset, normalise

_PATCHES = 450_000  # at most, of the first images: 2,000 of 32x32 pixels with a stride of 2
_LEAST = 5e-4  # added to each variance, so that axes of next to none are not blown up


def whitened_stem(kernel: ArrayLike, data: Dataset, stride: int = 1) -> jax.Array:
    """A stem's kernel of which as many channels as there are axes whiten, each beside its negative.

    The response of such a channel to a patch of the training images has about unit variance, and those of two axes are
    not correlated. Axes come by variance, the largest first; where there are fewer channels than twice the axes, the
    last axes are left out, and channels beyond stay what they were.

    Args:
      kernel: float32 [k, k, C_in, C].
      data: whose first training images are measured, as the network sees them.
      stride: of the stem.

    Returns:
      float32 [k, k, C_in, C].

    Raises:
      ValueError: of a kernel of one channel, or larger than an image: nothing could be whitened.

    Example:
      >>> import numpy as np
      >>> from spikernel_jax import load_dataset
      >>> from spikernel_jax.training.whitening import whitened_stem
      >>> data = load_dataset("mnist5k", limit_train=16, limit_validation=16, limit_test=16)
      >>> kernel = whitened_stem(np.zeros((3, 3, 1, 20)), data)
      >>> bool((kernel[..., :9] == -kernel[..., 9:18]).all()), bool((kernel[..., 18:] == 0).all())
      (True, True)
    """
    start = np.array(kernel, np.float32)
    size, _, _, channels = start.shape
    height, width, _ = data.image_shape
    if channels < 2 or size > min(height, width):
        raise ValueError(
            f"stem_init='whitened' with channels={channels} and images of {height}x{width}: want 2 channels or more, "
            f"and images of {size}x{size} or more; or give stem_init='random'"
        )
    of_an_image = math.prod((side - size) // stride + 1 for side in (height, width))
    images_BHWC = np.asarray(normalise(data.train.images[: max(1, _PATCHES // of_an_image)], data.mean, data.std))
    windows = np.lib.stride_tricks.sliding_window_view(images_BHWC, (size, size), axis=(1, 2))[:, ::stride, ::stride]
    patches_ND = windows.transpose(0, 1, 2, 4, 5, 3).reshape(-1, start[..., 0].size)
    variances, axes_DD = np.linalg.eigh(patches_ND.T @ patches_ND / len(patches_ND))
    filters_DF = (axes_DD / np.sqrt(np.maximum(variances, 0) + _LEAST))[:, ::-1][:, : channels // 2]
    signed = np.concatenate([filters_DF, -filters_DF], axis=1)
    start[..., : signed.shape[1]] = signed.reshape(*start.shape[:3], -1)
    return jnp.asarray(start)
