"""Conventional networks by the code of spiking ones: ReLU in the place of LIF, one time step, all else alike."""

import contextlib
from collections.abc import Iterator

import jax

from spikernel_jax.snn import neurons
from spikernel_jax.snn.neurons import NeuronSpec

RELU = "relu"


@contextlib.contextmanager
def relu_neurons() -> Iterator[NeuronSpec]:
    """A neuron model without memory or spikes, known while the context lasts, loading a model's checkpoint included.

    It is no neuron that costs, exports and searches know: they count spikes.

    Yields:
      The specification of such a layer.

    Example:
      >>> from spikernel_jax.snn.conventional import relu_neurons
      >>> with relu_neurons() as neuron:
      ...     neuron.model
      'relu'
    """
    neurons.NEURONS[RELU] = lambda _, v_N, x_N: (v_N, jax.nn.relu(x_N))
    try:
        yield NeuronSpec(RELU)
    finally:
        del neurons.NEURONS[RELU]
