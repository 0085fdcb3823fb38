"""The training benchmark: its closed forms, its peers, and one tiny run of the whole command."""

import dataclasses
import functools
import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bench_common
import bench_kernels
import bench_step
import bench_training
import peers
import peers_training
import scripts
from quick_cases import mostly_slow
from spikernel_jax import CellSpace, NetworkSpec, load_snasnet
from spikernel_jax.snn import network
from spikernel_jax.training.devices import devices_for
from spikernel_jax.training.loop import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
needs_torch = pytest.mark.skipif(peers.missing() is not None, reason=str(peers.missing()))

SPACE = CellSpace((1, 3))
SPEC = NetworkSpec(
    (8, 8, 3), 4, SPACE, channels=5, time_steps=3, head="snasnet", head_hidden=7, neurons_per_class=3, dropout=0.5
)
CELL = bench_training.Options().cell
CELLS = (CELL, "0>1:avgpool 0>2:conv3 0>3:conv1 1>3:conv3 2>3:skip", "0>3:conv3")


def equations(jaxpr: Any) -> Any:
    """All equations, those of inner programs too; of a choice between platforms the default's."""
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name == "cond":
            yield from equations(equation.params["branches"][-1].jaxpr)
            continue
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            if inner := getattr(value, "jaxpr", value if hasattr(value, "eqns") else None):
                yield from equations(inner)


def traced_flops(jaxpr: Any) -> int:
    """FLOPs of convolutions and products in a traced program, from shapes alone."""
    total = 0
    for equation in equations(jaxpr):
        if equation.primitive.name == "conv_general_dilated":
            kernel, features = equation.invars[1].aval, equation.params["dimension_numbers"].rhs_spec[0]
            total += 2 * equation.outvars[0].aval.size * kernel.size // kernel.shape[features]
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
    return total


@pytest.mark.parametrize("head", ["snasnet", "gap"])
@pytest.mark.parametrize("cell", CELLS)
def test_flops_are_those_of_the_traced_program(cell, head):
    """At widths where a convolution is written as one convolution, forwards and backwards."""
    spec, row, batch = dataclasses.replace(SPEC, channels=32, head=head), SPACE.parse(cell), 2
    params, stats = network.init(jax.random.key(0), spec, row)
    images = jnp.zeros((batch, *spec.image_shape))

    def total(params: Any) -> jax.Array:
        return network.apply(spec, row, params, images, stats=stats, train=True).logits_BK.sum()

    assert traced_flops(jax.make_jaxpr(total)(params).jaxpr) == bench_training.forward_flops(spec, row, batch)
    dropped = batch * 2 * 64 * 27 * 32  # the stem's gradient for the images, traced but used by nothing
    traced = traced_flops(jax.make_jaxpr(jax.grad(total))(params).jaxpr)
    assert traced - dropped == bench_training.step_flops(spec, row, batch)


@pytest.mark.parametrize("k", [1, 3])
def test_the_kernel_tables_flops_are_those_of_a_step(k):
    spec = dataclasses.replace(SPEC, head="gap", dropout=0.0)
    row = SPACE.parse(bench_kernels.CELL.replace("K", str(k)))
    assert bench_kernels.convolution_flops(spec, row, 5) == bench_training.step_flops(spec, row, 5)


def test_flops_by_hand():
    spec, row = dataclasses.replace(SPEC, channels=2), SPACE.parse("0>3:conv3")
    stem = 2 * 64 * 27 * 2
    cells = 2 * 64 * 9 * 2 * 2 + 2 * 16 * 9 * 4 * 4
    transition = 2 * 64 * 9 * 2 * 4
    head = 2 * 2 * 2 * 4 * 7 + 2 * 7 * 12
    rest = 3 * (cells + transition + head)
    assert bench_training.forward_flops(spec, row, 5) == 5 * (stem + rest)
    assert bench_training.step_flops(spec, row, 5) == 5 * (2 * stem + 3 * rest)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("channels", "steps"), [(1, 1), (3, 2), (32, 5), (17, 8)])
def test_equal_width_is_the_nearest_of_all(cell, channels, steps):
    spec, row = dataclasses.replace(SPEC, channels=channels, time_steps=steps, head_hidden=64), SPACE.parse(cell)
    target = bench_training.forward_flops(spec, row, 1)
    others = {
        width: abs(
            bench_training.forward_flops(dataclasses.replace(spec, channels=width, time_steps=1), row, 1) - target
        )
        for width in range(1, 120)
    }
    assert bench_training.equal_width(spec, row) == min(others, key=lambda width: others[width])


def test_turns_alternate_and_last_as_long_as_asked(monkeypatch):
    clock, calls = [0.0], []

    def runner(name: str, cost: float) -> Any:
        def run(steps: int) -> None:
            calls.append((name, steps))
            clock[0] += cost * steps

        return run

    monkeypatch.setattr(importlib.import_module("time"), "perf_counter", lambda: clock[0])
    rounds = bench_training.in_turns({"a": runner("a", 0.25), "b": runner("b", 3.0)}, 2, 1.0)
    assert calls == [("a", 1), ("b", 1), *[("a", 1), ("a", 4), ("b", 1), ("b", 1)] * 2]
    assert rounds == [{"a": 0.25, "b": 3.0}] * 2


def test_one_spoilt_round_does_not_change_the_ratio():
    rounds = [{"a": 2.0, "b": 1.0}, {"a": 9.0, "b": 3.0}, {"a": 1.0, "b": 50.0}]
    assert bench_training._ratio(rounds, "a", "b") == {"ratio": 2.0, "ratio_by_round": [2.0, 3.0, 0.02]}


def torch_nets(dtype: str) -> tuple[Any, dict[str, Any]]:
    """Both peers on the same weights and data, a head that speaks."""
    torch = importlib.import_module("torch")
    (matrix,) = peers.matrices(SPACE.parse(CELL)[None], SPEC)
    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=(6, *SPEC.image_shape)).astype(dtype), np.arange(6) % SPEC.num_classes
    nets = peers_training.trainers(matrix, SPEC, images, labels, TrainConfig(weight_decay=0.01), seed=3)
    for trainer in nets.values():
        for module in trainer.net.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data *= 100
        trainer.net = trainer.net.to(getattr(torch, dtype))
    return matrix, nets


def scale(array: Any, arrays: Any) -> float:
    """The largest value of an array, at least a hundredth of the largest of all arrays.

    A bias that only a batch norm reads has a gradient of 0 but for rounding.
    """
    return max(float(abs(array).max()), *(0.01 * float(abs(other).max()) for other in arrays))


@needs_torch
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-11)])
def test_multi_step_peer_is_the_shipped_one(dtype, tolerance):
    """Logits, gradients, running statistics, and the weights after a step, with the same dropout mask.

    The tolerance is a share of each array's `scale`, that of gradients being the least.
    """
    torch = importlib.import_module("torch")
    _, nets = torch_nets(dtype)
    found = {}
    for name, trainer in nets.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            logits = trainer.net(trainer.images).detach()
            peers_training._spikingjelly()[0].reset_net(trainer.net)
            torch.manual_seed(5)
            trainer.backward()
            grads = {key: p.grad.clone() for key, p in trainer.net.named_parameters()}
            trainer.optimiser.step()
        found[name] = {"logits": logits} | {f"gradient of {key}": grad for key, grad in grads.items()}
        found[name] |= trainer.net.state_dict()
    shipped, multi_step = found["shipped"], found["multi_step"]
    assert shipped.keys() == multi_step.keys()
    assert float(shipped["logits"].std()) > 0.01
    gradients = [value for key, value in shipped.items() if key.startswith("gradient")]
    for key, value in shipped.items():
        atol = tolerance * scale(value, gradients)
        np.testing.assert_allclose(multi_step[key].cpu(), value.cpu(), rtol=0, atol=atol, err_msg=key)


@needs_torch
def test_our_gradients_are_the_peers():
    """In float64, by the same weights and without dropout."""
    matrix, nets = torch_nets("float64")
    trainer = nets["shipped"]
    trainer.net.classifier[0].p = 0.0
    state = {key: value.cpu().numpy().copy() for key, value in trainer.net.state_dict().items()}
    loss = trainer.backward()
    grads = {key: p.grad.cpu().numpy() for key, p in trainer.net.named_parameters()}
    options: dict[str, Any] = {"num_classes": SPEC.num_classes, "image_size": 8, "time_steps": SPEC.time_steps}
    with jax.enable_x64(True):
        model, wanted = (load_snasnet(some, matrix, **options) for some in (state, state | grads))
        images = np.moveaxis(trainer.images.cpu().numpy(), 1, -1)

        @jax.jit
        @jax.value_and_grad
        def ours(params: Any) -> jax.Array:
            logits = network.apply(model.spec, model.genotype, params, jnp.asarray(images), train=True).logits_BK
            return -jax.nn.log_softmax(logits)[jnp.arange(6), trainer.labels.cpu().numpy()].mean()

        value, found = ours(model.params)
        assert float(value) == pytest.approx(float(loss), rel=1e-12)
        gradients = jax.tree.leaves(wanted.params)
        for name, b in jax.tree.leaves_with_path(wanted.params):
            a = functools.reduce(lambda tree, part: tree[part.key], name, found)
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-11 * scale(b, gradients), err_msg=str(name))


@needs_torch
def test_a_peers_step_forgets_the_last_batch():
    """Without a learning rate the same batch has the same loss again."""
    _, nets = torch_nets("float32")
    for trainer in nets.values():
        trainer.net.classifier[0].p = 0.0
        trainer.optimiser.param_groups[0]["lr"] = 0.0
        assert trainer.run(1) == trainer.run(2)


def test_multi_step_refuses_feedback():
    spec = dataclasses.replace(SPEC, space=CellSpace((1, 3), feedback=True))
    with pytest.raises(ValueError, match="feedback=True"):
        peers_training.build_multi_step(np.zeros((4, 4), int), spec)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch": 0}, "--batch 0: want whole numbers of at least 1"),
        ({"seconds": 0.0}, "--seconds 0.0: want finite numbers above 0"),
        ({"cell": "0>3:conv5"}, "conv5"),
        ({"cell": "nonsense"}, "nonsense"),
        ({"side": 2}, "image_shape"),
        ({"sizes": (1, 5)}, "want 3 among them"),
        ({"json": Path("/nowhere/at/all/x.json")}, "--json /nowhere/at/all/x.json"),
    ],
)
def test_refuses_bad_options_before_any_work(change, words, monkeypatch):
    monkeypatch.setattr(bench_training, "measure", None)
    scripts.refuses(bench_training, change, words)


def test_a_switch_turned_off_is_no_number_too_small():
    full = bench_common.filled(bench_training.Options(huge_pages=False), bench_training._DEFAULTS, "cpu")
    assert (full.huge_pages, full.quick, full.rounds) == (False, False, 4)


@pytest.mark.parametrize("precision", mostly_slow(["float32", "bfloat16"], lambda name: name == "bfloat16"))
def test_ours_is_compiled_in_the_precision_asked_for(precision):
    images, labels = bench_kernels.noise(SPEC, 4, 0)
    net = bench_training.Ours(SPEC, SPACE.parse(CELL), images, labels, 0, precision)
    assert net.program.precision == precision
    assert ("bf16[" in net.program.compiled.as_text()) == (precision == "bfloat16")


@pytest.mark.slow
def test_the_command_end_to_end(tmp_path):
    path = tmp_path / "bench.json"
    options = (
        "--quick --channels 2 --batch 4 --time-steps 2 --side 8 --hidden 8 --rounds 2 --seconds 0.01 "
        "--memory-times 1 3 --memory-batches 4 "
        f"--widths 2 --sizes 3 --kernel-batch 4 --matmul-side 64 --bandwidth-mb 1 --json {path}"
    )
    command = [
        sys.executable,
        str(ROOT / "tools" / "bench_training.py"),
        *options.split(),
        "--cell",
        "0>1:skip 0>3:conv3",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for heading in ("### Training step", "### What spiking costs", "### Peers", "### A step by kernel size"):
        assert heading in done.stdout
    results = json.loads(path.read_text())
    assert "### Where a step's time goes" in done.stdout
    assert results["parts"]["total"] > 0
    memory = [(row["time_steps"], row["batch"]) for row in results["memory"]["rows"]]
    assert memory == [(1, 4), (3, 4)]
    assert results["memory"]["rows"][1]["program_bytes"] > results["memory"]["rows"][0]["program_bytes"] > 0
    ours, conventional = (results["training"][name] for name in ("ours", "conventional"))
    assert ours["of_matmul"] == pytest.approx(ours["flops"] / ours["best_s"] / results["ceilings"]["float32"])
    assert ours["images_per_s"] == pytest.approx(4 / ours["best_s"])
    assert len(ours["seconds"]) == 2
    assert ours["program_bytes"] > 0
    assert (conventional["time_steps"], ours["time_steps"]) == (1, 2)
    assert conventional["channels"] > ours["channels"] == 2
    assert conventional["cost_of_spiking"]["ratio"] > 0
    assert results["cell"] == "0>3:conv3"  # without the dead edge
    kernels = results["kernels"]
    assert [row["kernel_size"] for row in kernels["rows"]] == [3] * 3
    for row in kernels["rows"]:
        assert row["of_matmul"] == pytest.approx(row["flops"] / row["seconds"] / kernels["ceilings"]["float32"])
    if peers.missing():
        assert results["skipped"] == peers.missing()
        assert results["skipped"] in done.stdout
    else:
        assert min(results["training"][name]["ratio"] for name in peers_training.PEERS) > 0
    assert str(tmp_path) not in path.read_text()


@pytest.mark.parametrize(
    ("part", "source", "found"),
    [
        ("norm", "jit(train_steps)/while/body/jvp()/sub", ("norm", "forward")),
        ("norm", "jit(train_steps)/while/body/transpose(jvp())/mul", ("norm", "backward")),
        ("convolution", "x/transpose(jvp())/kernel_gradient/cond/dot_general", ("convolution", "kernel gradients")),
        ("rest", "jit(train_steps)/while/body/mul", ("images, optimiser", "forward")),
        ("rest", "jit(train_steps)/while/body/jvp()/add", ("rest", "forward")),
    ],
)
def test_the_phase_of_an_instruction(part, source, found):
    assert bench_step.phase_of(part, source) == found


@pytest.mark.slow
def test_seconds_of_a_step_by_part():
    """Each conv's three products are seen apart, and nothing is lost."""
    spec = dataclasses.replace(SPEC, head="gap")
    images, labels = jnp.zeros((4, *spec.image_shape), jnp.uint8), jnp.zeros(4, jnp.int32)
    program = bench_kernels.compiled_step(spec, SPACE.parse(CELL), TrainConfig(batch_size=4), images, labels, 0, 2)
    seconds, moved, devices = bench_step.profiled(program)
    assert devices == devices_for(4).size
    values = 4 // devices * spec.time_steps * spec.channels * math.prod(spec.cell_size(0))
    assert moved["lif"]["forward"] >= 2 * 4 * values  # a current in, spikes out, of one LIF at least
    assert set(seconds) == set(bench_step.PARTS)
    assert all(seconds["convolution"][phase] > 0 for phase in bench_step.PHASES)
    assert all(seconds[part]["forward"] > 0 and seconds[part]["backward"] > 0 for part in ("norm", "lif"))
    assert not any(phases["kernel gradients"] for part, phases in seconds.items() if part != "convolution")
