"""A training-free score of your own beside SAHD, on the same cells."""

import jax

from spikernel_jax import CellSpace, NetworkSpec, make_bank, score_population
from spikernel_jax.scoring.scores import SpikeTerms, register_score


@register_score("mean_distance")
def mean_distance(terms: SpikeTerms) -> jax.Array:
    """The mean normalised Hamming distance between the spikes of two images."""
    n = terms.rho_BB.shape[0]
    return terms.rho_BB.sum() / (n * (n - 1))


space = CellSpace(kernel_sizes=(1, 3))
spec = NetworkSpec((12, 12, 1), 4, space, channels=4, time_steps=2)
cells = space.sample(jax.random.key(0), 6)
bank = make_bank(jax.random.key(1), spec)
images = jax.random.normal(jax.random.key(2), (8, 12, 12, 1))
for name in ("sahd_paper", "mean_distance"):
    print(name, score_population(cells, bank, images, spec, score=name).scores.round(3))
