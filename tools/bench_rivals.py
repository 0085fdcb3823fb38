"""The scoring benchmark's peers: the public way in PyTorch, and the same score under `jax.vmap`."""

import importlib
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import peers
from bench_common import Bench, Rows, Settings, representative, say, seconds_of, table
from spikernel_jax.cells.space import CellSpace
from spikernel_jax.scoring import scores
from spikernel_jax.snn.spec import NetworkSpec
from work import necessary_work

REFERENCE_SAMPLES = 5000  # SNASNet's random search
REFERENCE_HIDDEN = 1024  # hidden neurons of its head on CIFAR-10


def measure_peers(settings: Settings) -> tuple[dict[str, Any], str]:
    """Ours against the public way and against vmap, in turns."""
    jax.clear_caches()
    options = settings.options
    spec = settings.network(CellSpace((1, 3)), head="snasnet", head_hidden=REFERENCE_HIDDEN)
    cells = spec.space.enumerate()
    whole = representative(spec, options.cells, options.seed)
    sampled = spec.space.sample(jax.random.key(options.seed), options.rounds * options.peer_cells)
    bench = Bench(settings, spec, whole, score="sahd_code", chunk=max(len(whole), len(sampled)))
    skipped = peers.missing()
    if skipped:
        say(f"peers: {skipped}")
    else:  # torch's own choice of threads depends on the machine's load
        importlib.import_module("torch").set_num_threads(os.cpu_count())
    rounds, first_vmap = _rounds(settings, bench, sampled, with_torch=not skipped)
    totals = {name: sum(times[name] for times in rounds) for name in rounds[0]}
    scale = necessary_work(spec, cells, options.batch).flops / bench.work.flops
    ranking = totals["whole"] / options.rounds * scale
    entry: dict[str, Any] = {
        "channels": spec.channels,
        "batches": 2,
        "hidden": REFERENCE_HIDDEN,
        "cells_a_round": {
            "sampled": len(sampled),
            "peer": options.peer_cells,
            "whole": len(whole),
            "vmap": options.vmap_cells,
        },
        "rounds_s": rounds,
        "compile_s": bench.compile_seconds,
        "vmap_first_call_s": first_vmap,
        "vmap_ratio": totals["vmap"] / totals["vmap_cells"],
        "ranked_cells": len(cells),
        "ranking_s_extrapolated": ranking,
        "skipped": skipped,
    }
    if not skipped:
        a_candidate = totals["peer"] / len(sampled)
        ours = totals["sampled"] / options.rounds / len(sampled)
        entry |= {
            "peer": peers.describe(),
            "peer_s_a_candidate": a_candidate,
            "same_cells_ratio": a_candidate / ours,
            "same_cells_ratio_by_round": [
                times["peer"] / options.peer_cells / (times["sampled"] / len(sampled)) for times in rounds
            ],
            "whole_groups_ratio": a_candidate / (totals["whole"] / options.rounds / len(whole)),
            "reference_s_extrapolated": REFERENCE_SAMPLES * a_candidate,
            "search_ratio": REFERENCE_SAMPLES * a_candidate / ranking,
        }
    return entry, _text(settings, entry, totals)


def _rounds(
    settings: Settings, bench: Bench, sampled: Rows, *, with_torch: bool
) -> tuple[list[dict[str, float]], float]:
    """Seconds of each round by what ran, and of vmap's first call.

    In a round ours scores all that the sampler drew, and PyTorch its share of them, both two batches.
    """
    options, spec = settings.options, bench.spec
    parts = bench.cut(sampled[bench.scorer.order(sampled)], bench.scorer.lanes)
    few = bench.rows[np.linspace(0, len(bench.rows) - 1, options.vmap_cells).astype(int)]
    few_parts = bench.cut(few, bench.scorer.lanes)
    bank, images = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), bench.bank), jnp.asarray(bench.images[0])
    naive = jax.jit(_naive_scores, static_argnums=0)

    def vmapped() -> float:
        return seconds_of(lambda: naive(spec, few, bank, images).block_until_ready())

    first = vmapped()
    if with_torch:
        peers.snasnet_scores(sampled[:1], bench.images, spec)  # torch's warm-up
    rounds = []
    for share in np.split(sampled, options.rounds):
        times = {"sampled": sum(seconds_of(lambda: bench.run(parts)) for _ in range(2))}
        if with_torch:
            result = peers.snasnet_scores(share, bench.images, spec)
            times["peer"] = float(result.seconds.sum())
            ours = bench.run([share])[0]["lif_calls"]
            if (ours != result.lif_calls).any():
                raise RuntimeError(f"LIF calls differ: ours {ours.tolist()}, the peer's {result.lif_calls.tolist()}")
        times["whole"] = sum(bench.seconds(2))
        times["vmap_cells"] = seconds_of(lambda: bench.run(few_parts))
        times["vmap"] = vmapped()
        rounds.append(times)
        say("peers: " + ", ".join(f"{name} {value:.2f} s" for name, value in times.items()))
    return rounds, first


def _naive_scores(spec: NetworkSpec, rows: jax.Array, bank: Any, images: jax.Array) -> jax.Array:
    """What one would write first: the score of one candidate, under vmap."""
    return jax.vmap(lambda row: scores.sahd_code(scores.spike_terms(spec, row, bank, images)[0]))(jnp.asarray(rows))


def _text(settings: Settings, entry: dict[str, Any], totals: dict[str, float]) -> str:
    options = settings.options
    counts = {name: options.rounds * cells for name, cells in entry["cells_a_round"].items()}

    def row(label: str, cells: str, timed: str, batches: int, ratio: str = "") -> tuple[Any, ...]:
        return label, counts[cells], batches, counts[cells] / totals[timed], ratio

    rows = [row("ours, the peer's cells", "sampled", "sampled", 2)]
    if not entry["skipped"]:
        ratio = f"{entry['same_cells_ratio']:.1f} (whole groups: {entry['whole_groups_ratio']:.1f})"
        rows.append(row("PyTorch, spikingjelly", "peer", "peer", 2, ratio))
    rows += [
        row("ours, whole groups", "whole", "whole", 2),
        row("ours, cells of vmap", "vmap", "vmap_cells", 1),
        row("naive vmap, one device", "vmap", "vmap", 1, f"{entry['vmap_ratio']:.1f}"),
    ]
    header = ("", "candidates", "batches", "candidates/s", "ours is faster by")
    text = (
        f"### Peers\n\nSizes 1,3, C = {entry['channels']}, B = {options.batch}, T = {options.time_steps}, SNASNet's "
        f"head with {entry['hidden']} hidden neurons, score sahd_code, the same cells and images; {options.rounds} "
        f"rounds in turns. {entry['skipped'] or 'Both count the same LIF calls.'}\n\n{table(header, rows)}"
    )
    if entry["skipped"]:
        return text
    peer = entry["peer"]
    return text + (
        f"\n\nTime to search, both extrapolated: {REFERENCE_SAMPLES:,} samples in PyTorch "
        f"{entry['reference_s_extrapolated']:,.0f} s, from {counts['peer']} of them; the complete ranking of "
        f"{entry['ranked_cells']:,} cells by ours {entry['ranking_s_extrapolated']:,.0f} s, by FLOPs from whole groups "
        f"(compilation, {entry['compile_s']:.0f} s, apart): **{entry['search_ratio']:.1f} times** less. PyTorch "
        f"{peer['torch']}, spikingjelly {peer['spikingjelly']}, {peer['threads']} threads, on {peer['device']}."
    )
