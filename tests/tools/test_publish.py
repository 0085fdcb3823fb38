"""Publishing a run: what is copied, what must not be deleted, and no path of the machine in it."""

import json
import shutil
from pathlib import Path

import chex
import jax
import polars as pl
import pytest

import publish_run as tool
from spikernel_jax import CellSpace, Model, NetworkSpec, load_model, save_model
from spikernel_jax.io import seal
from spikernel_jax.io.run_folder import RunFolder
from spikernel_jax.snn import network

ROOT = Path(__file__).resolve().parents[2]


KEPT = {"config.json", "summary.json", "report.md", "figures", "tables"}


def finished_run(path: Path) -> Path:
    """A run with every kind of file, opened twice, whose command lines hold paths of a machine."""
    config = {
        "data": "mnist5k",
        "preset": "cpu",
        "seed": 0,
        "data_dir": "/home/me/my data",
        "cell": "0>1:conv3",
        "out": "runs/a",
    }
    run = RunFolder.create(path, config)
    record = RunFolder.create(path, config).record()
    record["environment"]["command"] = ["/home/me/repo/experiments/explore.py", "--out=/srv/a b/run", "--bits", "8"]
    record["resumed"][0]["command"] = ["/home/me/repo/experiments/explore.py", "--data-dir", "/srv/tfds/"]
    seal.write_json(path / "config.json", record, "config.json")
    run.write_json("summary.json", {"checkpoint": "/home/me/runs/a/finalists/f0", "best": 0.5, "none": None})
    text = "Data in /home/me/tfds (or `/srv/x.y`), 1/2 of and/or, https://a.org/b/c, ![f](figures/f.png), ~/x/y, a /b\n"
    (path / "report.md").write_text(text)
    run.write_table("search", pl.DataFrame({"a": [1]}))
    (run.folder("figures") / "f.png").write_bytes(b"png")
    (run.folder("finalists") / "weights").write_bytes(b"large")
    return path


def publish(run: Path, results: Path, **options: bool) -> None:
    tool.publish(tool.Options(run, results, **options))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_publishes_without_checkpoints_and_paths(tmp_path):
    run = finished_run(tmp_path / "runs" / "a")
    publish(run, tmp_path / "results")
    there = tmp_path / "results" / "a"
    assert {entry.name for entry in there.iterdir()} == KEPT
    assert (there / "figures" / "f.png").read_bytes() == b"png"
    assert (there / "tables" / "search.parquet").read_bytes() == (run / "tables" / "search.parquet").read_bytes()
    copy = RunFolder.open(there)  # sealed anew, it is read as a run is
    assert copy.summary()["best"] == 0.5
    assert copy.read_table("search", "experiments/search.py", ())["a"].to_list() == [1]
    record = json.loads((there / "config.json").read_text())
    assert record["environment"]["command"] == ["explore.py", "--out=run", "--bits", "8"]
    assert record["resumed"][0]["command"] == ["explore.py", "--data-dir", "tfds"]
    same = {"data": "mnist5k", "preset": "cpu", "seed": 0, "cell": "0>1:conv3", "out": "runs/a"}
    assert record["config"] == same | {"data_dir": "my data"}
    summary = json.loads((there / "summary.json").read_text())
    assert summary.pop("seal")
    assert summary == {"checkpoint": "f0", "best": 0.5, "none": None}
    text = "Data in tfds (or `x.y`), 1/2 of and/or, https://a.org/b/c, ![f](figures/f.png), ~/x/y, a /b\n"
    assert (there / "report.md").read_text() == text


def test_a_page_is_drawn_of_the_copy(tmp_path, monkeypatch):
    run = finished_run(tmp_path / "runs" / "a")
    (run / "report.html").write_text("the run's own, in /home/me/runs")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the second replaces the first
        publish(run, Path("results"), page=True)
    text = (tmp_path / "results" / "a" / "report.html").read_text()
    assert "explore.py --out results/a" in text
    assert "/home/me" not in text
    assert str(tmp_path) not in text
    publish(run, Path("results"))
    assert not (tmp_path / "results" / "a" / "report.html").exists()


def test_a_training_is_published_with_the_log_of_its_epochs(tmp_path):
    run = finished_run(tmp_path / "runs" / "a")
    shutil.rmtree(run / "tables")
    with pytest.raises(ValueError, match=r"is not finished: it has no tables or training/metrics\.jsonl"):
        publish(run, tmp_path / "results")
    (run / "training" / "state").mkdir(parents=True)
    (run / "training" / "metrics.jsonl").write_text('{"epoch": 1}\n')
    RunFolder.open(run).write_json("plan.json", {"epochs": 1})
    for _ in range(2):  # the second replaces the first
        publish(run, tmp_path / "results")
        there = contents(tmp_path / "results" / "a")
        assert set(there) == {
            "config.json", "summary.json", "report.md", "figures/f.png", "plan.json", "training/metrics.jsonl"
        }  # fmt: skip
        assert there["training/metrics.jsonl"] == b'{"epoch": 1}\n'


def test_a_new_copy_replaces_the_old_one(tmp_path, monkeypatch):
    run = finished_run(tmp_path / "runs" / "a")
    publish(run, tmp_path / "results")
    (run / "figures" / "f.png").rename(run / "figures" / "g.png")
    before = contents(tmp_path / "results")
    with monkeypatch.context() as patch:
        patch.setattr(tool, "_text_without_paths", None)
        with pytest.raises(TypeError):
            publish(run, tmp_path / "results")
    assert contents(tmp_path / "results") == before
    publish(run, tmp_path / "results")
    assert [entry.name for entry in (tmp_path / "results").iterdir()] == ["a"]
    assert [entry.name for entry in (tmp_path / "results" / "a" / "figures").iterdir()] == ["g.png"]


def test_the_model_is_published_where_it_is_asked_for_and_knows_no_machine(tmp_path):
    run = finished_run(tmp_path / "runs" / "a")
    with pytest.raises(ValueError, match="checkpoint: no such model folder"):
        tool.publish(tool.Options(run, tmp_path / "results", checkpoint=True))
    assert not (tmp_path / "results").exists()
    spec = NetworkSpec((8, 8, 1), 2, CellSpace((3,)), channels=2, time_steps=1)
    cell = tuple(spec.space.parse("0>3:conv3").tolist())
    model = Model(spec, cell, *network.init(jax.random.key(0), spec, cell), (0.5,), (0.3,), {"data": "mnist5k"})
    save_model(run / "checkpoint", model)
    for _ in range(2):  # the second replaces the first
        tool.publish(tool.Options(run, tmp_path / "results", checkpoint=True))
    there = load_model(tmp_path / "results" / "a" / "checkpoint")
    chex.assert_trees_all_equal((there.params, there.stats), (model.params, model.stats))
    assert there.metrics == model.metrics
    before = contents(tmp_path / "results")
    with pytest.raises(ValueError, match="has a checkpoint, which the new copy would not: give --checkpoint"):
        publish(run, tmp_path / "results")
    assert contents(tmp_path / "results") == before
    for folder in (run / "checkpoint", tmp_path / "results" / "a" / "checkpoint"):
        assert not [name for name, own in contents(folder).items() if str(tmp_path).encode() in own]


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
def test_what_is_not_as_the_run_wrote_it_is_not_sealed_anew(name, tmp_path):
    run = finished_run(tmp_path / "runs" / "a")
    (run / name).write_text((run / name).read_text().replace("0.5" if name == "summary.json" else "mnist5k", "0.9"))
    with pytest.raises(ValueError, match=rf"{name} is not as this run wrote it"):
        publish(run, tmp_path / "results")
    assert not list((tmp_path / "results").glob("*"))


@pytest.mark.parametrize(
    ("run", "results"),
    [
        ("results/a", "results"),  # the copy is the run
        ("..", "results"),  # the copy would lie in the run
        ("results/a/a", "results"),  # the run lies in the copy
        ("results/a", "link"),
    ],
)
def test_a_copy_that_would_overlap_with_its_run_is_refused(run, results, tmp_path, monkeypatch):
    here = tmp_path / "top" / "here"
    (here / "results").mkdir(parents=True)
    (here / "link").symlink_to("results")
    (here / "precious").write_text("x")
    shutil.copytree(finished_run(tmp_path / "made"), here / run, dirs_exist_ok=True)
    monkeypatch.chdir(here)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="would overlap"):
        publish(Path(run), Path(results))
    assert contents(tmp_path) == before


def test_a_run_given_as_dot_is_published_by_its_name(tmp_path, monkeypatch):
    run = finished_run(tmp_path / "a")
    (tmp_path / "results" / "other").mkdir(parents=True)
    monkeypatch.chdir(run)
    publish(Path("."), tmp_path / "results")
    assert {entry.name for entry in (tmp_path / "results").iterdir()} == {"a", "other"}


def test_what_is_no_earlier_copy_is_not_replaced(tmp_path):
    run = finished_run(tmp_path / "runs" / "a")
    (tmp_path / "results" / "a").mkdir(parents=True)
    (tmp_path / "results" / "a" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="no published run"):
        publish(run, tmp_path / "results")
    assert contents(tmp_path / "results") == {"a/thesis.txt": b"precious"}
    (run / "report.md").unlink()
    with pytest.raises(ValueError, match=r"not finished: it has no report\.md"):
        publish(run, tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()
