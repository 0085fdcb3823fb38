"""Nothing is selected by test images: what steps 1 to 3 read, and what step 4 chooses by.

Trainings are replaced by made-up accuracies, so that all choices are known, and the test split by one that raises when
it is looked at, or by test accuracies in the reverse order of validation's.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl
import pytest

import scripts
from convolutions import conv_edges
from spikernel_jax.cells.space import CellSpace
from spikernel_jax.data import Split
from spikernel_jax.pipeline import baselines, finalists, impact, kernel_sets, presets, search, trials
from spikernel_jax.pipeline.finalists import train_finalists
from spikernel_jax.pipeline.job import Job, open_job
from spikernel_jax.pipeline.tradeoff import choose_model
from spikernel_jax.scoring.scorer import Scorer
from spikernel_jax.search import halving, queue, shorts
from spikernel_jax.snn import network
from spikernel_jax.snn.model import Model


class Untouchable(Split):
    """A split that nothing may look at."""

    def __init__(self) -> None:
        """Has no images to hold."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("images", "labels"):
            raise AssertionError("the test split was looked at")
        return super().__getattribute__(name)


def validation_accuracy(spec: Any, genotype: Any, seed: int) -> float:
    """Made up: more and larger convolutions are better; seeds differ a little."""
    return 0.4 + 0.01 * sum(k for *_, k in conv_edges(spec.space, np.asarray(genotype))) + 0.001 * (seed % 10)


def made_up_training(spec: Any, genotype: Any, data: Any, config: Any, *, seed: int, folder: Path, **_: Any) -> Model:
    """What `train` gives back and leaves, without training."""
    epochs = [{"epoch": e + 1, "train_loss": 1.0, "train_accuracy": 0.5, "seconds": 1.0} for e in range(config.epochs)]
    for record in epochs:
        record["validation_accuracy"] = validation_accuracy(spec, genotype, seed)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in epochs))
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), spec, genotype))
    params, stats = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    return Model(spec, genotype, params, stats, data.mean, data.std, dict(epochs[-1]))


@pytest.fixture
def job(tmp_path, monkeypatch) -> Job:
    """A small run whose test split must not be looked at."""
    smoke = dataclasses.replace(presets.get_preset("mnist5k", "smoke"), kernel_sizes=(1, 3), sets=((1,), (3,)))
    monkeypatch.setitem(presets.PRESETS["mnist5k"], "smoke", smoke)
    monkeypatch.setattr(trials, "train", made_up_training)
    for module in (trials, finalists):  # what a training seals, it did not make up
        monkeypatch.setattr(module, "epochs_of", lambda folder: scripts.read_jsonl(folder / "metrics.jsonl"))
    monkeypatch.setattr(
        trials, "measured",
        lambda job, model: {"parameters": 1, "memory_bytes": 9000, "synops": len(job.data.validation.labels) * 1.0,
                            "energy_nj": 1.0},
    )  # fmt: skip
    made = open_job(
        tmp_path / "run", data="mnist5k", preset="smoke", seed=None, data_dir=None, say=lambda _: None,
        given={"strategy": "random", "samples": 12},
    )  # fmt: skip
    return dataclasses.replace(made, data=dataclasses.replace(made.data, test=Untouchable()))


def test_impact_sets_and_search_never_look_at_test_images(job):
    table = impact.measure_impact(job)
    assert table["accuracy"].to_list() == pytest.approx([0.42, 0.421, 0.46, 0.461])
    found = search.search_sets(job, kernel_sets.choose_sets(job))
    assert found["finalist"].sum() == 2


def test_short_trainings_never_look_at_test_images(job):
    found = search.search_sets(
        dataclasses.replace(job, options=dataclasses.replace(job.options, strategy="trainings")), ((1,), (3,))
    )
    assert sorted(found.filter("finalist")["search_epochs"]) == [4, 4]


@pytest.mark.slow
def test_the_budget_of_short_trainings_is_the_options_and_stays(job, monkeypatch):
    """Seconds are epochs by the pace of the first trainings, which a run that goes on does not measure again."""
    spent = []

    def trained(training: Any, line: shorts.Line, budget: int, *_: Any) -> shorts.Shorts:
        spent.append(budget)
        n = len(line.rows)
        return shorts.Shorts(np.full(n, 4), np.arange(n) / n)

    monkeypatch.setattr(shorts, "train_rungs", trained)
    monkeypatch.setattr(shorts, "pace", lambda *_: 4.0)

    def searched(folder: str, **options: Any) -> None:
        made = open_job(
            job.run.path.parent / folder, data="mnist5k", preset="smoke", seed=None, data_dir=None,
            say=lambda _: None, given=options,
        )  # fmt: skip
        search.search_sets(made, [(1,)])

    searched("epochs", search_epochs=77)
    searched("seconds", search_seconds=100.0)
    monkeypatch.setattr(shorts, "pace", lambda *_: 1.0)
    searched("seconds", search_seconds=100.0)
    assert spent == [77, 25, 25]


def test_the_method_of_scoring_is_the_jobs(job):
    settled = search.settled(dataclasses.replace(job, method="batched"), [(3,)])
    cells = halving.find_cells(settled)
    at, (name, _) = np.arange(4), settled.rungs[0]
    batched = halving.units(settled, cells, job.data, name, at).scorer
    assert isinstance(batched, Scorer)
    assert (batched.method, batched.tile > 1) == ("batched", True)
    usual = halving.units(search.settled(job, [(3,)]), cells, job.data, name, at).scorer
    assert isinstance(usual, Scorer)
    assert usual.method == "shared"


def test_scores_come_from_training_images(job):
    """Other validation images change no score, other training images do."""

    def scored(of: Job) -> float:
        fidelity, trained = of.preset.fidelities[0], search.settled(of, [(3,)]).trained
        return float(np.asarray(fidelity.images(jax.random.key(1), of.data, trained)).sum())

    flipped = {
        name: dataclasses.replace(
            job, data=dataclasses.replace(job.data, **{name: Split(255 - split.images, split.labels)})
        )
        for name, split in (("train", job.data.train), ("validation", job.data.validation))
    }
    assert scored(flipped["validation"]) == scored(job)
    assert scored(flipped["train"]) != scored(job)


def test_the_choice_goes_by_validation_where_test_says_the_reverse(job, monkeypatch):
    impact.measure_impact(job)
    search.search_sets(job, kernel_sets.choose_sets(job))
    evaluated = []

    def reversed_order(model: Model, split: Split) -> float:
        evaluated.append(split)
        return 1 - float(model.metrics["validation_accuracy"])

    monkeypatch.setattr(trials, "evaluate", reversed_order)
    test = Split(np.zeros((2, 28, 28, 1), np.uint8), np.zeros(2, np.int32))
    job = dataclasses.replace(job, data=dataclasses.replace(job.data, test=test))
    table = train_finalists(job)
    baselines.train_baselines(job)
    assert all(split is test for split in evaluated)
    trained = len(list(job.run.path.glob("trainings/*/test.json")))
    assert len(evaluated) == trained  # once for each trained network
    choose_model(job)
    chosen = job.run.read_json("summary.json")["chosen"]
    mean = table.group_by("name").agg(pl.col("validation_accuracy").mean(), pl.col("test_accuracy").mean())
    assert len(mean) == 2
    assert mean["validation_accuracy"].n_unique() == 2
    best = mean.sort("validation_accuracy")["name"][-1]
    assert chosen["name"] == best
    assert mean.sort("test_accuracy")["name"][0] == best  # by test accuracy it would have been the other
    assert len(evaluated) == trained


def test_random_baselines_depend_on_the_seed_alone(job):
    """Not on accuracies: the draw is the same whatever was measured."""
    job.remember("memory_budget", "bits")
    finalists = pl.DataFrame({"name": ["a", "b"], "kernel_set": ["1,3", "3"], "genotype": ["0>3:conv3", "0>3:skip"]})
    first, again = (baselines.cells(job, finalists) for _ in range(2))
    assert {name: cell.row.tolist() for name, cell in first.items()} == {
        name: cell.row.tolist() for name, cell in again.items()
    }
    other = baselines.cells(dataclasses.replace(job, seed=1), finalists)
    assert any((first[name].row != other[name].row).any() for name in ("random-a", "random-b"))
    assert set(first) == {"random-a", "random-b", "snasnet"}
    spec = job.preset.network("mnist5k", CellSpace((1, 3)))
    drawn = [baselines.cells(dataclasses.replace(job, seed=s), finalists)["random-a"].row for s in range(60)]
    listed = CellSpace((1, 3)).enumerate()
    fitting = listed[queue.memory_of(spec, listed, 8) <= job.options.memory_budget]
    places = [int(np.flatnonzero((fitting == row).all(1))[0]) for row in drawn]  # each fits
    assert 0.35 < np.mean(places) / len(fitting) < 0.65  # and they come from everywhere
    assert len(set(places)) > 50


@pytest.mark.parametrize(
    ("gaps", "words"),
    [
        ([0.03, 0.04, 0.05], "The search helped against random cells"),
        ([0.03, -0.04, 0.05], "No gain over random cells is shown"),
        ([-0.03, -0.04, -0.05], "The search did worse than random cells"),
        ([0.03], "not known: fewer than two pairs"),
    ],
)
def test_the_verdict_in_words(gaps, words):
    names = [f"f{i}" for i in range(len(gaps))]
    finalists = pl.DataFrame(
        [{"name": name, "seed": s, "test_accuracy": 0.5 + gap} for name, gap in zip(names, gaps, strict=True)
         for s in (0, 1)]
    )  # fmt: skip
    drawn = [
        {"name": f"random-{name}", "role": "random", "of": name, "seed": s, "test_accuracy": 0.5}
        for name in names for s in (0, 1)
    ]  # fmt: skip
    unsearched = [
        {"name": f"u{k}", "role": "unsearched", "of": None, "seed": s, "test_accuracy": 0.4 + k / 100 + s / 100}
        for k in (1, 3, 5) for s in (0, 1)
    ]  # fmt: skip
    tables = pl.DataFrame(drawn + unsearched)
    rows = [
        {"name": name, "role": "finalist", "test_accuracy": 0.5 + gap, "validation_accuracy": 0.9,
         "fits": True, "chosen": name == "f0"}
        for name, gap in zip(names, gaps, strict=True)
    ]  # fmt: skip
    rows += [
        {"name": row["name"], "role": row["role"], "test_accuracy": row["test_accuracy"], "chosen": False,
         "validation_accuracy": {"u1": 0.1, "u3": 0.3, "u5": 0.9}.get(row["name"], 0.2),
         "fits": row["name"] != "u5"}
        for row in drawn[::2] + unsearched[::2]
    ]  # fmt: skip
    found = baselines.verdict(finalists, tables, pl.DataFrame(rows))
    assert words in found["text"]
    assert found["over_random"]["mean"] == pytest.approx(np.mean(gaps))
    assert found["over_unsearched"]["name"] == "u3"  # u5 is better and does not fit
    assert found["over_unsearched"]["mean"] == pytest.approx(0.5 + gaps[0] - 0.435)
    assert found["over_unsearched"]["n"] == 2
