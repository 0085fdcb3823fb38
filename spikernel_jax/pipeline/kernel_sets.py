"""Step 2: which kernel sets are worth searching, by what step 1 measured of their sizes.

The rule is a screen, not a significance test. NumPy only but for the step itself.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from spikernel_jax.cells.kernels import Kernel, in_order, kernel_set, kernel_set_text
from spikernel_jax.pipeline.job import Job

if TYPE_CHECKING:
    import polars as pl


class SetVerdict(NamedTuple):
    """Whether to search a kernel set, and why."""

    kernel_set: tuple[Kernel, ...]
    kept: bool
    reason: str


def keep_sets(
    kernels: Sequence[Kernel],
    sets: Sequence[Sequence[Kernel]],
    accuracy_mean: Mapping[Kernel, float],
    accuracy_sd: Mapping[Kernel, float],
    memory: Mapping[Kernel, int],
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
      kernels: sizes, or names of operations, that were measured.
      sets: the sets to judge, each of different measured kernels, in any order; at least one.
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
    names = [tuple(kernel_set) for kernel_set in sets]
    _check_sets(kernels, names)
    sizes = list(in_order({size for name in names for size in name}))
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
            f"{kernel_set_text(names[rival])}: +{100 * gain[index, rival]:.1f} points of accuracy {noise} "
            f"at {set_memory[rival] / set_memory[index]:.2f}x memory"
        )
        kept = not dominates[index].any()
        verdicts.append(SetVerdict(name, kept, f"{'within noise of' if kept else 'dominated by'} {advantage}"))
    return verdicts


def _check_sets(kernels: Sequence[Kernel], names: list[tuple[Kernel, ...]]) -> None:
    if not names:
        raise ValueError("there are no kernel sets to judge")
    seen: set[frozenset[Kernel]] = set()
    for name in names:
        if not name or len(set(name)) < len(name):
            raise ValueError(f"a kernel set holds different kernels, at least one, got {name}")
        missing = [size for size in name if size not in kernels]
        if missing:
            raise ValueError(f"kernel set {kernel_set_text(name)} holds kernels that were not measured: {missing}")
        if frozenset(name) in seen:
            raise ValueError(f"kernel set {kernel_set_text(name)} comes twice")
        seen.add(frozenset(name))


def _measured(what: str, values: Mapping[Kernel, float], sizes: list[Kernel], least: float) -> np.ndarray:
    for size in sizes:
        if size not in values or not math.isfinite(values[size]) or values[size] < least:
            raise ValueError(f"the {what} of kernel {size} was not measured: {values.get(size)}")
    return np.array([values[size] for size in sizes], dtype=np.float64)


def judge(table: "pl.DataFrame", sets: Sequence[Sequence[Kernel]] | None) -> list[SetVerdict]:
    """Verdicts from step 1's table, of these sets or of all pairs of its kernels; errors as `keep_sets`."""
    import polars as pl

    by_kernel = {kernel_set(k)[0]: table.filter(pl.col("kernel") == k) for k in table["kernel"].unique().to_list()}
    kernels = in_order(by_kernel)
    n = min(len(part) for part in by_kernel.values())
    return keep_sets(
        kernels,
        [in_order(s) for s in sets] if sets else list(itertools.combinations(kernels, 2)),
        {k: float(np.mean(part["accuracy"].to_numpy())) for k, part in by_kernel.items()},
        {k: float(np.std(part["accuracy"].to_numpy(), ddof=1)) if n > 1 else 0.0 for k, part in by_kernel.items()},
        {k: int(part["memory_bytes"][0]) for k, part in by_kernel.items()},
        n,
    )


def choose_sets(job: Job) -> list[tuple[Kernel, ...]]:
    """The sets worth searching, by the rule of `keep_sets`, or all.

    Returns:
      The kept sets; the verdicts go to ``summary.json``.

    Raises:
      ValueError: if the impact table is missing or damaged, or lacks a kernel of a set.
    """
    wanted = ("kernel", "accuracy", "memory_bytes")
    verdicts = judge(job.run.read_table("impact", "experiments/kernel_impact.py", wanted), job.options.sets)
    if job.options.keep == "all":
        verdicts = [v._replace(kept=True, reason="--keep all") for v in verdicts]
    job.say(f"step 2, kernel sets ({job.options.keep}):")
    for verdict in verdicts:
        job.say(f"  {kernel_set_text(verdict.kernel_set)}  {'kept' if verdict.kept else 'dropped'}: {verdict.reason}")
    job.run.update_summary(kernel_sets=[{"set": v.kernel_set, "kept": v.kept, "reason": v.reason} for v in verdicts])
    return [v.kernel_set for v in verdicts if v.kept]
