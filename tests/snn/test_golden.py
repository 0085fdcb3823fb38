"""Every case of the golden folder, made by the public PyTorch SNASNet code.

Cases of small networks lie in ``tests/golden`` (made by tools/make_golden.py); `SPIKERNEL_GOLDEN` names a folder of
more. Every manifest is run, whatever its cases are called; what a case lacks is not compared.

Firing must match exactly. In float64 that is asked outright. In float32 a membrane within rounding of the
threshold may fall on the other side, and a single flip spreads through the batch statistics. So where the
spikes of a float32 pass differ, it is run again with *forced spikes*: every LIF layer computes its own
membrane and spike, but hands on the spike of the float64 pass. Then all earlier spikes are right, and every
disagreement left must be one of rounding. Each is counted and reported, and must lie within `ROUNDING` of
the threshold. Gradients in float32 are always taken under forced spikes.
"""

import functools
import hashlib
import json
import os
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from spikernel_jax import load_snasnet
from spikernel_jax.cells.space import EDGES, FORWARD_EDGES
from spikernel_jax.scoring import scores
from spikernel_jax.snn import network, neurons, snasnet

FOLDERS = [Path(__file__).parents[1] / "golden"]
if named := os.environ.get("SPIKERNEL_GOLDEN"):
    FOLDERS.append(Path(named))
MANIFESTS = sorted(path for folder in FOLDERS for path in folder.glob("*.json"))

CASES = [(path, name) for path in MANIFESTS for name in json.loads(path.read_text()).get("cases", {})]
GRADS = [(path, name) for path in MANIFESTS for name in json.loads(path.read_text()).get("grad", {})]
BATCHES = ("A", "Bcarry", "Breset")
ROUNDING = 2e-6  # how far from the threshold a float32 membrane may disagree
RARE = 1e-5  # and in what share of the neurons, at most

every_case = pytest.mark.parametrize(("path", "name"), CASES, ids=[name for _, name in CASES])
every_grad = pytest.mark.parametrize(
    ("path", "name"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (case != GRADS[0])) for case in GRADS],
    ids=[name for _, name in GRADS],
)


class Case:
    """One case of a manifest: its settings, arrays, and our model of its weights."""

    def __init__(self, path: Path, name: str, section: str):
        manifest = json.loads(path.read_text())
        self.meta, self.name = manifest[section][name], name
        self.arrays = np.load(path.parent / manifest["file"], allow_pickle=False)

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[f"{self.name}/{key}"]

    def first(self, *keys: str) -> np.ndarray | None:
        """The first of these arrays that the case has."""
        return next((self[key] for key in keys if f"{self.name}/{key}" in self.arrays.files), None)

    def tree(self, prefix: str) -> dict[str, np.ndarray]:
        start = f"{self.name}/{prefix}/"
        names = [key for key in self.arrays.files if key.startswith(start)]
        return {key.removeprefix(start): self.arrays[key] for key in names}

    def images(self, batch: str, dtype: str) -> jax.Array:
        return jnp.asarray(self.arrays[f"x_{batch}"].transpose(0, 2, 3, 1), dtype)

    def keep(self, spec) -> jax.Array | None:
        mask = self.first("dropout_keep")
        return None if mask is None else jnp.asarray(snasnet.dropout_keep(spec, mask))

    def model(self, dtype: str, *, stats: str | None = None, weights: str = "w"):
        state_dict = self.tree(weights) | (self.tree(stats) if stats else {})
        return load_snasnet(
            {key: value.astype(dtype) for key, value in state_dict.items()},
            self["con_mat"],
            num_classes=self.meta.get("num_classes"),
            image_size=self.arrays["x_A"].shape[-1],
            time_steps=self.meta["timestep"],
            tau=self.meta["tau"],
            v_threshold=self.meta.get("threshold", 1.0),
            stem_stride=self.meta.get("stem_stride", 1),
            head_pool=self.meta.get("second_avgpooling"),
        )


@functools.cache
def load(path: Path, name: str, section: str) -> Case:
    return Case(path, name, section)


def forced_fire(net, site: str, x_TBN, neuron=None, *, forced):
    """`network.Pass.fire` that hands on given spikes, and records where its own would differ."""
    if site not in net.sites:
        return jnp.zeros_like(x_TBN)
    neuron = neuron or net.spec.neuron
    # In a scan over time a chunk is one step, and the state says which.
    start = net.state.get(f"t.{site}", jnp.zeros((), jnp.int32))
    given = lax.dynamic_slice_in_dim(forced[site], start, x_TBN.shape[0])

    def step(v, x_and_spikes):
        x, given = x_and_spikes
        v = v + (x - (v - neuron.v_reset)) / neuron.tau
        own = neurons.spike(neuron, v - neuron.v_threshold)
        differs = own != given
        distance = jnp.abs(v - neuron.v_threshold)
        margin, nearest = jnp.where(differs, distance, 0).max(), distance.min()
        spikes = own + lax.stop_gradient(given - own)  # the value is given, the gradient the surrogate's
        return jnp.where(given > 0, neuron.v_reset, v), (spikes, differs.sum(), margin, nearest)

    v = net.state.get(site, jnp.zeros(x_TBN.shape[1:], x_TBN.dtype))
    net.state[site], (spikes, differing, margin, nearest) = lax.scan(step, v, (x_TBN, given.astype(x_TBN.dtype)))
    net.state[f"t.{site}"] = start + x_TBN.shape[0]
    net.records[site] = net.observe(spikes) | {"differing": differing, "margin": margin, "nearest": nearest}
    return spikes


def forced_spikes(forced):
    """While it lasts, passes are traced with forced spikes; None changes nothing."""
    fire = network.Pass.fire if forced is None else functools.partialmethod(forced_fire, forced=forced)
    return mock.patch.object(network.Pass, "fire", fire)


def make_runner(model, *, train: bool = True):
    """A jitted pass that gives scores, spikes by site, logits, state and statistics."""
    spec, genotype = model.spec, model.genotype

    def observe(spikes):
        return {"rho": scores.normalised_hamming(spikes), "spikes": spikes > 0}

    @jax.jit
    def run(params, stats, state, images, keep, forced):
        with forced_spikes(forced):
            out = network.apply(
                spec,
                genotype,
                params,
                images,
                stats=stats,
                state=state,
                train=train,
                dropout_keep=keep,
                observe=observe,
            )
        terms = scores.collect({k: r.pop("rho") for k, r in out.records.items()}, spec.sites(genotype))
        return {
            "neurons": terms.neurons,
            "R": terms.rho_BB,
            "score": scores.sahd_code(terms),
            "calls": terms.calls,
            "records": out.records,
            "logits": out.logits_BK,
            "state": out.state,
            "stats": out.stats,
        }

    return run


def clean_state(run, *args):
    """Zero membranes under all the names that a pass will give back: one compilation serves every start."""
    shapes = jax.eval_shape(run, *args)["state"]
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def spikes_of(result) -> dict[str, np.ndarray]:
    return {site: np.asarray(record["spikes"]) for site, record in result["records"].items()}


@functools.cache
def trained_passes(path: Path, name: str, mode: str) -> dict[str, dict]:
    """The public scoring loop's three passes, by mode: "float64", or in float32 "forced" or "free"."""
    case, dtype = load(path, name, "cases"), "float64" if mode == "float64" else "float32"
    forced = {batch: None for batch in BATCHES}
    if mode == "forced":
        forced = {batch: spikes_of(r) for batch, r in trained_passes(path, name, "float64").items()}
    with jax.enable_x64(dtype == "float64"):
        model = case.model(dtype)
        keep, a, b = case.keep(model.spec), case.images("A", dtype), case.images("B", dtype)
        run = make_runner(model)
        clean = clean_state(run, model.params, model.stats, {}, a, keep, forced["A"])
        first = run(model.params, model.stats, clean, a, keep, forced["A"])
        # The public code carries membranes into the next batch, but starts feedback at zero.
        left = {
            site: clean[site] if site.startswith("t.") or site.endswith(".feedback") else v
            for site, v in first["state"].items()
        }
        carry = run(model.params, first["stats"], left, b, keep, forced["Bcarry"])
        reset = run(model.params, model.stats, clean, b, keep, forced["Breset"])
        return jax.device_get(dict(zip(BATCHES, (first, carry, reset), strict=True)))


@functools.cache
def evaluated_pass(path: Path, name: str, mode: str) -> dict:
    """Batch A by running statistics."""
    case, dtype = load(path, name, "cases"), "float64" if mode == "float64" else "float32"
    forced = spikes_of(evaluated_pass(path, name, "float64")) if mode == "forced" else None
    with jax.enable_x64(dtype == "float64"):
        model = case.model(dtype, stats="bn_eval")
        run = make_runner(model, train=False)
        return jax.device_get(run(model.params, model.stats, {}, case.images("A", dtype), None, forced))


def disagreements(result: dict) -> tuple[int, float]:
    """How many neurons a forced pass found on the other side, and the farthest of them; checks the rule."""
    records = result["records"].values()
    count = sum(int(record["differing"].sum()) for record in records)
    margin = max(float(record["margin"].max()) for record in records)
    assert margin < ROUNDING
    assert count <= RARE * sum(record["spikes"].size for record in records)
    return count, margin


def at_threshold(result: dict) -> bool:
    """Whether a forced pass holds a neuron within rounding of its threshold.

    Only then may a pass left to itself differ. Which side such a neuron falls on depends on how the program
    around it was compiled, so the forced pass need not find it on the other side.
    """
    return min(float(record["nearest"].min()) for record in result["records"].values()) < ROUNDING


def report(record_property, what: str, count: int, margin: float | None = None) -> None:
    record_property(what, count if margin is None else (count, margin))
    where = "" if margin is None else f", at most {margin:.2g} from the threshold"
    print(f"{what}: {count} spikes differ{where}")


def site_of(module: str) -> str:
    """Our LIF site of a public module: conv edges that leave one node share a site."""
    fixed = {"downconv1.1": "transition", "last_act.1": "last", "classifier.2": "head"}
    if module in fixed:
        return fixed[module]
    cell, kind, number, _ = module.split(".")
    position = int(number) + (len(FORWARD_EDGES) if kind.endswith("_back") else 0)
    return f"{cell}.node{EDGES[position][0]}"


def modules(case: Case) -> list[str]:
    """Public LIF modules in call order within a time step, by the public matrix."""
    order = []
    for cell, closing in (("cell1", "downconv1.1"), ("cell2", "last_act.1")):
        for i, edge in enumerate(EDGES):
            if case["con_mat"][edge] in (2, 3):
                back = i >= len(FORWARD_EDGES)
                number = i - len(FORWARD_EDGES) * back
                order.append(f"{cell}.cell_architecture{'_back' * back}.{number}.0")
        order.append(closing)
    order.append("classifier.2")
    assert case.meta.get("lif_modules_in_call_order_per_timestep", order) == order
    return order


def public_calls(case: Case, result: dict) -> list[np.ndarray]:
    """Spikes [B, ...] of every public LIF call, in call order."""
    spikes = spikes_of(result)
    return [spikes[site_of(m)][t] for t in range(case.meta["timestep"]) for m in modules(case)]


def assert_counts(case: Case, result: dict, expected: np.ndarray | None) -> None:
    """Spikes by call and image are the public ones."""
    if expected is not None:
        calls = public_calls(case, result)
        ours = np.stack([spikes.reshape(spikes.shape[0], -1).sum(1) for spikes in calls])
        assert ours.shape == expected.shape
        flips = np.abs(ours - expected)
        assert flips.sum() == 0, f"{flips.sum()} spikes differ in {np.count_nonzero(flips)} places"


def assert_kernels_scores_and_logits(case: Case, results: dict[str, dict], *, rtol: float) -> None:
    for batch, result in results.items():
        kernel = case.first(f"f64/K64_{batch}", f"K64_{batch}")
        if kernel is not None:
            np.testing.assert_allclose(result["neurons"] - 0.5 * result["R"], kernel, rtol=rtol, atol=0)
            # What tells cells apart is the small part, which the large N (the diagonal) hides.
            small = 2 * (kernel.diagonal().mean() - kernel)
            np.testing.assert_allclose(result["R"], small, rtol=rtol, atol=1e-10)
            score = case.meta.get(f"score_K64_{batch}", np.linalg.slogdet(kernel)[1])
            np.testing.assert_allclose(float(result["score"]), score, rtol=1e-5, atol=1e-5)
        logits = case.first(f"f64/out_train_{batch}", f"out_train_{batch}")
        if logits is not None:
            np.testing.assert_allclose(result["logits"], logits, rtol=1e-5, atol=1e-5)


def relative(a, b) -> float:
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / max(np.linalg.norm(b), 1e-300))


def test_archive_is_the_manifests_own():
    for path in MANIFESTS:
        manifest = json.loads(path.read_text())
        if "sha256" in manifest:
            digest = hashlib.sha256((path.parent / manifest["file"]).read_bytes()).hexdigest()
            assert digest == manifest["sha256"]


@every_case
def test_float64_equals_the_public_code(path, name):
    case, results = load(path, name, "cases"), trained_passes(path, name, "float64")
    assert int(results["A"]["calls"]) == case.meta.get("n_lif_calls", results["A"]["calls"])
    for batch, result in results.items():
        assert_counts(case, result, case.first(f"f64/spike_counts_{batch}", f"spike_counts_{batch}"))
    assert_kernels_scores_and_logits(case, results, rtol=1e-9)
    if "score_reference" in case.meta:
        # The reference's own score is float32 at its worst: its K32 differs from K64 by up to 2e-4.
        mean_score = (float(results["A"]["score"]) + float(results["Bcarry"]["score"])) / 2
        np.testing.assert_allclose(mean_score, case.meta["score_reference"], atol=5e-4)
    for call, packed in case.tree("spikes_A").items():
        spikes = public_calls(case, results["A"])[int(call)]
        bits = np.packbits(np.moveaxis(spikes, -1, 1).ravel())
        assert np.bitwise_count(bits ^ packed).sum() == 0, f"spikes of call {call} differ"
    if case.tree("bn_after"):
        for layer, expected in case.model("float32", stats="bn_after").stats.items():
            for leaf, value in expected.items():
                ours = results["Bcarry"]["stats"][layer][leaf]
                np.testing.assert_allclose(ours, value, rtol=1e-5, atol=1e-6, err_msg=f"{layer} {leaf}")


def differing_spikes(result: dict, exact: dict) -> int:
    theirs = spikes_of(exact)
    return sum(int(np.count_nonzero(spikes != theirs[site])) for site, spikes in spikes_of(result).items())


@every_case
def test_float32_left_to_itself(path, name, record_property):
    case, results = load(path, name, "cases"), trained_passes(path, name, "free")
    exact, same = trained_passes(path, name, "float64"), {}
    for batch, result in results.items():
        differing = differing_spikes(result, exact[batch])
        report(record_property, f"{name} {batch} left to itself", differing)
        if not differing:
            same[batch] = result
            assert_counts(case, result, case.first(f"spike_counts_{batch}"))
    assert_kernels_scores_and_logits(case, same, rtol=1e-5)
    if len(same) < len(results):
        found = {b: at_threshold(r) for b, r in trained_passes(path, name, "forced").items()}
        found["Bcarry"] |= found["A"]  # it starts from what A leaves
        assert all(found[batch] for batch in results.keys() - same.keys())


@every_case
def test_float32_disagrees_only_by_rounding(path, name, record_property):
    case, free = load(path, name, "cases"), trained_passes(path, name, "free")
    exact = trained_passes(path, name, "float64")
    feedback = case.model("float32").spec.space.feedback
    if not feedback and not any(differing_spikes(free[b], exact[b]) for b in BATCHES):
        # Feedback cells go on, so that forcing inside a scan over time is exercised wherever this runs.
        pytest.skip("left to itself, float32 fires exactly as float64: nothing to force")
    results = trained_passes(path, name, "forced")
    for batch, result in results.items():
        report(record_property, f"{name} {batch} forced", *disagreements(result))
    assert_kernels_scores_and_logits(case, results, rtol=1e-5)


@every_case
def test_evaluation_by_running_statistics(path, name, record_property):
    case = load(path, name, "cases")
    if not case.tree("bn_eval"):
        pytest.skip("the case has no running statistics to evaluate by")
    exact = evaluated_pass(path, name, "float64")
    # The public spikes in float64 are not kept; its float32 ones agree with them, by the manifest.
    if case.meta.get("f64_vs_f32_spike_count_L1_eval_A", 0) == 0:
        assert_counts(case, exact, case.first("spike_counts_eval_A"))
    expected = case.first("f64/out_eval_A", "out_eval_A")
    expected = exact["logits"] if expected is None else expected
    np.testing.assert_allclose(exact["logits"], expected, rtol=1e-5, atol=1e-5)
    free = case.model("float32", stats="bn_eval")(np.asarray(case.images("A", "float32")))
    if not np.allclose(free, expected, rtol=1e-5, atol=1e-5):  # then some membrane must be at the threshold
        forced = evaluated_pass(path, name, "forced")
        found = disagreements(forced)
        report(record_property, f"{name} evaluated, forced", *found)
        assert at_threshold(forced)
        np.testing.assert_allclose(forced["logits"], expected, rtol=1e-5, atol=1e-5)


def make_loss_and_grad(model):
    def observe(spikes):
        return {"spikes": spikes > 0}

    @jax.jit
    def loss_and_grad(params, images, labels, keep, forced):
        def loss(params):
            with forced_spikes(forced):
                out = network.apply(
                    model.spec, model.genotype, params, images, train=True, dropout_keep=keep, observe=observe
                )
            losses = optax.softmax_cross_entropy_with_integer_labels(out.logits_BK, labels)
            return losses.mean(), {"logits": out.logits_BK, "records": out.records}

        return jax.value_and_grad(loss, has_aux=True)(params)

    return loss_and_grad


def sgd(path: Path, name: str, mode: str, *, steps: int | None = None, forced=None) -> dict:
    """The public training steps; the first one's result and gradients, every loss, and the parameters."""
    case, dtype = load(path, name, "grad"), "float64" if mode == "float64" else "float32"
    with jax.enable_x64(dtype == "float64"):
        model = case.model(dtype)
        loss_and_grad = make_loss_and_grad(model)
        images, labels = case.images("A", dtype), jnp.asarray(case.arrays["labels_A"])
        params, momentum, losses, first = model.params, None, [], None
        for mask in case["dropout_keep"][:steps]:
            keep = jnp.asarray(snasnet.dropout_keep(model.spec, mask))
            (loss, result), grads = loss_and_grad(params, images, labels, keep, forced)
            losses.append(float(loss))
            first = first or jax.device_get(result | {"grads": grads})
            momentum = public_momentum(momentum, jax.device_get(grads))
            params = jax.tree.map(lambda p, m: np.asarray(p) - 0.1 * m, params, momentum)
        assert first is not None
        return first | {"model": model, "losses": losses, "params": params}


@functools.cache
def sgd_float64(path: Path, name: str) -> dict:
    return sgd(path, name, "float64")


def public_momentum(momentum, grads):
    """The momentum that the public numbers follow.

    With dampening 5e-4 and no weight decay they follow to 1e-15 (as when 5e-4 is the fourth argument of
    ``torch.optim.SGD``), with weight decay 5e-4 they do not (loss of step 3: 2.2935 against 2.2922).
    """
    if momentum is None:
        return grads
    return jax.tree.map(lambda m, g: 0.9 * m + (1 - 5e-4) * g, momentum, grads)


def assert_grads(case: Case, grads: dict, short: str, dtype: str, tolerance: float) -> None:
    """Public gradients go through the same conversion of layout as weights do."""
    if not case.tree(f"grad_{short}"):
        return
    for layer, leaves in case.model(dtype, weights=f"grad_{short}").params.items():
        for leaf, value in leaves.items():
            # A bias that feeds only another batch norm has no gradient but rounding noise.
            if np.linalg.norm(value) > 1e-7:
                assert relative(grads[layer][leaf], value) < tolerance, (layer, leaf)
            else:
                assert np.linalg.norm(grads[layer][leaf]) < 1e-6, (layer, leaf)


@every_grad
def test_float64_gradients_and_three_steps_of_sgd(path, name):
    case, result = load(path, name, "grad"), sgd_float64(path, name)
    assert_counts(case, result, case.first("spike_counts_f64", "spike_counts_f32"))
    np.testing.assert_allclose(result["losses"], case.meta["loss_f64"], rtol=1e-8)
    np.testing.assert_allclose(result["logits"], case["out_f64"], rtol=1e-5, atol=1e-8)
    with jax.enable_x64(True):
        assert_grads(case, result["grads"], "f64", "float64", 1e-6)
        ours = public_norms(result["model"], result["params"])
    for public, norm in case.meta.get("param_l2_after_3_sgd_steps_f64", {}).items():
        np.testing.assert_allclose(ours[public], norm, rtol=1e-8, err_msg=public)


@every_grad
def test_float32_gradients_under_forced_spikes(path, name, record_property):
    case, exact = load(path, name, "grad"), spikes_of(sgd_float64(path, name))
    result = sgd(path, name, "forced", steps=1, forced=exact)
    found = disagreements(result)
    report(record_property, f"{name} forced", *found)
    short = "f32" if "loss_f32" in case.meta else "f64"
    np.testing.assert_allclose(result["losses"][0], case.meta[f"loss_{short}"][0], rtol=1e-5)
    np.testing.assert_allclose(result["logits"], case[f"out_{short}"], rtol=1e-5, atol=1e-5)
    for short in ("f32", "f64"):
        assert_grads(case, result["grads"], short, "float32", 2e-3)

    model = case.model("float32")
    keep = jnp.asarray(snasnet.dropout_keep(model.spec, case["dropout_keep"][0]))
    free = make_runner(model)(model.params, None, {}, case.images("A", "float32"), keep, None)
    differing = differing_spikes(jax.device_get(free), sgd_float64(path, name))
    report(record_property, f"{name} left to itself", differing)
    assert differing == 0 or at_threshold(result)


def public_norms(model, params) -> dict[str, float]:
    """L2 norm of each parameter by its public name; norms do not depend on layout."""
    norms = {}
    for layer, weights, norm in snasnet._names(model.spec, model.genotype):
        leaf_names = {f"{weights}.weight": "kernel", f"{norm}.weight": "scale"}
        leaf_names[f"{norm or weights}.bias"] = "bias"
        for public, leaf in leaf_names.items():
            if leaf in params[layer]:
                norms[public] = float(np.linalg.norm(np.ravel(params[layer][leaf])))
    return norms
