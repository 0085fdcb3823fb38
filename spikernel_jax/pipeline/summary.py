"""The page of a whole run: what was run, and the four steps' results, from its tables."""

from pathlib import Path

from spikernel_jax.cells.kernels import kernel_set_text
from spikernel_jax.data import dataset_info
from spikernel_jax.pipeline.job import Job
from spikernel_jax.report import pages
from spikernel_jax.snn.breakdown import NOT_COUNTED
from spikernel_jax.snn.cost import PJ_PER_INTEGER_MAC, PJ_PER_INTEGER_SYNOP, PJ_PER_MAC, PJ_PER_SYNOP


def write_summary_report(job: Job) -> Path:
    """Writes ``report.md`` and ``report.html`` from the run's tables: what was run, and the four steps' results."""
    import polars as pl

    run, preset = job.run, job.preset
    tables = {
        name: run.read_table(name, f"experiments/{script}.py", columns)
        for name, script, columns in (
            ("impact", "kernel_impact", ()),
            ("search", "search", ("search_epochs",)),
            ("tradeoff", "tradeoff", ()),
        )
    }
    memory = f"memory KiB, counted at {job.options.bits} bits"
    by_size = tables["impact"].group_by("kernel", maintain_order=True).agg(
        (100 * pl.col("accuracy").mean()).alias("validation accuracy %"),
        (100 * pl.col("accuracy").std()).alias("sd"),
        pl.len().alias("seeds"),
        pl.col("parameters").first(),
        (pl.col("memory_bytes").first() / 1024).alias(memory),
        pl.col("synops").mean().round(0).alias("synaptic operations per image"),
        pl.col("energy_nj").mean().alias("energy nJ per image"),
    )  # fmt: skip
    final = tables["tradeoff"].sort("memory_bytes").with_columns(
        (100 * pl.col("validation_accuracy")).alias("validation %"),
        (100 * pl.col("test_accuracy")).alias("test %"),
        (100 * pl.col("test_sd")).alias("sd of test"),
        (pl.col("memory_bytes") / 1024).alias(memory),
    )  # fmt: skip
    record = run.record()
    summary = run.read_json("summary.json")
    environment = record["environment"]
    about = "\n".join(f"- {name}: `{environment[name]}`" for name in environment)
    seconds = ", ".join(f"{step} {value} s" for step, value in summary["seconds"].items())
    columns = ("role", "name", "genotype", "n", "validation %", "test %", "sd of test", "parameters", memory,
               "synops", "energy_nj", "on_front", "chosen")  # fmt: skip
    info = dataset_info(job.data.name)
    mean, std = (", ".join(f"{value:.4f}" for value in values) for values in (job.data.mean, job.data.std))
    embedded = (run.path / "tables" / "embedded.parquet").exists()
    equals = (
        f"Pixels are normalised by mean {mean} and deviation {std} of {info.statistics}"
        f"{', constants as commonly published' * bool(info.mean)}. "
        f"Every network is trained alike: recipe {job.options.recipe}, {preset.epochs} epochs of "
        f"{len(job.data.train.labels):,} images, n = {preset.seeds} seeds. Accuracies are of float32 networks; memory "
        f"is counted at {job.options.bits} bits" + ", at which **no network was evaluated**." * (not embedded)
    )
    if device := job.options.budget.device:
        equals += (
            f" The chosen model keeps to the limits of {device.title} ({device.source}). Not looked at: {device.note}."
        )
    sections = [
        ("Run", f"{job.data.source}\n\nSeed {job.seed}. {equals}\n\n{seconds}.\n\n{about}"),
        ("Did the search help?", summary["search_helped"]["text"]),
        ("Step 1: impact of the kernel", pages.markdown_table(by_size, by_size.columns)),
        (
            "Step 2: kernel sets",
            "\n".join(
                f"- {kernel_set_text(v['set'])}: {'kept' if v['kept'] else 'dropped'}, {v['reason']}"
                for v in summary.get("kernel_sets", ())
            ),
        ),
        ("Step 3: the finalists' scores", pages.scores_markdown(tables["search"])),
        ("Step 4: finalists, baselines and the chosen model", pages.markdown_table(final, columns)),
    ]
    if embedded:
        table = run.read_table("embedded", "experiments/embed.py", ("what", "validation_accuracy"))
        energy = (
            f"Energy is counted, not measured, by 45 nm figures: {PJ_PER_MAC} pJ a MAC and {PJ_PER_SYNOP} pJ a "
            f"synaptic operation of floats, {PJ_PER_INTEGER_MAC} and {PJ_PER_INTEGER_SYNOP} of 32-bit integers. "
            f"Not counted: {NOT_COUNTED}."
        )
        title = "On a device: the chosen model in integers"
        sections.append((title, f"{pages.embedded_markdown(table)}\n{energy}"))
        on_boards = run.read_table("processors", "experiments/embed.py", ("what", "instructions"))
        if len(on_boards):
            sections.append(("On a microcontroller, emulated", pages.processors_markdown(on_boards)))
    if (run.path / "tables" / "weight_bits.parquet").exists():
        bits = run.read_table("weight_bits", "experiments/weight_bits.py", ("test", "test_images", "bits", "epochs"))
        title = f"Finalists in integers, {bits['test'][0]}, {bits['test_images'][0]:,} test images"
        sections.append((title, pages.bits_markdown(bits)))
    return pages.write_report(run, sections)
