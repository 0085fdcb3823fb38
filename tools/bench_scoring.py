"""Benchmarks of the scoring engine: how near the machine's limit, where the rest goes, against whom, how it scales.

Use: ``python tools/bench_scoring.py --json bench.json`` (about 12 minutes on two cores), or with ``--quick`` (within 2
minutes, at a smaller batch: shows that everything runs, and roughly what comes out). Tables go to stdout, progress to
stderr.

- limit: seconds of ranking whole groups of candidates (`work.necessary_work` of exactly these) against the ceilings of
  matrix products and memory that the same run measures. What a replicate shares is computed in each call, and counted.
- parts: the device time of one such call, by part of the network, from a profile.
- peers: the public way in PyTorch (`peers`; skipped where it is not installed), and the same score under `jax.vmap`,
  in turns with ours.
- methods (``--methods``, alone): the ways of scoring side by side at low, medium and full fidelity.
- scaling: over candidates, and over lanes (devices; each CPU core is shown to JAX as one).

Compilation is timed apart: the first call of a program, with one candidate a lane, less the second. Times of calls are
the best of some; medians stand beside them. Images are normal noise: no time depends on what they show.
"""

import dataclasses
import os
import statistics
import time
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

import ceilings
import trace_parts
from bench_common import (
    PROGRAMS,
    Bench,
    Settings,
    filled,
    parse_set,
    random_bank,
    report,
    representative,
    say,
    seconds_of,
    table,
)
from bench_methods import measure_methods
from bench_rivals import measure_peers
from spikernel_jax.cells.space import CellSpace
from spikernel_jax.pipeline import cli
from spikernel_jax.scoring.fidelity import FIDELITIES
from spikernel_jax.scoring.population import score_population
from spikernel_jax.snn.spec import NetworkSpec
from work import necessary_work

Section = Literal["limit", "parts", "peers", "scaling"]
LOW = FIDELITIES[0]
SCALING = LOW.network(
    NetworkSpec((32, 32, 3), 10, CellSpace((1, 3, 5, 7), max_kernel_sizes=2), channels=32, time_steps=5)
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured; options of default None have two defaults, the second that of --quick."""

    json: Path | None = None
    """Results as JSON, written anew after each section."""
    quick: bool = False
    """Takes the quick defaults."""
    methods: bool = False
    """Measures nothing but the methods, side by side at three fidelities, on the first set."""
    sections: tuple[Section, ...] = ("limit", "parts", "peers", "scaling")
    """What is measured."""
    sets: tuple[str, ...] | None = None
    """Kernel sets; of more than two sizes, all pairs of them (3,5 1,3 1,3,5,7; quick 3,5 1,3)."""
    channels: int = 32
    """C."""
    widths: tuple[int, ...] | None = None
    """Other widths of the limit, for sets of two sizes (8 16 64; quick none)."""
    batch: int | None = None
    """Images B (64; quick 16)."""
    time_steps: int = 5
    """T."""
    side: int = 32
    """Height and width of images."""
    cells: int | None = None
    """About how many candidates a timed call ranks, as whole groups (40; quick 32); more at narrower widths."""
    repeats: int | None = None
    """Timed calls (3; quick 2)."""
    peer_cells: int | None = None
    """Candidates a round that the PyTorch peer scores (12; quick 2)."""
    vmap_cells: int = 2
    """Candidates a round under vmap."""
    rounds: int | None = None
    """Rounds of the peers (3; quick 1)."""
    counts: tuple[int, ...] | None = None
    """Candidates of the scaling, 0 for all (100 1000 0; quick 200 800)."""
    matmul_side: int | None = None
    """Of the matrices of the ceilings (3072 on a CPU, else 8192; quick 2048)."""
    bandwidth_mb: int = 256
    """Of the array whose passes give the bandwidth, on each device."""
    seed: int = 0
    """Of weights, images, and which groups and cells are taken."""


_DEFAULTS: dict[str, tuple[Any, Any]] = {  # full, quick
    "sets": (("3,5", "1,3", "1,3,5,7"), ("3,5", "1,3")),
    "widths": ((8, 16, 64), ()),
    "batch": (64, 16),
    "cells": (40, 32),
    "repeats": (3, 2),
    "peer_cells": (12, 2),
    "rounds": (3, 1),
    "counts": ((100, 1000, 0), (200, 800)),
    "matmul_side": (None, 2048),
}


def resolved(options: Options, platform: str) -> Options:
    """Options with every default filled in; ValueError where a number is too small."""
    return filled(options, _DEFAULTS, platform, zero=("counts",))


def measure_limit(settings: Settings) -> tuple[dict[str, Any], str]:
    """Rates against ceilings, and the profile of the sets at the main width."""
    options = settings.options
    entries, profiles = [], []
    cases = [(text, options.channels) for text in options.sets]
    if "limit" in options.sections:
        pairs = [text for text in options.sets if len(parse_set(text).kernel_sizes) == 2]
        cases += [(text, width) for width in options.widths if width != options.channels for text in pairs]
    for text, width in cases:
        jax.clear_caches()  # of two programs of one name the profile could not tell
        spec = settings.network(parse_set(text), width)
        cells = options.cells * max(1, options.channels // width)  # narrow ones are soon done
        bench = Bench(settings, spec, representative(spec, cells, options.seed))
        seconds = bench.seconds(options.repeats if width == options.channels else min(options.repeats, 2))
        entries.append(_limit_entry(bench, text, seconds))
        say(f"limit: sizes {text}, C = {width}: {entries[-1]['flops_per_s'] / 1e9:.0f} GFLOP/s")
        if "parts" in options.sections and width == options.channels:
            profiles.append({"set": text, "channels": width} | _profile_entry(settings, bench, min(seconds)))
    again = settings.measured_again()
    for entry in entries:
        entry["of_matmul"] = entry["flops_per_s"] / again.ceiling(entry["precision"])
        entry["of_bandwidth"] = entry["bytes_per_s"] / again.ceilings.bandwidth
    for entry in profiles:
        rate = again.ceiling(entry["precision"]) / entry["lanes"]
        entry["of_matmul"] = {
            part: flops / seconds / rate if (seconds := entry["device_s"][part]) else None
            for part, flops in entry["flops"].items()
        }
    texts = [_limit_text(again, entries)] if "limit" in options.sections else []
    results = {"ceilings": again.ceilings._asdict(), "limit": entries, "parts": profiles}
    return results, "\n\n".join([*texts, *map(_profile_text, profiles)])


def _limit_entry(bench: Bench, text: str, seconds: list[float]) -> dict[str, Any]:
    work, best, cells = bench.work, min(seconds), bench.spec.space.enumerate()
    whole = necessary_work(bench.spec, cells, bench.batch)
    return {
        "set": text,
        "channels": bench.spec.channels,
        "cells": len(bench.rows),
        "precision": bench.scorer.precision,
        "method": bench.scorer.method,
        "work": work._asdict(),
        "flops": work.flops,
        "seconds": seconds,
        "best_s": best,
        "median_s": statistics.median(seconds),
        "cells_per_s": len(bench.rows) / best,
        "flops_per_s": work.flops / best,
        "bytes_per_s": work.bytes / best,
        "compile_s": bench.compile_seconds,
        "all_cells": len(cells),
        "all_s_extrapolated": best * whole.flops / work.flops,
    }


def _limit_text(settings: Settings, entries: list[dict[str, Any]]) -> str:
    limits, options = settings.ceilings, settings.options
    header = (
        "sizes", "C", "cells timed", "GFLOP per cell", "cells/s", "best s", "median s", "GFLOP/s",
        "of matmul ceiling", "of bandwidth", "compile s", "all cells", "all, extrapolated s",
    )  # fmt: skip
    rows = [
        (
            e["set"], e["channels"], e["cells"], e["flops"] / e["cells"] / 1e9, e["cells_per_s"], e["best_s"],
            e["median_s"], e["flops_per_s"] / 1e9, f"{100 * e['of_matmul']:.1f} %", f"{100 * e['of_bandwidth']:.1f} %",
            e["compile_s"], e["all_cells"], e["all_s_extrapolated"],
        )
        for e in entries
    ]  # fmt: skip
    return (
        f"### Limit\n\nB = {options.batch}, T = {options.time_steps}, {options.side}×{options.side} images, one "
        f"replicate, {len(settings.devices)} lanes, {entries[0]['precision']}. Ceilings, the best of those measured "
        f"before and after: matrix products {limits.float32 / 1e9:,.0f} GFLOP/s in float32, "
        f"{limits.bfloat16 / 1e9:,.0f} in bfloat16; memory {limits.bandwidth / 1e9:,.1f} GB/s. FLOPs and bytes are the "
        f"necessary ones. Times of all cells are extrapolated by FLOPs from the groups timed.\n\n{table(header, rows)}"
    )


def _profile_entry(settings: Settings, bench: Bench, untraced: float) -> dict[str, Any]:
    ours = trace_parts.live_programs(settings.devices[0], PROGRAMS)
    events, traced = trace_parts.profile(bench.run)
    parts, sources = trace_parts.device_seconds(events, ours)
    total = sum(parts.values())
    if not total:
        raise RuntimeError("the profile has no events of the scoring programs")
    work, lanes = bench.work, bench.scorer.lanes
    flops = {"convolution": work.convolution + work.stem, "lif": work.lif, "norm": work.norm, "pooling": work.pooling,
             "gram": work.gram, trace_parts.REST: work.sums}  # fmt: skip
    return {
        "precision": bench.scorer.precision,
        "lanes": lanes,
        "busy": total / lanes / traced,
        "traced_s": traced,
        "untraced_s": untraced,
        "device_s": dict(parts),
        "shares": {part: seconds / total for part, seconds in parts.items()},
        "flops": flops,
        "flop_shares": {part: flops[part] / work.flops for part in flops},
        "largest": [
            {"part": part, "source": source, "share": seconds / total}
            for (part, source), seconds in sources.most_common(25)
        ],
    }


def _profile_text(entry: dict[str, Any]) -> str:
    def percent(share: float | None) -> str:
        return "" if share is None else f"{100 * share:.1f} %"

    columns = ("shares", "flop_shares", "of_matmul")
    rows = [(part, *(percent(entry[column][part]) for column in columns)) for part in trace_parts.PARTS]
    return (
        f"### Parts: sizes {entry['set']}, C = {entry['channels']}\n\nDevice time of one traced call by part; lanes "
        f"were busy {100 * entry['busy']:.0f} % of its time. Node sums are in {trace_parts.REST!r}.\n\n"
        + table(("part", "device time", "necessary FLOPs", "of matmul ceiling within it"), rows)
    )


def measure_scaling(settings: Settings) -> tuple[dict[str, Any], str]:
    """Time over the number of candidates, and over lanes."""
    options, devices = settings.options, settings.devices
    jax.clear_caches()
    bank, rng = random_bank(SCALING, 1, options.seed), np.random.default_rng(options.seed)
    images = rng.normal(size=(1, LOW.batch, *SCALING.image_shape)).astype(np.float32)
    shuffled = rng.permutation(SCALING.space.enumerate())
    counts = []
    for count in options.counts:
        some = shuffled[: count or len(shuffled)]
        first, seconds = (  # few rows compile the program of all: parts of `score_population` have a few fixed sizes
            seconds_of(lambda rows=rows: score_population(rows, bank, images, SCALING, devices=devices))
            for rows in (some[:129], some)
        )
        entry = {"cells": len(some), "first_call_s": first, "seconds": seconds, "cells_per_s": len(some) / seconds}
        counts.append(entry)
        say(f"scaling: {len(some)} candidates in {seconds:.1f} s")
    spec = settings.network(parse_set(options.sets[0]))
    rows = representative(spec, options.cells, options.seed)
    lanes = []
    for number in sorted({2**i for i in range(len(devices).bit_length())} | {len(devices)}):
        jax.clear_caches()
        best = min(Bench(settings, spec, rows, lanes=number).seconds(min(options.repeats, 2)))
        lanes.append({"lanes": number, "seconds": best, "cells_per_s": len(rows) / best})
        say(f"scaling: {number} lanes {best:.2f} s")
    sizes = ", ".join(map(str, SCALING.space.kernel_sizes))
    return {"candidates": counts, "lanes": lanes}, (
        f"### Scaling\n\nCandidates of all pairs of {sizes}, drawn at random, by `score_population`: "
        f"low fidelity (C = {SCALING.channels}, B = {LOW.batch}, T = {SCALING.time_steps}, "
        f"{SCALING.image_shape[0]}×{SCALING.image_shape[1]} images), one replicate.\n\n"
        + table(("candidates", "s", "candidates/s"), [(c["cells"], c["seconds"], c["cells_per_s"]) for c in counts])
        + f"\n\nLanes: sizes {options.sets[0]}, C = {spec.channels}, B = {options.batch}, {len(rows)} candidates.\n\n"
        + table(("lanes", "s", "candidates/s"), [(e["lanes"], e["seconds"], e["cells_per_s"]) for e in lanes])
    )


def bench(options: Options) -> None:
    """Runs the sections, prints their tables, and writes the results."""
    began = time.perf_counter()
    jax.config.update("jax_enable_compilation_cache", False)  # compilation is measured
    # The engine runs a lane on each device, and XLA's CPU convolutions use one core each.
    jax.config.update("jax_num_cpu_devices", os.cpu_count())
    devices = jax.local_devices()
    options = resolved(options, devices[0].platform)
    for text in options.sets or ():
        parse_set(text)
    wanted: dict[str, Any] = {
        "": {"limit", "parts"} & {*options.sections} and measure_limit,
        "peers": "peers" in options.sections and measure_peers,
        "scaling": "scaling" in options.sections and measure_scaling,
    }
    if options.methods:
        wanted = {"": measure_methods}
    settings = Settings(options, devices, ceilings.Ceilings(0, 0, 0)).measured_again()
    sections = {name: measure for name, measure in wanted.items() if measure}
    report("Scoring benchmark", __file__, began, settings, sections)


if __name__ == "__main__":
    cli.main(Options, bench, __doc__ or "")
