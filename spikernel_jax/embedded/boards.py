"""Microcontrollers: the C of a program built for one, measured, and run in an emulator of a board that has it."""

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spikernel_jax.embedded.build import answer_of, hold, quietly
from spikernel_jax.embedded.integer import run
from spikernel_jax.embedded.program import Program

BOARDS = {"cortex-m4": "mps2-an386", "cortex-m7": "mps2-an500"}
"""The emulator's machine that has each processor."""
TOOLS = ("make", "arm-none-eabi-gcc", "arm-none-eabi-size", "qemu-system-arm")
_WHERE = {".text": "code", ".rodata": "constants", ".data": "written", ".bss": "written"}


class Sections(NamedTuple):
    """Bytes of the network's own object file: code, what it only reads, and what it writes to."""

    code: int
    constants: int
    written: int


class Measured(NamedTuple):
    """What a program takes of a processor; `instructions` are those of an image, on average."""

    sections: Sections
    instructions: int


def missing() -> list[str]:
    """Commands that this machine lacks for `measure`."""
    return [name for name in TOOLS if shutil.which(name) is None]


def measure(program: Program, folder: Path, images_BHWC: np.ndarray, processor: str) -> Measured:
    """Builds the C for a processor, and runs it in an emulator: every class, logit and number of spikes as specified.

    Args:
      program: that the C was made of.
      folder: with the C, which stays as it is.
      images_BHWC: uint8.
      processor: of `BOARDS`.

    Raises:
      MismatchError: if anything differs from `integer.run`.
      ValueError: if a tool is missing or refuses, or there is no such processor.
    """
    if processor not in BOARDS:
        raise ValueError(f"processor {processor!r}: want one of {', '.join(BOARDS)}")
    if lacking := missing():
        raise ValueError(f"no {', '.join(lacking)} on this machine")
    with tempfile.TemporaryDirectory() as scratch:
        own = Path(shutil.copytree(folder, Path(scratch) / "c"))
        _done(["make", "-s", "-C", str(own), f"{processor}.elf", f"{processor}.o"])
        sections = _sections(own / f"{processor}.o")
        (own / "images.bin").write_bytes(np.ascontiguousarray(images_BHWC).tobytes())
        served = f"enable=on,target=native,arg=predict,arg={own / 'images.bin'}"
        said = _done([
            "qemu-system-arm", "-M", BOARDS[processor], "-nographic", "-icount", "shift=0",
            "-semihosting-config", served, "-kernel", str(own / f"{processor}.elf"),
        ])  # fmt: skip
    counted = re.search(r"^(\d+) instructions an image$", said.stderr, re.MULTILINE)
    if counted is None:
        raise ValueError(f"{processor}: the emulated program did not end well: {said.stderr.strip()[-200:]}")
    expected = run(program, images_BHWC)
    hold(program, expected, answer_of(said.stdout, expected.logits_BK.shape[1]), processor)
    return Measured(sections, int(counted[1]))


def _sections(path: Path) -> Sections:
    sizes = dict.fromkeys(Sections._fields, 0)
    for line in _done(["arm-none-eabi-size", "-A", str(path)]).stdout.splitlines():
        name, *numbers = line.split() or [""]
        for section, field in _WHERE.items():
            if name == section or name.startswith(f"{section}."):
                sizes[field] += int(numbers[0])
    return Sections(**sizes)


def _done(command: list[str]) -> Any:
    """A finished command; ValueError if it fails."""
    done = quietly(command)
    if done.returncode:
        raise ValueError(f"{' '.join(command[:2])} stopped with {done.returncode}: {done.stderr.strip()}")
    return done
