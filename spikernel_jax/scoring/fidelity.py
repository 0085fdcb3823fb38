"""Fidelities: how large a network, and how many draws, candidates are scored with.

The three of `FIDELITIES` lie on the Pareto front of cost against rank correlation with the full-size,
many-seed score that ``experiments/fidelity.py`` measures.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from spikernel_jax.data import Dataset, normalise
from spikernel_jax.snn.layers import downsample
from spikernel_jax.snn.spec import NetworkSpec


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """Sizes of a score; None takes that of the network to be trained, and no size is ever larger than its.

    Attributes:
      channels: width C.
      batch: images B.
      time_steps: T.
      side: images are averaged over blocks of pixels until cell 1 is about this wide.
      seeds: replicates R.
    """

    channels: int | None = None
    batch: int = 64
    time_steps: int | None = None
    side: int | None = None
    seeds: int = 4

    def __post_init__(self) -> None:
        """Refuses sizes below 1, and a batch of one image, which has no distances."""
        for name, least in (("channels", 1), ("batch", 2), ("time_steps", 1), ("side", 2), ("seeds", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least}")

    @property
    def images_needed(self) -> int:
        """Training images that all replicates see together."""
        return self.seeds * self.batch

    def pool(self, spec: NetworkSpec) -> int:
        """Pixels a side of the blocks that images are averaged over."""
        return 1 if self.side is None else max(1, round(min(spec.cell_size(0)) / self.side))

    def network(self, spec: NetworkSpec) -> NetworkSpec:
        """The network that is scored in the place of `spec`."""
        h, w, c = spec.image_shape
        pool = self.pool(spec)
        return dataclasses.replace(
            spec,
            image_shape=(h // pool, w // pool, c),
            channels=min(self.channels or spec.channels, spec.channels),
            time_steps=min(self.time_steps or spec.time_steps, spec.time_steps),
        )

    def images(self, key: jax.Array, data: Dataset, spec: NetworkSpec) -> NDArray[np.float32]:
        """Normalised training images [R, B, H, W, C], no image twice.

        Args:
          key: says which.
          data: a data set with at least R·B training images.
          spec: the network to be trained.

        Raises:
          ValueError: if there are fewer images.
        """
        split, needed = data.train, self.images_needed
        if needed > len(split.labels):
            raise ValueError(f"batch={self.batch} times seeds={self.seeds} is more than {len(split.labels)} images")
        chosen = np.asarray(jax.random.permutation(key, len(split.labels)))[:needed]
        images = downsample(normalise(jnp.asarray(split.images[chosen]), data.mean, data.std), self.pool(spec))
        return np.asarray(images).reshape(self.seeds, self.batch, *images.shape[1:])


NAMES = ("low", "medium", "full")
FIDELITIES = (
    Fidelity(channels=16, batch=32, time_steps=2, side=16, seeds=2),
    Fidelity(channels=32, batch=64, time_steps=2, seeds=2),
    Fidelity(),
)
