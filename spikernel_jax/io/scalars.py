"""Scalars for TensorBoard, of lines that tell of an epoch."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from spikernel_jax.io.voice import Moving

_SHOWN = ("train_loss", "train_accuracy", "validation_accuracy", "seconds")


@contextlib.contextmanager
def scalar_writer(folder: Path) -> Iterator[Callable[[Moving], None]]:
    """A function that writes an epoch's scalars, by the training's name, and passes other lines over.

    Args:
      folder: for events; made where it is not there. Events of other starts stay.

    Raises:
      ValueError: if the package that writes them is not installed.
      OSError: if the folder cannot be written.
    """
    try:
        # Not its SummaryWriter, whose queue holds events back: a killed run would lose its last epochs.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboardX.summary import scalar
    except ImportError:
        raise ValueError("--tensorboard needs tensorboardX: pip install 'spikernel-jax[tensorboard]'") from None
    folder.mkdir(parents=True, exist_ok=True)
    events = EventsWriter(str(folder / "events"))

    def write(line: Moving) -> None:
        if "epoch" not in line.fields:
            return
        training = line.fields.get("name", "training")
        for name in _SHOWN:
            if name in line.fields:
                value = scalar(f"{training}/{name}", line.fields[name])
                events.write_event(Event(wall_time=time.time(), step=line.fields["epoch"], summary=value))
        events.flush()

    try:
        yield write
    finally:
        events.close()
