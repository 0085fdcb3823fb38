"""Golden numbers of the public SNASNet network, small enough to lie in the repository: ``tests/golden``.

Use: ``python tools/make_golden.py`` (needs torch and spikingjelly, see `peers`; a minute). What is run is
spikingjelly's own `SNASNet` in float64, in the public scoring loop (`peers.score_network`, which reproduces the numbers
of the reference's repository), at small width on real images of ``tests/data``. Two forward cells and a feedback cell:
weights, spikes of every LIF call, kernels, scores, logits; of one forward cell more three steps of the public SGD, with
losses and gradients.
"""

import dataclasses
import hashlib
import importlib
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import peers
from spikernel_jax import CellSpace, NetworkSpec, load_dataset
from spikernel_jax.data import normalise
from spikernel_jax.pipeline import cli

ROOT = Path(__file__).resolve().parents[1]
CELLS = {"fw_mixed": "0123 0042 0001 0000", "fw_dead_node": "0231 0000 0002 0000", "bw_cifar100": "0302 0030 3003 0000"}
GRADIENT = ("grad_fw", "0123 0042 0003 0000")
SPEC = NetworkSpec((16, 16, 3), 10, channels=4, head="snasnet", head_hidden=32, neurons_per_class=10)
BATCH, STEPS = 12, 3


@dataclasses.dataclass(frozen=True)
class Options:
    """Where the numbers go."""

    out: Path = ROOT / "tests" / "golden"
    """Folder of the manifest and its arrays."""


def _network(cell: str, seed: int) -> tuple[Any, np.ndarray, np.ndarray]:
    """The public network in float64 with weights that make its head fire, its raw and its pruned matrix."""
    torch = importlib.import_module("torch")
    raw = np.array([[int(c) for c in word] for word in cell.split()])
    spec = dataclasses.replace(SPEC, space=CellSpace(feedback=bool(np.tril(raw).any())))
    (matrix,) = peers.matrices(raw[None], spec)
    torch.manual_seed(seed)
    net = peers.build(matrix, spec)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
        net.classifier[1].weight.mul_(20)
        net.classifier[3].weight.mul_(10)
        net.classifier[3].bias.normal_(0, 0.1)
    return net.double(), raw, matrix


def _masks(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).random((count, BATCH, SPEC.features)) < 0.5


def _weights(net: Any) -> dict[str, np.ndarray]:
    """As they are, drawn in float32 and not yet trained."""
    return {f"w/{key}": value.detach().numpy().astype(np.float32) for key, value in net.named_parameters()}


def _observed(net: Any, batches: list[Any]) -> tuple[list[list[np.ndarray]], list[np.ndarray], Any]:
    """Spikes of every LIF call, logits, and the public loop's sums; membranes go on from batch to batch."""
    _, _, lif = peers._libraries()
    calls: list[np.ndarray] = []
    hooks = [
        module.register_forward_hook(lambda _m, _i, out: calls.append(out.detach().numpy() > 0))
        for module in net.modules()
        if isinstance(module, lif)
    ]
    logits: list[np.ndarray] = []
    hooks.append(net.register_forward_hook(lambda _m, _i, out: logits.append(out.detach().numpy())))
    sums = peers.score_network(net, batches)
    for hook in hooks:
        hook.remove()
    return [calls[i * sums.lif_calls : (i + 1) * sums.lif_calls] for i in range(len(batches))], logits, sums


def _case(name: str, seed: int, x: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Adds a case's arrays, and gives its entry of the manifest."""
    torch = importlib.import_module("torch")
    keep, found = _masks(seed, 1)[0], {}
    for order in (("A", "Bcarry"), ("Breset",)):
        net, raw, matrix = _network(CELLS[name], seed)  # the same weights, no membranes yet
        net.classifier[0].mask = torch.from_numpy(2.0 * keep)
        spikes, logits, sums = _observed(net, [x[batch] for batch in order])
        found |= {b: (s, y, k, score) for b, s, y, k, score in
                  zip(order, spikes, logits, sums.kernels, sums.scores, strict=True)}  # fmt: skip
        lif_calls = sums.lif_calls
    mine: dict[str, Any] = {"con_raw": raw.astype(np.int8), "con_mat": matrix.astype(np.int8), "dropout_keep": keep}
    mine |= _weights(net)
    meta: dict[str, Any] = {"cell": CELLS[name], "seed": seed, "timestep": SPEC.time_steps, "tau": SPEC.neuron.tau}
    meta |= {"second_avgpooling": SPEC.head_pool, "num_classes": SPEC.num_classes, "n_lif_calls": lif_calls}
    for batch, (spikes, logits, kernel, score) in found.items():
        mine[f"f64/spike_counts_{batch}"] = np.stack([s.reshape(BATCH, -1).sum(1) for s in spikes]).astype(np.int32)
        mine[f"f64/K64_{batch}"], mine[f"f64/out_train_{batch}"] = kernel, logits
        meta[f"score_K64_{batch}"] = float(score)
    mine |= {f"spikes_A/{i:03d}": np.packbits(s.ravel()) for i, s in enumerate(found["A"][0])}
    arrays |= {f"{name}/{key}": value for key, value in mine.items()}
    return meta


def _gradient(x: Any, labels: np.ndarray, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Adds the training case's arrays, and gives its entry of the manifest."""
    torch = importlib.import_module("torch")
    functional = importlib.import_module("spikingjelly.activation_based.functional")
    name, cell = GRADIENT
    net, _, matrix = _network(cell, 7)
    masks = _masks(7, STEPS)
    optimiser = torch.optim.SGD(net.parameters(), 0.1, 0.9, 5e-4)  # as the public code: the fourth is the dampening
    losses: list[float] = []
    mine: dict[str, Any] = {"con_mat": matrix.astype(np.int8), "dropout_keep": masks}
    mine |= _weights(net)
    for step, mask in enumerate(masks):
        functional.reset_net(net)
        net.classifier[0].mask = torch.from_numpy(2.0 * mask)
        optimiser.zero_grad()
        logits = net(x)
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            mine["out_f64"] = logits.detach().numpy()
            grads = {f"grad_f64/{key}": value.grad.numpy().copy() for key, value in net.named_parameters()}
            mine |= {key: value.astype(np.float32) if value.size >= 4096 else value for key, value in grads.items()}
        optimiser.step()
    arrays |= {f"{name}/{key}": value for key, value in mine.items()}
    norms = {key: float(value.detach().norm()) for key, value in net.named_parameters()}
    return {
        "cell": cell, "timestep": SPEC.time_steps, "tau": SPEC.neuron.tau, "second_avgpooling": SPEC.head_pool,
        "num_classes": SPEC.num_classes, "loss_f64": losses, "param_l2_after_3_sgd_steps_f64": norms,
    }  # fmt: skip


def make(options: Options) -> None:
    """Writes manifest and arrays.

    Raises:
      ValueError: torch or spikingjelly is missing.
    """
    if reason := peers.missing():
        raise ValueError(reason)
    torch = importlib.import_module("torch")
    data = load_dataset("cifar10", ROOT / "tests" / "data", validation=50, limit_train=2 * BATCH, limit_test=1)
    small = data.train.images[:, ::2, ::2]  # every other pixel: 16×16
    pixels = np.asarray(normalise(jnp.asarray(small), data.mean, data.std), np.float32)
    nchw = np.ascontiguousarray(np.moveaxis(pixels, -1, 1)).reshape(2, BATCH, 3, 16, 16)
    labels = data.train.labels[:BATCH].astype(np.int64)
    arrays: dict[str, np.ndarray] = {"x_A": nchw[0], "x_B": nchw[1], "labels_A": labels}
    batches = {name: torch.from_numpy(nchw[i]).double() for i, name in ((0, "A"), (1, "Bcarry"), (1, "Breset"))}
    cases = {name: _case(name, seed, batches, arrays) for seed, name in enumerate(CELLS, start=1)}
    grad = {GRADIENT[0]: _gradient(batches["A"], labels, arrays)}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "snasnet_small.npz"
    np.savez_compressed(path, allow_pickle=False, **arrays)
    manifest = {
        "what": f"spikingjelly's SNASNet in float64, made by tools/make_golden.py; {peers.describe()}",
        "images": data.source + "; every other pixel of the first training images",
        "licence": "SNASNet and spikingjelly: see their repositories; the numbers are facts of running them",
        "file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "cases": cases, "grad": grad,
    }  # fmt: skip
    (options.out / "snasnet_small.json").write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    cli.say(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    cli.main(Options, make, __doc__ or "")
