"""Everything that rates a cell without training it, under one name and one call: counts, scores, proxies."""

import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from spikernel_jax.data import Dataset, normalise
from spikernel_jax.scoring.bank import make_bank
from spikernel_jax.scoring.counts import COUNTS
from spikernel_jax.scoring.independent import score_independently
from spikernel_jax.scoring.population import score_population, some_genotypes
from spikernel_jax.scoring.proxies import FINISHED, PROXIES, Untrained
from spikernel_jax.scoring.scores import score_names, scored_spec
from spikernel_jax.snn import network
from spikernel_jax.snn.spec import NetworkSpec

Array = jax.Array
REFERENCE = "sahd_reference"
"""SAHD as the public SNASNet code computes it: weights and images of a cell's own (`independent`)."""


class Rated(NamedTuple):
    """What a predictor says of cells."""

    values: NDArray[np.float64]  # [n, R], by replicate: a draw of weights and images; a count's are all the same
    seconds: float  # a cell and replicate, without compilation


def predictor_names() -> tuple[str, ...]:
    """Names of all of them: counts, scores of `scores.register_score`, the reference's SAHD, and proxies."""
    return (*COUNTS, *score_names(), REFERENCE, *PROXIES)


def predict(
    name: str,
    genotypes: ArrayLike,
    spec: NetworkSpec,
    data: Dataset,
    key: Array,
    *,
    replicates: int = 1,
    batch: int = 64,
) -> Rated:
    """Rates cells by a predictor; higher is said to be better.

    Args:
      name: of `predictor_names`.
      genotypes: canonical rows [n, E] of `spec.space`.
      spec: the network at the size that it is rated at.
      data: training images are drawn from it, and labels by proxies that read them.
      key: a typed PRNG key; all cells have its weights and images, but for the reference's SAHD.
      replicates: R.
      batch: images a replicate.

    Returns:
      Values, and what a cell cost.

    Raises:
      ValueError: naming what is wrong: an unknown predictor, rows that are no cells, too few images.

    Example:
      >>> import jax
      >>> from spikernel_jax import CellSpace, NetworkSpec, load_dataset
      >>> from spikernel_jax.scoring.predictors import predict
      >>> data = load_dataset("mnist5k", limit_train=16, limit_validation=1, limit_test=1)
      >>> spec = NetworkSpec((28, 28, 1), 10, CellSpace((3,)), channels=2, time_steps=1, stem_stride=2)
      >>> cells = [spec.space.parse("0>3:skip"), spec.space.parse("0>3:conv3")]
      >>> predict("depth", cells, spec, data, jax.random.key(0)).values.ravel().tolist()
      [0.0, 1.0]
    """
    rows, spec = some_genotypes(spec, genotypes), scored_spec(spec)
    if name not in predictor_names():
        raise ValueError(f"predictor {name!r} is unknown; known: {', '.join(predictor_names())}")
    if not 2 <= batch * replicates <= len(data.train.labels):
        raise ValueError(f"batch={batch} times replicates={replicates} must be from 2 to the {len(data.train.labels)}"
                         " training images")  # fmt: skip
    if name in COUNTS:
        began = time.perf_counter()
        values = np.repeat(COUNTS[name](spec, rows)[:, None], replicates, 1)
        return Rated(values, (time.perf_counter() - began) / len(rows))
    if name == REFERENCE:
        return _timed(functools.partial(_reference, spec, data, key, replicates, batch), rows, replicates)
    images_key, banks_key = jax.random.split(key)
    chosen = np.asarray(jax.random.permutation(images_key, len(data.train.labels)))[: batch * replicates]
    images = np.asarray(normalise(jnp.asarray(data.train.images[chosen]), data.mean, data.std))
    images, labels = images.reshape(replicates, batch, *spec.image_shape), data.train.labels[chosen]
    bank = make_bank(banks_key, spec, replicates)
    if name in score_names():
        scored = functools.partial(_scores, bank, images, spec, name)
        return _timed(scored, rows, replicates)
    return _timed(
        functools.partial(_proxies, name, spec, bank, images, labels.reshape(replicates, batch), key), rows, replicates
    )


def _timed(rate: Any, rows: NDArray[np.int8], replicates: int) -> Rated:
    """Rates twice where there are few cells, so that no program is compiled in the second."""
    rate(rows[:1])
    began = time.perf_counter()
    values = rate(rows)
    return Rated(values, (time.perf_counter() - began) / values.size)


def _scores(bank: network.Params, images: Any, spec: NetworkSpec, name: str, rows: NDArray[np.int8]) -> Any:
    return score_population(rows, bank, images, spec, score=name, chunk=_CHUNK).replicates


_CHUNK = 64


def _reference(
    spec: NetworkSpec, data: Dataset, key: Array, replicates: int, batch: int, rows: NDArray[np.int8]
) -> NDArray[np.float64]:
    parts = [rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)]
    found = [
        score_independently(
            part, key, data.train.images, spec, mean=data.mean, std=data.std, batch=batch, seeds=replicates,
            chunk=_CHUNK,
        ).replicates
        for part in parts
    ]  # fmt: skip
    return np.concatenate(found)


def _proxies(
    name: str, spec: NetworkSpec, bank: network.Params, images: Any, labels: Any, key: Array, rows: NDArray[np.int8]
) -> NDArray[np.float64]:
    finish = FINISHED.get(name, lambda spec, row, found: float(found))
    values = np.empty((len(rows), len(images)))
    for r in range(len(images)):
        own = jax.tree.map(lambda leaf, r=r: leaf[r], bank)
        key_r = jax.random.fold_in(key, r)
        for place, row in enumerate(rows):
            found = _proxy(name, spec, np.asarray(row, np.int32), own, images[r], labels[r], key_r)
            values[place, r] = finish(spec, row, found)
    return values


@functools.partial(jax.jit, static_argnames=("name", "spec"))
def _proxy(
    name: str, spec: NetworkSpec, genotype: Array, params: network.Params, images: Array, labels: Array, key: Array
) -> Any:
    return PROXIES[name](Untrained(spec, genotype, params, images, labels, key))
