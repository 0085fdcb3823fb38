"""The last rungs of a search: short trainings, of a few cells of each set and then of fewer, under a budget of epochs.

Every cell has been scored before, and scores of untrained networks tell cells of one depth hardly apart, so who is
trained is decided by a sum of ranks that was chosen on trained cells (`PRIOR`), and who wins by validation accuracy.
All trainings share one compiled program, and their states stay on disk, so that no epoch is trained twice. Of several
processes each trains, on its own devices, cells that no other one has in hand; the lock of a cell's folder says so.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray
from scipy import stats

from spikernel_jax.data import Dataset
from spikernel_jax.io import files
from spikernel_jax.io.processes import ALONE, Processes
from spikernel_jax.io.units import duration
from spikernel_jax.io.voice import Moving
from spikernel_jax.scoring.counts import COUNTS
from spikernel_jax.search.halving import Cells
from spikernel_jax.snn.spec import NetworkSpec
from spikernel_jax.training.keep import epochs_of
from spikernel_jax.training.loop import TrainingDivergedError, train
from spikernel_jax.training.recipe import TrainConfig

PRIOR = ("receptive_field", "parameters")
"""Counts whose ranks, summed, say which cells are trained; chosen on the looking half of the CIFAR-10 table."""
RUNGS = (2, 4)
"""Epochs after which cells are compared; the last is the whole short training."""
_KEPT = 3  # one of so many goes on to the next rung
_LEAST = 2  # cells of a set that are trained, however small the budget
_LOOK_SECONDS = 0.5  # between two looks at what other processes train
_DIVERGED = "diverged.json"


class Plan(NamedTuple):
    """How many cells of each set are trained up to each of `RUNGS`."""

    cells: tuple[int, ...]


class Line(NamedTuple):
    """Cells in line to be trained."""

    rows: NDArray[np.int8]  # [n, E]
    members: list[NDArray[np.int64]]  # places of each set's cells in `rows`
    first: NDArray[np.float64]  # `prior`, -inf of a cell that is never trained; [n]
    tie: NDArray[np.float64]  # of equals the higher is first; [n]


class Shorts(NamedTuple):
    """What came of short trainings; of cells that were not trained, 0 epochs and NaN."""

    epochs: NDArray[np.int64]  # [n]
    accuracy: NDArray[np.float64]  # validation accuracy after these, -inf of a training that diverged; [n]


@dataclasses.dataclass(frozen=True)
class Training:
    """How cells are trained shortly.

    Attributes:
      spec: the network, of the union space.
      config: the recipe, of as many epochs as the last of `RUNGS`.
      seed: of every training.
      folder: where states are kept, a folder a cell; all processes see it.
      processes: this process among those that train.
    """

    spec: NetworkSpec
    config: TrainConfig
    seed: int
    folder: Path
    processes: Processes = ALONE


def plan(epochs: int, sets: int) -> Plan:
    """How a budget of epochs is spent on so many sets: halving it between the rungs would, this gives the first more.

    Example:
      >>> from spikernel_jax.search.shorts import plan
      >>> plan(48, 3).cells  # 3 · (6 · 2 + 2 · 2) epochs
      (6, 2)
    """
    each = sum(steps / _KEPT**rung for rung, steps in enumerate(np.diff((0, *RUNGS)).tolist()))
    return Plan(shape(max(_LEAST, math.floor(epochs / (sets * each)))))


def shape(first: int) -> tuple[int, ...]:
    """How many cells each of `RUNGS` has where the first has so many: a third as many each time, but one."""
    return tuple(max(1, first // _KEPT**rung) for rung in range(len(RUNGS)))


def prior(spec: NetworkSpec, rows: NDArray[np.int8]) -> NDArray[np.float64]:
    """Sum of ranks over `PRIOR`, higher first in line: [n]."""
    return np.sum([stats.rankdata(COUNTS[name](spec, rows)) for name in PRIOR], 0)


def best_of(
    own: NDArray[np.int64], value: NDArray[np.float64], tie: NDArray[np.float64], count: int
) -> NDArray[np.int64]:
    """The `count` best of some places by value [len(own)], then by `tie` [n]; what is not finite is never taken."""
    order = own[np.lexsort((-tie[own], -value))]
    return order[: min(count, np.count_nonzero(np.isfinite(value)))]


def line_of(spec: NetworkSpec, cells: Cells, scores: NDArray[np.float64]) -> Line:
    """The line of a search's cells, those that fit the budget of memory.

    Args:
      spec: the network.
      cells: of `halving.find_cells`.
      scores: training-free, [n]; a cell without a finite one is never trained.
    """
    first = np.where(np.isfinite(scores), prior(spec, cells.rows), -np.inf)
    return Line(cells.rows, cells.positions, first, scores)


def halve(line: Line, counts: Sequence[int], reach: Callable[[NDArray[np.int64], int], NDArray[np.float64]]) -> Shorts:
    """Trains the first in line of each set, and the best of them further.

    Of cells with the same prior the one with the higher score is first. After a rung those go on whose ranks of
    validation accuracy and prior, summed over the cells of a set that were trained, are highest.

    Args:
      line: the cells.
      counts: of a set's cells at each of `RUNGS`.
      reach: validation accuracies of some places, trained up to so many epochs; -inf of a training that diverged.

    Returns:
      Epochs and accuracies.
    """
    epochs, accuracy = np.zeros(len(line.rows), np.int64), np.full(len(line.rows), np.nan)
    members = line.members
    for rung, (count, until) in enumerate(zip(counts, RUNGS, strict=True)):
        value = [together(accuracy[own], line.first[own]) if rung else line.first[own] for own in members]
        members = [best_of(own, mine, line.tie, count) for own, mine in zip(members, value, strict=True)]
        at = np.unique(np.concatenate(members))
        accuracy[at], epochs[at] = reach(at, until), until
    return Shorts(epochs, accuracy)


def train_rungs(training: Training, line: Line, budget: int, data: Dataset, say: Callable[[str], None]) -> Shorts:
    """Does what `halve` says, within a budget of epochs; what the first process calls, and the others `share_rungs`.

    What a process that died had in hand is trained by another, from its last epoch.

    Args:
      training: how.
      line: the cells.
      budget: epochs, of `plan`.
      data: images; the validation split decides.
      say: prints a line of progress.

    Returns:
      Epochs and accuracies.
    """

    def reach(at: NDArray[np.int64], until: int) -> NDArray[np.float64]:
        say(f"  {until} epochs: {len(at)} cells")
        training.processes.tell(_told(until), at.tolist())
        found, began, left, best = np.empty(len(at)), time.perf_counter(), [*range(len(at))], 0.0
        while left:
            for index, accuracy in _able(training, line.rows[at], until, data, before := left):
                found[index] = accuracy
                left = [other for other in left if other != index]
                number = len(at) - len(left)
                seconds = (time.perf_counter() - began) / number * len(left)
                text, best = training.spec.space.explicit(line.rows[at[index]]), max(best, accuracy)
                say(Moving(
                    f"    {number}/{len(at)}  {text}  validation {100 * accuracy:.1f} %  {duration(seconds)} left  "
                    f"best {100 * best:.1f} %",
                    done=number, of=len(at), genotype=text, validation_accuracy=float(accuracy), best=float(best),
                    left_seconds=seconds,
                ))  # fmt: skip
            if len(left) == len(before):  # all in the hands of others
                time.sleep(_LOOK_SECONDS)
        return found

    return halve(line, plan(budget, len(line.members)).cells, reach)


def share_rungs(training: Training, rows: NDArray[np.int8], data: Dataset) -> None:
    """What a process other than the first does of `train_rungs`, of the same cells [n, E]; it leaves states alone."""
    for until in RUNGS:
        at = training.processes.hear(_told(until))
        for _ in _able(training, rows[at], until, data, range(len(at))):
            pass


def _told(until: int) -> str:
    return f"shorts/{until}"


def _able(
    training: Training, rows: NDArray[np.int8], until: int, data: Dataset, places: Sequence[int]
) -> Iterator[tuple[int, float]]:
    """Place and accuracy of each of some rows that no other process has in hand, trained where it is not yet."""
    for place in places:
        with contextlib.suppress(files.HeldError):
            yield place, _reach(training, rows[place], until, data)


def together(accuracy: NDArray[np.float64], first: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum of the ranks of both; -inf where a training diverged."""
    return np.where(np.isfinite(accuracy), stats.rankdata(accuracy) + stats.rankdata(first), -np.inf)


def _folder(training: Training, row: NDArray[np.int8]) -> Path:
    return training.folder / f"{int(training.spec.space.identity(row)):016x}"


def _reach(training: Training, row: NDArray[np.int8], until: int, data: Dataset) -> float:
    """Validation accuracy after so many epochs, trained where they are not there; -inf of one that diverged.

    Raises:
      HeldError: another process trains it.
    """
    folder = _folder(training, row)
    folder.mkdir(parents=True, exist_ok=True)
    with files.lock(folder, f"another process is training in {folder}"):
        if len(records := epochs_of(folder)) >= until:
            return float(records[until - 1]["validation_accuracy"])
        if (folder / _DIVERGED).exists():
            return -math.inf
        named: dict[str, Any] = {"seed": training.seed, "folder": folder, "one_program": True}
        try:
            model = train(training.spec, row, data, training.config, until=until, devices=jax.local_devices(), **named)
        except TrainingDivergedError as error:
            files.write_json(folder / _DIVERGED, {"error": str(error)})
            return -math.inf
        return float(model.metrics["validation_accuracy"])


def pace(training: Training, line: Line, data: Dataset) -> float:
    """Seconds of an epoch without compilation, of cells that `train_rungs` trains in any case."""
    at = np.concatenate([best_of(own, line.first[own], line.tie, _LEAST) for own in line.members])[:_LEAST]
    for place in at:
        _reach(training, line.rows[place], RUNGS[0], data)
    records = epochs_of(_folder(training, line.rows[at[-1]])) if len(at) else []
    return min((float(record["seconds"]) for record in records), default=math.inf)


def winner(own: NDArray[np.int64], found: Shorts) -> int | None:
    """Place of a set's best cell: of those trained for longest the most accurate; None where all diverged."""
    able = own[(found.epochs[own] > 0) & np.isfinite(found.accuracy[own])]
    if not len(able):
        return None
    return int(able[np.lexsort((-found.accuracy[able], -found.epochs[able]))[0]])
