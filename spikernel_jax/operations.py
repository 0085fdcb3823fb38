"""What an edge of a cell can do: convolution with batch norm, average pooling; their initialisation.

All activations are time-major ``[T, B, H, W, C]``; a convolution over T time steps of one layer is
one convolution over ``T*B`` images. Weights are ``[k, k, C_in, C_out]``.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
Params = dict[str, Array]

BN_EPSILON = 1e-5
BN_MOMENTUM = 0.1  # weight of the new statistic, PyTorch's convention
_WIDE = 32  # channels that make XLA's CPU convolution a fast one
NORMS = ("per_step", "over_time")


def conv(x: Array, kernel: Array, stride: int = 1) -> Array:
    """SAME convolution of ``[..., H, W, C_in]`` with ``[k, k, C_in, C_out]``, PyTorch's padding.

    With stride 2 and an odd kernel, PyTorch pads ``(k-1)/2`` on each side, where "SAME" would pad
    less on the left: the explicit padding keeps published weights meaningful.

    Narrow inputs (bfloat16 spikes) are multiplied by the kernel in their own type and summed in float32.
    """
    k = kernel.shape[0]
    kernel = kernel.astype(x.dtype)
    if k == 1 and stride == 1:  # a matrix product: several times faster backwards than a convolution
        sums = jnp.promote_types(x.dtype, jnp.float32)
        return jnp.matmul(x, kernel[0, 0], preferred_element_type=sums)
    x_NHWC = x.reshape(-1, *x.shape[-3:])
    pixels = _pixels_together(x_NHWC.shape, kernel.shape, stride)
    if pixels == 1:
        y = _direct(x_NHWC, kernel, (stride, stride))
    else:
        y = lax.platform_dependent(x_NHWC, kernel, cpu=functools.partial(_side_by_side, pixels), default=_direct)
    return y.reshape(*x.shape[:-3], *y.shape[1:])


def _direct(x_NHWC: Array, kernel: Array, strides: tuple[int, int] = (1, 1)) -> Array:
    pad = (kernel.shape[0] - 1) // 2
    return lax.conv_general_dilated(
        x_NHWC,
        kernel,
        strides,
        ((pad, pad), (pad, pad)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=jnp.promote_types(x_NHWC.dtype, jnp.float32),
    )


def _pixels_together(image: tuple[int, ...], kernel: tuple[int, ...], stride: int) -> int:
    """How many neighbours in a row `_side_by_side` should compute as one; 1 where that gains nothing."""
    return math.gcd(_WIDE // kernel[3], image[2]) if max(kernel[2:]) < _WIDE and stride == 1 else 1


def _side_by_side_forwards(pixels: int, x_NHWC: Array, kernel: Array) -> Array:
    """The convolution of stride 1 with some output pixels side by side as if they were channels.

    XLA's fast CPU convolution wants `_WIDE` channels: narrower ones run at a fifth to a half of its rate. The
    kernel is laid side by side `pixels` times, each one pixel further on, and strides over as many pixels. So
    `pixels` times as many outputs are made of a window that is only `pixels` - 1 pixels wider, and in memory they
    lie as they would have.
    """
    k = kernel.shape[0]
    shifted = [jnp.pad(kernel, ((0, 0), (i, pixels - 1 - i), (0, 0), (0, 0))) for i in range(pixels)]
    wide = jnp.stack(shifted, 3).reshape(k, k + pixels - 1, kernel.shape[2], -1)
    return _direct(x_NHWC, wide, (1, pixels)).reshape(*x_NHWC.shape[:3], -1)


def _side_by_side_backwards(_: int, inputs: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    return jax.vjp(_direct, *inputs)[1](g)  # through the wide kernel it would be slower


_side_by_side = jax.custom_vjp(_side_by_side_forwards, nondiff_argnums=(0,))
_side_by_side.defvjp(lambda pixels, *inputs: (_side_by_side_forwards(pixels, *inputs), inputs), _side_by_side_backwards)


def avgpool3(x: Array) -> Array:
    """3×3 average of ``[..., H, W, C]``, stride 1, zero padding, divisor always 9."""
    h, w = x.shape[-3:-1]
    pad = [(0, 0)] * (x.ndim - 3) + [(1, 1), (1, 1), (0, 0)]
    padded = jnp.pad(x, pad)
    first, *others = (lax.slice_in_dim(padded, i, i + h, axis=x.ndim - 3) for i in range(3))
    rows = sum(others, first)
    first, *others = (lax.slice_in_dim(rows, j, j + w, axis=x.ndim - 2) for j in range(3))
    return sum(others, first) / 9


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

    Returns:
      The normalised activations, and the running statistics after the T steps (None if none came in).
    """
    axes = (1, 2, 3) if norm == "per_step" else (0, 1, 2, 3)
    if train:
        mean = _mean(x_TBHWC, axes)
        var = _mean(jnp.square(x_TBHWC - mean), axes)
        if running is not None:
            running = _updated(running, mean, var, math.prod(x_TBHWC.shape[a] for a in axes))
    else:
        if running is None:
            raise ValueError("batch norm with train=False needs running statistics; none were given")
        mean, var = running["mean"], running["var"]
    # One multiply-add for each value, in PyTorch's order, so that float32 spikes agree with published ones.
    scale = gain * affine["scale"] / jnp.sqrt(var + BN_EPSILON)
    return x_TBHWC * scale + (affine["bias"] - mean * scale), running


def _mean(x_TBHWC: Array, axes: tuple[int, ...]) -> Array:
    """Mean over axes, which end with W, kept; first without W, so that few channels still fill a vector register."""
    wide = x_TBHWC.reshape(*x_TBHWC.shape[:3], -1).mean(axes[:-1], keepdims=True)
    return wide.reshape(*wide.shape[:3], *x_TBHWC.shape[3:]).mean(3, keepdims=True)


def _updated(running: Params, mean: Array, var: Array, n: int) -> Params:
    """Running statistics after every step's update, in order; the variance unbiased, as PyTorch."""
    unbiased = n / max(n - 1, 1)
    new_mean, new_var = running["mean"], running["var"]
    for t in range(mean.shape[0]):
        new_mean = (1 - BN_MOMENTUM) * new_mean + BN_MOMENTUM * mean[t].reshape(-1)
        new_var = (1 - BN_MOMENTUM) * new_var + BN_MOMENTUM * unbiased * var[t].reshape(-1)
    return {"mean": lax.stop_gradient(new_mean), "var": lax.stop_gradient(new_var)}


def init_conv(key: Array, k: int, c_in: int, c_out: int) -> Array:
    """Kaiming-uniform with a = 2, as the public SNASNet code: [k, k, c_in, c_out] float32."""
    bound = math.sqrt(6 / ((1 + 2**2) * c_in * k * k))
    return jax.random.uniform(key, (k, k, c_in, c_out), jnp.float32, -bound, bound)


def init_linear(key: Array, c_in: int, c_out: int, deviation: float) -> Array:
    """Normal around 0: [c_in, c_out] float32."""
    return deviation * jax.random.normal(key, (c_in, c_out), jnp.float32)


def init_affine(channels: int) -> Params:
    """Batch norm at the start: scale 1, bias 0."""
    return {"scale": jnp.ones(channels), "bias": jnp.zeros(channels)}


def init_running(channels: int) -> Params:
    """Running statistics at the start: mean 0, variance 1."""
    return {"mean": jnp.zeros(channels), "var": jnp.ones(channels)}
