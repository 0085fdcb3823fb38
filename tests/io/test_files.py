"""Files and folders are written whole or not at all, and room is looked for first."""

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import scripts
from disk import contents, one_line
from spikernel_jax.io import files


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")

    def fail():
        with files.atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail()
    assert contents(tmp_path) == {"x": b"old"}


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "model"
    path.mkdir()
    (path / "x").write_text("old")

    def make(fail: bool) -> None:
        with files.atomic_folder(path) as fresh:
            fresh.mkdir()
            (fresh / "y").write_text("new")
            if fail:
                raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        make(fail=True)
    assert contents(tmp_path) == {"model/x": b"old"}
    moves = iter([False, True, False])  # the second of the two moves fails; the first is undone
    replace = os.replace

    def failing(*where):
        if next(moves):
            raise OSError("no")
        replace(*where)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(OSError, match="no"):
            make(fail=False)
    assert contents(tmp_path) == {"model/x": b"old"}
    make(fail=False)
    assert contents(tmp_path) == {"model/y": b"new"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_folder_with_room_is_made_and_left_empty(tmp_path):
    files.check_room(tmp_path / "a" / "b", 1000)
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "a" / "b" / "x").write_text("here")
    files.check_room(str(tmp_path / "a" / "b"), 0)
    assert contents(tmp_path) == {"a/b/x": b"here"}


def test_too_little_room_names_folder_needed_and_free(tmp_path):
    with pytest.raises(ValueError, match="make room or choose another folder") as error:
        files.check_room(tmp_path / "a" / "b", 10**18)
    found = re.fullmatch(rf"{tmp_path}/a/b needs {10**18} bytes, but (\d+) are free there: .*", one_line(error))
    assert found
    assert int(found[1]) == pytest.approx(os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize, rel=0.05)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["run", "run/deep/folder"])
@pytest.mark.parametrize("link", [False, True])
def test_a_file_or_broken_link_in_the_way(where, link, tmp_path):
    if link:
        (tmp_path / "run").symlink_to("nowhere")
    else:
        (tmp_path / "run").write_text("precious")
    with pytest.raises(ValueError, match=rf"{tmp_path / where} needs 5 bytes.*, but cannot be written to") as error:
        files.check_room(tmp_path / where, 5)
    one_line(error)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]
    assert link or (tmp_path / "run").read_text() == "precious"


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a small file system")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_small_disk_has_the_room_that_it_has(tmp_path):
    with mounted(disk := tmp_path / "disk", "size=64k"):
        files.check_room(disk / "run", 65536)
        with pytest.raises(ValueError, match=f"{disk}/run needs 65537 bytes, but 65536 are free there"):
            files.check_room(disk / "run", 65537)
        (disk / "full").write_bytes(bytes(65536))
        with pytest.raises(ValueError, match=rf"{disk}/run needs 0 bytes \(0 are free\), but .* No space left"):
            files.check_room(disk / "run", 0)
        assert contents(disk) == {"full": bytes(65536)}
        assert list((disk / "run").iterdir()) == []


def test_a_disk_that_cannot_be_written(tmp_path):
    with mounted(disk := tmp_path / "disk", "size=64k,ro"):
        for folder in (disk, disk / "run"):
            with pytest.raises(ValueError, match=rf"{folder} needs 1 bytes \(\d+ are free\), but .* Read-only"):
                files.check_room(folder, 1)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_disk_that_fails_late_is_found_too(step, tmp_path, monkeypatch):
    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(files.os, step, fail)
    with pytest.raises(ValueError, match=rf"{tmp_path} needs 1 bytes .*Input/output error"):
        files.check_room(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_jsonl_is_written_whole(tmp_path):
    path = tmp_path / "m.jsonl"
    records = [{"epoch": 1, "name": "é"}, {"epoch": 2, "x": [1.5, None]}]
    files.write_jsonl(path, records)
    assert scripts.read_jsonl(path) == records
    with pytest.raises(ValueError, match="JSON cannot hold"):
        files.write_jsonl(path, [{"loss": float("nan")}])
    assert scripts.read_jsonl(path) == records
    assert contents(tmp_path).keys() == {"m.jsonl"}
