"""Networks of every kind that has a form of integers, with norms and neurons that have learned something."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

from quick_cases import mostly_slow
from spikernel_jax import CellSpace, Model, NetworkSpec, NeuronSpec
from spikernel_jax.embedded.calibration import calibrated
from spikernel_jax.embedded.program import Program
from spikernel_jax.snn import network

VARIED = ("zero", "skip", "conv1", "conv3@2.0", "conv1~2.0", "conv3@0.5", "conv1x5", "conv3d2", "dwconv5", "maxpool3",
          "avgpool", "avgpool5")  # fmt: skip
LEARNING = NeuronSpec(learn_tau=True, learn_threshold=True)
CASES = {  # space, cell, what else
    "sizes": (CellSpace((1, 3, 5, 7)), "0>1:conv5 0>2:conv1 1>2:conv7 0>3:skip 1>3:avgpool 2>3:conv3", {}),
    "more than a word": (CellSpace((3,)), "0>1:conv3 0>3:skip 1>3:conv3", {"channels": 17, "time_steps": 2}),
    "stride": (CellSpace((3,)), "0>1:conv3 0>3:skip 1>3:conv3", {"stem_stride": 2, "neuron": LEARNING}),
    "head": (CellSpace((3,)), "0>1:conv3 0>2:skip 1>2:avgpool 2>3:conv3 0>3:conv3", {"head": "snasnet"}),
    "varied": (CellSpace(operations=VARIED, direct="any"),
               "0>1:conv1x5 0>2:dwconv5 1>2:conv3d2 0>3:conv3@0.5 1>3:maxpool3 2>3:avgpool5", {}),
    "neurons of their own": (CellSpace(operations=VARIED, direct="any"),
                             "0>1:conv3@2.0 0>2:conv1~2.0 1>2:conv3@0.5 0>3:conv3@0.5 1>3:skip 2>3:skip", {}),
    "feedback": (CellSpace((1, 3), feedback=True), None, {"time_steps": 4}),
    "spikes": (CellSpace((3,)), "0>1:skip 0>2:avgpool 1>2:conv3 2>3:skip 0>3:avgpool",
               {"shortcut": "spike", "neuron": NeuronSpec(tau=2.0, v_threshold=0.4, reset="soft")}),
    "several spikes": (CellSpace(operations=VARIED, direct="any"),
                       "0>1:conv1x5 0>2:dwconv5 1>2:skip 0>3:maxpool3 1>3:conv3@0.5 2>3:avgpool5",
                       {"shortcut": "spike", "channels": 17, "time_steps": 2,
                        "neuron": NeuronSpec(tau=2.0, v_threshold=0.3, reset="soft", max_spikes=3)}),
    "several of the head": (CellSpace((3,)), "0>1:conv3 0>2:skip 1>2:avgpool 2>3:conv3 0>3:conv3",
                            {"head": "snasnet", "neuron": NeuronSpec(reset="soft", max_spikes=2)}),
    "over time": (CellSpace((3,)), "0>1:conv3 0>3:skip 1>3:conv3",
                  {"norm": "over_time", "neuron": NeuronSpec(v_threshold=0.6, v_reset=-0.2)}),
}  # fmt: skip

QUICK = ("varied", "feedback", "several spikes")  # each of which takes seconds to compile
every_kind = pytest.mark.parametrize("name", mostly_slow(CASES, QUICK.__contains__))

_NARROWED: dict[tuple[int, int], tuple[Model, Program]] = {}  # each keeps its model, whose id stays its own
SILENT = {"silent": (CellSpace((3,)), "0>1:conv3 0>3:skip 1>3:conv3 2>3:conv3", {})}  # nothing leads to node 2


@functools.cache
def model_of(name: str, seed: int = 0) -> Model:
    """A network whose norms and neurons have learned something, of 9 by 7 images."""
    space, cell, fields = (CASES | SILENT)[name]
    given: dict[str, Any] = {"channels": 3, "time_steps": 3, "head_hidden": 5, "neurons_per_class": 2} | fields
    spec = NetworkSpec((9, 7, 2), 4, space, **given)
    row = space.sample(jax.random.key(5), 1)[0] if cell is None else space.parse(cell)
    params, stats = network.init(jax.random.key(seed), spec, tuple(row.tolist()))
    rng = np.random.default_rng(seed)

    def moved(leaf: Any, spread: float) -> Any:
        return np.asarray(leaf + spread * rng.normal(size=np.shape(leaf)), np.float32)

    lively = {"kernel": 1.0, "scale": 2.0}  # so that every layer fires, and not at every step
    params = {
        n: {k: v * lively[k] if k in lively else moved(v, 0.3) + 0.2 for k, v in own.items()}
        for n, own in params.items()
    }
    for layer in {"head.hidden", "head.out"} & params.keys():
        params[layer]["kernel"] *= 60 if spec.head == "snasnet" else 3
    stats = {n: {"mean": moved(own["mean"], 0.2), "var": np.abs(moved(own["var"], 0.3))} for n, own in stats.items()}
    return Model(spec, tuple(row.tolist()), params, stats, (0.4, 0.6), (0.3, 0.2))


def narrowed(model: Model, bits: int = 8) -> Program:
    """With currents of 8 bits, which clip what other images show to be rare."""
    key = id(model), bits
    if key not in _NARROWED:  # compiling what counts the bits takes seconds
        _NARROWED[key] = model, calibrated(model, images(32, seed=1), bits)
    return _NARROWED[key][1]


def images(n: int, seed: int = 0) -> np.ndarray:
    """Images of different brightness, darker to one side."""
    rng = np.random.default_rng(seed)
    slope = rng.uniform(-1, 1, (n, 1, 1, 2)) * np.linspace(-90, 90, 7)[None, None, :, None]
    return (rng.uniform(20, 235, (n, 1, 1, 2)) + slope + rng.normal(0, 30, (n, 9, 7, 2))).clip(0, 255).astype(np.uint8)
