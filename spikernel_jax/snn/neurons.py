"""Spiking neurons: leaky integrate-and-fire dynamics over time, and surrogate gradients.

A neuron model is a pure step ``(v_N, x_N) -> (v_N, spikes_N)``. `run` scans it over the leading
time axis, so that the same arithmetic serves layer-by-layer use (all time steps of one layer at
once) and step-by-step use (``T = 1`` calls that carry the membrane potential along).

What a layer of neurons learns, a few scalars, comes to its step by name, so a step of a model that learns
nothing takes none.

A neuron may fire more than once within a time step (`NeuronSpec.max_spikes`): the number of its spikes is then what is
computed with, and on a device they come one after another: each is subtracted, and what is left may fire again. What
reads them is linear, or a pooling, so that the sum over the spikes and the spikes of the sum are the same.

Sources: Kim et al., ECCV 2022 (SNASNet), for the LIF; Fang et al., ICCV 2021, for the ATan surrogate and the
learned time constant (PLIF); Luo et al., ECCV 2024 (I-LIF), for several spikes a time step; Heckel et al., spyx, for
the second model.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import spyx
from flax import nnx
from jax import lax

from spikernel_jax.io.checks import require_known, whole

Array = jax.Array
Learned = Mapping[str, Array]  # a layer's learned scalars, by the names of `NeuronSpec.learned`
Step = Callable[..., tuple[Array, Array]]  # (spec, v_N, x_N, **learned) -> (v_N, spikes_N)

_SURROGATES: dict[str, tuple[float, Callable[[Array, float], Array]]] = {
    # name: (default scale alpha, derivative of the spike with respect to u = v - v_threshold)
    "atan": (2.0, lambda u, alpha: (alpha / 2) / (1 + (math.pi / 2 * alpha * u) ** 2)),
    "sigmoid": (4.0, lambda u, alpha: alpha * jax.nn.sigmoid(alpha * u) * jax.nn.sigmoid(-alpha * u)),
    "triangle": (1.0, lambda u, alpha: alpha * jnp.maximum(0.0, 1 - alpha * jnp.abs(u))),
    "straight_through": (1.0, lambda u, alpha: jnp.full_like(u, alpha)),
}
SURROGATES = tuple(_SURROGATES)
_RESETS = ("hard", "soft")
_MOST_SPIKES = 16  # of a time step: bfloat16 holds these numbers exactly, and sums of as many surrogates stay cheap


@dataclasses.dataclass(frozen=True)
class NeuronSpec:
    """What a layer's neurons are; hashable, so static under ``jit``.

    Attributes:
      model: a name in `NEURONS`: ``"lif"`` (method of SNASNet) or ``"spyx_lif"`` (``spyx.nn.LIF``).
      tau: membrane time constant in time steps, > 1; the spyx model decays by ``beta = 1 - 1/tau``.
      v_threshold: firing threshold.
      v_reset: potential after a spike (hard reset only); below the threshold.
      reset: ``"hard"`` sets v to `v_reset`, ``"soft"`` subtracts the threshold.
      surrogate: a name in `SURROGATES`.
      surrogate_scale: its slope alpha; None takes the surrogate's customary one.
      max_spikes: how often a neuron fires in a time step at most; above 1 with a soft reset, of the lif model, only.
      learn_tau: whether each layer learns its time constant, from `tau` on (PLIF); the lif model only.
      learn_threshold: whether each layer learns its threshold, from `v_threshold` on; the lif model only.

    Raises:
      ValueError: naming the field, its value, and what would be right.

    Example:
      >>> from spikernel_jax import NeuronSpec
      >>> NeuronSpec(tau=2.0, v_threshold=0.5).surrogate
      'atan'
      >>> NeuronSpec(tau=0.5)
      Traceback (most recent call last):
          ...
      ValueError: tau=0.5 must be finite and above 1 time step
    """

    model: str = "lif"
    tau: float = 4 / 3
    v_threshold: float = 1.0
    v_reset: float = 0.0
    reset: str = "hard"
    surrogate: str = "atan"
    surrogate_scale: float | None = None
    max_spikes: int = 1
    learn_tau: bool = False
    learn_threshold: bool = False

    def __post_init__(self) -> None:
        """Refuses what no neuron can be."""
        if self.model not in NEURONS:
            raise ValueError(f"model={self.model!r} is not a neuron model; known: {', '.join(NEURONS)}")
        require_known(self, surrogate=SURROGATES, reset=_RESETS)
        if not (math.isfinite(self.tau) and self.tau > 1):
            raise ValueError(f"tau={self.tau} must be finite and above 1 time step")
        if not (math.isfinite(self.v_threshold) and self.v_threshold > 0):
            raise ValueError(f"v_threshold={self.v_threshold} must be finite and above 0")
        if not (math.isfinite(self.v_reset) and self.v_reset < self.v_threshold):
            raise ValueError(f"v_reset={self.v_reset} must be finite, below v_threshold={self.v_threshold}")
        if self.surrogate_scale is not None and not (math.isfinite(self.surrogate_scale) and self.surrogate_scale > 0):
            raise ValueError(f"surrogate_scale={self.surrogate_scale} must be finite and above 0, or None")
        if self.model == "spyx_lif" and (self.v_reset != 0.0 or self.reset != "soft"):
            raise ValueError(
                f"reset={self.reset!r}, v_reset={self.v_reset}: the spyx_lif model has a soft reset only; "
                "give reset='soft' and v_reset=0"
            )
        whole("max_spikes", self.max_spikes, 1, _MOST_SPIKES)
        if self.max_spikes > 1 and (self.model != "lif" or self.reset != "soft"):
            raise ValueError(
                f"max_spikes={self.max_spikes}, model={self.model!r}, reset={self.reset!r}: what is left above a "
                "threshold fires again with model='lif' and reset='soft' only"
            )
        for name, start in (("learn_tau", "tau"), ("learn_threshold", "v_threshold")):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name}={value!r} must be True or False")
            if value and self.model != "lif":
                raise ValueError(
                    f"{name}={value}: the {self.model} model learns no {start}; give {name}=False, or model='lif'"
                )

    @property
    def learned(self) -> dict[str, float]:
        """What each layer learns, by name, and where it starts; empty unless the spec says so.

        `leak_logit` is w in ``1/tau = sigmoid(w)``, which keeps tau above 1. `threshold_raw` is w in
        ``v_threshold = floor + (start - floor) softplus(w) / log 2``, start being the spec's threshold and floor the
        larger of `v_reset` and 0, which keeps the threshold above both; exp would overflow after one large gradient.
        """
        starts = {}
        if self.learn_tau:
            starts["leak_logit"] = -math.log(self.tau - 1)
        if self.learn_threshold:
            starts["threshold_raw"] = 0.0
        return starts


def constants(spec: NeuronSpec, learned: Mapping[str, Any]) -> tuple[float, float]:
    """Leak 1/tau and threshold of a layer of the lif model with these learned scalars, those that it has.

    Raises:
      ValueError: of another model.
    """
    if spec.model != "lif":
        raise ValueError(f"model={spec.model!r}: want 'lif'")
    leak, threshold = 1 / spec.tau, spec.v_threshold
    if "leak_logit" in learned:
        leak = 1 / (1 + math.exp(-float(learned["leak_logit"])))
    if "threshold_raw" in learned:
        floor = max(spec.v_reset, 0.0)
        threshold = floor + (threshold - floor) * math.log1p(math.exp(float(learned["threshold_raw"]))) / math.log(2)
    return leak, threshold


def surrogate_derivative(spec: NeuronSpec, u: Array) -> Array:
    """The derivative that stands in for H'(u), u = v - v_threshold, elementwise, dtype of `u`."""
    default, derivative = _SURROGATES[spec.surrogate]
    return derivative(u, spec.surrogate_scale or default)


def spike(spec: NeuronSpec, u: Array, *, at_threshold: bool = True) -> Array:
    """Heaviside step of ``u = v - v_threshold`` with the spec's surrogate gradient.

    Args:
      spec: the neuron.
      u: distance to the threshold, any shape.
      at_threshold: whether H(0) is 1 (SNASNet) or 0 (spyx).

    Returns:
      0 or 1, shape and dtype of `u`.
    """
    compare = jnp.greater_equal if at_threshold else jnp.greater
    activation = spyx.axn.custom(
        bwd=lambda u: surrogate_derivative(spec, u), fwd=lambda u: compare(u, 0).astype(u.dtype)
    )
    return activation(u)


def _lif_step(
    spec: NeuronSpec, v_N: Array, x_N: Array, *, leak_logit: Array | None = None, threshold_raw: Array | None = None
) -> tuple[Array, Array]:
    drive_N = x_N - (v_N - spec.v_reset)
    leaked_N = drive_N / spec.tau if leak_logit is None else drive_N * jax.nn.sigmoid(leak_logit).astype(x_N.dtype)
    v_N = v_N + leaked_N
    threshold: Any = spec.v_threshold
    if threshold_raw is not None:
        floor = max(spec.v_reset, 0.0)
        threshold = (floor + (spec.v_threshold - floor) * jax.nn.softplus(threshold_raw) / math.log(2)).astype(
            v_N.dtype
        )
    above = [spike(spec, v_N - n * threshold) for n in range(1, spec.max_spikes + 1)]
    spikes_N = functools.reduce(operator.add, above)
    fired_N = lax.stop_gradient(spikes_N)  # detached reset: no gradient through s here
    if spec.reset == "hard":
        return jnp.where(fired_N > 0, jnp.asarray(spec.v_reset, v_N.dtype), v_N), spikes_N
    return v_N - fired_N * threshold, spikes_N


def _spyx_lif_step(spec: NeuronSpec, v_N: Array, x_N: Array) -> tuple[Array, Array]:
    neuron = spyx.nn.LIF(
        hidden_shape=(1,),
        beta=1 - 1 / spec.tau,
        threshold=spec.v_threshold,
        activation=lambda u: spike(spec, u, at_threshold=False),
        rngs=nnx.Rngs(0),
    )
    spikes_N, v_N = neuron(x_N, v_N)
    return v_N.astype(x_N.dtype), spikes_N


NEURONS: dict[str, Step] = {"lif": _lif_step, "spyx_lif": _spyx_lif_step}


# Compiled even when called alone: op by op, rounding would differ from that of a fused layer.
@functools.partial(jax.jit, static_argnames=("spec",))
def step(spec: NeuronSpec, v_N: Array, x_N: Array, learned: Learned | None = None) -> tuple[Array, Array]:
    """One time step.

    Args:
      spec: the neuron.
      v_N: membrane potential, any shape.
      x_N: input current, same shape.
      learned: the layer's scalars, each of shape []; None, or one that is missing, is as the spec says.

    Returns:
      The potential after the step, and the spikes (0 or 1, or up to `max_spikes`), both of the same shape.
    """
    return NEURONS[spec.model](spec, v_N, x_N, **(learned or {}))


@functools.partial(jax.jit, static_argnames=("spec",))
def run(spec: NeuronSpec, v_N: Array, x_TN: Array, learned: Learned | None = None) -> tuple[Array, Array]:
    """All time steps of one layer.

    Args:
      spec: the neuron.
      v_N: membrane potential before the first step; zeros for a new image.
      x_TN: input currents, time-major.
      learned: the layer's scalars, as in `step`; the same at all time steps.

    Returns:
      The potential after the last step, and spikes_TN.
    """
    # T is small, and unrolled steps fuse into one pass over memory.
    return lax.scan(lambda v, x: step(spec, v, x, learned), v_N, x_TN, unroll=min(x_TN.shape[0], 8))
