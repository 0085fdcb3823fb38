"""Takes the chosen model of a run to a device: integers, C, and what they cost in accuracy and memory.

    python experiments/embed.py --out runs/mnist5k-cpu-seed0        # after experiments/explore.py; seconds to minutes

Leaves embedded/ (C for each width of weights, manifest.json), tables/embedded.parquet, figures/embedded.png, and a
section in report.md. The C is built and held against its specification to the bit where there is a compiler.
"""

import dataclasses

from spikernel_jax.pipeline import cli
from spikernel_jax.pipeline.embed import Settings, embed_model
from spikernel_jax.report import pages


@dataclasses.dataclass(frozen=True)
class Options(cli.Shared):
    """Options of the way to a device."""

    widths: tuple[int, ...] = (8, 6, 4, 3, 2)
    """Widths of weights that are tried."""
    membrane_bits: int = 8
    """Width of currents and membranes, 8 to 16; below 16 those are clipped that training images show to be rare."""
    images: int = 1000
    """Test images that the C is verified on, at most; 0 verifies nothing."""
    compiler: str = "gcc"
    """That the C is built with to verify it."""
    tune: int = 5
    """Epochs of training for weights of few bits, where rounding alone loses more than half a point; 0 trains none."""


def embed(options: Options) -> None:
    """Exports the model, and prints what it costs."""
    settings = Settings(options.widths, options.membrane_bits, options.tune, options.images, options.compiler)
    job = cli.open_job(options, override=True, needs=("tradeoff", "experiments/tradeoff.py"))
    with job.run.lock():
        table = embed_model(job, settings)
    cli.results().out(pages.embedded_markdown(table), end="", highlight=False)


if __name__ == "__main__":
    cli.main(Options, embed, __doc__ or "")
