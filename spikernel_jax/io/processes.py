"""Several processes for one job: who is who, who does what, and who is still there.

The processes of a job compute on their own local devices only and leave their results in one shared folder.
What they have to agree on goes through the key-value store of JAX's distributed service, which process 0
serves; no collective operation crosses processes, so CPU, GPU and TPU processes behave alike.

When a process dies, the others go on (`jax_enable_recoverability`): process 0 learns of it after
`heartbeat_seconds` without a sign of life. When process 0 dies, JAX ends the other processes, at once where
its host still answers and after `heartbeat_seconds` where not.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

_PREFIX = "spikernel"
_FAREWELL_SECONDS = 10.0  # how long a failing process 0 waits for the others to read why
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of a job, seen from one of them; alone, every answer is immediate.

    Attributes:
      index: of this process.
      count: how many there are.
    """

    index: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes the tables and speaks."""
        return self.index == 0

    def tell(self, name: str, value: Any) -> None:
        """Process 0 publishes a value that JSON can hold, once a name."""
        if self.count > 1:
            _client().key_value_set(f"{_PREFIX}/told/{name}", json.dumps(value))

    def hear(self, name: str) -> Any:
        """Waits for what process 0 tells under a name; ValueError with its reason if it gave up instead."""
        while True:
            try:
                return json.loads(_client().blocking_key_value_get(f"{_PREFIX}/told/{name}", 1000))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
            for _, reason in _client().key_value_dir_get(f"{_PREFIX}/failed"):
                raise ValueError(f"process 0 gave up: {reason}")

    def counter(self, name: str) -> Callable[[int], int]:
        """A counter from 0, common to all processes: called with k, gives its value and then adds k."""
        if self.count == 1:
            return alone_counter()
        return lambda k: _client().key_value_increment(f"{_PREFIX}/counter/{name}", k) - k

    def wait_for_others(self, meanwhile: Callable[[], None], every: float = 2.0) -> tuple[int, ...]:
        """Process 0 waits until every other process has left or is known to be dead.

        Args:
          meanwhile: called again and again while it waits.
          every: seconds between two calls.

        Returns:
          The processes that did not finish.
        """
        gone = self._watch()
        while not gone.wait(every):
            meanwhile()
        finished = {int(key.rsplit("/", 1)[1]) for key, _ in _client().key_value_dir_get(f"{_PREFIX}/finished")}
        return tuple(index for index in range(1, self.count) if index not in finished)

    def _watch(self) -> threading.Event:
        """An event that is set once no other process is connected."""
        gone = threading.Event()

        def watch() -> None:
            # Answers when all processes that are alive have asked. Only this one ever asks, so that is when all
            # others have left, or are dead.
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # this process leaves meanwhile
                _client().get_live_nodes(list(range(self.count)))
            gone.set()

        threading.Thread(target=watch, daemon=True).start()
        return gone

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Leaves the job at the end of the block; an error of process 0 is told to the others first."""
        if self.count == 1:
            yield
            return
        try:
            yield
            if not self.first:
                _client().key_value_set(f"{_PREFIX}/finished/{self.index}", "")
        except Exception as error:
            if self.first:
                _client().key_value_set(f"{_PREFIX}/failed/0", " ".join(str(error).split()))
                self._watch().wait(_FAREWELL_SECONDS)
            raise
        finally:
            jax.distributed.shutdown()


ALONE = Processes()


def alone_counter() -> Callable[[int], int]:
    """A counter of this process alone, as `Processes.counter`."""
    value = 0

    def take(k: int) -> int:
        nonlocal value
        value += k
        return value - k

    return take


def _client() -> Any:
    from orbax.checkpoint import multihost  # imports slowly; JAX itself has no public name for its key-value store

    if not multihost.is_jax_distributed_client_initialized():
        raise RuntimeError("this process has left its job, or never joined one")
    return multihost.get_jax_distributed_client()


def initialise(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_seconds: int = 100,
    start_seconds: int = 300,
    say: Callable[[str], None] = lambda _: None,
) -> Processes:
    """Joins the processes of a job; must come before JAX's backend starts.

    With all three of `coordinator`, `processes` and `process_id` these count. With none of them, the cluster
    that started this process is asked: a Slurm step or an Open MPI job of several tasks, an indexed Kubernetes
    job, a TPU host. Elsewhere this process is alone; nothing is looked up and nothing waited for.

    Args:
      coordinator: HOST:PORT of process 0, a free port there.
      processes: how many.
      process_id: this one's, from 0.
      heartbeat_seconds: a process that was silent for so long is dead.
      start_seconds: how long processes wait for each other at the start.
      say: prints a line of progress.

    Returns:
      This process among the others. All its local devices are its own; only with several tasks on one node
      of Slurm or Open MPI it has the one device of its local rank.

    Raises:
      ValueError: naming the option: one without the others, out of range, a port that is taken, a host that is
        not known, no process 0 within `start_seconds`. (When process 0 waits in vain for another, JAX ends it
        with a message of its own.)
    """
    given = {"--coordinator": coordinator, "--processes": processes, "--process-id": process_id}
    if all(value is None for value in given.values()):
        if not _started_by_a_cluster():
            return ALONE
        arguments: dict[str, Any] = {"local_device_ids": [] if _one_task_a_node() else None}  # [] is all of them
    else:
        _check(given)
        if processes == 1:
            return ALONE
        if process_id == 0:
            say(f"waiting at {coordinator} for all {processes} processes, {start_seconds} s at most")
        else:
            _await_coordinator(str(coordinator), start_seconds)
        arguments = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process_id}
        arguments |= {"cluster_detection_method": "deactivate"}
    jax.config.update("jax_enable_recoverability", True)
    # JAX's service would swallow SIGTERM; there is nothing to save here that is not on disk already.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", None)
    jax.distributed.initialize(
        **arguments, heartbeat_timeout_seconds=heartbeat_seconds, initialization_timeout=start_seconds
    )
    return Processes(jax.process_index(), jax.process_count())


def _check(given: dict[str, Any]) -> None:
    """Raises ValueError for options that are no job of several processes."""
    if missing := [name for name, value in given.items() if value is None]:
        there = ", ".join(f"{name} {value}" for name, value in given.items() if value is not None)
        raise ValueError(f"{there} needs {' and '.join(missing)} too")
    coordinator, processes, process_id = given.values()
    host, _, port = coordinator.rpartition(":")
    if not host or not re.fullmatch(r"\d{1,5}", port) or not 1 <= int(port) <= 65535:
        raise ValueError(f"--coordinator {coordinator!r}: want HOST:PORT with a port from 1 to 65535")
    if processes < 1:
        raise ValueError(f"--processes {processes} must be at least 1")
    if not 0 <= process_id < processes:
        raise ValueError(f"--process-id {process_id} must be from 0 to {processes - 1} with --processes {processes}")
    if processes == 1:
        return
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
    except OSError as error:
        raise ValueError(f"--coordinator {coordinator!r}: no host {host!r} is known ({error})") from None
    if process_id == 0 and not _port_is_free(int(port)):  # JAX's service would end in a segmentation fault
        raise ValueError(f"--coordinator {coordinator!r}: port {port} is taken on this host; choose another")


def _port_is_free(port: int) -> bool:
    family, host = (socket.AF_INET6, "::") if socket.has_ipv6 else (socket.AF_INET, "")
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError:
            return False
    return True


def _await_coordinator(coordinator: str, seconds: float) -> None:
    """Waits until process 0 listens; ValueError if it does not."""
    host, _, port = coordinator.rpartition(":")
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise ValueError(
                    f"--coordinator {coordinator!r}: no process 0 answers there after {seconds:.0f} s ({error})"
                ) from None
        time.sleep(0.2)


def _started_by_a_cluster() -> bool:
    """Whether `jax.distributed.initialize` should find out by itself where this process belongs.

    Its own search is not asked: it warns in every Kubernetes pod, and joins a Slurm step of one task.
    """
    there = os.environ
    return (
        (all(name in there for name in _SLURM) and there["SLURM_NTASKS"] != "1")
        or ("OMPI_MCA_orte_hnp_uri" in there and there.get("OMPI_COMM_WORLD_SIZE") != "1")
        or {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= there.keys()
        or _is_tpu_host()
    )


def _is_tpu_host() -> bool:
    if jax.config.jax_platforms and "tpu" not in jax.config.jax_platforms:  # pyright: ignore[reportAttributeAccessIssue]
        return False
    chips = itertools.chain(Path("/dev").glob("accel*"), Path("/dev/vfio").glob("[0-9]*"))
    return importlib.util.find_spec("libtpu") is not None and any(chips)


def _one_task_a_node() -> bool:
    """Whether the node has no other task of this job, as far as Slurm and Open MPI tell.

    JAX gives every task of theirs one device, which is wrong for the only task on a node of several devices.
    """
    slurm = re.fullmatch(r"1(\(x\d+\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return slurm is not None or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
