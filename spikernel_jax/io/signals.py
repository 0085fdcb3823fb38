"""Long work that is told to stop: it saves where it is, and the same command goes on from there.

Batch systems send SIGTERM and, some time later, SIGKILL; Ctrl-C sends SIGINT.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StoppedError(Exception):
    """Work ended early because a signal asked for it, with all that it needs to go on saved.

    Not a ValueError: nothing is wrong.

    Attributes:
      exit_status: of the process, as shells count: 143 for SIGTERM, 130 for SIGINT.
    """

    def __init__(self, by: signal.Signals):
        """Names the signal and says how to go on."""
        super().__init__(f"stopped by {by.name} with all saved: run the same command again to go on from here")
        self.exit_status = 128 + by


class StopRequest:
    """Whether a signal has asked to stop."""

    def __init__(self) -> None:
        """Use `stop_signals`."""
        self._by: signal.Signals | None = None

    @property
    def requested(self) -> bool:
        """Whether to save and stop."""
        return self._by is not None

    def check(self) -> None:
        """Raises StoppedError if a stop is requested; to be called when all is saved."""
        if self._by is not None:
            raise StoppedError(self._by)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested:
            signal.default_int_handler(number, frame)
        self._by = self._by or signal.Signals(number)


@contextlib.contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Within the block, SIGTERM and SIGINT (Ctrl-C) only ask to stop; work looks at `requested` where it can save.

    SIGINT after either of them interrupts at once (KeyboardInterrupt). Python sees a signal once the call into
    JAX that is running returns; a compilation may take a minute. The handlers of before are restored at the end.
    Signals that the process ignores (as of a shell's background job) or that other than Python code handles are
    left alone. In another thread than the main one the block has no effect and nothing is ever requested.

    Yields:
      The request, for this block alone.

    Raises:
      StoppedError: at the end of a block that ended well with a stop requested, lest the request be lost; so all
        must be saved there.
    """
    request = StopRequest()
    earlier = {}
    if threading.current_thread() is threading.main_thread():
        there = {number: signal.getsignal(number) for number in _SIGNALS}
        earlier = {number: handler for number, handler in there.items() if handler not in (None, signal.SIG_IGN)}
    try:
        for number in earlier:
            signal.signal(number, request._receive)
        yield request
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
    request.check()
