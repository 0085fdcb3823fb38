"""Step 4: accuracy against memory, the Pareto front, and the model chosen for a device's memory.

    python experiments/tradeoff.py --out runs/mnist5k-cpu-seed0 --memory-budget 64KiB --bits 8

Leaves tables/tradeoff.parquet and figures/tradeoff.png in the run folder.
"""

import dataclasses

from spikernel_jax.pipeline import cli
from spikernel_jax.pipeline.tradeoff import choose_model
from spikernel_jax.report import pages


@dataclasses.dataclass(frozen=True)
class Options(cli.Shared, cli.BudgetOptions):
    """Options of the trade-off."""


def tradeoff(options: Options) -> None:
    """Chooses a model."""
    # Another budget or width here asks what another device would get: the run's own are not changed.
    job = cli.open_job(options, override=True, needs=("finalists", "experiments/train.py"))
    with job.run.lock():
        table = choose_model(job)
    cli.present(pages.tradeoff_table(table))


if __name__ == "__main__":
    cli.main(Options, tradeoff, __doc__ or "")
