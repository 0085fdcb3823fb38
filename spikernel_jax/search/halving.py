"""Which cells are scored at which fidelity: successive halving, and the strategies that score at one.

Successive halving scores all cells that fit the budget at the lowest fidelity, the best tenth of each set at the
next, and the best hundredth at full size (after Jamieson & Talwalkar, AISTATS 2016, with sizes of network and
draws in the place of training time).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from spikernel_jax.cells.kernels import Kernel
from spikernel_jax.cells.space import CellSpace
from spikernel_jax.data import Dataset
from spikernel_jax.io.processes import Processes
from spikernel_jax.scoring import choice
from spikernel_jax.scoring.bank import make_bank
from spikernel_jax.scoring.fidelity import NAMES, Fidelity
from spikernel_jax.scoring.replicates import Scores
from spikernel_jax.scoring.scorer import Scorer
from spikernel_jax.search import queue
from spikernel_jax.snn.devices import Budget
from spikernel_jax.snn.spec import NetworkSpec

FRACTIONS = (1.0, 0.1, 0.01)  # of each set's cells, at low, medium and full fidelity
_LEAST = 8  # cells that a set keeps, so that a small set is not decided at the lowest fidelity


@dataclasses.dataclass(frozen=True)
class Search:
    """What is searched, and how; settled before anything is scored.

    Attributes:
      sets: kernel sets.
      trained: the network that would be trained, of the union space.
      strategy: of `queue.STRATEGIES`.
      samples: draws per set of the random strategy.
      budget: that what is found must keep to.
      score: a registered score.
      rungs: names and sizes of the fidelities that are scored at, in order.
      cells_key: of the random strategy's draws.
      banks_key: of the weights; each fidelity folds its own in.
      images_key: of the images, likewise.
      folder: where scores are kept, fidelity by fidelity.
      origin: where the scores come from, for their fingerprint.
      processes: this process among those that share the work.
      say: prints a line of progress.
      method: of scoring, of `scorer.METHODS`; None is the machine's own, on accelerators timed (`scoring.choice`).
    """

    sets: tuple[tuple[Kernel, ...], ...]
    trained: NetworkSpec
    strategy: str
    samples: int
    budget: Budget
    score: str
    rungs: tuple[tuple[str, Fidelity], ...]
    cells_key: jax.Array
    banks_key: jax.Array
    images_key: jax.Array
    folder: Path
    origin: dict[str, Any]
    processes: Processes
    say: Callable[[str], None]
    method: str | None = None

    @property
    def ranks_all(self) -> bool:
        """Whether cells are looked at that do not fit the budget."""
        return self.strategy == "exhaustive"


class Cells(NamedTuple):
    """The cells that a search looks at."""

    members: list[NDArray[np.int8]]  # cells of each set, as rows of the union space
    rows: NDArray[np.int8]  # all distinct ones
    positions: list[NDArray[np.int64]]  # of each set's cells in `rows`


class Rung(NamedTuple):
    """What came of one fidelity."""

    name: str
    at: NDArray[np.int64]  # positions in `Cells.rows`, increasing
    scores: Scores


def union(space: CellSpace, sets: Sequence[tuple[Kernel, ...]]) -> CellSpace:
    """The part of a space that holds the cells of every set."""
    return space.restricted([kernel for kernel in space.kernels if any(kernel in s for s in sets)])


def find_cells(search: Search) -> Cells:
    """The cells that the strategy looks at; `halving` and `random` rule out those over the budget."""

    def fits(rows: NDArray[np.int8]) -> NDArray[np.bool_]:
        return search.budget.fits(search.trained, rows)

    how = "random" if search.strategy == "random" else "exhaustive"
    weigh = None if search.ranks_all else fits
    return gather([
        queue.candidates(
            search.trained.space, s, strategy=how, samples=search.samples, key=search.cells_key, fits=weigh
        )
        for s in search.sets
    ])  # fmt: skip


def gather(members: list[NDArray[np.int8]]) -> Cells:
    """The distinct cells of all sets, and where each set's are among them."""
    rows, position = np.unique(np.concatenate(members), axis=0, return_inverse=True)
    return Cells(members, rows, np.split(position.ravel(), np.cumsum([len(own) for own in members])[:-1]))


def promoted(cells: Cells, at: NDArray[np.int64], scores: NDArray[np.float64], fraction: float) -> NDArray[np.int64]:
    """Positions in `cells.rows` of the best of each set: `fraction` of its cells, at least a few.

    Args:
      cells: what is searched.
      at: positions of the cells that were scored.
      scores: theirs; a cell without a finite score is never promoted.
      fraction: of each set.
    """
    value = np.full(len(cells.rows), -np.inf)
    value[at] = np.where(np.isfinite(scores), scores, -np.inf)
    kept = []
    for own in cells.positions:
        order = own[np.argsort(-value[own], kind="stable")]
        order = order[np.isfinite(value[order])]
        kept.append(order[: max(_LEAST, math.ceil(fraction * len(own)))])
    return np.unique(np.concatenate(kept))


def units(search: Search, cells: Cells, data: Dataset, name: str, at: NDArray[np.int64]) -> queue.Units:
    """What is scored at one rung: cells, weights, images, and where the scores are kept."""
    fidelity, index = dict(search.rungs)[name], NAMES.index(name)
    spec = fidelity.network(search.trained)
    bank = make_bank(jax.random.fold_in(search.banks_key, index), spec, fidelity.seeds)
    images = fidelity.images(jax.random.fold_in(search.images_key, index), data, search.trained)
    chunk = queue.unit_rows(spec, fidelity.batch)
    rows, method = cells.rows[at], search.method

    def scorer_of(method: str | None) -> Scorer:
        return Scorer(bank, images, spec, score=search.score, chunk=chunk, method=method, say=search.say)

    if method is None and choice.is_timed():
        path = search.folder / f"{name}-method-{search.processes.index}.json"
        method = choice.remembered(path, lambda: choice.quickest(scorer_of, rows, search.say))
    scorer = scorer_of(method)
    origin = search.origin | {"strategy": search.strategy, "fidelity": name}
    return queue.Units(
        rows,
        scorer,
        search.folder / name,
        seeds=fidelity.seeds,
        chunk=chunk,
        inputs=queue.inputs_of(spec, search.score, scorer.precision, bank, images) | origin,
        processes=search.processes,
        name=name,
    )


def score_rungs(search: Search, cells: Cells, data: Dataset) -> Iterator[Rung]:
    """Scores the cells at the lowest fidelity, and those promoted at the next ones; what the first process calls."""
    at, scores = np.arange(len(cells.rows)), None
    for (name, fidelity), fraction in zip(search.rungs, FRACTIONS, strict=False):
        if scores is not None:
            at = promoted(cells, at, scores.scores, fraction)
        spec = fidelity.network(search.trained)
        search.say(
            f"  {name}: {len(at)} cells, C = {spec.channels}, B = {fidelity.batch}, T = {spec.time_steps}, "
            f"{spec.image_shape[0]}x{spec.image_shape[1]} images, R = {fidelity.seeds}"
        )
        search.processes.tell(f"{name}/cells", at.tolist())
        last = name == search.rungs[-1][0] and search.strategy != "trainings"  # which the others share, too
        line = queue.progress_line(search.say)
        scores = queue.score_units(units(search, cells, data, name, at), last=last, progress=line)
        yield Rung(name, at, scores)


def share_rungs(search: Search, cells: Cells, data: Dataset) -> None:
    """What a process other than the first does of `score_rungs`; it writes nothing but scores.

    Raises:
      ValueError: if the first process gave up, or its run folder is not seen here.
    """
    for name, _ in search.rungs:
        at = np.array(search.processes.hear(f"{name}/cells"), np.int64)
        queue.score_share(units(search, cells, data, name, at))


def winner(
    own: NDArray[np.int64], results: Sequence[Rung], memory: NDArray[np.int64], fits: NDArray[np.bool_]
) -> int | None:
    """Position of a set's best cell that fits: by the highest fidelity at which one has a finite score."""
    for rung in reversed(results):
        mine = np.isin(rung.at, own) & fits[rung.at]
        best = queue.best_under_budget(np.where(mine, rung.scores.scores, np.nan), memory[rung.at], None)
        if best is not None:
            return int(rung.at[best])
    return None
