"""NIR run by packages of others: nirtorch reads the file and wires it in PyTorch, norse has the neurons."""

import nir
import numpy as np
import pytest

from embedded_models import CASES, SILENT, images, model_of
from spikernel_jax.data import normalise
from spikernel_jax.embedded.nir_graph import graph_of
from spikernel_jax.snn import network

WHERE = "pip install -e '.[nir]' installs them"
torch = pytest.importorskip("torch", reason=f"no torch here: {WHERE}")
nirtorch = pytest.importorskip("nirtorch", reason=f"no nirtorch here: {WHERE}")
lif_box = pytest.importorskip("norse.torch.module.lif_box", reason=f"no norse here: {WHERE}")

SAID = [name for name in CASES | SILENT if name not in ("varied", "feedback", "spikes")]


def _neuron(node):
    def tensor(name):
        return torch.from_numpy(np.asarray(getattr(node, name), np.float32))

    parameters = lif_box.LIFBoxParameters(
        tau_mem_inv=1 / tensor("tau"), v_leak=tensor("v_leak"), v_th=tensor("v_threshold"), v_reset=tensor("v_reset")
    )
    cell = lif_box.LIFBoxCell(parameters, dt=1.0)
    cell.state_fallback = lambda x: lif_box.LIFBoxFeedForwardState(v=torch.zeros_like(x))  # its own is the leak
    return cell


def _affine(node):  # nirtorch 2.6 forgets the bias
    module = torch.nn.Linear(node.weight.shape[1], node.weight.shape[0])
    module.weight.data, module.bias.data = torch.from_numpy(node.weight), torch.from_numpy(node.bias)
    return module


def _convolution(node):  # nirtorch 2.6 takes its output's channels for its input's
    out, in_group, *kernel = node.weight.shape
    module = torch.nn.Conv2d(in_group * node.groups, out, kernel, node.stride, node.padding, node.dilation, node.groups)
    module.weight.data, module.bias.data = torch.from_numpy(node.weight), torch.from_numpy(node.bias)
    return module


class _Scale(torch.nn.Module):
    def __init__(self, node):
        super().__init__()
        self.scale = torch.from_numpy(node.scale)

    def forward(self, x):
        return self.scale * x


NODES = {nir.LIF: _neuron, nir.Affine: _affine, nir.Conv2d: _convolution, nir.Scale: _Scale}


@pytest.mark.parametrize("name", SAID)
def test_others_fire_as_the_model(name, tmp_path):
    model = model_of(name)
    nir.write(tmp_path / "model.nir", graph_of(model))
    module = nirtorch.nir_to_torch(nir.read(tmp_path / "model.nir", type_check=False), NODES)
    spikes = {}
    for site in model.spec.sites(model.genotype):
        module.get_submodule(site.replace(".", "_")).register_forward_hook(
            lambda _, __, out, site=site: spikes.setdefault(site, []).append(out[0].numpy())
        )
    x = normalise(images(3), model.mean, model.std)
    out = network.apply(model.spec, model.genotype, model.params, x, stats=model.stats, observe=lambda spikes: spikes)
    for index, image in enumerate(np.asarray(x, np.float32)):
        spikes.clear()
        state, logits = None, []
        with torch.no_grad():
            for _ in range(model.spec.time_steps):
                one, state = module(torch.from_numpy(image.transpose(2, 0, 1).copy()), state)
                logits.append(one.numpy())
        np.testing.assert_allclose(np.mean(logits, 0), out.logits_BK[index], rtol=1e-4, atol=1e-5)
        assert spikes.keys() == out.records.keys()
        for site, own in spikes.items():
            np.testing.assert_array_equal(own, np.moveaxis(np.asarray(out.records[site])[:, index], -1, 1))
