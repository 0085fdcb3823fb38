"""Candidates, choice under a budget, and scoring that goes on where a killed process stopped."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from convolutions import conv_edges
from spikernel_jax.cells.space import CellSpace
from spikernel_jax.scoring.bank import make_bank
from spikernel_jax.scoring.population import score_population
from spikernel_jax.scoring.replicates import Scores
from spikernel_jax.scoring.scorer import Scorer
from spikernel_jax.search import queue
from spikernel_jax.snn.spec import NetworkSpec

KEY = jax.random.key(7)
UNION = CellSpace((1, 3, 5, 7))
SPACE = CellSpace((3,))
SPEC = NetworkSpec((6, 6, 1), 3, SPACE, channels=1, time_steps=2)
CELLS, CHUNK = 400, 16


class OneLane:
    """One part a call, in the caller's order."""

    lanes = 1

    def __init__(self, bank: Any, images: Any, spec: Any, score: str, chunk: int):
        device = jax.local_devices()[:1]
        self.scorer = Scorer(bank, images, spec, score=score, chunk=chunk, devices=device)

    def submit(self, replicate, parts):
        waiting = [self.scorer.submit(replicate, [part]) for part in parts]
        return lambda: [wait()[0] for wait in waiting]

    def order(self, rows):
        return np.arange(len(rows))


class TwoLanes(OneLane):
    """Two parts a call, and an order of its own; `running` holds the calls whose results were not asked for yet."""

    lanes = 2

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.calls: list[tuple[int, list[int]]] = []  # replicate, rows of each part
        self.running = 0

    def submit(self, replicate, parts):
        wait = super().submit(replicate, parts)
        self.calls.append((replicate, [len(part) for part in parts]))
        self.running += 1

        def waited():
            self.running -= 1
            return wait()

        return waited

    def order(self, rows):
        return np.random.default_rng(len(rows)).permutation(len(rows))


def arguments(scorer: type[OneLane] = TwoLanes, **changes: Any) -> dict[str, Any]:
    """The scoring job of this file; the killed process runs the same."""
    images = np.random.default_rng(0).normal(size=(2, 4, 6, 6, 1)).astype(np.float32)
    given: dict[str, Any] = {"score": "sahd_paper", "chunk": CHUNK, "spec": SPEC, "images": images, "seed": 0}
    given |= {"rows": queue.candidates(SPACE, (3,))[:CELLS]} | changes
    spec, images, score, chunk = (given[name] for name in ("spec", "images", "score", "chunk"))
    bank = jax.jit(make_bank, static_argnums=(1, 2))(KEY, spec, len(images))
    return {
        "rows": given["rows"],
        "scorer": scorer(bank, images, spec, score, chunk),
        "seeds": len(images),
        "chunk": chunk,
        "inputs": queue.inputs_of(spec, score, "float32", bank, images) | {"data": "noise", "seed": given["seed"]},
    }


def job(folder: Path, progress: Any = None, **changes: Any) -> Scores:
    return queue.score_units(queue.Units(folder=folder, **arguments(**changes)), progress=progress)


def test_exhaustive_candidates_are_the_sets_own_cells():
    own = CellSpace((1, 3))
    rows = queue.candidates(UNION, (1, 3))
    cells = own.enumerate()
    assert len(rows) == len(cells)
    assert (rows == UNION.convert(cells, own)).all()
    assert (UNION.canonical(rows) == rows).all()
    assert len(np.unique(rows, axis=0)) == len(rows)
    used = {size for row in rows[::97] for _, _, size in conv_edges(UNION, row)}
    assert used == {1, 3}


def test_sets_share_the_cells_of_their_common_sizes():
    a, b = (UNION.identity(queue.candidates(UNION, s)) for s in ((1, 3), (3, 5)))
    alone = UNION.identity(queue.candidates(UNION, (3,)))
    assert set(a) & set(b) == set(alone)


def test_random_candidates_are_reproducible_distinct_and_canonical():
    draw = [queue.candidates(UNION, (3, 7), strategy="random", samples=300, key=KEY) for _ in range(2)]
    assert (draw[0] == draw[1]).all()
    assert (UNION.canonical(draw[0]) == draw[0]).all()
    assert len(np.unique(draw[0], axis=0)) == len(draw[0]) < 300
    everything = set(UNION.identity(queue.candidates(UNION, (3, 7))))
    assert set(UNION.identity(draw[0])) <= everything
    narrower = queue.candidates(CellSpace((3, 7)), (3, 7), strategy="random", samples=300, key=KEY)
    assert (UNION.identity(draw[0]) == CellSpace((3, 7)).identity(narrower)).all()  # the set alone decides
    other = queue.candidates(UNION, (3, 7), strategy="random", samples=300, key=jax.random.key(8))
    assert set(UNION.identity(other)) != set(UNION.identity(draw[0]))


def test_the_budget_rules_out_random_candidates_before_they_are_scored():
    spec = NetworkSpec((8, 8, 1), 4, UNION, channels=4, time_steps=2)
    every = queue.candidates(UNION, (1, 7), strategy="random", samples=200, key=KEY)
    memory = queue.memory_of(spec, every, 8)
    budget = int(np.median(memory))
    kept = queue.candidates(
        UNION, (1, 7), strategy="random", samples=200, key=KEY,
        fits=lambda rows: queue.memory_of(spec, rows, 8) <= budget,
    )  # fmt: skip
    assert 0 < len(kept) < len(every)
    assert (kept == every[memory <= budget]).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strategy": "luck"}, "strategy='luck' is unknown; known: exhaustive, random"),
        ({"strategy": "random", "key": KEY, "samples": 0}, "samples=0"),
        ({"strategy": "random"}, "key"),
        ({"kernel_set": (1, 9)}, "conv9"),
        ({"kernel_set": (2,)}, "conv2"),
    ],
)
def test_candidates_refuse_bad_input(options, words):
    with pytest.raises(ValueError, match=words):
        queue.candidates(UNION, **({"kernel_set": (1, 3)} | options))


def best_by_loop(scores: np.ndarray, memory: np.ndarray, budget: int | None) -> int | None:
    best = None
    for i, (score, size) in enumerate(zip(scores.tolist(), memory.tolist(), strict=True)):
        if not np.isfinite(score) or (budget is not None and size > budget):
            continue
        if best is None or (score, -size) > (scores[best], -memory[best]):
            best = i
    return best


def test_best_under_budget_equals_a_loop():
    rng = np.random.default_rng(0)
    for _ in range(300):
        n = int(rng.integers(1, 12))
        scores = rng.choice([1.0, 2.0, 3.0, np.nan, -np.inf, np.inf], n)
        memory = rng.integers(1, 6, n)
        for budget in (None, 0, 2, 4):
            assert queue.best_under_budget(scores, memory, budget) == best_by_loop(scores, memory, budget)


def test_best_under_budget_by_hand():
    scores, memory = np.array([5.0, 5.0, 9.0, np.nan, -np.inf]), np.array([30, 20, 90, 1, 1])
    assert queue.best_under_budget(scores, memory, None) == 2
    assert queue.best_under_budget(scores, memory, 89) == 1  # a tie goes to less memory
    assert queue.best_under_budget(scores, memory, 19) is None  # only scores that are no numbers fit
    assert queue.best_under_budget(np.array([np.nan]), np.array([1]), None) is None


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Scores]:
    """An uninterrupted job."""
    folder = tmp_path_factory.mktemp("scores") / "store"
    return folder, job(folder)


def equal(got: Scores, expected: Scores) -> None:
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_chunks_equal_one_population(finished):
    _, scores = finished
    rows = queue.candidates(SPACE, (3,))[:CELLS]
    bank = jax.jit(make_bank, static_argnums=(1, 2))(KEY, SPEC, 2)
    images = np.random.default_rng(0).normal(size=(2, 4, 6, 6, 1)).astype(np.float32)
    whole = score_population(rows, bank, images, SPEC)
    assert len(scores.scores) == len(rows) > 3 * CHUNK
    assert np.isfinite(scores.scores).mean() > 0.9  # a net this small may see two images alike
    np.testing.assert_allclose(scores.replicates, whole.replicates, rtol=1e-5)
    np.testing.assert_array_equal(scores.lif_calls, whole.lif_calls)
    equal(job(finished[0]), scores)


def test_one_lane_gives_the_bits_of_two_in_the_same_files(finished, tmp_path):
    class OneLane(TwoLanes):
        lanes = 1

    equal(job(tmp_path / "store", scorer=OneLane), finished[1])
    for path in finished[0].glob("chunk-*.npz"):
        assert (tmp_path / "store" / path.name).read_bytes() == path.read_bytes()
    job(finished[0], scorer=OneLane)  # and the fingerprints are equal


def test_a_call_holds_one_replicate_and_the_next_one_runs_before_results_are_written(tmp_path, monkeypatch):
    given, running = arguments(rows=queue.candidates(SPACE, (3,))[: 2 * CHUNK + 3]), []  # three chunks, one short
    scorer, save = given["scorer"], queue.ResultStore.save

    def saving(store, index, /, **arrays):
        running.append(scorer.running)
        save(store, index, **arrays)

    monkeypatch.setattr(queue.ResultStore, "save", saving)
    queue.score_units(queue.Units(folder=tmp_path / "store", **given))
    # Six units in calls of two: the second would hold the end of replicate 0 and the start of replicate 1.
    assert scorer.calls == [(0, [CHUNK, CHUNK]), (0, [3]), (1, [CHUNK]), (1, [CHUNK, 3])]
    assert running == [1, 1, 1, 1, 0, 0]


def test_progress_counts_candidates(tmp_path):
    seen: list[queue.Progress] = []
    rows = queue.candidates(SPACE, (3,))[: 2 * CHUNK + 3]
    scores = job(tmp_path / "store", seen.append, rows=rows)
    np.testing.assert_allclose([p.done for p in seen], np.cumsum([CHUNK, CHUNK, 3, CHUNK, CHUNK, 3]) / 2)
    assert {p.total for p in seen} == {len(rows)}
    ordered = scores.replicates[TwoLanes.order(None, rows)]  # pyright: ignore[reportArgumentType]
    for p, known in ((seen[0], ordered[:CHUNK, :1]), (seen[2], ordered[:, :1]), (seen[-1], ordered)):
        means = known.mean(1)
        np.testing.assert_allclose(p.best, means[np.isfinite(means)].max())
    assert seen[-1].left == 0 < seen[0].left


@pytest.mark.parametrize("name", ["seeds", "chunk", "rows"])
def test_an_empty_job_is_refused_and_nothing_written(name, tmp_path):
    given = arguments()
    given[name] = given["rows"][:0] if name == "rows" else 0
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        queue.score_units(queue.Units(folder=tmp_path / "store", **given))
    assert not (tmp_path / "store").exists()


def test_goes_on_after_kill_with_the_same_bits(finished, tmp_path):
    whole, expected = finished
    folder = tmp_path / "store"
    code = (
        "import time, pathlib, test_queue as t\n"
        f"t.job(pathlib.Path({str(folder)!r}), progress=lambda p: time.sleep(0.05))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    try:
        end = time.monotonic() + 120
        while len(list(folder.glob("chunk-*.npz"))) < 3:
            assert process.poll() is None, "the job ended before it could be killed"
            assert time.monotonic() < end
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    there = {path.name: path.stat().st_mtime_ns for path in folder.glob("chunk-*.npz")}
    total = len(list(whole.glob("chunk-*.npz")))
    assert 3 <= len(there) < total

    seen = []
    equal(job(folder, progress=seen.append), expected)
    assert {name: (folder / name).stat().st_mtime_ns for name in there} == there  # none computed again
    last = seen[-1]
    assert last.done == last.total == len(expected.scores)
    assert last.scored == last.total - CHUNK * len(there) / 2
    np.testing.assert_allclose(last.best, expected.scores[np.isfinite(expected.scores)].max())
    assert last.left == 0 < last.rate
    assert {path.name for path in folder.glob("chunk-*.npz")} == {path.name for path in whole.glob("chunk-*.npz")}


@pytest.mark.parametrize(
    "changes",
    [
        {"score": "sahd_code"},
        {"chunk": CHUNK + 1},
        {"seed": 1},
        {"rows": queue.candidates(SPACE, (3,))[1 : CELLS + 1]},
        {"rows": queue.candidates(SPACE, (3,))[: CELLS - 1]},
        {"spec": NetworkSpec((6, 6, 1), 3, SPACE, channels=1, time_steps=3)},
        {"images": np.ones((2, 4, 6, 6, 1), np.float32)},
        {"images": np.random.default_rng(0).normal(size=(3, 4, 6, 6, 1)).astype(np.float32)},
        {"scorer": OneLane},  # the same rows in another order
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_refuses_to_mix_with_other_settings(changes, finished):
    folder, _ = finished
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="holds results of another computation") as error:
        job(folder, **changes)
    assert "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 no archive", None])
def test_a_damaged_chunk_is_one_line(damage, finished, tmp_path):
    folder, expected = finished
    path = folder / "chunk-000001.npz"
    good = path.read_bytes()
    try:
        path.write_bytes(good[: len(good) // 2] if damage is None else damage)
        with pytest.raises(ValueError, match=re.escape(str(path)) + ".* damaged") as error:
            job(folder)
        assert "\n" not in str(error.value)
        path.unlink()  # as the message says
        assert (job(folder).replicates == expected.replicates).all()
    finally:
        path.write_bytes(good)
