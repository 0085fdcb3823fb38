"""What bits of weights cost in accuracy and save in memory: every finalist of a run, rounded, and trained on alike.

    python experiments/weight_bits.py                  # the finalists of experiments/explore.py, minutes on 2 cores
    python experiments/weight_bits.py --test mnist     # on the test images of another data set of the same kind

Each finalist is looked at as it was trained and after --tune epochs more, with float weights and with each width.
Leaves tables/weight_bits.parquet, figures/weight_bits.png and a section in report.md. Killed, it goes on where it was.
"""

import dataclasses

from spikernel_jax.pipeline import cli
from spikernel_jax.pipeline.fitting import Settings
from spikernel_jax.pipeline.weight_bits import compare_bits, test_images
from spikernel_jax.report import pages


@dataclasses.dataclass(frozen=True)
class Options(cli.Shared):
    """Options of the comparison."""

    widths: tuple[int, ...] = (8, 6, 4, 3, 2)
    """Widths of weights that are tried."""
    membrane_bits: int = 8
    """Width of currents and membranes, 8 to 16; below 16 those are clipped that training images show to be rare."""
    tune: int = 5
    """Epochs that every network is trained on for, with float weights and with each width; 0 trains none."""
    test: str | None = None
    """Data set whose test images are looked at; default the run's own."""


def weight_bits(options: Options) -> None:
    """Compares widths, and prints what came out."""
    settings = Settings(options.widths, options.membrane_bits, options.tune)
    job = cli.open_job(options, override=True, needs=("tradeoff", "experiments/tradeoff.py"))
    test = test_images(job, options.test, options.data_dir)
    with job.run.lock():
        table = compare_bits(job, settings, test)
    cli.results().out(pages.bits_markdown(table), end="", highlight=False)


if __name__ == "__main__":
    cli.main(Options, weight_bits, __doc__ or "")
