"""Is it the kernel size, or the parameters that come with it? The same cell at equal width and at equal parameters.

    python experiments/kernel_controlled.py --channels 17           # MNIST digits
    python experiments/kernel_controlled.py --data cifar10 --data-dir DIR --channels 17 --epochs 3

At C = 17 the parameters of all sizes come within 3 % of the reference's; at the presets' C = 16 and C = 8 those of
kernel size 7 are 12 % below and 14 % above it.

Only the cells' convolutions change size: stem and transition stay 3x3 in all networks. Leaves
tables/kernel_controlled.parquet, figures/kernel_controlled.png and report.md. A killed run goes on when the same
command is given again.
"""

import dataclasses
from pathlib import Path

from spikernel_jax.pipeline import cli
from spikernel_jax.pipeline.job import Job, default_folder, open_study
from spikernel_jax.studies.kernel_controlled import Study, accuracy_markdown, compare, make_study, over_seeds
from spikernel_jax.training.recipe import DEFAULT_RECIPE


@dataclasses.dataclass(frozen=True)
class Options(cli.Shared, cli.ImpactOptions, cli.TrainingOptions, cli.SizeOptions):
    """Options of the comparison."""

    out: Path | None = None
    """Run folder; default runs/kernel-controlled-DATA-PRESET-seedSEED."""
    kernel_sizes: tuple[int, ...] = ()
    """Kernel sizes, 3 and others; default the preset's."""
    cell: str | None = None
    """Cell with K for the kernel size, as '0>1:convK 1>3:convK 0>3:skip'; default the preset's."""
    seeds: int = 3
    """Trainings of each network."""
    channels: int | None = None
    """Width C of all networks at equal width, and of the reference; default the preset's."""
    parameters: int | None = None
    """Parameters that equal parameters come nearest to; default those of kernel size 3 at the equal width."""


def open_comparison(options: Options) -> tuple[Job, Study]:
    """Checks all options, loads the data, and makes or continues the run folder, in that order."""
    data, name, seed, preset = cli.study_preset(
        options,
        *("epochs", "channels", "limit_train", "seeds"),
        kernel_sizes=tuple(sorted(options.kernel_sizes)) or None,
        impact_cell=options.cell,
    )
    recipe = options.recipe or DEFAULT_RECIPE
    study = make_study(data, preset, recipe, options.parameters)
    config = {
        "data": data,
        "preset": name,
        "seed": seed,
        "settings": dataclasses.asdict(preset),
        "recipe": recipe,
        "parameters": study.parameters,
    }
    out = options.out or default_folder(data, name, seed, "kernel-controlled")
    job = open_study(out, config, preset, data_dir=options.data_dir, say=cli.say, bits=preset.bits, recipe=recipe)
    return job, study


def kernel_controlled(options: Options) -> None:
    """Compares the kernel sizes, and prints the accuracies."""
    job, study = open_comparison(options)
    with job.run.lock():
        summary = over_seeds(compare(job, study))
    cli.show(accuracy_markdown(summary))


if __name__ == "__main__":
    cli.main(Options, kernel_controlled, __doc__ or "")
