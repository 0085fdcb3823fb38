"""The costs of a network on the screen and in a file: of a checkpoint, of a cell, and what is refused."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import scripts
from spikernel_jax import CellSpace, Model, NetworkSpec, NeuronSpec, load_dataset, save_model
from spikernel_jax.io.units import format_bytes
from spikernel_jax.snn import cost, network
from spikernel_jax.snn.footprint import footprints
from spikernel_jax.training.evaluation import measure_spikes

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "inspect_model.py"
CELL = "0>1:conv3 0>2:conv5 1>2:conv3 2>3:conv3 0>3:skip"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    spec = NetworkSpec((28, 28, 1), 10, CellSpace((3, 5)), channels=2, time_steps=2, stem_stride=2)
    row = tuple(spec.space.parse(CELL).tolist())
    model = Model(spec, row, *network.init(jax.random.key(0), spec, row), (0.13,), (0.31,), {"data": "mnist5k"})
    folder = tmp_path_factory.mktemp("models") / "model"
    save_model(folder, model)
    return folder, model


def test_a_checkpoint_is_measured_on_validation_images(checkpoint, tmp_path, capsys):
    folder, model = checkpoint
    scripts.start(SCRIPT, str(folder), "--images", "30", "--bits", "4", "--json", str(tmp_path / "costs.json"))
    found = json.loads((tmp_path / "costs.json").read_text())
    spikes = measure_spikes(model, load_dataset("mnist5k", limit_validation=30).validation)
    row = np.asarray(model.genotype)
    synops = cost.synaptic_operations(model.spec, row, spikes)
    assert found["whole"]["synops"] == pytest.approx(synops)
    assert found["whole"]["energy_nj"] == pytest.approx(cost.energy_nj(model.spec, row, synops))
    assert found["whole"]["memory_bytes"] == cost.costs(model.spec, row[None], 4).memory_bytes[0]
    neurons = sum(site.neurons for site in model.spec.sites(row).values())
    rate = sum(own.sum() for own in spikes.values()) / (2 * neurons)
    assert found["whole"]["firing_rate"] == pytest.approx(rate)
    said = capsys.readouterr().out
    assert "of 30 validation images of mnist5k" in said
    for part in found["parts"]:
        assert f"| {part['name']} |" in said
    assert "not counted: batch norm" in said
    bytes_of = footprints(model.spec, row[None], 4)
    assert f"as exported C: {format_bytes(int(bytes_of.constants[0]))} of constants" in said
    assert "fits: cortex-m4" in said
    assert "not xylo: neurons" in said


def test_several_spikes_a_time_step_have_a_bit_each_in_exported_c(checkpoint, tmp_path, capsys):
    _, model = checkpoint
    spec = dataclasses.replace(model.spec, neuron=NeuronSpec(reset="soft", max_spikes=4))
    save_model(tmp_path / "several", dataclasses.replace(model, spec=spec))
    scripts.start(SCRIPT, str(tmp_path / "several"), "--images", "0")
    written, of_one = (int(footprints(own, [model.genotype], 8).written[0]) for own in (spec, model.spec))
    assert written > of_one
    assert f"{format_bytes(written)} written to" in capsys.readouterr().out


def test_a_cell_in_closed_form(tmp_path, capsys):
    given = ("--cell", "0>1:dwconv5 1>3:conv3@0.5 0>3:skip", "--channels", "3", "--time-steps", "4")
    scripts.start(SCRIPT, *given, "--json", str(tmp_path / "costs.json"))
    found = json.loads((tmp_path / "costs.json").read_text())
    space = CellSpace(operations=("zero", "skip", "dwconv5", "conv3@0.5"))
    spec = NetworkSpec((28, 28, 1), 10, space, channels=3, time_steps=4, stem_stride=2)
    row = space.parse("0>1:dwconv5 1>3:conv3@0.5 0>3:skip")
    assert found["whole"]["parameters"] == cost.parameters_of(spec, row)
    assert found["whole"]["macs"] == cost.macs(spec, row)
    assert found["whole"]["synops"] is None
    assert "not measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "give the folder of a checkpoint, or --cell, one of both"),
        (("absent",), "absent: no such model folder"),
        (("absent", "--cell", "0>3:conv3"), "one of both"),
        (("{model}", "--channels", "4"), "--channels and --time-steps are of --cell"),
        (("{model}", "--bits", "0"), "bits=0"),
        (("{model}", "--images", "-1"), "--images -1 must be at least 0"),
        (("{model}", "--data", "mars"), "mars"),
        (("{other}",), "does not say which data it was trained on"),
        (("{other}", "--data", "mnist5k"), "images are (28, 28, 1), the checkpoint's (8, 8, 1)"),
        (("--cell", "0>3:conv4"), "conv4"),
        (("--cell", "hello"), "hello"),
    ],
)
def test_bad_input_is_one_line(options, words, checkpoint, tmp_path, capsys):
    target = tmp_path / "costs.json"
    spec = NetworkSpec((8, 8, 1), 2, CellSpace((3,)), channels=1, time_steps=1)
    row = tuple(spec.space.parse("0>3:skip").tolist())
    save_model(tmp_path / "other", Model(spec, row, *network.init(jax.random.key(0), spec, row), (0.5,), (0.3,)))
    given = [option.format(model=checkpoint[0], other=tmp_path / "other") for option in options]
    assert words in scripts.refused(SCRIPT, capsys, *given, "--json", str(target))
    assert not target.exists()
