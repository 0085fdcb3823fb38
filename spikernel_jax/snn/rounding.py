"""Weights of few bits: symmetric whole numbers, and what one is worth.

Of each output channel the largest weight or a share of it becomes the largest number, whichever leaves the least mean
squared error (Nagel et al., 2021, arXiv 2106.08295, section 3.1). A scale of the channel, as of a batch norm behind it,
changes no number but by its sign.
"""

from typing import Any

import jax
import numpy as np

from spikernel_jax.snn.network import Params
from spikernel_jax.snn.spec import NetworkSpec

BITS = (2, 8)
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4)


def rounded(weights: Any, bits: int) -> tuple[Any, Any]:
    """Whole numbers [..., C] of so many bits, as floats, and what one is worth in each output channel, [C].

    Args:
      weights: float [..., C], of NumPy or JAX.
      bits: with the sign, from 2 to 8; the least number, of no opposite, is not used.

    Example:
      >>> import numpy as np
      >>> from spikernel_jax.snn.rounding import rounded
      >>> whole, unit = rounded(np.array([[0.7], [-0.2], [0.1]]), 4)
      >>> whole[:, 0].tolist(), round(float(unit[0]), 3)
      ([7.0, -2.0, 1.0], 0.1)
    """
    space, most = weights.__array_namespace__(), 2 ** (bits - 1) - 1
    over = tuple(range(weights.ndim - 1))
    largest = abs(weights).max(over)
    least, unit = None, None
    for share in _SHARES:
        mine = space.where(largest > 0, share * largest / most, 1.0)
        error = ((space.clip(space.round(weights / mine), -most, most) * mine - weights) ** 2).sum(over)
        better = error < (np.inf if least is None else least)
        least = error if least is None else space.where(better, error, least)
        unit = mine if unit is None else space.where(better, mine, unit)
    return space.clip(space.round(weights / unit), -most, most), unit


def class_means(of_neurons: Any, classes: int) -> Any:
    """The mean over each class's neurons: [..., K · neurons a class] to [..., K]."""
    return of_neurons.reshape(*of_neurons.shape[:-1], classes, -1).mean(-1)


def rounded_classes(kernel: Any, classes: int, bits: int) -> tuple[Any, Any]:
    """The same of the last layer: of the mean over each class's neurons [in, K], one unit for all.

    Args:
      kernel: [in, K · neurons a class].
      classes: K.
      bits: as of `rounded`.
    """
    mean = class_means(kernel, classes)
    whole, unit = rounded(mean.reshape(-1, 1), bits)
    return whole.reshape(mean.shape), unit[0]


def straight_through(spec: NetworkSpec, params: Params, bits: int) -> Params:
    """Parameters whose kernels are worth what so many bits can say; gradients are those of the kernels as they were.

    Bengio et al., 2013 (arXiv 1308.3432).

    Args:
      spec: the network.
      params: of a genotype, or of the bank.
      bits: as of `rounded`.
    """

    def of(name: str, entry: dict[str, Any]) -> dict[str, Any]:
        if "kernel" not in entry:
            return entry
        kernel = entry["kernel"]
        if name == "head.out":
            whole, unit = rounded_classes(kernel, spec.num_classes, bits)
            moved = (whole * unit - class_means(kernel, spec.num_classes)).repeat(
                kernel.shape[1] // spec.num_classes, -1
            )
        else:
            whole, unit = rounded(kernel, bits)
            moved = whole * unit - kernel
        return entry | {"kernel": kernel + jax.lax.stop_gradient(moved)}

    return {name: of(name, entry) for name, entry in params.items()}
