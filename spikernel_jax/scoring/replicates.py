"""Scores over replicates: their means, and how far each would move if drawn anew."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Scores(NamedTuple):
    """Scores of a population.

    Example:
      >>> import numpy as np
      >>> from spikernel_jax import Scores
      >>> replicates = np.array([[3.0, 5.0], [1.0, 2.0]])  # two cells, two draws
      >>> found = Scores(replicates.mean(1), replicates.std(1, ddof=1) / 2**0.5, replicates, np.array([8, 6]))
      >>> found.scores.argmax(), found.standard_errors.tolist()
      (np.int64(0), [1.0, 0.5])
    """

    scores: NDArray[np.float64]  # [n] mean over replicates; NaN or -inf is kept as it is
    standard_errors: NDArray[np.float64]  # [n] of the mean's level, NaN for one replicate
    replicates: NDArray[np.float64]  # [n, R]
    lif_calls: NDArray[np.int64]  # [n] LIF calls that the score counts


def over_replicates(replicates: NDArray[np.float64], lif_calls: NDArray[np.int64]) -> Scores:
    """Means and standard errors of replicates [n, R]."""
    n, seeds = replicates.shape
    with np.errstate(invalid="ignore"):  # a score of -inf has no spread
        mean = replicates.mean(1)
        error = replicates.std(1, ddof=1) / np.sqrt(seeds) if seeds > 1 else np.full(n, np.nan)
    return Scores(mean, error, replicates, lif_calls)


def paired_standard_errors(replicates: ArrayLike) -> NDArray[np.float64]:
    """Standard errors of each candidate's score relative to the population's, for common random numbers.

    The noise of a replicate's weights and batch is mostly common to all candidates, and cancels where
    candidates are compared. `Scores.standard_errors` still holds it: they say how far a score's level
    would move if drawn anew. These say how far a candidate would move against the others, and so tell
    candidates apart.

    Args:
      replicates: [n, R], column r of all candidates drawn together (`score_population`). Candidates with
        a replicate that is not finite are left out of the means that are subtracted.

    Returns:
      [n] standard errors of the mean over replicates of score less the population's mean score in that
      replicate; NaN for one replicate, and for candidates with one that is not finite. Two candidates
      alone are equally far from their mean, so both errors are then half that of their difference; a
      lone candidate is its own mean, and its error 0.

    Raises:
      ValueError: if replicates are not [n, R].
    """
    values = np.asarray(replicates, np.float64)
    if values.ndim != 2:
        raise ValueError(f"replicates have shape {values.shape}; want [n, R]")
    n, seeds = values.shape
    errors = np.full(n, np.nan)
    finite = np.isfinite(values).all(1)
    if seeds > 1 and finite.any():
        relative = values[finite] - values[finite].mean(0)
        errors[finite] = relative.std(1, ddof=1) / np.sqrt(seeds)
    return errors
