"""SpiKernel's steps on a run folder: impact, kernel sets, training, trade-off; the search is `ranking`.

Each step reads what the one before it left, can be killed at any instant, and goes on where it was.
Selection uses validation images only; the test split is evaluated once for each finalist, at the end.

Source: Putra & Shafique, IEEE Embedded Systems Letters 17(3), 2025 (SpiKernel).
"""

import dataclasses
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spikernel_jax import cost, figures, report, tradeoff
from spikernel_jax.checkpoint import load_model, save_model
from spikernel_jax.files import read_jsonl
from spikernel_jax.genotype import CellSpace
from spikernel_jax.jobs import Job, Say, impact_genotypes, timed
from spikernel_jax.model import Model
from spikernel_jax.train import evaluate, measure_spikes, train

if TYPE_CHECKING:
    import polars as pl


def _epoch_line(say: Say, name: str, epochs: int) -> Callable[[dict[str, Any]], None]:
    def line(record: dict[str, Any]) -> None:
        say(
            f"  {name}  epoch {record['epoch']}/{epochs}  loss {record['train_loss']:.3f}  "
            f"train {100 * record['train_accuracy']:.1f} %  "
            f"validation {100 * record['validation_accuracy']:.1f} %  {record['seconds']:.1f} s"
        )

    return line


def measured(job: Job, model: Model) -> dict[str, Any]:
    """Parameters, memory, and what one validation image costs."""
    row = np.asarray(model.genotype, np.int8)
    total = cost.costs(model.spec, row[None], job.options["bits"])
    synops = cost.synaptic_operations(model.spec, row, measure_spikes(model, job.data.validation))
    return {
        "parameters": int(total.parameters[0]),
        "memory_bytes": int(total.memory_bytes[0]),
        "synops": synops,
        "energy_nj": cost.energy_nj(model.spec, synops),
    }


def impact(job: Job) -> "pl.DataFrame":
    """Step 1: the same cell with all its convolutions at each kernel size, over several seeds.

    Leaves ``tables/impact.parquet`` (a row for each size and seed; accuracy is validation accuracy) and
    ``figures/impact.png``.
    """
    import polars as pl

    started = time.perf_counter()
    preset, run = job.preset, job.run
    cell = job.options["cell"]
    space, genotypes = impact_genotypes(job.options["kernel_sizes"], cell)
    spec = preset.network(job.data.name, job.data.num_classes, space)
    config = preset.training(job.data.name, preset.impact_epochs, job.options["recipe"])
    rows = []
    job.remember("kernel_sizes", "cell", "bits", "recipe")
    job.say(
        f"step 1, impact: {cell!r}, K in {space.kernel_sizes}, {preset.impact_seeds} seeds, "
        f"recipe {job.options['recipe']}"
    )
    for (k, genotype), index in itertools.product(genotypes.items(), range(preset.impact_seeds)):
        seed = job.seed * 1000 + index
        name = f"k{k}-seed{seed}"
        folder = run.path / "impact" / name
        folder.mkdir(parents=True, exist_ok=True)
        model = train(spec, genotype, job.data, config, seed=seed, folder=folder, say=job.say)
        accuracy = float(model.metrics["validation_accuracy"])
        rows.append({"kernel_size": k, "seed": seed, "accuracy": accuracy, **measured(job, model)})
        job.say(f"  {name}  validation {100 * accuracy:.1f} %  ({len(rows)} of "
                f"{len(space.kernel_sizes) * preset.impact_seeds} trainings)")  # fmt: skip
    table = pl.DataFrame(rows)
    run.write_table("impact", table)
    title = f"Impact of the kernel size, {job.data.name}, n = {preset.impact_seeds} seeds"
    figures.impact_figure(table, run.folder("figures") / "impact.png", title)
    timed(job, "impact", started)
    return table


def kernel_sets(job: Job) -> list[tuple[int, ...]]:
    """Step 2: the sets worth searching, by the rule of `tradeoff.keep_sets`, or all.

    Returns:
      The kept sets; the verdicts go to ``summary.json``.

    Raises:
      ValueError: if the impact table is missing or damaged, or lacks a size of a set.
    """
    import polars as pl

    sets, keep = job.options["sets"], job.options["keep"]
    wanted = ("kernel_size", "accuracy", "memory_bytes")
    table = job.run.read_table("impact", "experiments/kernel_impact.py", wanted)
    sizes = sorted(set(table["kernel_size"].to_list()))
    named = [tuple(sorted(s)) for s in sets] if sets else list(itertools.combinations(sizes, 2))
    by_size = {k: table.filter(pl.col("kernel_size") == k) for k in sizes}
    n = min(len(part) for part in by_size.values())
    verdicts = tradeoff.keep_sets(
        sizes,
        named,
        {k: float(np.mean(part["accuracy"].to_numpy())) for k, part in by_size.items()},
        {k: float(np.std(part["accuracy"].to_numpy(), ddof=1)) if n > 1 else 0.0 for k, part in by_size.items()},
        {k: int(part["memory_bytes"][0]) for k, part in by_size.items()},
        n,
    )
    if keep == "all":
        verdicts = [v._replace(kept=True, reason="--keep all") for v in verdicts]
    job.say(f"step 2, kernel sets ({keep}):")
    for verdict in verdicts:
        job.say(f"  {verdict.kernel_set}  {'kept' if verdict.kept else 'dropped'}: {verdict.reason}")
    job.run.update_summary(kernel_sets=[{"set": v.kernel_set, "kept": v.kept, "reason": v.reason} for v in verdicts])
    return [v.kernel_set for v in verdicts if v.kept]


def train_finalists(job: Job) -> "pl.DataFrame":
    """Step 3, training: trains each set's finalist in full and exports it.

    Leaves ``finalists/<name>/`` (exported ``checkpoint``, ``metrics.jsonl``), ``tables/finalists.parquet``
    and ``figures/training.png``. A cell that won in several sets is trained once.
    """
    import polars as pl

    started = time.perf_counter()
    preset, run = job.preset, job.run
    wanted = ("kernel_set", "genotype", "score", "score_se", "finalist")
    table = run.read_table("search", "experiments/search.py", wanted).filter(pl.col("finalist"))
    config = preset.training(job.data.name, preset.finalist_epochs, job.options["recipe"])
    job.remember("bits", "recipe")
    job.say(f"step 3, training: {len(table)} finalists, {config.epochs} epochs each, recipe {job.options['recipe']}")
    names: dict[str, str] = {}
    trained: dict[str, dict[str, Any]] = {}
    rows = []
    for row in table.iter_rows(named=True):
        text = row["genotype"]
        if text not in names:
            names[text] = "k" + row["kernel_set"].replace(",", "-")
            folder = run.folder("finalists") / names[text]
            folder.mkdir(exist_ok=True)
            sizes = tuple(int(k) for k in row["kernel_set"].split(","))
            space = CellSpace(sizes)
            spec = preset.network(job.data.name, job.data.num_classes, space)
            job.say(f"  {names[text]}: {text}")
            model = train(
                spec,
                space.parse(text),
                job.data,
                config,
                seed=job.seed,
                folder=folder,
                progress=_epoch_line(job.say, names[text], config.epochs),
                say=job.say,
            )
            record = {"validation_accuracy": float(model.metrics["validation_accuracy"])}
            record |= {"test_accuracy": evaluate(model, job.data.test), **measured(job, model)}
            model = dataclasses.replace(
                model, metrics=model.metrics | record | {"source": job.data.source, "score": row["score"]}
            )
            save_model(folder / "checkpoint", model)
            trained[text] = record | {"checkpoint": f"finalists/{names[text]}/checkpoint"}
        rows.append({
            "name": names[text], "kernel_set": row["kernel_set"], "genotype": text,
            "score": row["score"], "score_se": row["score_se"], **trained[text],
        })  # fmt: skip
    finalists = pl.DataFrame(rows)
    run.write_table("finalists", finalists)
    curves = {name: read_jsonl(run.folder("finalists") / name / "metrics.jsonl") for name in names.values()}
    title = f"Training of the finalists, {job.data.name}"
    figures.training_figure(curves, run.folder("figures") / "training.png", title)
    timed(job, "training", started)
    return finalists


def choose_model(job: Job) -> "pl.DataFrame":
    """Step 4: accuracy against memory, the Pareto front, and the model chosen under the budget.

    Both use validation accuracy; test accuracy is only reported. Memory is counted at this job's bits,
    which need not be those of the search. Leaves ``tables/tradeoff.parquet``, ``figures/tradeoff.png``,
    `chosen` in ``summary.json``, and ``report.md``.

    Raises:
      tradeoff.NothingFitsError: one line, if no finalist fits.
    """
    import polars as pl

    started = time.perf_counter()
    run = job.run
    budget, bits = job.options["memory_budget"], job.options["bits"]
    wanted = ("name", "kernel_set", "genotype", "validation_accuracy", "test_accuracy", "parameters", "checkpoint")
    table = run.read_table("finalists", "experiments/train.py", wanted)
    memory = []
    for row in table.iter_rows(named=True):
        model = load_model(run.path / row["checkpoint"])
        memory.append(int(cost.costs(model.spec, np.asarray(model.genotype)[None], bits).memory_bytes[0]))
    table = table.with_columns(pl.Series("memory_bytes", memory, dtype=pl.Int64))
    accuracy = table["validation_accuracy"].to_numpy()
    best = tradeoff.choose(accuracy, np.asarray(memory), budget)
    table = table.with_columns(
        pl.Series("on_front", tradeoff.pareto_front(accuracy, np.asarray(memory))),
        pl.Series("chosen", np.arange(len(table)) == best),
    )
    run.write_table("tradeoff", table)
    title = f"Accuracy against memory at {bits} bits, {job.data.name}"
    figures.tradeoff_figure(table, run.folder("figures") / "tradeoff.png", title, budget)
    chosen = table.row(best, named=True)
    run.update_summary(
        chosen={
            "name": chosen["name"],
            "genotype": chosen["genotype"],
            "kernel_sizes": [int(k) for k in chosen["kernel_set"].split(",")],
            "validation_accuracy": chosen["validation_accuracy"],
            "test_accuracy": chosen["test_accuracy"],
            "parameters": chosen["parameters"],
            "memory_bytes": chosen["memory_bytes"],
            "bits": bits,
            "memory_budget_bytes": budget,
            "checkpoint": str(run.path / chosen["checkpoint"]),
        }
    )
    timed(job, "tradeoff", started)
    job.say(f"report: {write_summary_report(job)}")
    return table


def write_summary_report(job: Job) -> Path:
    """Writes ``report.md`` from the run's tables: what was run, and the four steps' results."""
    import polars as pl

    run = job.run
    tables = {
        name: run.read_table(name, f"experiments/{script}.py")
        for name, script in (("impact", "kernel_impact"), ("tradeoff", "tradeoff"))
    }
    by_size = tables["impact"].group_by("kernel_size").agg(
        (100 * pl.col("accuracy").mean()).alias("validation accuracy %"),
        (100 * pl.col("accuracy").std()).alias("sd"),
        pl.len().alias("seeds"),
        pl.col("parameters").first(),
        (pl.col("memory_bytes").first() / 1024).alias("memory KiB"),
        pl.col("synops").mean().round(0).alias("synaptic operations an image"),
        pl.col("energy_nj").mean().alias("energy nJ an image"),
    ).sort("kernel_size")  # fmt: skip
    final = tables["tradeoff"].with_columns(
        (100 * pl.col("validation_accuracy")).alias("validation %"),
        (100 * pl.col("test_accuracy")).alias("test %"),
        (pl.col("memory_bytes") / 1024).alias("memory KiB"),
    )
    record = run.read_json("config.json")
    summary = run.read_json("summary.json")
    environment = record["environment"]
    about = "\n".join(f"- {name}: `{environment[name]}`" for name in environment)
    recipe = job.options.get("recipe", "not recorded")
    seconds = ", ".join(f"{step} {value} s" for step, value in summary["seconds"].items())
    columns = ("name", "genotype", "score", "validation %", "test %", "parameters", "memory KiB",
               "synops", "energy_nj", "on_front", "chosen")  # fmt: skip
    return report.write_report(
        run,
        [
            ("Run", f"{job.data.source}\n\nSeed {job.seed}. Recipe: {recipe}. {seconds}.\n\n{about}"),
            ("Step 1: impact of the kernel size", report.markdown_table(by_size, by_size.columns)),
            (
                "Step 2: kernel sets",
                "\n".join(
                    f"- {tuple(v['set'])}: {'kept' if v['kept'] else 'dropped'}, {v['reason']}"
                    for v in summary.get("kernel_sets", ())
                ),
            ),
            ("Steps 3 and 4: finalists and the chosen model", report.markdown_table(final, columns)),
        ],
    )
