"""Terminal tables, Markdown tables and the page of a run.

A column that a table lacks is a `ValueError` that names it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spikernel_jax.io.files import atomic_path
from spikernel_jax.io.run_folder import RunFolder, commit_text
from spikernel_jax.report.figures import TRADEOFF_COLUMNS, kernel_text, mean_sd, numeric_columns, spaced
from spikernel_jax.report.found import REPORT
from spikernel_jax.report.page import keep_page

if TYPE_CHECKING:
    import polars as pl
    from rich.table import Table


def _rich_table(title: str, left: int, rows: Iterable[Mapping[str, str]]) -> "Table":
    """A table for the terminal from rows of text by header; the first `left` columns hold words."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, row in enumerate(rows):
        for place, header in enumerate(row if index == 0 else ()):
            # On a narrow terminal the cell breaks over lines, between its edges, and the numbers stay whole.
            wide = header in ("cell", "kernels")
            side = "left" if place < left else "right"
            table.add_column(header, justify=side, no_wrap=not wide, min_width=18 if header == "cell" else None)
        table.add_row(*map(escape, row.values()))
    return table


def _number(value: float | None, text: str, scale: float = 1.0) -> str:
    return "-" if value is None or not math.isfinite(value) else text.format(scale * value)


def impact_table(table: "pl.DataFrame") -> "Table":
    """Lays out the impact of the kernel, mean ± sd over seeds.

    The table is `impact_figure`'s, with `parameters` and `energy_nj` (nanojoules an image) besides.
    """
    names = ("kernel", "accuracy", "parameters", "memory_bytes", "synops", "energy_nj")
    kernels, accuracy, *others = numeric_columns(table, names)
    rows = []
    for kernel in dict.fromkeys(kernels.tolist()):
        here = kernels == kernel
        mean, sd = mean_sd(accuracy[here])
        parameters, memory, synops, energy = (mean_sd(values[here])[0] for values in others)
        rows.append(
            {
                "kernel": kernel_text(kernel),
                "n": str(int(np.isfinite(accuracy[here]).sum())),
                "accuracy\n(%)": f"{_number(mean, '{:.2f}', 100)} ± {_number(sd, '{:.2f}', 100)}",
                "parameters": _number(parameters, "{:,.0f}"),
                "memory\n(KiB)": _number(memory, "{:,.1f}", 1 / 1024),
                "synops\n(M/image)": _number(synops, "{:,.2f}", 1e-6),
                "energy\n(µJ/image)": _number(energy, "{:,.2f}", 1e-3),
            }
        )
    return _rich_table("Impact of the kernel (accuracy in float32, memory counted)", 1, rows)


def finalists_table(table: "pl.DataFrame") -> "Table":
    """Lays out the finalists among the scored cells, by set and then by score.

    The table is `search_figure`'s, with `genotype` besides; rows that are no finalists are passed over.
    """
    numeric_columns(table, ("kernel_set", "genotype", "score", "score_se", "memory_bytes", "conv_edges", "finalist"))
    finalists = table.filter(table["finalist"]).sort("kernel_set", "score", descending=[False, True])
    rows = [
        {
            "kernels": spaced(row["kernel_set"]),
            "cell": row["genotype"],
            "score ± SE": f"{_number(row['score'], '{:.2f}')} ± {_number(row['score_se'], '{:.2f}')}",
            "memory\n(KiB)": _number(row["memory_bytes"], "{:,.1f}", 1 / 1024),
            "conv\nedges": str(row["conv_edges"]),
        }
        for row in finalists.iter_rows(named=True)
    ]
    return _rich_table("Finalists", 2, rows)


def scores_markdown(table: "pl.DataFrame") -> str:
    """The finalists' scores as Markdown, and how many cells the score does not tell from each.

    Args:
      table: of `search.search_sets`.
    """
    import polars as pl

    rows = []
    for row in table.filter("finalist").iter_rows(named=True):
        error = row["score_se_paired"]
        rivals = table.filter(
            pl.col("kernel_set") == row["kernel_set"], "fits", pl.col("fidelity") == row["fidelity"],
            pl.col("genotype") != row["genotype"],
        )  # fmt: skip
        gap = row["score"] - rivals["score"]
        noise = (error**2 + rivals["score_se_paired"] ** 2).sqrt() if error is not None else None
        near = None if noise is None or noise.is_nan().any() else int((gap <= noise).sum())
        trained = table.filter(pl.col("kernel_set") == row["kernel_set"], pl.col("search_epochs") > 0)
        decided = row["search_epochs"] > 0
        rows.append({
            "kernel set": row["kernel_set"], "genotype": row["genotype"],
            "decided by": f"{row['search_epochs']} epochs" if decided else f"{row['fidelity']} score",
            "validation %": 100 * row["search_validation"] if decided else None, "trained": len(trained),
            "score": row["score"], "paired SE": error, "scored beside it": len(rivals), "within one SE": near,
        })  # fmt: skip
    found = pl.DataFrame(rows, infer_schema_length=None)
    return (
        "Every cell that fits was scored at low fidelity. Decided by: what made each set's finalist. Trained: cells of "
        "the set that were trained shortly, first those of the largest receptive field and most parameters, then the "
        "best of these in validation accuracy and that (`search.shorts`). Paired SE: standard error of a score among "
        "cells scored on the same draws. Within one SE: cells of the set that fit and were scored at the same "
        "fidelity, whose score is less by no more than the difference's standard error: the score cannot tell them "
        f"from the finalist.\n\n{markdown_table(found, found.columns)}"
    )


def tradeoff_table(table: "pl.DataFrame") -> "Table":
    """Lays out finalists and baselines by memory, the finalists on the front and the choice marked.

    The table is `tradeoff_figure`'s, with `genotype`, `n`, `test_sd` and `parameters` besides.
    """
    numeric_columns(table, (*TRADEOFF_COLUMNS, "genotype", "n", "test_sd", "parameters"))
    rows = [
        {
            "model": row["name"],
            "cell": row["genotype"],
            "n": str(row["n"]),
            "valid.\n(%)": _number(row["validation_accuracy"], "{:.2f}", 100),
            "test\n(% ± sd)": " ± ".join(_number(row[name], "{:.2f}", 100) for name in ("test_accuracy", "test_sd")),
            "memory\n(KiB)": _number(row["memory_bytes"], "{:,.1f}", 1 / 1024),
            "params": _number(row["parameters"], "{:,.0f}"),
            "": "chosen"
            if row["chosen"]
            else "front"
            if row["on_front"]
            else row["role"] * (row["role"] != "finalist"),
        }
        for row in table.sort("memory_bytes").iter_rows(named=True)
    ]
    return _rich_table("Accuracy (float32) against memory (counted)", 2, rows)


def embedded_markdown(table: "pl.DataFrame") -> str:
    """The model in integers as Markdown; the table is `pipeline.embed.embed_model`'s."""
    import polars as pl

    shown = table.select(
        pl.col("what"),
        (100 * pl.col("rounded_accuracy")).round(2).alias("validation %, rounded alone"),
        (100 * pl.col("validation_accuracy")).round(2).alias("validation %"),
        (100 * pl.col("test_accuracy")).round(2).alias("test %"),
        pl.col("spikes").round(0).alias("spikes an image"),
        pl.col("energy_nj").round(1).alias("nJ an image"),
        pl.col("constant_bytes").alias("bytes of constants"),
        pl.col("written_bytes").alias("bytes written to"),
        pl.col("verified_images").alias("C verified on, images"),
        pl.col("tuned_epochs").alias("trained for it, epochs"),
        pl.col("fits"),
    )
    return markdown_table(shown, shown.columns)


def bits_markdown(table: "pl.DataFrame") -> str:
    """Finalists at every width as Markdown, with means; the table is `pipeline.weight_bits.compare_bits`'s."""
    import polars as pl

    how = (
        pl.when(pl.col("epochs") > 0).then(pl.format("trained on, {} epochs", "epochs")).otherwise(pl.lit("as it was"))
    )
    accuracies = [(100 * pl.col(f"{split}_accuracy").mean()).round(2).alias(f"{split} %")
                  for split in ("validation", "test")]  # fmt: skip
    rows = table.with_columns(
        pl.when(pl.col("bits") > 0).then(pl.format("int{}", "bits")).otherwise(pl.lit("float32")).alias("weights"),
        how.alias("how"),
    )
    means = rows.group_by("weights", "how", maintain_order=True).agg(pl.len().alias("finalists"), *accuracies)
    each = rows.select(
        "finalist", "genotype", "weights", "how",
        *((100 * pl.col(f"{split}_accuracy")).round(2).alias(f"{split} %") for split in ("validation", "test")),
        pl.col("constant_bytes").alias("bytes of constants"), pl.col("written_bytes").alias("bytes written to"),
    )  # fmt: skip
    return f"{markdown_table(means, means.columns)}\n{markdown_table(each, each.columns)}"


def processors_markdown(table: "pl.DataFrame") -> str:
    """What the C takes of microcontrollers as Markdown; the table is `pipeline.embed.embed_model`'s."""
    import polars as pl

    shown = table.select(
        pl.col("what"),
        pl.col("processor"),
        pl.col("instructions").alias("instructions an image"),
        pl.col("code_bytes").alias("bytes of code"),
        pl.col("constant_bytes").alias("bytes of constants"),
        pl.col("written_bytes").alias("bytes written to"),
        pl.col("verified_images").alias("verified on, images"),
    )
    return markdown_table(shown, shown.columns)


def markdown_table(table: "pl.DataFrame", columns: Sequence[str]) -> str:
    """Writes columns of a table as Markdown, floats with four digits, nulls and NaN as "-".

    Raises:
      ValueError: a column is missing, or the table has no rows.
    """
    numeric_columns(table, columns)

    def cell(value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return "-"
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        return " ".join(text.split()).replace("|", "\\|")

    rules = ["---:" if table[name].dtype.is_numeric() else "---" for name in columns]
    rows = [[cell(value) for value in row] for row in table.select(columns).iter_rows()]
    return "".join(f"| {' | '.join(row)} |\n" for row in [[cell(name) for name in columns], rules, *rows])


def write_report(run: RunFolder, sections: Sequence[tuple[str, str]]) -> Path:
    """Writes the run's report, report.md, atomically, and its page; returns the report's path.

    The report opens with what the run ran on. The sections follow, each a heading and Markdown text, and then the
    figures of the run that no section links.
    """
    record = run.record()
    commits, devices = [], []
    for where in (record["environment"], *record["resumed"]):  # a run may go on somewhere else
        device = where["device"]
        commits.append(commit_text(where))
        devices.append(f"{device['count']} x {device['kind']}, jax {where['versions']['jax']}")
    text = (
        f"# Run {run.path.resolve().name}\n\nBegun {record['environment']['created']}. "
        f"Commit: {'; '.join(dict.fromkeys(commits))}. Device: {'; '.join(dict.fromkeys(devices))}.\n"
    )
    text += "".join(f"\n## {heading}\n\n{body.strip()}\n" for heading, body in sections)
    figures = [f"figures/{path.name}" for path in sorted((run.path / "figures").glob("[!.]*.png"))]
    loose = [figure for figure in figures if f"({figure})" not in text]
    if loose:
        text += "\n## Figures\n" + "".join(f"\n![{Path(figure).stem}]({figure})\n" for figure in loose)
    path = run.path / REPORT
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    keep_page(run.path)
    return path
