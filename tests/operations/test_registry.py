"""Operations of one's own: what is refused, by whom, and that the rooms above take them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spikernel_jax import CellSpace, Layer, NetworkSpec, NeuronSpec, Operation, chain, check_operation
from spikernel_jax.operations import operation as registry
from spikernel_jax.operations.operation import export_facts, get_operation, register_operation
from spikernel_jax.search.evolution import Evolution, drive
from spikernel_jax.search.pruning import prune
from spikernel_jax.snn import network
from spikernel_jax.snn.spec import spec_from_json, spec_to_json

POINTWISE = chain(lambda c: {"": Layer((1, 1, c, c), c)})
VARIED = CellSpace(operations=("zero", "skip", "conv3@0.5", "conv3~2.0", "maxpool3"), direct="any")


@pytest.fixture
def unregistered(monkeypatch):
    """What a test registers is forgotten behind it."""
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))


def operation(**fields) -> Operation:
    return Operation(**{"name": "own", "kind": "generic", "apply": lambda edge, x: x} | fields)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"name": "Own"}, "name='Own': want a small letter"),
        ({"name": "own op"}, "name='own op'"),
        ({"name": "own,3"}, "name='own,3'"),
        ({"name": 3}, "name=3"),
        ({"kind": "nonlinear"}, "kind='nonlinear' of 'own' is unknown; known: zero, identity, linear, generic"),
        ({"kind": "linear", "reads_spikes": True}, "an operation that reads spikes or has parameters is 'generic'"),
        ({"kind": "identity", "layers": lambda c: {"": Layer((), c)}}, "is 'generic'"),
        ({"threshold": 0.5}, "threshold=0.5 of 'own': it reads no spikes"),
        ({"reads_spikes": True, "threshold": -1.0}, "threshold=-1.0 of 'own' must be finite and above 0"),
        ({"reads_spikes": True, "tau": float("nan")}, "tau=nan of 'own' must be finite and above 1"),
    ],
)
def test_what_no_edge_can_hold(fields, match):
    with pytest.raises(ValueError, match=match):
        operation(**fields)


@pytest.mark.usefixtures("unregistered")
def test_a_name_is_registered_once():
    own = register_operation(operation())
    assert get_operation("own") is own
    for other in (operation(), operation(name="conv3"), operation(name="maxpool5"), operation(name="skip")):
        with pytest.raises(ValueError, match=f"operation '{other.name}' is registered already"):
            register_operation(other)
    with pytest.raises(ValueError, match="want an Operation"):
        register_operation("own")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"apply": lambda edge, x: x[:, :, 1:]}, r"makes \(3, 2, 5, 5, 4\) of \(3, 2, 6, 5, 4\)"),
        ({"apply": lambda edge, x: x / 0}, "want finite values"),
        ({"apply": lambda edge, x: x - x.mean(0)}, "mixes time steps"),
        ({"apply": lambda edge, x: edge.weights() * x}, "reads weights of layer '', which `layers` lacks"),
        ({"layers": lambda c: {"a": Layer((1, 1, c, c), c)}}, "declares layer 'a' and does not read its norm"),
        ({"kind": "linear", "apply": lambda edge, x: abs(x)}, "is no linear one"),
        ({"kind": "linear", "apply": lambda edge, x: x + 1}, "is no linear one"),
        ({"kind": "identity", "apply": lambda edge, x: 2 * x}, "is no identity"),
        ({"kind": "zero"}, "is no zero"),
        ({"fan_out": lambda size, c: np.ones(3)}, r"fan_out gives float64 \(3,\)"),
        (
            {"reads_spikes": True, **POINTWISE, "fan_out": lambda size, c: np.zeros(size, int)},
            "fan_out is 0, yet it has weights",
        ),
        (
            {"layers": lambda c: {"": Layer((c,), c, norm=False)}, "apply": lambda edge, x: x + 0 * edge.weights()},
            "the gradient of layer '' for its weights is zero",
        ),
    ],
)  # fmt: skip
def test_the_check_names_what_is_wrong(fields, match):
    with pytest.raises(ValueError, match=match):
        check_operation(operation(**fields))


@pytest.mark.usefixtures("unregistered")
def test_a_shape_that_does_not_fit_is_one_line():
    register_operation(operation(name="cropping", apply=lambda edge, x: x[:, :, 1:]))
    space = CellSpace(operations=("zero", "skip", "cropping"))
    spec = NetworkSpec((6, 6, 1), 2, space, channels=2, time_steps=2)
    row = tuple(space.parse("0>3:cropping").tolist())
    params, _ = network.init(jax.random.key(0), spec, row)
    with pytest.raises(ValueError, match="operation 'cropping' makes") as error:
        network.apply(spec, row, params, jnp.zeros((1, 6, 6, 1)), train=True)
    assert "\n" not in str(error.value)


def test_a_neuron_that_cannot_be_is_named():
    with pytest.raises(
        ValueError, match=r"operation 'conv3@0\.5': v_reset=0\.6 must be finite, below v_threshold=0\.5"
    ):
        NetworkSpec((6, 6, 1), 2, VARIED, neuron=NeuronSpec(v_reset=0.6))


def test_equal_neurons_share_a_lif():
    """A threshold that is the network's own is no threshold of its own."""
    space = CellSpace(operations=("zero", "conv3", "conv1@1.0", "conv1@0.5", "conv1@0.5~2.0", "conv5@0.5"))
    spec = NetworkSpec((6, 6, 1), 2, space)
    assert [reader.suffix for reader in spec.readers] == ["", "@0.5", "@0.5~2.0"]
    sites = spec.sites(tuple(space.parse("0>1:conv3 0>2:conv1@0.5 0>3:conv1@1.0 1>3:conv1@0.5~2.0 2>3:conv5@0.5")))
    calls = {name: site.calls for name, site in sites.items() if name.startswith("cell1")}
    assert calls == {"cell1.node0": 2, "cell1.node0@0.5": 1, "cell1.node1@0.5~2.0": 1, "cell1.node2@0.5": 1}


def test_evolution_and_pruning_take_any_space():
    def more(rows):
        return (rows == VARIED.code("conv3@0.5")).sum(-1).astype(float)

    evolved = drive(Evolution(population=8, sample=4, children=4), VARIED, more, budget=40, key=jax.random.key(0))
    assert len(np.unique(evolved.rows, axis=0)) == 40
    assert VARIED.is_valid(evolved.rows).all()
    assert evolved.scores.max() > evolved.scores[:8].max()

    small = CellSpace(operations=("zero", "skip", "maxpool3"), direct="any")
    found = prune(small, lambda masks: -masks[:, :, small.code("skip")].sum(-1).astype(float))
    assert small.is_valid(found.cell).all()
    assert small.connected(found.cell)[0]
    assert "skip" not in small.explicit(found.cell)


def test_what_an_export_needs_to_know():
    facts = export_facts(get_operation("dwconv5@0.5"), 8)
    assert facts["primitive"] == "layers"
    assert facts["threshold"] == 0.5
    assert facts["layers"]["depthwise"]["shape"] == (5, 5, 1, 8)
    assert facts["layers"]["depthwise"]["groups"] == 8
    primitives = {name: export_facts(get_operation(name), 2)["primitive"] for name in ("skip", "avgpool", "maxpool3")}
    assert list(primitives.values()) == ["identity", "average_pool", "max_pool"]


def test_spellings_of_one_operation():
    assert get_operation("conv3@1") is get_operation("conv3@1.0") is get_operation("conv3x3@1.00")
    assert get_operation("conv1d2") is get_operation("conv1")


def test_what_was_written_of_kernel_sizes_alone_is_still_read():
    """Checkpoints from before operations had names of their own."""
    spec = NetworkSpec((6, 6, 1), 2, CellSpace((3, 5)))
    fields = spec_to_json(spec)
    del fields["space"]["operations"], fields["space"]["direct"]
    assert spec_from_json(fields) == spec
