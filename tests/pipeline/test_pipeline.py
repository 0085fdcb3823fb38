"""The whole job as a user runs it: one command, four commands, killed and run again."""

import contextlib
import dataclasses
import hashlib
import io
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl
import pytest

import scripts
from spikernel_jax import costs, evaluate, load_dataset, load_model
from spikernel_jax.cells.space import CellSpace
from spikernel_jax.embedded import boards, c, integer
from spikernel_jax.embedded.calibration import calibrated
from spikernel_jax.embedded.lower import lower
from spikernel_jax.io.run_folder import RunFolder
from spikernel_jax.pipeline import fitting, weight_bits
from spikernel_jax.snn.network import parameter_count

SMOKE = ("--preset", "smoke", "--recipe", "snasnet")  # which compiles in half the time
EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
TABLES = ("impact", "search", "finalists", "baselines", "tradeoff", "activity")
SETS = {"1": CellSpace((1,)), "3": CellSpace((3,))}  # of the preset


Run = Callable[..., str]


@pytest.fixture(scope="module")
def run() -> Run:
    """Runs a script in this process, as the shell would; gives back what it printed."""

    def script(name: str, *options: str) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            scripts.start(EXPERIMENTS / f"{name}.py", *options)
        return printed.getvalue()

    return script


@pytest.fixture(scope="module")
def explored(run, tmp_path_factory) -> tuple[Path, str]:
    """A finished run and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "explored"
    return out, run("explore", *SMOKE, "--out", str(out))


@pytest.fixture(scope="module")
def environment(explored, with_devices) -> dict[str, str]:
    """Of real processes: as many devices as this one had, so that results are the same to the bit."""
    return with_devices(jax.device_count())


def summary_of(out: Path) -> dict[str, Any]:
    """summary.json but for the times and the folder's own name."""
    summary = RunFolder.open(out).read_json("summary.json")
    assert set(summary.pop("seconds")) == {"impact", "search", "training", "baselines", "tradeoff"}
    path = Path(summary["chosen"].pop("checkpoint"))
    return summary | {"checkpoint": str((out / path).relative_to(out))}


def tables_of(out: Path) -> dict[str, pl.DataFrame]:
    return {name: pl.read_parquet(out / "tables" / f"{name}.parquet") for name in TABLES}


def assert_same_results(a: Path, b: Path) -> None:
    assert summary_of(a) == summary_of(b)
    for name, table in tables_of(a).items():
        assert table.equals(tables_of(b)[name]), name


def test_the_folder_holds_what_users_rely_on(explored):
    out, _ = explored
    names = {path.name for path in out.iterdir()} - {".lock"}
    assert names == {
        "options.json",
        "config.json",
        "search",
        "search_plan.json",
        "summary.json",
        "report.html",
        "report.md",
        "tables",
        "figures",
        "finalists",
        "trainings",
        "scores",
    }
    assert {path.name for path in (out / "tables").iterdir()} == {
        f"{name}.parquet{end}" for name in TABLES for end in ("", ".seal")
    }
    figures = list((out / "figures").iterdir())
    names = ("impact", "search", "training", "tradeoff")
    assert {path.name for path in figures} == {f"{name}.{end}" for name in names for end in ("png", "pdf")}
    starts = {".png": b"\x89PNG", ".pdf": b"%PDF"}
    assert all(path.read_bytes().startswith(starts[path.suffix]) for path in figures)
    config = json.loads((out / "config.json").read_text())
    assert config["config"]["data"] == "mnist5k"  # the embedded one: no network, no files of the user's
    assert {"versions", "device", "command", "git"} <= set(config["environment"])
    assert {path.name for path in (out / "finalists").iterdir()} == {"k1", "k3"}
    assert all((path / "checkpoint").is_dir() for path in (out / "finalists").iterdir())


def test_all_networks_are_trained_alike(explored):
    """Finalists and what they are compared with: the same recipe, epochs, images and seeds."""
    out, _ = explored
    settings = RunFolder.open(out).config["settings"]
    trained = list((out / "trainings").iterdir())
    names = {path.name.rpartition("-seed")[0] for path in trained}
    assert names == {
        "unsearched-k1", "unsearched-k3", "k1", "k3", "random-k1", "random-k3", "snasnet"
    }  # fmt: skip
    assert {path.name for path in trained} == {f"{name}-seed{seed}" for name in names for seed in (0, 1)}
    assert settings["seeds"] == 2
    configs = [json.loads((path / "result.json").read_text())["settings"]["config"] for path in trained]
    assert all(config == configs[0] for config in configs)
    for path in trained:
        epochs = [record["epoch"] for record in scripts.read_jsonl(path / "metrics.jsonl")]
        assert epochs == list(range(1, settings["epochs"] + 1))


def test_baselines_are_what_they_say(explored):
    out, _ = explored
    tables = tables_of(out)
    summary = RunFolder.open(out).read_json("summary.json")
    baselines, budget = tables["baselines"], summary["chosen"]["memory_budget_bytes"]
    finalists = dict(tables["finalists"].select("name", "genotype").iter_rows())
    one = baselines.unique("name", maintain_order=True)
    cell = dict(one.select("name", "genotype").iter_rows())
    for k in (1, 3):
        assert cell[f"unsearched-k{k}"] == f"0>1:conv{k} 0>3:skip 1>3:conv{k}"
    assert cell["snasnet"] == "0>1:conv3 1>2:conv3 0>3:conv1 2>3:conv3"
    drawn = one.filter(pl.col("role") == "random")
    assert dict(drawn.select("of", "kernel_set").iter_rows()) == {"k1": "1", "k3": "3"}
    assert (drawn["memory_bytes"] <= budget).all()
    assert len({*drawn["genotype"], *finalists.values()}) == 4  # none of them twice
    for row in drawn.iter_rows(named=True):
        space = SETS[row["kernel_set"]]
        assert (space.canonical(space.parse(row["genotype"])) == space.parse(row["genotype"])).all()
    trade = tables["tradeoff"]
    assert set(trade["name"]) == {*finalists, *cell}
    assert (trade["n"] == 2).all()
    helped = summary["search_helped"]
    test = dict(trade.select("name", "test_accuracy").iter_rows())
    pairs = [test[name] - test[f"random-{name}"] for name in finalists]
    assert helped["over_random"]["mean"] == pytest.approx(np.mean(pairs))
    assert helped["over_random"]["n"] == 2
    text = (out / "report.md").read_text()
    assert helped["text"] in text
    assert "at which **no network was evaluated**" in text


def test_the_screen_shows_progress_and_the_table(explored):
    out, printed = explored
    for words in ("step 1, impact", "step 2, kernel sets", "step 3, search", "step 3, training", "took"):
        assert words in printed
    assert "Accuracy (float32) against memory (counted)" in printed
    assert str(out / "report.md") in printed.replace("\n", "")


def test_the_summary_names_the_chosen_model(explored):
    out, _ = explored
    summary = RunFolder.open(out).read_json("summary.json")
    assert all(isinstance(value, float) and value >= 0 for value in summary["seconds"].values())
    chosen = summary["chosen"]
    model = load_model(out / chosen["checkpoint"])
    assert tuple(chosen["kernels"]) == model.spec.space.kernel_sizes
    row = model.spec.space.parse(chosen["genotype"])
    assert model.genotype == tuple(row.tolist())
    assert chosen["parameters"] == parameter_count(model.params)
    assert chosen["memory_bytes"] == costs(model.spec, row[None], chosen["bits"]).memory_bytes[0]
    assert chosen["memory_bytes"] <= chosen["memory_budget_bytes"]


def test_the_exported_model_has_the_reported_accuracies(explored):
    out, _ = explored
    chosen = json.loads((out / "summary.json").read_text())["chosen"]
    limits = {name: size for name, size in RunFolder.open(out).config["settings"].items() if "limit" in name}
    data = load_dataset("mnist5k", **limits)
    model = load_model(out / chosen["checkpoint"])
    right = np.asarray(model(data.test.images)).argmax(-1) == data.test.labels
    assert right.mean() == model.metrics["test_accuracy"]
    assert evaluate(model, data.validation) == model.metrics["validation_accuracy"]
    own = tables_of(out)["finalists"].filter(pl.col("name") == chosen["name"])
    assert len(own) == chosen["seeds"] == 2
    assert own["test_accuracy"][0] == model.metrics["test_accuracy"]  # the first seed's is exported
    for name in ("test_accuracy", "validation_accuracy"):
        assert chosen[name] == pytest.approx(own[name].mean())


def test_the_tables_tell_the_four_steps(explored):
    out, _ = explored
    tables = tables_of(out)
    settings = RunFolder.open(out).config["settings"]
    impact = tables["impact"]
    assert len(impact) == len(settings["kernel_sizes"]) * settings["seeds"]
    by_size = impact.group_by("kernel").agg(pl.col("parameters").unique()).sort("kernel")
    assert [len(values) for values in by_size["parameters"]] == [1, 1]
    assert by_size["parameters"][0][0] < by_size["parameters"][1][0]

    summary = json.loads((out / "summary.json").read_text())["chosen"]
    spec = load_model(out / summary["checkpoint"]).spec
    genotypes = []
    for kernel_set, space in SETS.items():
        search = tables["search"].filter(pl.col("kernel_set") == kernel_set)
        cells = space.enumerate()
        memory = costs(dataclasses.replace(spec, space=space), cells, summary["bits"]).memory_bytes
        fitting = cells[memory <= summary["memory_budget_bytes"]]
        assert sorted(search["genotype"]) == sorted(space.explicit(row) for row in fitting)  # each that fits, once
        assert search["fits"].all()
        finalist = search.filter(pl.col("finalist"))
        assert len(finalist) == 1
        trained = search.filter(pl.col("search_epochs") > 0)
        assert len(trained) == 2  # the least of a set, which a budget of one epoch does not change
        longest = trained.filter(pl.col("search_epochs") == 4)
        assert finalist["genotype"].to_list() == longest["genotype"].to_list()
        assert trained["score"].is_finite().all()
        genotypes += finalist["genotype"].to_list()
    assert set(tables["search"]["fidelity"]) == {"low"}
    assert "decided by" in (out / "report.md").read_text()

    assert tables["finalists"]["genotype"].unique(maintain_order=True).to_list() == genotypes
    chosen = tables["tradeoff"].filter(pl.col("chosen"))
    assert len(chosen) == 1
    assert chosen["on_front"].all()


@pytest.mark.slow
def test_four_commands_choose_the_same_model(explored, run, tmp_path):
    out = tmp_path / "steps"
    for step in ("kernel_impact", "search", "train", "tradeoff"):
        options = SMOKE if step == "kernel_impact" else ()  # the folder knows the rest
        run(step, *options, "--out", str(out))
    assert_same_results(out, explored[0])


def test_a_finished_run_is_left_as_it_was(explored, run):
    out, _ = explored
    patterns = ("trainings/*/metrics.jsonl", "trainings/*/*.json", "scores/*/*")

    def times() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for pattern in patterns for path in out.glob(pattern)}

    summary, tables, scores = summary_of(out), tables_of(out), times()
    logs = {path: path.read_bytes() for pattern in patterns[:2] for path in out.glob(pattern)}
    run("explore", *SMOKE, "--out", str(out))
    assert summary_of(out) == summary
    assert all(table.equals(tables[name]) for name, table in tables_of(out).items())
    assert {path: path.read_bytes() for path in logs} == logs  # no epoch was trained again
    assert {k: v for k, v in times().items() if "scores" in k} == {k: v for k, v in scores.items() if "scores" in k}


@pytest.mark.slow
def test_killed_twice_it_ends_with_the_same_results(explored, environment, run, tmp_path):
    out = tmp_path / "killed"
    command = [sys.executable, str(EXPERIMENTS / "explore.py"), *SMOKE, "--out", str(out)]
    for moment, least in (("scores/low/chunk-*.npz", 5), ("trainings/k1-*/state", 1)):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        try:
            end = time.monotonic() + 200
            while len(list(out.glob(moment))) < least:
                assert process.poll() is None, f"ended before {moment}"
                assert time.monotonic() < end
                time.sleep(0.005)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert not (out / "tables" / "finalists.parquet").exists()
    run("explore", *SMOKE, "--out", str(out))
    assert_same_results(out, explored[0])
    for path in out.glob("trainings/*/metrics.jsonl"):
        assert [record["epoch"] for record in scripts.read_jsonl(path)] == [1, 2]


@pytest.mark.slow
def test_two_processes_share_the_search(explored, environment, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(explored[0], out)
    for path in (out / "scores", out / "search"):
        shutil.rmtree(path)
    for path in (*(out / "tables").glob("search.*"), out / "search_plan.json"):
        path.unlink()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        job = ("--coordinator", f"localhost:{free.getsockname()[1]}", "--processes", "2")
    command = [sys.executable, str(EXPERIMENTS / "search.py"), *SMOKE[:2], "--out", str(out), *job, "--process-id"]
    started = [
        subprocess.Popen([*command, str(index)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for index in range(2)
    ]
    for process in started:
        said = process.communicate(timeout=200)[0]
        assert process.returncode == 0, said.decode()
    found, alone = (pl.read_parquet(path / "tables" / "search.parquet") for path in (out, explored[0]))
    assert found.equals(alone)


@pytest.mark.slow
def test_the_chosen_model_goes_to_a_device(run, explored, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(explored[0], out)
    printed = run("embed", "--out", str(out), "--widths", "8", "3", "--images", "16", "--tune", "1")
    table = pl.read_parquet(out / "tables" / "embedded.parquet")
    longer = ["float32, trained on"] * bool(table["tuned_epochs"].sum())
    assert table["what"].to_list() == ["float32", *longer, "int8", "int3"]
    name = RunFolder.open(out).summary()["chosen"]["name"]
    model = load_model(out / "finalists" / name / "checkpoint")
    trained = pl.read_parquet(out / "tables" / "finalists.parquet").filter(pl.col("name") == name)
    energies = table.filter(pl.col("what") == "float32")["energy_nj"]
    assert energies[0] == pytest.approx(trained.filter(pl.col("seed") == model.metrics["seed"])["energy_nj"][0])
    assert (table.filter(pl.col("bits") < 32)["energy_nj"] < 0.75 * energies[0]).all()
    for row in table.iter_rows(named=True):
        if row["bits"] == 32:
            continue
        folder = out / "tuning" / f"{name}-int{row['bits']}-1"
        assert row["tuned_epochs"] in (0, int(folder.exists()))
        program = lower(model, row["bits"], 8)
        images = 16 if shutil.which("gcc") else 0
        assert row["verified_images"] == images
        source = c.generate(program)
        assert (row["constant_bytes"], row["written_bytes"]) == (source.constant_bytes, source.written_bytes)
    report = (out / "report.md").read_text()
    assert "On a device: the chosen model in integers" in report
    on_boards = pl.read_parquet(out / "tables" / "processors.parquet")
    assert len(on_boards) == (0 if boards.missing() or not shutil.which("gcc") else 2 * len(boards.BOARDS))
    assert all(count > 10_000 for count in on_boards["instructions"])
    assert ("On a microcontroller, emulated" in report) == (len(on_boards) > 0)
    assert "no network was evaluated" not in report
    assert "int3" in printed
    manifest = json.loads((out / "embedded" / "manifest.json").read_text())
    assert manifest["genotype"] == model.text
    for path, digest in manifest["sha256"].items():
        assert hashlib.sha256((out / "embedded" / path).read_bytes()).hexdigest() == digest
    assert (out / "figures" / "embedded.png").stat().st_size > 1000
    run("embed", "--out", str(out), "--widths", "4", "--membrane-bits", "16", "--compiler", "no-such-compiler")
    assert {path.name for path in (out / "embedded").iterdir()} == {
        "int4", "float32.stablehlo", "float32.nir", "manifest.json",
    }  # fmt: skip
    table = pl.read_parquet(out / "tables" / "embedded.parquet")  # once more, otherwise
    assert table["verified_images"].to_list() == [0, 0]
    wide = c.generate(lower(model, 4, 16)).written_bytes
    assert table["written_bytes"][-1] == wide > c.generate(lower(model, 4, 8)).written_bytes


@pytest.mark.slow
def test_finalists_at_every_width(run, explored, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(explored[0], out)
    command = ("weight_bits", "--out", str(out), "--widths", "8", "2", "--tune", "1")
    run(*command)
    path = out / "tables" / "weight_bits.parquet"
    table = pl.read_parquet(path)
    names = set(table["finalist"])
    assert len(names) == len(set(pl.read_parquet(out / "tables" / "finalists.parquet")["genotype"]))
    assert table.select("bits", "epochs").unique().height == 6
    assert len(table) == 6 * len(names)
    data = load_dataset("mnist5k", limit_train=64, limit_validation=32, limit_test=32)
    job: Any = types.SimpleNamespace(data=data, run=RunFolder.open(out), say=print)
    for row in table.iter_rows(named=True):
        model = load_model(out / "finalists" / row["finalist"] / "checkpoint")
        if row["epochs"]:
            model = fitting.trained_on(job, row["finalist"], model, row["bits"], 1)  # is there, and so not trained
        if row["bits"]:
            program = calibrated(model, data.train.images, row["bits"])
            found = [np.mean(integer.run(program, own.images).logits_BK.argmax(1) == own.labels)
                     for own in (data.validation, data.test)]  # fmt: skip
        else:
            found = [evaluate(model, own) for own in (data.validation, data.test)]
        assert [row["validation_accuracy"], row["test_accuracy"]] == pytest.approx(found)
    assert (out / "figures" / "weight_bits.png").stat().st_size > 1000
    assert "## Finalists in integers, mnist5k, 32 test images" in (out / "report.md").read_text()
    # Once more: nothing is trained again, and a row that is lacking is made.
    shutil.rmtree(out / "tuning")
    (out / "tuning").write_text("no folder: nothing can be trained")
    RunFolder.open(out).write_table("weight_bits", table.filter((pl.col("epochs") > 0) | (pl.col("bits") == 8)))
    run(*command)
    assert pl.read_parquet(path).equals(table)
    # A finalist that is not the one of the table is no longer known.
    other = table.with_columns(test_accuracy=pl.when(pl.col("bits") == 0).then(0.5).otherwise(pl.col("test_accuracy")))
    RunFolder.open(out).write_table("weight_bits", other)
    assert "tuning" in scripts.refused(EXPERIMENTS / "weight_bits.py", capsys, *command[1:])


def test_test_images_that_were_trained_on_are_refused(explored, monkeypatch):
    data = load_dataset("mnist5k", limit_train=64, limit_validation=32, limit_test=32)
    job: Any = types.SimpleNamespace(data=data)
    assert weight_bits.test_images(job, None, None).split is data.test
    other = dataclasses.replace(data, name="other", test=data.validation)
    monkeypatch.setattr(weight_bits, "load_dataset", lambda name, folder: other)
    with pytest.raises(ValueError, match="--test other: the run trains on or chooses by 32 of its test images"):
        weight_bits.test_images(job, "other", None)
    other = dataclasses.replace(data, name="other", num_classes=7)
    with pytest.raises(ValueError, match="images of 28 x 28 x 1 in 7 classes, where the run's mnist5k has"):
        weight_bits.test_images(job, "other", None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--widths", "9"), "--widths 9: want different widths of weights from 2 to 8"),
        (("--widths", "4", "4"), "--widths 4 4: want different"),
        (("--membrane-bits", "20"), "--membrane-bits 20 must be from 8 to 16"),
        (("--images", "-1"), "--images -1 must be at least 0"),
        (("--tune", "-1"), "--tune -1 must be at least 0"),
        ((), "tables/tradeoff.parquet is missing: run experiments/tradeoff.py"),
    ],
)
def test_what_cannot_be_embedded_is_one_line(options, words, tmp_path, capsys):
    out = tmp_path / "run"
    assert words in scripts.refused(EXPERIMENTS / "embed.py", capsys, *options, "--out", str(out))
    assert not out.exists()
