"""Public SNASNet weights are read from mappings and files, and bad input is named."""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from spikernel_jax import CellSpace, load_snasnet
from spikernel_jax.snn import snasnet

FORWARD, LOOPED = "0203 0000 0003 0000", "0303 0000 2000 0200"
C, HIDDEN, SIZE, CLASSES = 2, 3, 8, 2


def weights(matrix=FORWARD, seed=0):
    """Synthetic public parameters: head_pool 2 on 8x8 images, two classes of ten neurons."""
    rng = np.random.default_rng(seed)
    words = matrix.split()
    state = {}

    def conv(name, k, c_in, c_out):
        state[f"{name}.weight"] = rng.normal(size=(c_out, c_in, k, k)).astype(np.float32)

    def norm(name, c):
        state[f"{name}.weight"] = rng.uniform(0.5, 1.5, c).astype(np.float32)
        state[f"{name}.bias"] = rng.normal(size=c).astype(np.float32)
        state[f"{name}.running_mean"] = rng.normal(size=c).astype(np.float32)
        state[f"{name}.running_var"] = rng.uniform(0.5, 1.5, c).astype(np.float32)

    conv("stem.0", 3, 3, C)
    norm("stem.1", C)
    norm("downconv1.0", C)
    conv("downconv1.2", 3, C, 2 * C)
    norm("downconv1.3", 2 * C)
    norm("last_act.0", 2 * C)
    forward = [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]
    backward = [(1, 0), (2, 0), (3, 0), (2, 1), (3, 1), (3, 2)]
    for cell, c in (("cell1", C), ("cell2", 2 * C)):
        for kind, edges in (("", forward), ("_back", backward)):
            for i, (source, target) in enumerate(edges):
                if (entry := words[source][target]) in "23":
                    conv(f"{cell}.cell_architecture{kind}.{i}.1", 2 * int(entry) - 3, c, c)
                    norm(f"{cell}.cell_architecture{kind}.{i}.2", c)
    state["classifier.1.weight"] = rng.normal(size=(HIDDEN, 2 * C * 2 * 2)).astype(np.float32)
    state["classifier.3.weight"] = rng.normal(size=(10 * CLASSES, HIDDEN)).astype(np.float32)
    state["classifier.3.bias"] = rng.normal(size=10 * CLASSES).astype(np.float32)
    return state


def load(source, matrix: object = FORWARD, **options):
    return load_snasnet(source, matrix, image_size=SIZE, time_steps=2, **options)


def assert_same(ours, theirs):
    assert ours.spec == theirs.spec
    assert ours.genotype == theirs.genotype
    for mine, other in ((ours.params, theirs.params), (ours.stats, theirs.stats)):
        assert mine.keys() == other.keys()
        for layer, entry in mine.items():
            assert entry.keys() == other[layer].keys()
            for leaf, value in entry.items():
                np.testing.assert_array_equal(value, other[layer][leaf])


@pytest.mark.parametrize("matrix", [FORWARD, LOOPED])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_files_and_mappings_give_the_same(tmp_path, ending, prefix, matrix):
    state = weights(matrix)
    named = {prefix + name: value for name, value in state.items()}
    path = tmp_path / f"weights.{ending}"
    if ending == "npz":
        np.savez(path, allow_pickle=False, **named)
    else:
        save_file(named, path)
    expected = load(state, matrix)
    assert_same(load(path, matrix), expected)
    assert_same(load(str(path), matrix), expected)
    assert_same(load(named, [[int(digit) for digit in word] for word in matrix.split()]), expected)


def test_what_is_read():
    state = weights(LOOPED)
    model = load(state, LOOPED)
    assert model.spec.space == CellSpace((1, 3), feedback=True)
    assert model.text == LOOPED
    assert (model.spec.channels, model.spec.head_pool, model.spec.num_classes) == (C, 2, CLASSES)
    assert model.params.keys() == model.spec.layers(model.genotype).keys()
    # Backward edge 1 is 2>0, backward edge 4 is 3>1; weights are [out, in, k, k] there.
    for cell in ("cell1", "cell2"):
        for public, ours in (("_back.1", "e20.conv1"), ("_back.4", "e31.conv1"), (".0", "e01.conv3")):
            theirs = state[f"{cell}.cell_architecture{public}.1.weight"]
            np.testing.assert_array_equal(model.params[f"{cell}.{ours}"]["kernel"], theirs.transpose(2, 3, 1, 0))
    # The head's inputs are flattened [C, H, W] there, [H, W, C] here.
    features = np.random.default_rng(1).normal(size=(5, 2 * C, 2, 2)).astype(np.float32)
    ours = features.transpose(0, 2, 3, 1).reshape(5, -1) @ model.params["head.hidden"]["kernel"]
    theirs = features.reshape(5, -1) @ state["classifier.1.weight"].T
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    flat = snasnet.dropout_keep(model.spec, features.reshape(5, -1))
    np.testing.assert_array_equal(flat, features.transpose(0, 2, 3, 1).reshape(5, -1))


def test_without_running_statistics_they_are_at_their_start():
    state = {name: value for name, value in weights().items() if "running" not in name}
    for entry in load(state).stats.values():
        assert not entry["mean"].any()
        assert (entry["var"] == 1).all()


def test_pruned_weights_of_an_unpruned_matrix():
    # Node 1 leads nowhere: the public code makes no weights for its edge.
    model = load(weights(FORWARD), "0203 0000 0003 0000")
    assert model.text == "0203 0000 0003 0000"
    state = {name: value for name, value in weights(FORWARD).items() if "architecture.0." not in name}
    pruned = load(state, "0203 0000 0003 0000")
    assert pruned.text == "0003 0000 0000 0000"


def test_model_runs_on_its_images():
    model = load(weights(), head_pool=2)
    images = np.random.default_rng(0).integers(0, 256, (4, SIZE, SIZE, 3), np.uint8)
    logits = model(images)
    assert logits.shape == (4, CLASSES)
    assert bool(jnp.isfinite(logits).all())


def without(name):
    return {key: value for key, value in weights().items() if key != name}


def reshaped(name, *shape):
    return weights() | {name: np.zeros(shape, np.float32)}


@pytest.mark.parametrize(
    ("make", "options", "match"),
    [
        (lambda: without("stem.0.weight"), {}, "has no 'stem.0.weight', which cell '0203 .*' needs"),
        (lambda: without("classifier.3.bias"), {}, "has no 'classifier.3.bias'"),
        (lambda: without("cell1.cell_architecture.3.1.weight"), {}, "has no 'cell1.cell_architecture.3.1"),
        (lambda: without("last_act.0.bias"), {}, "has no 'last_act.0.bias'"),
        (lambda: reshaped("downconv1.2.weight", 4, 3, 3, 3), {}, r"downconv1.2 has shape \(4, 3, 3, 3\)"),
        (lambda: reshaped("downconv1.3.weight", 7), {}, r"downconv1.3 has shape \(7,\)"),
        (lambda: reshaped("stem.1.bias", 7), {}, r"stem.1 has shape \(7,\)"),
        (lambda: reshaped("stem.1.running_mean", 7), {}, r"stem.1.* has shape \(7,\)"),
        (lambda: reshaped("stem.1.running_var", 7), {}, r"stem.1.* has shape \(7,\)"),
        (lambda: reshaped("classifier.3.weight", 20, 9), {}, r"classifier.3 has shape \(20, 9\)"),
        (lambda: reshaped("classifier.3.bias", 7), {}, r"classifier.3.* has shape \(7,\)"),
        (lambda: reshaped("classifier.1.weight", 3, 17), {}, "17 inputs, which no head_pool gives"),
        (lambda: reshaped("stem.0.weight", 4), {}, r"stem.0.weight.* shape \(4,\)"),
        (lambda: reshaped("classifier.1.weight", 4), {}, r"classifier.1.weight.* shape \(4,\)"),
        (lambda: reshaped("classifier.3.weight", 4), {}, r"classifier.3.* shape \(4,\)"),
        (weights, {"num_classes": 3}, "num_classes=3 does not divide the 20 outputs"),
        (weights, {"head_pool": 1}, "classifier.1 has shape"),
        (weights, {"matrix": "0203 0000 0003"}, "four words"),
        (weights, {"matrix": "0203 0000 0003 000x"}, "cell '0203 0000 0003 000x'"),
        (weights, {"matrix": "0207 0000 0003 0000"}, "digit 7"),
        (weights, {"matrix": "0200 0000 0003 0000"}, "0>3 must not be zero"),
        (weights, {"matrix": "0203 2000 0003 0000"}, "not both directions"),
        (weights, {"matrix": np.zeros((3, 3))}, "4x4"),
        (weights, {"matrix": np.full((4, 4), 9)}, "4x4"),
        (weights, {"matrix": None}, "4x4"),
        (lambda: 3, {}, "state_dict is a int: want a mapping"),
    ],
)
def test_refuses(make, options, match):
    with pytest.raises(ValueError, match=match):
        load(make(), **options)


def test_refuses_files(tmp_path):
    with pytest.raises(ValueError, match=r"missing\.npz': no such file"):
        load(tmp_path / "missing.npz")
    with pytest.raises(ValueError, match="no such file"):
        load(tmp_path)
    other = tmp_path / "weights.pt"
    other.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"want a .npz or a .safetensors file"):
        load(other)


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.9])
def test_refuses_truncated_files(tmp_path, ending, part):
    path = tmp_path / f"weights.{ending}"
    np.savez(path, allow_pickle=False, **weights()) if ending == "npz" else save_file(weights(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ValueError, match=f"state_dict=.*weights.{ending}.*(cannot be read|truncated or corrupt)"):
        load(path)
