"""Parts of a network: their sums are the whole's, each alone is what its arrays and connections say."""

import itertools

import numpy as np
import pytest

from small_networks import KINDS, SPACES, make_spec, raw_rows
from spikernel_jax.snn import cost
from spikernel_jax.snn.breakdown import parts_of, whole_of
from spikernel_jax.snn.spec import CELLS


def spikes_of(spec, row, rate):
    """Spikes at every site, [H, W] by site, of neurons that fire at one rate."""
    fans = cost.fan_out(spec, row)
    return {
        site: np.full(fan.shape, rate * spec.time_steps * spec.sites(row)[site].neurons / fan.size)
        for site, fan in fans.items()
    }


@pytest.mark.parametrize("head", ["gap", "snasnet"])
@pytest.mark.parametrize("name", SPACES)
@KINDS
def test_parts_sum_to_the_whole(name, head, kind):
    spec = make_spec(SPACES[name], head, **kind)
    rng = np.random.default_rng(0)
    for row in [*raw_rows(spec.space, 3, 7), np.stack([*raw_rows(spec.space, 2, 8)])]:
        spikes = {site: 5 * rng.random(fan.shape) for site, fan in cost.fan_out(spec, row).items()}
        parts = parts_of(spec, row, spikes)
        total = cost.costs(spec, row[None], 8)
        assert sum(part.parameters for part in parts) == total.parameters[0]
        assert sum(part.state for part in parts) == total.state[0]
        assert sum(part.macs for part in parts) == cost.macs(spec, row)
        synops = cost.synaptic_operations(spec, row, spikes)
        assert sum(part.synops for part in parts) == pytest.approx(synops)
        assert sum(part.energy_nj for part in parts) == pytest.approx(cost.energy_nj(spec, row, synops))
        names = [part.name for part in parts]
        assert {part.reads for part in parts if part.connections} <= set(spec.sites(row))
        assert {part.name for part in parts if part.neurons} == set(spec.sites(row))
        learned = len(spec.neuron.learned)
        assert {n for n, count in zip(names, map(names.count, names), strict=True) if count > 1} <= {"last"}
        assert all(part.parameters == learned for part in parts if part.neurons)


def inside(size, k):
    """Pairs of an output's place and a tap of a k by k kernel that falls within the image."""
    reach = range(-(k // 2), k // 2 + 1)
    return sum(
        0 <= y + i < size[0] and 0 <= x + j < size[1]
        for y, x, i, j in itertools.product(range(size[0]), range(size[1]), reach, reach)
    )


def test_each_part_alone():
    spec = make_spec(SPACES["varied"], "snasnet")
    row = spec.space.parse("0>1:conv3 1>3:dwconv5 0>3:skip")
    parts = {part.name: part for part in parts_of(spec, row) if not part.neurons}
    for index, cell in enumerate(CELLS):
        size, c = spec.cell_size(index), spec.cell_channels(index)
        conv, separable = parts[f"{cell}.e01.conv3"], parts[f"{cell}.e13.dwconv5"]
        assert conv.parameters == 9 * c * c + 2 * c
        assert conv.reads == f"{cell}.node0"
        assert conv.connections == conv.conventional == inside(size, 3) * c * c
        assert conv.macs == 0
        pointwise = size[0] * size[1] * c * c
        assert separable.connections == inside(size, 5) * c
        assert separable.conventional == separable.connections + pointwise
        assert separable.macs == spec.time_steps * pointwise
    assert parts["head.hidden"].conventional == spec.features * spec.head_hidden  # pooled first
    assert parts["head.hidden"].connections > parts["head.hidden"].conventional
    assert parts["head.out"].conventional == spec.head_hidden * spec.outputs
    assert parts["stem"].conventional == parts["stem"].macs == cost.stem_macs(spec)
    assert np.isnan(parts["transition.conv"].synops)


@pytest.mark.parametrize("name", ["pair", "varied", "feedback"])
def test_at_the_break_even_rate_both_networks_take_as_much(name):
    spec = make_spec(SPACES[name], time_steps=3)
    for row in raw_rows(spec.space, 3, 1):
        rate = whole_of(spec, row, parts_of(spec, row)).break_even_rate
        for times, cheaper in ((0.9, rate > 0), (1.0, None), (1.1, rate < 0)):
            parts = parts_of(spec, row, spikes_of(spec, row, times * rate))
            found = whole_of(spec, row, parts)
            assert found.firing_rate == pytest.approx(times * rate)
            if cheaper is None:
                assert found.energy_nj == pytest.approx(found.conventional_nj)
            else:
                assert (found.energy_nj < found.conventional_nj) == cheaper
        assert found.conventional_nj == pytest.approx(4.6 * sum(part.conventional for part in parts) / 1000)
