"""A damaged run ends in one clear line or in the right result: a short attack; `attack.py --long` is the long one."""

import contextlib
import io
from pathlib import Path

import pytest

import attack
import scripts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Two finished runs of other seeds."""
    folders = [tmp_path_factory.mktemp("runs") / name for name in ("own", "other")]
    for seed, folder in enumerate(folders):
        with contextlib.redirect_stdout(io.StringIO()):
            scripts.start(attack.EXPLORE, *attack.SMOKE, "--seed", str(seed), "--out", str(folder))
    return folders


def test_no_damage_is_silent(runs):
    counts, wrong = attack.attack(runs[0], runs[1], mutations=48)
    assert not wrong
    assert counts["named"] >= 5
    assert counts["right"] >= 3
