"""Where the buffers of a program lie in a device's memory: those that are not alive together share a place.

Only buffers of one C type share, since a compiler may take it that others never do.
"""

from typing import NamedTuple

from spikernel_jax.embedded.program import Buffer, Fire, Instruction, Program


class Layout(NamedTuple):
    """Where everything is.

    Attributes:
      offsets: of each buffer that is not kept, in values of its type's arena.
      arenas: values that each type's arena holds.
      kept: bytes of what lives from one time step to the next.
    """

    offsets: dict[str, int]
    arenas: dict[str, int]
    kept: int

    @property
    def written(self) -> int:
        """Bytes of all buffers."""
        return self.kept + sum(SIZES[kind] * count for kind, count in self.arenas.items())


SIZES = {"uint32_t": 4, "int8_t": 1, "int16_t": 2, "int32_t": 4}


_KINDS = ((1, "uint32_t"), (8, "int8_t"), (16, "int16_t"), (32, "int32_t"))  # the most bits that each has room for


def kind_of(buffer: Buffer) -> str:
    """The C type of a buffer: spikes are bits of words."""
    return next(kind for most, kind in _KINDS if buffer.bits <= most)


def length_of(buffer: Buffer) -> int:
    """How many values of that type it has."""
    height, width, channels = buffer.shape
    return height * width * (-(-channels // 32) * buffer.most if buffer.spiking else channels)


def lay_out(program: Program) -> Layout:
    """Finds a place for every buffer, the largest first, each as low as what is alive with it lets."""
    buffers, alive = program.buffers, _lifetimes(program)
    offsets: dict[str, int] = {}
    arenas: dict[str, int] = {}
    for name in sorted(alive, key=lambda own: -length_of(buffers[own])):
        size, kind, (born, dies) = length_of(buffers[name]), kind_of(buffers[name]), alive[name]
        taken = sorted(
            (offsets[other], offsets[other] + length_of(buffers[other]))
            for other in offsets
            if kind_of(buffers[other]) == kind and alive[other][0] <= dies and born <= alive[other][1]
        )
        at = 0
        for begin, end in taken:
            if begin - at >= size:
                break
            at = max(at, end)
        offsets[name] = at
        arenas[kind] = max(arenas.get(kind, 0), at + size)
    kept = sum(SIZES[kind_of(own)] * length_of(own) for own in buffers.values() if own.kept)
    return Layout(offsets, arenas, kept)


def _lifetimes(program: Program) -> dict[str, tuple[int, int]]:
    """First and last instruction at which each buffer that is not kept is needed, the image and the logits apart.

    What is made before the time steps and read in them is alive until the last of them.
    """
    order: list[Instruction] = [*program.once, *program.step, *program.end]
    first, last = len(program.once), len(program.once) + len(program.step) - 1
    alive: dict[str, tuple[int, int]] = {}
    for at, own in enumerate(order):
        for name in {own.source, own.target} | ({own.state} if isinstance(own, Fire) else set()):
            if program.buffers[name].kept or name in ("image", "logits"):
                continue
            born, _ = alive.get(name, (at, at))
            alive[name] = (born, max(at, last) if born < first <= at else at)
    return alive
