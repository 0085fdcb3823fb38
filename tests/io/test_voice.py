"""What is printed while a script works: lines, a line that moves, JSON, nothing."""

import json
import re
import sys

import pytest
from tensorboardX.proto import event_pb2

from spikernel_jax.io.scalars import scalar_writer
from spikernel_jax.io.voice import Moving, Voice
from spikernel_jax.pipeline import cli


class Terminal:
    """A standard output that is a terminal, and what was written to it."""

    encoding = "utf-8"

    def __init__(self):
        self.written = ""

    def write(self, text: str) -> int:
        self.written += text
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True


def shown(written: str) -> list[str]:
    """Lines that a terminal shows in the end: what follows "erase the line" is written in its place."""
    lines, at = [""], 0
    for part in re.split(r"(\x1b\[\d*[A-Za-z]|\x1b\[\?25[lh]|\r|\n)", written):
        if part == "\n":
            at += 1
            lines += [""] * (at == len(lines))
        elif part == "\x1b[2K":
            lines[at] = ""
        elif part == "\x1b[1A":
            at -= 1
        elif not part.startswith("\x1b") and part != "\r":
            lines[at] += part
    return [line for line in lines if line]


def test_where_there_is_no_terminal_all_are_lines(capsys):
    voice = Voice()
    voice.say("step 1")
    voice.say(Moving("  1 of 2", done=1))
    voice.say(Moving("  2 of 2", done=2))
    voice.end()
    assert [line[10:] for line in capsys.readouterr().out.splitlines()] == ["step 1", "  1 of 2", "  2 of 2"]


def terminal_of(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal of 60 columns in the place of standard output."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return terminal


def test_a_result_takes_the_place_of_the_line_that_led_to_it(monkeypatch):
    """A script gives the work as the result's argument: the line moves while that is worked out."""
    terminal = terminal_of(monkeypatch)

    def work() -> str:
        for number in range(3):
            cli.say(Moving(f"  {number} of 2"))
        return "found"

    cli.present(work())
    assert shown(terminal.written) == ["found"]


def test_in_a_terminal_the_last_line_moves_and_the_others_stay(monkeypatch):
    terminal = terminal_of(monkeypatch)
    voice = Voice()
    voice.say("step 1")
    for number in range(3):
        voice.say(Moving(f"  {number} of 2 " + "x" * 80, done=number))
    (first, foot) = shown(terminal.written)
    assert first.endswith("step 1")
    assert "2 of 2" in foot
    assert len(foot) <= 60  # cut, so that it is one line to take away
    voice.say("step 2")
    assert [line[10:] for line in shown(terminal.written)] == ["step 1", "step 2"]
    voice.say(Moving("  half"))
    voice.results.print("found")
    assert [line[-6:].strip() for line in shown(terminal.written)] == ["step 1", "step 2", "found"]


def test_json_is_an_object_a_line(capsys):
    voice = Voice("json")
    voice.say("  data: digits")
    voice.say(Moving("  1 of 2", done=1, best=0.5))
    voice.results.print("found")
    out, err = capsys.readouterr()
    first, second = map(json.loads, out.splitlines())
    assert first["text"] == "data: digits"
    assert {name: second[name] for name in ("text", "done", "best")} == {"text": "1 of 2", "done": 1, "best": 0.5}
    assert err == "found\n"


def test_tensorboard_has_the_scalars_of_every_epoch(tmp_path):
    """Read back from the file of events; whatever else is said leaves none."""
    with scalar_writer(tmp_path / "board") as writer:
        voice = Voice("quiet", writer)
        for epoch in (1, 2):
            values = {"train_loss": 2.0 / epoch, "validation_accuracy": 0.25 * epoch}
            voice.say(Moving("an epoch", name="k3", epoch=epoch, **values))
        voice.say(Moving("1 of 2 cells", done=1, of=2))
        voice.say("done")
        (path,) = (tmp_path / "board").iterdir()
        content = path.read_bytes()  # before the end: a killed run keeps its epochs
    found = []
    while content:  # a record: length, its checksum, an event, its checksum
        size = int.from_bytes(content[:8], "little")
        event = event_pb2.Event.FromString(content[12 : 12 + size])  # pyright: ignore[reportAttributeAccessIssue]
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        content = content[16 + size :]
    assert sorted(found) == [
        ("k3/train_loss", 1, 2.0), ("k3/train_loss", 2, 1.0),
        ("k3/validation_accuracy", 1, 0.25), ("k3/validation_accuracy", 2, 0.5),
    ]  # fmt: skip


def test_tensorboard_needs_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX.event_file_writer", None)
    wanted = pytest.raises(ValueError, match=r"--tensorboard needs tensorboardX: pip install")
    with wanted, scalar_writer(tmp_path):
        pass


def test_quiet_keeps_results(capsys):
    voice = Voice("quiet")
    voice.say("data: digits")
    voice.say(Moving("1 of 2"))
    voice.results.print("found")
    assert capsys.readouterr() == ("found\n", "")
