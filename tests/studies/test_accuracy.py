"""Training in a given time: the plan, what is written when, and the script from start to finish."""

import dataclasses
import functools
import json
import math
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import scripts
from quick_cases import mostly_slow
from spikernel_jax import load_model
from spikernel_jax.data import Dataset, Split, dataset_info, load_dataset
from spikernel_jax.io.run_folder import RunFolder
from spikernel_jax.pipeline import job
from spikernel_jax.pipeline.presets import OWN, TIMED_PRESETS, get_timed_preset
from spikernel_jax.snn import neurons
from spikernel_jax.snn.conventional import relu_neurons
from spikernel_jax.snn.cost import parameters_of
from spikernel_jax.snn.neurons import NeuronSpec
from spikernel_jax.studies import accuracy, time_plan
from spikernel_jax.studies.time_plan import Costs, epochs_that_fit
from spikernel_jax.training.recipe import PRECISIONS, TrainConfig

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "accuracy.py"
start = functools.partial(scripts.start, SCRIPT)
refused = functools.partial(scripts.refused, SCRIPT)
SMALL = ["--preset", "smoke", "--cell", "0>3:conv3", "--channels", "2", "--compilation-cache", "off"]
LIMITS: dict[str, Any] = {"limit_train": 64, "limit_validation": 32, "limit_test": 32}


@pytest.fixture(autouse=True, scope="module")
def in_this_process():
    """The digits are read once, and the process, which is pytest's, counts as two seconds old."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "load_dataset", functools.cache(load_dataset))
        patch.setattr(time_plan, "process_seconds", lambda: 2.0)
        yield


def records(out: Path) -> list[dict[str, Any]]:
    lines = scripts.read_jsonl(out / "training" / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def assert_same_result(a: Path, b: Path) -> None:
    assert records(a) == records(b)
    assert RunFolder.open(a).read_json("test.json") == RunFolder.open(b).read_json("test.json")
    models = [load_model(out / "checkpoint") for out in (a, b)]
    jax.tree.map(np.testing.assert_array_equal, *[(model.params, model.stats) for model in models])


# The plan


def test_epochs_by_hand():
    costs = Costs(start=30.0, step=0.5, image=0.01, save=2.0)
    # An epoch: 100 steps 50 s, 500 images 5 s, save 2 s. Besides: 30 + 10 + 2 + 6 s. Of 600 s 570 count: 522 / 57.
    assert epochs_that_fit(costs, 600, 100, 500, 1000) == 9
    assert epochs_that_fit(costs, 105 / 0.95 + 1e-6, 100, 500, 1000) == 1
    assert epochs_that_fit(costs, 105 / 0.95 - 1e-6, 100, 500, 1000) == 0
    assert epochs_that_fit(costs, -5, 100, 500, 1000) == 0


seconds = st.floats(1e-4, 1e3)


@settings(max_examples=200, deadline=None)
@given(st.builds(Costs, seconds, seconds, seconds, seconds), st.floats(-10, 1e6), st.integers(1, 5000))
def test_the_plan_fits_and_one_more_epoch_would_not(costs, left, steps):
    n = epochs_that_fit(costs, left, steps, 37, 11)

    def takes(epochs: int) -> float:
        parts = [costs.start, 11 * costs.image, costs.save, time_plan.FINISH_SECONDS]
        return sum(parts) + epochs * (steps * costs.step + 37 * costs.image + costs.save)

    counted = left * (1 - time_plan.MARGIN)
    assert n == 0 or takes(n) <= counted * (1 + 1e-9)
    assert takes(n + 1) > counted * (1 - 1e-9)


def test_costs_are_told_apart(monkeypatch, tmp_path):
    """A training on a made-up clock: every part has its duration, and comes back, whatever disturbs a round."""
    now = [100.0]
    clock = lambda: now[0]  # noqa: E731

    def passes(duration: float) -> None:
        now[0] += duration

    def fake_train(spec: Any, genotype: Any, data: Dataset, config: Any, *, progress: Any, folder: Path, **_: Any):
        assert folder == tmp_path / "there"
        assert len(data.train.labels) == 64  # all there are: 4 steps of 16
        passes(50.0)  # data, compilation
        for epoch in range(config.epochs):
            took = 4 * 0.25 + {0: 7.0, 2: 5.0}.get(epoch, 0.0)
            passes(took)
            passes(len(data.validation.labels) * 0.125 + {1: 2.0}.get(epoch, 0.0))
            progress({"epoch": epoch + 1, "seconds": took})
            passes({0: 9.0, 1: 4.0}.get(epoch, 3.0))  # the first save imports orbax
        return "model"

    def fake_evaluate(model: Any, split: Split) -> float:
        assert model == "model"
        passes(len(split.labels) * 0.125)
        return 0.5

    monkeypatch.setattr(time_plan, "time", SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(time_plan, "train", fake_train)
    monkeypatch.setattr(time_plan, "evaluate", fake_evaluate)
    task = time_plan.open_training("mnist5k", "smoke", get_timed_preset("mnist5k", "smoke"))
    costs = time_plan.measure(task, task.preset.training, tmp_path / "there")
    assert costs == pytest.approx(Costs(start=57.0, step=0.25, image=0.125, save=3.0))


@pytest.mark.parametrize(
    ("data", "name"), [(d, n) for d, presets in TIMED_PRESETS.items() if d != OWN for n in presets]
)
def test_presets_keep_the_limits(data, name):
    preset = get_timed_preset(data, name)
    spec, genotype = preset.cell_network(data)
    assert parameters_of(spec, genotype) < 10_000_000
    assert preset.time_steps <= 5
    promised = {"smoke": math.inf, "cpu-10min": 10, "cpu-1h": 60, "h100-10min": 10}
    assert (preset.minutes or math.inf) <= promised[name]
    assert preset.training.flip == (data not in ("mnist", "mnist5k"))


def test_crops_are_the_data_sets_own_unless_the_preset_says_otherwise():
    for data, name, padding in (("cifar10", "cpu-1h", 2), ("cifar10", "h100-10min", 4), ("mnist5k", "cpu-10min", None)):
        want = dataset_info(data).padding if padding is None else padding
        assert get_timed_preset(data, name).training.padding == want
    assert dataset_info("cifar10").padding == 4


def test_the_cell_names_its_kernel_sizes():
    smoke = get_timed_preset("mnist5k", "smoke")
    for cell, sizes in (
        ("0>1:conv7 1>3:conv5 0>3:skip", (5, 7)),
        ("0303 0030 0002 0000", (1, 3)),
        ("0>3:skip", (1, 3)),
    ):
        spec, genotype = dataclasses.replace(smoke, cell=cell).cell_network("mnist5k")
        assert spec.space.kernel_sizes == sizes
        assert len(genotype) == 6


# The script


@pytest.fixture(scope="module")
def finished(tmp_path_factory, in_this_process) -> tuple[Path, list[Any]]:
    """A whole run without a limit, and the splits that were evaluated beyond the training's own validation."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    run = functools.partial(start, *SMALL, "--minutes", "inf", "--out", str(out))
    return out, scripts.evaluated_splits(accuracy, run)


def test_a_run_leaves_curve_test_model_and_page(finished):
    out, splits = finished
    images = load_dataset("mnist5k", **LIMITS)
    (split,) = splits  # the test images, once
    assert np.array_equal(split.images, images.test.images)
    summary = RunFolder.open(out).read_json("summary.json")
    curve = records(out)
    assert [record["epoch"] for record in curve] == [1, 2]
    assert summary["validation_accuracy"] == curve[-1]["validation_accuracy"]
    model = load_model(out / "checkpoint")
    predicted = np.asarray(model(images.test.images)).argmax(1)
    assert summary["test_accuracy"] == pytest.approx((predicted == images.test.labels).mean())
    assert model.metrics["test_accuracy"] == summary["test_accuracy"]
    assert model.metrics["source"] == images.source
    # Stem 9·2, transition 9·2·4, cells 9·2·2 + 9·4·4; norms of 2, 2, 4, 4, 2 and 4 channels; head 4·10 + 10.
    assert summary["parameters"] == 18 + 72 + 36 + 144 + 2 * 18 + 50
    assert RunFolder.open(out).read_json("plan.json") == {"epochs": 2, "precision": "float32"}
    assert (out / "figures" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    text = (out / "report.md").read_text()
    for words in (images.source, "356 parameters", "n = 1", "T = 2", "batch_size 16", "accuracy.py --preset smoke",
                  "No limit was set", "touched once", "Device: "):  # fmt: skip
        assert words in text, words


def test_progress_for_machines_and_none_at_all(tmp_path, capsys):
    start(*SMALL, "--minutes", "inf", "--json", "--out", str(tmp_path / "json"))
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["epoch"] for line in lines if "epoch" in line] == [1, 2]
    assert all({"left_seconds", "best", "train_loss", "time", "text"} <= set(line) for line in lines if "epoch" in line)
    assert "report: " in err
    start(*SMALL, "--minutes", "inf", "--quiet", "--out", str(tmp_path / "quiet"))
    out, err = capsys.readouterr()
    assert out.startswith("mnist5k: validation ")
    assert not err
    assert "--quiet and --json: give one of them" in refused(capsys, "--quiet", "--json", "--preset", "smoke")


def test_all_images_train_and_validation_says_so(finished, tmp_path, capsys):
    out = tmp_path / "all"
    start(*SMALL, "--minutes", "inf", "--all-images", "--ema", "0.5", "--mix", "cutmix", "--padding", "3",
          "--out", str(out))  # fmt: skip
    config = RunFolder.open(out).config
    assert config["images"] == {"train": 96, "validation": 32, "test": 32}
    changed = {name: config["settings"]["training"][name] for name in ("ema", "mix", "padding")}
    assert changed == {"ema": 0.5, "mix": "cutmix", "padding": 3}
    assert capsys.readouterr().out.count("validation (trained on)") == 3  # two epochs and the end
    text = (out / "report.md").read_text()
    assert "- validation (trained on), after" in text
    assert "trained on validation images too" in text
    task = time_plan.open_training(
        "mnist5k", "smoke", dataclasses.replace(get_timed_preset("mnist5k", "smoke"), all_images=True)
    )
    alone = load_dataset("mnist5k", **LIMITS)
    np.testing.assert_array_equal(task.data.train.images[64:], alone.validation.images)
    np.testing.assert_array_equal(task.data.train.labels[64:], alone.validation.labels)


OTHERS = {
    "epochs": 7, "channels": 5, "limit_train": 33, "precision": "bfloat16", "minutes": 3.0, "cell": "0>3:conv3",
    "time_steps": 3, "stem_stride": 1, "head": "snasnet", "dropout": 0.5, "norm": "per_step", "v_threshold": 0.7,
    "surrogate": "sigmoid", "surrogate_scale": 3.0, "max_spikes": 2, "batch_size": 9, "learning_rate": 0.3,
    "weight_decay": 0.3, "label_smoothing": 0.3, "padding": 3, "trivial": True, "cutout": 5, "mix": "mixup", "ema": 0.3,
    "stem_init": "whitened", "all_images": True, "limit_validation": 9, "limit_test": 9,
}  # fmt: skip
OF_THE_RUN = {  # what is trained is the same
    "data", "preset", "data_dir", "out", "seed", "seeds", "conventional", "huge_pages", "quiet", "json", "tensorboard",
    "compilation_cache",
}  # fmt: skip


def test_no_option_is_ignored():
    script = runpy.run_path(str(SCRIPT))
    options, chosen = script["Options"], script["settings"]
    assert {field.name for field in dataclasses.fields(options)} == OTHERS.keys() | OF_THE_RUN
    _, base = chosen(options(preset="smoke"))
    for name, value in OTHERS.items():
        _, changed = chosen(options(preset="smoke", **{name: value}))
        there = [getattr(part, name) for part in (changed, changed.training, changed.neuron) if hasattr(part, name)]
        assert value in there, name
        assert changed != base, name


def test_planned_it_gives_the_same_result(finished, tmp_path, monkeypatch):
    """Timed steps change nothing; the plan is there before the first real step; nothing else is left behind."""
    out, plans = tmp_path / "planned", []
    real = accuracy.train

    def watched(*arguments: Any, folder: Path, **named: Any) -> Any:
        plans.append(RunFolder.open(out).read_json("plan.json") if folder == out / "training" else out.exists())
        return real(*arguments, folder=folder, **named)

    for module in (accuracy, time_plan):
        monkeypatch.setattr(module, "train", watched)
    start(*SMALL, "--minutes", "40", "--out", str(out))
    timed, plan = plans
    assert timed is False  # even the folder is made once there is a plan
    assert plan["epochs"] == 2
    assert (plan["minutes"], plan["seconds_gone"]) == (40, 2.0)
    assert all(value >= 0 for value in plan["costs"].values())
    assert plan["costs"]["step"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["planned"]
    assert_same_result(out, finished[0])
    text = (out / "report.md").read_text()
    assert "Planned: at most 40 minutes" in text
    assert "Taken: 0.03 minutes" in text


def test_time_decides_the_epochs(tmp_path, monkeypatch):
    monkeypatch.setattr(time_plan, "measure", lambda task, config, folder: Costs(10.0, 1.0, 0.1, 1.0))
    task = time_plan.open_training("mnist5k", "smoke", get_timed_preset("mnist5k", "smoke"))

    def planned(minutes: float, epochs: int) -> int:
        training = dataclasses.replace(task.preset.training, epochs=epochs)
        preset = dataclasses.replace(task.preset, minutes=minutes, training=training)
        asked = dataclasses.replace(task, preset=preset)
        return time_plan.make_plan(asked, tmp_path / "run")["epochs"]

    # Two seconds are gone. An epoch is 4 + 3.2 + 1 s, the rest 10 + 3.2 + 1 + 6 s: (0.95·298 - 20.2) / 8.2.
    assert planned(5, 1000) == 32
    assert planned(5, 10) == 10
    with pytest.raises(ValueError, match=r"--minutes 0\.5: not one epoch of 8\.2 s fits; give at least 0\.6"):
        planned(0.5, 10)  # 28.4 / 0.95 s and the two that are gone
    assert planned(0.6, 10) == 1


@pytest.mark.parametrize("faster", mostly_slow(PRECISIONS, lambda name: name == "bfloat16"))
def test_the_faster_precision_is_trained_in(faster, tmp_path, monkeypatch):
    """Both are timed, the plan says which won, the training is of it, and the seeds that follow time none."""
    timed, trained, real = [], [], accuracy.train

    def measured(task: Any, config: TrainConfig, folder: Path) -> Costs:
        timed.append(config.precision)
        return Costs(1.0, 0.01 if config.precision == faster else 0.02, 0.001, 0.1)

    def watched(spec: Any, genotype: Any, data: Any, config: TrainConfig, **named: Any) -> Any:
        trained.append(config.precision)
        return real(spec, genotype, data, config, **named)

    monkeypatch.setattr(time_plan, "measure", measured)
    monkeypatch.setattr(accuracy, "train", watched)
    presets = TIMED_PRESETS["mnist5k"]
    monkeypatch.setitem(presets, "smoke", dataclasses.replace(presets["smoke"], precisions=PRECISIONS))
    options = [*SMALL, "--minutes", "40", "--seeds", "2"]
    start(*options, "--out", str(tmp_path / "run"))
    assert timed == list(PRECISIONS)
    assert trained == [faster, faster]
    plan, text = (tmp_path / "run" / "seed0" / name for name in ("plan.json", "report.md"))
    assert f'"precision": "{faster}"' in plan.read_text()
    assert f"A step took 10 ms in {faster} when timed." in text.read_text()
    assert f"precision {faster}" in text.read_text()
    other = next(name for name in PRECISIONS if name != faster)
    start(*options, "--precision", other, "--out", str(tmp_path / "given"))
    assert timed[2:] == [other]  # to know how long it takes
    assert trained[2:] == [other, other]


def test_too_short_a_time_is_one_line_and_no_folder(tmp_path, capsys):
    line = refused(capsys, *SMALL, "--minutes", "0.05", "--out", str(tmp_path / "run"))
    assert "--minutes 0.05: not one epoch of" in line
    assert not list(tmp_path.iterdir())


def test_stopped_it_goes_on_by_the_same_plan_and_is_tested_once(finished, tmp_path, monkeypatch, capsys):
    out, (real_train, real_evaluate) = tmp_path / "broken", (accuracy.train, accuracy.evaluate)
    options, tested = [*SMALL, "--minutes", "40", "--out", str(out)], []

    def stops(*arguments: Any, progress: Any, **named: Any) -> Any:
        def stop(record: dict[str, Any]) -> None:
            progress(record)
            raise KeyboardInterrupt

        return real_train(*arguments, progress=stop, **named)

    def interrupts(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time_plan, "measure", lambda task, config, folder: Costs(1.0, 0.01, 0.001, 0.1))
    for name, stopping in (("train", stops), ("evaluate", interrupts)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(accuracy, name, stopping)
            with pytest.raises(SystemExit) as stop:
                start(*options)
        assert stop.value.code == 130
        assert not (out / "test.json").exists()
        monkeypatch.setattr(time_plan, "measure", None)  # never again
    monkeypatch.setattr(accuracy, "evaluate", lambda *a: tested.append(a) or real_evaluate(*a))
    start(*options)
    assert len(tested) == 1
    assert "resumed: 2 epochs as planned at the first start; its limit of 40 minutes" in capsys.readouterr().out
    assert_same_result(out, finished[0])
    assert "no single start took it all" in (out / "report.md").read_text()
    start(*options)  # and a finished one is only looked at
    assert len(tested) == 1
    assert_same_result(out, finished[0])


def test_a_damaged_plan_is_one_line(finished, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.json").write_bytes((finished[0] / "config.json").read_bytes())
    for content in ("{}", '{"epochs": 0}', "[2]"):
        (out / "plan.json").write_text(content)
        assert "plan.json is not as this run wrote it" in refused(capsys, *SMALL, "--minutes", "inf", "--out", str(out))
    assert not (out / "training").exists()


@pytest.mark.slow
def test_over_seeds_each_is_the_training_of_its_seed(tmp_path, monkeypatch, capsys):
    """The first seed's plan is everyone's; a second start trains nothing; mean and deviation are NumPy's."""
    out, options = tmp_path / "seeds", [*SMALL, "--minutes", "40", "--seeds", "3"]
    monkeypatch.setattr(time_plan, "measure", lambda task, config, folder: Costs(1.0, 0.01, 0.001, 0.1))
    told_apart = {0: 0.5, 1: 0.125, 2: 0.25}
    monkeypatch.setattr(accuracy, "evaluate", lambda model, split: told_apart[model.metrics["seed"]])
    start(*options, "--out", str(out))
    start(*SMALL, "--minutes", "inf", "--seed", "2", "--out", str(tmp_path / "alone"))
    assert_same_result(out / "seed2", tmp_path / "alone")
    runs = [RunFolder.open(out / f"seed{seed}") for seed in range(3)]
    assert runs[0].read_json("plan.json")["minutes"] == 40
    assert all(run.read_json("plan.json") == {"epochs": 2, "precision": "float32"} for run in runs[1:])
    tests = [run.read_json("test.json")["test_accuracy"] for run in runs]
    assert tests == list(told_apart.values())
    summary = RunFolder.open(out).summary()
    assert summary["n"] == 3
    assert summary["test_accuracy"] == pytest.approx(np.mean(tests))
    assert summary["test_accuracy_sd"] == pytest.approx(np.std(tests, ddof=1))
    report = (out / "report.md").read_text()
    assert f"**{100 * np.mean(tests):.2f} ± {100 * np.std(tests, ddof=1):.2f} [" in report
    capsys.readouterr()
    monkeypatch.setattr(accuracy, "evaluate", None)
    start(*options, "--out", str(out))
    assert f"{100 * np.mean(tests):.2f} ± " in capsys.readouterr().out
    assert (out / "report.md").read_text() == report
    assert "seeds=0 must be" in refused(capsys, *SMALL, "--seeds", "0", "--out", str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_a_neuron_of_ones_own(tmp_path, capsys):
    out = tmp_path / "neuron"
    own = ("--v-threshold", "0.5", "--surrogate", "triangle", "--max-spikes", "3")
    start(*SMALL, "--minutes", "inf", *own, "--out", str(out))
    neuron = NeuronSpec(v_threshold=0.5, surrogate="triangle", max_spikes=3, reset="soft")
    assert load_model(out / "checkpoint").spec.neuron == neuron
    words = "threshold 0.5, tau 1.33333, soft reset, surrogate triangle, **up to 3 spikes a time step**"
    assert words in (out / "report.md").read_text()
    assert "surrogate='x'" in refused(capsys, *SMALL, "--surrogate", "x", "--out", str(tmp_path / "none"))


def test_the_same_network_without_spikes(tmp_path, capsys):
    out, known = tmp_path / "relu", set(neurons.NEURONS)
    start(*SMALL, "--minutes", "inf", "--conventional", "--out", str(out))
    assert set(neurons.NEURONS) == known
    spiking = get_timed_preset("mnist5k", "smoke")
    summary, report = RunFolder.open(out).summary(), (out / "report.md").read_text()
    at_one = dataclasses.replace(spiking, cell="0>3:conv3", channels=2, time_steps=1).cell_network("mnist5k")
    assert summary["parameters"] == parameters_of(*at_one)
    assert "T = 1" in report
    assert "conventional: ReLU in the place of neurons, no spikes" in report
    with relu_neurons():
        model = load_model(out / "checkpoint")
        assert (model.spec.neuron.model, model.spec.time_steps) == ("relu", 1)
    with pytest.raises(ValueError, match="model='relu' is not a neuron model"):
        load_model(out / "checkpoint")
    words = "--time-steps: a --conventional network has no spikes"
    assert words in refused(capsys, *SMALL, "--conventional", "--time-steps", "2", "--out", str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()
