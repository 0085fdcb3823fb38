"""Step 3, training: trains each kernel set's finalist and the baselines alike, and exports the finalists.

    python experiments/train.py --out runs/mnist5k-cpu-seed0        # after search.py

Leaves finalists/NAME/checkpoint, tables/finalists.parquet, tables/baselines.parquet and figures/training.png in the
run folder.
"""

import dataclasses

from spikernel_jax.pipeline import cli
from spikernel_jax.pipeline.baselines import train_baselines
from spikernel_jax.pipeline.finalists import train_finalists
from spikernel_jax.report import pages


@dataclasses.dataclass(frozen=True)
class Options(cli.Shared, cli.TrainingOptions):
    """Options of the training."""


def train(options: Options) -> None:
    """Trains finalists and baselines."""
    job = cli.open_job(options, needs=("search", "experiments/search.py"))
    with job.run.lock():
        tables = train_finalists(job), train_baselines(job)
    columns = ("name", "genotype", "seed", "validation_accuracy", "test_accuracy", "memory_bytes")
    for table in tables:
        cli.present(pages.markdown_table(table, columns))


if __name__ == "__main__":
    cli.main(Options, train, __doc__ or "")
