"""Of many cases of one promise, those that the quick line tries; all are tried by `-m slow`'s."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def mostly_slow(cases: Iterable[Any], quick: Callable[[Any], bool]) -> list[Any]:
    """The cases as parameters of a test, slow ones marked."""
    return [case if quick(case) else pytest.param(case, marks=pytest.mark.slow) for case in cases]
