"""SAHD against its formulas in NumPy float64, and where float32 is hard."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from convolutions import conv_edges
from spikernel_jax.cells.space import CellSpace
from spikernel_jax.scoring import scores as scoring
from spikernel_jax.snn import network
from spikernel_jax.snn.neurons import NeuronSpec
from spikernel_jax.snn.spec import NetworkSpec, Site

FORMS = ("sahd_paper", "sahd_code")


def rho_oracle(x_BN):
    """One LIF call, image pair by image pair."""
    b, n = x_BN.shape
    rate, rho = x_BN.mean(1), np.zeros((b, b))
    for i in range(b):
        for j in range(b):
            hd = np.count_nonzero(x_BN[i] != x_BN[j])
            expected = n * (rate[i] * (1 - rate[j]) + (1 - rate[i]) * rate[j])
            rho[i, j] = hd / (expected + 1e-3)
    return rho


def kernel_oracle(form, spikes, calls):
    """K over the number of LIF calls: spikes [T, B, ...] and how many LIFs share them, by site."""
    total, count = np.zeros((1, 1)), 0
    for site, x in spikes.items():
        for step in x:
            x_BN = np.asarray(step).reshape(len(step), -1)
            n, rho = x_BN.shape[1], rho_oracle(x_BN)
            total = total + calls[site] * (n * (1 - 0.5 * rho) if form == "sahd_paper" else n - 0.5 * rho)
            count += calls[site]
    return total / count


@jax.jit
def scores(spikes, calls):
    """Both forms by the package."""
    records = {site: scoring.normalised_hamming(x) for site, x in spikes.items()}
    sites = {site: Site(int(np.prod(x.shape[2:])), calls[site], NeuronSpec()) for site, x in spikes.items()}
    terms = scoring.collect(records, sites)
    return {form: scoring.get_score(form)(terms) for form in FORMS}


def random_spikes(seed=0, t=2, b=7):
    """Two sites; image 0 is silent in both, image 1 fires everywhere."""
    rng = np.random.default_rng(seed)
    spikes = {}
    for site, shape in (("a", (5, 4, 3)), ("b", (11,))):
        rate = rng.uniform(0.1, 0.6, (t, b, *[1] * len(shape)))
        spikes[site] = (rng.random((t, b, *shape)) < rate).astype(np.float64)
        spikes[site][:, 0], spikes[site][:, 1] = 0, 1
    return spikes


@pytest.mark.parametrize("form", FORMS)
def test_equals_the_formulas(form):
    spikes, calls = random_spikes(), {"a": 3, "b": 1}
    with jax.enable_x64(True):
        ours = scores(spikes, calls)[form]
    expected = np.linalg.slogdet(kernel_oracle(form, spikes, calls))[1]
    np.testing.assert_allclose(ours, expected, rtol=1e-9)
    single = {site: np.float32(x) for site, x in spikes.items()}
    np.testing.assert_allclose(scores(single, calls)[form], expected, rtol=1e-4)


def test_terms_count_calls():
    spikes = random_spikes()
    sites = {"a": Site(60, 3, NeuronSpec()), "b": Site(11, 1, NeuronSpec())}
    rho = {k: scoring.normalised_hamming(jnp.asarray(x)) for k, x in spikes.items()}
    terms = scoring.collect(rho, sites)
    assert float(terms.calls) == 2 * (3 + 1)
    np.testing.assert_allclose(float(terms.neurons), (3 * 60 + 11) / 4, rtol=1e-6)


def test_rho_of_silent_and_of_firing_images():
    x = np.zeros((1, 4, 8), np.float32)
    x[0, 1], x[0, 2, :2] = 1, 1
    rho = np.asarray(scoring.normalised_hamming(jnp.asarray(x)))[0]
    np.testing.assert_allclose(rho, rho_oracle(x[0]), rtol=1e-6)
    assert np.array_equal(np.diagonal(rho), np.zeros(4))
    assert rho[0, 3] == 0  # both silent: no distance, and none expected
    np.testing.assert_allclose(rho[0, 1], 8 / 8.001, rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(np.bool_, (2, 5, 16)), hnp.arrays(np.bool_, (2, 5, 6)), st.integers(1, 4))
def test_any_spikes(a, b, multiplicity):
    spikes = {"a": a.astype(np.float64), "b": b.astype(np.float64)}
    calls = {"a": multiplicity, "b": 1}
    with jax.enable_x64(True):
        ours = {form: float(score) for form, score in scores(spikes, calls).items()}
    for form in FORMS:
        assert not np.isnan(ours[form])
        kernel = kernel_oracle(form, spikes, calls)
        centred = kernel - kernel.diagonal().mean()  # where the lemma begins
        if max(np.linalg.cond(kernel), np.linalg.cond(centred)) < 1e8:
            np.testing.assert_allclose(ours[form], np.linalg.slogdet(kernel)[1], rtol=1e-6, atol=1e-6)
    together = np.concatenate([a, b], -1).transpose(1, 0, 2).reshape(5, -1)
    if len(np.unique(together, axis=0)) < 5:
        assert ours == dict.fromkeys(FORMS, -np.inf)


def wide_calls(calls=15, b=64, n=262_144):
    """LIF calls of a wide network: rates differ by image and place, images share what fires where."""
    rng = np.random.default_rng(5)
    for _ in range(calls):
        rate_B = rng.uniform(0.02, 0.3, (b, 1))
        threshold = (2 * rate_B * rng.permutation(256)).astype(np.uint8)  # by place, for all images alike
        draws = rng.integers(0, 256, (b, 256, n // 256), np.uint8)
        yield (draws < threshold[:, :, None]).astype(np.float32).reshape(b, n)


@pytest.mark.slow
def test_float32_is_accurate_where_the_reference_is_not():
    """The determinant lemma keeps five digits at N = 262,144; adding N to rho in float32 does not."""
    n, rhos, exact, reference = 262_144, [], 0.0, 0.0
    hamming = jax.jit(scoring.normalised_hamming)
    for x in wide_calls():
        rhos.append(np.asarray(hamming(jnp.asarray(x)[None]))[0])
        bits, rate = np.packbits(x > 0, axis=1).view(np.uint64), x.mean(1, dtype=np.float64)
        distance = np.stack([np.bitwise_count(bits ^ image).sum(1, dtype=np.int64) for image in bits])
        expected = n * (rate[:, None] * (1 - rate) + (1 - rate[:, None]) * rate)
        rho = distance / (expected + 1e-3)
        np.testing.assert_allclose(rhos[-1], rho, rtol=2e-6, atol=1e-7)
        exact = exact + (n - 0.5 * rho)
        reference = reference + (np.float32(n) - np.float32(0.5) * rho.astype(np.float32))
    expected = np.linalg.slogdet(exact / len(rhos))[1]
    records = {"wide": jnp.asarray(np.stack(rhos))}
    ours = scoring.sahd_code(scoring.collect(records, {"wide": Site(n, 1, NeuronSpec())}))
    assert ours.dtype == jnp.float32
    theirs = np.linalg.slogdet(np.asarray(reference / np.float32(len(rhos)), np.float64))[1]
    errors = abs(float(ours) - expected) / abs(expected), abs(theirs - expected) / abs(expected)
    print(f"score {expected:.6f}: relative error {errors[0]:.1e} here, {errors[1]:.1e} adding N in float32")
    assert errors[0] < 1e-4
    assert errors[1] > 1e-4


def test_counts_are_exact_in_bfloat16():
    rng = np.random.default_rng(0)
    x = (rng.random((1, 4, 70_001)) < 0.4).astype(np.float32)
    single = scoring.normalised_hamming(jnp.asarray(x))
    half = scoring.normalised_hamming(jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.float32
    np.testing.assert_array_equal(half, single)
    np.testing.assert_allclose(single[0], rho_oracle(x[0].astype(np.float64)), rtol=1e-6)


def test_too_many_neurons_to_count():
    at_most = jax.ShapeDtypeStruct((1, 2, 2**24), jnp.float32)
    assert jax.eval_shape(scoring.normalised_hamming, at_most).shape == (1, 2, 2)
    with pytest.raises(ValueError, match="16777217 neurons"):
        jax.eval_shape(scoring.normalised_hamming, jax.ShapeDtypeStruct((1, 2, 2**24 + 1), jnp.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("same", [(2, 3), (2, 6), (5, 6)])
def test_equal_images_give_minus_infinity(same, dtype):
    spikes = {site: x.astype(dtype) for site, x in random_spikes(1).items()}
    for x in spikes.values():
        x[:, same[1]] = x[:, same[0]]
    with jax.enable_x64(dtype == np.float64):
        assert {float(s) for s in scores(spikes, {"a": 3, "b": 1}).values()} == {-np.inf}


def test_silent_network_gives_minus_infinity():
    spikes = {site: np.zeros_like(x, np.float32) for site, x in random_spikes().items()}
    assert {float(s) for s in scores(spikes, {"a": 3, "b": 1}).values()} == {-np.inf}


def test_order_of_images_leaves_the_score():
    spikes, calls = random_spikes(2), {"a": 3, "b": 1}
    order = np.random.default_rng(0).permutation(7)
    with jax.enable_x64(True):
        ours, shuffled = scores(spikes, calls), scores({k: x[:, order] for k, x in spikes.items()}, calls)
    for form in FORMS:
        np.testing.assert_allclose(ours[form], shuffled[form], rtol=1e-10)


def test_registry(monkeypatch):
    monkeypatch.setattr(scoring, "_SCORES", dict(scoring._SCORES))
    assert scoring.score_names()[:2] == FORMS
    with pytest.raises(ValueError, match="score 'sahd_code' is registered already"):
        scoring.register_score("sahd_code")(scoring.sahd_code)
    with pytest.raises(ValueError, match="score='sahd' is unknown; known: sahd_paper, sahd_code"):
        scoring.get_score("sahd")

    @scoring.register_score("calls")
    def calls(terms):
        return terms.calls

    assert scoring.get_score("calls") is calls
    assert scoring.score_names()[-1] == "calls"


@pytest.mark.slow
def test_scores_of_a_feedback_network():
    """Fixed and traced genotypes give the score of the formulas, each conv edge a LIF call of its own."""
    spec = NetworkSpec((6, 6, 2), 3, CellSpace((1, 3), feedback=True), channels=4, time_steps=3)
    row = spec.space.parse("0303 0030 2002 0200")
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: network.init(key, spec)[0], jax.random.key(0))
    params = jax.tree.map(lambda leaf: rng.normal(0.3, 0.5, leaf.shape), shapes)
    x = rng.normal(size=(5, *spec.image_shape))

    @jax.jit
    def traced(row, params, x):
        terms, _ = scoring.spike_terms(spec, row, params, x)
        return {form: scoring.get_score(form)(terms) for form in FORMS}

    @jax.jit
    def fixed(params, x):
        def observe(spikes):
            return scoring.normalised_hamming(spikes), spikes

        records = network.apply(spec, row, params, x, train=True, observe=observe).records
        terms = scoring.collect({site: rho for site, (rho, _) in records.items()}, spec.sites(row))
        by_form = {form: scoring.get_score(form)(terms) for form in FORMS}
        return by_form, {site: spikes for site, (_, spikes) in records.items()}, terms.calls

    with jax.enable_x64(True):
        by_trace = traced(jnp.asarray(row), params, x)
        by_row, spikes, calls = jax.device_get(fixed(params, x))
    sources = [source for source, _, _ in conv_edges(spec.space, row)]
    counts = {site: 1 if ".node" not in site else sources.count(int(site[-1])) for site in spikes}
    assert int(calls) == spec.time_steps * sum(counts.values())
    for form in FORMS:
        expected = np.linalg.slogdet(kernel_oracle(form, spikes, counts))[1]
        np.testing.assert_allclose(by_row[form], expected, rtol=1e-7)
        np.testing.assert_allclose(by_trace[form], expected, rtol=1e-7)
