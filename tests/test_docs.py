"""What README and docs show: Python blocks run, commands have the options they name, the tutorial ends with a model."""

import importlib.util
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import tyro

import scripts
from spikernel_jax.io import machine
from spikernel_jax.scoring import scores
from spikernel_jax.snn import neurons

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
COMMAND = re.compile(r"python ((?:experiments|tools)/\w+\.py)(.*)")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of every fenced block."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Scripts of a block of shell, and their words, the shell's variables filled in."""
    text = text.replace("\\\n", " ")
    variables = dict(re.findall(r'^(\w+)="(.*)"$', text, re.MULTILINE))
    for name, value in variables.items():
        text = text.replace(f"${name}", value)
    found = [COMMAND.search(line.split("  #")[0].strip('"')) for line in text.splitlines()]
    return [(match[1], shlex.split(match[2].rstrip('"'))) for match in found if match]


PYTHON = [
    pytest.param(page, marks=[pytest.mark.slow] * (page.name != "README.md"), id=named(page))
    for page in PAGES if any(language == "python" for language, _ in blocks(page))
]  # fmt: skip
SHELL = [
    pytest.param(script, words, id=f"{named(page)}: {script} {' '.join(words)}")
    for page in PAGES
    for language, text in blocks(page)
    for script, words in (commands(text) if language == "sh" else [])
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A folder to write into, and registries that forget what a page adds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scores, "_SCORES", dict(scores._SCORES))
    monkeypatch.setattr(neurons, "NEURONS", dict(neurons.NEURONS))


def test_every_block_is_of_a_language_that_is_tried():
    assert {language for page in PAGES for language, _ in blocks(page)} == {"python", "sh"}
    assert len(PYTHON) >= 7
    assert len(SHELL) >= 25


@pytest.mark.parametrize("page", PYTHON)
def test_python_blocks_run(page, capsys):
    """The tutorial's commands too, where they take only seconds."""
    own: dict[str, Any] = {}
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text, f"{named(page)}", "exec"), own)
        for script, words in commands(text) if page.name == "tutorial.md" else []:
            if "runs/trial" in words:
                scripts.start(ROOT / script, *words)
    if page.name == "tutorial.md":
        assert "Accuracy (float32) against memory" in capsys.readouterr().out


@pytest.mark.parametrize(("script", "words"), SHELL)
def test_commands_have_the_options_they_name(script, words):
    spec = importlib.util.spec_from_file_location(f"shown_{Path(script).stem}", ROOT / script)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    tyro.cli(module.Options, args=words)


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=named)
def test_examples_run_and_are_short(example, capsys):
    assert len(example.read_text().splitlines()) < 40
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out


def test_the_readme_is_a_door():
    assert len((ROOT / "README.md").read_bytes()) <= 6000


def test_the_setting_of_memory_is_that_which_scripts_take():
    page = (ROOT / "docs" / "explanation" / "engine.md").read_text("utf-8")
    (shown,) = re.findall(r"sets `GLIBC_TUNABLES=([\w.:=]+)`", page)
    assert shown == machine._HUGE_PAGES


def test_links_lead_somewhere():
    for page in [*PAGES, ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text("utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), f"{named(page)}: {target}"
