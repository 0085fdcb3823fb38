"""Whether an operation is what it says: for tests of one's own."""

import jax
import jax.numpy as jnp
import numpy as np

from spikernel_jax.operations.operation import IDENTITY, LINEAR, ZERO, Array, Operation

Weights = dict[str, dict[str, Array]]
_TOLERANCE = 1e-4  # of float32, relative to the largest value


class _Plain:
    """An edge whose norms only scale and shift."""

    def __init__(self, operation: Operation, weights: Weights):
        self._operation, self._weights, self.read = operation, weights, set[tuple[str, str]]()

    def _part(self, part: str, what: str) -> Array:
        if what not in self._weights.get(part, {}):
            raise ValueError(f"operation {self._operation.name!r} reads {what} of layer {part!r}, which `layers` lacks")
        self.read.add((part, what))
        return self._weights[part][what]

    def weights(self, part: str = "") -> Array:
        return self._part(part, "weights")

    def norm(self, y_TBHWC: Array, part: str = "") -> Array:
        return y_TBHWC * self._part(part, "norm") + 0.1


def check_operation(
    operation: Operation, *, channels: int = 4, size: tuple[int, int] = (6, 5), time_steps: int = 3, seed: int = 0
) -> None:
    """Tries an operation on random inputs.

    Args:
      operation: to try.
      channels: width C.
      size: height and width of its input.
      time_steps: T.
      seed: of inputs and weights.

    Raises:
      ValueError: naming the operation and what is wrong with it: its output has another shape or is not finite, a time
        step depends on others, it reads layers that it does not declare or declares ones that it does not read, a
        declared weight has no gradient, it is not of its kind, or `fan_out` is not of every place.

    Example:
      >>> from spikernel_jax import Operation, check_operation, get_operation
      >>> check_operation(get_operation("dwconv5"))
      >>> check_operation(Operation("square", "linear", lambda edge, x: x * x))
      Traceback (most recent call last):
          ...
      ValueError: operation 'square' is no linear one: of a sum it makes another value than the sum of what it makes
    """
    rng = np.random.default_rng(seed)
    shape = (time_steps, 2, *size, channels)
    name = f"operation {operation.name!r}"

    def drawn() -> Array:
        values = rng.random(shape) < 0.4 if operation.reads_spikes else rng.normal(size=shape)
        return jnp.asarray(values, jnp.float32)

    weights: Weights = {}
    for part, layer in operation.layers(channels).items():
        weights[part] = {"weights": jnp.asarray(rng.normal(size=layer.shape), jnp.float32)} if layer.shape else {}
        if layer.norm:
            weights[part]["norm"] = jnp.asarray(rng.uniform(0.5, 1.5, layer.channels), jnp.float32)
    edge = _Plain(operation, weights)

    def made(x: Array) -> Array:
        return operation.apply(edge, x)

    x, z = drawn(), drawn()
    y = made(x)
    if jnp.shape(y) != shape or not bool(jnp.isfinite(y).all()):
        raise ValueError(f"{name} makes {jnp.shape(y)} of {shape}: want finite values of the same shape")
    declared = {(part, what) for part, entry in weights.items() for what in entry}
    if unread := sorted(declared - edge.read):
        raise ValueError(f"{name} declares layer {unread[0][0]!r} and does not read its {unread[0][1]}")

    def alike(a: Array, b: Array) -> bool:
        return bool(jnp.abs(a - b).max() <= _TOLERANCE * (1 + jnp.abs(b).max()))

    if not alike(jnp.concatenate([made(step[None]) for step in x]), y):
        raise ValueError(f"{name} mixes time steps: want each for itself")
    if operation.kind == ZERO and not alike(y, jnp.zeros(shape)):
        raise ValueError(f"{name} is no zero: it makes something")
    if operation.kind == IDENTITY and not alike(y, x):
        raise ValueError(f"{name} is no identity: it changes what it is given")
    if operation.kind == LINEAR and not alike(made(2 * x - 3 * z), 2 * y - 3 * made(z)):
        raise ValueError(f"{name} is no linear one: of a sum it makes another value than the sum of what it makes")

    def loss(weights: Weights) -> Array:
        return jnp.square(operation.apply(_Plain(operation, weights), x) - 0.3).sum()

    for part, entry in jax.grad(loss)(weights).items():
        for what, gradient in entry.items():
            if not bool(jnp.isfinite(gradient).all() & gradient.any()):
                raise ValueError(f"{name}: the gradient of layer {part!r} for its {what} is zero or not finite")
    fans = np.asarray(operation.fan_out(size, channels))
    if fans.shape != size or fans.dtype.kind not in "iu" or (fans < 0).any():
        raise ValueError(f"{name}: fan_out gives {fans.dtype} {fans.shape}; want ints of at least 0, {size}")
    if operation.reads_spikes and weights and not fans.any():
        raise ValueError(f"{name}: fan_out is 0, yet it has weights that spikes drive")
