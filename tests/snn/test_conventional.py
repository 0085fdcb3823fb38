"""ReLU in the place of neurons."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spikernel_jax.snn import neurons
from spikernel_jax.snn.conventional import relu_neurons


def test_relu_neurons_are_relu_and_are_gone_afterwards():
    before = set(neurons.NEURONS)
    x = jnp.array([-2.0, -0.5, 0.5, 3.0])
    with relu_neurons() as neuron:
        value, slope = (f(neuron, x) for f in (_fire, jax.vmap(jax.grad(_fire, 1), (None, 0))))
    np.testing.assert_array_equal(value, np.maximum(x, 0))
    np.testing.assert_array_equal(slope, np.asarray(x) > 0)
    assert set(neurons.NEURONS) == before


def _fire(neuron: Any, x: jax.Array) -> jax.Array:
    return neurons.run(neuron, jnp.zeros(x.shape), x[None])[1][0]
