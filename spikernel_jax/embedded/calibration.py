"""Programs whose currents and membranes are narrower than what the worst image could need.

Few values are large. Those that are beyond all but a share of what training images show are clipped, which leaves the
others as many bits behind the point.

Source: Nagel et al., 2021, arXiv 2106.08295, section 3.1 (clipping against rounding).
"""

from typing import Any

from spikernel_jax.embedded import integer
from spikernel_jax.embedded.lower import WIDTHS, lower
from spikernel_jax.embedded.program import Program
from spikernel_jax.snn.model import Model

CALIBRATED = 256  # images are enough
# Least loss of validation accuracy among 0, 0.0001, 0.001 and 0.01, for four networks of digits.
_CLIPPED = 0.01


def calibrated(model: Model, images_BHWC: Any, bits: int = 8, width: int = 8) -> Program:
    """The program of a model, its points put where training images need them.

    Args:
      model: trained.
      images_BHWC: uint8 pixels [B, H, W, C], of the training split.
      bits: of weights, from 2 to 8.
      width: of currents and membranes, from 8 to 16. With 16 bits nothing clips, and images are not looked at.

    Returns:
      A program that `bounds.check` has proven free of overflow.

    Raises:
      ValueError: as of `lower` and `integer.run`; or if there are no images.

    Example:
      >>> import jax
      >>> import numpy as np
      >>> from spikernel_jax import CellSpace, Model, NetworkSpec
      >>> from spikernel_jax.embedded.calibration import calibrated
      >>> from spikernel_jax.snn import network
      >>> spec = NetworkSpec((8, 8, 1), 2, CellSpace((3,)), channels=2, time_steps=1)
      >>> cell = tuple(spec.space.parse("0>3:conv3").tolist())
      >>> model = Model(spec, cell, *network.init(jax.random.key(0), spec, cell), (0.5,), (0.3,))
      >>> stem = calibrated(model, np.full((1, 8, 8, 1), 99, np.uint8)).buffers["stem"]
      >>> stem.bits, stem.clips
      (8, True)
    """
    if width == WIDTHS[1]:
        return lower(model, bits)
    if not len(images_BHWC):
        raise ValueError("no images to calibrate on: want some of the training split")
    widest = lower(model, bits)
    needed = integer.bits_needed(widest, images_BHWC, _CLIPPED)
    return lower(model, bits, width, {name: own - widest.buffers[name].fraction for name, own in needed.items()})
