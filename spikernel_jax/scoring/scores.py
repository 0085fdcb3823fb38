"""Training-free scores of a cell: sparsity-aware Hamming distance (SAHD), behind a registry.

Source: Kim et al., ECCV 2022 (SNASNet), section 4.2, after Mellor et al., ICML 2021.

For one LIF call with N neurons, x_i in {0,1}^N the spikes of image i and r_i their mean::

    HD_ij  = #{x_i != x_j} = n_i + n_j - 2 x_i.x_j
    E_ij   = N (r_i (1 - r_j) + (1 - r_i) r_j)
    rho_ij = HD_ij / (E_ij + 1e-3)

Both published forms of the kernel are ``mean(N) - 0.5 R``, with R the mean over LIF calls of rho (code
form) or of N·rho (paper form), so the score of both is evaluated by the matrix determinant lemma::

    A = -0.5 R,   log|det(A + mean(N) 1 1^T)| = log|det A| + log|1 + mean(N) 1^T A^-1 1|

which never adds the large mean(N) to the small R, and so keeps float32 accurate.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from spikernel_jax.snn import network
from spikernel_jax.snn.spec import NetworkSpec, Site

Array = jax.Array


class SpikeTerms(NamedTuple):
    """What the LIF calls of one network on one batch add up to; every score is a function of it."""

    rho_BB: Array  # mean over LIF calls of rho
    weighted_rho_BB: Array  # mean over LIF calls of N·rho
    neurons: Array  # mean of N over LIF calls
    calls: Array  # number of LIF calls (sites, each conv edge its own, times T)


Score = Callable[[SpikeTerms], Array]
_SCORES: dict[str, Score] = {}


def register_score(name: str) -> Callable[[Score], Score]:
    """Adds a score to the registry under a name of its own.

    Raises:
      ValueError: if the name is taken.
    """

    def add(score: Score) -> Score:
        if name in _SCORES:
            raise ValueError(f"score {name!r} is registered already")
        _SCORES[name] = score
        return score

    return add


def get_score(name: str) -> Score:
    """The score of that name.

    Raises:
      ValueError: naming the known scores.
    """
    if name not in _SCORES:
        raise ValueError(f"score={name!r} is unknown; known: {', '.join(_SCORES)}")
    return _SCORES[name]


def score_names() -> tuple[str, ...]:
    """Names of all registered scores, the default first."""
    return tuple(_SCORES)


def scored_spec(spec: NetworkSpec) -> NetworkSpec:
    """The network that a training-free score is of: with nothing learned yet, neurons are the spec's own, fixed.

    Scores compare which neurons fire: of neurons that fire more than once a time step, the first spike.

    Raises:
      ValueError: where cells that the search takes for one function are not, because skips hand on spikes.
    """
    if spec.shortcut != "membrane":
        raise ValueError(
            f"shortcut={spec.shortcut!r}: scores and searches take skips for identities and average pooling for linear "
            "(CellSpace.enumerate), which shortcuts of spikes are not; score with shortcut='membrane'"
        )
    neuron = dataclasses.replace(spec.neuron, learn_tau=False, learn_threshold=False, max_spikes=1)
    return dataclasses.replace(spec, neuron=neuron)


def normalised_hamming(spikes: Array) -> Array:
    """Rho of every LIF call.

    Args:
      spikes: 0 or 1, [T, B, ...]; at most 2**24 neurons an image, so that float32 counts are exact.

    Returns:
      rho_TBB, zero on its diagonal.

    Raises:
      ValueError: if there are more neurons than float32 counts exactly.
    """
    x_TBN = spikes.reshape(*spikes.shape[:2], -1)
    n = x_TBN.shape[-1]
    if n > 2**24:
        raise ValueError(f"{n} neurons in one LIF layer: float32 counts only up to 2**24 = 16777216 exactly")
    counts = jnp.promote_types(x_TBN.dtype, jnp.float32)  # narrower spikes are still counted in float32
    gram_TBB = jnp.einsum("tbn,tcn->tbc", x_TBN, x_TBN, preferred_element_type=counts)
    count_TB = jnp.diagonal(gram_TBB, axis1=1, axis2=2)
    distance = count_TB[:, :, None] + count_TB[:, None, :] - 2 * gram_TBB
    rate_TB = count_TB / n
    r_i, r_j = rate_TB[:, :, None], rate_TB[:, None, :]
    return distance / (n * (r_i * (1 - r_j) + (1 - r_i) * r_j) + 1e-3)


def spike_counts(spikes: Array) -> Array:
    """Number of spikes of each image at each time step: [T, B, ...] -> [T, B]."""
    return spikes.reshape(*spikes.shape[:2], -1).sum(-1)


def log_abs_det(neurons: Array, mean_rho_BB: Array) -> Array:
    """``log|det(neurons - 0.5 · mean_rho)|`` by the matrix determinant lemma.

    The batch shares one large common part ``neurons``; what tells cells apart is ``mean_rho``, whose
    diagonal is zero, so A is indefinite and is factorised by LU.

    Args:
      neurons: mean number of neurons of a LIF call, scalar.
      mean_rho_BB: mean of rho (or N·rho) over the calls.

    Returns:
      Scalar; -inf where the determinant is zero (two images with the same spikes everywhere).
    """
    a_BB = -0.5 * mean_rho_BB
    lu, pivots, _ = lax.linalg.lu(a_BB)
    log_det_a = jnp.log(jnp.abs(jnp.diagonal(lu))).sum()
    ones = jnp.ones(a_BB.shape[0], a_BB.dtype)
    y = jax.scipy.linalg.lu_solve((lu, pivots), ones)
    value = log_det_a + jnp.log(jnp.abs(1 + neurons * y.sum()))
    # Equal images have equal rows, which LU may leave a rounding error apart: a zero off the diagonal tells.
    alike = (mean_rho_BB == 0).sum() > mean_rho_BB.shape[0]
    return jnp.where(alike | jnp.isneginf(log_det_a), -jnp.inf, value)


@register_score("sahd_paper")
def sahd_paper(terms: SpikeTerms) -> Array:
    """SAHD with K = sum over calls of N·(1 - 0.5·rho): the expected distance counts N/2 at any rate."""
    return log_abs_det(terms.neurons, terms.weighted_rho_BB)


@register_score("sahd_code")
def sahd_code(terms: SpikeTerms) -> Array:
    """SAHD with K = sum over calls of (N - 0.5·rho), which the public SNASNet code computes."""
    return log_abs_det(terms.neurons, terms.rho_BB)


def collect(records: Mapping[str, Array], sites: Mapping[str, Site]) -> SpikeTerms:
    """Averages the sites' rho over all LIF calls.

    Args:
      records: rho_TBB by site, what `normalised_hamming` made of each site's spikes.
      sites: neurons and LIF calls of each site, for the genotype that was run.

    Returns:
      The terms, in the dtype of the records.
    """
    first = next(iter(records.values()))
    steps, batch, dtype = first.shape[0], first.shape[1], first.dtype
    rho = weighted = jnp.zeros((batch, batch), dtype)
    calls = neurons = jnp.zeros((), dtype)
    for name, rho_TBB in records.items():
        site = sites[name]
        here = jnp.asarray(site.calls, dtype)
        total = here * rho_TBB.sum(0)
        rho, weighted = rho + total, weighted + site.neurons * total
        calls, neurons = calls + steps * here, neurons + steps * here * site.neurons
    return SpikeTerms(rho / calls, weighted / calls, neurons / calls, calls)


def spike_terms(
    spec: NetworkSpec,
    genotype: Any,
    params: network.Params,
    images_BHWC: Array,
    *,
    state: network.State | None = None,
    dropout_keep: Array | None = None,
    spike_dtype: Any = None,
    step_by_step: bool | None = None,
) -> tuple[SpikeTerms, network.Output]:
    """Runs a network on batch statistics and collects what scores are made of.

    Args:
      spec: the network.
      genotype: fixed or traced.
      params: the genotype's parameters, or a bank's.
      images_BHWC: normalised images.
      state: membranes to start from; None (the default) starts clean.
      dropout_keep: mask of the head's inputs; None for no dropout.
      spike_dtype: type of the spikes; None is that of the currents.
      step_by_step: loop over time outside the layers; None does so only for feedback cells.

    Returns:
      The terms, and the network's output.
    """
    out = network.apply(
        spec,
        genotype,
        params,
        images_BHWC,
        state=state,
        train=True,
        dropout_keep=dropout_keep,
        observe=normalised_hamming,
        spike_dtype=spike_dtype,
        step_by_step=step_by_step,
    )
    return collect(out.records, spec.sites(genotype)), out
