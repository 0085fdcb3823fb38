"""3×3 convolution in four ninths of the products: Winograd's F(2×2, 3×3) (Lavin & Gray, CVPR 2016, arXiv:1509.09308).

Four output pixels read a tile of 4×4, two pixels from one tile to the next. Along one axis, with tile d, kernel k and
outputs y::

    y = A' ((G k) * (B' d))       B' d = d0 - d2, d1 + d2, d2 - d1, d1 - d3
                                  G k  = k0, (k0 + k1 + k2) / 2, (k0 - k1 + k2) / 2, k2
                                  A' m = m0 + m1 + m2, m1 - m2 - m3

The 16 places of a transformed tile share nothing, and of each place all tiles and channels are one product of matrices:
16 products for four outputs, where there are 36 else. What is transformed is four times as large, so it is made of as
few images as fit a cache. The kernel's gradient is that of the formula, ``G' ((A g) * (B' d)) G`` summed over tiles.

Transforms are of float32. Factors of bfloat16 are rounded after them: tiles of spikes, whole numbers, lose nothing.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from spikernel_jax.operations import bits

Array = jax.Array
_Grid = list[list[Array]]  # rows of places


def convolved(x_NHWC: Array, kernel: Array, together: int, factors: DTypeLike = jnp.float32) -> Array:
    """SAME convolution of stride 1, float32 [N, H, W, C_out].

    Args:
      x_NHWC: [N, H, W, C_in], even H and W, float32 or bfloat16.
      kernel: [3, 3, C_in, C_out].
      together: how many images are transformed at once, a divisor of N.
      factors: the type that transformed tiles and kernels are multiplied in.
    """
    kernels = _both(_grid(kernel.astype(jnp.float32)), _of_kernel)
    movable = bits.movable(x_NHWC)

    def multiplied(tiles: Array, kernel: Array) -> Array:
        return jnp.matmul(tiles.astype(factors), kernel.astype(factors), preferred_element_type=jnp.float32)

    def outputs(index: Array) -> Array:
        tiles = _tiles(_part(movable, index, together))
        return _side_by_side(_both(_paired(multiplied, tiles, kernels), _to_outputs))

    n, h, w, _ = x_NHWC.shape
    return lax.map(outputs, jnp.arange(n // together)).reshape(n, h, w, -1)


def kernel_gradient(x_NHWC: Array, g_NHWC: Array, together: int) -> Array:
    """Gradient of `convolved` for the kernel, [3, 3, C_in, C_out].

    Args:
      x_NHWC: what was convolved, float32 [N, H, W, C_in].
      g_NHWC: the gradient for what came out, float32 [N, H, W, C_out].
      together: as in `convolved`.
    """

    def add(index: Array, total: _Grid) -> _Grid:
        x, g = (_part(whole, index, together) for whole in (x_NHWC, g_NHWC))
        # A column that nobody reads makes XLA copy the part first: else each place is read out of the whole, slowly.
        g = jnp.pad(g, ((0, 0), (0, 0), (0, 1), (0, 0)))
        blocks = [[g[:, i::2, j:-1:2] for j in range(2)] for i in range(2)]
        return _paired(jnp.add, total, _paired(_over_tiles, _tiles(x), _both(blocks, _from_outputs)))

    zeros = jnp.zeros((4, 4, x_NHWC.shape[3], g_NHWC.shape[3]), x_NHWC.dtype)
    total = lax.fori_loop(0, len(x_NHWC) // together, add, _grid(zeros))
    return jnp.stack([jnp.stack(row) for row in _both(total, _to_kernel)])


def _part(whole: Array, index: Array, together: int) -> Array:
    """So many of the images: slices, for what made them would be computed anew for an array of another shape."""
    return lax.dynamic_slice_in_dim(whole, index * together, together)


def _tiles(x_NHWC: Array) -> _Grid:
    """Transformed tiles, float32 [N, H / 2, W / 2, C] by place, of what `bits.movable` gives."""
    _, h, w, _ = x_NHWC.shape
    x = jnp.pad(x_NHWC, ((0, 0), (1, 1), (1, 1), (0, 0)))
    pixels = [[x[:, i : i + h - 1 : 2, j : j + w - 1 : 2] for j in range(4)] for i in range(4)]
    return _both([[bits.widened(pixel) for pixel in row] for row in pixels], _of_tile)


def _over_tiles(tiles: Array, gradients: Array) -> Array:
    """Products of channels summed over tiles, [C_in, C_out]."""
    left, right = (array.reshape(-1, array.shape[-1]) for array in (tiles, gradients))
    return lax.dot_general(left, right, (((0,), (0,)), ((), ())))


def _side_by_side(blocks: _Grid) -> Array:
    """[N, H, W, C] by place in a block of pixels as [N, rows · H, columns · W, C]."""
    pixels = jnp.stack([jnp.stack(row, 3) for row in blocks], 2)
    n, h, rows, w, columns, c = pixels.shape
    return pixels.reshape(n, h * rows, w * columns, c)


def _grid(places: Array) -> _Grid:
    """The two first axes as a grid."""
    return [list(row) for row in places]


def _paired(function: Callable[[Array, Array], Array], left: _Grid, right: _Grid) -> _Grid:
    return [[function(*pair) for pair in zip(*rows, strict=True)] for rows in zip(left, right, strict=True)]


def _both(grid: _Grid, transform: Callable[[list[Array]], list[Array]]) -> _Grid:
    """A transform of the columns of a grid, then of its rows."""
    columns = [transform(list(column)) for column in zip(*grid, strict=True)]
    return [transform(list(row)) for row in zip(*columns, strict=True)]


def _of_tile(d: list[Array]) -> list[Array]:
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _of_kernel(k: list[Array]) -> list[Array]:
    outer = k[0] + k[2]
    return [k[0], (outer + k[1]) / 2, (outer - k[1]) / 2, k[2]]


def _to_outputs(m: list[Array]) -> list[Array]:
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _from_outputs(g: list[Array]) -> list[Array]:
    return [g[0], g[0] + g[1], g[0] - g[1], -g[1]]


def _to_kernel(u: list[Array]) -> list[Array]:
    half = (u[1] + u[2]) / 2
    return [u[0] + half, (u[1] - u[2]) / 2, half + u[3]]
