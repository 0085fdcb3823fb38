"""Does the order of kernel sizes come to rest as networks are trained longer? Runs of kernel_controlled.py compared.

    python experiments/kernel_controlled.py --channels 17 --epochs 4 --out runs/kernels-e4
    python experiments/kernel_controlled.py --channels 17 --epochs 8 --out runs/kernels-e8
    python experiments/kernel_order.py runs/kernels-e4 runs/kernels-e8

Takes seconds and no data. Leaves tables/kernel_order.parquet, figures/kernel_order.png and report.md.
"""

import dataclasses
from pathlib import Path

import tyro

from spikernel_jax.io.run_folder import RunFolder
from spikernel_jax.pipeline import cli
from spikernel_jax.pipeline.job import default_folder
from spikernel_jax.studies.kernel_order import compare_lengths, read_runs


@dataclasses.dataclass(frozen=True)
class Options:
    """Which runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of finished runs that differ in their epochs alone."""
    out: Path | None = None
    """Run folder; default runs/kernel-order-DATA-PRESET-seedSEED."""


def kernel_order(options: Options) -> None:
    """Compares the runs, and prints the verdicts."""
    runs = read_runs(options.runs)
    shortest, _ = next(iter(runs.values()))
    about = {name: shortest.config[name] for name in ("data", "preset", "seed")}
    out = options.out or default_folder(about["data"], about["preset"], about["seed"], "kernel-order")
    run = RunFolder.create(out, about | {"runs": {str(epochs): own.id for epochs, (own, _) in runs.items()}})
    with run.lock():
        found = compare_lengths(run, runs)
    cli.show("".join(f"- {verdict.text}\n" for verdict in found))
    cli.say(f"report: {run.path / 'report.md'}")


if __name__ == "__main__":
    cli.main(Options, kernel_order, __doc__ or "")
