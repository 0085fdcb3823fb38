"""A batch shared by devices: each computes an equal part of its images, and all hold the same state.

What batch norm and gradients need of the other devices goes between them inside the compiled step, so the number of
devices changes results by float rounding only. On a CPU that shows as one device a core (`machine.set_up`), training
uses all cores in this way.

Several processes (`jax.distributed.initialize`) run the same program on the same images, or each one of its own on its
own devices.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

BATCH = "batch"  # the axis of devices


def devices_for(batch_size: int, among: Sequence[Any] | None = None) -> Mesh:
    """The devices that share batches of a size: the most that divide it.

    Args:
      batch_size: images.
      among: which there are to choose from; None is all of all processes.

    Raises:
      ValueError: if the devices of several processes cannot all take an equal part.
    """
    devices = jax.devices() if among is None else list(among)
    count = next(n for n in range(len(devices), 0, -1) if batch_size % n == 0)
    if not own(devices) and count < len(devices):
        raise ValueError(
            f"batch_size={batch_size} must be a multiple of {len(devices)}, the devices of all {jax.process_count()} "
            "processes"
        )
    return Mesh(np.asarray(devices[:count]), (BATCH,), axis_types=(AxisType.Auto,))


def own(devices: Sequence[Any]) -> bool:
    """Whether all of them are this process's."""
    return all(device.process_index == jax.process_index() for device in devices)


def to_all(mesh: Mesh, tree: Any) -> Any:
    """Arrays, alike in all processes, as ones that every device holds whole."""
    if jax.process_count() > 1:  # from one device to those of other processes the way leads over the host
        tree = jax.device_get(tree)
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def to_one(tree: Any) -> Any:
    """What one device of this process holds of arrays that all hold whole."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def shared(mesh: Mesh, function: Callable[..., Any], *, whole: int, out: Any) -> Callable[..., Any]:
    """A function of a device's part of a batch, as one of the batch; it may use collectives over `BATCH`.

    Args:
      mesh: of `devices_for`.
      function: of arguments that all devices hold whole, and then of ones whose leading axis is the images.
      whole: how many of the former there are.
      out: for each result, whether it is of images (leading axis) or the same on all devices; a tree of bools.
    """

    def spec(of_images: bool) -> PartitionSpec:
        return PartitionSpec(BATCH) if of_images else PartitionSpec()

    def of_batch(*arguments: Any) -> Any:
        places = tuple(spec(index >= whole) for index in range(len(arguments)))
        # The check of what varies between devices does not know the scans and custom gradients inside.
        mapped = jax.shard_map(function, mesh=mesh, in_specs=places, out_specs=jax.tree.map(spec, out), check_vma=False)
        return mapped(*arguments)

    return of_batch
