"""Results of a long computation, piece by piece in a folder."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spikernel_jax.io.files import as_json, atomic_path, await_file, differences, one_line, read_json, write_json

_SUM = "sha256"  # name of the array that holds the sum of a piece's others


def _arrays_digest(owner: str, arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of arrays: whose they are, names, types, shapes and contents."""
    digest = hashlib.sha256(owner.encode())
    for name in sorted(arrays):
        digest.update(repr((name, arrays[name].dtype.str, arrays[name].shape)).encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


class ResultStore:
    """Results of a long computation, piece by piece, in a folder.

    A piece is there whole or not at all, so a computation that was killed goes on with those not `done()`.
    The fingerprint holds all that the results depend on; pieces of two computations never mix. Several
    processes may save at a time, on several hosts; of two that save the same piece one is kept, whole.
    """

    def __init__(self, folder: str | Path, fingerprint: dict[str, Any]):
        """Opens a folder of results or makes it; ValueError if its pieces have another fingerprint or none."""
        self.folder = Path(folder)
        fingerprint = as_json(fingerprint, f"the fingerprint of {folder}")
        self.folder.mkdir(exist_ok=True)
        path = self.folder / "fingerprint.json"
        if path.exists():
            if differing := differences(read_json(path), fingerprint):
                raise ValueError(
                    f"{self.folder} holds results of another computation ({'; '.join(differing)}): "
                    "remove it or choose another --out"
                )
        elif self.done():
            raise ValueError(f"{self.folder} has no fingerprint.json: remove it or choose another --out")
        else:
            write_json(path, fingerprint)
        self._whose = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()

    def _owner(self, index: int) -> str:
        """Binds a piece to this computation and to its place in it."""
        return f"{self._whose}/{index}"

    @classmethod
    def join(cls, folder: str | Path, fingerprint: dict[str, Any]) -> "ResultStore":
        """Opens a folder of results that another process has made; ValueError if it is not seen in two minutes."""
        await_file(Path(folder) / "fingerprint.json", lambda _: True)
        return cls(folder, fingerprint)

    def sweep(self) -> None:
        """Removes what killed processes left half written; to be called while no other process saves."""
        for stale in self.folder.glob(".chunk-*.tmp"):
            stale.unlink(missing_ok=True)

    def _path(self, index: int) -> Path:
        return self.folder / f"chunk-{index:06d}.npz"

    def done(self) -> set[int]:
        """Indices of the pieces that are there."""
        names = (re.fullmatch(r"chunk-(\d{6,})\.npz", entry.name) for entry in self.folder.iterdir())
        return {int(name[1]) for name in names if name}

    def save(self, index: int, /, **arrays: Any) -> None:
        """Writes one piece, atomically.

        Raises:
          ValueError: the index is negative, a name is reserved (`sha256`, or by `numpy.savez`), or its format
            cannot hold an array's type (objects, bfloat16).
        """
        if index < 0:
            raise ValueError(f"a piece's index is 0 or more, got {index}")
        values = {name: np.asarray(array) for name, array in arrays.items()}
        for name, value in values.items():
            # Objects would be pickled, and bfloat16 would come back as two bytes of no type.
            if name in (_SUM, "file", "allow_pickle") or value.dtype.kind in "OV":
                raise ValueError(f"cannot store array {name!r} of type {value.dtype}: rename or convert it")
        # The sum goes first: damage to an entry of the archive's directory can hide those that follow it.
        values = {_SUM: np.asarray(_arrays_digest(self._owner(index), values)), **values}
        with atomic_path(self._path(index)) as temporary, open(temporary, "wb") as file:
            np.savez(file, allow_pickle=False, **values)

    def load(self, index: int) -> dict[str, np.ndarray]:
        """Reads one piece; ValueError if it is missing, damaged, or another computation's or index's."""
        path = self._path(index)
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            # The archive's own sums miss damage to an array's header that makes it shorter.
            if str(arrays.pop(_SUM, None)) != _arrays_digest(self._owner(index), arrays):
                raise ValueError("its arrays are not what was saved here")
            return arrays
        except FileNotFoundError:
            raise ValueError(f"{path} is missing: piece {index} has not been computed") from None
        except Exception as error:  # of damaged archives come many types, NotImplementedError among them
            reason = one_line(error)
            raise ValueError(f"{path} is damaged ({reason}): delete it to have it computed again") from None
