"""Builds the C of a program with a compiler of this machine, and holds it against the specification."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spikernel_jax.embedded.integer import Result, run
from spikernel_jax.embedded.program import Program

FLAGS = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-O2")
_SECONDS = 300  # that building and running may take


class Answer(NamedTuple):
    """What a device says of images."""

    classes_B: np.ndarray
    logits_BK: np.ndarray
    spikes_BS: np.ndarray  # of each LIF layer, over all time steps


class MismatchError(ValueError):
    """The C and its specification differ."""


def build(folder: Path, target: Path, compiler: str = "gcc", flags: Sequence[str] = FLAGS) -> None:
    """Compiles the sources of a folder.

    Args:
      folder: with what `c.write` wrote.
      target: the program to make.
      compiler: a command.
      flags: of it.

    Raises:
      ValueError: if there is no such compiler, or it refuses.
    """
    if shutil.which(compiler) is None:
        raise ValueError(f"no compiler {compiler!r} on this machine")
    sources = [str(folder / name) for name in ("main.c", "spikernel.c")]
    done = quietly([compiler, *flags, "-o", str(target), *sources])
    if done.returncode:
        raise ValueError(f"{compiler} refuses {folder}: {done.stderr.strip()}")


def ask(program: Path, images_BHWC: np.ndarray, classes: int) -> Answer:
    """Runs a built program on images.

    Args:
      program: of `build`.
      images_BHWC: uint8.
      classes: how many logits it prints.

    Raises:
      ValueError: if it stops with an error.
    """
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(np.ascontiguousarray(images_BHWC).tobytes())
        file.flush()
        done = quietly([str(program), file.name])
    if done.returncode:
        raise ValueError(f"{program.name} stopped with {done.returncode}: {done.stderr.strip()}")
    return answer_of(done.stdout, classes)


def answer_of(lines: str, classes: int) -> Answer:
    """What a program printed, a line an image."""
    table = np.array([list(map(int, line.split())) for line in lines.splitlines() if line], np.int64)
    return Answer(table[:, 0], table[:, 1 : 1 + classes], table[:, 1 + classes :])


def verify(program: Program, folder: Path, images_BHWC: np.ndarray, compiler: str = "gcc") -> Answer:
    """Builds the C and holds it against `integer.run`: every class, logit and number of spikes.

    Args:
      program: that the C was made of.
      folder: with the C.
      images_BHWC: uint8.
      compiler: a command.

    Returns:
      What the C says.

    Raises:
      MismatchError: if anything differs.
      ValueError: as `build` and `ask`.
    """
    expected = run(program, images_BHWC)
    with tempfile.TemporaryDirectory() as scratch:
        build(folder, target := Path(scratch) / "predict", compiler)
        found = ask(target, images_BHWC, expected.logits_BK.shape[1])
    hold(program, expected, found, "C")
    return found


def hold(program: Program, expected: Result, found: Answer, where: str) -> None:
    """Raises MismatchError if what was said somewhere is not what `integer.run` says."""
    spikes_BS = np.stack([expected.spikes[site].sum(0) for site in program.sites], 1)
    for what, ours, theirs in (
        ("class", expected.logits_BK.argmax(1), found.classes_B),
        ("logits", expected.logits_BK, found.logits_BK),
        ("spikes", spikes_BS, found.spikes_BS),
    ):
        if wrong := np.flatnonzero((ours != theirs).reshape(len(ours), -1).any(1)).tolist():
            raise MismatchError(f"{what} of image {wrong[0]}: {theirs[wrong[0]]} in {where}, {ours[wrong[0]]} in JAX")


def quietly(command: list[str]) -> Any:
    """A finished command, with what it printed; subprocess.TimeoutExpired if it goes on for minutes."""
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # no sanitizer bears one
    return subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False, env=environment)
