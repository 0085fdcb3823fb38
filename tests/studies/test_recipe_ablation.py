"""The recipe ablation: rows that each change one thing, pairs, and a table that is whole at any time."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import scripts
from spikernel_jax.data import Split
from spikernel_jax.io.run_folder import RunFolder
from spikernel_jax.pipeline import job as job_module
from spikernel_jax.pipeline import presets, trials
from spikernel_jax.snn.cost import parameters_of
from spikernel_jax.studies import recipe_ablation
from spikernel_jax.studies.recipe_ablation import BASE, ROWS, Row
from spikernel_jax.training.loop import TrainingDivergedError

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "recipe_ablation.py"
start = functools.partial(scripts.start, SCRIPT)
refused = functools.partial(scripts.refused, SCRIPT)
SMALL = ["--preset", "smoke", "--channels", "2", "--time-steps", "1", "--epochs", "2", "--limit-train", "32"]
TWO = ["--rows", "smoothing", "--seeds", "2"]


@pytest.fixture(autouse=True, scope="module")
def data_read_once():
    """The digits are read from the package once, and their test split cannot be looked at."""

    class Sealed(Split):
        def __getattribute__(self, name: str) -> Any:
            if name == "images":
                raise AssertionError("the test split is read")
            return super().__getattribute__(name)

    @functools.cache
    def sealed(*arguments: Any, real: Any = job_module.load_dataset, **named: Any) -> Any:
        data = real(*arguments, **named)
        return dataclasses.replace(data, test=Sealed(data.test.images, data.test.labels))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_module, "load_dataset", sealed)
        yield


def table_of(out: Path) -> pl.DataFrame:
    return RunFolder.open(out).read_table("recipe_ablation", "recipe_ablation.py").drop("seconds")


BASES: dict[tuple[str, str, str], recipe_ablation.Base] = {
    (data, name, recipe or "own"): recipe_ablation.make_base(data, name, recipe, epochs=epochs)[1]
    for data, name, recipe, epochs in (
        ("mnist5k", "smoke", "snasnet", None),
        ("cifar10", "cpu", "tuned", None),
        ("cifar10", "gpu", "snasnet", None),
        ("cifar10", "cpu-1h", None, 2),
    )
}


def test_the_base_of_a_timed_preset_is_what_accuracy_trains():
    timed = presets.get_timed_preset("cifar100", "cpu-1h")
    spec, genotype = timed.cell_network("cifar100")
    preset, base = recipe_ablation.make_base("cifar100", "cpu-1h", epochs=3)
    assert preset.limits == timed.limits == dict.fromkeys(("limit_train", "limit_validation", "limit_test"))
    assert dataclasses.replace(base.spec, space=spec.space) == spec
    assert base.spec.space.explicit(base.genotypes[3]) == spec.space.explicit(genotype) == timed.cell
    assert base.config == dataclasses.replace(timed.training, epochs=3)
    assert (preset.epochs, preset.batch_size, preset.limit_train) == (3, timed.training.batch_size, None)
    preset, base = recipe_ablation.make_base(
        "cifar100",
        "cpu-1h",
        epochs=3,
        channels=8,
        time_steps=2,
        batch_size=32,
        bits=4,
        precision="bfloat16",
        limit_train=640,
    )
    assert (base.spec.channels, base.spec.time_steps, base.config.batch_size) == (8, 2, 32)
    assert (preset.bits, preset.batch_size, preset.limit_train, base.config.precision) == (4, 32, 640, "bfloat16")


@pytest.mark.parametrize("base", BASES.values(), ids=map("-".join, BASES))
def test_each_row_is_one_change_that_can_be_trained(base):
    there = base.trial(Row(BASE, BASE), 5)
    assert (there.spec, there.config, there.seed) == (base.spec, base.config, 5)
    rows = base.rows()
    assert next(iter(rows)) == BASE
    for name, row in ROWS.items():
        trial = base.trial(row, 5)
        for old, new, named in (
            (there.config, trial.config, row.config),
            (there.spec, trial.spec, {*row.spec} | ({"neuron"} if row.neuron else set())),
            (there.spec.neuron, trial.spec.neuron, row.neuron),
        ):
            allowed = {*named} | ({"channels"} if row.as_large_as and new is trial.spec else set())
            assert {field for field, value in vars(new).items() if value != vars(old)[field]} <= allowed, name
        assert all(vars(trial.config)[field] == value for field, value in row.config.items())
        cell = row.cell or base.spec.space.explicit(base.genotypes[row.kernel_size])
        assert base.spec.space.explicit(trial.genotype) == cell
        same = dataclasses.replace(trial, kind=BASE) == there
        assert (name not in rows) or not same
    trials_of = [dataclasses.replace(base.trial(row, 0), kind="") for row in rows.values()]
    assert len(set(trials_of)) == len(rows) > 30
    assert ("one-cycle" in rows) == (base.config.schedule == "cosine")


def test_depths_at_equal_parameters():
    _, base = recipe_ablation.make_base("cifar10", "cpu-1h", epochs=2)
    there = base.trial(Row(BASE, BASE), 0)
    for name, convolutions in (("depth-1", 1), ("depth-2", 2)):
        trial = base.trial(ROWS[name], 0)
        assert base.spec.space.explicit(trial.genotype).count("conv") == convolutions
        assert trial.spec.channels > there.spec.channels
        assert parameters_of(trial.spec, trial.genotype) == pytest.approx(
            parameters_of(there.spec, there.genotype), rel=0.02
        )


def test_widths_at_equal_parameters():
    base = BASES["cifar10", "cpu", "tuned"]
    sizes = {}
    for name in (BASE, "k5", "k3-wide", "k5-narrow"):
        trial = base.trial(base.rows()[name], 0)
        sizes[name] = parameters_of(trial.spec, trial.genotype)
    assert sizes["k5"] > 2 * sizes[BASE]
    assert sizes["k3-wide"] == pytest.approx(sizes["k5"], rel=0.05)
    assert sizes["k5-narrow"] == pytest.approx(sizes[BASE], rel=0.1)


def made_up(accuracies: dict[str, dict[int, float | None]]) -> pl.DataFrame:
    rows = [
        {
            "row": row, "group": "g", "change": "c", "seed": seed, "kernel_size": 3, "channels": 4, "time_steps": 2,
            "epochs": 3, "parameters": 1234, "seconds": 2.0, "validation_accuracy": value,
            "diverged_epoch": 1 if value is None else None,
        }
        for row, by_seed in accuracies.items() for seed, value in by_seed.items()
    ]  # fmt: skip
    return pl.DataFrame(rows)


def test_summary_pairs_by_seed():
    table = made_up({
        BASE: {0: 0.2, 1: 0.4, 2: 0.3}, "better": {2: 0.35, 0: 0.3, 1: 0.5}, "begun": {0: 0.25},
        "broken": {0: 0.9, 1: None}, "hopeless": {0: None}, "unpaired": {7: 0.5},
    })  # fmt: skip
    summary = {row["row"]: row for row in recipe_ablation.over_seeds(table).iter_rows(named=True)}
    better = summary["better"]
    sd = math.sqrt((2 * (1 / 60) ** 2 + (1 / 30) ** 2) / 2)  # of 0.1, 0.1, 0.05 by seed
    assert (better["difference"], better["difference_sd"]) == pytest.approx((0.25 / 3, sd))
    assert better["difference_high"] == pytest.approx(0.25 / 3 + 4.303 * sd / math.sqrt(3), rel=1e-4)
    assert (better["pairs"], better["n"], better["diverged"]) == (3, 3, 0)
    assert summary["begun"]["difference"] == pytest.approx(0.05)
    assert math.isnan(summary["begun"]["difference_low"])
    assert (summary["broken"]["diverged"], summary["broken"]["difference"]) == (1, None)
    assert (summary["hopeless"]["validation"], summary["unpaired"]["difference"]) == (None, None)
    text = recipe_ablation.summary_markdown(recipe_ablation.over_seeds(table))
    assert "| begun | c | 1 | 25.00 | +5.00 | 1 |" in text
    assert "90.00; **1 of 2 diverged** | - | 0 |" in text
    assert "| -; **1 of 1 diverged** | - | 0 |" in text


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_read_once) -> Path:
    """A whole run of two rows and two seeds."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    start(*SMALL, *TWO, "--out", str(out))
    return out


def test_the_table_says_what_was_trained(finished):
    table = table_of(finished)
    assert table.select("row", "seed").rows() == [(BASE, 0), (BASE, 1), ("smoothing", 0), ("smoothing", 1)]
    assert table["change"].to_list() == ["", "", *["label_smoothing=0.1"] * 2]
    assert table.select("channels", "time_steps", "epochs").unique().rows() == [(2, 1, 2)]
    assert table["validation_accuracy"].is_between(0, 1).all()
    text = (finished / "report.md").read_text()
    for words in ("label_smoothing=0.1 | 2 |", "recipe snasnet", "recipe_ablation.py --preset smoke", "jax 0."):
        assert words in text
    assert "Missing" not in text


@pytest.mark.slow
def test_stopped_it_goes_on_to_the_same_table(finished, tmp_path, monkeypatch):
    out, real, trained = tmp_path / "broken", trials.train, []

    def stops(*arguments: Any, progress: Any, **named: Any) -> Any:
        trained.append(named["folder"].name)

        def stop(record: dict[str, Any]) -> None:
            progress(record)
            if len(trained) == 4:  # after the first of two epochs
                raise KeyboardInterrupt

        return real(*arguments, progress=stop, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials, "train", stops)
        with pytest.raises(SystemExit) as stop:
            start(*SMALL, *TWO, "--out", str(out))
    assert stop.value.code == 130
    assert trained == ["base-seed0", "smoothing-seed0", "base-seed1", "smoothing-seed1"]  # seed by seed
    assert table_of(out).select("row", "seed").rows() == [(BASE, 0), (BASE, 1), ("smoothing", 0)]
    assert "seed 1: smoothing." in (out / "report.md").read_text()
    trained.clear()
    monkeypatch.setattr(trials, "train", lambda *a, **named: trained.append(named["folder"].name) or real(*a, **named))
    start(*SMALL, *TWO, "--out", str(out))
    assert trained == ["smoothing-seed1"]
    assert table_of(out).equals(table_of(finished))


@pytest.fixture
def imagined(monkeypatch) -> list[str]:
    """Trainings take no time and give an accuracy by their name; those at rate 0.4 diverge in epoch 1."""
    names: list[str] = []

    def fit(job: Any, trial: Any, progress: Any = None) -> Any:
        names.append(trial.name)
        trials.folder(job, trial).mkdir(parents=True)
        if trial.config.learning_rate == 0.4:
            raise TrainingDivergedError(f"{trial.name}: the loss is nan")
        return type("Fitted", (), {"metrics": {"validation_accuracy": 0.25 + trial.seed / 8}, "trial": trial})

    costs = {"parameters": 1, "memory_bytes": 2, "synops": 3.0, "energy_nj": 4.0}
    monkeypatch.setattr(trials, "fit", fit)
    monkeypatch.setattr(trials, "measured", lambda job, model: dict(costs))
    return names


def test_more_rows_and_seeds_go_into_the_same_folder(imagined, tmp_path, capsys):
    out = ["--out", str(tmp_path / "run")]
    start(*SMALL, "--rows", "tet", "--seeds", "1", *out)
    start(*SMALL, "--groups", "time", "--rows", "rate-0.4", "--seeds", "2", *out)
    table = table_of(tmp_path / "run")
    assert imagined[:2] == ["base-seed0", "tet-seed0"]
    assert len(imagined) == len(set(imagined)) == len(table)
    assert set(table["row"]) == {BASE, "tet", "rate-0.4", "steps-2", "steps-4", "steps-5", "steps-6"}  # 1 is the base
    diverged = table.filter(pl.col("row") == "rate-0.4")
    assert diverged["diverged_epoch"].to_list() == [1, 1]
    assert diverged["validation_accuracy"].to_list() == [None, None]
    assert "**2 of 2 diverged**" in (tmp_path / "run" / "report.md").read_text()
    for change in (["--epochs", "3"], ["--channels", "3"], ["--base-recipe", "tuned"], ["--bits", "4"]):
        line = refused(capsys, *SMALL, *change, "--rows", "tet", *out)
        assert "holds a run of another configuration" in line
    assert table_of(tmp_path / "run").equals(table)


def test_a_row_that_means_something_else_by_now_is_refused(imagined, tmp_path, capsys, monkeypatch):
    out = ["--out", str(tmp_path / "run")]
    start(*SMALL, "--rows", "ema", "--seeds", "1", *out)
    monkeypatch.setitem(ROWS, "ema", Row("ema", "weights", {"ema": 0.5}))
    assert "config.ema: 0.999 there, 0.5 here" in refused(capsys, *SMALL, "--rows", "ema", "--seeds", "1", *out)


def test_minutes_leave_a_valid_part(imagined, tmp_path, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(recipe_ablation.time, "monotonic", lambda: now[0])
    real = trials.run

    def slow(*arguments: Any, **named: Any) -> Any:
        now[0] += 25
        return real(*arguments, **named)

    monkeypatch.setattr(trials, "run", slow)
    out = ["--out", str(tmp_path / "run")]
    start(*SMALL, "--rows", "tet", "ema", "--seeds", "2", "--minutes", "1.5", *out)  # begins at 0, 25, 50 and 75 s
    assert imagined == ["base-seed0", "tet-seed0", "ema-seed0", "base-seed1"]
    assert "time is over with 2 of 6 trainings missing: seed 1: tet, ema" in capsys.readouterr().out
    assert len(table_of(tmp_path / "run")) == 4
    assert "seed 1: tet, ema." in (tmp_path / "run" / "report.md").read_text()
    start(*SMALL, "--rows", "tet", "ema", "--seeds", "2", *out)
    assert imagined[4:] == ["tet-seed1", "ema-seed1"]
    assert "Missing" not in (tmp_path / "run" / "report.md").read_text()
