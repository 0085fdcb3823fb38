"""Batch norm, pooling between cells, and how weights begin.

All activations are time-major ``[T, B, H, W, C]``; a convolution over T time steps of one layer is
one convolution over ``T*B`` images. Weights are ``[k, k, C_in, C_out]``.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
Params = dict[str, Array]

BN_EPSILON = 1e-5
BN_MOMENTUM = 0.1  # weight of the new statistic, PyTorch's convention
NORMS = ("per_step", "over_time")


def every_step(x: Array, time_steps: int) -> Array:
    """What is the same in all time steps, [1, ...], at each of T: [T, ...]; what has all of them already as it is."""
    return x if len(x) == time_steps else _repeated(time_steps, x)


def _repeated_forwards(time_steps: int, x: Array) -> Array:
    return jnp.broadcast_to(x, (time_steps, *x.shape[1:]))


_repeated = jax.custom_vjp(_repeated_forwards, nondiff_argnums=(0,))
# A sum of slices, which XLA fuses with what made them: its reduction took eight times as long on a CPU.
_repeated.defvjp(
    lambda time_steps, x: (_repeated_forwards(time_steps, x), None),
    lambda time_steps, _, g: (functools.reduce(operator.add, jnp.split(g, time_steps)),),
)


def downsample(x: Array, factor: int) -> Array:
    """Mean over ``factor × factor`` blocks of ``[..., H, W, C]``; a remainder is cropped (as PyTorch)."""
    h, w = x.shape[-3] // factor, x.shape[-2] // factor
    return x if factor == 1 else _block_mean(factor, x[..., : h * factor, : w * factor, :])


def _block_mean_forwards(factor: int, x: Array) -> Array:
    """A sum of slices, which XLA fuses with what made x; its reductions over two axes apart are slow on CPUs."""
    *rest, h, w, channels = x.shape
    blocks = x.reshape(*rest, h // factor, factor, w // factor, factor, channels)
    first, *others = (blocks[..., i, :, j, :] for i in range(factor) for j in range(factor))
    return sum(others, first) / factor**2


_block_mean = jax.custom_vjp(_block_mean_forwards, nondiff_argnums=(0,))
_block_mean.defvjp(
    lambda factor, x: (_block_mean_forwards(factor, x), None),
    lambda factor, _, g: ((g / factor**2).repeat(factor, -3).repeat(factor, -2),),
)


def batch_norm(
    x_TBHWC: Array,
    affine: Params,
    running: Params | None,
    *,
    train: bool,
    norm: str = "per_step",
    gain: float = 1.0,
    axis_name: str | None = None,
) -> tuple[Array, Params | None]:
    """Batch norm of a layer's output, per time step or over time.

    Args:
      x_TBHWC: input; normalised per channel.
      affine: ``scale`` and ``bias``, both [C].
      running: ``mean`` and ``var``, both [C], or None where no statistics are kept (scoring).
      train: batch statistics (and new running ones) if True, running statistics if False.
      norm: ``"per_step"`` takes statistics over batch and space of each time step, and updates the
        running ones at each step (SNASNet); ``"over_time"`` takes them over time as well, and scales
        by `gain` (tdBN, Zheng et al., AAAI 2021).
      gain: tdBN's alpha · v_threshold; 1 for per-step norm.
      axis_name: of the mapped axis whose devices share the batch, over which statistics are taken too.

    Returns:
      The normalised activations, and the running statistics after the T steps (None if none came in).
    """
    if not train:
        if running is None:
            raise ValueError("batch norm with train=False needs running statistics; none were given")
        return _affine(x_TBHWC, gain * affine["scale"], affine["bias"], running["mean"], running["var"]), running
    over = _Over((1, 2, 3) if norm == "per_step" else (0, 1, 2, 3), axis_name)
    y_TBHWC, mean, var = _standardised(over, x_TBHWC, gain * affine["scale"], affine["bias"])
    if running is not None:
        shares = lax.axis_size(axis_name) if axis_name else 1
        running = _updated(running, mean, var, shares * math.prod(x_TBHWC.shape[a] for a in over.axes))
    return y_TBHWC, running


class _Over(NamedTuple):
    """What statistics are taken over: axes, which end with W, and a mapped axis's devices."""

    axes: tuple[int, ...]
    axis_name: str | None

    def local(self, x_TBHWC: Array) -> Array:
        """Mean over the axes, kept; first without W, so that few channels still fill a vector register."""
        wide = x_TBHWC.reshape(*x_TBHWC.shape[:3], -1).mean(self.axes[:-1], keepdims=True)
        return wide.reshape(*wide.shape[:3], *x_TBHWC.shape[3:]).mean(3, keepdims=True)

    def all(self, mean: Array) -> Array:
        """Of the devices' means."""
        return lax.pmean(mean, self.axis_name) if self.axis_name else mean


def _affine(x_TBHWC: Array, scale: Array, bias: Array, mean: Array, var: Array) -> Array:
    # One multiply-add for each value, in PyTorch's order, so that float32 spikes agree with published ones.
    scale = scale / jnp.sqrt(var + BN_EPSILON)
    return x_TBHWC * scale + (bias - mean * scale)


def _standardised_forwards(over: _Over, x_TBHWC: Array, scale: Array, bias: Array) -> tuple[Array, Array, Array]:
    """Standardised, scaled and moved; and the mean and variance of the batch, which have no gradient."""
    return _standardised_kept(over, x_TBHWC, scale, bias)[0]


def _standardised_backwards(over: _Over, kept: tuple[Array, ...], gradients: tuple[Array, ...]) -> Any:
    """Sums of gradients, and of their products with what was kept, then one pass: three; JAX's own takes five."""
    centred_TBHWC, scale, deviation = kept
    g_TBHWC, *_ = gradients
    slope, along = over.local(g_TBHWC), over.local(g_TBHWC * centred_TBHWC)
    n = math.prod(centred_TBHWC.shape[a] for a in over.axes)
    dscale, dbias = (n * part.sum((0, 1, 2, 3)) for part in (along / deviation, slope))
    slope, along = over.all(slope), over.all(along)
    dx_TBHWC = scale / deviation * (g_TBHWC - slope - centred_TBHWC * (along / jnp.square(deviation)))
    return dx_TBHWC, dscale, dbias


_standardised = jax.custom_vjp(_standardised_forwards, nondiff_argnums=(0,))


def _standardised_kept(over: _Over, x_TBHWC: Array, scale: Array, bias: Array) -> Any:
    mean = over.all(over.local(x_TBHWC))
    centred_TBHWC = x_TBHWC - mean
    var = over.all(over.local(jnp.square(centred_TBHWC)))
    results = _affine(x_TBHWC, scale, bias, mean, var), mean, var
    return results, (centred_TBHWC, scale, jnp.sqrt(var + BN_EPSILON))


_standardised.defvjp(_standardised_kept, _standardised_backwards)


def _updated(running: Params, mean: Array, var: Array, n: int) -> Params:
    """Running statistics after every step's update, in order; the variance unbiased, as PyTorch."""
    unbiased = n / max(n - 1, 1)
    new_mean, new_var = running["mean"], running["var"]
    for t in range(mean.shape[0]):
        new_mean = (1 - BN_MOMENTUM) * new_mean + BN_MOMENTUM * mean[t].reshape(-1)
        new_var = (1 - BN_MOMENTUM) * new_var + BN_MOMENTUM * unbiased * var[t].reshape(-1)
    return {"mean": lax.stop_gradient(new_mean), "var": lax.stop_gradient(new_var)}


def init_conv(key: Array, shape: tuple[int, ...]) -> Array:
    """Kaiming-uniform with a = 2, as the public SNASNet code: ``[k_h, k_w, C_in / groups, C_out]`` float32."""
    bound = math.sqrt(6 / ((1 + 2**2) * math.prod(shape[:-1])))
    return _drawn(shape, lambda flat: jax.random.uniform(key, flat, jnp.float32, -bound, bound))


def init_linear(key: Array, shape: tuple[int, ...], deviation: float) -> Array:
    """Normal around 0: [C_in, C_out] float32."""
    return deviation * _drawn(shape, lambda flat: jax.random.normal(key, flat, jnp.float32))


_LEAST_DRAWN = 4096


def _drawn(shape: tuple[int, ...], draw: Callable[[tuple[int]], Array]) -> Array:
    """What `draw` gives for a shape: the first of more, of few sizes, as each size is compiled anew.

    Small ones would take seconds on a CPU. With JAX's default generator a value depends on its key and place alone, not
    on how many are drawn.
    """
    size = math.prod(shape)
    return draw((max(_LEAST_DRAWN, 1 << (size - 1).bit_length()),))[:size].reshape(shape)


def init_affine(channels: int) -> Params:
    """Batch norm at the start: scale 1, bias 0."""
    return {"scale": jnp.ones(channels), "bias": jnp.zeros(channels)}


def init_running(channels: int) -> Params:
    """Running statistics at the start: mean 0, variance 1."""
    return {"mean": jnp.zeros(channels), "var": jnp.ones(channels)}
