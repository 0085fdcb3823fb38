"""Pruning search: a supernet of all operations loses them, the one it does best without first.

Source: Abdennadher et al., LightSNN, arXiv 2503.21846, and its public code, which decides where the paper's
abstract is silent:

- An edge of the supernet is the mean of its remaining operations (there: softmax of equal logits); "zero" counts
  among them. Every convolution has its own LIF, and so its own LIF calls in the score.
- A round scores the supernet without each remaining operation of every edge, then removes on every edge the
  operation without which the score was highest. Rounds go on until one operation is left on every edge.
- Both cells share their operations.

What is ours, not theirs:

- All supernets see the same weights and images (common random numbers), with batch statistics; there every score
  draws a batch, and batch norm runs on untrained running statistics. LightSNN itself searches zero, skip and one
  convolution with max pooling; here the operations are the space's.
- A pair of nodes holds one edge in this project's feedback cells. So the choice is among a pair's operations of
  both directions and one "zero", and edge (0, 3) is forward and never "zero" where the space requires it.
- A memory budget: a removal is ruled out if no cell of those still possible would fit. Removals of one round are
  made one after another, the best-scored first, so that together they leave a cell that fits.
- Equal scores: the operation that comes later in the row's order goes, as in that code. A score that is not
  finite is the worst.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from spikernel_jax.cells.canonical import DIRECT, EDGES, FORWARD_EDGES, NOTHING
from spikernel_jax.cells.space import CellSpace
from spikernel_jax.io.store import ResultStore
from spikernel_jax.scoring.scores import get_score, scored_spec, spike_terms
from spikernel_jax.snn import network
from spikernel_jax.snn.spec import NetworkSpec

Masks = NDArray[np.bool_]  # [n, E, num_ops], the operations that each supernet still has
ScoreMasks = Callable[[Masks], NDArray[np.float64]]

_BLOCK = 65_536  # rows whose costs are taken at once


class Removal(NamedTuple):
    """One operation that went."""

    round: int
    edge: tuple[int, int]
    code: int
    score: float  # of the supernet without it, before this round's other removals


class Pruned(NamedTuple):
    """What pruning came to."""

    cell: NDArray[np.int8]  # [E], canonical
    removals: tuple[Removal, ...]
    evaluations: int  # supernets scored


class _Choices(NamedTuple):
    """What a pair of nodes can hold: (column, code) each, and which of them is left."""

    options: list[tuple[int, int]]
    left: NDArray[np.bool_]


def _slots(space: CellSpace) -> list[_Choices]:
    """The six pairs of nodes, in the order of the forward edges, with everything they can hold."""
    slots = []
    for column, (source, target) in enumerate(FORWARD_EDGES):
        fixed = column == DIRECT and space.direct == "required"
        options = [(column, code) for code in range(NOTHING + fixed, space.num_ops)]
        if space.feedback and not fixed:
            options += [(EDGES.index((target, source)), code) for code in range(NOTHING + 1, space.num_ops)]
        slots.append(_Choices(options, np.ones(len(options), bool)))
    return slots


def _mask(space: CellSpace, slots: list[_Choices]) -> NDArray[np.bool_]:
    mask = np.zeros((len(space.edges), space.num_ops), bool)
    for slot in slots:
        for (column, code), left in zip(slot.options, slot.left, strict=True):
            mask[column, code] = left
    return mask


def full_mask(space: CellSpace) -> NDArray[np.bool_]:
    """The supernet that pruning starts from: bool [E, num_ops]."""
    return _mask(space, _slots(space))


def mixture(space: CellSpace, mask: ArrayLike) -> NDArray[np.float32]:
    """Weights of a supernet's operations: a pair of nodes takes the mean of what it still holds.

    Args:
      space: of the cell.
      mask: bool [E, num_ops].

    Returns:
      float32 [E, num_ops] for `network.apply`; the weights of a pair's edges sum to 1.

    Raises:
      ValueError: if the mask has another shape, leaves a pair without an operation, or holds one that no
        cell can have.
    """
    held = np.asarray(mask)
    if held.shape != (len(space.edges), space.num_ops) or held.dtype != np.bool_:
        want = f"bool [{len(space.edges)}, {space.num_ops}]"
        raise ValueError(f"mask has shape {held.shape} and dtype {held.dtype}; want {want}")
    if (held & ~full_mask(space)).any():
        column, code = np.argwhere(held & ~full_mask(space))[0].tolist()
        raise ValueError(f"mask holds {space.operations[code]} on edge {space.edges[column]}; no cell can choose it")
    weights = np.zeros(held.shape, np.float32)
    for slot in _slots(space):
        at = tuple(np.array(slot.options).T)
        if not held[at].any():
            raise ValueError(f"mask leaves no operation on edge {space.edges[slot.options[0][0]]}; want at least one")
        weights[at] = held[at] / held[at].sum()
    return weights


@functools.partial(jax.jit, static_argnames=("spec", "score"))
def _score_one(spec: NetworkSpec, score: str, weights: jax.Array, bank: Any, images: jax.Array) -> jax.Array:
    def replicate(drawn: Any) -> jax.Array:
        terms, _ = spike_terms(spec, weights, *drawn)
        return get_score(score)(terms)

    return jax.lax.map(replicate, (bank, images))


def score_supernets(
    masks: ArrayLike, bank: network.Params, images: ArrayLike, spec: NetworkSpec, *, score: str = "sahd_paper"
) -> NDArray[np.float64]:
    """Scores supernets with common random numbers; the supernet of a single cell scores as that cell.

    Args:
      masks: bool [n, E, num_ops].
      bank: R banks of `bank.make_bank`.
      images: normalised images [R, B, H, W, C].
      spec: the network to score in.
      score: a registered score.

    Returns:
      float64 [n], means over the replicates.

    Raises:
      ValueError: naming the argument.
    """
    get_score(score)
    spec = scored_spec(spec)
    seeds, batches = len(bank["stem"]["kernel"]), jnp.asarray(images)
    if batches.ndim != 5 or len(batches) != seeds or batches.shape[2:] != spec.image_shape:
        raise ValueError(f"images have shape {batches.shape}; want [{seeds}, B, *{spec.image_shape}] for {seeds} banks")
    weights = [jnp.asarray(mixture(spec.space, mask)) for mask in np.asarray(masks)]
    replicates = [_score_one(spec, score, own, bank, batches) for own in weights]
    return np.asarray(replicates, np.float64).reshape(len(weights), seeds).mean(1)


def prune(
    space: CellSpace,
    score: ScoreMasks,
    *,
    fits: Callable[[NDArray[np.int8]], NDArray[np.bool_]] | None = None,
    folder: str | Path | None = None,
    settings: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Pruned:
    """Prunes the supernet of a space down to one cell, as the module says.

    Deterministic, and `score` is asked once a round.

    Args:
      space: forward or feedback.
      score: masks -> float64 [n], higher is better.
      fits: canonical rows -> bool [n], which cells are under the memory budget; asked of all cells of the
        space at the start, so it should be quick.
      folder: where every round's scores are kept; the same call goes on from there after a kill. None
        keeps nothing. Its parent folder must exist.
      settings: what `score` and `fits` depend on, in JSON types; a folder of other settings is refused.
      progress: called after every round with its number, from 1, and how many operations may still go.

    Returns:
      The cell, and how it came about.

    Raises:
      ValueError: if no cell fits, `score` gives another number of scores, or the folder holds another search.
    """
    slots = _slots(space)
    possible = _possible(space, slots, fits)
    store = None
    if folder is not None:
        of_space = dataclasses.asdict(space)
        store = ResultStore(folder, {"strategy": "pruning", "space": of_space, "settings": settings})
    removals: list[Removal] = []
    evaluations = 0
    for index in itertools.count():
        trials = [
            (place, option)
            for place, slot in enumerate(slots)
            if slot.left.sum() > 1
            for option in np.flatnonzero(slot.left).tolist()
        ]
        if not trials:
            break
        if store and index in store.done():
            scores = store.load(index)["scores"]
        else:
            masks = np.repeat(_mask(space, slots)[None], len(trials), 0)
            for mask, (place, option) in zip(masks, trials, strict=True):
                mask[slots[place].options[option]] = False
            scores = np.asarray(score(masks), np.float64)
            if store and scores.shape == (len(trials),):
                store.save(index, scores=scores)
        if scores.shape != (len(trials),):
            raise ValueError(f"score gave shape {scores.shape} for {len(trials)} masks; want one score a mask")
        evaluations += len(trials)
        gone: set[int] = set()
        worth = np.where(np.isfinite(scores), scores, -np.inf)
        for trial in sorted(range(len(trials)), key=lambda i: (worth[i], i), reverse=True):
            place, option = trials[trial]
            if place in gone:
                continue
            if possible is not None:
                without = possible[possible[:, place] != option]
                if not len(without):
                    continue
                possible = without
            gone.add(place)
            slots[place].left[option] = False
            column, code = slots[place].options[option]
            removals.append(Removal(index, space.edges[column], code, float(scores[trial])))
        if progress:
            progress(index + 1, sum(int(slot.left.sum()) - 1 for slot in slots))
    row = np.zeros(len(space.edges), np.int8)
    for slot in slots:
        column, code = slot.options[int(np.argmax(slot.left))]
        row[column] = code
    return Pruned(space.canonical(row), tuple(removals), evaluations)


def _possible(space: CellSpace, slots: list[_Choices], fits: Any) -> NDArray[np.int8] | None:
    """Every cell that is valid and fits, as the option that each pair holds, [n, 6]; None where all do."""
    if fits is None and space.max_kernel_sizes is None and space.direct == "required":
        return None
    sizes = [len(slot.options) for slot in slots]
    count, kept = int(np.prod(sizes)), []
    for start in range(0, count, _BLOCK):
        chosen = np.stack(np.unravel_index(np.arange(start, min(start + _BLOCK, count)), sizes), 1).astype(np.int8)
        rows = np.zeros((len(chosen), len(space.edges)), np.int8)
        for place, slot in enumerate(slots):
            columns, codes = np.array(slot.options, np.int8)[chosen[:, place]].T
            rows[np.arange(len(rows)), columns] = codes
        good = space.is_valid(rows)
        if fits is not None:
            good[good] = fits(space.canonical(rows[good]))
        kept.append(chosen[good])
    possible = np.concatenate(kept)
    if not len(possible):
        raise ValueError(f"fits: no cell of {space} fits; want a larger memory budget")
    return possible
