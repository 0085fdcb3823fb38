"""Compiled programs kept between runs: one that a kill, or a process that still writes, left in part does no harm."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import jax
import jax.numpy as jnp
from spikernel_jax.io import machine

machine.set_up(sys.argv[1])
print(jax.jit(lambda x: jnp.cumsum(jnp.sin(x)))(jnp.arange(5.0)))
"""


def run(cache: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | changes
    command = [sys.executable, "-c", SCRIPT, cache]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_half_a_program_is_compiled_anew(tmp_path: Path, request: pytest.FixtureRequest):
    """The result is the same, the user reads why, and tests that share a cache between processes do not fail by it."""
    first = run(tmp_path)
    assert first.returncode == 0, first.stderr
    programs = list(tmp_path.glob("*-cache"))
    assert programs
    for program in programs:
        program.write_bytes(program.read_bytes()[: program.stat().st_size // 2])
    told = run(tmp_path, PYTHONWARNINGS="default")
    assert (told.returncode, told.stdout) == (0, first.stdout)
    assert "Error reading persistent compilation cache entry" in told.stderr
    of_tests = request.config.getini("filterwarnings")
    assert of_tests[0] == "error"
    assert of_tests[-1] in os.environ["PYTHONWARNINGS"]  # of scripts that a test starts
    in_tests = run(tmp_path, PYTHONWARNINGS=",".join(of_tests))
    assert (in_tests.returncode, in_tests.stdout, in_tests.stderr) == (0, first.stdout, first.stderr)
