"""Counts and proxies against NumPy, one contract for all of them, and what is refused."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import correlate2d

from convolutions import conv_edges
from quick_cases import mostly_slow
from spikernel_jax.cells.space import CellSpace
from spikernel_jax.data import load_dataset, normalise
from spikernel_jax.operations.operation import get_operation
from spikernel_jax.scoring import counts, proxies
from spikernel_jax.scoring.bank import make_bank
from spikernel_jax.scoring.counts import COUNTS
from spikernel_jax.scoring.predictors import predict, predictor_names
from spikernel_jax.scoring.proxies import PROXIES, Untrained
from spikernel_jax.snn import cost, network
from spikernel_jax.snn.spec import NetworkSpec

SPACE = CellSpace((1, 3, 5))
OPERATIONS = CellSpace(operations=("zero", "maxpool3", "dwconv3"))
SPEC = NetworkSpec((8, 8, 1), 3, SPACE, channels=3, time_steps=2)
TEXT = "0>1:conv3 0>2:avgpool 0>3:conv1 1>2:skip 1>3:conv3 2>3:skip"


def simple_paths(space, row):
    """Edges of every path from node 0 to node 3, one by one."""
    held = {(source, target): operation for source, target, operation in space.held(row)}
    nodes = ([0, 3], [0, 1, 3], [0, 2, 3], [0, 1, 2, 3])
    edges = [list(itertools.pairwise(path)) for path in nodes]
    return [[held[edge] for edge in path] for path in edges if all(edge in held for edge in path)]


def test_counts_are_those_of_all_paths():
    for row in SPACE.sample(jax.random.key(0), 60):
        found = simple_paths(SPACE, row)
        convs = [[op for op in path if op.name.startswith("conv")] for path in found]
        assert counts.depth(SPACE, row) == max(map(len, convs))
        assert counts.paths(SPACE, row) == len(found)
        assert counts.convolutions(SPACE, row) == len(conv_edges(SPACE, row))
        side = {"skip": 1, "avgpool": 3, "conv1": 1, "conv3": 3, "conv5": 5}
        widest = max(sum(side[op.name] - 1 for op in path) for path in found)
        assert counts.receptive_field(SPACE, row) == 1 + widest


@pytest.mark.parametrize(
    ("name", "side"), [("skip", 1), ("conv1x5", 5), ("conv3d2", 5), ("dwconv5", 5), ("avgpool5", 5), ("maxpool3", 3)]
)
def test_extent(name, side):
    assert counts.extent(get_operation(name)) == side


def test_the_receptive_field_is_what_a_value_reads():
    """By the linear network of ones: where node 3's middle value is not moved, it does not read."""
    space = CellSpace((3, 5))
    row = space.parse("0>1:conv3 0>3:conv5 1>2:avgpool 2>3:conv3")
    impulse = np.zeros((15, 15))
    impulse[7, 7] = 1
    ones = {"conv3": np.ones((3, 3)), "conv5": np.ones((5, 5)), "avgpool": np.ones((3, 3))}
    values = {0: impulse}
    for source, target, operation in space.held(row):
        moved = correlate2d(values[source], ones[operation.name], mode="same")
        values[target] = values.get(target, 0) + moved
    assert counts.receptive_field(space, row) == np.count_nonzero(values[3][7])


def untrained(spec=SPEC, text=TEXT, batch=6, seed=0):
    """A network with a fixed cell."""
    bank = jax.tree.map(lambda leaf: leaf[0], make_bank(jax.random.key(seed), spec))
    images = jax.random.normal(jax.random.key(seed + 1), (batch, *spec.image_shape))
    labels = jnp.arange(batch) % spec.num_classes
    return Untrained(spec, spec.space.parse(text), bank, images, labels, jax.random.key(seed + 2))


def of(proxy, net):
    """A proxy of a network, compiled as a whole: operation by operation it takes ten times as long."""
    return jax.jit(lambda params: proxy(net._replace(params=params)))(net.params)


def fired(net):
    """Spikes of every site."""
    found = of(lambda net: net.run(net.params, net.images_BHWC, observe=lambda x: x).records, net)
    return {name: np.asarray(x, np.float64) for name, x in found.items()}


@pytest.fixture(scope="module")
def net():
    return untrained()


@pytest.fixture(scope="module")
def spikes(net):
    """Spikes of every site of the fixed cell."""
    return fired(net)


def by_image(spikes):
    return np.concatenate([x.swapaxes(0, 1).reshape(x.shape[1], -1) for x in spikes.values()], 1)


def test_hamming_and_naswot(net, spikes):
    x_BN = by_image(spikes)
    differ = np.array([[(a != b).sum() for b in x_BN] for a in x_BN])
    off = differ[~np.eye(len(x_BN), dtype=bool)]
    assert of(proxies.hamming_distance, net) == pytest.approx(off.mean() / x_BN.shape[1], rel=1e-5)
    _, expected = np.linalg.slogdet(x_BN.shape[1] - differ)
    assert of(proxies.naswot, net) == pytest.approx(expected, rel=1e-4)


def test_spike_entropy(net, spikes):
    rate = by_image(spikes).mean(0)
    rate = rate[(rate > 0) & (rate < 1)]
    bits = -(rate * np.log2(rate) + (1 - rate) * np.log2(1 - rate)).sum()
    assert of(proxies.spike_entropy, net) == pytest.approx(bits / by_image(spikes).shape[1], rel=1e-5)


def test_synaptic_operations(net, spikes):
    fans = cost.fan_out(SPEC, net.genotype)
    expected = sum(
        (x[t, b] * fans[site][..., None]).sum() for site, x in spikes.items() for t in range(2) for b in range(6)
    )
    found = proxies.synaptic_operations(SPEC, net.genotype, of(PROXIES["synops"], net))
    assert found == pytest.approx(expected / 6, rel=1e-5)


def test_snip_and_gradient_norm_are_of_the_cells_own_weights(net):
    own = network.subnetwork(SPEC, net.params, net.genotype)

    def loss(params):
        out = network.apply(SPEC, net.genotype, params, net.images_BHWC, train=True)
        return -jax.nn.log_softmax(out.logits_TBK.mean(0))[jnp.arange(6), net.labels_B].mean()

    grads = jax.jit(jax.grad(loss))(own)
    pairs = [*zip(*(map(np.asarray, jax.tree.leaves(tree)) for tree in (own, grads)), strict=True)]
    assert of(proxies.snip, net) == pytest.approx(sum(np.abs(w * g).sum() for w, g in pairs), rel=1e-4)
    assert of(proxies.gradient_norm, net) == pytest.approx(np.sqrt(sum((g**2).sum() for _, g in pairs)), rel=1e-4)


def test_jacobian_covariance(net):
    def total(x):
        return network.apply(SPEC, net.genotype, net.params, x, train=True).logits_TBK.mean(0).sum()

    slopes = np.asarray(jax.jit(jax.grad(total))(net.images_BHWC), np.float64).reshape(6, -1)
    values = np.linalg.eigvalsh(np.corrcoef(slopes)) + 1e-5
    assert of(proxies.jacobian_covariance, net) == pytest.approx(-(np.log(values) + 1 / values).sum(), rel=1e-3)


def linear_flow(spec, row, params, scale):
    """Sum of outputs of the network of absolute weights times a number, without neurons and norms, of ones."""

    def conv(x_HWC, name):
        kernel = scale * np.abs(np.asarray(params[name]["kernel"], np.float64))
        y = [sum(correlate2d(x_HWC[..., i], kernel[..., i, o], mode="same") for i in range(kernel.shape[2]))
             for o in range(kernel.shape[3])]  # fmt: skip
        return np.stack(y, -1)

    def cell(name, x):
        values = {0: x}
        for source, target, operation in sorted(spec.space.held(row), key=lambda edge: edge[:2]):
            y = values[source]
            if operation.name == "avgpool":
                y = np.stack(
                    [correlate2d(y[..., c], np.full((3, 3), 1 / 9), mode="same") for c in range(y.shape[-1])], -1
                )
            elif operation.name != "skip":
                y = conv(y, f"{name}.e{source}{target}.{operation.name}")
            values[target] = values.get(target, 0) + y
        return values[3]

    x = cell("cell1", conv(np.ones(spec.image_shape), "stem"))
    x = conv(x, "transition.conv").reshape(4, 2, 4, 2, -1).mean((1, 3))
    return (cell("cell2", x).mean((0, 1)) @ (scale * np.abs(np.asarray(params["head.out"]["kernel"])))).sum()


def test_synflow_is_the_derivative_by_a_common_scale(net):
    """Euler: sum of w·dR/dw is the derivative of R(s·w) by s at 1; in R of even steps its error is of order h²."""
    above, below = (linear_flow(SPEC, net.genotype, net.params, 1 + h) for h in (1e-4, -1e-4))
    assert of(proxies.synflow, net) == pytest.approx(np.log((above - below) / 2e-4), abs=1e-4)


def test_zen(net):
    """Its two terms apart: the currents of two passes, and the variances that norms divide by."""
    x, e = (np.asarray(jax.random.normal(key, net.images_BHWC.shape)) for key in jax.random.split(net.key))
    kept = {}

    class Kept(network.Pass):
        def fire(self, site, x_TBN, neuron=None):
            kept[site, "currents"] = np.asarray(x_TBN, np.float64)
            return super().fire(site, x_TBN, neuron)

        def normed(self, name, x_TBHWC):
            kept[name] = np.asarray(x_TBHWC, np.float64).var((1, 2, 3), ddof=1)
            return super().normed(name, x_TBHWC)

    def run(images):
        net_pass = Kept(SPEC, net.genotype, net.params, None, {}, train=True, observe=None)
        net_pass.run(net_pass.stem(jnp.asarray(images)), 2, None)
        return dict(kept)

    def deviation(variance_TC):  # running averages hold later time steps a little heavier
        return np.sqrt(np.average(variance_TC, axis=0, weights=np.array([0.9, 1.0])[-len(variance_TC) :]).mean())

    still, moved = run(x), run(x + np.float32(0.01) * e)
    names = [name for name, layer in SPEC.layers(net.genotype).items() if layer.norm]
    assert {len(still[name]) for name in names} == {1, 2}
    difference = np.linalg.norm((still["last", "currents"] - moved["last", "currents"]).ravel()) / np.sqrt(6)
    expected = np.log(difference) + sum(np.log(deviation(still[name])) for name in names)
    assert of(proxies.zen, net) == pytest.approx(expected, rel=2e-3)


def test_linear_probe_is_ridge_regression():
    net = untrained(batch=40)
    x = fired(net)["last"].mean((0, 2, 3))
    x = (x - x[:20].mean(0)) / (x[:20].std(0) + 1e-3)
    x = np.concatenate([x, np.ones((40, 1))], 1)
    # Ridge as least squares: a row of 1 for each weight, whose target is 0.
    a = np.concatenate([x[:20], np.eye(x.shape[1])])
    y = np.concatenate([np.eye(3)[np.asarray(net.labels_B)[:20]], np.zeros((x.shape[1], 3))])
    right = (x[20:] @ np.linalg.lstsq(a, y)[0]).argmax(1) == np.asarray(net.labels_B)[20:]
    assert of(proxies.linear_probe, net) == pytest.approx(right.mean(), abs=1e-6)


@pytest.fixture(scope="module")
def data():
    return load_dataset("mnist5k", limit_train=60, limit_validation=1, limit_test=1)


CONTRACT = NetworkSpec((28, 28, 1), 10, OPERATIONS, channels=2, time_steps=2, stem_stride=2)
CELLS = ("0>3:maxpool3", "0>1:dwconv3 0>3:maxpool3 1>3:dwconv3", "0>1:maxpool3 0>3:dwconv3 1>3:maxpool3")


# Of the rest, each compiles a gradient or draws of its own; what they compute has tests above.
QUICK = {*COUNTS, "sahd_paper", "hamming", "snip", "zen", "linear_probe", "synops"}


@pytest.mark.parametrize("name", mostly_slow(predictor_names(), QUICK.__contains__))
def test_every_predictor_keeps_the_contract(name, data):
    rows = np.stack([OPERATIONS.parse(text) for text in CELLS])
    key = jax.random.key(3)
    found = predict(name, rows, CONTRACT, data, key, replicates=2, batch=16)
    assert found.values.shape == (3, 2)
    assert not np.isnan(found.values).any()  # -inf is an answer: the least
    assert found.seconds > 0
    if name != "linear_probe":  # of 8 images as many may be right
        assert len(np.unique(found.values[:, 0])) > 1
    alone = predict(name, rows[1:2], CONTRACT, data, key, replicates=2, batch=16)
    np.testing.assert_allclose(alone.values, found.values[1:2], rtol=1e-5)


FIXED = [name for name in PROXIES if name != "synops"]


@pytest.mark.parametrize("name", mostly_slow(FIXED, lambda name: name == "snip"))
def test_a_fixed_genotype_of_the_same_weights_gives_the_same(name, data):
    row, key = OPERATIONS.parse(CELLS[1]), jax.random.key(3)
    found = predict(name, row[None], CONTRACT, data, key, replicates=2, batch=16)
    images_key, banks_key = jax.random.split(key)
    chosen = np.asarray(jax.random.permutation(images_key, 60))[:32]
    x = normalise(jnp.asarray(data.train.images[chosen]), data.mean, data.std)[:16]
    bank = jax.tree.map(lambda leaf: leaf[0], make_bank(banks_key, CONTRACT, 2))
    fixed = Untrained(CONTRACT, row, bank, x, data.train.labels[chosen[:16]], jax.random.fold_in(key, 0))
    np.testing.assert_allclose(of(PROXIES[name], fixed), found.values[0, 0], rtol=2e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "magic"}, "predictor 'magic' is unknown; known: depth"),
        ({"batch": 100}, "batch=100 times replicates=1 must be from 2 to the 60"),
        ({"genotypes": np.zeros((0, 6), int)}, "n >= 1"),
    ],
)
def test_refused(change, words, data):
    given = {"name": "hamming", "genotypes": [OPERATIONS.parse(CELLS[0])], "batch": 16} | change
    with pytest.raises(ValueError, match=words):
        predict(given["name"], given["genotypes"], CONTRACT, data, jax.random.key(0), batch=given["batch"])
