"""The options of the four steps: as a script gives them, as the run folder remembers them, else the preset's.

They live in ``options.json`` of the run folder. A later script that does not give an option takes it from there; one
that gives another value is refused, so no two settings mix in one folder.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from spikernel_jax.cells.kernels import Kernel, in_order, kernel_set, kernel_set_text, operation_of
from spikernel_jax.cells.space import CellSpace
from spikernel_jax.io.units import format_bytes, parse_bytes
from spikernel_jax.pipeline.presets import Preset
from spikernel_jax.scoring.fidelity import NAMES
from spikernel_jax.search.queue import STRATEGIES, NothingFitsError, memory_of
from spikernel_jax.snn.devices import NO_LIMIT, Budget, device_of
from spikernel_jax.training.recipe import DEFAULT_RECIPE, RECIPES

KEEP = ("rule", "all")
_MOST_SAMPLES = 1_000_000  # a set of two sizes has 4,243 distinct cells
_LARGEST_SET = 6
_READ_BY = {
    "samples": ("random",),
    "fidelity": ("exhaustive", "random"),
    "search_epochs": ("trainings",),
    "search_seconds": ("trainings",),
}
_KNOWN = {"keep": KEEP, "strategy": STRATEGIES, "fidelity": NAMES, "recipe": tuple(RECIPES)}


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """What the four steps of a run are to do.

    Attributes:
      kernel_sizes: of step 1; empty where operations are given.
      operations: what an edge may hold, instead of kernel sizes; empty is zero, skip, convolutions and average pooling.
      cell: of step 1, with convK for the convolutions, in whose place the others stand in turn.
      sets: kernel sets of step 2; None takes all pairs of the sizes.
      keep: which of them are searched, of `KEEP`.
      strategy: of the search, of `queue.STRATEGIES`.
      samples: draws a set of the random strategy.
      fidelity: that exhaustive and random search score at, of `fidelity.NAMES`.
      search_epochs: budget of the trainings strategy.
      search_seconds: the same in seconds; 0 leaves it to the epochs.
      memory_budget: bytes that the chosen model may take.
      device: whose limits it must keep to, of `snn.devices`; empty for none.
      bits: width of weights, membranes and activations on the device.
      recipe: how networks are trained, of `recipe.RECIPES`.

    Raises:
      ValueError: naming the option, its value and what would be right.
    """

    kernel_sizes: tuple[int, ...]
    operations: tuple[str, ...]
    cell: str
    sets: tuple[tuple[Kernel, ...], ...] | None
    keep: str
    strategy: str
    samples: int
    fidelity: str
    search_epochs: int
    search_seconds: float
    memory_budget: int
    device: str
    bits: int
    recipe: str

    def __post_init__(self) -> None:
        """Refuses what the steps would only find out after work was done."""
        if self.operations and self.kernel_sizes:
            raise ValueError(f"--kernel-sizes {_text(self.kernel_sizes)}: leave them out where --operations are given")
        impact_genotypes(self.space, self.cell)
        if not 1 <= self.bits <= 64:
            raise ValueError(f"--bits {self.bits} must be from 1 to 64")
        if self.device and not 2 <= self.bits <= 8:
            raise ValueError(f"--bits {self.bits} must be from 2 to 8 with --device {self.device}")
        _ = self.budget
        for name, known in _KNOWN.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"--{name} {value!r} is unknown; known: {', '.join(known)}")
        if not 1 <= self.samples <= _MOST_SAMPLES:
            raise ValueError(f"--samples {self.samples} must be at least 1, and at most {_MOST_SAMPLES:,}")
        if not 1 <= self.search_epochs <= _MOST_SAMPLES:
            raise ValueError(f"--search-epochs {self.search_epochs} must be from 1 to {_MOST_SAMPLES:,}")
        if not 0 <= self.search_seconds < math.inf:
            raise ValueError(f"--search-seconds {self.search_seconds} must be a number of at least 0")
        if self.sets is None:
            return
        for own in self.sets:
            if len(own) > _LARGEST_SET:
                raise ValueError(
                    f"--sets {_text((own,))}: want at most {_LARGEST_SET} kernels in a set, to list its cells"
                )
        if len(set(self.sets)) < len(self.sets):
            raise ValueError(f"--sets {_text(self.sets)}: one of them comes twice")
        if missing := in_order({*itertools.chain.from_iterable(self.sets)} - {*self.space.kernels}):
            option = "--operations" if self.operations else "--kernel-sizes"
            there = f"{option} {_text(self.operations or self.kernel_sizes)} lacks {_text(list(missing))}"
            raise ValueError(f"--sets {_text(self.sets)}: {there}; add them there")

    @property
    def budget(self) -> Budget:
        """What the chosen model may take."""
        return Budget(self.memory_budget, self.bits, device_of(self.device) if self.device else None)

    @property
    def space(self) -> CellSpace:
        """What all cells of the run are of."""
        return CellSpace(operations=self.operations) if self.operations else CellSpace(self.kernel_sizes)

    def check_search(self, data: str, preset: Preset) -> None:
        """Raises ValueError where a search on a data set could find no cell."""
        if self.sets is None and len(self.kernel_sizes) < 2:
            raise ValueError(f"--kernel-sizes {_text(self.kernel_sizes)}: one size makes no pairs; give two, or --sets")
        least = min(  # the smallest cell has one kernel, or none
            int(memory_of(preset.network(data, space), space.enumerate(), self.bits).min())
            for space in (self.space.restricted([kernel]) for kernel in self.space.kernels)
        )
        if least > self.memory_budget:
            raise NothingFitsError(
                f"no cell fits --memory-budget {format_bytes(self.memory_budget)} at {self.bits} bits: the smallest "
                f"takes {format_bytes(least)}"
            )

    def as_json(self) -> dict[str, Any]:
        """By name, as JSON gives them back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


NAMES_OF_OPTIONS = tuple(field.name for field in dataclasses.fields(StepOptions))


def impact_genotypes(space: CellSpace, cell: str) -> dict[Kernel, np.ndarray]:
    """The cell of step 1 with each kernel of a space.

    Raises:
      ValueError: if the space has none, or the cell is malformed, disconnected, or without convK.
    """
    if "convK" not in cell:
        raise ValueError(f"--cell {cell!r} has no convK: want explicit notation as '0>1:convK 1>3:convK 0>3:skip'")
    if not space.kernels:
        raise ValueError(f"--operations {_text(space.operations)}: want at least one that is generic, such as conv3")
    rows = {k: space.parse(cell.replace("convK", operation_of(k))) for k in space.kernels}
    kernel, first = next(iter(rows.items()))
    if (live := space.prune(first[None])[0]).tolist() != first.tolist():
        kept = space.explicit(live).replace(operation_of(kernel), "convK")
        raise ValueError(f"--cell {cell!r} has edges that lead nowhere: what is left of it is {kept!r}")
    return rows


def resolve(
    given: Mapping[str, Any], there: Mapping[str, Any], preset: Preset, *, override: bool = False
) -> StepOptions:
    """What a run's steps do: as given, else as remembered, else by default.

    Args:
      given: by name; None and nothing at all are not given. Kernel sets and amounts of memory may be texts.
      there: remembered by earlier scripts of the same run, from JSON.
      preset: gives the defaults.
      override: let what is given differ from what is remembered.

    Raises:
      ValueError: if an option is given that an earlier script ran with another value of, or is wrong.
    """
    given, there = _read({k: v for k, v in given.items() if v is not None and v != ()}), _read(there)
    for name, value in given.items():
        if not override and there.get(name, value) != value:
            raise ValueError(
                f"--{name.replace('_', '-')} {_text(value)} differs from this run's {_text(there[name])}: "
                "choose another --out"
            )
    if given.get("device", before := there.get("device", "")) != before:  # it is a budget of its own
        there.pop("memory_budget", None)
    chosen = there | given
    options = StepOptions(**_defaults(preset, chosen) | chosen)
    for name in _READ_BY.keys() & given.keys():
        if options.strategy not in _READ_BY[name]:
            raise ValueError(
                f"--{name.replace('_', '-')} {_text(given[name])}: --strategy {options.strategy} does not read it; "
                f"leave it out, or give --strategy {' or '.join(_READ_BY[name])}"
            )
    return options


def _defaults(preset: Preset, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Every option as the preset has it, where what is chosen leaves it free."""
    sets = chosen.get("sets") or ()
    named = {kernel for kernel in itertools.chain.from_iterable(sets) if isinstance(kernel, int)}
    sizes = chosen.get("kernel_sizes") or tuple(sorted({*preset.kernel_sizes, *named}))
    ours = tuple(kernel_set for kernel_set in preset.sets or () if set(kernel_set) <= set(sizes))
    of_operations = {}
    if operations := chosen.get("operations"):  # all of them are one set, unless sets are given
        kernels = CellSpace(operations=operations).kernels
        of_operations = {"kernel_sizes": (), "sets": (in_order(kernels),) if kernels else None}
    return {
        "kernel_sizes": sizes,
        "operations": (),
        "cell": preset.impact_cell,
        "sets": ours if preset.sets and len(ours) == len(preset.sets) else None,
        "keep": preset.keep,
        "strategy": STRATEGIES[0],
        "samples": 1000,
        "fidelity": NAMES[0],
        "search_epochs": preset.search_epochs,
        "search_seconds": 0.0,
        "memory_budget": NO_LIMIT if chosen.get("device") else parse_bytes(preset.memory_budget),
        "device": "",
        "bits": preset.bits,
        "recipe": DEFAULT_RECIPE,
    } | of_operations


def _read(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with texts read and lists as tuples."""
    if unknown := sorted(options.keys() - {*NAMES_OF_OPTIONS}):
        raise ValueError(f"options {unknown} are unknown; known: {', '.join(NAMES_OF_OPTIONS)}")
    read = dict(options)
    if read.get("sets") is not None:
        read["sets"] = tuple(kernel_set(s, "--sets") if isinstance(s, str) else tuple(s) for s in read["sets"])
    if "kernel_sizes" in read:
        read["kernel_sizes"] = tuple(sorted(read["kernel_sizes"]))
    if "operations" in read:
        read["operations"] = CellSpace(operations=read["operations"]).operations if read["operations"] else ()
    if "memory_budget" in read:
        read["memory_budget"] = parse_bytes(read["memory_budget"])
    return read


def _text(value: Any) -> str:
    """An option's value as it is given: 1 3 5, or 1,3 3,5."""
    if not isinstance(value, list | tuple):
        return str(value)
    return " ".join(kernel_set_text(part) if isinstance(part, tuple) else str(part) for part in value)
