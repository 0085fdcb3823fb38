"""No convolution of a compiled training step is of the kind that a CPU computes by a naive loop.

XLA's CPU backend is fast where a convolution is channels-last; any other becomes a naive loop inside a loop body
(jax-ml/jax issue 12868), and its own gradient for a kernel is one. What is looked at is the compiled program.
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from spikernel_jax.cells.space import CellSpace
from spikernel_jax.operations.convolution import conv
from spikernel_jax.snn import network
from spikernel_jax.snn.spec import NetworkSpec
from spikernel_jax.training.devices import BATCH, devices_for, shared

CHANNELS_LAST = "b01f_01io->b01f"
pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="how a CPU convolves")


def layouts(function: Any, *arguments: Any) -> set[str]:
    """Layouts of all convolutions in the compiled program."""
    text = jax.jit(function).lower(*arguments).compile().as_text() or ""
    found = re.findall(r"= \S+ convolution\(.*?dim_labels=([\w>-]+)", text)
    assert text.count(" convolution(") == len(found)
    return set(found)


def gradients(k: int, stride: int, dtype: Any) -> Any:
    """A step of gradients of a convolution for its kernel and its input."""

    def loss(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.square(conv(jnp.sin(x), kernel, stride)).sum()

    def step(carry: tuple[jax.Array, jax.Array], _: Any) -> Any:
        dx, dkernel = jax.grad(loss, (0, 1))(*carry)
        return (carry[0] + dx if stride == 1 else carry[0], carry[1] - dkernel), ()

    return step, (jnp.ones((4, 16, 16, 8), dtype), jnp.ones((k, k, 8, 8)))


@pytest.mark.parametrize("k", range(1, 16, 2))
def test_in_a_loop(k):
    step, carry = gradients(k, 1, jnp.float32)
    assert layouts(lambda *carry: lax.scan(step, carry, length=3), *carry) <= {CHANNELS_LAST}


@pytest.mark.parametrize(("k", "stride", "dtype"), [(5, 1, jnp.bfloat16), (7, 1, jnp.bfloat16), (3, 2, jnp.float32)])
def test_in_a_loop_of_one_step_narrow_and_strided(k, stride, dtype):
    step, carry = gradients(k, stride, dtype)
    assert layouts(lambda *carry: lax.scan(step, carry, length=1), *carry) <= {CHANNELS_LAST}


@pytest.mark.parametrize("k", [3, 7])
def test_in_a_conditional(k):
    step, carry = gradients(k, 1, jnp.float32)

    def either(x: jax.Array, kernel: jax.Array) -> Any:
        return lax.cond(x.sum() > 0, lambda: step((x, kernel), None)[0], lambda: (x, kernel))

    assert layouts(either, *carry) <= {CHANNELS_LAST}


@pytest.mark.parametrize(
    ("k", "precision", "feedback"),
    [(5, "float32", False), (7, "bfloat16", True), pytest.param(5, "float32", True, marks=pytest.mark.slow)],
)
def test_in_a_network(k, precision, feedback):
    """Forward cells in a scan over steps, feedback cells in a scan over time too, on all devices."""
    space = CellSpace((k,), feedback=feedback)
    cell = space.parse(f"0>1:conv{k} 1>3:conv{k} 0>3:skip" + f" 1>2:conv{k} 2>0:conv{k}" * feedback)
    spec = NetworkSpec((8, 8, 1), 2, space, channels=4, time_steps=2)
    params, stats = network.init(jax.random.key(0), spec, cell)
    devices = devices_for(4)
    dtype = jnp.bfloat16 if precision == "bfloat16" else None

    def part(params: Any, x: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            out = network.apply(spec, cell, params, x, stats=stats, train=True, spike_dtype=dtype, axis_name=BATCH)
            return jnp.square(out.logits_BK).sum()

        return lax.pmean(jax.grad(loss)(params), BATCH)

    def steps(params: Any, x: jax.Array) -> Any:
        gradient = shared(devices, part, whole=1, out=False)

        def step(params: Any, _: Any) -> Any:
            return jax.tree.map(lambda a, b: a - 0.1 * b, params, gradient(params, x)), ()

        return lax.scan(step, params, length=2)

    assert layouts(steps, params, jnp.ones((4, 8, 8, 1))) == {CHANNELS_LAST}


def test_what_is_the_same_in_all_time_steps_sums_its_gradients_without_a_reduction():
    """XLA's is slow on a CPU: a tenth of a step of 1×1 kernels for the sum over five time steps alone."""
    space = CellSpace((1,))
    cell = space.parse("0>1:conv1 1>3:conv1 0>3:skip")
    spec = NetworkSpec((8, 8, 1), 2, space, channels=4, time_steps=3)
    params, _ = network.init(jax.random.key(0), spec, cell)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.square(network.apply(spec, cell, params, x, train=True).logits_BK).sum()

    text = jax.jit(jax.grad(loss)).lower(params, jnp.ones((4, 8, 8, 1))).compile().as_text() or ""
    reduced = [tuple(map(int, shape.split(","))) for shape in re.findall(r"= f32\[([\d,]+)\]\S* reduce\(", text)]
    assert reduced  # of the norms
    assert not [shape for shape in reduced if math.prod(shape) >= 4 * 8 * 8 * 4]


def test_bfloat16_is_multiplied_as_matrices():
    """Products that a core may have a unit for; and what is moved is not widened for it."""
    step, carry = gradients(3, 1, jnp.bfloat16)
    text = jax.jit(lambda *carry: lax.scan(step, carry, length=1)).lower(*carry).compile().as_text() or ""
    products = re.findall(r"= f32\S* dot\(%?([\w.\-]+), %?([\w.\-]+)\)", text)
    factors = [re.search(rf"%?{re.escape(name)} = (\w+)\[", text) for pair in products for name in pair]
    assert len(products) == 7  # a row of the kernel's each, forwards and of the input's gradient; one of the kernel's
    assert {factor and factor[1] for factor in factors} == {"bf16"}
    assert set(re.findall(r"= (\w+)\[\S* (?:concatenate|pad)\(", text)) == {"u16"}
    assert " convolution(" not in text


def test_the_test_sees_what_it_looks_for():
    def loss(kernel: jax.Array, x: jax.Array) -> jax.Array:
        y = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.square(y).sum()

    def steps(kernel: jax.Array, x: jax.Array) -> Any:
        return lax.scan(lambda kernel, _: (kernel - jax.grad(loss)(kernel, x), ()), kernel, length=3)

    assert layouts(steps, jnp.ones((5, 5, 8, 8)), jnp.ones((4, 16, 16, 8))) - {CHANNELS_LAST}
