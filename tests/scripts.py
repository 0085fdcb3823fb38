"""Scripts of the project, run in this process as the shell would."""

import runpy
import sys
from pathlib import Path

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
