"""Makes the page of a run anew, or lays several runs side by side on one.

    python experiments/report.py runs/mnist5k-cpu-seed0
    python experiments/report.py runs/mnist5k-cpu-seed0 runs/mnist5k-cpu-seed1 --out compared.html

Writes report.html in the run's folder: one file that opens offline, of whatever the run has by now.
"""

import dataclasses
from pathlib import Path

import tyro

from spikernel_jax.pipeline import cli
from spikernel_jax.report.page import write_page


@dataclasses.dataclass(frozen=True)
class Options:
    """Which runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs."""
    out: Path | None = None
    """The file to write; default report.html in the folder of the only run."""


def report(options: Options) -> None:
    """Writes the page."""
    if not options.runs:
        raise ValueError("no run is given: want the folder of one at least, such as runs/mnist5k-cpu-seed0")
    cli.present(f"page: {write_page(options.runs, options.out)}")


if __name__ == "__main__":
    cli.main(Options, report, __doc__ or "")
