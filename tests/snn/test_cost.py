"""Closed forms of cost against arrays that exist, a simulated schedule, and counted spikes."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from small_networks import KINDS, LEARNING, SPACES, make_spec, raw_rows
from spikernel_jax.cells.space import CellSpace
from spikernel_jax.snn import cost, layers, network
from spikernel_jax.snn.neurons import NeuronSpec
from spikernel_jax.snn.spec import NetworkSpec

KEY = jax.random.key(0)
READERS = ("conv", "dwconv", "maxpool")


def lif_of(name: str) -> str:
    """What tells a LIF from others at the same node."""
    return "@0.5" if name.endswith("@0.5") else ""


def count_parameters(spec: NetworkSpec, genotype: np.ndarray) -> int:
    params = jax.eval_shape(lambda: network.init(KEY, spec, genotype)[0])
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def oracle_cell(spec: NetworkSpec, cell: int, row: list[int]) -> tuple[int, int]:
    """(membranes and feedback, live values) of one cell, by walking its schedule event by event."""
    space = spec.space
    held = dict(zip(space.edges, row, strict=True))
    size = spec.cell_size(cell)[0] * spec.cell_size(cell)[1] * spec.cell_channels(cell)
    names = {edge: space.operations[code] for edge, code in held.items() if code}
    reading = {e: name for e, name in names.items() if spec.shortcut == "spike" or name.startswith(READERS)}
    kept = len({(source, lif_of(name)) for (source, _), name in reading.items()}) + (3 if space.feedback else 0)

    reads = [  # which earlier values each event reads, in the order of computation
        (f"node{target}", [s for s in range(target) if held[s, target]]) for target in (1, 2, 3)
    ]
    if space.feedback:  # written into the state of the feedback, so nothing new comes alive
        reads += [(f"feedback{target}", [s for s in range(target + 1, 4) if held[s, target]]) for target in range(3)]
    # What cell 1 of a forward network reads as node 0 is the stem's current itself, counted in the state.
    borrowed = {0} if cell == 0 and not space.feedback else set()
    alive, peak = {0}, 0
    for moment, (what, _) in enumerate(reads):
        if what.startswith("node"):
            alive.add(int(what[-1]))
        wanted = {s for _, sources in reads[moment:] for s in sources} | {3}
        alive = {node for node in alive if node in wanted or what == f"node{node}"}
        peak = max(peak, len(alive - borrowed))
    return kept * size, peak * size


def oracle(spec: NetworkSpec, pair: np.ndarray) -> tuple[int, int]:
    """(state, live) of a network."""
    h, w = spec.cell_size(0)
    state = h * w * spec.channels  # the stem's current
    # Between the cells: spikes in, pooled map out, as large as the arrays of a pass are.
    convolved = jnp.zeros((1, 1, h, w, 2 * spec.channels))
    live = h * w * spec.channels + jax.eval_shape(lambda: layers.downsample(convolved, 2)).size
    for cell in range(2):
        h, w = spec.cell_size(cell)
        state += h * w * spec.cell_channels(cell)  # the LIF after the cell
        inside, here = oracle_cell(spec, cell, pair[cell].tolist())
        state, live = state + inside, max(live, here)
    return state + (spec.head_hidden if spec.head == "snasnet" else 0), live


@pytest.mark.parametrize("head", ["gap", "snasnet"])
@pytest.mark.parametrize("name", SPACES)
@KINDS
def test_costs_equal_counts_of_arrays_and_simulated_liveness(name, head, kind):
    space = SPACES[name]
    spec = make_spec(space, head, stem_stride=2 if name == "four" else 1, **kind)
    singles = np.concatenate([raw_rows(space, 12, 1), space.sample(KEY, 12)])
    pairs = np.stack([raw_rows(space, 12, 2), raw_rows(space, 12, 3)], 1)
    for rows in (singles, pairs):
        got = cost.costs(spec, rows, bits=8)
        for i, row in enumerate(rows):
            pair = np.stack([row, row]) if row.ndim == 1 else row
            state, live = oracle(spec, pair)
            parameters = count_parameters(spec, row)
            convs = sum(sum("conv" in operation.name for *_, operation in space.held(cell)) for cell in pair)
            assert got.parameters[i] == parameters
            assert (got.state[i], got.live[i], got.conv_edges[i]) == (state, live, convs)
            assert got.memory_bytes[i] == parameters + state + live
    assert all(field.dtype == np.int64 for field in got)


@KINDS
def test_state_equals_the_state_that_a_pass_keeps(kind):
    space = SPACES["feedback"]
    spec = make_spec(space, "snasnet", **kind)
    rows = raw_rows(space, 3, 5)
    for row in rows:
        params, stats = network.init(KEY, spec, row)

        def end(params=params, stats=stats, row=row):
            return network.apply(spec, row, params, jnp.zeros((1, 9, 8, 3)), stats=stats).state

        values = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(end)))
        stem_current = 9 * 8 * spec.channels
        assert cost.costs(spec, row[None]).state[0] == values + stem_current


LONE, CHAIN, FULL = (
    "0>3:skip",
    "0>1:skip 0>3:skip 1>2:skip 2>3:skip",
    "0>1:skip 0>2:skip 0>3:skip 1>2:skip 1>3:skip 2>3:skip",
)
CELL1, CELL2 = 9 * 8 * 2, 4 * 4 * 4  # values of one node


@pytest.mark.parametrize(
    ("feedback", "first", "second", "live"),
    [
        (False, LONE, LONE, CELL1 + CELL2),  # the transition: cell 1 keeps node 3 only, cell 2 two nodes
        (False, CHAIN, LONE, 2 * CELL1),
        (False, FULL, LONE, 3 * CELL1),  # node 0 is the stem's current, counted in the state
        (False, LONE, FULL, 4 * CELL2),  # node 0 of cell 2 is the transition's output
        (True, LONE, LONE, 2 * CELL1),  # node 0 is stem plus feedback, a new array
        (True, FULL, LONE, 4 * CELL1),
    ],
)
def test_live_is_that_of_the_worst_of_cells_and_transition(feedback, first, second, live):
    space = SPACES["feedback"] if feedback else SPACES["pair"]
    pair = np.stack([space.parse(first), space.parse(second)])
    assert cost.costs(make_spec(space), pair[None]).live.tolist() == [live]


def test_shortcuts_of_spikes_cost_membranes_and_learned_scalars_parameters():
    space = SPACES["pair"]
    rows = np.stack([space.parse(LONE), space.parse(CHAIN), space.parse("0>3:conv3")])
    plain, got = (
        cost.costs(make_spec(space, **kind), rows, bits=16) for kind in ({}, {"neuron": LEARNING, "shortcut": "spike"})
    )
    nodes = np.array([1, 3, 1])  # that hand on spikes, in each cell
    assert (got.state - plain.state == (CELL1 + CELL2) * (nodes - [0, 0, 1])).all()
    assert (got.parameters - plain.parameters == 2 * (2 * nodes + 2)).all()
    assert (got.live == plain.live).all()
    values = got.parameters + got.state + got.live
    assert (got.memory_bytes == 2 * values).all()


def test_every_cell_of_a_space_has_a_live_set_within_bounds():
    space = SPACES["pair"]
    got = cost.costs(make_spec(space), space.enumerate())
    assert set(got.live) == {CELL1 + CELL2, 2 * CELL1, 3 * CELL1}


def test_memory_scales_with_bits_and_rounds_up():
    space = SPACES["pair"]
    spec = make_spec(space)
    rows = space.sample(KEY, 20)
    plain = cost.costs(spec, rows)
    values = plain.parameters + plain.state + plain.live
    for bits in (1, 4, 7, 8, 16, 32, 64):
        got = cost.costs(spec, rows, bits)
        assert (got.memory_bytes == [(int(v) * bits + 7) // 8 for v in values]).all()
        assert (got.parameters == plain.parameters).all()


def brute_force_synops(spec: NetworkSpec, row: np.ndarray, spikes: dict[str, np.ndarray]) -> float:
    """Spikes [T, H, W, C] times the connections they drive: every output within the image is walked to."""

    def walked(site: str, k: int, channels: int) -> int:
        h, w = spikes[site].shape[1:3]
        reach = range(-(k // 2), k // 2 + 1)
        return sum(
            channels
            for _, y, x, _ in np.argwhere(spikes[site])
            for i, j in itertools.product(reach, reach)
            if 0 <= y + i < h and 0 <= x + j < w
        )

    total = 0.0
    pair = [row, row] if row.ndim == 1 else list(row)
    for cell, codes in enumerate(pair):
        for source, _, operation in spec.space.held(codes):
            if plain := re.match(r"(dw)?conv(\d+)", operation.name):
                site = f"cell{cell + 1}.node{source}{lif_of(operation.name)}"
                total += walked(site, int(plain[2]), 1 if plain[1] else spec.cell_channels(cell))
    total += walked("transition", 3, 2 * spec.channels)
    if spec.head == "snasnet":  # pooling drops the last rows and columns that fill no window
        h, w = (side // spec.head_pool * spec.head_pool for side in spikes["last"].shape[1:3])
        total += int(spikes["last"][:, :h, :w].sum()) * spec.head_hidden
    else:
        total += int(spikes["last"].sum()) * spec.num_classes
    if spec.head == "snasnet":
        total += int(spikes["head"].sum()) * spec.num_classes * spec.neurons_per_class
    return total


@pytest.mark.parametrize("head", ["gap", "snasnet"])
@pytest.mark.parametrize("name", SPACES)
@KINDS
def test_synaptic_operations_equal_a_brute_force_count(name, head, kind):
    spec = make_spec(SPACES[name], head, **kind)
    rng = np.random.default_rng(0)
    for row in [*raw_rows(spec.space, 4, 7), np.stack([*raw_rows(spec.space, 2, 8)])]:
        sites = spec.sites(row)
        assert set(sites) == set(cost.fan_out(spec, row))
        shapes = {
            name: (*fan.shape, site.neurons // fan.size)
            for (name, site), fan in zip(sites.items(), (cost.fan_out(spec, row)[name] for name in sites), strict=True)
        }
        spikes = {name: rng.integers(2, size=(2, *shape)) for name, shape in shapes.items()}
        counts = {name: s.sum((0, 3)) for name, s in spikes.items()}
        assert cost.synaptic_operations(spec, row, counts) == brute_force_synops(spec, row, spikes)
        everywhere = {name: np.ones_like(s) for name, s in spikes.items()}
        even = {name: float(s.sum()) for name, s in everywhere.items()}
        most = brute_force_synops(spec, row, everywhere)
        assert cost.synaptic_operations(spec, row, even) == pytest.approx(most)
        (got,) = cost.most_synaptic_operations(spec, row[None])
        assert got == pytest.approx(most * spec.time_steps / 2)
        several = dataclasses.replace(spec, neuron=NeuronSpec(reset="soft", max_spikes=4))
        assert cost.most_synaptic_operations(several, row[None])[0] == pytest.approx(4 * got)


def test_energy_counts_the_stem_once_and_every_synaptic_operation():
    spec = make_spec(SPACES["pair"], stem_stride=2)
    read = sum(  # of a 9×8 image halved, rounded up: 5×4 outputs
        0 <= 2 * y + i < 9 and 0 <= 2 * x + j < 8
        for y, x, i, j in itertools.product(range(5), range(4), (-1, 0, 1), (-1, 0, 1))
    )
    assert cost.stem_macs(spec) == read * 3 * 2
    energy = (4.6 * cost.stem_macs(spec) + 0.9 * 1000) / 1000
    varied = make_spec(SPACES["varied"])
    row = varied.space.parse("0>1:dwconv5 1>3:dwconv5 0>3:conv3")
    pointwise = 2 * (9 * 8 * 2 * 2 + 4 * 4 * 4 * 4)  # two edges of both cells: what goes over channels reads no spikes
    assert cost.macs(varied, row) == cost.stem_macs(varied) + varied.time_steps * pointwise
    assert cost.energy_nj(spec, [0, 0, 0, 1, 0, 0], 1000.0) == pytest.approx(energy)
    whole = ((3.1 + 0.1) * (energy * 1000 - 0.9 * 1000) / 4.6 + 0.1 * 1000) / 1000
    assert cost.energy_nj(spec, [0, 0, 0, 1, 0, 0], 1000.0, integers=True) == pytest.approx(whole)


@pytest.mark.parametrize("bits", [0, 65, -8, 8.0, None])
def test_refuses_a_width_no_device_has(bits):
    spec = make_spec(SPACES["pair"])
    with pytest.raises(ValueError, match=f"bits={bits!r}"):
        cost.costs(spec, [[0, 0, 0, 1, 0, 0]], bits)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([0, 0, 0, 1, 0, 0], "shape"),
        ([[0, 0, 0, 1, 0]], "shape"),
        ([[[0, 0, 0, 1, 0, 0]] * 3], "shape"),
        ([[0, 0, 0, 0, 0, 0]], "edge 0>3"),
        ([[0, 0, 0, 5, 0, 0]], "codes must be"),
        ([[0, 0, 0, 1, 0, -1]], "codes must be"),
        ([[0, 0, 0, 1.5, 0, 0]], "dtype"),
    ],
)
def test_refuses_rows_that_are_no_cells(rows, words):
    with pytest.raises(ValueError, match=words):
        cost.costs(make_spec(SPACES["pair"]), rows)


@pytest.mark.parametrize(("image", "stride", "bits"), [((28, 28, 1), 2, 8), ((32, 32, 3), 1, 8), ((9, 5, 2), 2, 3)])
def test_a_class_costs_what_its_cheapest_row_costs(image, stride, bits):
    """Over all raw rows of a set: a budget rules out a cell only if no equal row fits."""
    space = CellSpace((1, 3))
    spec = NetworkSpec(image, 10, space, channels=3, stem_stride=stride)
    grid = np.indices((5,) * 6, np.int8).reshape(6, -1).T
    rows = np.unique(space.prune(grid[grid[:, 3] != 0]), axis=0)
    memory = cost.costs(spec, rows, bits).memory_bytes
    listed, of = np.unique(space.canonical(rows), axis=0, return_inverse=True)
    least = np.full(len(listed), np.iinfo(np.int64).max)
    np.minimum.at(least, of.ravel(), memory)
    np.testing.assert_array_equal(cost.costs(spec, listed, bits).memory_bytes, least)
