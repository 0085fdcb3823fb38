"""What a model is worth on images: accuracy, and spikes of every LIF site."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from spikernel_jax.data import Split, normalise
from spikernel_jax.snn import network
from spikernel_jax.snn.model import Model
from spikernel_jax.snn.spec import NetworkSpec
from spikernel_jax.training.devices import BATCH, devices_for, shared, to_all

Array = jax.Array


@functools.partial(jax.jit, static_argnames=("devices", "spec", "genotype"))
def _right(
    devices: jax.sharding.Mesh, spec: NetworkSpec, genotype: Any, arrays: Any, cell: Any, x: Array, labels_B: Array
) -> Array:
    """How many images are classified rightly; a label of -1 never is."""

    def of_part(arrays: Any, cell: Any, x: Array, labels_B: Array) -> Array:
        params, stats = arrays
        out = network.apply(spec, cell if genotype is None else genotype, params, x, stats=stats)
        return jax.lax.psum((out.logits_BK.argmax(-1) == labels_B).sum(), BATCH)

    return shared(devices, of_part, whole=2, out=False)(arrays, cell, x, labels_B)


def evaluate(
    model: Model,
    split: Split,
    batch_size: int = 256,
    *,
    one_program: bool = False,
    devices: Sequence[Any] | None = None,
) -> float:
    """Accuracy (0 to 1) of a model on a split, by running statistics.

    Args:
      model: whose accuracy it is.
      split: images and labels.
      batch_size: images at a time; results do not depend on it.
      one_program: as in `train`.
      devices: as in `train`.

    Example:
      >>> import jax
      >>> from spikernel_jax import CellSpace, Model, NetworkSpec, evaluate, load_dataset
      >>> from spikernel_jax.snn import network, rounding
      >>> spec = NetworkSpec((28, 28, 1), 10, CellSpace((3,)), channels=2, time_steps=1, stem_stride=2)
      >>> cell = tuple(spec.space.parse("0>3:skip").tolist())
      >>> untrained = Model(spec, cell, *network.init(jax.random.key(0), spec, cell), (0.1307,), (0.3081,))
      >>> 0 <= evaluate(untrained, load_dataset("mnist5k", limit_test=50).test) <= 1
      True
    """
    count = jax.device_count() if devices is None else len(devices)
    size = -(-min(batch_size, len(split.labels)) // count) * count
    mesh = devices_for(size, devices)
    genotype, cell, arrays = as_data(model, one_program)
    arrays, cell = to_all(mesh, (arrays, cell))
    right = 0
    for images, labels in _batches(split, size):
        padded = np.pad(labels, (0, size - len(labels)), constant_values=-1)
        x = normalise(images, model.mean, model.std)
        right += int(_right(mesh, model.spec, genotype, arrays, cell, *to_all(mesh, (x, padded))))
    return right / len(split.labels)


def as_data(model: Model, one_program: bool) -> tuple[Any, Any, Any]:
    """What a program is compiled for of a model's genotype, what it is given as data, and the arrays it reads."""
    if not one_program:
        return model.genotype, (), (model.params, model.stats)
    bank = _bank(model.spec)
    arrays = tuple(network.in_bank(own, whole) for own, whole in zip((model.params, model.stats), bank, strict=True))
    return None, np.asarray(model.genotype, np.int32), arrays


@functools.cache
def _bank(spec: NetworkSpec) -> tuple[network.Params, network.Stats]:
    """Shapes of parameters and statistics of every operation."""
    return jax.eval_shape(lambda: network.init(jax.random.key(0), spec))


def _batches(split: Split, size: int) -> Any:
    """(uint8 images, labels) batch by batch; the last images are padded, so that one program serves all."""
    for start in range(0, len(split.labels), size):
        images, labels = split.images[start : start + size], split.labels[start : start + size]
        if len(labels) < size:
            images = np.concatenate([images, np.repeat(images[:1], size - len(labels), 0)])
        yield images, labels


@functools.partial(jax.jit, static_argnames=("spec", "genotype", "observe"))
def _observed(
    spec: NetworkSpec, genotype: Any, cell: Any, arrays: Any, images_BHWC: Array, observe: Callable[[Array], Array]
) -> Any:
    """What is observed of spikes, [T, B, ...] by LIF site."""
    (params, stats), codes = arrays, cell if genotype is None else genotype
    return network.apply(spec, codes, params, images_BHWC, stats=stats, observe=observe).records


def _over_channels(spikes: Array) -> Array:
    return spikes.sum(-1)


def _over_neurons(spikes: Array) -> Array:
    return spikes.reshape(*spikes.shape[:2], -1).sum(-1)


def measure_spikes(
    model: Model, split: Split, batch_size: int = 256, *, one_program: bool = False
) -> dict[str, np.ndarray]:
    """Mean number of spikes of one image over all time steps and channels, [H, W] by LIF site, on a split.

    Args:
      model: whose sites they are.
      split: images.
      batch_size: images at a time; results do not depend on it.
      one_program: as in `train`.
    """
    total: dict[str, np.ndarray] = {}
    genotype, cell, arrays = as_data(model, one_program)
    there = model.spec.sites(model.genotype)
    for images, labels in _batches(split, min(batch_size, len(split.labels))):
        x = normalise(images, model.mean, model.std)
        for site, counts in _observed(model.spec, genotype, cell, arrays, x, _over_channels).items():
            if site not in there:
                continue
            counts_HW = np.asarray(counts, np.float64)[:, : len(labels)].sum((0, 1))
            total[site] = total.get(site, 0.0) + counts_HW.reshape(counts_HW.shape or (1, 1))  # the head has no pixels
    return {site: value / len(split.labels) for site, value in total.items()}


class Activity(NamedTuple):
    """What one LIF layer does over time."""

    spikes_T: np.ndarray  # of the first image, at each time step
    neurons: int
    rate: float  # spikes of a neuron and time step, mean over images


def activity(model: Model, images: np.ndarray) -> dict[str, Activity]:
    """How a model's LIF layers fire on images, by site, in the order in which spikes go through them.

    Args:
      model: whose sites they are.
      images: uint8 [B, H, W, C], all at once.
    """
    there = model.spec.sites(model.genotype)
    x = normalise(images, model.mean, model.std)
    counts = _observed(model.spec, model.genotype, (), (model.params, model.stats), x, _over_neurons)
    return {
        site: Activity(np.asarray(n_TB[:, 0]), there[site].neurons, float(n_TB.mean() / there[site].neurons))
        for site, n_TB in ((site, counts[site]) for site in there if site in counts)
    }
