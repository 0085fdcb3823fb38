"""How scripts set JAX up on a machine: all CPU cores for scoring, and compiled programs kept between runs."""

import hashlib
import os
import platform
import sys
from pathlib import Path

import jax

CACHE_OFF = "off"
_HUGE_PAGES = "glibc.malloc.hugetlb=1"
# One heap for all threads, large arrays in it too, and nothing of it given back.
_KEPT = ("glibc.malloc.mmap_max=0", "glibc.malloc.arena_max=1", f"glibc.malloc.trim_threshold={1 << 40}")
_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def set_up(cache: str | Path | None = None) -> None:
    """Sets JAX up; must come before its backend starts, and does nothing after that.

    XLA's convolutions on a CPU run on one core each, so a CPU shows as one device a core: scoring then runs a
    lane on each. Programs that take over a second to compile are kept in a cache folder and reused by later
    processes.

    Args:
      cache: folder of compiled programs; ``"off"`` keeps none; None takes JAX's own setting
        (``JAX_COMPILATION_CACHE_DIR``), else a folder of the user's cache folder.
    """
    if cache == CACHE_OFF:
        jax.config.update("jax_enable_compilation_cache", False)
    elif cache is not None or jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(cache or cache_folder()))
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        try:
            jax.config.update("jax_num_cpu_devices", cores())
        except RuntimeError:  # the backend has started: a script's function called from a running program
            return


def restart_with_kept_memory() -> None:
    """Starts this process's program anew, in its place, with memory that the C library keeps once it has it.

    A training step on a CPU writes some hundred MB. In pages of 4 KiB a fifth of its time goes to getting them, so
    huge pages are asked for where Linux gives them on demand. And glibc gives large arrays back as soon as they are
    free, to get them again for the next call; here the process holds what it needed at its most until it ends.

    The C library reads its settings (``GLIBC_TUNABLES``) only when a program starts. Those that are given already stay
    as they are; does nothing where all are, or the library is another.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    given = os.environ.get("GLIBC_TUNABLES", "")
    named = {setting.partition("=")[0] for setting in given.split(":")}
    on_demand = _THP.exists() and "[madvise]" in _THP.read_text()
    wanted = (*_KEPT, _HUGE_PAGES) if on_demand else _KEPT
    missing = [setting for setting in wanted if setting.partition("=")[0] not in named]
    if missing:
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (given, *missing)))
        os.execv(sys.executable, sys.orig_argv)


def cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_folder() -> Path:
    """Folder of compiled programs; one for each kind of CPU, whose instructions they use."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    facts = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    kind = hashlib.sha256("\n".join([platform.machine(), platform.processor(), *facts]).encode()).hexdigest()[:12]
    return base / "spikernel_jax" / "compiled" / kind
