"""What a training leaves on disk, epoch by epoch: states that it can go on from, and its metrics."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from spikernel_jax.io import files
from spikernel_jax.io.signals import StopRequest, stop_signals
from spikernel_jax.training.checkpoint import TrainingCheckpoints, last_records, training_checkpoints
from spikernel_jax.training.devices import to_all, to_one

_STATE = "state"


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
    """Keeps the newest two states in ``state/``, with the metrics of all epochs under their seal.

    ``metrics.jsonl``, a line an epoch, is for people: it is written anew from the state where it is torn or gone.
    """

    def __init__(
        self,
        folder: Path,
        checkpoints: TrainingCheckpoints,
        stop: StopRequest,
        devices: jax.sharding.Mesh,
        say: Callable[[str], None],
    ):
        self._folder, self._checkpoints, self._devices, self._say = folder, checkpoints, devices, say
        self._records: list[dict[str, Any]] = []
        self.stop = stop

    @property
    def last_saved(self) -> str:
        last = self._checkpoints.last
        return f"; last checkpoint: {f'step {last}' if last else 'none'} in {self._folder}"

    def restore(self, state: Any, steps: int, total: int) -> Any:
        step, state, self._records = self._checkpoints.restore(to_one(state), self._say)
        if step < total:
            self._checkpoints.check_room(state)
        self._write_log()
        return to_all(self._devices, state)

    def log(self, record: dict[str, Any]) -> None:
        self._records.append(record)

    def save(self, step: int, state: Any) -> None:
        self._checkpoints.save(step, to_one(state), self._records)
        self._write_log()
        if self.stop:
            self.stop.check()

    def _write_log(self) -> None:
        """Anew, for it is no more than a copy."""
        log = self._folder / "metrics.jsonl"
        if self._records or log.exists():
            files.write_jsonl(log, self._records)

    def logged(self, epochs: int) -> dict[str, Any]:
        if len(self._records) != epochs:
            raise ValueError(f"{self._folder} has no metrics of the last epoch, {epochs}: remove it to train again")
        return self._records[-1]


def epochs_of(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a training's epochs, as they were sealed with its newest state; errors as `last_records`."""
    return last_records(folder / _STATE)


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
    with training_checkpoints(folder / _STATE, fingerprint) as checkpoints, stop_signals() as stop:
        yield _InFolder(folder, checkpoints, stop, devices, say)
