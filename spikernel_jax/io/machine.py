"""How scripts set JAX up on a machine: all CPU cores for scoring, and compiled programs kept between runs."""

import hashlib
import os
import platform
import sys
from pathlib import Path

import jax

CACHE_OFF = "off"
_HUGE_PAGES = "glibc.malloc.hugetlb=1"
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


def restart_with_huge_pages() -> None:
    """Starts this process's program anew, in its place, with memory in huge pages where Linux gives them on demand.

    A training step on a CPU writes some hundred MB of fresh memory; in pages of 4 KiB, a fifth of its time goes to
    getting them. The C library reads its setting (``GLIBC_TUNABLES``) only when a program starts. Does nothing where
    the setting is there already, or huge pages are off or always given.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    on_demand = _THP.exists() and "[madvise]" in _THP.read_text()
    if not on_demand or "glibc.malloc.hugetlb" in tunables or platform.libc_ver()[0] != "glibc":
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, _HUGE_PAGES)))
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
