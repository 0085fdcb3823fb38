"""A model as a graph of the Neuromorphic Intermediate Representation (Pedersen et al., 2024, arXiv 2311.14641).

Inputs of a node of the graph are summed, so skips and parallel edges are edges that meet; where currents meet that are
read more than once, a scale of 1 stands, and one of 0 where none meet. Batch norm is folded into convolutions; one
without a convolution before it is a convolution of 1 by 1, channel by channel. Images are channels first. A time step
is NIR's dt of 1, and neurons are updated in the order of the layers, within it; all membranes begin at 0. A graph says
nothing of the mean over time that the logits are.
"""

from collections.abc import Sequence
from typing import Any

import jax
import nir
import numpy as np
from numpy.typing import NDArray

from spikernel_jax.snn import neurons
from spikernel_jax.snn.model import Model
from spikernel_jax.snn.rounding import class_means
from spikernel_jax.snn.spec import CELLS, layer_name


def graph_of(model: Model) -> nir.NIRGraph:
    """The graph of a model, from normalised images [C, H, W] to the logits [K] of a time step.

    Args:
      model: trained.

    Raises:
      ValueError: naming what NIR cannot say: feedback, a soft reset, another neuron than a LIF, pooling by maximum, an
        operation of one's own without such a form.

    Example:
      >>> import jax
      >>> from spikernel_jax import CellSpace, Model, NetworkSpec
      >>> from spikernel_jax.embedded.nir_graph import graph_of
      >>> from spikernel_jax.snn import network
      >>> spec = NetworkSpec((8, 8, 1), 2, CellSpace((3,)), channels=2, time_steps=1)
      >>> cell = tuple(spec.space.parse("0>1:conv3 0>3:skip 1>3:conv3").tolist())
      >>> graph = graph_of(Model(spec, cell, *network.init(jax.random.key(0), spec, cell), (0.5,), (0.3,)))
      >>> ("cell1.value3", "transition.in") in graph.edges
      True
    """
    builder = _Builder(model)
    return nir.NIRGraph(builder.nodes, builder.edges, metadata=_about(model), type_check=False)


def _about(model: Model) -> dict[str, Any]:
    return {
        "genotype": model.text,
        "time_steps": model.spec.time_steps,
        "mean": list(model.mean),
        "std": list(model.std),
        "logits": "mean of the output over all time steps",
    }


class _Builder:
    def __init__(self, model: Model):
        self.model, self.spec = model, model.spec
        if self.spec.space.feedback:
            raise ValueError("NIR has no feedback from one time step to the next: this cell cannot be written")
        self.params, self.stats = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (model.params, model.stats))
        self.sites = self.spec.sites(model.genotype)
        self.nodes: dict[str, Any] = {}
        self.edges: list[tuple[str, str]] = []
        height, width, channels = self.spec.image_shape
        self.add("input", nir.Input({"input": np.array([channels, height, width])}))
        self.convolve("stem", (height, width), ("input",), stride=self.spec.stem_stride)
        out = "stem"
        for index, cell in enumerate(CELLS):
            out = self.cell(index, cell, out)
            site, size = ("transition", "last")[index], self.spec.cell_size(index)
            self.normalise(f"{site}.in", ("transition.in", "last")[index], size, out)
            self.fire(site, size, self.spec.cell_channels(index), self.spec.neuron, f"{site}.in")
            if index == 0:
                self.convolve("transition.conv", size, (site,))
                out = self.pool("transition.pool", (2, 2), "transition.conv", strides=True)
        self.head()

    def add(self, name: str, node: Any, *sources: str) -> str:
        self.nodes[name] = node
        self.edges += [(source, name) for source in sources]
        return name

    def convolve(
        self, layer: str, size: tuple[int, int], sources: Sequence[str], *, norm: bool = True, stride: int = 1,
        dilation: int = 1, groups: int = 1,
    ) -> str:  # fmt: skip
        kernel = self.params[layer]["kernel"]
        bias = np.zeros(kernel.shape[-1])
        if norm:
            scale, bias = self.model.folded_norm(layer)
            kernel = kernel * scale
        padding = dilation * (kernel.shape[0] // 2), dilation * (kernel.shape[1] // 2)
        weight = kernel.transpose(3, 2, 0, 1).astype(np.float32)
        node = nir.Conv2d(size, weight, stride, padding, dilation, groups, bias.astype(np.float32))
        return self.add(layer, node, *sources)

    def normalise(self, name: str, layer: str, size: tuple[int, int], source: str) -> str:
        scale, bias = (own.astype(np.float32) for own in self.model.folded_norm(layer))
        return self.add(name, nir.Conv2d(size, scale[:, None, None, None], 1, 0, 1, len(scale), bias), source)

    def fire(self, site: str, size: tuple[int, ...], channels: int, neuron: neurons.NeuronSpec, *sources: str) -> str:
        if neuron.model != "lif" or neuron.reset != "hard":
            raise ValueError(f"NIR has no neuron {neuron.model!r} of {neuron.reset} reset: {site} cannot be written")
        leak, threshold = neurons.constants(neuron, self.params.get(site, {}))

        def everywhere(value: float) -> NDArray[np.float32]:
            return np.full((channels, *size), value, np.float32)

        reset = everywhere(neuron.v_reset)
        node = nir.LIF(everywhere(1 / leak), everywhere(1), reset, everywhere(threshold), reset)
        return self.add(site, node, *sources)

    def pool(self, name: str, window: tuple[int, int], source: str, *, strides: bool) -> str:
        own = np.array(window)
        step, padding = (own, np.zeros(2, int)) if strides else (np.ones(2, int), own // 2)
        return self.add(name, nir.AvgPool2d(own, step, padding), source)

    def cell(self, index: int, cell: str, entry: str) -> str:
        spec, size, channels = self.spec, self.spec.cell_size(index), self.spec.cell_channels(index)
        held = spec.held(self.model.genotype, index)
        values = {0: entry}
        for node in range(4):
            sources = [source for source in range(node) if (source, node) in held]
            if not sources and 0 < node < 3 and all(source != node for source, _ in held):
                continue  # nothing leads to it, or from it
            if node:
                values[node] = name = f"{cell}.value{node}"
                self.add(name, nir.Scale(np.full((channels, *size), float(bool(sources)), np.float32)))
                if not sources:
                    self.edges.append((entry, name))  # times 0, for every node needs an input
                for source in sources:
                    self.edge(index, cell, (source, node), held[source, node], values[source], name)
            for reader in spec.readers:
                if (site := reader.site(cell, node)) in self.sites:
                    self.fire(site, size, channels, reader.neuron, values[node])
        return values[3]

    def edge(self, index: int, cell: str, edge: tuple[int, int], code: int, value: str, target: str) -> None:
        spec, operation = self.spec, self.spec.space.operation(code)
        reader = spec.reader_of(code)
        read = value if reader is None else reader.site(cell, edge[0])
        name = layer_name(cell, edge, operation.name)
        if operation.primitive == "average_pool":
            read = self.pool(name, (operation.window, operation.window), read, strides=False)
        elif operation.primitive == "layers":
            for part, layer in operation.layers(spec.cell_channels(index)).items():
                own = f"{name}.{part}" if part else name
                fields = {"dilation": layer.dilation, "groups": layer.groups, "norm": layer.norm}
                read = self.convolve(own, spec.cell_size(index), (read,), **fields)
        elif operation.primitive != "identity":
            raise ValueError(
                f"NIR has no operation {operation.name!r} ({operation.primitive}): {name} cannot be written"
            )
        self.edges.append((read, target))

    def head(self) -> None:
        spec, out = self.spec, self.params["head.out"]
        size, channels = spec.cell_size(1), spec.cell_channels(1)
        snasnet = spec.head == "snasnet"
        window = (spec.head_pool, spec.head_pool) if snasnet else size
        left = spec.pooled_size if snasnet else (1, 1)
        self.pool("head.pool", window, "last", strides=True)
        self.add("head.flat", nir.Flatten({"input": np.array([channels, *left])}, 0, -1), "head.pool")
        last, kernel, bias = "head.flat", out["kernel"], out["bias"]
        if snasnet:
            hidden = self.params["head.hidden"]["kernel"]
            by_channel = hidden.reshape(*left, channels, -1).transpose(2, 0, 1, 3).reshape(hidden.shape)
            self.add("head.hidden", nir.Linear(by_channel.T.astype(np.float32)), last)
            last = self.fire("head", (), spec.head_hidden, spec.neuron, "head.hidden")
            kernel, bias = (class_means(own, spec.num_classes) for own in (kernel, bias))
        self.add("head.out", nir.Affine(kernel.T.astype(np.float32), bias.astype(np.float32)), last)
        self.add("output", nir.Output({"output": np.array([spec.num_classes])}), "head.out")
