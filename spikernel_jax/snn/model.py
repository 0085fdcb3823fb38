"""A finished model: parameters with all that is needed to use them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from spikernel_jax.data import check_images, normalise
from spikernel_jax.snn import network
from spikernel_jax.snn.layers import BN_EPSILON
from spikernel_jax.snn.spec import NetworkSpec

Array = jax.Array


@functools.partial(jax.jit, static_argnames=("spec", "genotype"))
def eval_logits(
    spec: NetworkSpec,
    genotype: Any,
    params: network.Params,
    stats: network.Stats,
    images_BHWC: Array,
) -> Array:
    """Logits [B, K] of normalised images by running statistics, no dropout."""
    return network.apply(spec, genotype, params, images_BHWC, stats=stats).logits_BK


def hashable(genotype: Any) -> tuple[Any, ...]:
    """A fixed genotype as (nested) tuples of ints, static under ``jit``."""
    rows = np.asarray(genotype)
    return tuple(rows.tolist()) if rows.ndim == 1 else tuple(tuple(row) for row in rows.tolist())


@dataclasses.dataclass(frozen=True)
class Model:
    """A network with its weights: call it on images to get logits.

    Attributes:
      spec: the network.
      genotype: codes of one row for both cells, or of two rows.
      params: parameters by layer name.
      stats: running statistics by layer name.
      mean: per channel, of pixel/255.
      std: per channel, of pixel/255.
      metrics: what was measured of it (accuracies, data, seed, ...).

    Example:
      >>> import jax
      >>> import numpy as np
      >>> from spikernel_jax import CellSpace, Model, NetworkSpec
      >>> from spikernel_jax.snn import network
      >>> spec = NetworkSpec((8, 8, 1), 2, CellSpace((3,)), channels=2, time_steps=1)
      >>> cell = tuple(spec.space.parse("0>3:skip").tolist())
      >>> model = Model(spec, cell, *network.init(jax.random.key(0), spec, cell), (0.5,), (0.3,))
      >>> model(np.zeros((5, 8, 8, 1), np.uint8)).shape  # pixels, normalised by mean and deviation
      (5, 2)
    """

    spec: NetworkSpec
    genotype: tuple[Any, ...]
    params: network.Params
    stats: network.Stats
    mean: tuple[float, ...]
    std: tuple[float, ...]
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __call__(self, images: Any) -> Array:
        """Class logits.

        Args:
          images: [B, H, W, C]; uint8 pixels are scaled to [0, 1] and normalised by mean and std, floats
            are taken as normalised already.

        Returns:
          Logits [B, num_classes].

        Raises:
          ValueError: if the shape is not the network's, or there are NaNs.
        """
        check_images(images)
        if tuple(images.shape[1:]) != self.spec.image_shape:
            raise ValueError(f"images have shape {tuple(images.shape)}; this model takes [B, *{self.spec.image_shape}]")
        x = jnp.asarray(images)
        if x.dtype == jnp.uint8:
            x = normalise(x, self.mean, self.std)
        return eval_logits(self.spec, self.genotype, self.params, self.stats, x)

    def folded_norm(self, layer: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """What a layer's batch norm does at inference: scale and bias of each channel, [C]."""
        own, running = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (self.params[layer], self.stats[layer]))
        gain = self.spec.neuron.v_threshold if self.spec.norm == "over_time" and layer != "stem" else 1.0
        scale = gain * own["scale"] / np.sqrt(running["var"] + BN_EPSILON)
        return scale, own["bias"] - running["mean"] * scale

    @property
    def text(self) -> str:
        """The genotype in the space's notation."""
        rows = np.asarray(self.genotype, np.int8)
        return " + ".join(self.spec.space.format(row) for row in rows.reshape(-1, len(self.spec.space.edges)))


class NNXModel(nnx.Module):
    """A `Model` as a flax module: parameters are ``nnx.Param``, statistics ``nnx.BatchStat``.

    Example:
      >>> import jax
      >>> from spikernel_jax import CellSpace, Model, NetworkSpec, NNXModel
      >>> from spikernel_jax.snn import network
      >>> spec = NetworkSpec((8, 8, 1), 2, CellSpace((3,)), channels=2, time_steps=1)
      >>> cell = tuple(spec.space.parse("0>3:skip").tolist())
      >>> module = NNXModel(Model(spec, cell, *network.init(jax.random.key(0), spec, cell), (0.5,), (0.3,)))
      >>> module(jax.numpy.zeros((5, 8, 8, 1))).shape
      (5, 2)
    """

    def __init__(self, model: Model):
        """Wraps a finished model."""
        self.spec, self.genotype = model.spec, model.genotype
        self.params = nnx.data(jax.tree.map(nnx.Param, model.params))
        self.stats = nnx.data(jax.tree.map(nnx.BatchStat, model.stats))

    def __call__(self, images_BHWC: Array) -> Array:
        """Logits of normalised images by running statistics."""
        pure = jax.tree.map(
            lambda leaf: leaf[...], (self.params, self.stats), is_leaf=lambda x: isinstance(x, nnx.Variable)
        )
        return network.apply(self.spec, self.genotype, pure[0], images_BHWC, stats=pure[1]).logits_BK
