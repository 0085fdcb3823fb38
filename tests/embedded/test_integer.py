"""Integers in JAX against a device in NumPy, to the bit; against the float network, nearly; and no overflow."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import device
from embedded_models import LEARNING, every_kind, images, model_of, narrowed
from spikernel_jax import CellSpace, Model, NeuronSpec, Operation, register_operation
from spikernel_jax.embedded import bounds
from spikernel_jax.embedded.calibration import calibrated
from spikernel_jax.embedded.integer import bits_needed, run
from spikernel_jax.embedded.lower import lower, scale_of
from spikernel_jax.embedded.program import Convolve, Fire
from spikernel_jax.snn import network, neurons
from spikernel_jax.snn.devices import NO_LIMIT, Budget, broken, devices
from spikernel_jax.snn.footprint import footprints, unwritable


@pytest.mark.parametrize(("bits", "made"), [(8, lower), (3, narrowed)])
@every_kind
def test_jax_is_the_device_to_the_bit_and_within_its_bounds(name, bits, made):
    program, given = made(model_of(name), bits=bits), images(3)
    found = run(program, given, batch_size=2)
    intervals = bounds.check(program)
    places, most = [], 0
    for number, image in enumerate(given):
        logits, counts, seen, fired = device.run(program, image)
        places.append(fired)
        assert found.logits_BK[number].tolist() == logits.tolist()
        assert {site: own[:, number].tolist() for site, own in found.spikes.items()} == counts
        for buffer, (low, high) in seen.items():
            assert (intervals[buffer].low <= low).all(), buffer
            assert (high <= intervals[buffer].high).all(), buffer
        most = max(most, *(seen[site][1].max() for site in program.sites))
    assert most == model_of(name).spec.neuron.max_spikes
    for site, own in found.places.items():
        np.testing.assert_allclose(own, np.mean([fired[site] for fired in places], 0))
    assert all(own.sum() for site, own in found.spikes.items() if made is lower or site != "head")
    weights = [own.weights for own in (*program.once, *program.step) if isinstance(own, Convolve)]
    assert max(np.abs(own).max() for own in weights) == 2 ** (bits - 1) - 1


@every_kind
def test_eight_bits_are_nearly_the_float_network(name):
    model, given = model_of(name), images(64)
    found = run(program := lower(model), given)
    logits = np.asarray(model(given))
    x = (given / 255 - np.array(model.mean)) / np.array(model.std)

    @jax.jit
    def fired(x: jax.Array) -> dict[str, jax.Array]:
        return network.apply(model.spec, model.genotype, model.params, x, stats=model.stats,
                             observe=lambda spikes: spikes.sum(tuple(range(2, spikes.ndim)))).records  # fmt: skip

    records = fired(jnp.asarray(x, jnp.float32))
    assert set(program.sites) == set(records)
    for site, counts in records.items():
        total = np.asarray(counts).sum()
        assert abs(found.spikes[site].sum() - total) <= 0.03 * total + 20, site
    ours = found.logits_BK * program.logit
    spread = (logits - logits.mean(0)).std()  # of a class over the images
    assert np.abs(ours - logits).mean() < 0.5 * spread
    assert np.corrcoef((ours - ours.mean(0)).ravel(), (logits - logits.mean(0)).ravel())[0, 1] > 0.85


@every_kind
def test_images_of_which_nothing_fires_silence_no_layer(name):
    """Twice each threshold has room, whatever was calibrated on."""
    model, given = model_of(name), images(32)
    program = calibrated(model, np.zeros((1, 9, 7, 2), np.uint8), width=9)
    for own in program.step:
        if isinstance(own, Fire):
            assert 2 * own.threshold <= 2**8, own.target
            assert -(2**8) <= own.reset < 2**8
    found, wide = run(program, given), run(lower(model), given)
    for site, counts in wide.spikes.items():
        assert found.spikes[site].sum() > 0.2 * counts.sum(), site


def test_currents_of_eight_bits_are_nearly_those_of_sixteen():
    """Where every image could be the worst they are not."""
    model, given = model_of("sizes"), images(200)
    wide, narrow, coarse = (
        run(own, given).logits_BK * own.logit for own in (lower(model), narrowed(model), lower(model, width=8))
    )
    error, coarser = (np.abs(own - wide).mean() / wide.std(0).mean() for own in (narrow, coarse))
    assert error < 0.3
    assert coarser > 2 * error


def test_bits_needed_are_counted():
    program, given = lower(model_of("sizes")), images(3)
    needed, seen = bits_needed(program, given, 0.0), {}
    for image in given:
        for name, (low, high) in device.run(program, image)[2].items():
            seen[name] = max(seen.get(name, 0), int(max(high.max(), -low.min() - 1)))
    assert set(needed) == {name for name, own in program.buffers.items() if 1 < own.bits <= 16 and name != "image"}
    assert needed == {name: seen[name].bit_length() for name in needed}
    assert all(own <= needed[name] for name, own in bits_needed(program, given, 0.2).items())
    assert bits_needed(program, given, 0.2) != needed


def test_no_images_to_calibrate_on():
    with pytest.raises(ValueError, match="no images to calibrate on"):
        calibrated(model_of("sizes"), images(1)[:0])


def test_a_narrow_buffer_is_found_out():
    program = lower(model_of("sizes"))
    for name, buffer in program.buffers.items():
        if buffer.bits > 1 and name != "image":
            narrow = program.buffers | {name: buffer._replace(bits=3)}
            with pytest.raises(bounds.TooWideError, match="may need more than 3 bits"):
                bounds.check(dataclasses.replace(program, buffers=narrow))
    wide: Any = [
        dataclasses.replace(own, weights=own.weights << 24) for own in program.once if isinstance(own, Convolve)
    ]
    huge = dataclasses.replace(program, once=tuple(wide))
    with pytest.raises(bounds.TooWideError, match="may need more than 32 bits"):
        bounds.check(huge)


def test_widths_are_used_as_far_as_they_go():
    """One more bit behind the point would be too many, in each domain's own way."""
    program = lower(model_of("sizes"))
    intervals = bounds.check(program)
    cell = [name for name, buffer in program.buffers.items() if name.startswith("cell1.value")]
    largest = max(max(-intervals[name].low.min(), intervals[name].high.max()) for name in cell)
    assert 2**13 <= largest < 2**15


@settings(max_examples=50)
@given(st.floats(-100, 100, allow_nan=False), st.integers(1, 2**17))
def test_scales_are_near_and_fit(factor, largest):
    scale = scale_of(np.array([factor]), largest)
    multiplier, shift = int(scale.multiplier[0]), int(scale.shift[0])
    assert abs(multiplier) * largest + (1 << max(shift - 1, 0)) < 2**31
    assert abs(multiplier / 2**shift - factor) <= max(abs(factor) / 2**11, 2**-31)


@pytest.mark.parametrize("neuron", [NeuronSpec(), LEARNING, NeuronSpec(tau=3.0, v_threshold=0.5, learn_threshold=True)])
def test_constants_of_a_neuron_are_those_of_its_step(neuron):
    learned = {name: jnp.float32(value + 0.7) for name, value in neuron.learned.items()}
    leak, threshold = neurons.constants(neuron, learned)
    v, _ = neurons.step(neuron, jnp.array([0.0]), jnp.array([0.1]), learned or None)
    assert float(v[0]) == pytest.approx(0.1 * leak, rel=1e-5)
    just = jnp.array([threshold / leak * (1 - 1e-5), threshold / leak * (1 + 1e-5)])
    _, spikes = neurons.step(neuron, jnp.zeros(2), just, learned or None)
    assert spikes.tolist() == [0, 1]


def test_what_has_no_form_of_integers_is_refused_by_name():
    model = model_of("sizes")
    for field, value in (("bits", 1), ("bits", 9), ("width", 7), ("width", 17), ("bits", 2.5)):
        with pytest.raises(ValueError, match=f"{field}={value} must be a whole number"):
            lower(model, **{field: value})  # pyright: ignore[reportArgumentType]
    other = dataclasses.replace(model.spec, neuron=NeuronSpec(model="spyx_lif", tau=2.0, reset="soft"))
    register_operation(Operation("embedded_flip", "linear", lambda edge, x: x[..., ::-1, :]))
    space = CellSpace(operations=("zero", "skip", "embedded_flip"))
    spec = dataclasses.replace(model.spec, space=space)
    row = tuple(space.parse("0>1:embedded_flip 1>3:skip 0>3:skip").tolist())
    flipped = Model(spec, row, *network.init(jax.random.key(0), spec, row), (0.5, 0.5), (0.3, 0.3))
    refused = {"neuron 'spyx_lif'": dataclasses.replace(model, spec=other), "operation 'embedded_flip'": flipped}
    for name, own in refused.items():
        why = unwritable(own.spec, own.genotype)
        assert why.startswith(f"{name} has no form of integers")
        with pytest.raises(ValueError, match=re.escape(why)):
            lower(own)
        with pytest.raises(ValueError, match=re.escape(why)):
            footprints(own.spec, [own.genotype])
        for board in devices().values():  # which would have room for its C
            assert broken(board, own.spec, own.genotype) == [why]
            assert not Budget(NO_LIMIT, 8, board).fits(own.spec, [own.genotype])
    program = lower(model)
    for wrong in (images(2).astype(np.float32), images(2)[:, :5]):
        with pytest.raises(ValueError, match=r"want uint8 \[B, 9, 7, 2\]"):
            run(program, wrong)
