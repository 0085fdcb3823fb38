"""Seals: what a file held when it was written and whose it is, checked before any parser sees its bytes.

A sealed JSON file carries its seal as a field; any other file has it beside it, in ``NAME.seal``. The owner, a text,
binds a file to its place: another run's file of the same name has another owner. A seal tells damage and mix-ups, not
forgery.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from spikernel_jax.io import files

_FIELD = "seal"


def write_json(path: Path, value: dict[str, Any], owner: str) -> None:
    """Writes a JSON object with its seal, atomically; ValueError where JSON cannot hold the value."""
    plain = files.as_json(value, str(path))
    files.write_json(path, plain | {_FIELD: _sum_of(plain, owner)})


def read_json(path: Path, owner: str, remedy: str) -> dict[str, Any]:
    """What `write_json` wrote, without the seal.

    Args:
      path: the file.
      owner: it must have been written for.
      remedy: what to do where it was not, for the error.

    Raises:
      ValueError: one line, if the file is missing, no JSON object, or not what was written for this owner.
    """
    value = files.read_json(path)
    if not isinstance(value, dict) or value.pop(_FIELD, None) != _sum_of(value, owner):
        raise ValueError(f"{path} is not as this run wrote it: {remedy}")
    return value


def _sum_of(value: Any, owner: str) -> str:
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(f"{owner}\n{text}".encode()).hexdigest()


def write(path: Path, content: bytes, owner: str) -> None:
    """Writes a file and its seal, so that the file there is a sealed one at every instant."""
    beside, new = _beside(path), _sum(content, owner)
    sums = files.read_json(beside) if beside.exists() and path.exists() else []
    # The earlier file is sealed until the new one has its place.
    files.write_json(beside, [*(sums if isinstance(sums, list) else []), new])
    with files.atomic_path(path) as temporary:
        temporary.write_bytes(content)
    files.write_json(beside, [new])


def read(path: Path, owner: str, remedy: str) -> bytes:
    """What `write` wrote; arguments and errors as `read_json`."""
    content, beside = path.read_bytes(), _beside(path)
    sums = files.read_json(beside) if beside.exists() else None
    if not isinstance(sums, list) or _sum(content, owner) not in sums:
        raise ValueError(f"{path} is not as this run wrote it: {remedy}")
    return content


def _sum(content: bytes, owner: str) -> str:
    return hashlib.sha256(owner.encode() + b"\n" + content).hexdigest()


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.seal")
