"""The rooms of the package: imports run downwards only, and docs/architecture.md names every module."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "spikernel_jax"
FLOORS = (  # rooms of one floor know nothing of each other
    {"operations", "io"},
    {"cells"},
    {"data"},
    {"snn"},
    {"scoring", "training", "embedded"},
    {"search"},
    {"report"},
    {"pipeline"},
    {"studies"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imported(path: Path) -> Iterator[list[str]]:
    """Every module of the package that a file imports anywhere, as its parts."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{name}" for name in names]
        yield from (name.split(".")[1:] for name in names if name.split(".")[0] == "spikernel_jax")


def test_every_room_has_a_floor():
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == FLOOR.keys()
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py"}


def test_imports_run_downwards():
    arrows = {
        (path.relative_to(PACKAGE).parts[0], to[0], f"{path.relative_to(PACKAGE)} imports {'.'.join(to)}")
        for path in PACKAGE.glob("*/*.py")
        for to in imported(path)
    }
    assert len(arrows) > 100
    assert not sorted(what for room, to, what in arrows if to != room and FLOOR[to] >= FLOOR[room])


def test_modules_of_a_room_have_no_circle():
    for room in FLOOR:
        left = {
            path.stem: {to[1] for to in imported(path) if to[0] == room and len(to) > 1}
            for path in (PACKAGE / room).glob("*.py")
            if path.stem != "__init__"
        }
        while ready := [name for name, needs in left.items() if not needs & left.keys()]:
            for name in ready:
                del left[name]
        assert not left, f"{room}: a circle"


def test_the_picture_names_every_module():
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    named = {room: set(re.findall(r"`(\w+)`", modules)) for room, modules in rows}
    there = {room: {path.stem for path in (PACKAGE / room).glob("*.py")} - {"__init__"} for room in FLOOR}
    assert named == there
