"""The scripts' answers to bad input: exit code 2, one line on stderr, and nothing written."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import polars as pl
import pytest

import disk
import scripts
from spikernel_jax import Model, NetworkSpec, save_model
from spikernel_jax.cells.space import CellSpace
from spikernel_jax.io import machine
from spikernel_jax.io.run_folder import RunFolder
from spikernel_jax.pipeline import job as job_module
from spikernel_jax.pipeline import presets, trials
from spikernel_jax.snn import network
from spikernel_jax.snn.devices import NO_LIMIT

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
SCRIPTS = ("explore", "kernel_impact", "search", "train", "tradeoff")
CELL = "0>3:conv3"
Call = Callable[..., str]


@pytest.fixture(autouse=True, scope="module")
def data_read_once():
    """The digits are read from the package once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_module, "load_dataset", functools.cache(job_module.load_dataset))
        yield


def start(script: str, *options: str) -> None:
    scripts.start(EXPERIMENTS / f"{script}.py", *options)


def one_line(err: str, code: Any) -> str:
    assert code == 2, err
    assert err.startswith("error: "), err
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


@pytest.fixture
def refused(capfd) -> Call:
    """Runs a script that must refuse; gives back its one line."""

    def call(script: str, *options: str) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            start(script, *options)
        return one_line(capfd.readouterr().err, stop.value.code)

    return call


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the lock and the record of who opened the folder."""
    every = disk.contents(folder).items()
    return {name: content for name, content in every if Path(name).name not in (".lock", "config.json")}


# Input that is wrong from the start


@pytest.mark.parametrize(
    ("script", "options", "words"),
    [
        ("explore", ["--data", "mars"], "--data 'mars' is unknown; known: mnist5k"),
        ("explore", ["--preset", "huge"], "--preset 'huge' is unknown for mnist5k; known: cpu"),
        ("explore", ["--data", "cifar10", "--data-dir", "{tmp}/empty"], "cifar10"),
        ("kernel_impact", ["--data", "tiny_imagenet", "--data-dir", "{tmp}/empty"], "tiny_imagenet"),
        ("explore", ["--kernel-sizes", "2"], "odd"),
        ("kernel_impact", ["--kernel-sizes", "1", "4"], "odd"),
        ("kernel_impact", ["--kernel-sizes", "-3"], "odd"),
        ("kernel_impact", ["--kernel-sizes", "17"], "from 1 to 15"),
        ("explore", ["--sets", "2,3"], "odd"),
        ("explore", ["--sets", "1,x"], "--sets '1,x'"),
        ("explore", ["--sets", ""], "--sets ''"),
        ("explore", ["--sets", "3,3"], "want different odd sizes"),
        ("explore", ["--cell", "0>1:convK 1>4:skip 0>3:skip"], "1>4"),
        ("kernel_impact", ["--cell", "hello"], "hello"),
        ("kernel_impact", ["--cell", "0>1:convK"], "0>1:conv"),
        ("kernel_impact", ["--cell", "0>3:skip"], "convK"),
        ("explore", ["--memory-budget", "lots"], "'lots' is not an amount of memory"),
        ("explore", ["--memory-budget", "0"], "'0' is not an amount of memory"),
        ("explore", ["--memory-budget", "12XB"], "'12XB' is not an amount of memory"),
        ("explore", ["--recipe", "magic"], "--recipe 'magic' is unknown; known: snasnet, tuned"),
        ("kernel_impact", ["--recipe", ""], "--recipe '' is unknown; known: snasnet, tuned"),
        ("explore", ["--bits", "0"], "--bits 0"),
        ("explore", ["--bits", "65"], "--bits 65"),
        ("explore", ["--seed", "-1"], "--seed -1"),
        ("explore", ["--seed", "99999999999999999999"], "--seed 99999999999999999999"),
        ("explore", ["--samples", "0"], "--samples 0"),
        ("explore", ["--samples", "9"], "--samples 9: --strategy trainings does not read it"),
        ("explore", ["--strategy", "random", "--search-seconds", "9"], "--strategy random does not read it"),
        ("explore", ["--fidelity", "full", "--strategy", "halving"], "give --strategy exhaustive or random"),
        ("explore", ["--kernel-sizes", "3"], "one size makes no pairs"),
        ("explore", ["--sets", "1,3", "3,1"], "comes twice"),
        ("explore", ["--sets", "3,5", "--kernel-sizes", "1", "3"], "--sets 3,5: --kernel-sizes 1 3 lacks 5"),
        ("explore", ["--memory-budget", ""], "'' is not an amount of memory"),
        ("explore", ["--memory-budget", "100B"], "the smallest takes"),
        ("search", [], "kernel_impact.py"),
        ("search", ["--processes", "2"], "--processes 2 needs --coordinator and --process-id too"),
        ("search", ["--coordinator", "localhost", "--processes", "2", "--process-id", "1"], "want HOST:PORT"),
        ("train", [], "search.py"),
        ("tradeoff", [], "train.py"),
    ],
)
def test_bad_input_is_refused_and_nothing_written(script, options, words, refused, tmp_path):
    (tmp_path / "empty").mkdir()
    options = [option.format(tmp=tmp_path) for option in options]
    if "--preset" not in options:
        options += ["--preset", "smoke"]
    assert words in refused(script, *options, "--out", str(tmp_path / "run"))
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_absent_data_says_how_to_get_it(refused, tmp_path):
    line = refused("explore", "--data", "cifar10", "--data-dir", str(tmp_path), "--out", str(tmp_path / "run"))
    assert str(tmp_path) in line
    assert "--data-dir" in line or "TFDS_DATA_DIR" in line or "prepare" in line


def test_an_out_that_is_no_run_folder(refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    before = contents(tmp_path)
    assert "not a folder" in refused("explore", "--preset", "smoke", "--out", str(tmp_path / "file"))
    assert "not empty" in refused("explore", "--preset", "smoke", "--out", str(tmp_path / "full"))
    assert "file/run" in refused("explore", "--preset", "smoke", "--out", str(tmp_path / "file" / "run"))
    assert contents(tmp_path) == before


def test_zero_time_steps():
    with pytest.raises(ValueError, match="time_steps=0 must be a whole number of at least 1"):
        NetworkSpec((8, 8, 1), 2, time_steps=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"batch_size": 65}, "batch_size = 65 is larger than the data"), ({"channels": 0}, "channels=0")],
)
def test_a_preset_that_does_not_fit_the_data(change, words, refused, tmp_path, monkeypatch):
    smoke = dataclasses.replace(presets.get_preset("mnist5k", "smoke"), **change)
    monkeypatch.setitem(presets.PRESETS["mnist5k"], "smoke", smoke)
    assert words in refused("kernel_impact", "--preset", "smoke", "--out", str(tmp_path / "run"))
    assert not (tmp_path / "run" / "tables").exists()


# A run folder that is damaged, or somebody else's


@pytest.fixture
def made(tmp_path) -> Path:
    """A run folder as the steps leave it, its numbers made up."""
    job = job_module.open_job(
        tmp_path / "run", data=None, preset="smoke", seed=None, data_dir=None, given={}, say=lambda _: None
    )
    spec = job.preset.network("mnist5k", CellSpace((1, 3)))
    genotype = tuple(spec.space.parse(CELL).tolist())
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), spec, genotype))
    params, stats = jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape), shapes)
    folder = job.run.folder("finalists") / "k1-3"
    folder.mkdir()
    save_model(folder / "checkpoint", Model(spec, genotype, params, stats, (0.1,), (0.3,)))
    measured = {"parameters": 500, "memory_bytes": 9000, "synops": 10.0, "energy_nj": 1.0}
    job.run.write_table(
        "impact",
        pl.DataFrame([
            {"kernel": str(k), "seed": seed, "accuracy": 0.5 + k / 10, **measured} for k in (1, 3) for seed in (0, 1)
        ]),
    )  # fmt: skip
    found = {"kernel_set": "1,3", "genotype": CELL, "score": 5.0, "score_se": 0.1, "score_se_paired": 0.1}
    searched = {"fidelity": "low", "search_epochs": 4, "search_validation": 0.5, "memory_bytes": 9000, "fits": True,
                "finalist": True}  # fmt: skip
    job.run.write_table("search", pl.DataFrame([found | searched]))
    accuracy = {"seed": 0, "validation_accuracy": 0.5, "test_accuracy": 0.5}
    trained = {"name": "k1-3", **found, **accuracy, **measured, "checkpoint": "finalists/k1-3/checkpoint"}
    job.run.write_table("finalists", pl.DataFrame([trained]))
    drawn = {"kernel_set": "1,3", "genotype": CELL, "role": "random", "of": "k1-3"}
    job.run.write_table("baselines", pl.DataFrame([{"name": "random-k1-3", **drawn, **accuracy, **measured}]))
    return job.run.path


STEPS = [
    ("search", "impact", "kernel_impact"),
    ("train", "search", "search"),
    ("tradeoff", "finalists", "train"),
    ("tradeoff", "baselines", "train"),
]


def test_the_made_folder_is_a_good_one(made):
    start("tradeoff", "--out", str(made))
    assert RunFolder.open(made).read_json("summary.json")["chosen"]["genotype"] == CELL


@pytest.mark.parametrize(("script", "table", "made_by"), STEPS)
def test_a_missing_earlier_step(script, table, made_by, made, refused):
    (made / "tables" / f"{table}.parquet").unlink()
    before = contents(made)
    line = refused(script, "--out", str(made))
    assert f"{table}.parquet is missing: run experiments/{made_by}.py" in line
    assert contents(made) == before


@pytest.mark.parametrize(("script", "table", "made_by"), STEPS)
@pytest.mark.parametrize("left", [0.0, 0.5, 0.98])
def test_a_truncated_table(script, table, made_by, left, made, refused):
    path = made / "tables" / f"{table}.parquet"
    path.write_bytes(path.read_bytes()[: int(left * path.stat().st_size)])
    before = contents(made)
    line = refused(script, "--out", str(made))
    assert f"{table}.parquet is not as this run wrote it" in line
    assert f"experiments/{made_by}.py" in line
    assert contents(made) == before


@pytest.mark.parametrize("damage", ["truncated", "absent"])
def test_a_corrupt_checkpoint(damage, made, refused):
    checkpoint = made / "finalists" / "k1-3" / "checkpoint"
    for path in [path for path in checkpoint.rglob("*") if path.is_file()]:
        if damage == "truncated":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        else:
            path.unlink()
    before = contents(made)
    assert str(checkpoint) in refused("tradeoff", "--out", str(made))
    assert contents(made) == before


@pytest.mark.parametrize("options", [["--seed", "1"], ["--preset", "cpu"], ["--data", "mnist5k", "--seed", "5"]])
def test_a_run_folder_of_another_configuration(options, made, refused):
    record = (made / "config.json").read_bytes()
    before = contents(made)
    for script in ("explore", "tradeoff"):
        line = refused(script, *options, "--out", str(made))
        assert "holds a run of another configuration" in line
    assert contents(made) == before
    assert (made / "config.json").read_bytes() == record


def test_a_damaged_configuration(made, refused):
    (made / "config.json").write_text('{"config": {"da')
    before = contents(made)
    assert "config.json is damaged" in refused("tradeoff", "--out", str(made))
    assert contents(made) == before


@pytest.mark.parametrize("script", ["search", "tradeoff"])
def test_nothing_fits_the_budget(script, made, refused):
    before = contents(made)
    line = refused(script, "--out", str(made), "--memory-budget", "100B")
    assert "fit" in line
    assert "smallest" in line
    after = contents(made)
    after.pop("summary.json", None)  # the verdicts of step 2, which do not depend on the budget
    assert after == before


def test_sets_of_sizes_that_were_not_measured(made, refused):
    assert "not measured: [5]" in refused("search", "--out", str(made), "--sets", "3,5")
    assert not (made / "options.json").exists()


def test_options_of_an_earlier_step_are_kept_and_no_others_accepted(made, refused):
    options = {"memory_budget": 20_000, "bits": 8, "keep": "all", "sets": [[1, 3]]}
    RunFolder.open(made).write_json("options.json", options)
    before = contents(made)
    for given, there in ((["--memory-budget", "8KiB"], "20000"), (["--keep", "rule"], "all"), (["--bits", "4"], "8")):
        line = refused("search", "--out", str(made), *given)
        assert f"{given[0]} " in line
        assert f"differs from this run's {there}" in line
    assert contents(made) == before
    start("tradeoff", "--out", str(made), "--bits", "4")  # asks what another device would get
    assert RunFolder.open(made).read_json("summary.json")["chosen"]["bits"] == 4
    assert RunFolder.open(made).read_json("summary.json")["chosen"]["memory_budget_bytes"] == 20_000
    assert RunFolder.open(made).read_json("options.json") == options
    start("tradeoff", "--out", str(made), "--device", "cortex-m4")  # is a budget of its own
    chosen = RunFolder.open(made).read_json("summary.json")["chosen"]
    assert (chosen["device"], chosen["memory_budget_bytes"]) == ("cortex-m4", NO_LIMIT)
    assert "no finalist fits xylo: the nearest has neurons" in refused(
        "tradeoff", "--out", str(made), "--device", "xylo"
    )
    assert RunFolder.open(made).read_json("options.json") == options


def test_the_recipe_of_an_earlier_step_is_kept_and_no_other_accepted(made, refused, monkeypatch):
    used = []

    def trained(spec: Any, genotype: Any, data: Any, config: Any, **named: Any) -> Any:
        used.append(config)
        raise ValueError("enough")

    monkeypatch.setattr(trials, "train", trained)
    refused("kernel_impact", "--out", str(made), "--recipe", "snasnet")
    assert json.loads((made / "options.json").read_text())["recipe"] == "snasnet"
    before = contents(made)
    for script in ("train", "explore", "kernel_impact"):
        line = refused(script, "--out", str(made), "--recipe", "tuned")
        assert "--recipe tuned differs from this run's snasnet: choose another --out" in line
    assert contents(made) == before
    refused("train", "--out", str(made))
    smoke = presets.get_preset("mnist5k", "smoke")
    assert used == [smoke.training("mnist5k", "snasnet")] * 2  # step 1's and a finalist's: alike


def test_devices_that_are_none(made, refused, tmp_path):
    before = contents(made)
    there = str(made)
    assert "device 'z80' is unknown; known: cortex-m4" in refused("tradeoff", "--out", there, "--device", "z80")
    line = refused("tradeoff", "--out", there, "--device", "speck", "--bits", "16")
    assert "--bits 16 must be from 2 to 8 with --device speck" in line
    path = tmp_path / "mine.toml"
    assert "no file of devices" in refused("tradeoff", "--out", there, "--device", f"{path}:mine")
    path.write_text('[mine]\nram = 4\nsource = "me"\n')
    assert "device 'mine': ram unknown; known: sram" in refused("tradeoff", "--out", there, "--device", f"{path}:mine")
    assert contents(made) == before


def test_a_folder_in_use(made, refused):
    with RunFolder.open(made).lock():
        assert "another process is using" in refused("tradeoff", "--out", str(made))


# Real processes


def in_a_process(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)


def test_the_line_of_a_real_process(made):
    checkpoint = made / "finalists" / "k1-3" / "checkpoint"
    array = max((path for path in checkpoint.rglob("d/*")), key=lambda path: path.stat().st_size)
    array.write_bytes(array.read_bytes()[:-40])
    result = in_a_process(str(EXPERIMENTS / "tradeoff.py"), "--out", str(made))
    assert str(checkpoint) in one_line(result.stderr, result.returncode)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, capsys):
    with pytest.raises(SystemExit) as stop:
        start(script, "--help")
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for option in ("--data", "--preset", "--out", "--seed", "--data-dir", "--bits"):
        assert option in out


def test_import_is_light():
    # spyx imports orbax.checkpoint itself, but not the interface that we use of it.
    heavy = ["tensorflow_datasets", "tensorflow", "matplotlib", "polars", "cv2", "mlxtend", "orbax.checkpoint.v1"]
    code = f"import sys, spikernel_jax; print([name for name in {heavy!r} if name in sys.modules])"
    result = in_a_process("-W", "error", "-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.skipif(
    "[madvise]" not in (machine._THP.read_text() if machine._THP.exists() else ""),
    reason="huge pages on demand are not this machine's",
)
def test_a_script_restarts_once_for_huge_pages_and_keeps_its_arguments(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import dataclasses, os, sys\n"
        "from spikernel_jax.pipeline import cli\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class Options:\n"
        "    word: str\n"
        "    huge_pages: bool = True\n"
        "def body(options):\n"
        "    print(options.word, os.getpid(), os.environ.get('GLIBC_TUNABLES'))\n"
        "cli.main(Options, body, '')\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    theirs = "glibc.malloc.hugetlb=0"
    cases = ((None, [], machine._HUGE_PAGES), (theirs, [], theirs), (None, ["--no-huge-pages"], "None"))
    for given, more, there in cases:
        changed = environment | {"PYTHONPATH": str(EXPERIMENTS.parent)} | ({"GLIBC_TUNABLES": given} if given else {})
        with subprocess.Popen(
            [sys.executable, script, "--word", "a b", *more], env=changed, stdout=subprocess.PIPE, text=True
        ) as process:
            out, _ = process.communicate(timeout=100)
        assert out.split() == ["a", "b", str(process.pid), there]
