"""A table of trained cells, on which scores, counts and short trainings are measured.

    python experiments/trained_cells.py --data cifar10 --data-dir DIR --cells 20      # the pilot
    nice -n 19 python experiments/trained_cells.py --data cifar10 --data-dir DIR      # 200 cells, 2 seeds

Cells of all four kernel sizes, at most two in one cell, stratified by depth, number of convolutions and largest kernel.
A killed run goes on when the same command is given again, and one of more cells or seeds adds them. Leaves
tables/trained_cells.parquet and report.md.
"""

import dataclasses
from pathlib import Path

import jax

from spikernel_jax.cells.space import CellSpace
from spikernel_jax.pipeline import cli
from spikernel_jax.pipeline.job import default_folder, open_study
from spikernel_jax.studies.trained_cells import make_study, train_cells


@dataclasses.dataclass(frozen=True)
class Options(cli.Shared, cli.MachineOptions, cli.SizeOptions):
    """Options of the table."""

    out: Path | None = None
    """Run folder; default runs/trained-cells-DATA-PRESET-seedSEED."""
    cells: int = 200
    """How many cells; fewer are the first of more."""
    seeds: int = 2
    """Trainings of each."""
    time_steps: int | None = None
    """T; default the preset's."""
    batch_size: int | None = None
    """Images a step of training; default the preset's."""
    learning_rate: float | None = None
    """Of SGD; default the preset's."""
    at_once: int | None = None
    """Trainings, of other cells too, that are one batch; default one on a CPU, a cell's seeds on an accelerator."""
    recipe: str = "snasnet"
    """How they are trained; Muon would orthogonalise what a cell does not use, too."""


def trained_cells(options: Options) -> None:
    """Trains the cells, and prints where the table is."""
    sizes = ("epochs", "channels", "time_steps", "limit_train", "batch_size", "learning_rate")
    data, name, seed, preset = cli.study_preset(options, *sizes)
    space = CellSpace(preset.kernel_sizes, max_kernel_sizes=min(2, len(preset.kernel_sizes)))
    key = jax.random.fold_in(jax.random.key(seed), 0)
    training = preset.training(data, options.recipe)
    study = make_study(preset.network(data, space), training, options.cells, options.seeds, key, options.at_once)
    config = {
        "data": data,
        "preset": name,
        "seed": seed,
        "settings": dataclasses.asdict(preset),
        "recipe": options.recipe,
    }
    out = options.out or default_folder(data, name, seed, "trained-cells")
    job = open_study(out, config, preset, data_dir=options.data_dir, say=cli.say, bits=preset.bits)
    with job.run.lock():
        table = train_cells(job, study)
    cli.say(f"{len(table)} trainings: {job.run.path / 'report.md'}")


if __name__ == "__main__":
    cli.main(Options, trained_cells, __doc__ or "")
