"""Does step 2's rule keep the kernel sets whose best cells are best? Held against a table of trained cells.

    python experiments/set_rule.py --data-dir DIR        # the published CIFAR-10 table, about 5 minutes on 2 cores
    python experiments/set_rule.py --table mnist5k       # the small one, embedded images

Trains step 1's cell with each kernel by the table's recipe, lets the rule judge all pairs of kernels, and compares the
best cells of the sets kept with those of all, under several budgets of memory. Killed, it goes on where it was. Leaves
tables/set_rule.parquet and report.md.
"""

import dataclasses

from spikernel_jax.pipeline import cli
from spikernel_jax.studies.set_rule import check_rule, open_rule


@dataclasses.dataclass(frozen=True)
class Options(cli.TableOptions):
    """Options of the comparison."""

    seeds: int = 3
    """Trainings of each of step 1's cells."""
    draws: int = 1000
    """Samples of the bootstrap."""


def set_rule(options: Options) -> None:
    """Judges the rule, and prints where the report is."""
    job, study = open_rule(options, options.seeds, options.draws)
    with job.run.lock():
        check_rule(job, study, options.half)
    cli.say(f"report: {job.run.path / 'report.md'}")


if __name__ == "__main__":
    cli.main(Options, set_rule, __doc__ or "")
