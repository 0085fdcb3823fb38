"""The C that is exported: classes, logits and spikes of the specification, and nothing undefined on the way."""

import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import device
import scripts
from embedded_models import every_kind, images, model_of, narrowed
from spikernel_jax import CellSpace, Layer, Model, NetworkSpec, Operation, chain, register_operation, save_model
from spikernel_jax.embedded import build, c
from spikernel_jax.embedded.lower import lower
from spikernel_jax.embedded.memory import lay_out, length_of
from spikernel_jax.snn import network

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "export_c.py"
COMPILERS = [name for name in ("gcc", "clang") if shutil.which(name)]
OTHERS = [(name, bits, made) for name in COMPILERS[:1] for bits, made in ((2, lower), (4, narrowed))]
WIDEST = [pytest.param(name, 8, narrowed, marks=pytest.mark.slow) for name in COMPILERS[:1]]
needs_compiler = pytest.mark.skipif(not COMPILERS, reason="no C compiler on this machine (gcc or clang)")
SANITIZED = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover")


@needs_compiler
@pytest.mark.parametrize(("compiler", "bits", "made"), [*((own, 6, lower) for own in COMPILERS), *OTHERS, *WIDEST])
@every_kind
def test_c_is_the_specification_to_the_bit(name, compiler, bits, made, tmp_path):
    """By each compiler; what the widths of memory do to the C does not depend on it."""
    program = made(model_of(name), bits=bits)
    c.write(c.generate(program), tmp_path / "c")
    found = build.verify(program, tmp_path / "c", images(100), compiler)
    assert (found.spikes_BS.sum(0) > 0).all(), program.sites
    assert len(np.unique(found.logits_BK, axis=0)) > 3


@given(st.sampled_from((2, 4)), st.integers(1, 9), st.integers(1, 4), st.randoms(use_true_random=False))
def test_weights_are_packed_in_twos_complement(bits, out, rows, random):
    values = np.array(
        [[random.randrange(-(2 ** (bits - 1)), 2 ** (bits - 1)) for _ in range(out)] for _ in range(rows)]
    )
    per, found = 8 // bits, c.packed(values, bits)
    assert found.shape == (rows, -(-out // per))
    for row, own in zip(values.tolist(), found.tolist(), strict=True):
        digits = "".join(f"{byte:08b}"[::-1] for byte in own)  # lowest bit first
        texts = [digits[i * bits : (i + 1) * bits][::-1] for i in range(out)]
        assert [int(text, 2) - (text[0] == "1") * 2**bits for text in texts] == row
        assert "1" not in digits[out * bits :]


@needs_compiler
@pytest.mark.parametrize(("bits", "made"), [(8, lower), (2, lower), (4, narrowed)])
@every_kind
def test_nothing_undefined_happens(name, bits, made, tmp_path):
    program = made(model_of(name), bits=bits)
    c.write(c.generate(program), tmp_path / "c")
    build.build(tmp_path / "c", tmp_path / "predict", COMPILERS[0], SANITIZED)
    hard = np.stack([np.zeros((9, 7, 2), np.uint8), np.full((9, 7, 2), 255, np.uint8), *images(6)])
    assert len(build.ask(tmp_path / "predict", hard, 4).classes_B) == 8


@needs_compiler
def test_a_depthwise_convolution_may_read_currents(tmp_path):
    """Behind a pointwise one, in an operation of one's own; all other functions are those of `every_kind`."""

    def of_width(channels: int) -> dict[str, Layer]:
        a = Layer((1, 1, channels, channels), channels)
        return {"a": a, "b": Layer((3, 3, 1, channels), channels, norm=False, groups=channels)}

    fields: Any = chain(of_width)
    register_operation(Operation("embedded_inverted", "generic", reads_spikes=True, primitive="layers", **fields))
    space = CellSpace(operations=("zero", "skip", "embedded_inverted"))
    spec = NetworkSpec((9, 7, 2), 4, space, channels=3, time_steps=2)
    row = tuple(space.parse("0>1:embedded_inverted 0>3:skip 1>3:embedded_inverted").tolist())
    params, stats = network.init(jax.random.key(1), spec, row)
    params = {n: own | ({"scale": 3 * own["scale"]} if "scale" in own else {}) for n, own in params.items()}
    program = lower(Model(spec, row, params, stats, (0.4, 0.6), (0.3, 0.2)))
    c.write(c.generate(program), tmp_path / "c")
    assert "depthwise_currents(" in (tmp_path / "c" / "spikernel.c").read_text()
    found = build.verify(program, tmp_path / "c", images(20), COMPILERS[0])
    assert (found.spikes_BS.sum(0) > 0).all()
    logits, counts, *_ = device.run(program, images(20)[0])
    assert logits.tolist() == found.logits_BK[0].tolist()
    assert [sum(counts[site]) for site in program.sites] == found.spikes_BS[0].tolist()


@needs_compiler
def test_a_difference_is_found(tmp_path):
    program = lower(model_of("sizes"))
    c.write(c.generate(program), tmp_path / "c")
    path = tmp_path / "c" / "spikernel.c"
    text = path.read_text()
    assert "(shift - 1)" in text
    path.write_text(text.replace("product += (int32_t)1 << (shift - 1);", ""))  # no rounding
    with pytest.raises(build.MismatchError, match="of image"):
        build.verify(program, tmp_path / "c", images(50), COMPILERS[0])


@pytest.mark.parametrize("made", [lower, narrowed])
@every_kind
def test_memory_is_what_is_said_and_is_shared(name, made):
    program = made(model_of(name))
    source = c.generate(program)
    text = source.files["spikernel.c"]
    sizes = {"int8_t": 1, "uint8_t": 1, "int16_t": 2, "int32_t": 4, "uint32_t": 4}
    arrays = re.findall(r"^(static const|static|) ?(\w+) \w+\[(\w+)\]( =|;)", text, re.MULTILINE)
    written = constant = 0
    for how, kind, count, _ in arrays:
        size = sizes[kind] * (len(program.sites) if count == "SPIKERNEL_SITES" else int(count))
        written, constant = written + size * (how != "static const"), constant + size * (how == "static const")
    assert (written, constant) == (source.written_bytes, source.constant_bytes)
    layout = lay_out(program)
    apart = sum(length_of(program.buffers[own]) for own in layout.offsets)
    assert sum(layout.arenas.values()) < apart
    for word in ("malloc", "free(", "float", "double"):
        assert word not in text


def test_what_is_said_of_a_network_is_no_code():
    source = c.generate(lower(model_of("sizes")), "trained on */ int x; /* images")
    assert "*/ int x" not in source.files["spikernel.c"] + source.files["spikernel.h"]


def test_a_folder_that_is_there_stays_as_it_is(tmp_path):
    with pytest.raises(ValueError, match="is there already: remove it"):
        c.write(c.generate(lower(model_of("sizes"))), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    spec = NetworkSpec((28, 28, 1), 10, CellSpace((3, 5)), channels=2, time_steps=2, stem_stride=2)
    row = tuple(spec.space.parse("0>1:conv3 0>3:skip 1>3:conv5").tolist())
    model = Model(spec, row, *network.init(jax.random.key(0), spec, row), (0.13,), (0.31,), {"data": "mnist5k"})
    folder = tmp_path_factory.mktemp("models") / "model"
    save_model(folder, model)
    return folder


@needs_compiler
def test_a_checkpoint_is_exported_and_verified(checkpoint, tmp_path, capsys):
    scripts.start(
        SCRIPT, str(checkpoint), str(tmp_path / "c"), "--bits", "4", "--images", "40", "--compiler", COMPILERS[0]
    )
    said = capsys.readouterr().out
    assert "the same classes, logits and spikes as in JAX on 40 validation images of mnist5k" in said
    assert "4 bits" in (tmp_path / "c" / "README.md").read_text()


def test_without_a_compiler_the_sources_are_there_and_said_to_be_unverified(checkpoint, tmp_path, capsys):
    scripts.start(SCRIPT, str(checkpoint), str(tmp_path / "c"), "--compiler", "no-such-compiler")
    assert "not verified: there is no no-such-compiler" in capsys.readouterr().out
    assert (tmp_path / "c" / "spikernel.c").is_file()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("absent", "{tmp}/c"), "absent: no such model folder"),
        (("{model}", "{tmp}/c", "--bits", "9"), "bits=9 must be a whole number from 2 to 8"),
        (("{model}", "{tmp}/c", "--width", "4"), "width=4 must be a whole number from 8 to 16"),
        (("{model}", "{tmp}/c", "--images", "-1"), "--images -1 must be at least 0"),
        (("{model}", "{tmp}/a/c"), "the folder that is to hold it is not there"),
        (("{model}", "{tmp}"), "is there already"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(options, words, checkpoint, tmp_path, capsys):
    given = [option.format(model=checkpoint, tmp=tmp_path) for option in options]
    assert words in scripts.refused(SCRIPT, capsys, *given)
    assert not list(tmp_path.iterdir())
