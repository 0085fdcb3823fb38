"""A data set of your own arrays: checked, then scored like any other."""

import jax
import numpy as np

from spikernel_jax import CellSpace, NetworkSpec, make_bank, make_dataset, score_population
from spikernel_jax.data import Split, normalise

rng = np.random.default_rng(0)


def split(n: int) -> Split:
    """Bars, upright or lying, as uint8 [N, H, W, C]."""
    labels = rng.integers(0, 2, n)
    images = rng.integers(0, 60, (n, 12, 12, 1), dtype=np.uint8)
    for image, label, at in zip(images, labels, rng.integers(2, 10, n), strict=True):
        image[at] += np.uint8(180 * label)
        image[:, at] += np.uint8(180 * (1 - label))
    return Split(images, labels)


data = make_dataset("bars", split(64), split(16), split(16), num_classes=2)
space = CellSpace(kernel_sizes=(3,))
spec = NetworkSpec(data.image_shape, data.num_classes, space, channels=4, time_steps=2)
cells = space.enumerate()[::80]
images = normalise(data.train.images[:8], data.mean, data.std)
found = score_population(cells, make_bank(jax.random.key(0), spec), np.asarray(images), spec)
print(data.source, "| best:", space.explicit(cells[found.scores.argmax()]))
