"""The training of a given time over several seeds: mean, standard deviation, and what is behind them.

The first seed's plan decides the epochs and the precision of all, so that equals are compared; each seed has a run
folder of its own within that of them all.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikernel_jax.io.checks import whole
from spikernel_jax.pipeline.job import counts, open_folder
from spikernel_jax.report import pages
from spikernel_jax.report.intervals import columns, interval, points
from spikernel_jax.studies.accuracy import train_in_time
from spikernel_jax.studies.time_plan import TimedTraining, process_seconds

if TYPE_CHECKING:
    import polars as pl

_SHARES = ("validation_accuracy", "test_accuracy")


def train_over_seeds(timed: TimedTraining, out: str | Path, seeds: int) -> dict[str, Any]:
    """Trains with several seeds, one after another, or goes on where an earlier start stopped.

    Leaves ``seedS`` (of `train_in_time`) for each seed, ``tables/seeds.parquet``, ``summary.json`` and ``report.md``.

    Args:
      timed: of `open_training`, with the first seed; its time is that of one training.
      out: the run's folder.
      seeds: how many, from the first on.

    Returns:
      The summary: `n`, and `validation_accuracy` and `test_accuracy` (0 to 1), each with ``_sd``, ``_low`` and
      ``_high`` of its 95 % t-interval.

    Raises:
      ValueError: one line, if the seeds are fewer than two, or as `train_in_time`.
      StoppedError: a signal asked to stop; the same command goes on.
    """
    import polars as pl

    seeds = whole("seeds", seeds, 2, 1000)
    run = open_folder(out, timed.config() | {"seeds": seeds}, timed.data, timed.say)
    with run.lock():
        rows: list[dict[str, Any]] = []
        for seed in range(timed.seed, timed.seed + seeds):
            preset = timed.preset
            if rows:
                planned = {name: rows[0][name] for name in ("epochs", "precision")}
                training = dataclasses.replace(preset.training, **planned)
                preset = dataclasses.replace(preset, minutes=None, training=training)
            own = dataclasses.replace(timed, seed=seed, preset=preset, since=process_seconds() if rows else 0.0)
            timed.say(f"seed {seed}, {len(rows) + 1} of {seeds}")
            rows.append({"seed": seed} | train_in_time(own, run.path / f"seed{seed}"))
        table = pl.DataFrame(rows, infer_schema_length=None)
        run.write_table("seeds", table)
        summary: dict[str, Any] = {"n": seeds, "parameters": rows[0]["parameters"], "epochs": rows[0]["epochs"]}
        for name in _SHARES:
            summary |= columns(name, interval(table[name]))
        run.update_summary(**summary)
        pages.write_report(run, _sections(timed, table, summary, " ".join(run.record()["environment"]["command"])))
    return summary


def _sections(
    timed: TimedTraining, table: "pl.DataFrame", summary: dict[str, Any], command: str
) -> list[tuple[str, str]]:
    import polars as pl

    images = counts(timed.data)
    about = (
        f"`{command}`\n\n{timed.data.source}\n\n{summary['n']} trainings that differ in their seed alone, of "
        f"{summary['epochs']} epochs each, as the first one's plan has it: {summary['parameters']:,} parameters. "
        "Settings and recipe: the report of each (`seedS/report.md`)."
    )
    shares = {timed.validation_name: "validation_accuracy", "test, touched once a training": "test_accuracy"}
    text = "".join(
        f"- {label}, {images[name.partition('_')[0]]:,} images: **{points(summary, name)} %**\n"
        for label, name in shares.items()
    )
    text += "\nMean ± standard deviation [95 % t-interval of the mean] over seeds.\n\n"
    shown = table.select(
        "seed",
        *((100 * pl.col(name)).round(2).alias(f"{name.partition('_')[0]} %") for name in _SHARES),
        pl.col("training_minutes").alias("minutes of steps"),
    )
    return [("Run", about), ("Accuracy", text + pages.markdown_table(shown, shown.columns))]
