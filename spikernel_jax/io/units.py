"""Amounts as people write them: bytes and durations."""

import math
import operator
import re
from fractions import Fraction

import numpy as np

_UNITS = {"": 1, "b": 1}
for _power, _prefix in enumerate("kmgt", start=1):
    _UNITS[f"{_prefix}b"] = 1000**_power
    _UNITS[f"{_prefix}ib"] = 1024**_power


def parse_bytes(text: str | int) -> int:
    """Reads an amount of memory.

    Args:
      text: a number of bytes, or a number with a unit of either case, with or without a space between:
        B, kB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (powers of 1024).

    Returns:
      Whole bytes, a fraction rounded down so that a budget is never exceeded.

    Raises:
      ValueError: the text is no such amount, or it is less than one byte.
    """
    value = 0
    if isinstance(text, str):
        match = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]{0,18})?|\.[0-9]{1,18})\s*([a-z]*)\s*", text.lower())
        if match and match[2] in _UNITS:
            value = math.floor(Fraction(match[1]) * _UNITS[match[2]])
    elif isinstance(text, int | np.integer) and not isinstance(text, bool):
        value = int(text)
    if value < 1:
        raise ValueError(
            f"{text!r} is not an amount of memory: write a positive one such as 512KiB, 1.5MiB, 2MB or 100000"
        )
    return value


def format_bytes(count: int) -> str:
    """Writes a number of bytes (0 or more) in the largest fitting unit of 1024: "512.0 KiB"."""
    count = operator.index(count)
    if count < 0:
        raise ValueError(f"a number of bytes is 0 or more, got {count}")
    if count < 1024:
        return f"{count} B"
    amount = float(count)
    for unit in ("KiB", "MiB", "GiB"):
        amount /= 1024
        if round(amount, 1) < 1024:  # rounded first, so that nothing reads "1024.0 KiB"
            return f"{amount:.1f} {unit}"
    return f"{amount / 1024:.1f} TiB"


def duration(seconds: float, decimals: int = 0) -> str:
    """Writes a duration: "85 s", and from 90 s on in minutes, "12 min" or with `decimals` "12.3 min"."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.{decimals}f} min"
