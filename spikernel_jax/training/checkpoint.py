"""Checkpoints through orbax: finished models, and the states of a training run.

A checkpoint is written and sealed beside its place and then moved there, so it is there whole or not at all;
its seal, the SHA-256 of every file, tells later damage.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
from flax import serialization

from spikernel_jax.io import files
from spikernel_jax.snn import network
from spikernel_jax.snn.model import Model, hashable
from spikernel_jax.snn.spec import NetworkSpec, spec_from_json, spec_to_json

_FORMAT = "spikernel_jax model, 1"
_SUMS = "sha256.json"
_METADATA = "_CHECKPOINT_METADATA"  # where orbax keeps custom metadata
_COMMITTED = "commit_success.txt"  # where orbax says that all is there, and in which folder of the machine
_PACKED = "state.msgpack"
_KEPT = 2  # training checkpoints
_OTHER_BYTES = 1 << 20  # what orbax writes of a state besides its arrays, generously


@contextlib.contextmanager
def _orbax() -> Iterator[Any]:
    """The library; of several processes this one reads by itself, and waits for no other."""
    from orbax.checkpoint import v1  # takes longer to import than all the rest of the package

    if jax.process_count() == 1:
        yield v1
        return
    index = jax.process_index()
    alone = v1.Context()
    alone.multiprocessing.primary_host = index
    alone.multiprocessing.active_processes = {index}
    alone.multiprocessing.barrier_sync_key_prefix = f"process{index}"
    with alone:
        yield v1


def _write(folder: Path, tree: Any, metadata: dict[str, Any]) -> None:
    """Makes a folder of arrays and what JSON can hold."""
    if jax.process_count() == 1:
        with _orbax() as ocp:
            ocp.save(folder, tree, custom_metadata=metadata)
        for file in folder.glob(_COMMITTED):
            file.write_text("Checkpoint commit was successful\n")  # it may leave the machine
        return
    # Orbax (0.12) saves what one process of several holds only together with all others.
    folder.mkdir(exist_ok=True)
    (folder / _PACKED).write_bytes(serialization.to_bytes(jax.device_get(tree)))
    (folder / _METADATA).write_text(json.dumps({"custom_metadata": metadata}))


def _metadata(folder: Path) -> Any:
    """What `_write` was given besides arrays."""
    return json.loads((folder / _METADATA).read_bytes())["custom_metadata"]


def _read(folder: Path, like: Any) -> Any:
    """The arrays of `_write`, of the shapes and dtypes of a tree."""
    if (folder / _PACKED).exists():
        tree = serialization.from_bytes(like, (folder / _PACKED).read_bytes())
        chex.assert_trees_all_equal_shapes_and_dtypes(tree, like)
        return tree
    with _orbax() as ocp:
        return ocp.load(folder, _abstract(like))


def _abstract(tree: Any) -> Any:
    """Shapes, dtypes and one device, so that orbax needs no sharding file of another machine."""
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def _sums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a checkpoint, by its path there."""
    there = sorted(path for path in folder.rglob("*") if path.name != _SUMS)
    for path in there:  # a link leads out of the seal, and to read a pipe may never end
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path.relative_to(folder)} is no file of its own")
    sums = ((path, hashlib.sha256(path.read_bytes()).hexdigest()) for path in there if path.is_file())
    return {str(path.relative_to(folder)): digest for path, digest in sums}


def _seal(folder: Path) -> None:
    """Writes down what a checkpoint's files hold."""
    with files.atomic_path(folder / _SUMS) as temporary:
        temporary.write_text(json.dumps(_sums(folder), indent=1))


def _check_seal(folder: Path) -> None:
    """Raises ValueError if a file differs from what was saved, is missing or new, or nothing tells what was saved.

    Orbax would notice most damage, but with thousands of lines on stderr, and not a changed bit in an array.
    """
    written, there = files.read_json(folder / _SUMS), _sums(folder)
    if not isinstance(written, dict):
        raise ValueError(f"{_SUMS} is damaged")
    for name in sorted(written.keys() | there.keys()):
        if written.get(name) != there.get(name):
            raise ValueError(f"{name} is {'damaged' if name in written and name in there else 'missing or new'}")


def _is_model(folder: Path) -> bool:
    """Whether a folder holds an exported model, by what it says of itself; orbax would log of one that does not."""
    try:
        return _metadata(folder)["format"] == _FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def save_model(path: str | os.PathLike[str], model: Model) -> None:
    """Exports a finished model: one orbax checkpoint with its genotype, specification and metrics.

    An earlier export at the same path is replaced only once the new one is whole.

    Args:
      path: folder to make, an empty one, or one that holds an earlier export.
      model: the model.

    Raises:
      ValueError: something else is at `path`; it stays as it was.

    Example:
      >>> import jax
      >>> from spikernel_jax import CellSpace, Model, NetworkSpec, load_model, save_model
      >>> from spikernel_jax.snn import network
      >>> spec = NetworkSpec((8, 8, 1), 2, CellSpace((3,)), channels=2, time_steps=1)
      >>> cell = tuple(spec.space.parse("0>3:skip").tolist())
      >>> save_model("model", Model(spec, cell, *network.init(jax.random.key(0), spec, cell), (0.5,), (0.3,)))
      >>> load_model("model").text
      '0001 0000 0000 0000'
    """
    target = files.usable(path).absolute()
    if os.path.lexists(target):
        empty = target.is_dir() and not any(target.iterdir())
        if not (empty or _is_model(target)):
            raise ValueError(f"{path} is there and is no exported model: choose another path or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    metadata = {
        "format": _FORMAT,
        "spec": spec_to_json(model.spec),
        "genotype": np.asarray(model.genotype).tolist(),
        "notation": model.text,
        "mean": list(model.mean),
        "std": list(model.std),
        "metrics": model.metrics,
    }
    arrays = {"params": model.params, "stats": model.stats}
    with files.atomic_folder(target) as fresh:
        _write(fresh, arrays, metadata)
        _seal(fresh)
        back = _read(fresh, arrays)  # the library may say that it saved, and have saved nothing
        if not all(map(np.array_equal, jax.tree.leaves(back), jax.tree.leaves(arrays))):
            raise OSError(f"{path}: what was saved is not what was to be saved")


def load_model(path: str | os.PathLike[str]) -> Model:
    """Loads an exported model; call it on images to get logits.

    Args:
      path: the checkpoint folder.

    Returns:
      The model.

    Raises:
      ValueError: one line, if there is none, or it is truncated, corrupt, or of another format.

    Example:
      >>> from spikernel_jax import load_model
      >>> load_model("absent")
      Traceback (most recent call last):
          ...
      ValueError: absent: no such model folder
    """
    folder = Path(path).absolute()
    if not folder.is_dir():
        raise ValueError(f"{path}: no such model folder")
    try:
        _check_seal(folder)
        metadata = _metadata(folder)
        if not isinstance(metadata, dict) or metadata.get("format") != _FORMAT:
            raise ValueError("it is not an exported model")
        spec = spec_from_json(metadata["spec"])
        genotype = hashable(np.asarray(metadata["genotype"], np.int8))
        abstract = jax.eval_shape(lambda: network.init(jax.random.key(0), spec, genotype))
        mean, std, metrics = (metadata[name] for name in ("mean", "std", "metrics"))
        _check_normalisation(spec, mean, std)
        if not isinstance(metrics, dict):
            raise ValueError(f"metrics={metrics!r} must be an object")
        arrays = _read(folder, {"params": abstract[0], "stats": abstract[1]})
    except Exception as error:  # orbax raises many types, with messages of many lines
        raise ValueError(f"{path}: the model cannot be loaded: {files.one_line(error)}") from None
    return Model(spec, genotype, arrays["params"], arrays["stats"], tuple(mean), tuple(std), metrics)


def _check_normalisation(spec: NetworkSpec, mean: Any, std: Any) -> None:
    channels = spec.image_shape[2]
    for name, values in (("mean", mean), ("std", std)):
        finite = isinstance(values, list) and all(isinstance(v, int | float) and math.isfinite(v) for v in values)
        if not finite or len(values) != channels or (name == "std" and min(values) <= 0):
            raise ValueError(f"{name}={values!r} must be {channels} finite numbers{' above 0' * (name == 'std')}")


def _steps_in(folder: Path) -> list[int]:
    """Steps of the checkpoints that are there, newest first."""
    return sorted((int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal()), reverse=True)


class TrainingCheckpoints:
    """The newest two states of one training run, with the fingerprint of all that its result depends on.

    A state is known by its step: any counter that grows while training, of batches or of epochs.
    """

    def __init__(self, path: Path, fingerprint: dict[str, Any]):
        """Use `training_checkpoints`."""
        self._path, self._fingerprint = path, fingerprint
        self._good: list[int] | None = None  # steps to keep, at most two, ascending; None before `restore`

    @property
    def last(self) -> int | None:
        """The step that was last saved or restored; None where there is none."""
        return self._good[-1] if self._good else None

    def _steps(self) -> list[int]:
        return _steps_in(self._path)

    def _drop_but(self, kept: list[int]) -> None:
        for step in self._steps():
            if step not in kept:
                doomed = self._path / f".{step}.old.tmp"
                shutil.rmtree(doomed, ignore_errors=True)
                os.replace(self._path / str(step), doomed)  # at once: half a checkpoint must not keep its name
                shutil.rmtree(doomed, ignore_errors=True)

    def check_room(self, state: Any) -> None:
        """Looks whether there is room for all that `save` will write of such a state; call it before training.

        Raises:
          ValueError: as `files.check_room`.
        """
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + _OTHER_BYTES
        missing = max(_KEPT + 1 - len(self._steps()), 1)  # a third one is there while it is written
        files.check_room(self._path, missing * size)

    def save(self, step: int, state: Any, records: Sequence[dict[str, Any]] = ()) -> None:
        """Saves the state after a step and keeps the one before it; returns when both are on disk.

        `records`, what is known of the epochs so far, are kept with it under its seal.

        Checkpoints that `restore` passed over, damaged or older, are removed.

        Raises:
          ValueError: the step is negative or before the last, or the folder holds checkpoints and nothing was
            restored.
          OSError: one line, if the checkpoint cannot be written; those before it stay.
        """
        if self._good is None:
            if self._steps():
                raise ValueError(f"{self._path} holds checkpoints: restore before saving step {step}")
            self._good = []
        if step < max(self._good, default=0):
            raise ValueError(f"step={step} must not be before the last one saved, {max(self._good, default=0)}")
        self._drop_but(self._good)  # before writing, for the room they take
        kept = {"fingerprint": self._fingerprint, "records": list(records)}
        try:
            with files.atomic_folder(self._path / str(step)) as fresh:
                _write(fresh, state, kept)
                _seal(fresh)
        except Exception as error:  # orbax raises many types, with messages of many lines
            reason = files.one_line(error)
            raise OSError(f"{self._path}: the checkpoint of step {step} cannot be written ({reason})") from None
        self._good = [*[kept for kept in self._good if kept < step][1 - _KEPT :], step]
        self._drop_but(self._good)

    def restore(self, like: Any, say: Callable[[str], None] = lambda _: None) -> tuple[int, Any, list[dict[str, Any]]]:
        """The newest state that is not damaged, its step before it and its records behind it.

        Where there is no checkpoint, (0, `like`, []).

        Args:
          like: a state of the same shapes and dtypes.
          say: prints a line if a newer checkpoint is damaged.

        Raises:
          ValueError: one line, if the checkpoints are of another run, or none can be read; they stay as they were.
        """
        steps = self._steps()
        damaged: list[str] = []
        for index, step in enumerate(steps):
            try:
                _check_seal(self._path / str(step))
            except (ValueError, OSError) as error:
                damaged.append(f"the checkpoint of step {step} is damaged ({files.one_line(error)})")
                continue
            state, records = self._load(step, like)
            if damaged:
                say(f"{self._path}: {', '.join(damaged)}: going on from step {step}")
            self._good = steps[index : index + _KEPT][::-1]
            return step, state, records
        if damaged:
            raise self._unreadable(", ".join(damaged))
        self._good = []
        return 0, like, []

    def _load(self, step: int, like: Any) -> tuple[Any, list[dict[str, Any]]]:
        """State and records of a checkpoint whose files are as they were saved, so what fails here is no damage."""
        folder = self._path / str(step)
        try:
            kept = _metadata(folder)
            there, records = kept["fingerprint"], kept["records"]
            differing = sorted(
                key for key in there.keys() | self._fingerprint.keys()
                if there.get(key) != self._fingerprint.get(key)
            )  # fmt: skip
            state = None if differing else _read(folder, like)
        except Exception as error:
            raise self._unreadable(f"step {step}: {files.one_line(error)}") from None
        if differing:
            raise ValueError(
                f"{self._path} holds another training run ({', '.join(differing)} differ): "
                "remove it or choose another folder"
            )
        return state, records

    def _unreadable(self, reason: str) -> ValueError:
        return ValueError(
            f"{self._path}: the training checkpoint cannot be read ({reason}); remove that folder to train again"
        )


def last_records(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Records of the newest undamaged state of a folder of training checkpoints; none where there is no state.

    Raises:
      ValueError: one line, if all states are damaged.
    """
    folder = Path(path).absolute()
    steps = _steps_in(folder) if folder.is_dir() else []
    for step in steps:
        with contextlib.suppress(ValueError, OSError):
            _check_seal(folder / str(step))
            return _metadata(folder / str(step))["records"]
    if steps:
        raise ValueError(f"{path}: the training checkpoints are damaged: remove that folder to train again")
    return []


@contextlib.contextmanager
def training_checkpoints(path: str | os.PathLike[str], fingerprint: dict[str, Any]) -> Iterator[TrainingCheckpoints]:
    """Opens the training checkpoints of a folder, and holds the folder while they are open.

    Layout: ``STEP/`` for the newest two, each one orbax checkpoint and ``sha256.json``.

    Args:
      path: folder, made if absent.
      fingerprint: JSON of all that the trained weights depend on.

    Raises:
      ValueError: one line, if the folder cannot be made or written to, or another process trains in it.
    """
    folder = files.usable(path).absolute()
    files.check_room(folder, 0)
    with files.lock(folder, f"another process is training in {folder}"):
        for stale in folder.glob(".*.tmp"):  # of a killed process
            shutil.rmtree(stale, ignore_errors=True)
        yield TrainingCheckpoints(folder, fingerprint)
