"""Search of spaces too large to list: regularised evolution, and random search under the same rules.

A strategy is pure: it proposes candidates from the state, which is the whole history; `tell` adds their scores to it.
`drive` does both in turn, generation by generation on disk. A candidate
that does not fit the memory budget is never scored, and none is scored twice.

Candidates are canonical rows [E] of a `CellSpace`, or pairs [2, E] where the two cells of a network differ
(SpikeNAS).

Sources: Real et al., AAAI 2019, arXiv 1802.01548 (regularised evolution); Putra & Shafique, arXiv 2402.11322
(two cells, memory budget).
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from spikernel_jax.cells.space import CellSpace
from spikernel_jax.io.checks import whole
from spikernel_jax.io.store import ResultStore
from spikernel_jax.search.queue import Progress

Rows = NDArray[np.int8]  # [n, E] or [n, 2, E]
Fits = Callable[[Rows], NDArray[np.bool_]]
ScoreRows = Callable[[Rows], NDArray[np.float64]]

_WIDEN = 16  # attempts between two edges more


class State(NamedTuple):
    """All that was scored, in the order in which it was proposed: a candidate's place is its age."""

    rows: Rows  # [m, E] or [m, 2, E]
    scores: NDArray[np.float64]  # [m] as told, finite or not
    born: NDArray[np.int64]  # [m] generation in which each was proposed
    generation: int  # the next one


@dataclasses.dataclass(frozen=True)
class Evolution:
    """Settings of regularised evolution.

    Attributes:
      population: P, how many of the youngest candidates may be parents; the first P are drawn at random.
      sample: S, size of the tournament, drawn with replacement; its best is the parent.
      children: candidates per generation. One is Real et al.'s; more are scored together, and none of them
        can descend from another.
      retries: attempts at a child that fits and is new, by mutation and then once more as many at random.
        Every 16 attempts mutate one edge more, so that a parent whose neighbours are all known is no end.

    Raises:
      ValueError: naming the field.
    """

    name: ClassVar[str] = "evolution"
    population: int = 64
    sample: int = 16
    children: int = 16
    retries: int = 128

    def __post_init__(self) -> None:
        """Refuses sizes below 1, and a tournament larger than the population."""
        for field in dataclasses.fields(self):
            whole(field.name, getattr(self, field.name), 1)
        if self.sample > self.population:
            raise ValueError(f"sample={self.sample} must be at most population={self.population}")

    def parents(self, state: State) -> NDArray[np.int64]:
        """Indices of the population, oldest first: the last P candidates with a finite score.

        A candidate whose score is not finite stays in the history, but is no parent and takes nobody's place.
        """
        return np.flatnonzero(np.isfinite(state.scores))[-self.population :]

    def propose(self, key: jax.Array, state: State, space: CellSpace, n: int, fits: Fits | None = None) -> Rows:
        """Proposes candidates that fit, none of which was scored before.

        The first P candidates of a history are drawn at random, and also later ones as long as there is no parent.
        Child i of generation g makes its attempts with keys that depend on `key`, g and i alone, and takes the
        first attempt that fits, is not in the history, and is not an earlier child's. So fewer children are the
        first of more.

        Args:
          key: one typed key for the whole search.
          state: the history.
          space: of each cell.
          n: children.
          fits: which rows are under the memory budget; None lets all pass.

        Returns:
          At most n rows, fewer where children found no candidate in their retries.

        Raises:
          ValueError: if nothing was ever scored and no attempt fits.
        """
        pool = self.parents(state) if len(state.scores) >= self.population else np.zeros(0, np.int64)

        def attempts(child: jax.Array) -> Iterator[Rows]:
            for attempt in range(2 * self.retries):
                own = jax.random.fold_in(child, attempt)
                if len(pool) and attempt < self.retries:
                    tournament, change = jax.random.split(own)
                    drawn = pool[np.asarray(jax.random.randint(tournament, (self.sample,), 0, len(pool)))]
                    row = state.rows[drawn[np.argmax(state.scores[drawn])]]
                    for step in range(1 + attempt // _WIDEN):
                        row = _mutated(jax.random.fold_in(change, step), space, row)
                    yield row
                else:
                    yield _drawn(own, space, state.rows.ndim - 1)

        return _distinct(key, state, attempts, n, fits)


@dataclasses.dataclass(frozen=True)
class RandomSearch:
    """Distinct cells of the reference's sampler (`CellSpace.sample`), under the rules of `Evolution`.

    Attributes:
      children: candidates scored together.
      retries: attempts at each of them are twice as many.

    Raises:
      ValueError: naming the field.
    """

    name: ClassVar[str] = "random"
    children: int = 16
    retries: int = 128

    def __post_init__(self) -> None:
        """Refuses sizes below 1."""
        for field in dataclasses.fields(self):
            whole(field.name, getattr(self, field.name), 1)

    def propose(self, key: jax.Array, state: State, space: CellSpace, n: int, fits: Fits | None = None) -> Rows:
        """Draws candidates that fit, none of which was scored before; as `Evolution.propose`."""

        def attempts(child: jax.Array) -> Iterator[Rows]:
            for attempt in range(2 * self.retries):
                yield _drawn(jax.random.fold_in(child, attempt), space, state.rows.ndim - 1)

        return _distinct(key, state, attempts, n, fits)


Strategy = Evolution | RandomSearch


def begin(space: CellSpace, cells: int = 1) -> State:
    """The state before anything is scored.

    Args:
      space: of each cell.
      cells: 1 where one cell serves the whole network, 2 for pairs.
    """
    if cells not in (1, 2):
        raise ValueError(f"cells={cells!r} must be 1 (rows [n, E]) or 2 (pairs [n, 2, E])")
    shape = (0, len(space.edges)) if cells == 1 else (0, 2, len(space.edges))
    return State(np.zeros(shape, np.int8), np.zeros(0), np.zeros(0, np.int64), 0)


def tell(state: State, rows: Rows, scores: NDArray[np.float64]) -> State:
    """The state after a generation.

    Args:
      state: before it.
      rows: what was proposed.
      scores: float64 [n], higher is better; NaN and infinities are recorded as they are.

    Raises:
      ValueError: unless there is one score a row, and rows have the shape of the state's.
    """
    rows, scores = np.asarray(rows), np.asarray(scores, np.float64)
    if rows.shape[1:] != state.rows.shape[1:] or rows.dtype.kind not in "iu":
        raise ValueError(f"rows have shape {rows.shape} and dtype {rows.dtype}; want ints [n, *{state.rows.shape[1:]}]")
    if scores.shape != (len(rows),):
        raise ValueError(f"scores have shape {scores.shape}; want [{len(rows)}], one a row")
    return State(
        np.concatenate([state.rows, rows.astype(np.int8)]),
        np.concatenate([state.scores, scores]),
        np.concatenate([state.born, np.full(len(rows), state.generation)]),
        state.generation + 1,
    )


def best_so_far(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """The best finite score among the first 1, 2, ..., m; NaN before the first one."""
    return np.fmax.accumulate(np.where(np.isfinite(scores), scores, np.nan))


def drive(
    strategy: Strategy,
    space: CellSpace,
    score: ScoreRows,
    *,
    budget: int,
    key: jax.Array,
    cells: int = 1,
    fits: Fits | None = None,
    folder: str | Path | None = None,
    settings: dict[str, Any] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> State:
    """Lets a strategy propose, scores and tells, until `budget` candidates are scored.

    Args:
      strategy: `Evolution` or `RandomSearch`; with the same key both begin with the same candidates.
      space: of each cell.
      score: rows -> float64 [n], higher is better.
      budget: candidates to score.
      key: a typed key.
      cells: 1, or 2 for pairs.
      fits: rows -> bool [n]; a candidate that does not fit is ruled out before it is scored.
      folder: where every generation is kept; the same call goes on from there after a kill, to the result
        that it would have had. None keeps nothing. Its parent folder must exist.
      settings: what `score` and `fits` depend on, in JSON types; a folder of other settings is refused.
      progress: called after every generation.

    Returns:
      The history. It is shorter than `budget` only where no candidate that fits was left to be found.

    Raises:
      ValueError: naming the argument; if nothing fits; if the folder holds another search.
    """
    whole("budget", budget, 1)
    state, store = begin(space, cells), None
    if folder is not None:
        words = np.asarray(jax.random.key_data(key)).ravel().tolist()
        asked = {"strategy": strategy.name, **dataclasses.asdict(strategy), "budget": budget, "key": words}
        of_space = dataclasses.asdict(space) | {"cells": cells}
        store = ResultStore(folder, {**asked, "space": of_space, "settings": settings})
    there = store.done() if store else set()
    began, scored = time.perf_counter(), 0
    while (left := budget - len(state.scores)) > 0:
        index = state.generation
        if store and index in there:
            part = store.load(index)
            rows, scores = part["rows"], part["scores"]
        else:
            rows = strategy.propose(key, state, space, min(strategy.children, left), fits)
            if not len(rows):
                break
            scores = np.asarray(score(rows), np.float64)
            if scores.shape != (len(rows),):
                raise ValueError(f"score gave shape {scores.shape} for {len(rows)} rows; want one score a row")
            if store:
                store.save(index, rows=rows, scores=scores)
            scored += len(rows)
        state = tell(state, rows, scores)
        if progress:
            done = len(state.scores)
            progress(Progress(done, budget, time.perf_counter() - began, scored, float(best_so_far(state.scores)[-1])))
    return state


def _distinct(
    key: jax.Array, state: State, attempts: Callable[[jax.Array], Iterator[Rows]], n: int, fits: Fits | None
) -> Rows:
    """For each of n children the first attempt that fits, is not in the history, and is not an earlier child's."""
    taken = {row.tobytes() for row in state.rows}
    generation = jax.random.fold_in(key, state.generation)
    found, tried = [], 0
    for child in range(n):
        for row in attempts(jax.random.fold_in(generation, child)):
            tried += 1
            if row.tobytes() in taken:
                continue
            if fits is None or _fits_one(fits, row):
                taken.add(row.tobytes())
                found.append(row)
                break
    if not found and not len(state.scores):
        raise ValueError(f"fits: none of {tried} candidates drawn fits; want a larger memory budget, or more retries")
    return np.stack(found) if found else state.rows[:0]


def _fits_one(fits: Fits, row: Rows) -> bool:
    answer = np.asarray(fits(row[None]))
    if answer.shape != (1,) or answer.dtype != np.bool_:
        raise ValueError(f"fits gave shape {answer.shape} and dtype {answer.dtype} for 1 row; want bool [1]")
    return bool(answer[0])


def _drawn(key: jax.Array, space: CellSpace, cells: int) -> Rows:
    """One candidate of the sampler, [E] or [2, E]."""
    rows = space.sample(key, cells)
    return rows[0] if cells == 1 else rows


def _mutated(key: jax.Array, space: CellSpace, row: Rows) -> Rows:
    """One edge changed; of a pair, in one of its cells."""
    if row.ndim == 1:
        return space.mutate(key, row)
    which, change = jax.random.split(key)
    cell = int(jax.random.randint(which, (), 0, 2))
    child = row.copy()
    child[cell] = space.mutate(change, row[cell])
    return child
