"""The ways of scoring side by side at each fidelity: candidates a second, against the ceiling, and launches."""

import dataclasses
from collections import Counter
from typing import Any

import jax

import trace_parts
from bench_common import Bench, Settings, parse_set, representative, say, table
from spikernel_jax.scoring.fidelity import FIDELITIES, NAMES, Fidelity
from spikernel_jax.scoring.scorer import METHODS
from spikernel_jax.snn.spec import NetworkSpec
from work import necessary_work

_SECONDS = 30.0  # of one method at one fidelity: fewer candidates are timed where they take longer
_FULL = {"cpu": (32, 64), "other": (128, 256)}  # width and batch of full fidelity, T = 5, 32x32 images
_OF_METHOD = {
    "shared": ("jit_prepare", "jit_score_groups"),
    "batched": ("jit_prepare", "jit_tile_groups"),
    "each": ("jit_score_each",),
}
_ALL = 20_005  # distinct forward cells of all pairs of 1, 3, 5, 7


def measure_methods(settings: Settings) -> tuple[dict[str, Any], str]:
    """Every method at low, medium and full fidelity, on whole groups of the first set, in turns."""
    options = settings.options
    space, platform = parse_set(options.sets[0]), settings.devices[0].platform
    width, batch = _FULL["cpu" if platform == "cpu" else "other"]
    full = settings.network(space, width)
    entries: list[dict[str, Any]] = []
    for name, fidelity in zip(NAMES, FIDELITIES, strict=True):
        fidelity = dataclasses.replace(fidelity, batch=batch) if fidelity == Fidelity() else fidelity
        spec = fidelity.network(full)
        given = dataclasses.replace(
            options, batch=min(fidelity.batch, options.batch) if options.quick else fidelity.batch
        )
        sized = settings._replace(options=given)
        entries += _in_turns(sized, spec, name, _cells(sized, spec))
    again = settings.measured_again()
    for entry in entries:
        entry["of_matmul"] = entry["flops_per_s"] / again.ceiling(entry["precision"])
    return {"methods": entries, "ceilings": again.ceilings._asdict()}, _text(again, options.sets[0], entries)


def _cells(settings: Settings, spec: NetworkSpec) -> int:
    """So many candidates as a tenth of the ceiling does in the time of one method."""
    everything = spec.space.enumerate()
    flops = necessary_work(spec, everything, settings.options.batch).flops / len(everything)
    able = int(_SECONDS / 4 * 0.1 * settings.ceilings.float32 / flops)
    return max(8, min(able, 16 * settings.options.cells))


def _in_turns(settings: Settings, spec: NetworkSpec, name: str, cells: int) -> list[dict[str, Any]]:
    options, rows = settings.options, representative(spec, cells, settings.options.seed)
    jax.clear_caches()  # of two programs of one name the profile could not tell
    benches = {method: Bench(settings, spec, rows, method=method) for method in METHODS}
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for _ in range(options.repeats):
        for method, bench in benches.items():
            seconds[method] += bench.seconds(1)
    entries = []
    for method, bench in benches.items():
        best = min(seconds[method])
        programs = trace_parts.live_programs(settings.devices[0], _OF_METHOD[method])
        launched = trace_parts.launches(trace_parts.profile(bench.run)[0], programs) / len(rows)
        opcodes = Counter(instruction.opcode for own in programs.values() for instruction in own.values())
        entries.append(
            {
                "fidelity": name, "method": method, "channels": spec.channels, "batch": options.batch,
                "time_steps": spec.time_steps, "side": spec.image_shape[0], "cells": len(rows),
                "precision": bench.scorer.precision, "lanes": bench.scorer.lanes, "tile": bench.scorer.tile,
                "seconds": seconds[method], "best_s": best, "cells_per_s": len(rows) / best,
                "flops_per_s": bench.work.flops / best, "waste": waste(bench), "launches_a_cell": launched,
                "conditionals": opcodes["conditional"], "loops": opcodes["while"], "compile_s": bench.compile_seconds,
                "all_s_extrapolated": _ALL * best / len(rows),
            }
        )  # fmt: skip
        say(f"methods: {name}, {method}: {entries[-1]['cells_per_s']:.1f} cells/s")
    return entries


def waste(bench: Bench) -> float:
    """Convolutions' computed over necessary FLOPs, less 1: those of the transition of a last tile's empty places.

    Operations of edges are computed for the candidates alone that hold them.
    """
    spec, tile = bench.spec, bench.scorer.tile
    empty = sum(-len(part) % tile for part in bench.parts)
    h, w = spec.cell_size(0)
    each = 2 * spec.fixed_layers()["transition.conv"].weights * h * w * spec.time_steps * bench.batch
    return empty * each / bench.work.convolution


def _text(settings: Settings, sizes: str, entries: list[dict[str, Any]]) -> str:
    header = (
        "fidelity", "method", "C", "B", "T", "side", "cells timed", "tile", "cells/s", "of matmul ceiling", "waste",
        "launches a cell", "conditionals", "loops", "compile s", f"{_ALL:,} cells, extrapolated s",
    )  # fmt: skip
    rows = [
        (
            e["fidelity"], e["method"], e["channels"], e["batch"], e["time_steps"], e["side"], e["cells"], e["tile"],
            e["cells_per_s"], f"{100 * e['of_matmul']:.1f} %", f"{100 * e['waste']:.1f} %", e["launches_a_cell"],
            e["conditionals"], e["loops"], e["compile_s"], e["all_s_extrapolated"],
        )
        for e in entries
    ]  # fmt: skip
    return (
        f"### Methods\n\nSizes {sizes}, one replicate, {entries[0]['lanes']} lanes, {entries[0]['precision']}; methods "
        f"in turns, the best of {len(entries[0]['seconds'])}. Ceiling of products "
        f"{settings.ceiling(entries[0]['precision']) / 1e9:,.0f} GFLOP/s. Launches are a profile's events of the "
        "device, conditionals and loops those in the text of the compiled programs; waste are FLOPs of convolutions "
        f"beside the necessary ones.\n\n{table(header, rows)}"
    )
