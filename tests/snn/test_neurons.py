"""Neurons against method's formulas in NumPy, against hand-written backward passes, and against spyx."""

import dataclasses
import inspect
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spyx
from flax import nnx
from numpy.typing import DTypeLike

from spikernel_jax.operations import convolution, pooling
from spikernel_jax.snn.neurons import NEURONS, SURROGATES, NeuronSpec, run, spike, step, surrogate_derivative

T, N = 6, 40
SPECS = [
    NeuronSpec(),
    NeuronSpec(tau=2.0, v_threshold=0.75),
    NeuronSpec(tau=5.0, v_reset=-0.5),
    NeuronSpec(tau=1.1, v_reset=0.25, v_threshold=0.5),
    NeuronSpec(reset="soft"),
    NeuronSpec(tau=3.0, v_reset=0.125, reset="soft"),
    NeuronSpec(tau=2.0, v_threshold=0.375, reset="soft", max_spikes=3),
]
ALL = [
    NeuronSpec(model=model, reset="soft" if model == "spyx_lif" else "hard", surrogate=surrogate)
    for model, surrogate in itertools.product(NEURONS, SURROGATES)
]
ALL += [NeuronSpec(tau=3.0, learn_tau=True), NeuronSpec(reset="soft", learn_tau=True, learn_threshold=True)]
ALL += [dataclasses.replace(SPECS[-1], surrogate=surrogate) for surrogate in SURROGATES]
of_spec = pytest.mark.parametrize("spec", SPECS, ids=str)
contract = pytest.mark.parametrize(
    "spec", ALL, ids=["-".join([s.model, s.surrogate, str(s.max_spikes), *s.learned]) for s in ALL]
)
run_jit = jax.jit(run, static_argnums=0)
step_jit = jax.jit(step, static_argnums=0)


def inputs(seed=0, shape: tuple[int, ...] = (T, N), dtype: DTypeLike = np.float64):
    return np.random.default_rng(seed).normal(0.8, 1.2, shape).astype(dtype)


def at_start(spec, dtype: type = np.float32):
    """What a layer has learned before it has learned anything."""
    return {name: jnp.asarray(value, dtype) for name, value in spec.learned.items()}


def oracle(spec, v, x_TN):
    """Method's three lines, in the dtype of x; potentials before the reset as well."""
    real = x_TN.dtype.type
    tau, threshold, reset = real(spec.tau), real(spec.v_threshold), real(spec.v_reset)
    before, spikes = [], []
    for x in x_TN:
        v = v + (x - (v - reset)) / tau
        s = np.clip(np.floor(v / threshold), 0, spec.max_spikes)
        before.append(v)
        spikes.append(s)
        v = (1 - s) * v + s * reset if spec.reset == "hard" else v - s * threshold
    return v, np.stack(spikes), np.stack(before)


def derivative(spec, u):
    """The published surrogates, at their customary slopes."""
    alpha = {"atan": 2.0, "sigmoid": 4.0, "triangle": 1.0, "straight_through": 1.0}[spec.surrogate]
    alpha = spec.surrogate_scale or alpha
    if spec.surrogate == "atan":
        return (alpha / 2) / (1 + (math.pi / 2 * alpha * u) ** 2)
    if spec.surrogate == "sigmoid":
        s = 1 / (1 + np.exp(-alpha * u))
        return alpha * s * (1 - s)
    if spec.surrogate == "triangle":
        return alpha * np.maximum(0, 1 - alpha * np.abs(u))
    return np.full_like(u, alpha)


def of_each_spike(spec, v):
    """How each spike of a step follows from v, at its own multiple of the threshold, [max_spikes, N]."""
    return np.stack([derivative(spec, v - n * spec.v_threshold) for n in range(1, spec.max_spikes + 1)])


@of_spec
def test_float64_equals_the_formulas(spec):
    x = inputs()
    v0 = inputs(1, (N,)) / 4
    with jax.enable_x64(True):
        v, spikes = run_jit(spec, jnp.asarray(v0), jnp.asarray(x))
    v_expected, expected, _ = oracle(spec, v0, x)
    assert 0 < expected.mean() < 1
    np.testing.assert_array_equal(spikes, expected)
    np.testing.assert_allclose(v, v_expected, rtol=1e-13, atol=1e-14)


@of_spec
def test_float32_equals_the_formulas(spec):
    x = inputs(2, dtype=np.float32)
    v, spikes = run_jit(spec, jnp.zeros(N), jnp.asarray(x))
    v_expected, expected, before = oracle(spec, np.zeros(N, np.float32), x)
    levels = spec.v_threshold * np.arange(1, spec.max_spikes + 1)
    assert np.abs(before[..., None] - levels).min() > 1e-6  # these inputs leave no doubt
    np.testing.assert_array_equal(spikes, expected)
    np.testing.assert_allclose(v, v_expected, rtol=1e-5, atol=1e-6)


@of_spec
@pytest.mark.parametrize("jitted", [False, True])
def test_layer_by_layer_equals_step_by_step_to_the_bit(spec, jitted):
    x = inputs(3, dtype=np.float32)
    x[:, :4] = spec.v_threshold
    x[0, 4:8] = spec.v_reset + (spec.v_threshold - spec.v_reset) * spec.tau  # reaches it in one step
    ours = run_jit if jitted else run
    # A single step needs jit: op by op, a division by tau is not the product the compiler makes of it.
    v_whole, spikes_whole = ours(spec, jnp.zeros(N), jnp.asarray(x))
    v = w = jnp.zeros(N)
    for t in range(T):
        v, spikes = ours(spec, v, jnp.asarray(x[t : t + 1]))
        w, stepped = step_jit(spec, w, jnp.asarray(x[t]))
        np.testing.assert_array_equal(spikes[0], spikes_whole[t])
        np.testing.assert_array_equal(stepped, spikes_whole[t])
    np.testing.assert_array_equal(v, v_whole)
    np.testing.assert_array_equal(w, v_whole)


def test_fires_exactly_at_the_threshold():
    spec = NeuronSpec(tau=2.0)
    # tau 2 and eighths are exact in binary: v = 0.25, 0.5, 1 (fires, back to 0), 0.5, 1 (fires).
    _, spikes = run(spec, jnp.zeros(1), jnp.array([[0.5], [0.75], [1.5], [1.0], [1.5]]))
    assert spikes[:, 0].tolist() == [0, 0, 1, 0, 1]
    assert spike(spec, jnp.array([0.0, -1e-6, 1e-6])).tolist() == [1, 0, 1]
    assert spike(spec, jnp.array([0.0, 1e-6]), at_threshold=False).tolist() == [0, 1]


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("scale", [None, 0.7, 3.0])
def test_surrogate_formulas(surrogate, scale):
    spec = NeuronSpec(surrogate=surrogate, surrogate_scale=scale)
    u = np.linspace(-3, 3, 61)
    with jax.enable_x64(True):
        ours = jax.jit(surrogate_derivative, static_argnums=0)(spec, jnp.asarray(u))
        slope = jax.jit(jax.grad(lambda u: spike(spec, u).sum()))(jnp.asarray(u))
    np.testing.assert_allclose(ours, derivative(spec, u), rtol=1e-10)
    np.testing.assert_allclose(slope, ours, rtol=1e-12)
    if surrogate == "atan" and scale is None:
        np.testing.assert_allclose(ours, 1 / (1 + (math.pi * u) ** 2), rtol=1e-12)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("spec", [SPECS[i] for i in (2, 5, 6)], ids=["hard", "soft", "several"])
def test_gradients_equal_a_backward_pass_by_hand(spec, surrogate):
    spec = dataclasses.replace(spec, surrogate=surrogate)
    x, v0, weight, weight_v = inputs(4), inputs(5, (N,)) / 4, inputs(6), inputs(7, (N,))

    def loss(v0, x):
        v, spikes = run(spec, v0, x)
        return (spikes * weight).sum() + (v * weight_v).sum()

    with jax.enable_x64(True):
        grad_v, grad_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.asarray(v0), jnp.asarray(x))
    _, spikes, before = oracle(spec, v0, x)
    g, expected_x = weight_v, np.zeros_like(x)  # g: d loss / d v after the reset
    for t in reversed(range(T)):
        g = g * (1 - spikes[t]) if spec.reset == "hard" else g  # the reset is detached
        g = g + weight[t] * of_each_spike(spec, before[t]).sum(0)
        expected_x[t] = g / spec.tau
        g = g * (1 - 1 / spec.tau)
    np.testing.assert_allclose(grad_x, expected_x, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(grad_v, g, rtol=1e-10, atol=1e-12)


def away_from_start(spec):
    """A layer that has learned both its scalars; a fixed neuron with tau and threshold as they then are."""
    learning = dataclasses.replace(spec, learn_tau=True, learn_threshold=True)
    leak, growth = 0.4, -0.3
    floor = max(spec.v_reset, 0.0)
    threshold = floor + (spec.v_threshold - floor) * math.log2(1 + math.exp(growth))
    learned = {"leak_logit": np.float64(leak), "threshold_raw": np.float64(growth)}
    assert learned.keys() == learning.learned.keys()
    return learning, learned, dataclasses.replace(spec, tau=1 + math.exp(-leak), v_threshold=threshold)


@of_spec
def test_learned_scalars_are_time_constant_and_threshold(spec):
    learning, learned, same = away_from_start(spec)
    x, v0 = inputs(), inputs(1, (N,)) / 4
    with jax.enable_x64(True):
        v, spikes = run_jit(learning, jnp.asarray(v0), jnp.asarray(x), learned)
    v_expected, expected, _ = oracle(same, v0, x)
    assert (expected != oracle(spec, v0, x)[1]).any()
    np.testing.assert_array_equal(spikes, expected)
    np.testing.assert_allclose(v, v_expected, rtol=1e-12, atol=1e-13)


@of_spec
def test_learning_starts_from_the_spec(spec):
    learning = dataclasses.replace(spec, learn_tau=True, learn_threshold=True)
    x, v0 = inputs(), inputs(1, (N,)) / 4
    with jax.enable_x64(True):
        v, spikes = run_jit(learning, jnp.asarray(v0), jnp.asarray(x), at_start(learning, np.float64))
    v_expected, expected, _ = oracle(spec, v0, x)
    np.testing.assert_array_equal(spikes, expected)
    np.testing.assert_allclose(v, v_expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("spec", SPECS[3:6], ids=str)
def test_thresholds_stay_above_zero_and_reset_whatever_is_learned(spec):
    learning = away_from_start(spec)[0]
    low = {"leak_logit": jnp.float32(-50), "threshold_raw": jnp.float32(-8)}  # next to no leak: v stays where it is
    v0 = jnp.array([max(spec.v_reset, 0.0), spec.v_threshold])
    _, spikes = run(learning, v0, v0[None], low)
    assert spikes[0].tolist() == [0, 1]
    for w in (-1e4, 1e4):  # one large gradient away: no NaN and no way of no return
        extreme = {name: jnp.float32(w) for name in low}
        v, slopes = jax.value_and_grad(lambda learned: run(learning, v0, v0[None], learned)[0].sum())(extreme)
        assert np.isfinite([v, *slopes.values()]).all()


@pytest.mark.parametrize("surrogate", ["atan", "triangle"])
@pytest.mark.parametrize("spec", [SPECS[i] for i in (2, 3, 5, 6)], ids=["below", "hard", "soft", "several"])
def test_gradients_of_learned_scalars_equal_a_backward_pass_by_hand(spec, surrogate):
    learning, learned, same = away_from_start(dataclasses.replace(spec, surrogate=surrogate))
    x, v0, weight, weight_v = inputs(4), inputs(5, (N,)) / 4, inputs(6), inputs(7, (N,))

    def loss(learned):
        v, spikes = run(learning, jnp.asarray(v0), jnp.asarray(x), learned)
        return (spikes * weight).sum() + (v * weight_v).sum()

    with jax.enable_x64(True):
        grads = jax.jit(jax.grad(loss))(learned)
    _, spikes, before = oracle(same, v0, x)
    after = (
        before * (1 - spikes) + spikes * same.v_reset if spec.reset == "hard" else before - spikes * same.v_threshold
    )
    rate, by_rate, by_threshold, g = 1 / same.tau, 0.0, 0.0, weight_v  # g: d loss / d v after the reset
    for t in reversed(range(T)):
        if spec.reset == "hard":
            g = g * (1 - spikes[t])
        else:
            by_threshold -= (g * spikes[t]).sum()  # what is subtracted is the threshold; whether, is detached
        slope_n = weight[t] * of_each_spike(same, before[t])
        by_threshold -= (np.arange(1, same.max_spikes + 1) @ slope_n).sum()
        g = g + slope_n.sum(0)
        by_rate += (g * (x[t] - ((after[t - 1] if t else v0) - spec.v_reset))).sum()
        g = g * (1 - rate)
    floor = max(spec.v_reset, 0.0)
    slope = (spec.v_threshold - floor) / (1 + np.exp(-learned["threshold_raw"])) / math.log(2)
    np.testing.assert_allclose(grads["leak_logit"], by_rate * rate * (1 - rate), rtol=1e-9)
    np.testing.assert_allclose(grads["threshold_raw"], by_threshold * slope, rtol=1e-9)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_spyx_parity(surrogate):
    spec = NeuronSpec(model="spyx_lif", reset="soft", tau=4.0, v_threshold=1.0, surrogate=surrogate)
    theirs = spyx.nn.LIF((N,), 0.75, 1.0, spyx.axn.custom(lambda u: surrogate_derivative(spec, u)), rngs=nnx.Rngs(0))
    x = np.round(inputs(8, (T, 3, N), np.float32) * 16) / 16  # exact in binary, in whatever order it is added
    x[0, 0] = 1.0  # v is exactly at the threshold: spyx does not fire there
    x[1, 0] = 0.0

    def looped(x):
        v, out = theirs.initial_state(3), []
        for t in range(T):
            spikes, v = theirs(x[t], v)
            out.append(spikes)
        return v, jnp.stack(out)

    v, spikes = run_jit(spec, jnp.zeros((3, N)), jnp.asarray(x))
    v_expected, expected = jax.jit(looped)(jnp.asarray(x))
    np.testing.assert_array_equal(spikes, expected)
    np.testing.assert_array_equal(v, v_expected)
    assert spikes.any()
    assert not spikes[:2, 0].any()
    grad_ours = jax.jit(jax.grad(lambda x: run(spec, jnp.zeros((3, N)), x)[1].sum()))(jnp.asarray(x))
    grad_theirs = jax.jit(jax.grad(lambda x: looped(x)[1].sum()))(jnp.asarray(x))
    np.testing.assert_allclose(grad_ours, grad_theirs, rtol=1e-6, atol=1e-7)


def test_spyx_fires_one_step_late():
    spec = NeuronSpec(model="spyx_lif", reset="soft", tau=4.0)
    _, spikes = run(spec, jnp.zeros(1), jnp.array([[3.0], [0.0], [0.0], [0.0]]))
    assert spikes[:, 0].tolist() == [0, 1, 1, 0]  # v = 3; 2.25 - 1; .9375 - 1


def test_several_spikes_of_a_step_are_spikes_one_after_another():
    spec = NeuronSpec(tau=2.0, v_threshold=0.375, reset="soft", max_spikes=4)
    x = inputs(11, (T, 2, 6, 6, 3), np.float32) * 2
    v, spikes = run(spec, jnp.zeros(x.shape[1:]), jnp.asarray(x))
    one_by_one, w = [], np.zeros(x.shape[1:], np.float32)
    for current in x:  # takes its input in once, then fires at most four times
        w = w + (current - w) / np.float32(2.0)
        for _ in range(4):
            fired = (w >= np.float32(0.375)).astype(np.float32)
            w = w - fired * np.float32(0.375)
            one_by_one.append(fired)
    each = jnp.asarray(one_by_one).reshape(T, 4, *x.shape[1:])
    np.testing.assert_array_equal(each.sum(1), spikes)
    np.testing.assert_allclose(v, w, atol=1e-5)
    assert (spikes == 4).any()
    # What reads a number reads the sum of what the single spikes give: convolutions, and both kinds of pooling.
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 3, 5))
    for read in (lambda s: convolution.conv(s, kernel), pooling.average_pool, pooling.max_pool):
        whole = read(spikes[0])
        assert np.any(whole)
        np.testing.assert_allclose(sum(read(one) for one in each[0]), whole, rtol=1e-5, atol=1e-5)


@contract
def test_contract(spec):
    x = jnp.asarray(inputs(9, (T, 2, 3, N), np.float32))
    v0 = jnp.zeros(x.shape[1:])
    learned = at_start(spec)

    @jax.jit
    def everything(x, learned):
        def ours(v0, x):
            return run(spec, v0, x, learned)

        def stepped(x):
            v, out = v0, []
            for current in x:
                v, spikes = step(spec, v, current, learned)
                out.append(spikes)
            return v, jnp.stack(out)

        # Neurons are independent: mapping over any axis is the same.
        mapped = jax.vmap(ours, in_axes=(0, 1), out_axes=(0, 1))
        grad = jax.grad(lambda x: ours(v0, x)[1].sum())
        slopes = jax.grad(lambda learned: run(spec, v0, x, learned)[1].sum())(learned)
        # Later inputs do not change earlier spikes; without input nothing fires.
        return ours(v0, x), mapped(v0, x), grad(x), ours(v0, x[:2])[1], ours(v0, 0 * x), stepped(x), slopes

    (v, spikes), (v_mapped, spikes_mapped), grad, shorter, silent, stepped, slopes = everything(x, learned)
    assert v.shape == x.shape[1:]
    assert grad.shape == spikes.shape == x.shape
    assert grad.dtype == v.dtype == spikes.dtype == jnp.float32
    assert set(np.unique(spikes)) == set(range(spec.max_spikes + 1))
    np.testing.assert_array_equal(spikes_mapped, spikes)
    np.testing.assert_array_equal(v_mapped, v)
    np.testing.assert_array_equal(shorter, spikes[:2])
    assert np.isfinite(grad).all()
    assert np.any(grad)
    assert not np.any(silent[0])
    assert not np.any(silent[1])
    np.testing.assert_array_equal(stepped[1], spikes)
    np.testing.assert_allclose(stepped[0], v, rtol=1e-6, atol=1e-6)
    assert slopes.keys() == spec.learned.keys()
    assert all(slope.shape == () and np.isfinite(slope) and slope != 0 for slope in slopes.values())
    assert all(name in inspect.signature(NEURONS[spec.model]).parameters for name in spec.learned)


@contract
def test_bfloat16_stays_bfloat16(spec):
    x = jnp.asarray(inputs(10, dtype=np.float32), jnp.bfloat16)
    v, spikes = run_jit(spec, jnp.zeros(N, jnp.bfloat16), x, at_start(spec))
    assert v.dtype == spikes.dtype == jnp.bfloat16
    assert set(np.unique(np.asarray(spikes, np.float32))) == set(range(spec.max_spikes + 1))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"model": "izhikevich"}, "model='izhikevich' is not a neuron model; known: lif, spyx_lif"),
        ({"surrogate": "arctan"}, "surrogate='arctan' is unknown; known: atan"),
        ({"reset": "zero"}, "reset='zero' is unknown; known: hard, soft"),
        ({"tau": 1.0}, "tau=1.0 must be finite and above 1"),
        ({"tau": float("inf")}, "tau=inf"),
        ({"tau": float("nan")}, "tau=nan"),
        ({"v_threshold": 0.0}, "v_threshold=0.0 must be finite and above 0"),
        ({"v_threshold": float("nan")}, "v_threshold=nan"),
        ({"v_reset": 1.0}, "v_reset=1.0 must be finite.* below v_threshold=1.0"),
        ({"v_reset": float("-inf")}, "v_reset=-inf"),
        ({"surrogate_scale": 0.0}, "surrogate_scale=0.0 must be finite and above 0"),
        ({"surrogate_scale": float("inf")}, "surrogate_scale=inf"),
        ({"model": "spyx_lif"}, "the spyx_lif model has a soft reset only"),
        ({"model": "spyx_lif", "reset": "soft", "v_reset": 0.5}, "v_reset=0.5: the spyx_lif model"),
        ({"max_spikes": 0, "reset": "soft"}, "max_spikes=0 must be a whole number of at least 1, and at most 16"),
        ({"max_spikes": 17, "reset": "soft"}, "max_spikes=17 must be a whole number of at least 1, and at most 16"),
        ({"max_spikes": 2.5, "reset": "soft"}, "max_spikes=2.5 must be a whole number"),
        ({"max_spikes": 2}, "max_spikes=2, model='lif', reset='hard': .*reset='soft' only"),
        ({"max_spikes": 2, "model": "spyx_lif", "reset": "soft"}, "max_spikes=2, model='spyx_lif'"),
        ({"learn_tau": "yes"}, "learn_tau='yes' must be True or False"),
        ({"learn_threshold": 1}, "learn_threshold=1 must be True or False"),
        (
            {"model": "spyx_lif", "reset": "soft", "learn_tau": True},
            "learn_tau=True: the spyx_lif model learns no tau; give learn_tau=False, or model='lif'",
        ),
        (
            {"model": "spyx_lif", "reset": "soft", "learn_threshold": True},
            "the spyx_lif model learns no v_threshold; give learn_threshold=False, or model='lif'",
        ),
    ],
)
def test_refuses(fields, match):
    with pytest.raises(ValueError, match=match):
        NeuronSpec(**fields)


def test_specs_are_static():
    assert hash(NeuronSpec(tau=2.0)) == hash(NeuronSpec(tau=2.0))
    assert NeuronSpec(tau=2.0) == NeuronSpec(tau=2.0) != NeuronSpec()
