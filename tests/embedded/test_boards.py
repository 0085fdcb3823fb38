"""The C on microcontrollers: the logits of the specification, the bytes that were promised, instructions counted."""

import shutil

import numpy as np
import pytest

from embedded_models import CASES, images, model_of, narrowed
from spikernel_jax.embedded import boards, c
from spikernel_jax.embedded.build import MismatchError, quietly
from spikernel_jax.embedded.lower import lower

lacking = boards.missing()
needs_tools = pytest.mark.skipif(bool(lacking), reason=f"no {', '.join(lacking)} on this machine")


def written(name, folder):
    program = narrowed(model_of(name), bits=6)
    source = c.generate(program)
    c.write(source, folder)
    return program, source


@needs_tools
@pytest.mark.parametrize("name", CASES)
def test_a_processor_says_what_jax_says(name, tmp_path):
    program, source = written(name, tmp_path / "c")
    for processor in boards.BOARDS:
        found = boards.measure(program, tmp_path / "c", images(5), processor)
        assert found.sections.written == pytest.approx(source.written_bytes, rel=0.02, abs=8)
        assert found.sections.constants == pytest.approx(source.constant_bytes, rel=0.02, abs=16)
        assert found.sections.code < 16_000
    assert not list((tmp_path / "c").glob("*.elf"))


@needs_tools
def test_an_instruction_counts_as_one(tmp_path):
    """Of a function that is known: a million turns of a loop of two."""
    written("sizes", tmp_path / "c")
    own = tmp_path / "c" / "spikernel.c"
    loop = '__asm__ volatile ("1: subs %0, %0, #1\\n bne 1b" : "+r"(left));'
    own.write_text(
        '#include "spikernel.h"\nint32_t spikernel_spikes[SPIKERNEL_SITES];\n'
        "int spikernel_predict(const uint8_t *image, int32_t *logits)\n"
        f"{{ uint32_t left = 1000000; (void)image; (void)logits; {loop} return 0; }}\n"
    )
    for processor, machine in boards.BOARDS.items():
        assert quietly(["make", "-s", "-C", str(own.parent), f"{processor}.elf"]).returncode == 0
        (tmp_path / "images").write_bytes(images(2).tobytes())
        said = quietly([
            "qemu-system-arm", "-M", machine, "-nographic", "-icount", "shift=0", "-kernel",
            str(own.parent / f"{processor}.elf"), "-semihosting-config",
            f"enable=on,target=native,arg=predict,arg={tmp_path / 'images'}",
        ])  # fmt: skip
        assert int(said.stderr.split()[0]) == pytest.approx(2_000_000, rel=1e-3)


@needs_tools
def test_a_difference_is_found(tmp_path):
    program, _ = written("sizes", tmp_path / "c")
    path = tmp_path / "c" / "spikernel.c"
    path.write_text(path.read_text().replace("product += (int32_t)1 << (shift - 1);", ""))
    with pytest.raises(MismatchError, match="in cortex-m4, "):
        boards.measure(program, tmp_path / "c", images(20), "cortex-m4")


def test_what_cannot_be_measured_is_one_line(tmp_path, monkeypatch):
    program, nothing = lower(model_of("sizes"), bits=6), np.zeros((1, 9, 7, 2), np.uint8)
    with pytest.raises(ValueError, match="processor 'z80': want one of cortex-m4, cortex-m7"):
        boards.measure(program, tmp_path, nothing, "z80")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"no make, arm-none-eabi-gcc, .* on this machine"):
        boards.measure(program, tmp_path, nothing, "cortex-m4")
