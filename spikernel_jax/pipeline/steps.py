"""SpiKernel's steps on a run folder: impact, kernel sets, training, trade-off; the search is `search`.

Each step reads what the one before it left, can be killed at any instant, and goes on where it was. Every network is
trained by the same recipe, for as many epochs and over the same seeds, so that any two of them can be compared.
Selection uses validation images only; the test split is evaluated once for each trained network.

Source: Putra & Shafique, IEEE Embedded Systems Letters 17(3), 2025 (SpiKernel).
"""

import dataclasses
import itertools
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spikernel_jax.cells.space import CellSpace
from spikernel_jax.data import DATASETS
from spikernel_jax.io.files import read_jsonl
from spikernel_jax.pipeline import baselines, tradeoff, trials
from spikernel_jax.pipeline.job import Job, impact_genotypes, timed
from spikernel_jax.pipeline.trials import Trial
from spikernel_jax.report import figures, pages
from spikernel_jax.snn import cost
from spikernel_jax.training.checkpoint import load_model, save_model

if TYPE_CHECKING:
    import polars as pl


def _trainings(job: Job, cells: Mapping[str, tuple[CellSpace, Any]]) -> list[Trial]:
    """The trainings of named cells, all seeds of one after another."""
    config = job.preset.training(job.data.name, job.options["recipe"])
    return [
        Trial(name, seed, job.network(space), tuple(np.asarray(row).tolist()), config)
        for (name, (space, row)), seed in itertools.product(cells.items(), job.seeds)
    ]


def _impact_trainings(job: Job) -> dict[int, list[Trial]]:
    space, genotypes = impact_genotypes(job.options["kernel_sizes"], job.options["cell"])
    return {k: _trainings(job, {f"unsearched-k{k}": (space, row)}) for k, row in genotypes.items()}


def _train(job: Job, trainings: Iterable[Trial]) -> dict[Trial, dict[str, Any]]:
    """Trains what is not trained yet; results as `trials.run` gives them."""
    trainings = list(trainings)
    clock = trials.Clock(trainings)
    return {
        trial: trials.run(job, trial, clock, f"{number}/{len(trainings)}")
        for number, trial in enumerate(trainings, start=1)
    }


def _tested(job: Job, results: Mapping[Trial, Mapping[str, Any]], **columns: Any) -> list[dict[str, Any]]:
    """Rows of a table of trained networks: what was measured of each, its test accuracy now too."""
    names = ("validation_accuracy", "parameters", "memory_bytes", "synops", "energy_nj")
    return [
        {"name": trial.kind, **columns, "seed": trial.seed, **{name: result[name] for name in names},
         "test_accuracy": trials.tested(job, trial)}
        for trial, result in results.items()
    ]  # fmt: skip


def impact(job: Job) -> "pl.DataFrame":
    """Step 1: the same cell with all its convolutions at each kernel size, over several seeds.

    Leaves ``tables/impact.parquet`` (a row for each size and seed; accuracy is validation accuracy) and
    ``figures/impact.png``.
    """
    import polars as pl

    started = time.perf_counter()
    run, by_size = job.run, _impact_trainings(job)
    job.remember("kernel_sizes", "cell", "bits", "recipe")
    job.say(
        f"step 1, impact: {job.options['cell']!r}, K in {tuple(by_size)}, {job.preset.seeds} seeds, "
        f"{job.preset.epochs} epochs, recipe {job.options['recipe']}"
    )
    results = _train(job, itertools.chain.from_iterable(by_size.values()))
    names = ("parameters", "memory_bytes", "synops", "energy_nj")
    table = pl.DataFrame([
        {"kernel_size": k, "seed": trial.seed, "accuracy": results[trial]["validation_accuracy"],
         **{name: results[trial][name] for name in names}}
        for k, trainings in by_size.items() for trial in trainings
    ])  # fmt: skip
    run.write_table("impact", table)
    title = (
        f"Impact of the kernel size, {job.data.name}, n = {job.preset.seeds} seeds; accuracy in float32, memory "
        f"counted at {job.options['bits']} bits"
    )
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
    """Step 3, training: trains each set's finalist over all seeds, and exports it.

    Leaves ``finalists/<name>/checkpoint`` (of the first seed), ``tables/finalists.parquet`` (a row for each set and
    seed) and ``figures/training.png``. A cell that won in several sets is trained once.
    """
    import polars as pl

    started = time.perf_counter()
    run = job.run
    wanted = ("kernel_set", "genotype", "score", "score_se", "finalist")
    table = run.read_table("search", "experiments/search.py", wanted).filter(pl.col("finalist"))
    job.remember("bits", "recipe")
    names: dict[str, str] = {}
    cells: dict[str, tuple[CellSpace, Any]] = {}
    for row in table.iter_rows(named=True):
        name = names.setdefault(row["genotype"], "k" + row["kernel_set"].replace(",", "-"))
        if name not in cells:
            space = baselines.space_of(row["kernel_set"])
            cells[name] = space, space.parse(row["genotype"])
    job.say(f"step 3, training: {len(cells)} finalists, {job.preset.seeds} seeds, {job.preset.epochs} epochs each")
    for genotype, name in names.items():
        job.say(f"  {name}: {genotype}")
    trainings = _trainings(job, cells)
    trained = _tested(job, _train(job, trainings))
    scores = {names[genotype]: score for genotype, score in table.select("genotype", "score").iter_rows()}
    for trial, own in zip(trainings, trained, strict=True):
        if trial.seed == job.seeds[0]:
            _export(job, trial, own | {"source": job.data.source, "score": scores[trial.kind]})
    rows = [
        {"kernel_set": row["kernel_set"], "genotype": row["genotype"], "score": row["score"],
         "score_se": row["score_se"], **result, "checkpoint": f"finalists/{result['name']}/checkpoint"}
        for row in table.iter_rows(named=True)
        for result in trained if result["name"] == names[row["genotype"]]
    ]  # fmt: skip
    finalists = pl.DataFrame(rows)
    run.write_table("finalists", finalists)
    curves = {trial.name: read_jsonl(trials.folder(job, trial) / "metrics.jsonl") for trial in trainings}
    title = f"Training of the finalists, {job.data.name}"
    figures.training_figure(curves, run.folder("figures") / "training.png", title)
    timed(job, "training", started)
    return finalists


def _export(job: Job, trial: Trial, metrics: Mapping[str, Any]) -> None:
    """Exports a trained network with what was measured of it."""
    model = trials.fit(job, trial)
    folder = job.run.folder("finalists") / trial.kind
    folder.mkdir(exist_ok=True)
    save_model(folder / "checkpoint", dataclasses.replace(model, metrics={**model.metrics, **metrics}))


def train_baselines(job: Job) -> "pl.DataFrame":
    """What the finalists are to be compared with, trained as they are: see `baselines.cells`.

    Leaves ``tables/baselines.parquet``, a row for each cell and seed. Step 1's networks are those of step 1.
    """
    import polars as pl

    started = time.perf_counter()
    run = job.run
    finalists = run.read_table("finalists", "experiments/train.py", ("name", "kernel_set", "genotype"))
    unsearched, others = _impact_trainings(job), baselines.cells(job, finalists)
    job.say(f"baselines: step 1's cell at every size, {', '.join(others)}; as many seeds and epochs")
    rows = []
    for k, trainings in unsearched.items():
        space = trainings[0].spec.space
        columns = {"role": baselines.UNSEARCHED, "kernel_set": str(k), "of": None}
        columns["genotype"] = space.explicit(trainings[0].genotype)
        rows += _tested(job, _train(job, trainings), **columns)
    results = _train(job, _trainings(job, {name: (cell.space, cell.row) for name, cell in others.items()}))
    for name, cell in others.items():
        columns = {"role": cell.role, "kernel_set": cell.kernel_set, "of": cell.of}
        columns["genotype"] = cell.space.explicit(cell.row)
        rows += _tested(job, {t: r for t, r in results.items() if t.kind == name}, **columns)
    table = pl.DataFrame(rows, infer_schema_length=None)
    run.write_table("baselines", table)
    timed(job, "baselines", started)
    return table


def choose_model(job: Job) -> "pl.DataFrame":
    """Step 4: accuracy against memory, the Pareto front of the finalists, and the one chosen under the budget.

    Both use mean validation accuracy; test accuracy is only reported. Memory is counted at this job's bits,
    which need not be those of the search. Leaves ``tables/tradeoff.parquet`` (a row for each finalist and baseline),
    ``figures/tradeoff.png``, `chosen` and `search_helped` in ``summary.json``, and ``report.md``.

    Raises:
      tradeoff.NothingFitsError: one line, if no finalist fits.
    """
    import polars as pl

    started = time.perf_counter()
    run = job.run
    budget, bits = job.options["memory_budget"], job.options["bits"]
    wanted = ("name", "kernel_set", "genotype", "seed", "validation_accuracy", "test_accuracy", "parameters")
    by_seed = {
        "finalists": run.read_table("finalists", "experiments/train.py", (*wanted, "checkpoint")),
        "baselines": run.read_table("baselines", "experiments/train.py", (*wanted, "role", "of")),
    }
    finalists = by_seed["finalists"].unique(("name", "seed"), maintain_order=True)
    mean = baselines.over_seeds(finalists.with_columns(role=pl.lit(baselines.SEARCHED)))
    others = baselines.over_seeds(by_seed["baselines"])
    memory = []
    for row in mean.iter_rows(named=True):
        model = load_model(run.path / f"finalists/{row['name']}/checkpoint")
        memory.append(int(cost.costs(model.spec, np.asarray(model.genotype)[None], bits).memory_bytes[0]))
    accuracy = mean["validation_accuracy"].to_numpy()
    best = tradeoff.choose(accuracy, np.asarray(memory), budget)
    mean = mean.with_columns(
        pl.Series("memory_bytes", memory, dtype=pl.Int64),
        pl.Series("on_front", tradeoff.pareto_front(accuracy, np.asarray(memory))),
        pl.Series("chosen", np.arange(len(mean)) == best),
    )
    of_others = [baselines.memory_of(job, row, bits) for row in others.iter_rows(named=True)]
    others = others.with_columns(
        pl.Series("memory_bytes", of_others, dtype=pl.Int64), on_front=pl.lit(False), chosen=pl.lit(False)
    )
    table = pl.concat([mean, others], how="vertical_relaxed")
    run.write_table("tradeoff", table)
    title = f"Accuracy (float32) against memory (counted at {bits} bits), {job.data.name}, n = {job.preset.seeds} seeds"
    figures.tradeoff_figure(table, run.folder("figures") / "tradeoff.png", title, budget)
    chosen = mean.row(best, named=True)
    sets = finalists.filter(pl.col("name") == chosen["name"])["kernel_set"][0]
    helped = baselines.verdict(by_seed["finalists"], by_seed["baselines"], table, budget)
    run.update_summary(
        chosen={
            "name": chosen["name"],
            "genotype": chosen["genotype"],
            "kernel_sizes": [int(k) for k in sets.split(",")],
            "seeds": chosen["n"],
            "validation_accuracy": chosen["validation_accuracy"],
            "test_accuracy": chosen["test_accuracy"],
            "test_accuracy_sd": chosen["test_sd"],
            "parameters": chosen["parameters"],
            "memory_bytes": chosen["memory_bytes"],
            "bits": bits,
            "memory_budget_bytes": budget,
            "checkpoint": str(run.path / f"finalists/{chosen['name']}/checkpoint"),
        },
        search_helped=helped,
    )
    timed(job, "tradeoff", started)
    job.say(helped["text"])
    job.say(f"report: {write_summary_report(job)}")
    return table


def write_summary_report(job: Job) -> Path:
    """Writes ``report.md`` from the run's tables: what was run, and the four steps' results."""
    import polars as pl

    run, preset = job.run, job.preset
    tables = {
        name: run.read_table(name, f"experiments/{script}.py")
        for name, script in (("impact", "kernel_impact"), ("search", "search"), ("tradeoff", "tradeoff"))
    }
    memory = f"memory KiB, counted at {job.options['bits']} bits"
    by_size = tables["impact"].group_by("kernel_size").agg(
        (100 * pl.col("accuracy").mean()).alias("validation accuracy %"),
        (100 * pl.col("accuracy").std()).alias("sd"),
        pl.len().alias("seeds"),
        pl.col("parameters").first(),
        (pl.col("memory_bytes").first() / 1024).alias(memory),
        pl.col("synops").mean().round(0).alias("synaptic operations an image"),
        pl.col("energy_nj").mean().alias("energy nJ an image"),
    ).sort("kernel_size")  # fmt: skip
    final = tables["tradeoff"].sort("memory_bytes").with_columns(
        (100 * pl.col("validation_accuracy")).alias("validation %"),
        (100 * pl.col("test_accuracy")).alias("test %"),
        (100 * pl.col("test_sd")).alias("sd of test"),
        (pl.col("memory_bytes") / 1024).alias(memory),
    )  # fmt: skip
    record = run.read_json("config.json")
    summary = run.read_json("summary.json")
    environment = record["environment"]
    about = "\n".join(f"- {name}: `{environment[name]}`" for name in environment)
    seconds = ", ".join(f"{step} {value} s" for step, value in summary["seconds"].items())
    columns = ("role", "name", "genotype", "n", "validation %", "test %", "sd of test", "parameters", memory,
               "synops", "energy_nj", "on_front", "chosen")  # fmt: skip
    info = DATASETS[job.data.name]
    equals = (
        f"Pixels are normalised by mean {info.mean} and deviation {info.std} of {info.statistics}, constants as "
        "commonly published. "
        f"Every network is trained alike: recipe {job.options['recipe']}, {preset.epochs} epochs of "
        f"{len(job.data.train.labels):,} images, n = {preset.seeds} seeds. Accuracies are of float32 networks; memory "
        f"is counted at {job.options['bits']} bits, at which **no network was evaluated**."
    )
    return pages.write_report(
        run,
        [
            ("Run", f"{job.data.source}\n\nSeed {job.seed}. {equals}\n\n{seconds}.\n\n{about}"),
            ("Did the search help?", summary["search_helped"]["text"]),
            ("Step 1: impact of the kernel size", pages.markdown_table(by_size, by_size.columns)),
            (
                "Step 2: kernel sets",
                "\n".join(
                    f"- {tuple(v['set'])}: {'kept' if v['kept'] else 'dropped'}, {v['reason']}"
                    for v in summary.get("kernel_sets", ())
                ),
            ),
            ("Step 3: the finalists' scores", pages.scores_markdown(tables["search"])),
            ("Step 4: finalists, baselines and the chosen model", pages.markdown_table(final, columns)),
        ],
    )
