"""Scripts of the project, run in this process as the shell would."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest


def start(script: Path, *options: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.name, *options])
        runpy.run_path(str(script), run_name="__main__")


def refused(script: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """What the script says on stderr, in one line, as it refuses."""
    with pytest.raises(SystemExit) as stop:
        start(script, *options)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def evaluated_splits(module: Any, work: Callable[[], None]) -> list[Any]:
    """The splits that a module evaluates while it works, beyond a training's own validation."""
    splits: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        real = module.evaluate
        patch.setattr(module, "evaluate", lambda model, split: splits.append(split) or real(model, split))
        work()
    return splits


def refuses(benchmark: Any, change: dict[str, Any], words: str) -> None:
    """A benchmark gives one line for options that are wrong."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.config, "update", lambda *_: None)  # jax has started in this process
        with pytest.raises(ValueError, match=words) as error:
            benchmark.bench(benchmark.Options(quick=True, **change))
    assert "\n" not in str(error.value)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
