"""Pieces of a long computation come back whole, or are told to be computed again."""

import contextlib
import signal
import warnings
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from disk import child, one_line
from spikernel_jax.io.store import ResultStore


def test_pieces_round_trip(tmp_path):
    store = ResultStore(tmp_path / "chunks", {"cells": (1, 2), "seed": 0})
    assert store.done() == set()
    store.save(3, score=np.array([1.0, np.nan, -np.inf]), name=np.array(["a", "bc"]), index=np.int64(7))
    store.save(1_234_567, a=np.zeros((2, 0), np.float32))
    again = ResultStore(tmp_path / "chunks", {"cells": [1, 2], "seed": 0})
    assert again.done() == {3, 1_234_567}
    piece = again.load(3)
    np.testing.assert_array_equal(piece["score"], [1.0, np.nan, -np.inf])
    assert piece["name"].tolist() == ["a", "bc"]
    assert piece["index"] == 7
    assert again.load(1_234_567)["a"].shape == (2, 0)


def test_pieces_of_two_computations_do_not_mix(tmp_path):
    ResultStore(tmp_path / "c", {"seed": 0, "score": {"form": "paper"}}).save(0, a=1)
    with pytest.raises(ValueError, match=r'score\.form: "paper" there, "code" here') as error:
        ResultStore(tmp_path / "c", {"seed": 0, "score": {"form": "code"}})
    one_line(error)
    (tmp_path / "c" / "fingerprint.json").write_text("{")
    with pytest.raises(ValueError, match=r"fingerprint\.json is damaged"):
        ResultStore(tmp_path / "c", {"seed": 0})
    (tmp_path / "c" / "fingerprint.json").unlink()
    with pytest.raises(ValueError, match=r"no fingerprint\.json"):
        ResultStore(tmp_path / "c", {"seed": 0})


def test_a_damaged_piece_is_named(tmp_path):
    store = ResultStore(tmp_path / "c", {})
    store.save(0, a=np.arange(1000), b=np.ones(5))
    path = tmp_path / "c" / "chunk-000000.npz"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[400] ^= 0xFF
    half = len(whole) // 2
    for broken in (b"", b"hello", whole[:100], whole[:-1], whole[:half], bytes(flipped), b"\x93NUMPY"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"chunk-000000\.npz is damaged .* computed again") as error:
            store.load(0)
        one_line(error)
    with pytest.raises(ValueError, match=r"piece 5 has not been computed"):
        store.load(5)


def test_no_flipped_bit_of_a_piece_goes_unseen(tmp_path):
    store = ResultStore(tmp_path, {})
    arrays = {"score": np.arange(6, dtype=np.float32).reshape(2, 3), "name": np.array(["a", "bc"])}
    store.save(0, **arrays)
    path = tmp_path / "chunk-000000.npz"
    whole = path.read_bytes()
    flips = np.random.default_rng(0).choice(8 * len(whole), 1500, replace=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for flip in flips.tolist():
            broken = bytearray(whole)
            broken[flip // 8] ^= 1 << flip % 8
            path.write_bytes(broken)
            piece = None
            with contextlib.suppress(ValueError):  # any other type of error is a failure
                piece = store.load(0)
            if piece is not None:  # it was a date, say
                assert piece.keys() == arrays.keys()
                for name, array in arrays.items():
                    assert piece[name].dtype == array.dtype
                    np.testing.assert_array_equal(piece[name], array)


def test_a_chunk_with_other_arrays_or_of_an_earlier_version(tmp_path):
    store = ResultStore(tmp_path, {})
    store.save(0, a=np.arange(4))
    path = tmp_path / "chunk-000000.npz"
    with np.load(path) as archive:
        digest = archive["sha256"]
    others: tuple[dict[str, Any], ...] = (
        {"a": np.arange(1, 5)},
        {"a": np.arange(4, dtype=np.int32)},
        {"b": np.arange(4)},
        {},
    )
    for arrays in others:
        np.savez(path, sha256=digest, **arrays)
        with pytest.raises(ValueError, match=r"is damaged \(its arrays are not"):
            store.load(0)
    np.savez(path, a=np.arange(4))  # without a sum
    with pytest.raises(ValueError, match="is damaged"):
        store.load(0)
    for other, index in ((ResultStore(tmp_path / "other", {"seed": 9}), 0), (store, 1)):
        other.save(index, a=np.arange(4))
        path.write_bytes((other.folder / f"chunk-{index:06d}.npz").read_bytes())
        with pytest.raises(ValueError, match="is damaged"):  # another computation's, another index's
            store.load(0)


@pytest.mark.parametrize(
    ("index", "arrays"),
    [
        (0, {"sha256": np.zeros(2)}),
        (-1, {"a": 1}),
        (0, {"a": np.array([None])}),
        (0, {"a": np.zeros(2, ml_dtypes.bfloat16)}),
        (0, {"file": np.zeros(2)}),
        (0, {"allow_pickle": np.zeros(2)}),
    ],
)
def test_chunks_that_would_not_come_back_are_refused(tmp_path, index, arrays):
    store = ResultStore(tmp_path / "c", {})
    with pytest.raises(ValueError, match=r"index is 0 or more|cannot store array"):
        store.save(index, **arrays)
    assert store.done() == set()


KILLED_BEFORE_MOVING = """
import os, signal, sys
from spikernel_jax.io.store import ResultStore
store = ResultStore(sys.argv[1], {})
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
store.save(0, a=[1, 2, 3])
"""


def test_kill_9_between_writing_and_moving(tmp_path):
    with child(KILLED_BEFORE_MOVING, tmp_path) as process:
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".chunk-000000.npz.*.tmp"))) == 1
    store = ResultStore(tmp_path, {})
    assert store.done() == set()
    store.save(0, a=[4])
    assert store.load(0)["a"].tolist() == [4]
    assert len(list(tmp_path.glob(".*.tmp"))) == 1  # it might be another process's, being written
    store.sweep()
    assert not list(tmp_path.glob(".*.tmp"))
    assert store.load(0)["a"].tolist() == [4]
