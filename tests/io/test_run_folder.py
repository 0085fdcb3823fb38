"""A run's folder: nothing half written, nothing mixed, errors of one line."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from disk import child, contents, one_line
from spikernel_jax.io import files, run_folder
from spikernel_jax.io.run_folder import RunFolder
from spikernel_jax.io.store import ResultStore

CONFIG = {"sizes": (1, 3), "train": {"epochs": 3, "lr": 0.1}, "out": Path("runs") / "a"}


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
