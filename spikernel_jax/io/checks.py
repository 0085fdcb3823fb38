"""Checks of single fields, each an error that names field and value."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def require_known(spec: Any, **known: Sequence[str]) -> None:
    """Raises ValueError for a field of a specification that is none of the names known for it."""
    for field, names in known.items():
        if (value := getattr(spec, field)) not in names:
            raise ValueError(f"{field}={value!r} is unknown; known: {', '.join(names)}")


def whole(field: str, value: Any, least: int, most: int | None = None) -> int:
    """A whole number in its range, as an int; ValueError naming the field else."""
    is_int = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_int or value < least or (most is not None and value > most):
        bound = "" if most is None else f", and at most {most:,}"
        raise ValueError(f"{field}={value!r} must be a whole number of at least {least}{bound}")
    return int(value)
