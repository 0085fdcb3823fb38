"""Inputs that used to give a wrong result, a traceback or no answer: each is one line that names field and value."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from spikernel_jax import CellSpace, NetworkSpec, TrainConfig, load_snasnet, make_bank, make_dataset, score_population
from spikernel_jax.data import Split
from spikernel_jax.pipeline.options import impact_genotypes, resolve
from spikernel_jax.pipeline.presets import get_preset
from spikernel_jax.snn.spec import NetworkSpec as Spec

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
SPEC = NetworkSpec((8, 8, 1), 2, CellSpace((3,)), channels=4, time_steps=2)
IMAGES = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (Spec((8, 8, 1), 2, CellSpace((3,)), channels=5, time_steps=2), "bank: cell1"),
        (Spec((8, 8, 1), 2, CellSpace((5,)), channels=4, time_steps=2), "bank has no 'cell1"),
        (Spec((8, 8, 1), 3, CellSpace((3,)), channels=4, time_steps=2), "bank: head.out's"),
    ],
)
def test_a_bank_of_another_network_scores_nothing(other, words):
    bank = jax.eval_shape(lambda: make_bank(jax.random.key(0), other, 1))
    bank = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), bank)
    with pytest.raises(ValueError, match=words) as error:
        score_population(SPEC.space.enumerate()[:2], bank, IMAGES, SPEC)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: make_bank(jax.random.key(0), SPEC, seeds=1.5), "seeds=1.5"),  # pyright: ignore
        (lambda: NetworkSpec((8, 8, 1), 2, channels=0), "channels=0"),
        (lambda: NetworkSpec((8, 8, 1), float("nan")), "num_classes=nan"),  # pyright: ignore
        (lambda: NetworkSpec((8, 8, 1), 2, time_steps=10**9), "time_steps=1000000000"),
        (lambda: NetworkSpec((8, 10**9, 1), 2), "1000000000"),
        (lambda: TrainConfig(flip="no"), "flip='no' must be True or False"),  # pyright: ignore
        (lambda: TrainConfig(cutout=float("nan")), "cutout=nan must be a whole number"),  # pyright: ignore
        (lambda: TrainConfig(epochs=True), "epochs=True must be a whole number"),
        (lambda: load_snasnet({}, "0003 0000 0000 0000", stem_stride=0), "state_dict has no"),
    ],
)
def test_settings_of_another_kind(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_narrow_integers_do_not_overflow():
    spec = NetworkSpec((8, 8, 1), 2, channels=np.int8(100))  # pyright: ignore
    assert spec.cell_channels(1) == 200


def test_masked_images_are_refused():
    images = np.random.default_rng(0).integers(0, 255, (6, 8, 8, 1), dtype=np.uint8)
    split = Split(images, np.arange(6) % 2)
    masked = Split(np.ma.masked_greater(images, 200), split.labels)
    with pytest.raises(ValueError, match="own train: images are a masked array"):
        make_dataset("own", masked, split, split, 2)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"sets": ["3,5"], "kernel_sizes": (1, 3)}, "--kernel-sizes 1 3 lacks 5"),
        ({"cell": "0>1:convK 0>3:skip"}, "edges that lead nowhere: what is left of it is '0>3:skip'"),
        ({"samples": 10**12}, "--samples 1000000000000 must be"),
        ({"sets": ["1,3,5,7,9,11,13,15"]}, "want at most 4 sizes in a set"),
        ({"bit": 8}, r"options \['bit'\] are unknown"),
    ],
)
def test_options_that_would_fail_late_or_never_end(given: dict[str, Any], words):
    with pytest.raises(ValueError, match=words):
        resolve(given, {}, get_preset("mnist5k", "smoke"))


def test_a_cell_with_a_live_node_is_taken():
    space, rows = impact_genotypes((3, 5), "0>1:convK 0>3:skip 1>3:convK")
    assert [space.explicit(row) for row in rows.values()] == [
        "0>1:conv3 0>3:skip 1>3:conv3",
        "0>1:conv5 0>3:skip 1>3:conv5",
    ]


def test_a_terminal_of_another_alphabet_and_a_reader_that_leaves(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import dataclasses\n"
        "from spikernel_jax.pipeline import cli\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class Options:\n"
        "    lines: int = 3\n"
        "def body(options):\n"
        "    for i in range(options.lines):\n"
        "        cli.say(f'{i} µJ')\n"
        "    open('done', 'w').close()\n"
        "cli.main(Options, body, '')\n"
    )
    environment = os.environ | {"PYTHONPATH": str(EXPERIMENTS.parent), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, str(script)]
    told = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "2 ?J" in told.stdout
    (tmp_path / "done").unlink()
    piped = f"{sys.executable} {script} --lines 20000 | head -1; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", piped], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert (tmp_path / "done").exists()  # the work was done to its end
