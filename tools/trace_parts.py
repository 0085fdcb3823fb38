"""Where device time goes, by part of the network: a profile's events, mapped back to the functions they came from.

Events of `jax.profiler` name an instruction of a compiled program; the text of the program gives each instruction the
stack of functions that made it. A fused instruction belongs to the function of its root: shares are of what was
fused together, not exact to the last operation. What a compiler puts in without a stack belongs to who reads it, if it
is a fusion, and to the rest otherwise.
"""

import inspect
import math
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from spikernel_jax.operations import convolution, pooling
from spikernel_jax.scoring import scores
from spikernel_jax.snn import layers, neurons

REST = "rest"
_FUNCTIONS: dict[Callable[..., Any], str] = {
    convolution.conv: "convolution",
    neurons.run: "lif",
    layers.batch_norm: "norm",
    pooling.average_pool: "pooling",
    layers.downsample: "pooling",
    pooling.max_pool: "pooling",
    scores.normalised_hamming: "gram",
}
PARTS = (*dict.fromkeys(_FUNCTIONS.values()), REST)
# Their time is that of the instructions inside them, which have events of their own.
_NESTING = {"while", "conditional", "call"}

_ENTRY = re.compile(r'(\d+) (?:"(.*)"|\{(.*)\})$')
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*?[\])}]) ([a-z][\w\-]*)\((.*)")
_ARRAY = re.compile(r"\b(pred|bf16|[fsu]\d+)\[([\d,]*)\]")


class Instruction(NamedTuple):
    """One instruction of a compiled program."""

    opcode: str
    part: str
    source: str  # the operation it came from, as JAX names it
    moved: int  # bytes of the arrays that it reads and of those that it writes, in whole


class Event(NamedTuple):
    """An instruction as a device ran it."""

    line: str  # thread, or a GPU's stream
    module: str
    name: str
    seconds: float


def _place(function: Callable[..., Any]) -> tuple[str, str]:
    plain = inspect.unwrap(function)
    return Path(plain.__code__.co_filename).name, plain.__qualname__


def _tables(text: str) -> dict[str, dict[int, Any]]:
    """The numbered tables at the head of a program's text: names of files and functions, locations, frames."""
    tables: dict[str, dict[int, Any]] = {}
    entries: dict[int, Any] = {}
    for line in text.splitlines():
        if match := _ENTRY.match(line):
            name, fields = match[2], match[3]
            pairs = (field.split("=") for field in (fields or "").split())
            entries[int(match[1])] = name if fields is None else {key: int(value) for key, value in pairs}
        elif line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            entries = tables.setdefault(line, {})
    return tables


def _bytes(shape: str) -> int:
    """Of an array, or of all arrays of a tuple."""
    widths = [(1 if kind == "pred" else int(kind.lstrip("bfsu")) / 8, sides) for kind, sides in _ARRAY.findall(shape)]
    return math.ceil(sum(width * math.prod(map(int, filter(None, sides.split(",")))) for width, sides in widths))


def instructions(text: str) -> dict[str, Instruction]:
    """All instructions of a compiled program by name.

    Args:
      text: the optimised HLO module.
    """
    tables = _tables(text)
    frames = tables.get("StackFrames", {})
    # Frames are numbered from 1 and 0 is no parent; the text may print a parent one too large.
    shift = frames[min(frames)]["parent_frame_id"] if frames else 0
    parts = {_place(function): part for function, part in _FUNCTIONS.items()}

    def part_of(frame: int) -> str:
        while frame in frames:
            location = tables["FileLocations"][frames[frame]["file_location_id"]]
            file = Path(tables["FileNames"][location["file_name_id"]]).name
            function = tables["FunctionNames"][location["function_name_id"]].split(".<locals>")[0]
            if (file, function) in parts:
                return parts[file, function]
            frame = frames[frame]["parent_frame_id"] - shift
        return REST

    found: dict[str, Instruction] = {}
    unnamed: list[str] = []  # fusions that came to be without a stack
    users: dict[str, list[str]] = {}
    made: dict[str, int] = {}  # bytes
    for line in text.splitlines():
        if not (match := _INSTRUCTION.match(line)):
            continue
        name, shape, opcode, rest = match.groups()
        frame = re.search(r"stack_frame_id=(\d+)", rest)
        source = re.search(r'op_name="([^"]*)"', rest)
        if opcode == "fusion" and not frame:
            unnamed.append(name)
        operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
        for operand in operands:
            users.setdefault(operand, []).append(name)
        made[name] = _bytes(shape)
        moved = made[name] + sum(made.get(operand, 0) for operand in operands)
        part = part_of(int(frame[1])) if frame else REST
        found[name] = Instruction(opcode, part, source[1] if source else "", moved)
    for name in unnamed:
        reader = found[name]
        waiting = users.get(name, [])
        while waiting and reader.part == REST:  # who reads it, or reads who reads it
            reader, waiting = found[waiting[0]], waiting[1:] + users.get(waiting[0], [])[:1]
        found[name] = found[name]._replace(part=reader.part, source=f"{name} for {reader.source}")
    return found


def device_seconds(
    events: Iterable[Event], programs: Mapping[str, Mapping[str, Instruction]]
) -> tuple[Counter[str], Counter[tuple[str, str]]]:
    """Seconds of device time, summed over devices, by part and by (part, source).

    Args:
      events: of a profile. Of a GPU's those on its streams count.
      programs: instructions of each module that counts, by its name.
    """
    parts: Counter[str] = Counter({part: 0.0 for part in PARTS})
    sources: Counter[tuple[str, str]] = Counter()
    for instruction, name, seconds in _of_devices(events, programs):
        parts[instruction.part] += seconds  # pyright: ignore[reportArgumentType]
        sources[instruction.part, instruction.source or name] += seconds  # pyright: ignore[reportArgumentType]
    return parts, sources


def device_bytes(
    events: Iterable[Event], programs: Mapping[str, Mapping[str, Instruction]]
) -> Counter[tuple[str, str]]:
    """Bytes that instructions read and wrote, summed over devices, by (part, source); arguments as `device_seconds`.

    Where an instruction reads a slice of an array, the whole counts.
    """
    found: Counter[tuple[str, str]] = Counter()
    for instruction, name, _ in _of_devices(events, programs):
        found[instruction.part, instruction.source or name] += instruction.moved
    return found


def launches(events: Iterable[Event], programs: Mapping[str, Mapping[str, Instruction]]) -> int:
    """How many instructions the devices ran; arguments as `device_seconds`."""
    return sum(1 for _ in _of_devices(events, programs))


def _of_devices(
    events: Iterable[Event], programs: Mapping[str, Mapping[str, Instruction]]
) -> Iterator[tuple[Instruction, str, float]]:
    """Each event of a device that is not of instructions inside it: the instruction, its name, and seconds."""
    events = list(events)
    streams = {event.line for event in events if event.line.startswith("Stream")}
    for event in events:
        program = programs.get(event.module)
        if program is None or (streams and event.line not in streams):
            continue
        instruction = program.get(event.name, Instruction("", REST, event.name, 0))
        if instruction.opcode not in _NESTING:
            yield instruction, event.name, event.seconds


def live_programs(device: Any, names: Container[str]) -> dict[str, dict[str, Instruction]]:
    """Instructions of the programs of these names that a device holds compiled; of equal names the last."""
    modules = {module.name: module for program in device.client.live_executables() for module in program.hlo_modules()}
    return {name: instructions(module.to_string()) for name, module in modules.items() if name in names}


def profile(call: Callable[[], Any]) -> tuple[list[Event], float]:
    """Events of a call, and its wall time in seconds."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
        (path,) = Path(folder).rglob("*.xplane.pb")
        return list(_events(path)), seconds


def _events(path: Path) -> Iterator[Event]:
    """All of instructions: the profiler's other file, in Chrome's format, leaves out what is beyond a million."""
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for event in line.events:
                if "hlo_op" in (found := dict(event.stats)):
                    module, name = (str(found.get(of, "")) for of in ("hlo_module", "hlo_op"))
                    yield Event(line.name, module, name, event.duration_ns / 1e9)
