"""A run's folder: what was asked for, on what it ran, and every result, each file whole or absent.

Layout of a folder::

    config.json     {"config": ..., "id": ..., "environment": ..., "resumed": [...]}
    summary.json    a few numbers of the run, merged in as they become known
    tables/*.parquet, each with its seal beside it; figures/*.png, *.pdf; finalists/...
    report.md       the page that `spikernel_jax.report.pages.write_report` makes

What a later step reads is sealed (`spikernel_jax.io.seal`) and bound to this run by its `id`. User errors are
`ValueError`s of one line.
"""

import hashlib
import io
import os
import platform
import re
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import polars as pl

from spikernel_jax.io import files, seal

_RECORD = "config.json"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "spyx", "numpy")


def environment() -> dict[str, Any]:
    """Describes what a run ran on: versions, devices, commit, command line and time.

    Looking at the devices starts JAX's backend. `git` is None when the package does not lie in a checkout of
    its own; its `dirty` tells whether a Python or TOML file there differs from the commit or is not in it.
    """
    import jax

    devices = jax.devices()
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "versions": versions,
        "device": {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)},
        "processes": jax.process_count(),
        "git": _git_state(Path(__file__).resolve().parents[2]),
        "command": list(sys.argv),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def commit_text(environment: Mapping[str, Any]) -> str:
    """The commit that an `environment` ran at, in short."""
    git = environment["git"]
    return git["commit"][:12] + " with changes" * git["dirty"] if git else "unknown"


def _git_state(root: Path) -> dict[str, Any] | None:
    """Commit and cleanliness of the checkout whose top is `root`; None without git or without one."""

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        # An installed package may lie inside somebody else's repository, whose commit says nothing about us.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "-uall", "--", "*.py", "*.toml")
        return {"commit": commit, "dirty": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return None


FolderName = Literal["figures", "tables", "finalists", "scores", "search", "timing", "cells", "tuning"]


@dataclass(frozen=True)
class RunFolder:
    """One run's folder, made by `create` or `open`; `config` is as JSON holds it (lists, no tuples), `id` its own."""

    path: Path
    config: dict[str, Any]
    id: str

    @classmethod
    def create(cls, path: str | Path, config: dict[str, Any]) -> "RunFolder":
        """Makes a run's folder, or opens it again to continue the run with an equal configuration.

        The environment of the first run is kept; each later one is appended to `resumed`. The folder is not
        locked afterwards: hold `lock()` while writing to it.

        Args:
          path: the folder.
          config: what was asked for; values that JSON can hold, paths and NumPy scalars included.

        Raises:
          ValueError: the folder holds another configuration's run or something else, or is in use; it stays
            as it was.
        """
        path, config = files.usable(path), files.as_json(config, "the configuration")
        _earlier_run(path, config)
        path.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            # Looked at again: another process may have made the folder its own before we held the lock.
            record = _earlier_run(path, config)
            if record is None:
                record = {"config": config, "id": secrets.token_hex(16), "environment": environment(), "resumed": []}
            else:
                record["resumed"] += [environment()]
            seal.write_json(path / _RECORD, record, _RECORD)
        return cls(path, config, record["id"])

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """Opens the folder of an earlier step; ValueError if it is absent, damaged or no run's."""
        path = Path(path)
        if not path.is_dir():
            raise ValueError(f"{path} is not a folder: give --out the folder of an earlier run")
        if not (path / "config.json").exists():
            raise ValueError(f"{path} is not a run's folder: it has no config.json")
        record = _read_record(path)
        return cls(path, record["config"], record["id"])

    def state(self) -> str:
        """A digest of the record of all starts of this run: no two starts have the same."""
        return hashlib.sha256((self.path / "config.json").read_bytes()).hexdigest()

    @classmethod
    def join(cls, path: str | Path, config: dict[str, Any], state: str) -> "RunFolder":
        """Opens a run's folder that another process has just made or continued, and writes nothing.

        Args:
          path: the folder.
          config: what was asked for, as in `create`.
          state: the other process's `state()`.

        Raises:
          ValueError: it is not seen here in two minutes, or holds another configuration.
        """
        path, config = Path(path), files.as_json(config, "the configuration")
        files.await_file(path / "config.json", lambda content: hashlib.sha256(content).hexdigest() == state)
        record = _earlier_run(path, config)
        assert record  # it was just seen
        return cls(path, config, record["id"])

    def folder(self, name: FolderName) -> Path:
        """A folder within this one, made when first asked for."""
        folder = self.path / name
        folder.mkdir(exist_ok=True)
        return folder

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder until the block or the process ends, however; ValueError if another holds it."""
        with _locked(self.path):
            yield

    def record(self) -> dict[str, Any]:
        """What ran, on what, and when: `config`, `id`, `environment` of the first start, `resumed` of later ones."""
        return _read_record(self.path)

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Writes a sealed file of the folder, atomically; ValueError for what JSON cannot hold (NaN, infinities)."""
        seal.write_json(self.path / name, value, f"{self.id}/{name}")

    def read_json(self, name: str) -> dict[str, Any]:
        """Reads a file of the folder; ValueError if it is missing, or not as this run wrote it."""
        path = self.path / name
        return seal.read_json(path, f"{self.id}/{name}", f"restore it, or remove {path.name} to have it made anew")

    def summary(self) -> dict[str, Any]:
        """What summary.json holds; empty where there is none yet."""
        return self.read_json("summary.json") if (self.path / "summary.json").exists() else {}

    def update_summary(self, **fields: Any) -> None:
        """Merges `fields` into summary.json, atomically; the dictionary `seconds` is merged key by key."""
        summary = self.summary()
        if "seconds" in fields:
            fields["seconds"] = {**summary.get("seconds", {}), **fields["seconds"]}
        self.write_json("summary.json", {**summary, **fields})

    def write_table(self, name: str, table: "pl.DataFrame", about: Mapping[str, str] | None = None) -> None:
        """Writes a table to `tables/<name>.parquet`, atomically, and its seal beside it.

        Args:
          name: of the table.
          table: itself.
          about: texts by name that the file carries with it.
        """
        content = io.BytesIO()
        table.write_parquet(content, metadata=None if about is None else dict(about))
        seal.write(self.folder("tables") / f"{name}.parquet", content.getvalue(), f"{self.id}/{name}")

    def read_table(self, name: str, made_by: str, columns: Sequence[str] = ()) -> "pl.DataFrame":
        """Reads `tables/<name>.parquet`.

        Args:
          name: of the table.
          made_by: the script that writes it, as a path; errors say to run it.
          columns: names that the table must have; it may have more.

        Raises:
          ValueError: the file is missing or damaged, or lacks a column.
        """
        import polars as pl

        path = self.path / "tables" / f"{name}.parquet"
        if not path.exists():
            raise ValueError(f"{path} is missing: run {made_by} --out {self.path} first")
        # Checked before it is parsed: of some damage the reader makes a wrong table, of some it ends the process.
        content = seal.read(path, f"{self.id}/{name}", f"delete it and run {made_by} again")
        table = pl.read_parquet(content)
        if missing := [column for column in columns if column not in table.columns]:
            lacks = f"{path} lacks the column {', '.join(map(repr, missing))}"
            raise ValueError(f"{lacks}: delete it and run {made_by} again")
        return table


def _earlier_run(path: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """What config.json of `path` holds, None for a new run; ValueError where `config` must not run."""
    if not path.exists():
        return None
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder: choose another --out")
    if not (path / "config.json").exists():
        # A process killed while it made the folder leaves these two kinds of file, and no others.
        ours = re.compile(r"\.lock|\.config\.json\..*\.tmp")
        if not all(ours.fullmatch(entry.name) for entry in path.iterdir()):
            raise ValueError(f"{path} is not empty and has no config.json, so no run's: choose another --out")
        return None
    record = _read_record(path)
    if differing := files.differences(record["config"], config):
        raise ValueError(
            f"{path} holds a run of another configuration ({'; '.join(differing)}): "
            "choose another --out or remove the folder"
        )
    return record


def _read_record(path: Path) -> dict[str, Any]:
    remedy = "restore it, or remove the folder and run again"
    return seal.read_json(path / _RECORD, _RECORD, remedy)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with files.lock(path, f"another process is using this run folder: {path}"):
        yield
