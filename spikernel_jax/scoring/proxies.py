"""Scores of an untrained network that were made for networks without spikes, each a function of one `Untrained`.

All are of one batch, with batch statistics. Where a paper's ReLU tells active from inactive, a neuron's spike at one
time step does; where it differentiates, surrogate gradients do. A cell is a traced genotype, so all cells of a space
share one program, and any operation that is registered can be in it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spikernel_jax.scoring.scores import log_abs_det
from spikernel_jax.snn import cost, network
from spikernel_jax.snn.layers import BN_MOMENTUM
from spikernel_jax.snn.neurons import NeuronSpec
from spikernel_jax.snn.spec import NetworkSpec

Array = jax.Array
_ZEN_STEP = 0.01  # alpha of Lin et al.
_JACOBIAN_FLOOR = 1e-5  # k of Mellor et al.
_RIDGE = 1.0


class Untrained(NamedTuple):
    """A network as it begins, and a batch."""

    spec: NetworkSpec
    genotype: Any  # fixed, or traced
    params: network.Params
    images_BHWC: Array  # normalised
    labels_B: Array
    key: Array

    def run(self, params: network.Params, images_BHWC: Array, **named: Any) -> network.Output:
        """A forward pass."""
        return network.apply(self.spec, self.genotype, params, images_BHWC, train=True, **named)

    def loss(self, params: network.Params) -> Array:
        """Cross-entropy of the mean output over time."""
        logits_BK = self.run(params, self.images_BHWC).logits_BK
        return optax.softmax_cross_entropy_with_integer_labels(logits_BK, self.labels_B).mean()

    def observed(self, observe: Callable[[Array], Any]) -> dict[str, tuple[Any, Array, int]]:
        """Of each LIF site that an edge can read: what is observed, 1 or 0 for whether one does, and neurons."""
        records = self.run(self.params, self.images_BHWC, observe=observe).records
        sites = self.spec.sites(self.genotype)
        return {
            name: (record, jnp.minimum(sites[name].calls, 1), sites[name].neurons)
            for name, record in records.items()
            if name in sites
        }


Proxy = Callable[[Untrained], Any]


def _distances(spikes: Array) -> Array:
    """Hamming distances of all pairs of images, summed over time steps and neurons: [T, B, ...] -> [1, B, B]."""
    x_BN = spikes.swapaxes(0, 1).reshape(spikes.shape[1], -1).astype(jnp.float32)
    on_B = x_BN.sum(1)
    return (on_B[:, None] + on_B - 2 * x_BN @ x_BN.T)[None]


def _hamming(net: Untrained) -> tuple[Array, Array]:
    """Distances of all pairs [B, B] over all neurons and time steps, and how many those are."""
    found = net.observed(_distances).values()
    neurons = sum(used * n for _, used, n in found) * net.spec.time_steps
    distance_BB = jnp.stack([used * record[0] for record, used, _ in found]).sum(0)
    return distance_BB, jnp.asarray(neurons, jnp.float32)


def hamming_distance(net: Untrained) -> Array:
    """Share of neurons and time steps at which two images' spikes differ, mean over pairs; no correction of rates."""
    distance_BB, neurons = _hamming(net)
    images = len(distance_BB)
    return distance_BB.sum() / (images * (images - 1) * neurons)


def naswot(net: Untrained) -> Array:
    """``log|det K|``, K = neurons less Hamming distance (Mellor et al., ICML 2021, equation 2)."""
    distance_BB, neurons = _hamming(net)
    return log_abs_det(neurons, 2 * distance_BB)


def spike_entropy(net: Untrained) -> Array:
    """Entropy in bits of a neuron's spike at a time step over the batch, mean over neurons and time steps.

    Of spiking neurons what Shannon entropy of activations is of others (Lin et al., "Zen-NAS", ICCV 2021, section 2).
    """

    def entropy(spikes: Array) -> Array:
        rate = spikes.astype(jnp.float32).mean(1)
        parts = [jnp.where(p > 0, p * jnp.log2(jnp.where(p > 0, p, 1)), 0) for p in (rate, 1 - rate)]
        return -(parts[0] + parts[1]).reshape(len(spikes), -1).sum(1)

    found = net.observed(entropy).values()
    neurons = sum(used * n for _, used, n in found) * net.spec.time_steps
    return jnp.stack([used * record.sum() for record, used, _ in found]).sum() / neurons


def _spikes_by_place(net: Untrained) -> dict[str, Array]:
    """Mean spikes of an image over time steps and channels by LIF site, [H, W] or of a head's neurons [1, 1]."""

    def counted(spikes: Array) -> Array:
        return spikes.sum(-1, dtype=jnp.float32).mean(1)

    records = net.run(net.params, net.images_BHWC, observe=counted).records
    return {name: jnp.atleast_2d(record.sum(0)) for name, record in records.items()}


def synaptic_operations(spec: NetworkSpec, row: Any, spikes: Mapping[str, Any]) -> float:
    """Synaptic operations of an image in the untrained network (`cost.synaptic_operations`)."""
    there = spec.sites(np.asarray(row))
    return cost.synaptic_operations(spec, row, {name: np.asarray(n) for name, n in spikes.items() if name in there})


def snip(net: Untrained) -> Array:
    """``sum |weight · gradient|`` (Lee et al., ICLR 2019; as a score: Abdelfattah et al., ICLR 2021)."""
    grads = jax.grad(net.loss)(net.params)
    return jnp.asarray(optax.tree.sum(jax.tree.map(lambda w, g: jnp.abs(w * g), net.params, grads)))


def gradient_norm(net: Untrained) -> Array:
    """Norm of the loss's gradient (Abdelfattah et al., ICLR 2021)."""
    return optax.tree.norm(jax.grad(net.loss)(net.params))


def jacobian_covariance(net: Untrained) -> Array:
    """``-sum(log v + 1/v)`` of the eigenvalues of the images' Jacobians' correlations (Mellor et al., 2020, v1)."""
    slopes = jax.grad(lambda x: net.run(net.params, x).logits_BK.sum())(net.images_BHWC)
    rows_BN = slopes.reshape(len(slopes), -1)
    rows_BN -= rows_BN.mean(1, keepdims=True)
    norms_B = jnp.linalg.norm(rows_BN, axis=1)
    scale_BB = norms_B[:, None] * norms_B
    correlations_BB = jnp.where(scale_BB > 0, rows_BN @ rows_BN.T / jnp.where(scale_BB > 0, scale_BB, 1), 0)
    values = jnp.linalg.eigvalsh(correlations_BB) + _JACOBIAN_FLOOR
    return -(jnp.log(jnp.abs(values)) + 1 / values).sum()


class _Linear(network.Pass):
    """A pass whose neurons hand on their currents, and whose norms do nothing."""

    def fire(self, site: str, x_TBN: Array, neuron: NeuronSpec | None = None) -> Array:
        return x_TBN

    def normed(self, name: str, x_TBHWC: Array) -> tuple[Array, Any]:
        return x_TBHWC, None


def synflow(net: Untrained) -> Array:
    """``log sum |weight| · dR/d|weight|`` of the network of absolute weights, without neurons and norms, of ones.

    R is the sum of its outputs (Tanaka et al., NeurIPS 2020; as a score: Abdelfattah et al., ICLR 2021).
    """
    sizes = jax.tree.map(jnp.abs, net.params)

    def flow(params: network.Params) -> Array:
        linear = _Linear(net.spec, net.genotype, params, None, {}, train=True, observe=None)
        x0_BHWC = linear.stem(jnp.ones((1, *net.spec.image_shape)))
        return linear.run(x0_BHWC, 1, None).sum()

    grads = jax.grad(flow)(sizes)
    return jnp.log(optax.tree.vdot(sizes, grads))


class _Features(network.Pass):
    """A pass that keeps the currents of the last LIF layer."""

    currents: Array

    def fire(self, site: str, x_TBN: Array, neuron: NeuronSpec | None = None) -> Array:
        if site == "last":
            self.currents = x_TBN
        return super().fire(site, x_TBN, neuron)


def zen(net: Untrained) -> Array:
    """How far the last layer's currents move with noise in the image, less what norms take from it.

    ``log |f(x) - f(x + 0.01 e)| + sum log sd`` of Gaussian images x and e, the sum over the norms of layers in use (Lin
    et al., "Zen-NAS", ICCV 2021, equation 7). -inf where no current moves.
    """
    spec, shape = net.spec, net.images_BHWC.shape
    x, e = (jax.random.normal(key, shape) for key in jax.random.split(net.key))
    blank = {name: jax.tree.map(jnp.zeros_like, own) for name, own in _running(spec).items()}

    def features(images: Array, stats: network.Stats | None) -> tuple[Array, Any]:
        net_pass = _Features(spec, net.genotype, net.params, stats, {}, train=True, observe=None)
        net_pass.run(net_pass.stem(images), spec.time_steps, None)
        return net_pass.currents, net_pass.stats

    (still, stats), (moved, _) = features(x, blank), features(x + _ZEN_STEP * e, None)
    used = spec.in_use(net.genotype)
    logs = jnp.float32(0)
    for name, own in stats.items():
        updates = 1 if name == "stem" or spec.norm == "over_time" else spec.time_steps
        variance = own["var"].mean() / (1 - (1 - BN_MOMENTUM) ** updates)
        logs += jnp.where(used.get(name, True), 0.5 * jnp.log(jnp.where(variance > 0, variance, 1)), 0)
    return jnp.log(jnp.linalg.norm((still - moved).reshape(-1)) / math.sqrt(len(x))) + logs


def _running(spec: NetworkSpec) -> Any:
    """Shapes of every layer's running statistics."""
    return jax.eval_shape(lambda: network.init(jax.random.key(0), spec)[1])


def linear_probe(net: Untrained) -> Array:
    """Accuracy of a ridge regression on the last layer's firing rates, of the batch's second half from its first.

    Random features and a trained read-out (Alain & Bengio, 2017: linear classifier probes).
    """
    last = net.run(net.params, net.images_BHWC, observe=_rates).records["last"]
    x_BF = last.mean(0)
    half, classes = len(x_BF) // 2, net.spec.num_classes
    mean_F = x_BF[:half].mean(0)
    deviation_F = x_BF[:half].std(0) + 1e-3
    a_BF = jnp.concatenate([(x_BF - mean_F) / deviation_F, jnp.ones((len(x_BF), 1))], 1)
    targets_BK = jax.nn.one_hot(net.labels_B, classes)
    gram = a_BF[:half].T @ a_BF[:half] + _RIDGE * jnp.eye(a_BF.shape[1])
    weights = jnp.linalg.solve(gram, a_BF[:half].T @ targets_BK[:half])
    return ((a_BF[half:] @ weights).argmax(-1) == net.labels_B[half:]).mean()


def _rates(spikes: Array) -> Array:
    """Mean over places, [T, B, C]; of a head's neurons themselves."""
    x = spikes.astype(jnp.float32)
    return x.mean((2, 3)) if x.ndim == 5 else x


PROXIES: dict[str, Proxy] = {
    "hamming": hamming_distance,
    "naswot": naswot,
    "spike_entropy": spike_entropy,
    "synops": _spikes_by_place,
    "snip": snip,
    "gradient_norm": gradient_norm,
    "jacobian_covariance": jacobian_covariance,
    "synflow": synflow,
    "zen": zen,
    "linear_probe": linear_probe,
}
FINISHED: dict[str, Callable[[NetworkSpec, Any, Any], float]] = {"synops": synaptic_operations}
"""What makes a number of a proxy's result and the fixed cell, of those that are not one yet."""
