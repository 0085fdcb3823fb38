"""A network's settings come back from JSON, and impossible ones are refused."""

import dataclasses
import json

import pytest

from network_cases import FORWARD, LEARNING, SPIKING, SPIKING_LOOPED
from spikernel_jax.cells.space import CellSpace
from spikernel_jax.snn.spec import NetworkSpec, spec_from_json, spec_to_json


@pytest.mark.parametrize("spec", [SPIKING, SPIKING_LOOPED, LEARNING, FORWARD], ids=str)
def test_a_spec_comes_back_from_json(spec):
    written = json.loads(json.dumps(spec_to_json(spec)))
    assert spec_from_json(written) == spec
    older = {name: value for name, value in written.items() if name != "shortcut"}
    older["neuron"] = {name: value for name, value in written["neuron"].items() if not name.startswith("learn_")}
    plain = dataclasses.replace(spec.neuron, learn_tau=False, learn_threshold=False)
    assert spec_from_json(older) == dataclasses.replace(spec, shortcut="membrane", neuron=plain)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"channels": 0}, "channels=0 must be a whole number of at least 1"),
        ({"channels": 1.5}, "channels=1.5"),
        ({"time_steps": 0}, "time_steps=0"),
        ({"head_pool": 0}, "head_pool=0"),
        ({"head_hidden": -1}, "head_hidden=-1"),
        ({"neurons_per_class": 0}, "neurons_per_class=0"),
        ({"image_shape": (8, 8)}, r"image_shape=\(8, 8\) must be \(height, width, channels\)"),
        ({"image_shape": (8, 0, 3)}, r"image_shape=\(8, 0, 3\)"),
        ({"image_shape": (1, 1, 3)}, "too small for stem_stride=1"),
        ({"image_shape": (8, 8, 3), "head": "snasnet", "head_pool": 5}, "head_pool=5"),
        ({"num_classes": 1}, "num_classes=1 must be a whole number of at least 2"),
        ({"stem_stride": 3}, "stem_stride=3 must be a whole number of at least 1, and at most 2"),
        ({"norm": "layer"}, "norm='layer' is unknown; known: per_step, over_time"),
        ({"head": "mlp"}, "head='mlp' is unknown; known: snasnet, gap"),
        ({"shortcut": "skip"}, "shortcut='skip' is unknown; known: membrane, spike"),
        ({"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"norm": "over_time", "space": CellSpace(feedback=True)}, "feedback cells run step by step"),
    ],
)
def test_spec_refuses(fields, match):
    with pytest.raises(ValueError, match=match):
        NetworkSpec(**{"image_shape": (8, 8, 3), "num_classes": 10} | fields)
