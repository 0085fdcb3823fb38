"""Scores with independent draws for each candidate, the public SNASNet code's way, to compare with ours."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from spikernel_jax.data import augment, check_images, normalise
from spikernel_jax.scoring import scores
from spikernel_jax.scoring.population import some_genotypes
from spikernel_jax.scoring.replicates import Scores, over_replicates
from spikernel_jax.snn import network
from spikernel_jax.snn.spec import NetworkSpec

Array = jax.Array


def _score(spec: NetworkSpec, score: str, genotype: Array, bank: Any, images_BHWC: Array, keep: Any) -> Any:
    terms, _ = scores.spike_terms(spec, genotype, bank, images_BHWC, dropout_keep=keep)
    return scores.get_score(score)(terms), terms.calls


@functools.partial(jax.jit, static_argnames=("spec", "score", "batch", "seeds", "padding", "flip", "mean", "std"))
def _independent(
    spec: NetworkSpec,
    score: str,
    batch: int,
    seeds: int,
    padding: int,
    flip: bool,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    genotypes: Array,
    words: Array,
    key: Array,
    pool: Array,
) -> Any:
    """The reference's way: one network a candidate, its weights and dropout mask its own, over `seeds` batches."""

    def candidate(of: Any) -> Any:
        genotype, (high, low) = of
        weights, mask, batches = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, high), low), 3)
        bank, _ = network.init(weights, spec)
        keep = network.dropout_mask(mask, spec, batch)

        def replicate(r: Array) -> Any:
            chosen, crops = jax.random.split(jax.random.fold_in(batches, r))
            images = pool[jax.random.choice(chosen, len(pool), (batch,), replace=False)]
            images = normalise(augment(crops, images, padding, flip), mean, std)
            return _score(spec, score, genotype, bank, images, keep)

        return jax.lax.map(replicate, jnp.arange(seeds))

    return jax.lax.map(candidate, (genotypes, words))


def _padded(rows: NDArray[np.int8], chunk: int | None) -> NDArray[np.int8]:
    """Rows up to a whole chunk, so that the last chunk runs the program of the others."""
    if chunk is None or len(rows) == chunk:
        return rows
    if len(rows) > chunk:
        raise ValueError(f"genotypes: {len(rows)} rows do not fit chunk={chunk}")
    return np.concatenate([rows, np.repeat(rows[:1], chunk - len(rows), 0)])


def score_independently(
    genotypes: ArrayLike,
    key: Array,
    pool: ArrayLike,
    spec: NetworkSpec,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    batch: int,
    seeds: int = 2,
    score: str = "sahd_code",
    padding: int = 0,
    flip: bool = False,
    chunk: int | None = None,
) -> Scores:
    """Scores candidates as the public SNASNet code does: independent draws for each.

    A candidate is one network, its weights and dropout mask drawn once, scored on `seeds` augmented batches
    of its own; all draws follow from the key and the candidate's identity. So the spread over replicates
    is that of the batches alone, not of the weights.

    One difference: the public code never resets membranes between batches, so that its second batch starts
    from what the first left. Here every batch starts clean.

    Args:
      genotypes: canonical rows [n, E] of `spec.space`.
      key: a typed PRNG key.
      pool: uint8 images [N, H, W, C] to draw batches from.
      spec: the network to score in.
      mean: per channel, of pixel/255.
      std: per channel, of pixel/255.
      batch: B.
      seeds: batches a candidate, 2 in the public code.
      score: a registered score.
      padding: of the random crop.
      flip: random horizontal flips.
      chunk: pad the population to this many rows, so that populations of different sizes share one
        compiled program; None compiles for n.

    Returns:
      Scores with standard errors over the batches.

    Raises:
      ValueError: naming the argument.

    Example:
      >>> import jax
      >>> import numpy as np
      >>> from spikernel_jax import CellSpace, NetworkSpec, score_independently
      >>> spec = NetworkSpec((8, 8, 1), 2, CellSpace((3,)), channels=4, time_steps=2)
      >>> pool = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
      >>> cells = spec.space.enumerate()[:3]
      >>> score_independently(cells, jax.random.key(0), pool, spec, mean=(0.5,), std=(0.3,), batch=6).replicates.shape
      (3, 2)
    """
    scores.get_score(score)
    spec = scores.scored_spec(spec)
    rows, images = some_genotypes(spec, genotypes), np.asarray(pool)
    check_images(images)
    if rows.ndim != 2:
        raise ValueError(f"genotypes have shape {rows.shape}; want [n, E]")
    if images.dtype != np.uint8 or images.shape[1:] != spec.image_shape:
        raise ValueError(f"pool has shape {images.shape} and dtype {images.dtype}; want uint8 [N, *{spec.image_shape}]")
    if not 1 <= batch <= len(images):
        raise ValueError(f"batch={batch} must be between 1 and the {len(images)} images of the pool")
    if seeds < 1:
        raise ValueError(f"seeds={seeds} must be at least 1")
    padded = _padded(rows, chunk)
    identity = spec.space.identity(padded).astype(np.uint64)
    words = np.stack([identity >> np.uint64(32), identity & np.uint64(0xFFFFFFFF)], 1).astype(np.uint32)
    result = _independent(
        spec,
        score,
        batch,
        seeds,
        padding,
        flip,
        tuple(float(value) for value in mean),  # static under jit, so hashable
        tuple(float(value) for value in std),
        jnp.asarray(padded),
        jnp.asarray(words),
        key,
        jnp.asarray(images),
    )
    replicates, calls = (np.asarray(leaf)[: len(rows)] for leaf in result)
    return over_replicates(replicates.astype(np.float64), calls[:, 0].astype(np.int64))
