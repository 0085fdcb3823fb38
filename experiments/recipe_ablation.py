"""What is each part of the recipe and the network worth? One change at a time to a base, over several seeds.

    python experiments/recipe_ablation.py                                        # MNIST digits, all rows
    python experiments/recipe_ablation.py --groups optimiser schedule --seeds 2
    python experiments/recipe_ablation.py --data cifar10 --data-dir DIR --preset gpu --epochs 10 --minutes 25
    python experiments/recipe_ablation.py --data cifar10 --data-dir DIR --preset cpu-1h --epochs 2 --channels 32

The base of the last is what accuracy.py trains with that preset, network and recipe; most rows then take away what it
is made of.

Trainings go seed by seed, and after each the table holds what there is: tables/recipe_ablation.parquet and report.md. A
killed or time-limited run goes on when the same command is given again; more rows and seeds go into the same folder.
Validation images alone are used.
"""

import dataclasses
import math
import time
from pathlib import Path

from spikernel_jax.pipeline import cli
from spikernel_jax.pipeline.job import Job, default_folder, open_study, seeds_of
from spikernel_jax.snn.spec import spec_to_json
from spikernel_jax.studies.recipe_ablation import Base, Row, ablate, make_base, over_seeds, summary_markdown


@dataclasses.dataclass(frozen=True)
class Options(cli.Shared, cli.MachineOptions, cli.SizeOptions):
    """Options of the ablation."""

    out: Path | None = None
    """Run folder; default runs/recipe-ablation-DATA-PRESET-seedSEED."""
    rows: tuple[str, ...] = ()
    """Rows by name, as nesterov one-cycle; default all, or those of --groups. An unknown name lists them."""
    groups: tuple[str, ...] = ()
    """Groups of rows, besides --rows: optimiser, schedule, loss, augmentation, weights, network, time, neuron, cell,
    width, recipe."""
    seeds: int = 3
    """Trainings of each row."""
    time_steps: int | None = None
    """Time steps T of the base; default the preset's."""
    batch_size: int | None = None
    """Images a step; default the preset's."""
    base_recipe: str | None = None
    """Recipe of the base, snasnet (default) or tuned; a preset of accuracy.py, as cpu-1h, has its own."""
    precision: str | None = None
    """Of convolutions in every training, float32 (default) or bfloat16."""
    minutes: float = math.inf
    """No training is begun after so many minutes; default no limit."""


def open_ablation(options: Options) -> tuple[Job, Base, list[Row]]:
    """Checks all options, loads the data, and makes or continues the run folder, in that order."""
    sizes = ("epochs", "channels", "limit_train", "time_steps", "batch_size", "precision", "bits")
    data, name, seed = cli.study_of(options)
    if not 1 <= options.seeds <= 1000:
        raise ValueError(f"--seeds {options.seeds} must be from 1 to 1000")
    if not options.minutes > 0:
        raise ValueError(f"--minutes {options.minutes} must be above 0")
    preset, base = make_base(data, name, options.base_recipe, **{size: getattr(options, size) for size in sizes})
    rows = base.choose(options.rows, options.groups)
    config = {
        "data": data,
        "preset": name,
        "seed": seed,
        "base_recipe": base.recipe,
        "config": dataclasses.asdict(base.config),
        "spec": spec_to_json(base.spec),
        "cell": preset.impact_cell,
        "bits": preset.bits,
    }
    out = options.out or default_folder(data, name, seed, "recipe-ablation")
    job = open_study(out, config, preset, data_dir=options.data_dir, say=cli.say, bits=preset.bits)
    return job, base, rows


def recipe_ablation(options: Options) -> None:
    """Trains the rows, and prints the table."""
    deadline = time.monotonic() + 60 * options.minutes
    job, base, rows = open_ablation(options)
    seeds = seeds_of(job.seed, options.seeds)
    with job.run.lock():
        table = ablate(job, base, rows, seeds, deadline)
    if not table.is_empty():
        cli.show(summary_markdown(over_seeds(table), narrow=True))


if __name__ == "__main__":
    cli.main(Options, recipe_ablation, __doc__ or "")
