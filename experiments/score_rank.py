"""Which scores rank cells rightly, held against a table of trained cells.

    python experiments/score_rank.py --data-dir DIR          # the published CIFAR-10 table
    python experiments/score_rank.py --table mnist5k         # the small one, embedded images

Kendall's τ, Spearman's ρ and regret, with intervals, of counts, scores of untrained networks, short trainings and sums
of ranks. Leaves tables/score_rank.parquet, figures/regret.png and report.md. Killed, it goes on where it was.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from spikernel_jax.pipeline import cli
from spikernel_jax.pipeline.job import default_folder, open_study
from spikernel_jax.pipeline.presets import get_preset
from spikernel_jax.snn.spec import spec_from_json, spec_to_json
from spikernel_jax.studies.score_rank import make_study, rank
from spikernel_jax.studies.tables import read_table


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the comparison."""

    table: str = "cifar10"
    """A published table, or a path of one that experiments/trained_cells.py has made."""
    out: Path | None = None
    """Run folder; default runs/score-rank-TABLE-HALF-seedSEED."""
    half: Literal["looking", "held_out"] = "held_out"
    """The half of the cells that figures are of; the other is for looking, where choices are made."""
    seed: int = 0
    """Seed of weights, images and the bootstrap."""
    data_dir: Path | None = None
    """Where prepared data lie; default the environment's TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    names: tuple[str, ...] = ()
    """Predictors; default all."""
    replicates: int = 4
    """Draws of weights and images for each score."""
    batch: int = 128
    """Images a draw."""
    draws: int = 1000
    """Samples of the bootstrap."""
    compilation_cache: str | None = None
    """Folder of compiled programs, reused by later runs, or off; default a folder of the user's cache."""


def score_rank(options: Options) -> None:
    """Ranks the cells, and prints where the report is."""
    table, facts = read_table(options.table)
    spec = spec_from_json(facts["spec"])
    study = make_study(spec, table, options.names, options.replicates, options.batch, options.draws)
    preset = get_preset(facts["data"], "cpu", batch_size=options.batch * options.replicates, **facts["limits"])
    name = Path(options.table).stem
    given = {field: getattr(options, field) for field in ("half", "replicates", "batch", "draws")}
    config = {"data": facts["data"], "seed": options.seed, "table": name, "spec": spec_to_json(spec), **given}
    out = options.out or default_folder(name, options.half, options.seed, "score-rank")
    job = open_study(out, config, preset, data_dir=options.data_dir, say=cli.say)
    with job.run.lock():
        rank(job, study, options.half)
    cli.say(f"report: {job.run.path / 'report.md'}")


if __name__ == "__main__":
    cli.main(Options, score_rank, __doc__ or "")
