"""NIR: written, read back and run by an interpreter of its own, the graph fires as the model does."""

import nir
import numpy as np
import pytest

import nir_machine
from embedded_models import CASES, SILENT, images, model_of
from spikernel_jax.data import normalise
from spikernel_jax.embedded.nir_graph import graph_of
from spikernel_jax.snn import network

REFUSED = {
    "varied": r"no operation 'maxpool3' \(max_pool\): cell1.e13.maxpool3 cannot be written",
    "feedback": "no feedback from one time step to the next",
    "spikes": "no neuron 'lif' of soft reset: cell1.node",
    "several spikes": "no neuron 'lif' of soft reset: cell1.node",
    "several of the head": "no neuron 'lif' of soft reset: cell1.node",
}


@pytest.mark.parametrize("name", [name for name in CASES | SILENT if name not in REFUSED])
def test_a_graph_that_is_read_back_fires_as_the_model(name, tmp_path):
    model = model_of(name)
    nir.write(tmp_path / "model.nir", graph_of(model))
    graph = nir.read(tmp_path / "model.nir", type_check=False)
    x = normalise(images(3), model.mean, model.std)
    out = network.apply(model.spec, model.genotype, model.params, x, stats=model.stats, observe=lambda spikes: spikes)
    fired = 0
    for index, image in enumerate(np.asarray(x, np.float64)):
        logits, spikes = nir_machine.run(graph, image.transpose(2, 0, 1), model.spec.time_steps)
        np.testing.assert_allclose(logits, out.logits_BK[index], rtol=1e-4, atol=1e-5)
        assert spikes.keys() == out.records.keys()
        for site, own in spikes.items():
            expected = np.asarray(out.records[site])[:, index]
            np.testing.assert_array_equal(own, np.moveaxis(expected, -1, 1))
            fired += own[0].sum()
    assert fired > 50


@pytest.mark.parametrize("name", REFUSED)
def test_what_nir_cannot_say_is_refused_by_name(name):
    with pytest.raises(ValueError, match=REFUSED[name]):
        graph_of(model_of(name))
