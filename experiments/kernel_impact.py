"""Step 1: accuracy, memory and synaptic operations of the same cell with kernel sizes 1, 3, 5 and 7.

    python experiments/kernel_impact.py                 # about 3 minutes on 2 cores

Leaves tables/impact.parquet and figures/impact.png in the run folder.
"""

import dataclasses

from spikernel_jax.pipeline import cli
from spikernel_jax.pipeline.impact import measure_impact
from spikernel_jax.report import pages


@dataclasses.dataclass(frozen=True)
class Options(cli.Shared, cli.ImpactOptions, cli.TrainingOptions):
    """Options of step 1."""


def kernel_impact(options: Options) -> None:
    """Trains each kernel size over several seeds."""
    job = cli.open_job(options)
    with job.run.lock():
        cli.present(pages.impact_table(measure_impact(job)))


if __name__ == "__main__":
    cli.main(Options, kernel_impact, __doc__ or "")
