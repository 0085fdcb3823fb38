"""What a script says while it works: lines, one line that moves on, JSON for machines, or nothing.

Whoever works says a text; one that tells how far the work is says a `Moving` text, which is a text too, so that
whoever prints, or tests, need not know of it.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

from rich.console import Console
from rich.live import Live
from rich.text import Text

Manner = Literal["lines", "quiet", "json"]


class Moving(str):
    """A line of progress, whose place the next one may take.

    Attributes:
      fields: the same for machines: what JSON can hold, such as `left_seconds` or `best`.

    Example:
      >>> from spikernel_jax.io.voice import Moving
      >>> line = Moving("3 of 9 cells", done=3, of=9)
      >>> line.upper(), line.fields
      ('3 OF 9 CELLS', {'done': 3, 'of': 9})
    """

    fields: dict[str, Any]

    def __new__(cls, text: str, **fields: Any) -> "Moving":
        """Arguments: the line, and its fields."""
        line = super().__new__(cls, text)
        line.fields = fields
        return line


class Voice:
    """How one process says things on its standard output.

    With `manner` ``"lines"`` a terminal has the last `Moving` line at its foot, and all else above it for good; where
    there is no terminal each is a line. ``"json"`` prints an object a line: `time`, `text`, and a `Moving` line's
    fields. ``"quiet"`` prints neither.
    """

    def __init__(self, manner: Manner = "lines", hears: Callable[[Moving], None] | None = None):
        """Arguments: how to say things, and who hears `Moving` lines too."""
        self._manner: Manner = manner
        self._hears = hears
        self._live: Live | None = None

    def say(self, text: str) -> None:
        """Says a line at once; work goes on where nobody reads any more."""
        if self._hears and isinstance(text, Moving):
            self._hears(text)
        try:
            if self._manner == "json":
                fields = text.fields if isinstance(text, Moving) else {}
                now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
                print(json.dumps({"time": now, "text": text.strip()} | fields), flush=True)
            elif self._manner == "lines":
                self._line(f"{time.strftime('%H:%M:%S')}  {text}", moving=isinstance(text, Moving))
        except BrokenPipeError:
            print_to_nobody()

    def _line(self, line: str, *, moving: bool) -> None:
        if not sys.stdout.isatty() and self._live is None:
            print(line, flush=True)
        elif moving:
            if self._live is None:
                self._live = Live(console=Console(), auto_refresh=False, transient=True)
                self._live.start()
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
        else:
            self.end()
            print(line, flush=True)

    def end(self) -> None:
        """Takes the line at the foot away."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    @property
    def results(self) -> Console:
        """Where results are printed, which no manner keeps back; beside the lines of JSON, not among them."""
        self.end()
        return Console(stderr=self._manner == "json")


def print_to_nobody() -> None:
    """What is printed from here on is lost, as whoever read it has left."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
