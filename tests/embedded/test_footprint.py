"""Bytes in closed form are those of the exported C, of any cell."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedded_models import VARIED, every_kind, model_of, narrowed
from spikernel_jax import CellSpace, Model, NetworkSpec
from spikernel_jax.embedded import c
from spikernel_jax.embedded.lower import lower
from spikernel_jax.snn import network
from spikernel_jax.snn.footprint import footprints

SPACES = (CellSpace((1, 3)), CellSpace(operations=VARIED, direct="any"), CellSpace((1, 3), feedback=True))


@pytest.mark.parametrize(("bits", "width"), [(8, 16), (5, 16), (3, 16), (2, 9), (8, 8), (4, 8)])
@every_kind
def test_bytes_are_those_of_the_c(name, bits, width):
    model = model_of(name)
    program = narrowed(model, bits) if width == 8 else lower(model, bits, width)
    source, found = c.generate(program), footprints(model.spec, [model.genotype], bits, width)
    assert found.constants.tolist() == [source.constant_bytes]
    assert found.written.tolist() == [source.written_bytes]


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(SPACES), st.integers(0, 2**31 - 1), st.integers(1, 40), st.sampled_from(["gap", "snasnet"]))
def test_bytes_of_any_cell(space, seed, channels, head):
    spec = NetworkSpec((7, 6, 1), 3, space, channels=channels, time_steps=1, head=head, head_hidden=7)
    row = space.sample(jax.random.key(seed), 1)[0]
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), spec, tuple(row.tolist())))
    params, stats = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, leaf.dtype), shapes)
    source = c.generate(lower(Model(spec, tuple(row.tolist()), params, stats, (0.5,), (0.3,)), 4))
    found = footprints(spec, row[None], 4, 16)
    assert found.constants[0] == source.constant_bytes
    # Where buffers of different sizes do not pack without gaps, the C takes a little more than is alive at once.
    assert source.written_bytes == pytest.approx(found.written[0], rel=0.02)
    assert source.written_bytes >= found.written[0]


@pytest.mark.parametrize("bits", [1, 9, 4.0])
def test_widths_that_cannot_be(bits):
    spec = NetworkSpec((7, 6, 1), 3, SPACES[0], channels=2)
    with pytest.raises(ValueError, match="must be a whole number from 2 to 8"):
        footprints(spec, [[0, 0, 0, 2, 0, 0]], bits)
