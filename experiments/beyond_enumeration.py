"""Spaces too large to list: evolution against random search (and pruning) at an equal number of candidates.

    python experiments/beyond_enumeration.py                        # feedback cells, MNIST digits: about 2 minutes
    python experiments/beyond_enumeration.py --space two_cells      # two independent cells: about 2 minutes
    python experiments/beyond_enumeration.py --space forward        # where the best cell is known: about 2 minutes
    python experiments/beyond_enumeration.py --data cifar10 --budget 2500 --population 100 --sample 25 --children 50

The command for CIFAR-10 takes about 10 minutes. Times are for 2 cores, estimated from 45 to 70 candidates a second
at the cpu preset's sizes. All seeds share the scoring function: the spread is that of the search alone.

Leaves tables/evaluations.parquet, figures/progress.png (best score so far, mean ± sd over seeds) and report.md.
A killed run goes on when the same command is given again.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from spikernel_jax.cells.kernels import size_set
from spikernel_jax.io.units import parse_bytes
from spikernel_jax.pipeline import cli
from spikernel_jax.pipeline.job import Job, default_folder, load_images, open_folder
from spikernel_jax.pipeline.options import resolve
from spikernel_jax.pipeline.presets import get_preset
from spikernel_jax.scoring import scores
from spikernel_jax.scoring.fidelity import NAMES
from spikernel_jax.search.evolution import Evolution
from spikernel_jax.studies.beyond_enumeration import Study, compare, over_seeds, summary_markdown


@dataclasses.dataclass(frozen=True)
class Options(cli.Shared, cli.BudgetOptions):
    """Options of the comparison."""

    out: Path | None = None
    """Run folder; default runs/beyond-SPACE-DATA-PRESET-seedSEED."""
    space: Literal["feedback", "two_cells", "forward"] = "feedback"
    """Cells with feedback edges, two independent forward cells, or one forward cell."""
    kernel_set: str = "1,3"
    """Kernel sizes of the cells."""
    budget: int = 512
    """Candidates that each search scores."""
    seeds: int = 5
    """Searches of each strategy."""
    population: int = 64
    """Candidates that may be parents."""
    sample: int = 16
    """Candidates in a tournament."""
    children: int = 16
    """Candidates scored together."""
    score: str | None = None
    """Training-free score; default the preset's."""
    fidelity: Literal["low", "medium", "full"] = "low"
    """Sizes of the networks that are scored. Memory is that of the preset's network."""


def open_study(options: Options) -> tuple[Job, Study]:
    """Checks all options, loads the data, and makes or continues the run folder, in that order."""
    data, name, seed = options.data or "mnist5k", options.preset or "cpu", options.seed or 0
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed {seed} must be from 0 to {2**32 - 1}")
    preset = get_preset(data, name)
    preset = dataclasses.replace(preset, score=options.score or preset.score)
    scores.get_score(preset.score)
    budget = preset.memory_budget if options.memory_budget is None else options.memory_budget
    study = Study(
        space=options.space,
        kernel_set=size_set(options.kernel_set, "--kernel-set"),
        budget=options.budget,
        seeds=options.seeds,
        fidelity=dict(zip(NAMES, preset.fidelities, strict=True))[options.fidelity],
        evolution=Evolution(options.population, options.sample, options.children),
        memory_budget=parse_bytes(budget),
        bits=preset.bits if options.bits is None else options.bits,
    )
    few = dataclasses.replace(preset, limit_validation=32, limit_test=32)
    images = load_images(data, options.data_dir, few, **{"batch times seeds of a score": study.fidelity.images_needed})
    config = {
        "data": data,
        "seed": seed,
        "train": len(images.train.labels),
        "settings": dataclasses.asdict(preset),
        "study": dataclasses.asdict(study),
    }
    out = options.out or default_folder(data, name, seed, f"beyond-{options.space}")
    run = open_folder(out, config, images, cli.say)
    return Job(run, images, preset, seed, resolve({}, {}, preset), cli.say), study


def beyond_enumeration(options: Options) -> None:
    """Compares the strategies."""
    job, study = open_study(options)
    with job.run.lock():
        summary = over_seeds(compare(job, study))
    cli.show(summary_markdown(summary))


if __name__ == "__main__":
    cli.main(Options, beyond_enumeration, __doc__ or "")
