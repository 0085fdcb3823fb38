"""The float network as StableHLO, by `jax.export`: any machine with JAX runs it, without this package."""

from typing import Any

import jax
import numpy as np

from spikernel_jax.data import normalise
from spikernel_jax.snn.model import Model, eval_logits

PLATFORMS = ("cpu", "cuda", "tpu")


def export(model: Model) -> bytes:
    """A model as a function of uint8 images [B, H, W, C], of any B, to float32 logits [B, K]; its weights are in it.

    Args:
      model: trained.

    Returns:
      What `jax.export.deserialize` reads, and `call` of what it gives computes.

    Example:
      >>> import jax
      >>> import numpy as np
      >>> from spikernel_jax import CellSpace, Model, NetworkSpec
      >>> from spikernel_jax.embedded import stablehlo
      >>> from spikernel_jax.snn import network
      >>> spec = NetworkSpec((8, 8, 1), 2, CellSpace((3,)), channels=2, time_steps=1)
      >>> cell = tuple(spec.space.parse("0>3:conv3").tolist())
      >>> data = stablehlo.export(Model(spec, cell, *network.init(jax.random.key(0), spec, cell), (0.5,), (0.3,)))
      >>> jax.export.deserialize(data).call(np.zeros((3, 8, 8, 1), np.uint8)).shape
      (3, 2)
    """

    def logits(images_BHWC: Any) -> Any:
        x = normalise(images_BHWC, model.mean, model.std)
        return eval_logits(model.spec, model.genotype, model.params, model.stats, x)

    (batch,) = jax.export.symbolic_shape("b")
    taken = jax.ShapeDtypeStruct((batch, *model.spec.image_shape), np.uint8)
    return bytes(jax.export.export(jax.jit(logits), platforms=PLATFORMS)(taken).serialize())
