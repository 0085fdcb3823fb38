"""Steps 2 and 3: keeps the kernel sets worth searching and ranks every distinct cell of each.

    python experiments/search.py --out runs/mnist5k-cpu-seed0       # after kernel_impact.py

Several processes share the work: srun python experiments/search.py --out DIR, or --coordinator (see README).
Leaves tables/search.parquet and figures/search.png in the run folder.
"""

import dataclasses

from spikernel_jax.pipeline import cli
from spikernel_jax.pipeline.kernel_sets import choose_sets
from spikernel_jax.pipeline.search import join_search, search_sets
from spikernel_jax.report import pages


@dataclasses.dataclass(frozen=True)
class Options(cli.Shared, cli.SetOptions, cli.ProcessOptions):
    """Options of the search."""


def search(options: Options) -> None:
    """Scores the cells of the kept sets."""
    processes = cli.join_processes(options)
    with processes.session():
        job = cli.open_job(
            options, needs=("impact", "experiments/kernel_impact.py"), processes=processes, searches=True
        )
        if not processes.first:
            join_search(job)
            return
        with job.run.lock():
            found = search_sets(job, choose_sets(job))
    cli.present(pages.finalists_table(found))


if __name__ == "__main__":
    cli.main(Options, search, __doc__ or "")
