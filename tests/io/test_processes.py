"""Several processes: who they are, that they share the units, and what it costs when one dies."""

import dataclasses
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from spikernel_jax.io.processes import ALONE, Processes, alone_counter, initialise
from spikernel_jax.scoring import replicates
from spikernel_jax.search import queue

ROWS = np.arange(41 * 6, dtype=np.int8).reshape(41, 6)
SEEDS, CHUNK, HEARTBEAT = 3, 2, 5
UNITS = SEEDS * 21


class Sums:
    """A scorer without a network: a score depends on the row and the replicate alone."""

    lanes = 2

    def __init__(self, seconds: float = 0.0):
        self.seconds = seconds

    def submit(self, replicate, parts):
        def wait():
            time.sleep(self.seconds)
            return [
                {"scores": np.sin(part.sum(1) + 100.0 * replicate), "lif_calls": part[:, 0].astype(np.int64)}
                for part in parts
            ]

        return wait

    def order(self, rows):
        return np.argsort(np.sin(rows.sum(1)))


class Lanes(Sums):
    def __init__(self, lanes: int):
        super().__init__()
        self.lanes = lanes


def job(seconds: float = 0.0, **changes: Any) -> dict[str, Any]:
    return {"rows": ROWS, "scorer": Sums(seconds), "seeds": SEEDS, "chunk": CHUNK, "inputs": {"seed": 0}} | changes


def expected() -> replicates.Scores:
    total = ROWS.sum(1)
    return replicates.over_replicates(np.sin(total[:, None] + 100.0 * np.arange(SEEDS)), ROWS[:, 0].astype(np.int64))


def member(index: str, port: str, folder: str, seconds: str, seed: str = "0") -> None:
    """What one process of the tests does; prints a line of JSON."""
    count = 2
    processes = initialise(f"127.0.0.1:{port}", count, int(index), heartbeat_seconds=HEARTBEAT, start_seconds=60)
    assert processes == Processes(int(index), count)
    assert len(jax.local_devices()) * count == len(jax.devices())
    given = job(float(seconds), inputs={"seed": int(seed)}, processes=processes, folder=Path(folder))
    try:
        with processes.session():
            if not processes.first:
                print(json.dumps({"units": queue.score_share(queue.Units(**given))}))
                return
            seen: list[queue.Progress] = []
            scores = queue.score_units(queue.Units(**given), progress=seen.append)
    except ValueError as error:
        print(json.dumps({"error": str(error)}))
        return
    last = dataclasses.asdict(seen[-1])
    print(json.dumps({"scores": scores.replicates.tolist(), "calls": scores.lif_calls.tolist(), **last}))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


Start = Callable[..., "list[subprocess.Popen[str]]"]


@pytest.fixture
def start(tmp_path):
    """Starts both processes of a job."""
    started: list[subprocess.Popen[str]] = []

    def both(seconds: float, seeds: tuple[int, int] = (0, 0)) -> "list[subprocess.Popen[str]]":
        port = free_port()
        root = Path(__file__).resolve().parents[2]
        environment = {**os.environ, "PYTHONPATH": f"{root}:{Path(__file__).parent}", "JAX_PLATFORMS": "cpu"}
        for index, seed in enumerate(seeds):
            arguments = [str(value) for value in (index, port, tmp_path / "store", seconds, seed)]
            code = f"import test_processes; test_processes.member(*{arguments!r})"
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
            started.append(subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes))
        return started[-2:]

    yield both
    for process in started:
        process.kill()
        process.communicate()


def answer(process: "subprocess.Popen[str]") -> dict[str, Any]:
    printed, _ = process.communicate(timeout=100)
    assert process.returncode == 0
    return json.loads(printed)


def wait_for_units(folder: Path, wanted: int, process: "subprocess.Popen[str]") -> None:
    end = time.monotonic() + 100
    while len(list(folder.glob("chunk-*.npz"))) < wanted:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)


def assert_whole(first: dict[str, Any], folder: Path) -> None:
    np.testing.assert_array_equal(first["scores"], expected().replicates)
    np.testing.assert_array_equal(first["calls"], expected().lif_calls)
    assert first["done"] == first["total"] == len(ROWS)
    assert len(list(folder.glob("chunk-*.npz"))) == UNITS
    assert not list(folder.glob(".*"))


# One process


def test_alone_everything_is_immediate(tmp_path):
    with ALONE.session():
        ALONE.tell("x", 1)
        take = ALONE.counter("units")
        assert [take(2), take(3), take(1)] == [0, 2, 5]
        scores = queue.score_units(queue.Units(folder=tmp_path / "store", **job()))
    for got, want in zip(scores, expected(), strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_plain_machine_is_alone(monkeypatch):
    for name in [*os.environ]:
        if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_", "JOB_COMPLETION")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(jax.distributed, "initialize", None)  # not called
    monkeypatch.setattr(socket, "getaddrinfo", None)
    assert initialise() == ALONE
    assert initialise("localhost:1234", 1, 0) == ALONE
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")  # a pod, but none of an indexed job
    assert initialise() == ALONE


STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-4]", "SLURM_NTASKS": "4", "SLURM_PROCID": "1"}
STEP |= {"SLURM_LOCALID": "0"}
MPI = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911", "OMPI_COMM_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, []),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, None),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "1(x2),2"}, None),
        ({**MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, []),
        ({**MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, None),
        ({**STEP, "SLURM_NTASKS": "1"}, "alone"),
        ({**MPI, "OMPI_COMM_WORLD_SIZE": "1"}, "alone"),
    ],
)
def test_a_cluster_is_recognised_and_the_only_task_of_a_node_has_all_its_devices(environment, devices, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    for name in [*os.environ]:
        if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_", "JOB_COMPLETION")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    initialise(heartbeat_seconds=77)
    if devices == "alone":
        assert calls == []
    else:
        assert [(call["local_device_ids"], call["heartbeat_timeout_seconds"]) for call in calls] == [(devices, 77)]
        assert "coordinator_address" not in calls[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((None, 2, None), "--processes 2 needs --coordinator and --process-id too"),
        (("a:1", None, None), "--coordinator a:1 needs --processes and --process-id too"),
        ((None, 2, 0), "needs --coordinator too"),
        (("localhost", 2, 0), "'localhost': want HOST:PORT"),
        ((":80", 2, 0), "want HOST:PORT"),
        (("localhost:http", 2, 0), "want HOST:PORT"),
        (("localhost:70000", 2, 0), "want HOST:PORT"),
        (("localhost:80", 0, 0), "--processes 0 must be at least 1"),
        (("localhost:80", 2, 2), "--process-id 2 must be from 0 to 1 with --processes 2"),
        (("localhost:80", 2, -1), "--process-id -1"),
        (("localhost:{taken}", 2, 0), "port {taken} is taken"),
        (("127.0.0.1:{free}", 2, 1), "no process 0 answers there after 1 s"),
        (("nowhere.invalid:80", 2, 1), "no host 'nowhere.invalid' is known"),
    ],
)
def test_bad_options_are_one_line(options, words, monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", None)  # not called
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        ports = {"taken": listener.getsockname()[1], "free": free_port()}
        coordinator = options[0] and options[0].format(**ports)
        with pytest.raises(ValueError, match=words.format(**ports)) as error:
            initialise(coordinator, *options[1:], start_seconds=1)
    assert "\n" not in str(error.value)


# Two processes


def test_units_are_shared_without_overlap():
    """Processes of different numbers of lanes, in turns, from one counter."""
    work = [queue.Units(**job(), folder=Path()) for _ in range(3)]
    for one, lanes in zip(work, (1, 2, 5), strict=True):
        one.scorer = Lanes(lanes)
    undone = [unit for unit in range(UNITS) if unit % 7]
    take = alone_counter()
    taken = [[] for _ in work]
    calls = [one._calls(undone, take) for one in work]
    for turn in itertools.cycle(range(3)):
        call = next(calls[turn], None)
        if call is None:
            break
        assert len({unit // 21 for unit in call}) == 1  # of one replicate
        assert len(call) <= work[turn].scorer.lanes
        taken[turn] += call
    for own, rest in zip(taken, calls, strict=True):
        own += itertools.chain.from_iterable(rest)
    assert sorted(itertools.chain.from_iterable(taken)) == undone
    assert all(taken)


def test_two_processes_give_the_bits_of_one(start, tmp_path):
    first, second = start(0.05)
    share = answer(second)["units"]
    result = answer(first)
    assert 0 < share < UNITS
    assert result["lost"] == []
    assert_whole(result, tmp_path / "store")
    before = {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()}
    again = queue.score_units(queue.Units(folder=tmp_path / "store", **job()))  # a folder of two is a folder of one
    np.testing.assert_array_equal(again.replicates, expected().replicates)
    assert {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()} == before


@pytest.mark.slow
def test_the_first_goes_on_when_another_is_killed(start, tmp_path):
    first, second = start(0.1)
    wait_for_units(tmp_path / "store", 8, second)
    second.send_signal(signal.SIGKILL)
    result = answer(first)
    assert result["lost"] == [1]
    assert_whole(result, tmp_path / "store")


def test_when_the_first_is_killed_all_end_and_the_same_command_goes_on(start, tmp_path):
    first, second = start(0.1)
    folder = tmp_path / "store"
    wait_for_units(folder, 8, first)
    first.send_signal(signal.SIGKILL)
    second.communicate(timeout=20)
    assert second.returncode != 0
    (folder / ".chunk-000060.npz.1-aa.tmp").write_text("half")
    there = {path.name: path.stat().st_mtime_ns for path in folder.glob("chunk-*.npz")}
    assert 8 <= len(there) < UNITS
    first, second = start(0.02)
    share = answer(second)["units"]
    result = answer(first)
    assert 0 < share < UNITS - len(there)
    assert_whole(result, folder)
    assert {name: (folder / name).stat().st_mtime_ns for name in there} == there  # none scored again


@pytest.mark.slow
def test_a_process_with_other_inputs_scores_nothing(start, tmp_path):
    first, second = start(0.02, seeds=(0, 1))
    assert "seed: 0 there, 1 here" in answer(second)["error"]
    result = answer(first)
    assert result["lost"] == [1]
    assert_whole(result, tmp_path / "store")


@pytest.mark.slow
def test_an_error_of_the_first_reaches_the_others(start, tmp_path):
    queue.score_units(queue.Units(folder=tmp_path / "store", **job()))
    path = tmp_path / "store" / "chunk-000004.npz"
    path.write_bytes(path.read_bytes()[:50])
    first, second = start(0.02)
    reason = answer(first)["error"]
    assert f"{path} is damaged" in reason
    assert answer(second)["error"] == f"process 0 gave up: {reason}"
