"""Convolution, and the ways in which it is fast on a CPU: for few channels, in bfloat16, and in training.

Measured with jaxlib 0.10 on two cores: XLA's convolution reaches the rate of matrix products from 32 channels on, and
a fifth to a half of it below. Its gradient for the kernel is as fast in a program's top level, but a hundredth of that
in a `lax.scan`, even of one step, and there training lives. A convolution of bfloat16 is as slow as one of float32
where a core multiplies matrices of bfloat16 four times as fast (AMX); XLA moves bfloat16 through float32, a tenth as
fast as whole numbers of as many bytes. `winograd` is 1.4 to 2 times as fast from 32 channels on, and slower below.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

from spikernel_jax.operations import bits, winograd

Array = jax.Array

_WIDE = 32  # channels from which XLA's CPU convolution is fast
_TRANSFORMED = (jnp.float32, jnp.bfloat16)  # what `winograd` computes
_FACTOR_BYTES = 1 << 20  # of the factors that are multiplied at once, in float32: half of a core's cache


def conv(x: Array, kernel: Array, stride: int = 1, *, dilation: int = 1, groups: int = 1) -> Array:
    """SAME convolution of ``[..., H, W, C_in]``, PyTorch's padding.

    With stride 2 and an odd kernel, PyTorch pads ``(k-1)/2`` on each side, where "SAME" would pad
    less on the left: the explicit padding keeps published weights meaningful.

    Where it is differentiated, a CPU may compute its value and gradients by `winograd`: equal but for rounding.
    Evaluated alone it adds up products as published implementations do.

    Narrow inputs (bfloat16 spikes) are multiplied by the kernel in their own type and summed in float32. Their
    gradients are computed in the narrow type too; the kernel's comes in the kernel's.

    Args:
      x: ``[..., H, W, C_in]``.
      kernel: ``[k_h, k_w, C_in / groups, C_out]``, odd k.
      stride: 1, or 2 of square kernels.
      dilation: pixels from one tap to the next.
      groups: 1, or C_in and C_out (depthwise).
    """
    x_NHWC = x.reshape(-1, *x.shape[-3:])
    y = _depthwise(dilation, x_NHWC, kernel) if groups > 1 else _same((stride, dilation), x_NHWC, kernel)
    return y.reshape(*x.shape[:-3], *y.shape[1:])


def taps(size: tuple[int, int], kernel: tuple[int, ...], stride: int = 1, dilation: int = 1) -> NDArray[np.int64]:
    """How many pixels each output of a SAME convolution reads, [H, W] of the outputs; padding is not read.

    With stride 1 also how many outputs each pixel reaches.
    """

    def along(n: int, k: int) -> NDArray[np.int64]:
        at = np.arange(0, n, stride)
        return np.minimum(at // dilation, k // 2) + 1 + np.minimum((n - 1 - at) // dilation, k // 2)

    return np.outer(*map(along, size, kernel))


def _sums(x: Array) -> jnp.dtype:
    """The type that products of x are summed in."""
    return jnp.promote_types(x.dtype, jnp.float32)


Padding = tuple[tuple[int, int], tuple[int, int]]


def _padding(kernel: Array, dilation: int) -> Padding:
    """Zeros before and after rows and columns."""
    down, across = (dilation * (k - 1) // 2 for k in kernel.shape[:2])
    return (down, down), (across, across)


def _direct(
    x_NHWC: Array,
    kernel: Array,
    strides: tuple[int, int] = (1, 1),
    dilation: int = 1,
    padding: Padding | None = None,
) -> Array:
    return lax.conv_general_dilated(
        x_NHWC,
        kernel.astype(x_NHWC.dtype),
        strides,
        padding or _padding(kernel, dilation),
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=_sums(x_NHWC),
    )


def _depthwise(dilation: int, x_NHWC: Array, kernel: Array) -> Array:
    """Each channel with taps of its own: a sum of shifted images, one pass over memory, on every platform."""
    (high, wide), (h, w) = kernel.shape[:2], x_NHWC.shape[1:3]
    x = jnp.pad(x_NHWC, ((0, 0), *_padding(kernel, dilation), (0, 0))).astype(_sums(x_NHWC))
    parts = (
        x[:, i * dilation : i * dilation + h, j * dilation : j * dilation + w] * kernel[i, j, 0]
        for i in range(high)
        for j in range(wide)
    )
    return functools.reduce(jnp.add, parts)


def _forwards(steps: tuple[int, int], x_NHWC: Array, kernel: Array) -> Array:
    stride, dilation = steps
    if stride > 1:
        return _direct(x_NHWC, kernel, (stride, stride))
    if kernel.shape[:2] == (1, 1):
        return _product(x_NHWC, kernel[0, 0].astype(x_NHWC.dtype))
    if x_NHWC.dtype == jnp.bfloat16:
        by_rows, direct = (functools.partial(way, dilation=dilation) for way in (_by_rows, _direct))
        return lax.platform_dependent(x_NHWC, kernel, cpu=by_rows, default=direct)
    k, (h, w) = max(kernel.shape[:2]), x_NHWC.shape[1:3]
    if dilation * k * dilation * k > h * w:  # XLA would exchange kernel and image, and lay the image out as a kernel
        by_patches = functools.partial(_by_patches, dilation)
        return lax.platform_dependent(
            x_NHWC, kernel, cpu=by_patches, default=functools.partial(_direct, dilation=dilation)
        )
    square = kernel.shape[0] == kernel.shape[1] and dilation == 1
    pixels = math.gcd(_WIDE // kernel.shape[3], w) if square and max(kernel.shape[2:]) < _WIDE else 1
    if pixels == 1 or k * (k + pixels - 1) > h * w:
        return _direct(x_NHWC, kernel, dilation=dilation)
    return lax.platform_dependent(
        x_NHWC, kernel, cpu=lambda x_NHWC, kernel: _side_by_side(pixels, x_NHWC, kernel), default=_direct
    )


def _quick(steps: tuple[int, int], x_NHWC: Array, kernel: Array, factors: jnp.dtype) -> Array:
    """`_forwards` of x in the factors' type, rounded otherwise where that is quicker: as only training may."""

    def plainly(x_NHWC: Array, kernel: Array) -> Array:
        return _forwards(steps, x_NHWC.astype(factors), kernel)

    if not _in_tiles(steps, x_NHWC, kernel):
        return plainly(x_NHWC, kernel)
    together = _tiles_together(x_NHWC, max(kernel.shape[2:]))
    in_tiles = functools.partial(winograd.convolved, together=together, factors=factors)
    return lax.platform_dependent(x_NHWC, kernel, cpu=in_tiles, default=plainly)


def _in_tiles(steps: tuple[int, int], x_NHWC: Array, kernel: Array) -> bool:
    """Whether `winograd` can be had, and pays on a CPU."""
    even, wide = not any(side % 2 for side in x_NHWC.shape[1:3]), min(kernel.shape[2:]) >= _WIDE
    return steps == (1, 1) and kernel.shape[:2] == (3, 3) and even and wide and x_NHWC.dtype in _TRANSFORMED


def _tiles_together(x_NHWC: Array, channels: int, least: int = 0) -> int:
    """Images whose tiles, four times as large and of so many channels, are made at once: in two of `_FACTOR_BYTES`."""
    n, h, w, _ = x_NHWC.shape
    return _together(n, 4 * h * w * channels * _sums(x_NHWC).itemsize // 2, least)


def _by_rows(x_NHWC: Array, kernel: Array, dilation: int) -> Array:
    """The convolution of stride 1 as a product for each row of the kernel, of as many images as fit a core's cache.

    The columns that an output pixel reads lie side by side, k copies of the images where patches would be k² copies.
    """
    (n, h, w, c_in), (high, wide, _, c_out), dtype = x_NHWC.shape, kernel.shape, x_NHWC.dtype
    # As measured, half of what is best for a kernel's gradient.
    together = _together(n, 2 * h * w * wide * c_in * dtype.itemsize)
    pad = ((0, 0), *_padding(kernel, dilation), (0, 0))
    factors = kernel.astype(dtype).reshape(high, wide * c_in, c_out)

    def summed(x: Array) -> Array:
        x = jnp.pad(x, pad)
        x = jnp.concatenate([x[:, :, j * dilation : j * dilation + w] for j in range(wide)], -1)
        rows = (x[:, i * dilation : i * dilation + h].reshape(-1, wide * c_in) for i in range(high))
        products = [_product(bits.moved(row, dtype), factor) for row, factor in zip(rows, factors, strict=True)]
        return functools.reduce(jnp.add, products)

    return lax.map(summed, bits.movable(x_NHWC).reshape(-1, together, h, w, c_in)).reshape(n, h, w, c_out)


def _together(n: int, size: int, least: int = 0) -> int:
    """Of n images, each of so many bytes of a factor, how many are multiplied at once."""
    fit = max(1, max(_FACTOR_BYTES, least) // size)
    return next(images for images in range(min(n, fit), 0, -1) if n % images == 0)


def _product(left: Array, right: Array) -> Array:
    return jnp.matmul(left, right, preferred_element_type=_sums(left))


def _by_patches(dilation: int, x_NHWC: Array, kernel: Array) -> Array:
    """The convolution of stride 1 as one product of what each output pixel reads, [N, H, W, k_h·k_w·C]."""
    x = jnp.pad(x_NHWC, ((0, 0), *_padding(kernel, dilation), (0, 0)))
    down, across = (
        [slice(i * dilation, i * dilation + side) for i in range(k)]
        for side, k in zip(x_NHWC.shape[1:3], kernel.shape[:2], strict=True)
    )
    patches = jnp.concatenate([x[:, rows, columns] for rows in down for columns in across], -1)
    return _product(patches, kernel.reshape(-1, kernel.shape[3]).astype(x_NHWC.dtype))


def _side_by_side(pixels: int, x_NHWC: Array, kernel: Array) -> Array:
    """The convolution of stride 1 with some output pixels side by side as if they were channels.

    The kernel is laid side by side `pixels` times, each one pixel further on, and strides over as many pixels. So
    `pixels` times as many outputs are made of a window that is only `pixels` - 1 pixels wider, and in memory they
    lie as they would have.
    """
    k = kernel.shape[0]
    shifted = [jnp.pad(kernel, ((0, 0), (i, pixels - 1 - i), (0, 0), (0, 0))) for i in range(pixels)]
    wide = jnp.stack(shifted, 3).reshape(k, k + pixels - 1, kernel.shape[2], -1)
    return _direct(x_NHWC, wide, (1, pixels), padding=_padding(kernel, 1)).reshape(*x_NHWC.shape[:3], -1)


def _backwards(steps: tuple[int, int], inputs: tuple[Array, Array], g_NHWC: Array) -> tuple[Array, Array]:
    x_NHWC, kernel = inputs
    stride, dilation = steps
    whole_NHWC, g_NHWC = g_NHWC, g_NHWC.astype(x_NHWC.dtype)  # a gradient of two types at once is not XLA's

    def convolved(x_NHWC: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(
            x_NHWC,
            kernel,
            (stride, stride),
            _padding(kernel, dilation),
            rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    if stride == 1:
        turned = kernel[::-1, ::-1].swapaxes(2, 3)
        dx_NHWC = _quick(steps, whole_NHWC, turned, x_NHWC.dtype).astype(x_NHWC.dtype)
    else:
        narrow = kernel.astype(x_NHWC.dtype)
        (dx_NHWC,) = jax.linear_transpose(lambda x_NHWC: convolved(x_NHWC, narrow), x_NHWC)(g_NHWC)

    def by_xla(x_NHWC: Array, g_NHWC: Array) -> Array:
        zeros = jnp.zeros(kernel.shape, x_NHWC.dtype)
        (dkernel,) = jax.linear_transpose(lambda kernel: convolved(x_NHWC, kernel), zeros)(g_NHWC)
        return dkernel.astype(kernel.dtype)

    def by_products(x_NHWC: Array, g_NHWC: Array) -> Array:
        if kernel.shape[:2] == (1, 1) and stride == 1 and x_NHWC.dtype == _sums(x_NHWC):  # of bfloat16 it is slower
            found = lax.dot_general(x_NHWC, g_NHWC, (((0, 1, 2), (0, 1, 2)), ((), ()))).reshape(kernel.shape)
        elif _in_tiles(steps, x_NHWC, kernel) and x_NHWC.dtype == jnp.float32:
            sums = 16 * math.prod(kernel.shape[2:]) * x_NHWC.dtype.itemsize
            together = _tiles_together(x_NHWC, sum(kernel.shape[2:]), sums)
            found = winograd.kernel_gradient(x_NHWC, g_NHWC, together)
        else:
            found = _kernel_gradient(x_NHWC, g_NHWC, kernel, steps)
        return found.astype(kernel.dtype)

    with jax.named_scope("kernel_gradient"):  # profiles tell it from the input's
        return dx_NHWC, lax.platform_dependent(x_NHWC, g_NHWC, cpu=by_products, default=by_xla)


def _kernel_gradient(x_NHWC: Array, g_NHWC: Array, kernel: Array, steps: tuple[int, int]) -> Array:
    """Gradient for the kernel: one product of images and gradients, of as many at once as fit a core's cache.

    Of a tap, images are moved by its row and gradients by its column: k copies of each hold all k² taps, where patches
    of the images alone would be k² copies. What is moved beyond a border meets no other: no product is wasted there.
    """
    stride, dilation = steps
    (high, wide, c_in, c_out), (n, rows, columns, _) = kernel.shape, g_NHWC.shape
    w, dtype = x_NHWC.shape[2], x_NHWC.dtype
    (up, _), (left, _) = _padding(kernel, dilation)
    sums = high * c_in * wide * c_out * _sums(x_NHWC).itemsize
    together = _together(n, rows * w * (high * c_in + wide * c_out) * dtype.itemsize, sums)
    # Gradients lie where the middle of their window does.
    beside = (left, left + w - 1 - stride * (columns - 1), stride - 1)

    movable = bits.movable(x_NHWC), bits.movable(g_NHWC)

    def add(index: Array, total: Array) -> Array:
        # Slices, for pieces of another shape would be computed beside the whole, of which the other gradient is made.
        x, g = (lax.dynamic_slice_in_dim(whole, index * together, together) for whole in movable)
        x_CNHW = jnp.pad(x.transpose(3, 0, 1, 2), ((0, 0), (0, 0), (up, up), (0, 0)))
        starts = (i * dilation for i in range(high))
        left_factor = jnp.concatenate([x_CNHW[:, :, i : i + stride * rows - stride + 1 : stride] for i in starts], 0)
        g = lax.pad(g, jnp.zeros((), g.dtype), ((0, 0, 0), (0, 0, 0), beside, (0, 0, 0)))
        starts = (2 * left - j * dilation for j in range(wide))
        right_factor = jnp.concatenate([g[:, :, j : j + w] for j in starts], -1)
        factors = left_factor.reshape(high * c_in, -1), right_factor.reshape(-1, wide * c_out)
        return total + _product(*(bits.moved(factor, dtype) for factor in factors))

    total = lax.fori_loop(0, n // together, add, jnp.zeros((high * c_in, wide * c_out), _sums(x_NHWC)))
    return total.reshape(high, c_in, wide, c_out).swapaxes(1, 2)


def _differentiated(steps: tuple[int, int], x_NHWC: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _quick(steps, x_NHWC, kernel, x_NHWC.dtype), (x_NHWC, kernel)


_same = jax.custom_vjp(_forwards, nondiff_argnums=(0,))
_same.defvjp(_differentiated, _backwards)
