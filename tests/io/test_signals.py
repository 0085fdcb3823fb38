"""Stopping: a signal is noticed, the work saved, the exit status told, and the same command goes on."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from spikernel_jax.io.signals import StoppedError, stop_signals

ROOT = Path(__file__).resolve().parents[2]
BOTH = [signal.SIGTERM, signal.SIGINT]


@pytest.fixture(autouse=True)
def handlers_come_back():
    """Each test leaves the handlers as they were, whatever it does within a block."""
    before = [signal.getsignal(number) for number in BOTH]
    yield
    assert [signal.getsignal(number) for number in BOTH] == before


def work(*numbers: signal.Signals, answer: bool = True) -> list[bool]:
    """What `requested` was before and after each signal, in a block that answers at its end or not at all."""
    requested: list[bool] = []
    try:
        with stop_signals() as stop:
            requested.append(stop.requested)
            stop.check()
            for number in numbers:
                os.kill(os.getpid(), number)
                requested.append(stop.requested)
            if answer:
                stop.check()
                requested.clear()  # not reached where a stop was requested
    except StoppedError as error:
        error.add_note(str(requested))
        raise
    return requested


@pytest.mark.parametrize("number", BOTH)
@pytest.mark.parametrize("answer", [True, False])
def test_a_signal_only_asks_and_is_not_lost(number, answer):
    with pytest.raises(StoppedError, match=f"stopped by {number.name} with all saved: run the same command") as error:
        work(number, answer=answer)
    assert error.value.exit_status == {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    assert error.value.__notes__ == ["[False, True]"]
    assert not isinstance(error.value, ValueError | OSError)


def test_nothing_asked_nothing_raised():
    assert work(answer=False) == [False]
    assert work(answer=True) == []


@pytest.mark.parametrize("first", BOTH)
def test_sigterm_again_changes_nothing(first):
    with pytest.raises(StoppedError, match=f"by {first.name}") as error:
        work(first, signal.SIGTERM, signal.SIGTERM)
    assert error.value.__notes__ == ["[False, True, True, True]"]


@pytest.mark.parametrize("first", BOTH)
def test_sigint_after_a_request_interrupts_at_once(first):
    with pytest.raises(KeyboardInterrupt):
        work(first, signal.SIGINT)


def test_an_error_of_the_work_goes_first():
    def failing() -> None:
        with stop_signals():
            signal.raise_signal(signal.SIGTERM)
            raise ValueError("of the work")

    with pytest.raises(ValueError, match="of the work"):
        failing()


def test_blocks_within_each_other():
    with stop_signals() as outer:
        with pytest.raises(StoppedError):
            work(signal.SIGTERM)
        assert not outer.requested
        with pytest.raises(StoppedError):
            work(signal.SIGINT)
        assert not outer.requested


def test_handlers_of_before_are_used_again():
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        with pytest.raises(StoppedError):
            work(signal.SIGTERM)
        assert seen == []
        signal.raise_signal(signal.SIGTERM)
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_signals() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_nothing_is_ever_requested():
    seen: list[Any] = []
    inside, sent = threading.Event(), threading.Event()

    def wait() -> None:
        with stop_signals() as stop:
            inside.set()
            sent.wait(30)
            seen.append(stop.requested)
        seen.append("ended")

    thread = threading.Thread(target=wait)
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        thread.start()
        assert inside.wait(30)
        os.kill(os.getpid(), signal.SIGTERM)
        sent.set()
        thread.join(30)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM, False, "ended"]


# A process that is really stopped

_WORK = """
import dataclasses, time
from pathlib import Path
import jax
from spikernel_jax.pipeline import cli
from spikernel_jax.io import signals
from spikernel_jax.training.checkpoint import training_checkpoints

@dataclasses.dataclass(frozen=True)
class Options:
    out: Path
    steps: int
    pause: float = 0.0
    compilation_cache: str = "off"

def work(options):
    like = {"sum": jax.numpy.zeros((), "int32")}
    with training_checkpoints(options.out, {}) as checkpoints, signals.stop_signals() as stop:
        done, state, _ = checkpoints.restore(like, print)
        print("from", done, flush=True)
        for step in range(done + 1, options.steps + 1):
            state = {"sum": state["sum"] + step}
            print(step, flush=True)
            time.sleep(options.pause)
            if stop.requested:
                checkpoints.save(step, state)
                stop.check()
        checkpoints.save(options.steps, state)
    print("sum", int(state["sum"]))

cli.main(Options, work, "")
"""


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_stopped_process_saves_and_the_same_command_goes_on(number, status, tmp_path):
    command = [sys.executable, "-c", _WORK, "--out", str(tmp_path / "state")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [*command, "--steps", "1000", "--pause", "0.05"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(3)] == ["from 0\n", "1\n", "2\n"]
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert err == f"stopped by {number.name} with all saved: run the same command again to go on from here\n"
    done = int(out.split()[-1]) if out else 2
    assert 2 <= done < 1000
    again = subprocess.run(
        [*command, "--steps", str(done + 2)], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert again.stdout.split("\n")[:-1] == [f"from {done}", f"{done + 1}", f"{done + 2}",
                                             f"sum {sum(range(done + 3))}"]  # fmt: skip


def test_a_process_that_ignores_sigint_from_its_start_goes_on_and_sigterm_stops_it(tmp_path):
    """As a background job of a shell without job control (``sh -c 'python ... &'``) starts."""
    script = "trap '' INT; exec \"$@\""
    command = ["sh", "-c", script, "sh", sys.executable, "-c", _WORK, "--out", str(tmp_path / "state")]
    with subprocess.Popen(
        [*command, "--steps", "1000", "--pause", "0.05"],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(3)] == ["from 0\n", "1\n", "2\n"]
        process.send_signal(signal.SIGINT)
        later = [int(process.stdout.readline()) for _ in range(4)]
        assert later == [3, 4, 5, 6]  # nothing has stopped it
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert err.startswith("stopped by SIGTERM with all saved")
