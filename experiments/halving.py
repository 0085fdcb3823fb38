"""Does successive halving find what the complete full-size ranking finds?

    python experiments/halving.py --data cifar10 --data-dir DIR      # sets 1,3 and 3,5: about 15 minutes on 2 cores

Searches each set twice, by halving and by scoring every cell at full fidelity, on the same draws, and says where
halving's choice stands in the complete ranking. Leaves tables/halving.parquet and report.md in the run folder.
Killed, it goes on where it was.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from spikernel_jax.cells import kernels
from spikernel_jax.io.run_folder import RunFolder
from spikernel_jax.pipeline import cli, search
from spikernel_jax.pipeline.job import open_job
from spikernel_jax.report import pages, search_figures

if TYPE_CHECKING:
    import polars as pl

RANKINGS: dict[str, dict[str, Any]] = {
    "halving": {"strategy": "halving"},
    "complete": {"strategy": "exhaustive", "fidelity": "full"},
}


@dataclasses.dataclass(frozen=True)
class Options(cli.Shared, cli.BudgetOptions):
    """Options of the comparison."""

    sets: tuple[str, ...] = ("1,3", "3,5")
    """Kernel sets, each searched by itself."""


def compare(options: Options) -> "pl.DataFrame":
    """Searches every set both ways, and compares."""
    import polars as pl

    if not options.sets:
        raise ValueError("--sets: give at least one, as 3,5")
    data, preset = options.data or "mnist5k", options.preset or "cpu"
    out = options.out or Path("runs") / f"halving-{Path(data).name}-{preset}"
    settings = {"data": data, "preset": preset, "seed": options.seed, "bits": options.bits, "sets": options.sets,
                "memory_budget": options.memory_budget}  # fmt: skip
    run = RunFolder.create(out, settings)
    rows, source = [], ""
    for kernel_set in options.sets:
        sizes = kernels.size_set(kernel_set, "--sets")
        found, seconds = {}, {}
        for name, choice in RANKINGS.items():
            job = open_job(
                out / f"{name}-{'-'.join(map(str, sizes))}",
                data=data,
                preset=preset,
                seed=options.seed,
                data_dir=options.data_dir,
                given={"bits": options.bits, "memory_budget": options.memory_budget} | choice,
                say=cli.say,
                searches=True,
            )
            with job.run.lock():
                found[name] = search.search_sets(job, [sizes])
            seconds[f"seconds_{name}"] = job.run.read_json("summary.json")["seconds"]["search"]
            source = job.data.source
        both = found["halving"].join(found["complete"].select("genotype", full_score="score"), on="genotype")
        path = run.folder("figures") / f"halving-{'-'.join(map(str, sizes))}.png"
        search_figures.halving_figure(both, path, f"{data}, set {kernel_set}, n = {len(both)} cells that fit")
        rows.append({"kernel_set": kernel_set, **agreement(found["halving"], found["complete"]), **seconds})
    table = pl.DataFrame(rows)
    run.write_table("halving", table)
    run.update_summary(halving=rows)
    text = pages.markdown_table(table, table.columns)
    pages.write_report(run, [("Data", source), ("Halving's choice in the complete full-size ranking", text)])
    return table


def agreement(halving: "pl.DataFrame", complete: "pl.DataFrame") -> dict[str, Any]:
    """Where halving's choice stands among the cells that fit, by the complete ranking's score."""
    import polars as pl

    complete = complete.filter(pl.col("fits") & pl.col("score").is_finite()).sort("score", descending=True)
    names = complete["genotype"].to_list()
    chosen = halving.filter(pl.col("finalist"))["genotype"][0]
    low = dict(zip(halving["genotype"], halving["first_score"], strict=True))
    tau, _ = stats.kendalltau([low[name] for name in names], complete["score"].to_numpy())
    at_full = set(halving.filter(pl.col("fidelity") == "full")["genotype"])
    past_low = set(halving.filter(pl.col("fidelity") != "low")["genotype"])
    top = names[: max(1, len(names) // 100)]
    scores = complete["score"].to_numpy()
    return {
        "cells": len(names),
        "rank_of_halvings_choice": names.index(chosen) + 1,
        "score_lost": float(scores[0] - scores[names.index(chosen)]),
        "score_sd": float(np.std(scores)),
        "tau_low_full": float(tau),  # pyright: ignore[reportArgumentType]
        "top_hundredth_past_low": len(past_low & set(top)) / len(top),
        "top_hundredth_at_full": len(at_full & set(top)) / len(top),
        "scored_at_full": len(at_full),
    }


def main(options: Options) -> None:
    """Compares, and prints the table."""
    table = compare(options)
    cli.show(pages.markdown_table(table, table.columns))


if __name__ == "__main__":
    cli.main(Options, main, __doc__ or "")
