"""Which way of searching finds the best cell in as many seconds, played on a table of trained cells.

    python experiments/search_compare.py --data-dir DIR      # the published CIFAR-10 table
    python experiments/search_compare.py --table mnist5k     # the small one, embedded images

The default search, ended by short trainings, against random cells, SAHD alone, depth alone, one epoch alone, and its
own prior without short trainings. Leaves tables/search_compare.parquet, figures/searches.png and report.md.
"""

import dataclasses

from spikernel_jax.pipeline import cli
from spikernel_jax.studies.score_rank import open_table
from spikernel_jax.studies.search_compare import PREDICTORS, compare


@dataclasses.dataclass(frozen=True)
class Options(cli.RatedTableOptions):
    """Options of the comparison."""

    repeats: int = 100
    """Searches of each kind and budget."""


def search_compare(options: Options) -> None:
    """Plays the searches, and prints where the report is."""
    if options.repeats < 2:
        raise ValueError(f"--repeats {options.repeats} must be at least 2")
    job, study = open_table(options, "search-compare", PREDICTORS, {"repeats": options.repeats})
    with job.run.lock():
        compare(job, study, options.half, options.repeats)
    cli.say(f"report: {job.run.path / 'report.md'}")


if __name__ == "__main__":
    cli.main(Options, search_compare, __doc__ or "")
