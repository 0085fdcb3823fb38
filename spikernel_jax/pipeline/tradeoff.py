"""Accuracy against memory: the Pareto front, the choice under a budget, and which kernel sets to search.

Accuracies are to be maximised, memory is to be minimised. A candidate whose accuracy is not finite (training
failed) is never on the front and never chosen. NumPy only.
"""

import math
import operator
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

_UNITS = {"": 1, "b": 1}
for _power, _prefix in enumerate("kmgt", start=1):
    _UNITS[f"{_prefix}b"] = 1000**_power
    _UNITS[f"{_prefix}ib"] = 1024**_power


class NothingFitsError(ValueError):
    """No candidate fits the memory budget."""


def parse_bytes(text: str | int) -> int:
    """Reads an amount of memory.

    Args:
      text: a number of bytes, or a number with a unit of either case, with or without a space between:
        B, kB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (powers of 1024).

    Returns:
      Whole bytes, a fraction rounded down so that a budget is never exceeded.

    Raises:
      ValueError: the text is no such amount, or it is less than one byte.
    """
    value = 0
    if isinstance(text, str):
        match = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]{0,18})?|\.[0-9]{1,18})\s*([a-z]*)\s*", text.lower())
        if match and match[2] in _UNITS:
            value = math.floor(Fraction(match[1]) * _UNITS[match[2]])
    elif isinstance(text, int | np.integer) and not isinstance(text, bool):
        value = int(text)
    if value < 1:
        raise ValueError(
            f"{text!r} is not an amount of memory: write a positive one such as 512KiB, 1.5MiB, 2MB or 100000"
        )
    return value


def format_bytes(count: int) -> str:
    """Writes a number of bytes (0 or more) in the largest fitting unit of 1024: "512.0 KiB"."""
    count = operator.index(count)
    if count < 0:
        raise ValueError(f"a number of bytes is 0 or more, got {count}")
    if count < 1024:
        return f"{count} B"
    amount = float(count)
    for unit in ("KiB", "MiB", "GiB"):
        amount /= 1024
        if round(amount, 1) < 1024:  # rounded first, so that nothing reads "1024.0 KiB"
            return f"{amount:.1f} {unit}"
    return f"{amount / 1024:.1f} TiB"


def _candidates(accuracy: Any, memory: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 and int64 or float64 vectors of one length; ValueError otherwise."""
    accuracy = np.asarray(accuracy, dtype=np.float64)
    memory = np.asarray(memory)
    if accuracy.ndim != 1 or accuracy.shape != memory.shape:
        raise ValueError(f"need one accuracy and one memory a candidate, got {accuracy.shape} and {memory.shape}")
    if memory.size and (memory.dtype.kind not in "iuf" or not np.isfinite(memory).all() or (memory < 0).any()):
        raise ValueError("the memory of every candidate must be a number of bytes, 0 or more")
    return accuracy, memory


def pareto_front(accuracy: Any, memory: Any) -> np.ndarray:
    """Finds the candidates that no other one beats.

    A candidate is beaten by another with at least its accuracy and at most its memory, one of them better.
    Exact ties do not beat each other.

    Args:
      accuracy: float[n].
      memory: bytes[n].

    Returns:
      bool[n], True on the front; False where the accuracy is not finite.

    Raises:
      ValueError: the shapes differ, or a memory is not a number of bytes.
    """
    accuracy, memory = _candidates(accuracy, memory)
    finite = np.isfinite(accuracy)
    front = np.zeros(accuracy.shape, dtype=bool)
    if finite.any():
        sizes, size_of = np.unique(memory[finite], return_inverse=True)
        best = np.full(sizes.shape, -np.inf)  # best accuracy at each size, sizes ascending
        np.maximum.at(best, size_of, accuracy[finite])
        best_of_smaller = np.concatenate([[-np.inf], np.maximum.accumulate(best)[:-1]])
        on_front = (accuracy[finite] == best[size_of]) & (accuracy[finite] > best_of_smaller[size_of])
        front[finite] = on_front
    return front


def choose(accuracy: Any, memory: Any, budget: int | None) -> int:
    """Chooses the most accurate candidate that fits; of equal ones the smallest, then the first.

    Args:
      accuracy: float[n]; candidates that are not finite are passed over.
      memory: bytes[n].
      budget: bytes, or None for no limit.

    Returns:
      The index of the choice, which is on the Pareto front of all candidates.

    Raises:
      NothingFitsError: no candidate of finite accuracy is within the budget.
      ValueError: there is no candidate of finite accuracy, or an argument is wrong (see `pareto_front`).
    """
    accuracy, memory = _candidates(accuracy, memory)
    finite = np.isfinite(accuracy)
    if not finite.any():
        raise ValueError(f"none of the {accuracy.size} candidates has a finite accuracy")
    fits = finite if budget is None else finite & (memory <= budget)
    if not fits.any():
        smallest = math.ceil(memory[finite].min())
        raise NothingFitsError(
            f"nothing fits in {budget} bytes: the smallest candidate needs {smallest} bytes ({format_bytes(smallest)})"
        )
    indices = np.flatnonzero(fits)
    return int(indices[np.lexsort((indices, memory[indices], -accuracy[indices]))[0]])


class SetVerdict(NamedTuple):
    """Whether to search a kernel set, and why."""

    kernel_set: tuple[int, ...]
    kept: bool
    reason: str


def keep_sets(
    kernel_sizes: Sequence[int],
    sets: Sequence[Sequence[int]],
    accuracy_mean: Mapping[int, float],
    accuracy_sd: Mapping[int, float],
    memory: Mapping[int, int],
    n: int,
) -> list[SetVerdict]:
    """Decides from the impact of single kernel sizes which kernel sets are worth searching.

    A set is represented by the mean accuracy A and the mean memory M of its sizes: its cells mix them.
    Set S is dropped when there is a set T with M(T) <= M(S) and A(T) - A(S) > SE, where SE is one standard
    error of that difference,

        SE² = sum over sizes k of (w_T(k) - w_S(k))² · sd(k)² / n,    w_S(k) = 1/|S| if k in S, else 0,

    in which a size common to both sets counts only by what remains of it after subtraction. Everything else
    is kept. So a set is dropped only for an advantage larger than the noise, and never for memory alone.
    The set of the highest A is always kept. A dropped set's reason names the most accurate set that
    dominates it, which is itself kept (SE obeys the triangle inequality, so dominance is transitive).
    With n = 1 the noise is unknown, and nothing is dropped.

    Args:
      kernel_sizes: the sizes that were measured.
      sets: the sets to judge, each of different measured sizes, in any order; at least one.
      accuracy_mean: validation accuracy of each size, 0 to 1, mean over seeds.
      accuracy_sd: standard deviation over seeds (n - 1 in the divisor); not looked at when n = 1.
      memory: bytes of each size's network.
      n: number of seeds.

    Returns:
      One verdict for each set, in the order given.

    Raises:
      ValueError: a set names a size that was not measured, is empty, or comes twice; a measured value is
        missing or is not finite (negative sd and memory below 1 included); n is less than 1.
    """
    if n < 1:
        raise ValueError(f"the number of seeds is 1 or more, got {n}")
    names = [tuple(int(size) for size in kernel_set) for kernel_set in sets]
    _check_sets(kernel_sizes, names)
    sizes = sorted({size for name in names for size in name})
    means = _measured("accuracy mean", accuracy_mean, sizes, -math.inf)
    sds = _measured("accuracy sd", accuracy_sd, sizes, 0.0) if n > 1 else np.zeros(len(sizes))
    bytes_of = _measured("memory", memory, sizes, 1.0)

    weight = np.array([[(size in name) / len(name) for size in sizes] for name in names])  # [sets, sizes]
    set_memory = weight @ bytes_of
    # gain[s, t] is what set t is more accurate than set s, error[s, t] its standard error.
    difference = weight[None] - weight[:, None]
    gain = difference @ means
    error = np.sqrt(difference**2 @ sds**2 / n) if n > 1 else np.full(gain.shape, np.inf)
    # Below 1e-9 a difference is rounding: no set of images is large enough to resolve it.
    better = (set_memory[None] <= set_memory[:, None]) & (gain > 1e-9)
    dominates = better & (gain > error + 1e-9)

    verdicts = []
    for index, name in enumerate(names):
        rivals = dominates[index] if dominates[index].any() else better[index]
        if not rivals.any():
            verdicts.append(SetVerdict(name, True, "no set of its memory or less is more accurate"))
            continue
        rival = int(np.argmax(np.where(rivals, gain[index], -np.inf)))
        noise = "of unknown noise (one seed)" if n == 1 else f"± {100 * error[index, rival]:.1f} (SE)"
        advantage = (
            f"{names[rival]}: +{100 * gain[index, rival]:.1f} points of accuracy {noise} "
            f"at {set_memory[rival] / set_memory[index]:.2f}x memory"
        )
        kept = not dominates[index].any()
        verdicts.append(SetVerdict(name, kept, f"{'within noise of' if kept else 'dominated by'} {advantage}"))
    return verdicts


def _check_sets(kernel_sizes: Sequence[int], names: list[tuple[int, ...]]) -> None:
    if not names:
        raise ValueError("there are no kernel sets to judge")
    seen: set[frozenset[int]] = set()
    for name in names:
        if not name or len(set(name)) < len(name):
            raise ValueError(f"a kernel set holds different sizes, at least one, got {name}")
        missing = [size for size in name if size not in kernel_sizes]
        if missing:
            raise ValueError(f"kernel set {name} holds sizes that were not measured: {missing}")
        if frozenset(name) in seen:
            raise ValueError(f"kernel set {name} comes twice")
        seen.add(frozenset(name))


def _measured(what: str, values: Mapping[int, float], sizes: list[int], least: float) -> np.ndarray:
    for size in sizes:
        if size not in values or not math.isfinite(values[size]) or values[size] < least:
            raise ValueError(f"the {what} of kernel size {size} was not measured: {values.get(size)}")
    return np.array([values[size] for size in sizes], dtype=np.float64)
