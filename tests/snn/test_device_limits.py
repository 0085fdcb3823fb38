"""Devices: figures with sources, what a network needs by hand, and which limits it breaks."""

import dataclasses

import numpy as np
import pytest

from spikernel_jax import CellSpace, NetworkSpec
from spikernel_jax.snn.cost import costs
from spikernel_jax.snn.devices import LIMITS, NO_LIMIT, Budget, Device, broken, device_of, devices, needs
from spikernel_jax.snn.footprint import footprints

SPEC = NetworkSpec((8, 8, 2), 5, CellSpace((3, 5)), channels=4, time_steps=3)
CELL = SPEC.space.parse("0>1:conv3 0>3:skip 1>3:conv5")


def reached(side: int, kernel: int) -> int:
    """Places that windows around all places of a square reach, walked one by one."""
    half = kernel // 2
    around = [(y + i, x + j) for y in range(side) for x in range(side)
              for i in range(-half, half + 1) for j in range(-half, half + 1)]  # fmt: skip
    return sum(0 <= y < side and 0 <= x < side for y, x in around)


def test_needs_by_hand():
    found = needs(SPEC, CELL)
    places, small = 8 * 8, 4 * 4
    # LIFs: node 0 (conv3), node 1 (conv5) and the transition at 4 channels; the same and the last at 8
    assert found["neurons"] == 3 * places * 4 + 3 * small * 8
    convolutions = reached(8, 3) * 4 * 4 + reached(8, 5) * 4 * 4 + reached(4, 3) * 8 * 8 + reached(4, 5) * 8 * 8
    fixed = reached(8, 3) * 2 * 4 + reached(8, 3) * 4 * 8 + small * 8 * 5
    assert found["synapses"] == convolutions + fixed
    assert found["fan_in"] == 5 * 5 * 8
    assert (found["kernel"], found["channels"], found["side"]) == (5, 8, 8)
    assert found["layers"] == 2 * 2 + 3  # of both cells; stem, transition and head
    bytes_of = footprints(SPEC, CELL[None])
    assert found["sram"] == bytes_of.written[0]
    assert found["memory"] == found["sram"] + found["flash"] == bytes_of.written[0] + bytes_of.constants[0]
    assert list(found) == list(LIMITS)


def test_the_width_of_currents_counts():
    sram = [needs(SPEC, CELL, width=width)["sram"] for width in (8, 16)]
    assert sram == [int(footprints(SPEC, CELL[None], 8, width).written[0]) for width in (8, 16)]
    between = Device("mine", "", (("sram", sum(sram) // 2),), (8,), "me", "")
    assert broken(between, SPEC, CELL) == []
    assert broken(between, SPEC, CELL, width=16)[0].startswith("sram ")


@pytest.mark.parametrize("limit", LIMITS)
def test_a_limit_is_broken_by_one_more(limit):
    most = needs(SPEC, CELL)[limit]
    device = Device("mine", "", ((limit, most),), (8,), "me", "")
    assert broken(device, SPEC, CELL) == []
    tighter = dataclasses.replace(device, limits=((limit, most - 1),))
    (phrase,) = broken(tighter, SPEC, CELL)
    assert phrase.startswith(limit.replace("_", "-"))
    assert "weights of 4 bits, where it has 8" in broken(device, SPEC, CELL, bits=4)
    rows = SPEC.space.enumerate()[:40]
    fits = Budget(NO_LIMIT, 8, tighter).fits(SPEC, rows)
    assert fits.tolist() == [needs(SPEC, row)[limit] < most for row in rows]


def test_a_budget_of_bytes_alone():
    rows = SPEC.space.enumerate()[:40]
    memory = costs(SPEC, rows, 6).memory_bytes
    budget = Budget(int(np.median(memory)), 6)
    assert budget.fits(SPEC, rows).tolist() == (memory <= np.median(memory)).tolist()
    assert "6 bits" in budget.text


def test_every_device_has_limits_and_a_source():
    known = devices()
    assert {"loihi-2", "spinnaker2", "akida", "xylo", "speck", "cortex-m7", "cortex-m4"} <= known.keys()
    for name, device in known.items():
        assert device.limits, name
        assert device.source, name
        assert device.note, name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mine = 3", "must be a table"),
        ('[mine]\nsram = 0\nsource = "me"', "sram=0 must be a whole number above 0"),
        ("[mine]\nsram = 4", "want texts, and a source"),
        ('[mine]\nweight_bits = 8\nsource = "me"', "weight_bits=8 must be whole numbers"),
        ('[other]\nsource = "me"', "is unknown; known: other"),
        ("[", "no file of devices"),
    ],
)
def test_files_that_are_none(text, words, tmp_path):
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(ValueError, match=words):
        device_of(f"{tmp_path}/mine.toml:mine")


def test_a_device_of_ones_own(tmp_path):
    (tmp_path / "mine.toml").write_text('[mine]\nneurons = 7\nsource = "a datasheet"\n')
    device = device_of(f"{tmp_path}/mine.toml:mine")
    assert broken(device, SPEC, CELL) == [f"neurons {needs(SPEC, CELL)['neurons']:,} of 7"]
