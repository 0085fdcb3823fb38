"""What a device's free memory holds: tables of shared work, and candidates side by side."""

from typing import Any

import psutil

from spikernel_jax.snn.spec import NetworkSpec

Device = Any  # jaxlib does not say what type a device has

_TABLE_SHARE = 0.5  # of the free memory, that tables of shared work may take
_TILE_SHARE = 0.4  # of what is free beside the tables, that a tile's arrays may take
_ARRAYS = (9, 15)  # of cell 1's size that a candidate of a tile holds; the latter where both cells go through time


def free_bytes(device: Device) -> int:
    """Memory of a device that is free now; the host's for a CPU."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return psutil.virtual_memory().available


def table_bytes(spec: NetworkSpec, batch: int) -> int:
    """Bytes of the tables that a device holds for shared work: three edges, each with every operation."""
    h, w = spec.cell_size(0)
    return 3 * spec.space.num_ops * spec.time_steps * batch * h * w * spec.channels * 4


def tile_that_fits(spec: NetworkSpec, batch: int, free: int, chunk: int) -> int:
    """How many candidates of a chunk go through the network side by side on a device: a divisor of the chunk.

    Args:
      spec: the network.
      batch: B.
      free: bytes that are free for this device's tile.
      chunk: candidates a device takes at once.
    """
    h, w = spec.cell_size(0)
    own = _ARRAYS[spec.space.feedback] * spec.time_steps * batch * h * w * spec.channels * 4
    most = max(1, int(_TILE_SHARE * free // own))
    return next(tile for tile in range(min(chunk, most), 0, -1) if chunk % tile == 0)


def lanes_that_fit(devices: int, tables: int, free: int, one_memory: bool) -> int:
    """How many devices can hold tables of shared work in half the free memory; 0 if none.

    Args:
      devices: how many there are.
      tables: bytes of one device's tables.
      free: bytes that are free, on one device or, with `one_memory`, for all of them together.
      one_memory: whether the devices share their memory, as those of a CPU do.
    """
    room = int(_TABLE_SHARE * free // tables)
    return min(devices, room) if one_memory else devices * (room > 0)
