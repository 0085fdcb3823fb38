"""The scoring benchmark's pure parts, and one tiny run of the whole command."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bench_common
import bench_methods
import bench_scoring
import ceilings
import scripts
import trace_parts
from spikernel_jax import CellSpace, NetworkSpec
from spikernel_jax.operations import convolution, pooling
from spikernel_jax.scoring import engine, scores
from spikernel_jax.snn import layers, neurons
from work import necessary_work

ROOT = Path(__file__).resolve().parents[2]

SPACE = CellSpace((1, 3))
SPEC = NetworkSpec((8, 8, 3), 10, SPACE, channels=2, time_steps=2)

TEXT = """HloModule jit_f, is_scheduled=true

FileNames
1 "/somewhere/engine.py"
2 "/somewhere/spikernel_jax/operations/pooling.py"
3 "/somewhere/spikernel_jax/snn/neurons.py"
4 "/somewhere/spikernel_jax/operations/convolution.py"

FunctionNames
1 "score_groups.<locals>.one"
2 "conv"
3 "average_pool.<locals>.<genexpr>"
4 "run.<locals>.<lambda>"
5 "Elsewhere.conv"

FileLocations
1 {file_name_id=1 function_name_id=1 line=1 end_line=1 column=1 end_column=2}
2 {file_name_id=4 function_name_id=2 line=1 end_line=1 column=1 end_column=2}
3 {file_name_id=2 function_name_id=3 line=1 end_line=1 column=1 end_column=2}
4 {file_name_id=3 function_name_id=4 line=1 end_line=1 column=1 end_column=2}
5 {file_name_id=4 function_name_id=5 line=1 end_line=1 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=PARENT_OF_1}
2 {file_location_id=2 parent_frame_id=PARENT_OF_2}
3 {file_location_id=3 parent_frame_id=PARENT_OF_2}
4 {file_location_id=4 parent_frame_id=PARENT_OF_2}
5 {file_location_id=5 parent_frame_id=PARENT_OF_5}

%body (p: (f32[2]{0}, s32[])) -> (f32[2]{0}, s32[]) {
  %p = (f32[2]{0}, /*index=1*/s32[]) parameter(0)
  %convolution.1 = f32[2,2]{1,0} convolution(%p, %p), window={size=3x3}, metadata={op_name="jit(f)/conv" stack_frame_id=2}
  %ynn.1 = f32[2]{0} fusion(%convolution.1), kind=kCustom, calls=%inner
  %bitcast.7 = f32[2]{0} bitcast(%ynn.1)
  %fusion.2 = f32[2]{0} fusion(%bitcast.7), kind=kLoop, calls=%inner, metadata={op_name="jit(f)/pool" stack_frame_id=3}
  %deep = f32[2]{0} multiply(%fusion.2, %fusion.2), metadata={op_name="jit(f)/step" stack_frame_id=5}
  ROOT %plain = f32[2]{0} add(%deep, %deep), metadata={op_name="jit(f)/add" stack_frame_id=1}
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %x = f32[2]{0} parameter(0)
  ROOT %while.3 = (f32[2]{0}, s32[]) while(%x), condition=%c, body=%body, metadata={op_name="jit(f)/while" stack_frame_id=1}
}
"""  # noqa: E501


def program(shift: int) -> Any:
    """Frames 2 to 4 lie below 1, frame 5 below 4; texts print parents as they are, or one too large."""
    text = TEXT
    for name, parent in (("PARENT_OF_1", 0), ("PARENT_OF_2", 1), ("PARENT_OF_5", 4)):
        text = text.replace(name, str(parent + shift))
    return trace_parts.instructions(text)


@pytest.mark.parametrize("shift", [0, 1])
def test_instructions_belong_to_the_innermost_known_function(shift):
    found = program(shift)
    assert {name: (i.opcode, i.part) for name, i in found.items() if i.opcode != "parameter"} == {
        "convolution.1": ("convolution", "convolution"),
        "ynn.1": ("fusion", "pooling"),  # it has no stack: what reads it has
        "bitcast.7": ("bitcast", "rest"),
        "fusion.2": ("fusion", "pooling"),
        "deep": ("multiply", "lif"),  # "Elsewhere.conv" is not conv: its caller decides
        "plain": ("add", "rest"),
        "while.3": ("while", "rest"),
    }
    assert found["convolution.1"].source == "jit(f)/conv"
    # Arrays in whole: 2×2 and 2 values of 4 bytes; a tuple's are all of them.
    moved = {name: found[name].moved for name in ("p", "convolution.1", "ynn.1", "deep", "while.3")}
    assert moved == {"p": 12, "convolution.1": 16 + 12 + 12, "ynn.1": 8 + 16, "deep": 3 * 8, "while.3": 12 + 8}
    assert [trace_parts._bytes(shape) for shape in ("bf16[3,5]{1,0}", "pred[]", "u8[7]{0}")] == [30, 1, 7]


def event(name: str, micros: float, line: str = "1", module: str = "jit_f") -> trace_parts.Event:
    return trace_parts.Event(line, module, name, micros / 1e6)


def test_device_time_by_part():
    events = [
        event("while.3", 1000),  # holds the others
        event("convolution.1", 5), event("convolution.1", 7, line="2"), event("fusion.2", 4), event("deep", 3),
        event("plain", 2), event("unheard.of", 1), event("convolution.1", 50, module="jit_other"),
    ]  # fmt: skip
    parts, sources = trace_parts.device_seconds(events, {"jit_f": program(1)})
    want = {"convolution": 12e-6, "pooling": 4e-6, "lif": 3e-6, "rest": 3e-6, "norm": 0, "gram": 0}
    assert parts == pytest.approx(want)
    assert sources["convolution", "jit(f)/conv"] == pytest.approx(12e-6)
    assert sources["rest", "unheard.of"] == pytest.approx(1e-6)
    assert trace_parts.launches(events, {"jit_f": program(1)}) == 6
    assert trace_parts.device_bytes(events, {"jit_f": program(1)})["convolution", "jit(f)/conv"] == 2 * 40


def test_of_a_gpu_only_streams_count():
    events = [event("deep", 3, line="Stream #13(Compute)"), event("deep", 3, line="XLA Ops")]
    assert trace_parts.device_seconds(events, {"jit_f": program(1)})[0]["lif"] == pytest.approx(3e-6)


def test_a_real_profile_names_the_parts():
    """The functions of the package are found again in a compiled program and its profile."""

    @jax.jit
    def some_layers(x, kernel):
        affine = {"scale": jnp.ones(4), "bias": jnp.zeros(4)}
        y, _ = layers.batch_norm(convolution.conv(x, kernel), affine, None, train=True)
        spikes = neurons.run(SPEC.neuron, jnp.zeros(y.shape[1:]), y)[1]
        return scores.normalised_hamming(spikes), pooling.average_pool(y)

    x, kernel = jnp.ones((2, 4, 16, 16, 3)), jnp.ones((3, 3, 3, 4))
    jax.block_until_ready(some_layers(x, kernel))
    programs = trace_parts.live_programs(jax.devices()[0], ["jit_some_layers"])
    assert len(programs) == 1
    events, seconds = trace_parts.profile(lambda: jax.block_until_ready(some_layers(x, kernel)))
    parts, _ = trace_parts.device_seconds(events, programs)
    assert all(parts[part] > 0 for part in ("convolution", "norm", "lif", "pooling", "gram"))
    assert 0 < sum(parts.values()) < seconds * jax.device_count() * 4


def test_samples_are_whole_groups():
    everything = SPACE.enumerate()
    seen = set()
    for seed in range(4):
        rows = bench_common.sample_groups(everything, 100, np.random.default_rng(seed))
        assert 40 < len(rows) < 160
        assert (rows == rows[engine.order(np.stack([rows, rows], 1))]).all()
        for prefix in np.unique(rows[:, engine.PREFIX], axis=0):
            here, there = ((r[:, engine.PREFIX] == prefix).all(1).sum() for r in (rows, everything))
            assert here == there
        seen.add(rows.tobytes())
    assert len(seen) == 4


def test_the_sample_stands_for_all():
    rows, everything = bench_common.representative(SPEC, 40, 0), SPACE.enumerate()
    assert (rows == bench_common.representative(SPEC, 40, 0)).all()
    assert 20 < len(rows) < 80
    means = [necessary_work(SPEC, some, 1).flops / len(some) for some in (rows, everything)]
    assert means[0] == pytest.approx(means[1], rel=0.05)


@pytest.mark.parametrize(
    ("costs", "lanes", "sizes"),
    [
        ([1, 1, 1, 1], 2, [2, 2]),
        ([3, 1, 1, 1], 2, [1, 3]),
        ([1, 1, 1, 5], 2, [3, 1]),
        ([1, 1, 1, 1, 1, 1], 3, [2, 2, 2]),
        ([1], 2, [0, 1]),
    ],
)
def test_lanes_get_equal_costs(costs, lanes, sizes):
    rows = np.arange(len(costs), dtype=np.int8)[:, None]
    parts = bench_common.split(rows, costs, lanes)
    assert [len(part) for part in parts] == sizes
    assert (np.concatenate(parts) == rows).all()


def test_costs_are_what_each_row_adds():
    rows = bench_common.sample_groups(SPACE.enumerate(), 20, np.random.default_rng(0))
    limits = ceilings.Ceilings(2.0, 9.0, 4.0)
    costs = bench_common.costs(SPEC, rows, 3, limits)
    work, first = necessary_work(SPEC, rows, 3), necessary_work(SPEC, rows[:1], 3)
    assert costs[0] == pytest.approx(first.flops / 2 + first.bytes / 4)
    assert sum(costs) == pytest.approx(work.flops / 2 + work.bytes / 4)


def test_table():
    text = bench_common.table(("a", "b", "c"), [(1234, 0.12345, "x"), (1, 12345.6, ""), (2, 999.7, "y")])
    assert text.splitlines() == [
        "| a | b | c |", "| --- | --- | --- |", "| 1,234 | 0.123 | x |", "| 1 | 12,346 |  |", "| 2 | 1,000 | y |",
    ]  # fmt: skip


def test_defaults_are_filled_in():
    full = bench_scoring.resolved(bench_scoring.Options(), "cpu")
    quick = bench_scoring.resolved(bench_scoring.Options(quick=True, cells=7), "cpu")
    assert (full.batch, full.channels, full.matmul_side) == (64, 32, 3072)
    assert (quick.batch, quick.cells, quick.matmul_side) == (16, 7, 2048)
    assert bench_scoring.resolved(bench_scoring.Options(), "gpu").matmul_side == 8192


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cells": 0}, "--cells 0: want whole numbers of at least 1"),
        ({"widths": (8, 0)}, r"--widths \(8, 0\): want"),
        ({"peer_cells": -1}, "--peer-cells -1"),
        ({"sets": ("3;5",)}, "--sets '3;5'"),
        ({"sets": ("2,4",)}, "--sets '2,4': want different odd sizes"),
        ({"json": Path("/nowhere/at/all/x.json")}, "--json /nowhere/at/all/x.json"),
    ],
)
def test_refuses_bad_options_before_any_work(change, words, monkeypatch):
    monkeypatch.setattr(ceilings, "measure", None)
    scripts.refuses(bench_scoring, change, words)


def run_small(path: Path, more: str) -> tuple[str, str]:
    """What a small run of the command prints, and what it writes."""
    options = (
        f"--quick {more} --sets 3 --batch 4 --time-steps 2 --side 8 --cells 6 --matmul-side 64 --bandwidth-mb 1 "
        f"--json {path}"
    )
    command = [sys.executable, str(ROOT / "tools" / "bench_scoring.py"), *options.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout, path.read_text()


@pytest.mark.slow
def test_methods_end_to_end(tmp_path):
    printed, written = run_small(tmp_path / "bench.json", "--methods --repeats 1")
    assert "### Methods" in printed
    entries = json.loads(written)["methods"]
    assert [(entry["fidelity"], entry["method"]) for entry in entries] == [
        (fidelity, method) for fidelity in ("low", "medium", "full") for method in ("shared", "batched", "each")
    ]
    for entry in entries:
        assert entry["launches_a_cell"] > 0
        assert (entry["waste"] > 0) <= (entry["method"] == "batched")
        assert (entry["tile"] > 1) == (entry["method"] == "batched")


def test_waste_is_the_transition_of_a_tiles_empty_places():
    rows, spec = SPACE.enumerate()[:10], SPEC
    h, w = spec.cell_size(0)
    each = 2 * 9 * spec.channels * 2 * spec.channels * h * w * spec.time_steps * 3
    bench = SimpleNamespace(
        spec=spec, scorer=SimpleNamespace(tile=4), parts=[rows[:7], rows[7:8]], batch=3,
        work=necessary_work(spec, rows[:8], 3),
    )  # fmt: skip
    want = (1 + 3) * each / bench.work.convolution
    assert bench_methods.waste(bench) == pytest.approx(want)  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
def test_the_command_end_to_end(tmp_path):
    printed, written = run_small(tmp_path / "bench.json", "--sections limit parts --channels 2")
    assert "### Limit" in printed
    assert "### Parts: sizes 3, C = 2" in printed
    results = json.loads(written)
    (entry,) = results["limit"]
    assert entry["of_matmul"] == pytest.approx(entry["flops"] / entry["best_s"] / results["ceilings"]["float32"])
    assert 0 < entry["of_matmul"] < 1
    assert entry["flops"] == sum(value for name, value in entry["work"].items() if name != "bytes")
    (profile,) = results["parts"]
    assert sum(profile["shares"].values()) == pytest.approx(1)
    assert min(profile["shares"][part] for part in ("convolution", "lif", "norm", "gram")) > 0
    assert results["environment"]["command"][:2] == ["python", "tools/bench_scoring.py"]
    assert str(tmp_path) not in written
