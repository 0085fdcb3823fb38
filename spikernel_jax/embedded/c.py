"""A program of integers as C99: no heap, no recursion, no floats, static memory; spikes are bits, and events.

What `integer.run` computes, to the bit. A convolution of spikes goes through the spikes around each place and adds
their weights, so its time grows with how many there are.
"""

import functools
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spikernel_jax.embedded import program as ops
from spikernel_jax.embedded.memory import kind_of, lay_out, length_of
from spikernel_jax.embedded.program import Instruction, Ints, Program, Scale
from spikernel_jax.io.files import atomic_folder
from spikernel_jax.snn.footprint import stored_bits

_TEMPLATES = Path(__file__).parent / "templates"
_FILES = ("spikernel.h", "spikernel.c", "main.c", "mps2.c", "mps2.ld", "Makefile", "README.md")
_LINE = 110  # characters


class Source(NamedTuple):
    """Files of a program, by name, and the bytes of static memory that it writes to and that it only reads."""

    files: dict[str, str]
    written_bytes: int
    constant_bytes: int


def generate(program: Program, about: str = "A spiking neural network.") -> Source:
    """The C of a program.

    Args:
      program: of `lower.lower`.
      about: what it is, for its README and the head of its header.

    Returns:
      ``spikernel.h``, ``spikernel.c``, ``main.c``, ``Makefile``, ``README.md``, and ``mps2.c`` and ``mps2.ld`` for
      microcontrollers.
    """
    writer, layout, buffers = _Writer(program), lay_out(program), program.buffers
    current = buffers["stem"]
    once, step, end = ([writer.call(own) for own in part] for part in (program.once, program.step, program.end))
    height, width, image_channels = buffers["image"].shape
    (at_most,) = {buffers[own].most for own in program.sites}  # one constant of the C
    sites, widest = len(program.sites), 4 * -(-max(buffer.shape[2] for buffer in buffers.values()) // 4)
    memory = [f"static {kind} arena_{kind}[{count}];" for kind, count in layout.arenas.items()]
    memory += [
        f"static {kind_of(own)} {_name(name)}[{length_of(own)}];" for name, own in buffers.items() if own.kept
    ]  # fmt: skip
    memory += [
        f"#define {_name(name)} (arena_{kind_of(buffers[name])} + {offset})" for name, offset in layout.offsets.items()
    ]
    clear = [f"memset({_name(name)}, 0, sizeof {_name(name)});" for name, own in buffers.items() if own.kept]
    values = {
        "about": about.replace("*/", "* /"),  # it stands in comments
        "at_most": at_most, "bits": program.bits, "stored": writer.stored, "a_byte": _A_BYTE[writer.stored],
        "current": kind_of(current), "current_bits": current.bits, "clips": int(current.clips),
        "least": current.range[0], "most": current.range[1],
        "steps": program.time_steps, "sites": sites, "widest": widest,
        "height": height, "width": width, "channels": image_channels, "classes": buffers["logits"].shape[2],
        "written": layout.written + 4 * (sites + widest), "constants_bytes": writer.constant_bytes,
        "names": ", ".join(program.sites), "constants": "\n".join(writer.constants), "memory": "\n".join(memory),
        "functions": "".join(text for name, (_, text) in _functions().items() if name in writer.used),
        "clear": _indented(clear, 4), "once": _indented(once, 4), "step": _indented(step, 8),
        "end": _indented(end, 4),
    }  # fmt: skip
    files = {name: _filled((_TEMPLATES / name).read_text("utf-8"), values) for name in _FILES}
    return Source(files, values["written"], writer.constant_bytes)


_A_BYTE = {2: "four", 4: "two", 8: "one"}


def packed(values: Ints, bits: int) -> NDArray[np.uint8]:
    """Rows [..., out] of numbers with so many bits, in two's complement, a byte's first one lowest; zeros fill."""
    per = 8 // bits
    rows = values.reshape(-1, values.shape[-1]) & (2**bits - 1)
    rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % per))).reshape(len(rows), -1, per)
    return (rows << (bits * np.arange(per))).sum(-1).astype(np.uint8)


def _filled(template: str, values: Mapping[str, Any]) -> str:
    """A template whose ``@names@`` are replaced."""
    return re.sub(r"@(\w+)@", lambda found: str(values[found[1]]), template)


@functools.cache
def _functions() -> dict[str, tuple[tuple[str, ...], str]]:
    """Functions that instructions call: those that each needs, and its text."""
    _, *parts = re.split(r"^//// (\w+):?(.*)\n", (_TEMPLATES / "functions.c").read_text("utf-8"), flags=re.MULTILINE)
    return {
        name: (tuple(needs.split()), text) for name, needs, text in zip(*(parts[i::3] for i in range(3)), strict=True)
    }


def write(source: Source, folder: Path) -> None:
    """Writes the files into a new folder, all or none.

    Raises:
      ValueError: if there is something at that place.
    """
    if folder.exists():
        raise ValueError(f"{folder} is there already: remove it, or name another folder")
    with atomic_folder(folder) as fresh:
        fresh.mkdir()
        for name, text in source.files.items():
            (fresh / name).write_text(text, "utf-8")


def _indented(lines: list[str], by: int) -> str:
    return textwrap.indent("\n".join(lines), " " * by)


_SPOKEN = str.maketrans({".": "_", "@": "_at_", "~": "_tau_"})


def _name(buffer: str) -> str:
    """A buffer's name in C, another one for each."""
    return "b_" + buffer.translate(_SPOKEN)


_TYPES = {  # bytes, least and greatest
    "int8_t": (1, -128, 127),
    "uint8_t": (1, 0, 255),
    "int16_t": (2, -32768, 32767),
    "int32_t": (4, -(2**31), 2**31 - 1),
}


class _Writer:
    """Gathers constants and the functions that are called."""

    def __init__(self, program: Program):
        self.program, self.constants, self.used = program, [], set()
        self.constant_bytes = 0
        self.stored = stored_bits(program.bits)
        self.constant("int16_t", program.table, "table")

    def constant(self, kind: str, values: Any, name: str = "") -> str:
        """An array that is only read; its name."""
        flat = np.asarray(values).ravel()
        size, least, most = _TYPES[kind]
        if flat.min() < least or flat.max() > most:
            raise ValueError(f"values from {flat.min()} to {flat.max()} are no {kind}")
        name = name or f"c{len(self.constants)}"
        text = "\n".join(textwrap.wrap(", ".join(map(str, flat.tolist())), _LINE))
        self.constants.append(f"static const {kind} {name}[{len(flat)}] = {{\n{text}\n}};")
        self.constant_bytes += size * len(flat)
        return name

    def weights(self, values: Any) -> str:
        """Weights [..., out], as many a byte as go into one."""
        if self.stored == 8:
            return self.constant("int8_t", values)
        return self.constant("uint8_t", packed(np.asarray(values), self.stored))

    def scale(self, scale: Scale) -> str:
        return f"{self.constant('int16_t', scale.multiplier)}, {self.constant('uint8_t', scale.shift)}"

    def use(self, function: str) -> str:
        self.used |= {function, *_functions()[function][0]}
        return function

    def call(self, own: Instruction) -> str:
        """One instruction as a call."""
        buffers = self.program.buffers
        source, target = buffers[own.source], buffers[own.target]
        spiking = source.spiking
        h, w, c = source.shape
        names = f"{'image' if own.source == 'image' else _name(own.source)}, {_name(own.target)}"
        add = int(own.add)
        match own:
            case ops.Convolve():
                kh, kw, _, out = own.weights.shape
                weights = self.weights(own.weights)
                rest = f"{self.scale(own.scale)}, {self.constant('int32_t', own.bias)}, {add}"
                sizes = f"{h}, {w}, {c}, {out}, {kh}, {kw}, {own.dilation}"
                if own.source == "image":
                    return f"{self.use('convolve_image')}({names}, {sizes}, {own.stride}, {weights}, {rest});"
                kind = "depthwise" if own.groups > 1 else "convolve"
                function = self.use(f"{kind}_{'spikes' if spiking else 'currents'}")
                return f"{function}({names}, {sizes}, {weights}, {rest});"
            case ops.Affine():
                rest = f"{self.scale(own.scale)}, {self.constant('int32_t', own.bias)}"
                return f"{self.use('affine')}({names}, {h * w}, {c}, {rest});"
            case ops.Shift():
                function = self.use("shift_spikes" if spiking else "shift_currents")
                return f"{function}({names}, {h * w}, {c}, {1 << own.left}, {add});"
            case ops.AveragePool():
                function = self.use("average_spikes" if spiking else "average_currents")
                m, s = int(own.scale.multiplier[0]), int(own.scale.shift[0])
                return f"{function}({names}, {h}, {w}, {c}, {own.window}, {m}, {s}, {add});"
            case ops.MaxPool():
                return f"{self.use('maximum')}({names}, {h}, {w}, {c}, {own.window}, {1 << own.left}, {add});"
            case ops.Halve():
                return f"{self.use('halve')}({names}, {h}, {w}, {c});"
            case ops.Count():
                return f"{self.use('count')}({names}, {h}, {w}, {c}, {own.side[0]}, {own.side[1]}, {add});"
            case ops.Linear():
                function = self.use("linear_currents" if target.bits <= 16 else "linear_sums")
                target_name = "logits" if own.target == "logits" else _name(own.target)
                weights, bias = self.weights(own.weights), self.constant("int32_t", own.bias)
                sizes = f"{h * w * c}, {target.shape[2]}"
                scale = self.scale(own.scale)
                return f"{function}({_name(own.source)}, {target_name}, {sizes}, {weights}, {scale}, {bias});"
            case ops.Clear():
                return f"memset({_name(own.target)}, 0, {length_of(target)} * sizeof *{_name(own.target)});"
            case ops.Fire():
                at = self.program.sites.index(own.target)
                rest = f"{h * w}, {c}, {own.leak}, {own.leak_shift}, {own.threshold}, {own.reset}, {int(own.soft)}"
                return f"spikernel_spikes[{at}] += {self.use('fire')}({names}, {_name(own.state)}, {rest});"
        raise TypeError(type(own).__name__)
