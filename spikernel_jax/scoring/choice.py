"""Which way of scoring a population is the quickest here: on an accelerator it is timed, on cells of that population.

On CPUs candidates one after another with shared work won at each fidelity (docs/results.md, "Ways of scoring"), so
nothing is timed there.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from numpy.typing import NDArray

from spikernel_jax.io.files import read_json, write_json
from spikernel_jax.scoring.room import Device
from spikernel_jax.scoring.scorer import METHODS, Scorer

LEAST_CALLS = 8  # of a population: timing a way takes two
LEAST_SECONDS = 30.0  # of the rest of it, below which another program takes longer to compile than it can save


def is_timed(devices: Sequence[Device] | None = None) -> bool:
    """Whether there is more than one way to take on these devices, None for all local ones: on no CPU."""
    return (jax.local_devices() if devices is None else devices)[0].platform != "cpu"


def quickest(
    make: Callable[[str | None], Scorer],
    rows: NDArray[np.int8],
    say: Callable[[str], None] = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
) -> str | None:
    """The way to score a population.

    Args:
      make: gives a scorer of a method, and for None of the device's own; of one, the device's memory is free again
        once nobody holds it.
      rows: what is to be scored.
      say: prints a line on what was found.
      clock: seconds.

    Returns:
      One of `METHODS`, or None, the device's own, where timing is not worth it.
    """
    scorer = make(None)
    own = scorer.method
    calls = scorer.seeds * -(-len(rows) // (scorer.chunk * scorer.lanes))
    if calls < LEAST_CALLS:
        return None
    rates = {own: _rate(scorer, rows, clock)}
    if scorer.seeds * len(rows) / rates[own] < LEAST_SECONDS:
        return None
    del scorer  # its tables of shared work: a batch of candidates is as large as the memory that is free lets it be
    side_by_side = make("batched")
    rate = _rate(side_by_side, rows, clock)
    rates.setdefault(side_by_side.method, rate)  # it may have gone on by another for want of memory
    best = max(rates, key=lambda method: rates[method])
    timed = ", ".join(f"{method} {rate:.3g} cells/s" for method, rate in rates.items())
    say(f"  ways of scoring, timed here: {timed}; going on with {best}")
    return best


def _rate(scorer: Scorer, rows: NDArray[np.int8], clock: Callable[[], float]) -> float:
    """Candidates a second of one replicate, in a call that compiles nothing."""
    order = scorer.order(rows)
    most = scorer.chunk * scorer.lanes
    start = max(0, (len(order) - most) // 2)  # neighbours share work, and the first of all are the smallest
    some = rows[order[start : start + most]]
    parts = [some[at : at + scorer.chunk] for at in range(0, len(some), scorer.chunk)]
    scorer.submit(0, parts)()
    began = clock()
    scorer.submit(0, parts)()
    return len(some) / (clock() - began)


def remembered(path: Path, choose: Callable[[], str | None]) -> str | None:
    """What was chosen at an earlier start, or is chosen now: all of a run's scores are rounded alike.

    Args:
      path: a file for it, of this process alone.
      choose: as `quickest` chooses.

    Raises:
      ValueError: the file is damaged.
    """
    if not path.exists():
        write_json(path, choose())
    method = read_json(path)
    if method not in (None, *METHODS):
        raise ValueError(
            f"{path} holds {method!r}; want null or one of {', '.join(METHODS)}: delete it to choose again"
        )
    return method
