"""The way to score a population: the one that was the quicker when timed, where timing is worth it."""

import itertools
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from spikernel_jax.scoring import choice

ROWS = np.arange(6 * 1000, dtype=np.int8).reshape(1000, 6)
SEEDS, CHUNK, LANES = 2, 16, 3


class Timed:
    """A scorer that only spends time of a clock that goes as told."""

    def __init__(self, method: str, seconds: float, time: list[float]):
        self.method, self.seeds, self.chunk, self.lanes = method, SEEDS, CHUNK, LANES
        self._seconds, self._time, self._calls = seconds, time, itertools.count()

    def order(self, rows: np.ndarray) -> np.ndarray:
        return np.arange(len(rows))[::-1]

    def submit(self, replicate: int, parts: Sequence[np.ndarray]) -> Callable[[], None]:
        assert replicate < SEEDS
        assert 1 <= len(parts) <= LANES
        assert all(1 <= len(part) <= CHUNK for part in parts)
        compiles = 1000.0 * (next(self._calls) == 0)

        def wait() -> None:
            self._time[0] += compiles + self._seconds

        return wait


def chosen(rows: np.ndarray, seconds: dict[str, float], becomes: str = "batched") -> tuple[str | None, list, list[str]]:
    """What is chosen where a call takes so long, the methods that were made, and what was said."""
    time, made, said = [0.0], [], []

    def make(method: str | None) -> Any:
        made.append(method)
        name = "shared" if method is None else becomes
        return Timed(name, seconds[name], time)

    return choice.quickest(make, rows, said.append, lambda: time[0]), made, said


def test_the_quicker_of_both_goes_on_and_its_rate_is_without_compilation():
    best, made, said = chosen(ROWS, {"shared": 4.0, "batched": 2.0})
    assert (best, made) == ("batched", [None, "batched"])
    assert said == ["  ways of scoring, timed here: shared 12 cells/s, batched 24 cells/s; going on with batched"]
    best, made, said = chosen(ROWS, {"shared": 2.0, "batched": 4.0})
    assert (best, made) == ("shared", [None, "batched"])
    assert said[0].endswith("going on with shared")


def test_little_to_score_is_not_timed():
    most = CHUNK * LANES * (choice.LEAST_CALLS // SEEDS - 1)
    assert chosen(ROWS[:most], {"shared": 1e6}) == (None, [None], [])
    quick = choice.LEAST_SECONDS / (SEEDS * len(ROWS)) * CHUNK * LANES
    assert chosen(ROWS, {"shared": 0.99 * quick}) == (None, [None], [])
    assert chosen(ROWS, {"shared": 1.01 * quick, "batched": 9.0})[:2] == ("shared", [None, "batched"])


def test_a_batch_without_memory_is_known_by_what_it_became():
    best, _, said = chosen(ROWS, {"shared": 4.0, "each": 1.0}, becomes="each")
    assert best == "each"
    assert "each 48 cells/s" in said[0]
    assert chosen(ROWS, {"shared": 4.0}, becomes="shared")[0] == "shared"


def test_a_run_goes_on_as_it_began(tmp_path):
    path = tmp_path / "low.json"
    assert choice.remembered(path, lambda: "batched") == "batched"
    assert choice.remembered(path, lambda: "shared") == "batched"
    path.unlink()
    assert choice.remembered(path, lambda: None) is None
    assert choice.remembered(path, lambda: "shared") is None
    path.write_text('"slow"')
    with pytest.raises(ValueError, match=r"low\.json holds 'slow'; want null or one of shared, batched, each"):
        choice.remembered(path, lambda: "shared")
    path.write_text("{")
    with pytest.raises(ValueError, match=r"low\.json is damaged"):
        choice.remembered(path, lambda: "shared")


def test_no_cpu_is_timed(monkeypatch):
    for platform, timed in (("cpu", False), ("gpu", True), ("tpu", True)):
        device = types.SimpleNamespace(platform=platform)
        assert choice.is_timed([device]) == timed
        monkeypatch.setattr(choice.jax, "local_devices", lambda device=device: [device])
        assert choice.is_timed() == timed
