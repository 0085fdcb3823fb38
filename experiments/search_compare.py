"""Which way of searching finds the best cell in as many seconds, played on a table of trained cells.

    python experiments/search_compare.py --data-dir DIR      # the published CIFAR-10 table
    python experiments/search_compare.py --table mnist5k     # the small one, embedded images

The default search, ended by short trainings, against random cells, SAHD alone, depth alone, one epoch alone, and its
own prior without short trainings. Leaves tables/search_compare.parquet, figures/searches.png and report.md.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from spikernel_jax.pipeline import cli
from spikernel_jax.pipeline.job import default_folder, open_study
from spikernel_jax.pipeline.presets import get_preset
from spikernel_jax.snn.spec import spec_from_json, spec_to_json
from spikernel_jax.studies.score_rank import make_study
from spikernel_jax.studies.search_compare import PREDICTORS, compare
from spikernel_jax.studies.tables import read_table


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the comparison."""

    table: str = "cifar10"
    """A published table, or a path of one that experiments/trained_cells.py has made."""
    out: Path | None = None
    """Run folder; default runs/search-compare-TABLE-HALF-seedSEED."""
    half: Literal["looking", "held_out"] = "held_out"
    """The half of the cells that figures are of; the other is for looking, where choices are made."""
    seed: int = 0
    """Seed of weights, images and repeats."""
    data_dir: Path | None = None
    """Where prepared data lie; default the environment's TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    replicates: int = 4
    """Draws of weights and images for each score."""
    batch: int = 128
    """Images a draw."""
    repeats: int = 100
    """Searches of each kind and budget."""
    compilation_cache: str | None = None
    """Folder of compiled programs, reused by later runs, or off; default a folder of the user's cache."""


def search_compare(options: Options) -> None:
    """Plays the searches, and prints where the report is."""
    if options.repeats < 2:
        raise ValueError(f"--repeats {options.repeats} must be at least 2")
    table, facts = read_table(options.table)
    spec = spec_from_json(facts["spec"])
    study = make_study(spec, table, PREDICTORS, options.replicates, options.batch, 1)
    preset = get_preset(facts["data"], "cpu", batch_size=options.batch * options.replicates, **facts["limits"])
    name = Path(options.table).stem
    given = {field: getattr(options, field) for field in ("half", "replicates", "batch", "repeats")}
    config = {"data": facts["data"], "seed": options.seed, "table": name, "spec": spec_to_json(spec), **given}
    out = options.out or default_folder(name, options.half, options.seed, "search-compare")
    job = open_study(out, config, preset, data_dir=options.data_dir, say=cli.say)
    with job.run.lock():
        compare(job, study, options.half, options.repeats)
    cli.say(f"report: {job.run.path / 'report.md'}")


if __name__ == "__main__":
    cli.main(Options, search_compare, __doc__ or "")
