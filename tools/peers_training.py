"""The PyTorch peers of the training benchmark: SNASNet trained as its public code trains it, and in multi-step mode.

- `"shipped"`: spikingjelly's own `SNASNet` (`peers.build`), step by step.
- `"multi_step"`: the same network of spikingjelly's layers with ``step_mode="m"``, what its documentation advises
  for speed: convolutions, linear layers and pooling see all time steps as one batch, a LIF its T steps at once (by
  what spikingjelly takes for the device; 2.0 leaves no choice of a backend). Batch norm stays per step, as in the
  shipped one; the usual multi-step batch norm takes its statistics over time, which is another network. Zero edges
  are left out, the shipped one multiplies by 0. Forward cells only: feedback cells cannot run layer by layer.

A step is what training must do for each batch: forward pass, cross-entropy on the mean output, backward pass, SGD
with momentum and weight decay, and `functional.reset_net`, for membranes and dropout masks must not reach the next
batch. Neither is compiled (`torch.compile`) or written anew to be faster. Images are normalised and on the device
beforehand. Installation, device and threads: see `peers`.

Sources: those of `peers`; `spikingjelly.activation_based.layer`.
"""

import functools
import importlib
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

import peers
from spikernel_jax.snn.spec import CELLS, NetworkSpec
from spikernel_jax.training.loop import TrainConfig

PEERS = ("shipped", "multi_step")


@functools.cache
def _spikingjelly() -> tuple[Any, Any, Any, Any]:
    """Its functional, layer, neuron and surrogate modules."""
    names = ("functional", "layer", "neuron", "surrogate")
    functional, layer, neuron, surrogate = (
        importlib.import_module(f"spikingjelly.activation_based.{name}") for name in names
    )
    return functional, layer, neuron, surrogate


@functools.cache
def _multi_step_class() -> Any:
    """The class of the multi-step network; made when torch is known to be there."""
    torch = importlib.import_module("torch")
    functional, layer, neuron, surrogate = _spikingjelly()
    nn = torch.nn

    class PerStepNorm(nn.BatchNorm2d):
        """Batch norm on the statistics of each time step."""

        def forward(self, x_TBCHW: Any) -> Any:
            return functional.multi_step_forward(x_TBCHW, super().forward)

    def lif(spec: NetworkSpec) -> Any:
        return neuron.LIFNode(
            tau=spec.neuron.tau,
            v_threshold=spec.neuron.v_threshold,
            v_reset=0.0,
            surrogate_function=surrogate.ATan(),
            detach_reset=True,
            step_mode="m",
        )

    def conv(c_in: int, c_out: int, k: int) -> Any:
        return layer.Conv2d(c_in, c_out, k, padding=k // 2, bias=False, step_mode="m")

    class Cell(nn.Module):
        """One cell; names of its parameters are those of the shipped one."""

        def __init__(self, matrix: Any, channels: int, spec: NetworkSpec):
            super().__init__()
            self.edges = [(row, col) for col in range(1, 4) for row in range(col)]
            made = {}
            for i, edge in enumerate(self.edges):
                if (op := int(matrix[edge])) == 1:
                    made[str(i)] = nn.Identity()
                elif op in (2, 3):
                    sequence = lif(spec), conv(channels, channels, 2 * op - 3), PerStepNorm(channels)
                    made[str(i)] = nn.Sequential(*sequence)
                elif op == 4:
                    made[str(i)] = layer.AvgPool2d(3, 1, 1, step_mode="m")
            self.cell_architecture = nn.ModuleDict(made)

        def forward(self, x_TBCHW: Any) -> Any:
            values = [x_TBCHW]
            for node in range(1, 4):
                inputs = [
                    self.cell_architecture[str(i)](values[source])
                    for i, (source, target) in enumerate(self.edges)
                    if target == node and str(i) in self.cell_architecture
                ]
                values.append(functools.reduce(torch.add, inputs) if inputs else torch.zeros_like(x_TBCHW))
            return values[3]

    class MultiStepSNASNet(nn.Module):
        """SNASNet layer by layer."""

        def __init__(self, matrix: Any, spec: NetworkSpec):
            super().__init__()
            self.spec, c = spec, spec.channels
            self.stem = nn.Sequential(
                nn.Conv2d(spec.image_shape[2], c, 3, spec.stem_stride, 1, bias=False), nn.BatchNorm2d(c)
            )
            self.cell1, self.cell2 = (Cell(matrix, spec.cell_channels(i), spec) for i in range(len(CELLS)))
            self.downconv1 = nn.Sequential(PerStepNorm(c), lif(spec), conv(c, 2 * c, 3), PerStepNorm(2 * c))
            self.last_act = nn.Sequential(PerStepNorm(2 * c), lif(spec))
            self.halve = layer.AvgPool2d(2, step_mode="m")
            self.pool = layer.AvgPool2d(spec.head_pool, step_mode="m")
            self.classifier = nn.Sequential(
                layer.Dropout(0.5, step_mode="m"),
                layer.Linear(spec.features, spec.head_hidden, bias=False, step_mode="m"),
                lif(spec),
                layer.Linear(spec.head_hidden, spec.outputs, step_mode="m"),
            )

        def forward(self, images_BCHW: Any) -> Any:
            x = self.stem(images_BCHW)
            x = self.cell1(x.unsqueeze(0).expand(self.spec.time_steps, *x.shape))
            x = self.last_act(self.cell2(self.halve(self.downconv1(x))))
            y_TBO = self.classifier(self.pool(x).flatten(2))
            return y_TBO.unflatten(-1, (self.spec.num_classes, self.spec.neurons_per_class)).mean(-1).mean(0)

    return MultiStepSNASNet


def build_multi_step(matrix: ArrayLike, spec: NetworkSpec) -> Any:
    """The multi-step network of one forward cell, in train mode, at torch's initialisation.

    Args:
      matrix: [4, 4], as `peers.matrices` makes it.
      spec: the network, one that `peers.build` can make; `dropout` is not read, it is 0.5.

    Returns:
      A `torch.nn.Module` with parameters and buffers named and shaped as those of `peers.build`.

    Raises:
      ValueError: on a space with feedback edges.
    """
    if spec.space.feedback:
        raise ValueError("feedback=True: feedback cells cannot run in multi-step mode")
    return _multi_step_class()(np.asarray(matrix), spec)


class Trainer:
    """A network and all that a training step needs, on torch's device."""

    def __init__(self, net: Any, images: ArrayLike, labels: ArrayLike, config: TrainConfig):
        """Takes the network over.

        Args:
          net: what `peers.build` or `build_multi_step` made.
          images: normalised, [B, H, W, C].
          labels: [B].
          config: learning rate (kept constant), momentum and weight decay are read.
        """
        torch, device = importlib.import_module("torch"), peers._device()
        self.torch, self.net = torch, net.to(device)
        self.images = torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(images), -1, 1))).to(device)
        self.labels = torch.from_numpy(np.asarray(labels, np.int64)).to(device)
        self.optimiser = torch.optim.SGD(
            self.net.parameters(), config.learning_rate, config.momentum, weight_decay=config.weight_decay
        )

    def backward(self) -> Any:
        """Gradients of the mean loss, left in the network; returns the loss."""
        self.optimiser.zero_grad(set_to_none=True)
        loss = self.torch.nn.functional.cross_entropy(self.net(self.images), self.labels)
        loss.backward()
        _spikingjelly()[0].reset_net(self.net)
        return loss.detach()

    def run(self, steps: int) -> float:
        """That many steps; returns the last loss when all are done."""
        loss = self.torch.zeros(())
        for _ in range(steps):
            loss = self.backward()
            self.optimiser.step()
        value = loss.item()  # waits for the loss, and on a GPU not for the update
        if self.images.is_cuda:
            self.torch.cuda.synchronize()
        return value


def trainers(
    matrix: ArrayLike, spec: NetworkSpec, images: ArrayLike, labels: ArrayLike, config: TrainConfig, seed: int = 0
) -> dict[str, Trainer]:
    """Both peers with the same weights, by name in `PEERS`.

    Args:
      matrix: [4, 4], as `peers.matrices` makes it.
      spec: the network.
      images: normalised, [B, H, W, C].
      labels: [B].
      config: of SGD.
      seed: of the weights; torch's global generator is left as it was.

    Raises:
      ValueError: on networks that the peers cannot be.
      ImportError: torch or spikingjelly is missing (see `peers.missing`).
    """
    torch = importlib.import_module("torch")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shipped, multi_step = peers.build(matrix, spec), build_multi_step(matrix, spec)
    multi_step.load_state_dict(shipped.state_dict())
    nets = zip(PEERS, (shipped, multi_step), strict=True)
    return {name: Trainer(net, images, labels, config) for name, net in nets}
