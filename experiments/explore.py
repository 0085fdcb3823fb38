"""SpiKernel's four steps in one command: impact, kernel sets, search and training, trade-off.

    python experiments/explore.py                       # 5,000 MNIST digits, under 10 minutes on 2 cores
    python experiments/explore.py --data cifar10        # an hour or two on 2 cores
    python experiments/explore.py --from RUN --out NEW  # a run again, as it was

Ends with a table, and a run folder with tables, figures, report.html, report.md and trained, exported checkpoints.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from spikernel_jax.pipeline import baselines, cli, finalists, impact, kernel_sets, search, tradeoff
from spikernel_jax.report import pages


@dataclasses.dataclass(frozen=True)
class Options(cli.Shared, cli.SetOptions, cli.ImpactOptions, cli.TrainingOptions):
    """Options of the whole job."""

    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """A run to repeat in the folder --out: its data set, preset, seed and options as its own folder has them."""


def explore(options: Options) -> None:
    """Runs the four steps."""
    job = cli.open_job(options, searches=True)
    with job.run.lock():
        cli.present(pages.impact_table(impact.measure_impact(job)))
        cli.present(pages.finalists_table(search.search_sets(job, kernel_sets.choose_sets(job))))
        finalists.train_finalists(job)
        baselines.train_baselines(job)
        cli.present(pages.tradeoff_table(tradeoff.choose_model(job)))


if __name__ == "__main__":
    cli.main(Options, explore, __doc__ or "")
