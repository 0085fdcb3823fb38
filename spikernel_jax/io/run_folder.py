"""A run's folder: what was asked for, on what it ran, and every result, each file whole or absent.

Layout of a folder::

    config.json     {"config": ..., "environment": ..., "resumed": [...]}
    summary.json    a few numbers of the run, merged in as they become known
    tables/*.parquet, figures/*.png, finalists/...
    report.md       the page that `spikernel_jax.report.pages.write_report` makes

User errors are `ValueError`s of one line.
"""

import hashlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import polars as pl

from spikernel_jax.io import files

_PARQUET_MAGIC = b"PAR1"
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


@dataclass(frozen=True)
class RunFolder:
    """One run's folder, made by `create` or `open`; `config` is as JSON holds it (lists, no tuples)."""

    path: Path
    config: dict[str, Any]

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
        path, config = Path(path), files.as_json(config, "the configuration")
        _earlier_run(path, config)
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path, config)
        with run.lock():
            # Looked at again: another process may have made the folder its own before we held the lock.
            record = _earlier_run(path, config)
            if record is None:
                record = {"config": config, "environment": environment()}
            else:
                record["resumed"] = [*record.get("resumed", []), environment()]
            run.write_json("config.json", record)
        return run

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """Opens the folder of an earlier step; ValueError if it is absent, damaged or no run's."""
        path = Path(path)
        if not path.is_dir():
            raise ValueError(f"{path} is not a folder: give --out the folder of an earlier run")
        if not (path / "config.json").exists():
            raise ValueError(f"{path} is not a run's folder: it has no config.json")
        return cls(path, _read_record(path)["config"])

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
        _earlier_run(path, config)
        return cls(path, config)

    def folder(self, name: Literal["figures", "tables", "finalists", "scores", "timing"]) -> Path:
        """A folder within this one, made when first asked for."""
        folder = self.path / name
        folder.mkdir(exist_ok=True)
        return folder

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder until the block or the process ends, however; ValueError if another holds it."""
        with files.lock(self.path, f"another process is using this run folder: {self.path}"):
            yield

    def write_json(self, name: str, value: Any) -> None:
        """Writes a file of the folder, atomically; ValueError for what JSON cannot hold (NaN, infinities)."""
        files.write_json(self.path / name, value)

    def read_json(self, name: str) -> Any:
        """Reads a file of the folder; ValueError if it is missing or is not JSON."""
        return files.read_json(self.path / name)

    def update_summary(self, **fields: Any) -> None:
        """Merges `fields` into summary.json, atomically; the dictionary `seconds` is merged key by key."""
        path = self.path / "summary.json"
        summary = files.read_json(path) if path.exists() else {}
        if "seconds" in fields:
            fields["seconds"] = {**summary.get("seconds", {}), **fields["seconds"]}
        files.write_json(path, {**summary, **fields})

    def write_table(self, name: str, table: "pl.DataFrame") -> None:
        """Writes a table to `tables/<name>.parquet`, atomically."""
        with files.atomic_path(self.folder("tables") / f"{name}.parquet") as temporary:
            table.write_parquet(temporary)

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
        try:
            # Read from memory: a mapped file that is later replaced or cut would take the process with it.
            content = path.read_bytes()
            # Looked at first: of a cut file polars prints a panic on stderr before it raises.
            if not (content.startswith(_PARQUET_MAGIC) and content.endswith(_PARQUET_MAGIC)):
                raise ValueError("not a whole Parquet file")
            table = pl.read_parquet(content)
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, ValueError) as error:
            reason = files.one_line(error)
            raise ValueError(f"{path} is damaged ({reason}): delete it and run {made_by} again") from None
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
    record = files.read_json(path / "config.json")
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise ValueError(f"{path / 'config.json'} holds no configuration: remove the folder and run again")
    return record
