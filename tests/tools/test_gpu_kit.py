"""What is packed for a GPU machine without a network; pip is not run."""

import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

import gpu_kit as kit

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def prepared(tmp_path) -> Path:
    """A folder that looks like prepared CIFAR-10 of 3,000 bytes, beside another data set."""
    folder = tmp_path / "tfds" / "cifar10" / "3.0.2"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_bytes(bytes(1000))
    (folder / "cifar10-train.array_record-00000-of-00001").write_bytes(bytes(2000))
    (tmp_path / "tfds" / "mnist").mkdir()
    (tmp_path / "tfds" / "mnist" / "other").write_bytes(bytes(10**6))
    return tmp_path / "tfds"


@pytest.fixture
def pip(monkeypatch) -> list[list[str]]:
    """Stands in for pip: every package that it is asked for becomes a wheel of 100 bytes."""
    calls: list[list[str]] = []

    def answer(arguments: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(arguments)
        folder = Path(arguments[arguments.index("-d" if "-d" in arguments else "-w") + 1])
        folder.mkdir(exist_ok=True)
        for argument in arguments:
            if argument.count("==") == 1:
                (folder / f"{argument.replace('==', '-')}-py3-none-any.whl").write_bytes(bytes(100))
        return subprocess.CompletedProcess(arguments, 0, "", "")

    monkeypatch.setattr(kit.subprocess, "run", answer)
    return calls


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_kit_holds_one_data_set_and_all_wheels(prepared, pip, tmp_path):
    out = tmp_path / "kit"
    size = kit.pack(kit.Options("cifar10", prepared, out, also=("numpy",)))
    data = {f"tfds/cifar10/3.0.2/{path.name}" for path in (prepared / "cifar10" / "3.0.2").iterdir()}
    there = names(out)
    assert data <= there
    wheels = {path.split("/")[1].rsplit("-", 4)[0] for path in there - data}
    assert wheels == {*kit.PACKAGES, "numpy"}
    assert size == 3000 + 100 * (len(kit.PACKAGES) + 1)
    download, build = pip
    assert "--only-binary=:all:" in download
    assert not any(part.startswith("promise") for part in download)  # no wheel of it is published
    assert [part for part in build if "==" in part] == [f"promise=={kit.metadata.version('promise')}"]


@pytest.mark.parametrize(("part", "folders"), [("data", {"tfds"}), ("wheels", {"wheels"})])
def test_parts_go_one_by_one(part, folders, prepared, pip, tmp_path):
    kit.pack(kit.Options("cifar10", prepared, tmp_path / "kit", part=part))
    assert {path.name for path in (tmp_path / "kit").iterdir()} == folders
    assert bool(pip) == (part == "wheels")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"limit_mib": 2999 / 2**20}, "more than --limit-mib"),  # the data alone
        ({"limit_mib": 3200 / 2**20}, "give --part wheels and --part data"),  # with the wheels
        ({"name": "cifar100"}, "tools/prepare_data.py cifar100"),
        ({"name": "mnist5k"}, "is no data set that is prepared for TFDS"),
        ({"also": ("no-such-package",)}, "'no-such-package' is not installed here"),
    ],
)
def test_refusals_leave_nothing(changes, words, prepared, pip, tmp_path):
    options = {"name": "cifar10", "data_dir": prepared, "out": tmp_path / "kit"} | changes
    with pytest.raises(ValueError, match=words) as error:
        kit.pack(kit.Options(**options))
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["tfds"]


def test_what_pip_cannot_do_is_one_line_and_a_kit_is_not_overwritten(prepared, pip, tmp_path, monkeypatch):
    said = "WARNING: old\nERROR: No matching distribution found for spyx\n"
    monkeypatch.setattr(kit.subprocess, "run", lambda a, **_: subprocess.CompletedProcess(a, 1, "", said))
    with pytest.raises(ValueError, match=r"pip: ERROR: No matching distribution found for spyx$"):
        kit.pack(kit.Options("cifar10", prepared, tmp_path / "kit"))
    assert not (tmp_path / "kit").exists()
    (tmp_path / "kit").mkdir()
    with pytest.raises(ValueError, match="is there already"):
        kit.pack(kit.Options("cifar10", prepared, tmp_path / "kit"))


def test_the_command_names_what_is_there():
    words = shlex.split(kit.command("cifar100", Path("somewhere/my kit")))
    assert words[words.index("--data-dir") + 1] == "my kit/tfds"
    assert words[words.index("--data") + 1] == "cifar100"
    script = next(word for word in words if word.endswith("accuracy.py"))
    assert (ROOT / script).is_file()
