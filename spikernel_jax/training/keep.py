"""What a training leaves on disk, epoch by epoch: states that it can go on from, and its metrics."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from spikernel_jax.io import files
from spikernel_jax.io.signals import StopRequest, stop_signals
from spikernel_jax.training.checkpoint import TrainingCheckpoints, training_checkpoints
from spikernel_jax.training.devices import to_all, to_one


class Keeper:
    """Keeps nothing: what a training without a folder has.

    Attributes:
      stop: whether a signal has asked to stop; None where nobody listens.
    """

    stop: StopRequest | None = None

    @property
    def last_saved(self) -> str:
        """The end of a message: what the folder still holds."""
        return ""

    def restore(self, state: Any, steps: int, total: int) -> Any:
        """The state to begin with: that of the folder, where it holds one, else the one given.

        Args:
          state: before the first step, on all devices.
          steps: of an epoch.
          total: steps of the whole training.
        """
        return state

    def log(self, record: dict[str, Any]) -> None:
        """Keeps an epoch's metrics; its state must follow."""

    def save(self, step: int, state: Any) -> None:
        """Keeps the state after a step, an epoch's last or one at which a signal asks to stop.

        Raises:
          StoppedError: a signal asked to stop; all is saved.
        """

    def logged(self, epochs: int) -> dict[str, Any]:
        """The metrics of the last of so many epochs; ValueError where the log does not have them."""
        return {}


class _InFolder(Keeper):
    """Keeps the newest two states in ``state/``, and a line of metrics an epoch in ``metrics.jsonl``."""

    def __init__(
        self,
        folder: Path,
        checkpoints: TrainingCheckpoints,
        stop: StopRequest,
        devices: jax.sharding.Mesh,
        say: Callable[[str], None],
    ):
        self._folder, self._checkpoints, self._devices, self._say = folder, checkpoints, devices, say
        self._log = folder / "metrics.jsonl"
        self.stop = stop

    @property
    def last_saved(self) -> str:
        last = self._checkpoints.last
        return f"; last checkpoint: {f'step {last}' if last else 'none'} in {self._folder}"

    def restore(self, state: Any, steps: int, total: int) -> Any:
        step, state = self._checkpoints.restore(to_one(state), self._say)
        if step < total:
            self._checkpoints.check_room(state)
        files.truncate_jsonl(self._log, lambda record: self._epoch(record) <= step // steps)
        return to_all(self._devices, state)

    def log(self, record: dict[str, Any]) -> None:
        files.append_jsonl(self._log, record)

    def save(self, step: int, state: Any) -> None:
        self._checkpoints.save(step, to_one(state))
        if self.stop:
            self.stop.check()

    def logged(self, epochs: int) -> dict[str, Any]:
        records = files.read_jsonl(self._log) if self._log.exists() else []
        if not records or self._epoch(records[-1]) != epochs:
            raise ValueError(
                f"{self._log} has no metrics of the last epoch, {epochs}: remove {self._folder} to train again"
            )
        return records[-1]

    def _epoch(self, record: dict[str, Any]) -> int:
        if not isinstance(epoch := record.get("epoch"), int):
            raise ValueError(f"{self._log} has a line without an epoch: remove {self._folder} to train again")
        return epoch


@contextlib.contextmanager
def kept(
    folder: Path | None, fingerprint: dict[str, Any], devices: jax.sharding.Mesh, say: Callable[[str], None]
) -> Iterator[Keeper]:
    """Opens what a training leaves in a folder, and holds the folder; None keeps nothing.

    Within the block, SIGTERM and SIGINT only ask to stop where there is a folder.

    Args:
      folder: of the training.
      fingerprint: JSON of all that the trained weights depend on.
      devices: that train.
      say: prints a line where a damaged checkpoint is passed over.

    Raises:
      ValueError: as `training_checkpoints`.
    """
    if folder is None:
        yield Keeper()
        return
    with training_checkpoints(folder / "state", fingerprint) as checkpoints, stop_signals() as stop:
        yield _InFolder(folder, checkpoints, stop, devices, say)
