"""A run is repeated from its folder, or refused where it would be another one."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest

from spikernel_jax.pipeline import presets
from spikernel_jax.pipeline.job import Job, open_job

quiet = functools.partial(open_job, data_dir=None, say=lambda _: None)
NOTHING: dict[str, Any] = {"data": None, "preset": None, "seed": None, "given": {}}


@pytest.fixture
def first(tmp_path) -> Job:
    given = {"strategy": "random", "samples": 12, "memory_budget": "13KiB"}
    job = quiet(tmp_path / "first", data="mnist5k", preset="smoke", seed=3, given=given)
    job.remember("strategy", "samples", "memory_budget")
    return job


def test_it_is_the_same_job_in_another_folder(first, tmp_path):
    again = quiet(tmp_path / "again", **NOTHING, like=first.run.path)
    assert again.run.path != first.run.path
    assert again.run.config == first.run.config
    assert again.options == first.options
    assert again.seed == 3
    assert quiet(tmp_path / "again", **NOTHING, like=first.run.path).options == first.options  # it goes on alike


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"out": None}, "give --out, the folder of the new run"),
        ({"out": "first"}, "give --out, the folder of the new run"),
        ({"like": "absent"}, "no run's folder, it has no config.json"),
        ({"seed": 4}, "repeats a run as it was: leave out --seed"),
        ({"given": {"search_epochs": 9, "sets": ()}}, "leave out --search-epochs"),
        ({"loaded": {"own.py": "0" * 64}}, "give --load the files of that run, unchanged: none"),
    ],
)
def test_what_would_be_another_run_is_refused(change, words, first, tmp_path):
    asked = NOTHING | {"out": "again", "like": "first"} | change
    out, like = asked.pop("out"), asked.pop("like")
    with pytest.raises(ValueError, match=words) as error:
        quiet(out and tmp_path / out, **asked, like=tmp_path / like)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


def test_a_preset_of_another_version_is_refused(first, tmp_path, monkeypatch):
    other = dataclasses.replace(presets.get_preset("mnist5k", "smoke"), epochs=7)
    monkeypatch.setitem(presets.PRESETS["mnist5k"], "smoke", other)
    with pytest.raises(ValueError, match=r"preset smoke was another one then .*epochs: 2 there, 7 here"):
        quiet(tmp_path / "again", **NOTHING, like=first.run.path)
    assert not Path(tmp_path / "again").exists()
