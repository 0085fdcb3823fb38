"""Instructions against firing rate: events cost what fires, a dense loop what is there."""

import json
from pathlib import Path

import pytest

import bench_events
import scripts
from embedded_models import model_of
from spikernel_jax import CellSpace, NetworkSpec, TrainConfig, load_dataset, save_model, train
from spikernel_jax.embedded import boards, c
from spikernel_jax.embedded.lower import lower

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "bench_events.py"
lacking = boards.missing()
needs_tools = pytest.mark.skipif(bool(lacking), reason=f"no {', '.join(lacking)} on this machine")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    data = load_dataset("mnist5k", limit_train=256, limit_validation=16, limit_test=16)
    spec = NetworkSpec((28, 28, 1), 10, CellSpace((3,)), channels=4, time_steps=2, stem_stride=2)
    cell = spec.space.parse("0>1:conv3 0>3:skip 1>3:conv3")
    model = train(spec, cell, data, TrainConfig(epochs=1, batch_size=32))
    save_model(folder := tmp_path_factory.mktemp("models") / "model", model)
    return folder


@needs_tools
def test_events_cost_what_fires(checkpoint, tmp_path):
    out = tmp_path / "events.json"
    scripts.start(SCRIPT, str(checkpoint), "--images", "2", "--thresholds", "0.5", "1", "8", "--json", str(out))
    often, own, seldom = json.loads(out.read_text())["rows"]
    assert often["firing_rate"] > own["firing_rate"] > seldom["firing_rate"]
    assert often["events"] > own["events"] > seldom["events"]
    assert own["events"] < own["dense"]
    assert seldom["dense"] == pytest.approx(often["dense"], rel=0.02)


def test_all_convolutions_of_spikes_are_made_dense():
    source = c.generate(lower(model_of("sizes")))
    text = bench_events.dense(source).files["spikernel.c"]
    assert "add_row(weights + " in source.files["spikernel.c"]
    assert "add_row(weights + " not in text


def test_bad_input_is_one_line(checkpoint, capsys):
    assert "--images 0 must be at least 1" in scripts.refused(SCRIPT, capsys, str(checkpoint), "--images", "0")
