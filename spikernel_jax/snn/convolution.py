"""Convolution, and the ways in which it is fast on a CPU: for few channels, and the gradient for the kernel.

Measured with jaxlib 0.10 on two cores: XLA's convolution reaches the rate of matrix products from 32 channels on, and
a fifth to a half of it below. Its gradient for the kernel is as fast in a program's top level, but a hundredth of that
in a `lax.scan`, even of one step, and there training lives.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array

_WIDE = 32  # channels from which XLA's CPU convolution is fast
_PATCH_BYTES = 5 << 19  # of patches that `_kernel_gradient` multiplies at once


def conv(x: Array, kernel: Array, stride: int = 1) -> Array:
    """SAME convolution of ``[..., H, W, C_in]`` with ``[k, k, C_in, C_out]``, PyTorch's padding.

    With stride 2 and an odd kernel, PyTorch pads ``(k-1)/2`` on each side, where "SAME" would pad
    less on the left: the explicit padding keeps published weights meaningful.

    Narrow inputs (bfloat16 spikes) are multiplied by the kernel in their own type and summed in float32. Their
    gradients are computed in the narrow type too; the kernel's comes in the kernel's.
    """
    x_NHWC = x.reshape(-1, *x.shape[-3:])
    y = _same(stride, x_NHWC, kernel)
    return y.reshape(*x.shape[:-3], *y.shape[1:])


def _sums(x: Array) -> jnp.dtype:
    """The type that products of x are summed in."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _direct(x_NHWC: Array, kernel: Array, strides: tuple[int, int] = (1, 1)) -> Array:
    pad = (kernel.shape[0] - 1) // 2
    return lax.conv_general_dilated(
        x_NHWC,
        kernel.astype(x_NHWC.dtype),
        strides,
        ((pad, pad), (pad, pad)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=_sums(x_NHWC),
    )


def _forwards(stride: int, x_NHWC: Array, kernel: Array) -> Array:
    if stride > 1:
        return _direct(x_NHWC, kernel, (stride, stride))
    if kernel.shape[0] == 1:
        return jnp.matmul(x_NHWC, kernel[0, 0].astype(x_NHWC.dtype), preferred_element_type=_sums(x_NHWC))
    k, (h, w) = kernel.shape[0], x_NHWC.shape[1:3]
    if k * k > h * w:  # XLA would exchange kernel and image, and lay the image out as a kernel
        return lax.platform_dependent(x_NHWC, kernel, cpu=_by_patches, default=_direct)
    pixels = math.gcd(_WIDE // kernel.shape[3], w) if max(kernel.shape[2:]) < _WIDE else 1
    if pixels == 1 or k * (k + pixels - 1) > h * w:
        return _direct(x_NHWC, kernel)
    return lax.platform_dependent(
        x_NHWC, kernel, cpu=lambda x_NHWC, kernel: _side_by_side(pixels, x_NHWC, kernel), default=_direct
    )


def _patches(x_NHWC: Array, k: int, stride: int, size: tuple[int, int]) -> Array:
    """What each output pixel of `size` reads: [N, h, w, k·k·C]."""
    pad = (k - 1) // 2
    x = jnp.pad(x_NHWC, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    down, across = ([slice(i, i + stride * side - stride + 1, stride) for i in range(k)] for side in size)
    return jnp.concatenate([x[:, rows, columns] for rows in down for columns in across], -1)


def _by_patches(x_NHWC: Array, kernel: Array) -> Array:
    """The convolution of stride 1 as one product."""
    patches = _patches(x_NHWC, kernel.shape[0], 1, (x_NHWC.shape[1], x_NHWC.shape[2]))
    flat = kernel.reshape(-1, kernel.shape[3]).astype(x_NHWC.dtype)
    return jnp.matmul(patches, flat, preferred_element_type=_sums(x_NHWC))


def _side_by_side(pixels: int, x_NHWC: Array, kernel: Array) -> Array:
    """The convolution of stride 1 with some output pixels side by side as if they were channels.

    The kernel is laid side by side `pixels` times, each one pixel further on, and strides over as many pixels. So
    `pixels` times as many outputs are made of a window that is only `pixels` - 1 pixels wider, and in memory they
    lie as they would have.
    """
    k = kernel.shape[0]
    shifted = [jnp.pad(kernel, ((0, 0), (i, pixels - 1 - i), (0, 0), (0, 0))) for i in range(pixels)]
    wide = jnp.stack(shifted, 3).reshape(k, k + pixels - 1, kernel.shape[2], -1)
    return _direct(x_NHWC, wide, (1, pixels)).reshape(*x_NHWC.shape[:3], -1)


def _backwards(stride: int, inputs: tuple[Array, Array], g_NHWC: Array) -> tuple[Array, Array]:
    x_NHWC, kernel = inputs
    g_NHWC = g_NHWC.astype(x_NHWC.dtype)  # a gradient of two types at once is not XLA's
    pad = (kernel.shape[0] - 1) // 2

    def convolved(x_NHWC: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(
            x_NHWC, kernel, (stride, stride), ((pad, pad), (pad, pad)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    if stride == 1:
        dx_NHWC = _forwards(1, g_NHWC, kernel[::-1, ::-1].swapaxes(2, 3)).astype(x_NHWC.dtype)
    else:
        narrow = kernel.astype(x_NHWC.dtype)
        (dx_NHWC,) = jax.linear_transpose(lambda x_NHWC: convolved(x_NHWC, narrow), x_NHWC)(g_NHWC)

    def by_xla(x_NHWC: Array, g_NHWC: Array) -> Array:
        zeros = jnp.zeros(kernel.shape, x_NHWC.dtype)
        (dkernel,) = jax.linear_transpose(lambda kernel: convolved(x_NHWC, kernel), zeros)(g_NHWC)
        return dkernel.astype(kernel.dtype)

    def by_products(x_NHWC: Array, g_NHWC: Array) -> Array:
        return _kernel_gradient(x_NHWC, g_NHWC, kernel.shape[0], stride).astype(kernel.dtype)

    return dx_NHWC, lax.platform_dependent(x_NHWC, g_NHWC, cpu=by_products, default=by_xla)


def _kernel_gradient(x_NHWC: Array, g_NHWC: Array, k: int, stride: int) -> Array:
    """Gradient for the kernel: products of gradients and patches, of as many images at once as fit a core's cache."""
    n, h, w, c_out = g_NHWC.shape
    c_in = x_NHWC.shape[3]
    fit = max(1, _PATCH_BYTES // (h * w * k * k * c_in * x_NHWC.dtype.itemsize))
    together = next(size for size in range(min(n, fit), 0, -1) if n % size == 0)

    def add(total: Array, piece: tuple[Array, Array]) -> tuple[Array, None]:
        x, g = (part.astype(total.dtype) for part in piece)  # not every product of bfloat16 is there on a CPU
        patches = _patches(x, k, stride, (h, w))
        # The narrow one to the left: the other way round takes twice as long.
        return total + jnp.einsum("nhwo,nhwp->op", g, patches), None

    pieces = jax.tree.map(lambda a: a.reshape(-1, together, *a.shape[1:]), (x_NHWC, g_NHWC))
    total, _ = lax.scan(add, jnp.zeros((c_out, k * k * c_in), _sums(x_NHWC)), pieces)
    return total.T.reshape(k, k, c_in, c_out)


_same = jax.custom_vjp(_forwards, nondiff_argnums=(0,))
_same.defvjp(lambda stride, x_NHWC, kernel: (_forwards(stride, x_NHWC, kernel), (x_NHWC, kernel)), _backwards)
