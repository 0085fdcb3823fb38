"""What results/ holds is whole: any published run can be read, and its page be drawn."""

from pathlib import Path

import pytest

from spikernel_jax.io.run_folder import RunFolder
from spikernel_jax.report.found import find

RESULTS = Path(__file__).resolve().parents[2] / "results"
RUNS = sorted(path.parent.name for path in RESULTS.glob("*/config.json"))


def test_there_are_runs():
    assert len(RUNS) > 20


@pytest.mark.parametrize("name", RUNS)
def test_a_published_run_is_as_it_was_written(name):
    """Tables that the run never made, or made before a column was added, are missing; none is damaged."""
    run = find(RESULTS / name)
    assert not [reason for reason in run.missing.values() if "is not as this run wrote it" in reason]
    folder = RunFolder.open(run.path)
    for file in run.path.glob("*.json"):
        if file.name != "config.json":
            assert folder.read_json(file.name)
