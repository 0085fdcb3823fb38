"""A run's folder: nothing half written, nothing mixed, errors of one line."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import polars as pl
import pytest

import scripts
from spikernel_jax.io import files, run_folder
from spikernel_jax.io.run_folder import RunFolder
from spikernel_jax.io.store import ResultStore

CONFIG = {"sizes": (1, 3), "train": {"epochs": 3, "lr": 0.1}, "out": Path("runs") / "a"}
ROOT = Path(__file__).resolve().parents[2]


def one_line(error: pytest.ExceptionInfo[ValueError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_create_records_what_it_ran_on(tmp_path):
    run = RunFolder.create(tmp_path / "a" / "b", CONFIG)
    record = json.loads((run.path / "config.json").read_text())
    assert run.config == {"sizes": [1, 3], "train": {"epochs": 3, "lr": 0.1}, "out": "runs/a"}
    assert run.config == record["config"]
    where = record["environment"]
    assert set(where["versions"]) == {"jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "spyx", "numpy"}
    assert all(where["versions"].values())
    assert where["device"]["count"] >= 1
    assert where["device"]["kind"]
    assert where["command"] == sys.argv
    assert where["created"].endswith("+00:00")
    assert record["resumed"] == []
    assert {p.name for p in run.path.iterdir()} == {"config.json", ".lock"}


def test_create_again_continues_and_keeps_the_first_environment(tmp_path):
    first = RunFolder.create(tmp_path, CONFIG).record()["environment"]
    for times in (1, 2):
        run = RunFolder.create(tmp_path, json.loads(json.dumps(CONFIG, default=str)))
        record = run.record()
        assert record["environment"] == first
        assert len(record["resumed"]) == times
    assert RunFolder.open(tmp_path) == run


def test_create_refuses_another_configuration_and_touches_nothing(tmp_path):
    RunFolder.create(tmp_path, CONFIG)
    before = contents(tmp_path)
    other = {"sizes": (1, 5), "train": {"epochs": 3, "lr": 0.2}, "seed": None, "out": "runs/a"}
    with pytest.raises(ValueError, match="another configuration") as error:
        RunFolder.create(tmp_path, other)
    text = one_line(error)
    assert "sizes: [1, 3] there, [1, 5] here" in text
    assert "train.lr: 0.1 there, 0.2 here" in text
    assert "seed: absent there, null here" in text
    assert "epochs" not in text
    assert "choose another --out or remove the folder" in text
    assert contents(tmp_path) == before


def test_create_refuses_a_folder_that_is_not_a_run(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"no config\.json") as error:
        RunFolder.create(tmp_path, CONFIG)
    one_line(error)
    assert contents(tmp_path) == {"thesis.txt": b"precious"}
    with pytest.raises(ValueError, match="not a folder"):
        RunFolder.create(tmp_path / "thesis.txt", CONFIG)


def test_create_goes_on_where_a_killed_process_left_only_its_own_files(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".config.json.17-0a1b2c3d.tmp").write_text('{"conf')
    assert RunFolder.create(tmp_path, CONFIG).config["sizes"] == [1, 3]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, object()])
def test_what_json_cannot_hold_is_refused_before_anything_is_written(tmp_path, value):
    with pytest.raises(ValueError, match="JSON cannot hold the configuration"):
        RunFolder.create(tmp_path / "new", {"a": {"b": value}})
    assert not (tmp_path / "new").exists()
    run = RunFolder.create(tmp_path / "run", CONFIG)
    run.write_json("x.json", {"a": np.float32(0.5), "b": np.int64(3)})
    before = contents(run.path)
    with pytest.raises(ValueError, match="JSON cannot hold"):
        run.write_json("x.json", {"a": value})
    assert contents(run.path) == before
    assert run.read_json("x.json") == {"a": 0.5, "b": 3}


@pytest.mark.parametrize(
    ("text", "match"),
    [(None, "not a run"), ("{", "damaged"), ("", "damaged"), ("[]", "not as this run"), ("{}", "not as this run")],
)
def test_open_refuses_what_is_no_run(tmp_path, text, match):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=match) as error:
        RunFolder.open(tmp_path)
    one_line(error)
    with pytest.raises(ValueError, match="is not a folder"):
        RunFolder.open(tmp_path / "absent")


def test_summary_merges_and_seconds_merge_by_key(tmp_path):
    run = RunFolder.create(tmp_path, CONFIG)
    run.update_summary(best=1, seconds={"impact": 2.0, "search": 1.0})
    run.update_summary(other="x", best=2, seconds={"search": 3.0})
    seconds = {"impact": 2.0, "search": 3.0}
    assert run.read_json("summary.json") == {"best": 2, "other": "x", "seconds": seconds}
    (tmp_path / "summary.json").write_text('{"best": 2')
    with pytest.raises(ValueError, match=r"summary\.json is damaged"):
        run.update_summary(best=3)
    with pytest.raises(ValueError, match=r"absent\.json is missing"):
        run.read_json("absent.json")


def test_table_round_trip_and_damage(tmp_path, capfd):
    run = RunFolder.create(tmp_path, CONFIG)
    table = pl.DataFrame({"a": [1, 2, None], "b": ["x", "y", "z"], "c": [0.5, float("nan"), float("-inf")]})
    assert not (tmp_path / "tables").exists()
    run.write_table("scores", table)
    assert run.folder("figures") == tmp_path / "figures"
    assert (tmp_path / "figures").is_dir()
    assert run.read_table("scores", "experiments/search.py").equals(table, null_equal=True)
    with pytest.raises(ValueError, match=r"impact\.parquet is missing: run .*impact\.py --out .* first"):
        run.read_table("impact", "experiments/impact.py")
    path = tmp_path / "tables" / "scores.parquet"
    whole = path.read_bytes()
    for broken in (b"", whole[:3], whole[: len(whole) // 2], whole[:-1], b"PAR1" + bytes(50) + b"PAR1"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"scores\.parquet is not as this run wrote it: .*search\.py") as error:
            run.read_table("scores", "experiments/search.py")
        one_line(error)
        if not broken.endswith(b"PAR1"):
            assert capfd.readouterr().err == ""  # polars' panic is not seen


def test_a_table_without_a_column_is_named(tmp_path):
    run = RunFolder.create(tmp_path, CONFIG)
    run.write_table("scores", pl.DataFrame({"a": [1], "b": [2]}))
    assert run.read_table("scores", "experiments/search.py", columns=("b", "a")).columns == ["a", "b"]
    with pytest.raises(ValueError, match=r"scores\.parquet lacks the column 'x', 'y': .*search\.py") as error:
        run.read_table("scores", "experiments/search.py", columns=("x", "a", "y"))
    one_line(error)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")

    def fail():
        with files.atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail()
    assert contents(tmp_path) == {"x": b"old"}


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "model"
    path.mkdir()
    (path / "x").write_text("old")

    def make(fail: bool) -> None:
        with files.atomic_folder(path) as fresh:
            fresh.mkdir()
            (fresh / "y").write_text("new")
            if fail:
                raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        make(fail=True)
    assert contents(tmp_path) == {"model/x": b"old"}
    moves = iter([False, True, False])  # the second of the two moves fails; the first is undone
    replace = os.replace

    def failing(*where):
        if next(moves):
            raise OSError("no")
        replace(*where)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(OSError, match="no"):
            make(fail=False)
    assert contents(tmp_path) == {"model/x": b"old"}
    make(fail=False)
    assert contents(tmp_path) == {"model/y": b"new"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_folder_with_room_is_made_and_left_empty(tmp_path):
    files.check_room(tmp_path / "a" / "b", 1000)
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "a" / "b" / "x").write_text("here")
    files.check_room(str(tmp_path / "a" / "b"), 0)
    assert contents(tmp_path) == {"a/b/x": b"here"}


def test_too_little_room_names_folder_needed_and_free(tmp_path):
    with pytest.raises(ValueError, match="make room or choose another folder") as error:
        files.check_room(tmp_path / "a" / "b", 10**18)
    found = re.fullmatch(rf"{tmp_path}/a/b needs {10**18} bytes, but (\d+) are free there: .*", one_line(error))
    assert found
    assert int(found[1]) == pytest.approx(os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize, rel=0.05)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["run", "run/deep/folder"])
@pytest.mark.parametrize("link", [False, True])
def test_a_file_or_broken_link_in_the_way(where, link, tmp_path):
    if link:
        (tmp_path / "run").symlink_to("nowhere")
    else:
        (tmp_path / "run").write_text("precious")
    with pytest.raises(ValueError, match=rf"{tmp_path / where} needs 5 bytes.*, but cannot be written to") as error:
        files.check_room(tmp_path / where, 5)
    one_line(error)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]
    assert link or (tmp_path / "run").read_text() == "precious"


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a small file system")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_small_disk_has_the_room_that_it_has(tmp_path):
    with mounted(disk := tmp_path / "disk", "size=64k"):
        files.check_room(disk / "run", 65536)
        with pytest.raises(ValueError, match=f"{disk}/run needs 65537 bytes, but 65536 are free there"):
            files.check_room(disk / "run", 65537)
        (disk / "full").write_bytes(bytes(65536))
        with pytest.raises(ValueError, match=rf"{disk}/run needs 0 bytes \(0 are free\), but .* No space left"):
            files.check_room(disk / "run", 0)
        assert contents(disk) == {"full": bytes(65536)}
        assert list((disk / "run").iterdir()) == []


def test_a_disk_that_cannot_be_written(tmp_path):
    with mounted(disk := tmp_path / "disk", "size=64k,ro"):
        for folder in (disk, disk / "run"):
            with pytest.raises(ValueError, match=rf"{folder} needs 1 bytes \(\d+ are free\), but .* Read-only"):
                files.check_room(folder, 1)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_disk_that_fails_late_is_found_too(step, tmp_path, monkeypatch):
    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(files.os, step, fail)
    with pytest.raises(ValueError, match=rf"{tmp_path} needs 1 bytes .*Input/output error"):
        files.check_room(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_git_state_of_a_checkout_of_its_own_only(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    assert run_folder._git_state(tmp_path) is None
    git("init")
    assert run_folder._git_state(tmp_path) is None  # no commit yet
    (tmp_path / "a.py").write_text("1")
    git("add", ".")
    git("commit", "-m", "x")
    state = run_folder._git_state(tmp_path)
    assert state is not None
    assert (len(state["commit"]), state["dirty"]) == (40, False)
    (tmp_path / "result.json").write_text("{}")  # a result is no change of the program
    assert run_folder._git_state(tmp_path) == state
    (tmp_path / "b.py").write_text("2")
    assert run_folder._git_state(tmp_path) == {**state, "dirty": True}
    (tmp_path / "inner").mkdir()
    assert run_folder._git_state(tmp_path / "inner") is None


# JSON lines


def test_jsonl_is_written_whole(tmp_path):
    path = tmp_path / "m.jsonl"
    records = [{"epoch": 1, "name": "é"}, {"epoch": 2, "x": [1.5, None]}]
    files.write_jsonl(path, records)
    assert scripts.read_jsonl(path) == records
    with pytest.raises(ValueError, match="JSON cannot hold"):
        files.write_jsonl(path, [{"loss": float("nan")}])
    assert scripts.read_jsonl(path) == records
    assert contents(tmp_path).keys() == {"m.jsonl"}


# Pieces of a long computation


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


def test_join_waits_for_what_the_first_process_makes(tmp_path, monkeypatch):
    run = RunFolder.create(tmp_path / "run", CONFIG)
    assert RunFolder.join(run.path, CONFIG, run.state()) == run
    with pytest.raises(ValueError, match=r"seed: absent there, 1 here"):
        RunFolder.join(run.path, {**CONFIG, "seed": 1}, run.state())
    with pytest.raises(ValueError, match="holds results of another computation"):
        ResultStore.join(ResultStore(tmp_path / "c", {"seed": 0}).folder, {"seed": 1})
    state = run.state()
    RunFolder.create(run.path, CONFIG)
    monkeypatch.setattr(files, "_SHARED_SECONDS", 0.2)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json, .* is not seen here .* same folder") as error:
        RunFolder.join(run.path, CONFIG, state)  # a copy on this host that an earlier start left, say
    one_line(error)
    with pytest.raises(ValueError, match=r"fingerprint\.json, .* is not seen here"):
        ResultStore.join(tmp_path / "absent", {})
    assert contents(tmp_path) == before


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


# Other processes, and processes that are killed


def child(code: str, *arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "."})


LOCKER = """
import sys, time
from pathlib import Path
from spikernel_jax.io.run_folder import RunFolder
with RunFolder(Path(sys.argv[1]), {}, "").lock():
    print("locked", flush=True)
    time.sleep(60)
"""


def test_lock_excludes_another_process_and_dies_with_it(tmp_path):
    run = RunFolder.create(tmp_path, CONFIG)
    with child(LOCKER, tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        before = contents(tmp_path)
        with pytest.raises(ValueError, match="another process is using this run folder"), run.lock():
            pass
        with pytest.raises(ValueError, match="another process is using this run folder"):
            RunFolder.create(tmp_path, CONFIG)
        assert contents(tmp_path) == before
        process.send_signal(signal.SIGKILL)
        process.wait()
    with run.lock(), pytest.raises(ValueError, match="another process"), run.lock():
        pass
    with run.lock():
        pass


KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import numpy as np
from spikernel_jax.io import seal
from spikernel_jax.io.store import ResultStore
from spikernel_jax.io.run_folder import RunFolder

run = RunFolder(Path(sys.argv[1]), {}, "own")
sealed = run.path / "table"
moments = random.Random(0)

def write():
    store = ResultStore(run.path / "chunks", {"seed": 0})
    for index in range(1_000_000):
        store.save(index % 40, a=np.full(100_000, index), b=np.full(1000, -index))
        run.update_summary(step=index, padding="x" * 50_000, seconds={str(index % 7): 1.0})
        seal.write(sealed, bytes([index % 256]) * 100_000, "own")

for _ in range(12):
    writer = os.fork()
    if writer == 0:
        write()
    time.sleep(moments.uniform(0.02, 0.12))
    os.kill(writer, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1]) == -signal.SIGKILL
    store = ResultStore(run.path / "chunks", {"seed": 0})
    for index in store.done():
        piece = store.load(index)
        assert (piece["a"] == np.full(100_000, piece["a"][0])).all()
        assert (piece["b"] == np.full(1000, -piece["a"][0])).all()
    if (run.path / "summary.json").exists():
        assert len(run.read_json("summary.json")["padding"]) == 50_000
    if sealed.exists():
        assert len(set(seal.read(sealed, "own", ""))) == 1
print(len(store.done()), int(sealed.exists()))
"""


def test_kill_9_leaves_only_whole_results(tmp_path):
    with child(KILLS, tmp_path) as process:
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    chunks, records = map(int, printed.split())
    assert chunks >= 1
    assert records >= 1


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
