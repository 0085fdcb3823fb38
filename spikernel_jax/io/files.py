"""Files that are whole or absent: atomic writes, JSON, JSON lines.

Files are written beside their place and then moved there: a process killed at any moment leaves the old file
or the new one. User errors are `ValueError`s of one line.
"""

import fcntl
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

_SHARED_SECONDS = 120.0  # how long the file systems of two hosts may differ


_UNTAKEN = "[]\\*?"  # the checkpoint library takes such a path for a pattern: it "saves", and nothing can be loaded


def usable(path: str | os.PathLike[str]) -> Path:
    """The path, if all that a run leaves can be written under it and read back.

    Raises:
      ValueError: one line, if it holds a character that checkpoints cannot have in their path, or is not UTF-8.
    """
    text = os.fspath(Path(path).absolute())
    if not text.isprintable() or any(0xD800 <= ord(letter) <= 0xDFFF for letter in text):
        raise ValueError(f"{os.fspath(path)!a}: the path must be printable text in UTF-8: choose another")
    if found := sorted({letter for letter in text if letter in _UNTAKEN}):
        raise ValueError(f"{path}: checkpoints cannot be kept in a path with {' '.join(found)}: choose another")
    return Path(path)


def one_line(error: BaseException) -> str:
    """The text of an error, folded into one line of at most about 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + " ..."


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path in the folder of `path`; what was written there then replaces `path` at once.

    When the body raises, the temporary file is removed and `path` stays as it was. A killed process leaves a
    file named `.<name>.<pid>-<random>.tmp`, which no reader looks at. The folder of `path` must exist.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:  # the bytes reach the disk before the name does
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yields the path of a folder to make; what was made there then replaces the folder `path`.

    When the body raises, `path` stays as it was. A killed process leaves a folder `.<name>.<random>.tmp`
    beside it; one killed between the two moves leaves the earlier folder in there, as `earlier`. The folder
    that holds `path` must exist.
    """
    path = Path(path)
    # A folder of its own, so that no name within it can be somebody else's.
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    fresh, earlier = scratch / "fresh", scratch / "earlier"
    try:
        yield fresh
        _sync(fresh)  # the bytes reach the disk before the name does
        replaces = os.path.lexists(path)
        if replaces:
            os.replace(path, earlier)
        try:
            os.replace(fresh, path)
        except BaseException:
            if replaces:
                os.replace(earlier, path)
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Waits until all that a folder holds is on the disk, as far as the system tells."""
    for parent, _, names in os.walk(folder):
        for path in [*(os.path.join(parent, name) for name in names), parent]:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


class HeldError(ValueError):
    """Another process holds a folder."""


@contextmanager
def lock(folder: Path, refusal: str) -> Iterator[None]:
    """Holds a folder until the block or the process ends, however; HeldError(refusal) if another holds it."""
    # The file stays: removing it would let a third process lock a new file beside a held old one.
    with open(folder / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HeldError(refusal) from None
        yield


def check_room(folder: str | os.PathLike[str], bytes_needed: int) -> None:
    """Finds out before long work whether its results can be written; makes the folder if absent.

    A small file is written, synced and renamed there, and removed. What this cannot know: what other processes
    write meanwhile, quotas (of which the free space of the file system tells nothing), how much of its space
    a file system that compresses, copies on write or makes room late really has, and faults to come.

    Args:
      folder: where the results will be.
      bytes_needed: how much they will take.

    Raises:
      ValueError: one line naming the folder, the bytes needed and the bytes free: it cannot be made or written
        to, or there is too little space. A folder that was absent stays so for want of space.
    """
    folder = Path(folder)
    needs = f"{folder} needs {bytes_needed} bytes"
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    try:
        free = shutil.disk_usage(there).free
        if free < bytes_needed:
            raise ValueError(f"{needs}, but {free} are free there: make room or choose another folder")
        needs += f" ({free} are free)"
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".room.", suffix=".tmp", dir=folder))
        try:
            with open(scratch / "written", "wb") as file:
                file.write(bytes(4096))
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch / "written", scratch / "renamed")
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise ValueError(f"{needs}, but cannot be written to ({error}): choose another folder") from None


def await_file(path: Path, wanted: Callable[[bytes], bool]) -> None:
    """Waits until a file that another process wrote is seen here; a network's file system takes its time."""
    end = time.monotonic() + _SHARED_SECONDS
    while not (path.exists() and wanted(path.read_bytes())):
        if time.monotonic() > end:
            raise ValueError(
                f"{path}, as the first process wrote it, is not seen here after {_SHARED_SECONDS:.0f} s: "
                "--out must name the same folder for all processes, on a file system that they share"
            )
        time.sleep(0.1)


def read_json(path: Path) -> Any:
    """What a JSON file holds; ValueError if it is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged, not JSON ({one_line(error)})") from None


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, atomically; ValueError where JSON cannot hold the value."""
    value = as_json(value, str(path))
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def as_json(value: Any, what: str) -> Any:
    """`value` as JSON gives it back; ValueError where JSON cannot hold it."""

    def plain(item: Any) -> Any:
        if isinstance(item, os.PathLike):
            return os.fspath(item)
        if isinstance(item, np.generic):
            return item.item()
        raise TypeError(f"a value of type {type(item).__name__}")

    try:
        return json.loads(json.dumps(value, default=plain, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"JSON cannot hold {what}: {one_line(error)}") from None


def differences(there: Any, here: Any, name: str = "") -> list[str]:
    """One phrase for each field in which two JSON values differ, fields of nested objects by dotted names."""
    if isinstance(there, dict) and isinstance(here, dict):
        found = []
        for key in [*there, *(key for key in here if key not in there)]:
            inner = f"{name}.{key}" if name else key
            if key in there and key in here:
                found += differences(there[key], here[key], inner)
            else:
                values = [json.dumps(side[key]) if key in side else "absent" for side in (there, here)]
                found.append(f"{inner}: {values[0]} there, {values[1]} here")
        return found
    return [] if there == here else [f"{name}: {json.dumps(there)} there, {json.dumps(here)} here"]


def write_jsonl(path: str | Path, records: Sequence[dict[str, Any]]) -> None:
    """Writes a file of JSON lines, atomically; ValueError if JSON cannot hold a record (NaN, infinities)."""
    lines = [json.dumps(as_json(record, f"a record of {path}")) for record in records]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
