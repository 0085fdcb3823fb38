"""Small networks of every kind of space, and rows of theirs, dead nodes and all."""

import numpy as np
import pytest

from spikernel_jax.cells.space import CellSpace
from spikernel_jax.snn.neurons import NeuronSpec
from spikernel_jax.snn.spec import NetworkSpec

LEARNING = NeuronSpec(learn_tau=True, learn_threshold=True)
KINDS = pytest.mark.parametrize(
    "kind", [{}, {"neuron": LEARNING, "shortcut": "spike"}, {"neuron": NeuronSpec(learn_tau=True)}], ids=str
)
SPACES = {
    "pair": CellSpace((1, 3)),
    "four": CellSpace((1, 3, 5, 7)),
    "feedback": CellSpace((3, 5), feedback=True),
    "varied": CellSpace(
        operations=("zero", "skip", "conv3@0.5", "conv3", "maxpool3@0.5", "dwconv5", "avgpool"), direct="any"
    ),
}


def make_spec(space: CellSpace, head: str = "gap", **fields: object) -> NetworkSpec:
    settings = {"channels": 2, "time_steps": 2, "head_hidden": 5, "neurons_per_class": 3} | fields
    return NetworkSpec((9, 8, 3), 4, space, head=head, **settings)  # pyright: ignore[reportArgumentType]


def raw_rows(space: CellSpace, n: int, seed: int) -> np.ndarray:
    """Uniform valid rows, dead nodes and all, so that more than canonical cells is covered."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(space.num_ops, size=(40 * n, len(space.edges)), dtype=np.int8)
    if space.feedback:  # one direction for each pair of nodes
        for (source, target), position in zip(space.edges, range(6), strict=False):
            back = space.edges.index((target, source))
            ahead = rng.integers(2, size=len(rows)).astype(bool)
            rows[ahead, back] = 0
            rows[~ahead, position] = 0
    return rows[space.is_valid(rows)][:n]
