"""Kernels and kernel sets: what the convolutions of a cell may be, and how options and tables write it."""

import re
from collections.abc import Iterable

from spikernel_jax.operations.builtin import LARGEST_KERNEL
from spikernel_jax.operations.operation import GENERIC, get_operation

Kernel = int | str  # the size k of a plain convolution convk, or the name of another generic operation


def operation_of(kernel: Kernel) -> str:
    """Name of the operation: ``conv3`` of 3."""
    return f"conv{kernel}" if isinstance(kernel, int) else kernel


def kernel_of(operation: str) -> Kernel:
    """The kernel that an operation's name stands for: 3 of ``conv3``."""
    plain = re.fullmatch(r"conv([0-9]+)", operation)
    return int(plain[1]) if plain else operation


def kernel_name(kernel: Kernel) -> str:
    """In the names of trainings: ``k3`` of 3, an operation's name as it is."""
    return f"k{kernel}" if isinstance(kernel, int) else kernel


def in_order(kernels: Iterable[Kernel]) -> tuple[Kernel, ...]:
    """Sizes from the smallest on, then names."""
    return tuple(sorted(kernels, key=lambda kernel: (isinstance(kernel, str), kernel)))


def kernel_set(text: str, what: str = "kernel set") -> tuple[Kernel, ...]:
    """Reads a kernel set as options and tables write it, ``"3,5"``; `kernel_set_text` writes it.

    Args:
      text: sizes, or names of generic operations, with commas, in any order.
      what: names the text in an error, as ``"--sets"``.

    Returns:
      The kernels `in_order`.

    Raises:
      ValueError: unless they are different odd sizes up to 15, or generic operations.
    """
    parts = [part.strip() for part in text.split(",")]
    try:
        known = [get_operation(f"conv{part}" if part.isdecimal() else part) for part in parts]
    except ValueError as error:
        wanted = f"want different odd sizes from 1 to {LARGEST_KERNEL} with commas, as 3,5"
        why = wanted if all(re.fullmatch(r"[-+0-9. ]*", part) for part in parts) else error
        raise ValueError(f"{what} {text!r}: {why}") from None
    names = [operation.name for operation in known]
    if len(set(names)) < len(names) or any(operation.kind != GENERIC for operation in known):
        raise ValueError(f"{what} {text!r}: want different odd sizes, or generic operations, with commas, as 3,5")
    return in_order(map(kernel_of, names))


def size_set(text: str, what: str) -> tuple[int, ...]:
    """Reads a kernel set of sizes alone; ValueError else."""
    kernels = kernel_set(text, what)
    sizes = tuple(kernel for kernel in kernels if isinstance(kernel, int))
    if len(sizes) < len(kernels):
        raise ValueError(f"{what} {text!r}: want sizes alone here, as 3,5")
    return sizes


def kernel_set_text(kernels: Iterable[Kernel]) -> str:
    """Writes a kernel set: ``"3,5"``."""
    return ",".join(map(str, kernels))
