"""Step 3, training: trains each kernel set's finalist in full and exports it.

    python experiments/train.py --out runs/mnist5k-cpu-seed0        # after search.py

Leaves finalists/NAME/checkpoint, tables/finalists.parquet and figures/training.png in the run folder.
"""

import dataclasses

from rich.console import Console

from spikernel_jax import cli, pipeline, report


@dataclasses.dataclass(frozen=True)
class Options(cli.Shared, cli.TrainingOptions):
    """Options of the training."""


def train(options: Options) -> None:
    """Trains the finalists."""
    job = cli.open_job(options, needs=("search", "experiments/search.py"))
    with job.run.lock():
        table = pipeline.train_finalists(job)
    columns = ("name", "genotype", "validation_accuracy", "test_accuracy", "memory_bytes")
    Console().print(report.markdown_table(table, columns))


if __name__ == "__main__":
    cli.main(Options, train, __doc__ or "")
