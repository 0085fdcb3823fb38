"""Pooling against an oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracles import avgpool_oracle
from spikernel_jax.operations import pooling


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 6)])
def test_avgpool(size):
    x = np.random.default_rng(0).normal(size=(2, 3, *size, 2))
    with jax.enable_x64(True):
        ours = pooling.average_pool(jnp.asarray(x))
    np.testing.assert_allclose(ours, avgpool_oracle(x), rtol=1e-10, atol=1e-12)
