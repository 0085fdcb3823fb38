"""Compilation is most of what the tests take: it is shared between processes, and done without LLVM's optimiser."""

import atexit
import gc
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator

import pytest

# Before jax is imported. Worker processes and scripts that tests start inherit all of it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.mkdtemp(prefix="spikernel-tests-")
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)  # by the process that made it, which ends last
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": _cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # tests start some sixty processes
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }

# JAX writes a program in place: a process that reads it meanwhile finds a part, warns, and compiles it itself.
_PART_READ = "ignore:Error reading persistent compilation cache entry:UserWarning"
os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (os.environ.get("PYTHONWARNINGS"), _PART_READ)))

# What is tested are the programs XLA is given and its own passes over them (test_layouts.py reads their outcome).
# Their machine code is made in the quickest way: LLVM's optimiser would take half of all compilation, and fusions
# emitted by way of MLIR half of the rest. Flags that are set already win, so that
# `XLA_FLAGS=--xla_backend_optimization_level=3` tests the machine code that users run.
if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    _quick = (
        "--xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",  # other cores run other tests
        "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
    )
    os.environ["XLA_FLAGS"] = " ".join([*_quick, os.environ.get("XLA_FLAGS", "")])


# Tracing makes many objects that live on: looking through them all for circles takes a twentieth of the time.
gc.set_threshold(100_000, 20, 20)


# A background job of a shell without job control starts with SIGINT ignored, and so would all that tests start. What
# the program does then is in test_signals.py; all other tests are of a program that can be interrupted.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """The warning is none of a test either, though all others are errors."""
    config.addinivalue_line("filterwarnings", _PART_READ)


@pytest.fixture(scope="module", autouse=True)
def programs_freed() -> Iterator[None]:
    """Compiled programs end with the module that ran them.

    Each holds some memory maps, of which Linux gives a process 65,530: the last modules of a process that kept all
    programs would crash it, where the compiler or the cache ask for one more.
    """
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@pytest.fixture(scope="session")
def with_devices() -> Callable[[int], dict[str, str]]:
    """The environment of a process with a number of devices, otherwise compiled as in this one: rounding is alike."""

    def environment(count: int) -> dict[str, str]:
        flag = f"--xla_force_host_platform_device_count={count}"
        return os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}"}

    return environment


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest module begins first, so that no process is left with it at the end."""
    items.sort(key=lambda item: item.path.stem != "test_pipeline")
