"""The PyTorch peer of the scoring benchmark: it must be the public network, in the public loop.

What needs torch and spikingjelly skips without them, what needs golden numbers without `SPIKERNEL_GOLDEN`
(see tests/snn/test_golden.py); what is checked before torch is touched runs everywhere.
"""

import dataclasses
import functools
import importlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peers
from spikernel_jax import CellSpace, NetworkSpec, NeuronSpec, load_snasnet
from spikernel_jax.scoring import scores
from spikernel_jax.snn import snasnet

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("SPIKERNEL_GOLDEN", ROOT / "tests" / "golden"))
MANIFESTS = sorted(FOLDER.glob("*.json"))
CASES = [(path, name) for path in MANIFESTS for name in json.loads(path.read_text()).get("cases", {})]


needs_torch = pytest.mark.skipif(peers.missing() is not None, reason=str(peers.missing()))
every_case = pytest.mark.parametrize(
    ("path", "name"),
    CASES or [pytest.param(None, None, marks=pytest.mark.skip(f"no golden numbers in {FOLDER}"))],
    ids=[name for _, name in CASES] or ["none"],
)

FORWARD = NetworkSpec((8, 8, 2), 3, channels=5, time_steps=3, head="snasnet", head_hidden=7, neurons_per_class=4)
FEEDBACK = dataclasses.replace(FORWARD, space=CellSpace(feedback=True))
CELLS = ("0123 0042 0003 0000", "0301 0020 0004 0000", "0003 0000 0000 0000")


def rows(spec: NetworkSpec, *cells: str) -> np.ndarray:
    return np.stack([spec.space.parse(cell) for cell in cells])


def images(spec: NetworkSpec, batches: int = 2, batch: int = 6) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(batches, batch, *spec.image_shape)).astype(np.float32)


class Golden:
    """One case: the public network with its weights and dropout mask, ready to be scored."""

    def __init__(self, path: Path, name: str):
        manifest = json.loads(path.read_text())
        self.meta, self.name = manifest["cases"][name], name
        self.arrays = np.load(path.parent / manifest["file"], allow_pickle=False)

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[f"{self.name}/{key}"]

    def first(self, *keys: str) -> np.ndarray | None:
        """The first of these arrays that the case has."""
        return next((self[key] for key in keys if f"{self.name}/{key}" in self.arrays.files), None)

    def weights(self) -> dict[str, np.ndarray]:
        start = f"{self.name}/w/"
        return {key.removeprefix(start): self.arrays[key] for key in self.arrays.files if key.startswith(start)}

    def run(self, dtype: str, batches: str) -> Any:
        torch = importlib.import_module("torch")
        weights, meta = self.weights(), self.meta
        spec = load_snasnet(
            weights,
            self["con_mat"],
            num_classes=meta.get("num_classes"),
            image_size=self.arrays["x_A"].shape[-1],
            time_steps=meta["timestep"],
            tau=meta["tau"],
            v_threshold=meta.get("threshold", 1.0),
            stem_stride=meta.get("stem_stride", 1),
            head_pool=meta.get("second_avgpooling"),
        ).spec
        raw = self.first("con_raw", "con_mat")
        assert raw is not None
        (matrix,) = peers.matrices(raw[None], spec)
        np.testing.assert_array_equal(matrix, self["con_mat"])
        net = peers.build(matrix, spec)
        loaded = net.load_state_dict({key: torch.from_numpy(w) for key, w in weights.items()}, strict=False)
        assert not loaded.unexpected_keys
        assert all(key.split(".")[-1] in ("running_mean", "running_var", "num_batches_tracked") for key in loaded[0])
        net = net.to(getattr(torch, dtype))
        net.classifier[0].mask = torch.from_numpy(2 * self["dropout_keep"].astype(dtype))
        return peers.score_network(net, [torch.from_numpy(self.arrays[f"x_{b}"].astype(dtype)) for b in batches])


@functools.cache
def golden(path: Path, name: str) -> Golden:
    return Golden(path, name)


@needs_torch
@every_case
def test_float64_reproduces_the_public_kernels(path, name):
    case = golden(path, name)
    result = case.run("float64", "AB")
    assert result.lif_calls == case.meta.get("n_lif_calls", result.lif_calls)
    clean = case.run("float64", "B")
    found = zip((*result.kernels, *clean.kernels), (*result.scores, *clean.scores), strict=True)
    for batch, (kernel, score) in zip(("A", "Bcarry", "Breset"), found, strict=True):
        expected = case.first(f"f64/K64_{batch}", f"K64_{batch}")
        if expected is None:
            continue
        np.testing.assert_allclose(kernel, expected, rtol=1e-12, atol=0)
        # The large N (the diagonal) hides the small part, which is all that tells cells apart.
        small = expected.diagonal().mean() - expected
        np.testing.assert_allclose(kernel.diagonal().mean() - kernel, small, rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(score, np.linalg.slogdet(expected)[1], rtol=0, atol=1e-8)


@needs_torch
@every_case
def test_float32_reproduces_the_public_score(path, name):
    """To the last bit where these numbers were made; elsewhere to the rounding of N - 0.5 rho in float32."""
    case = golden(path, name)
    result = case.run("float32", "AB")
    for batch, kernel in zip(("A", "Bcarry"), result.kernels, strict=True):
        expected = case.first(f"K32_{batch}")
        if expected is not None:
            np.testing.assert_allclose(kernel, expected, rtol=0, atol=expected.max() * 2**-22)
    if "score_reference" in case.meta:
        np.testing.assert_allclose(result.scores.mean(), case.meta["score_reference"], rtol=0, atol=5e-4)


WIDTHS = {
    "cifar": NetworkSpec((32, 32, 3), 10, channels=12, time_steps=2, head="snasnet", head_pool=3),
    "small": FORWARD,
    "strided": dataclasses.replace(FORWARD, image_shape=(30, 30, 1), stem_stride=2, neuron=NeuronSpec(tau=2.0)),
    "feedback": FEEDBACK,
}


@needs_torch
@pytest.mark.parametrize("name", WIDTHS)
def test_built_network_is_the_specs(name):
    """Shapes of all weights, and in float64 the score of our engine for the same weights, images and mask."""
    torch = importlib.import_module("torch")
    spec = WIDTHS[name]
    cell = "0302 0030 3003 0000" if spec.space.feedback else CELLS[0]
    (matrix,) = peers.matrices(rows(spec, cell), spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = peers.build(matrix, spec)
        for module in net.modules():  # the public head hardly fires: make it speak
            if isinstance(module, torch.nn.Linear):
                module.weight.data *= 100
        net = net.double()
        state = {key: value.numpy() for key, value in net.state_dict().items()}
        x = images(spec, batches=1).astype(np.float64)
        result = peers.score_network(net, list(torch.from_numpy(np.moveaxis(x, -1, 2).copy())))
    with jax.enable_x64(True):
        model = load_snasnet(
            state,
            matrix,
            num_classes=spec.num_classes,
            image_size=spec.image_shape[0],
            time_steps=spec.time_steps,
            tau=spec.neuron.tau,
            stem_stride=spec.stem_stride,
            head_pool=spec.head_pool,
            dropout=0.5,
        )
        assert model.spec == dataclasses.replace(spec, dropout=0.5)
        keep = snasnet.dropout_keep(model.spec, net.classifier[0].mask.numpy() > 0)
        run = jax.jit(functools.partial(scores.spike_terms, model.spec, model.genotype))
        terms, out = run(model.params, jnp.asarray(x[0]), dropout_keep=jnp.asarray(keep))
        assert float(out.records["head"].max()) > 0
        assert result.lif_calls == int(terms.calls)
        np.testing.assert_allclose(result.kernels[0], terms.neurons - 0.5 * terms.rho_BB, rtol=1e-12, atol=0)
        np.testing.assert_allclose(result.scores[0], float(scores.sahd_code(terms)), rtol=0, atol=1e-6)


@needs_torch
def test_scores_do_not_depend_on_the_other_candidates(monkeypatch):
    torch = importlib.import_module("torch")
    build, seeds = peers.build, []
    monkeypatch.setattr(peers, "build", lambda *args: seeds.append(torch.initial_seed()) or build(*args))
    before = torch.random.get_rng_state()
    genotypes, batches = rows(FORWARD, *CELLS), images(FORWARD)
    every = peers.snasnet_scores(genotypes, batches, FORWARD)
    assert len(set(seeds)) == len(CELLS)
    last = peers.snasnet_scores(peers.matrices(genotypes, FORWARD)[::-1], batches, FORWARD)
    np.testing.assert_array_equal(every.replicates, last.replicates[::-1])
    np.testing.assert_array_equal(every.scores, every.replicates.mean(1))
    assert every.lif_calls.tolist() == [(2 * convs + 3) * FORWARD.time_steps for convs in (4, 2, 1)]
    assert every.seconds.shape == (3,)
    assert (every.seconds > 0).all()
    assert len(np.unique(every.scores)) == 3
    other = peers.snasnet_scores(genotypes, batches, FORWARD, seed=1)
    assert (every.scores != other.scores).all()
    assert torch.equal(torch.random.get_rng_state(), before)


@needs_torch
def test_membranes_go_on_from_batch_to_batch():
    """Twice the same batch: the second time the network is not where it started."""
    x = images(FORWARD, batches=1)
    twice = peers.snasnet_scores(rows(FORWARD, CELLS[0]), np.concatenate([x, x]), FORWARD)
    once = peers.snasnet_scores(rows(FORWARD, CELLS[0]), x, FORWARD)
    assert twice.replicates[0, 0] == once.replicates[0, 0] == once.scores[0]
    assert twice.replicates[0, 1] != twice.replicates[0, 0]


@needs_torch
def test_describe_names_versions_and_threads():
    torch = importlib.import_module("torch")
    found = peers.describe()
    assert str(found.pop("spikingjelly")).startswith("2.0")
    assert (found.pop("device") == "cpu") == (not torch.cuda.is_available())
    assert found == {"torch": torch.__version__, "threads": torch.get_num_threads()}


@pytest.mark.parametrize("error", [ImportError("No module named 'torch'"), OSError("libcudart.so: none\nmore")])
def test_missing_says_in_one_line_what_to_install(monkeypatch, error):
    def fail(name: str) -> Any:
        raise error

    peers._libraries.cache_clear()
    monkeypatch.setattr(peers.importlib, "import_module", fail)
    line = peers.missing()
    assert line is not None
    assert len(line.splitlines()) == 1
    assert str(error).splitlines()[0] in line
    assert "pip install torch==" in line
    assert "pip install --no-deps spikingjelly==2.0" in line


def test_matrices_are_snasnets_without_dead_nodes():
    given = rows(FORWARD, "0123 0042 0001 0000", "0231 0000 0002 0000")
    expected = [
        [[0, 1, 2, 3], [0, 0, 4, 2], [0, 0, 0, 1], [0] * 4],
        [[0, 0, 3, 1], [0] * 4, [0, 0, 0, 2], [0] * 4],
    ]
    found = peers.matrices(given, FORWARD)
    assert found.tolist() == expected
    np.testing.assert_array_equal(peers.matrices(found, FORWARD), found)
    back = peers.matrices(rows(FEEDBACK, "0303 0030 2002 0200"), FEEDBACK)
    assert back.tolist() == [[[0, 3, 0, 3], [0, 0, 3, 0], [2, 0, 0, 2], [0, 2, 0, 0]]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"space": CellSpace((1, 5))}, r"kernel_sizes=\(1, 5\)"),
        ({"head": "gap"}, "head='gap'"),
        ({"norm": "over_time"}, "norm='over_time'"),
        ({"neuron": NeuronSpec(reset="soft")}, "neuron="),
        ({"image_shape": (8, 6, 2)}, r"image_shape=\(8, 6, 2\)"),
    ],
)
def test_refuses_networks_the_public_class_cannot_be(change, message):
    spec = dataclasses.replace(FORWARD, **change)
    with pytest.raises(ValueError, match=message):
        peers.snasnet_scores(np.ones((1, 6), int), images(spec), spec)


@pytest.mark.parametrize(
    ("genotypes", "batches", "message"),
    [
        (np.ones((2, 7), int), images(FORWARD), r"genotypes have shape \(2, 7\)"),
        (np.ones(6, int), images(FORWARD), r"genotypes have shape \(6,\)"),
        (np.zeros((1, 6), int), images(FORWARD), "is no cell"),
        (np.ones((1, 4, 4), int), images(FORWARD), "no edge"),
        (np.ones((1, 6), int), images(FORWARD)[0], "images have shape"),
        (np.ones((1, 6), int), images(FORWARD)[..., :1], "images have shape"),
        (np.ones((1, 6), int), images(FORWARD).astype(np.uint8), "images are uint8"),
        (np.ones((1, 6), int), images(FORWARD) * np.nan, "NaN"),
    ],
)
def test_bad_input_is_refused(genotypes, batches, message):
    with pytest.raises(ValueError, match=message):
        peers.snasnet_scores(genotypes, batches, FORWARD)
