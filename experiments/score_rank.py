"""Which scores rank cells rightly, held against a table of trained cells.

    python experiments/score_rank.py --data-dir DIR          # the published CIFAR-10 table
    python experiments/score_rank.py --table mnist5k         # the small one, embedded images

Kendall's τ, Spearman's ρ and regret, with intervals, of counts, scores of untrained networks, short trainings and sums
of ranks. Leaves tables/score_rank.parquet, figures/regret.png and report.md. Killed, it goes on where it was.
"""

import dataclasses

from spikernel_jax.pipeline import cli
from spikernel_jax.studies.score_rank import open_table, rank


@dataclasses.dataclass(frozen=True)
class Options(cli.RatedTableOptions):
    """Options of the comparison."""

    names: tuple[str, ...] = ()
    """Predictors; default all."""
    draws: int = 1000
    """Samples of the bootstrap."""


def score_rank(options: Options) -> None:
    """Ranks the cells, and prints where the report is."""
    job, study = open_table(options, "score-rank", options.names, {"draws": options.draws}, options.draws)
    with job.run.lock():
        rank(job, study, options.half)
    cli.say(f"report: {job.run.path / 'report.md'}")


if __name__ == "__main__":
    cli.main(Options, score_rank, __doc__ or "")
