"""A whole exploration of operations other than kernel sizes, one of them from a file outside the package."""

import contextlib
import io
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import scripts
from spikernel_jax import load_model
from spikernel_jax.cells.space import CellSpace
from spikernel_jax.io.run_folder import RunFolder
from spikernel_jax.pipeline.options import resolve
from spikernel_jax.pipeline.presets import get_preset

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
SMOKE = ("--preset", "smoke", "--recipe", "snasnet")
OWN = """
from spikernel_jax import Layer, Operation, chain, register_operation

register_operation(
    Operation("tested3", "generic", reads_spikes=True, threshold=0.4, **chain(lambda c: {"": Layer((3, 3, c, c), c)}))
)
"""
NAMES = ("zero", "skip", "conv1@0.5", "tested3")


@pytest.fixture(scope="module")
def explored(tmp_path_factory) -> tuple[Path, Path]:
    """A finished run, and the file that registers its operation."""
    folder = tmp_path_factory.mktemp("operations")
    own, out = folder / "own.py", folder / "run"
    own.write_text(OWN)
    with contextlib.redirect_stdout(io.StringIO()):
        scripts.start(EXPERIMENTS / "explore.py", *SMOKE, "--out", str(out), "--load", str(own), "--operations", *NAMES)
    return out, own


@pytest.mark.slow
def test_step_1_compares_what_reads_spikes_and_step_3_searches_all(explored):
    out, _ = explored
    tables = {name: pl.read_parquet(out / "tables" / f"{name}.parquet") for name in ("impact", "search", "tradeoff")}
    space = CellSpace(operations=NAMES)
    assert tables["impact"]["kernel"].unique(maintain_order=True).to_list() == ["conv1@0.5", "tested3"]
    assert tables["search"]["kernel_set"].unique().to_list() == ["conv1@0.5,tested3"]
    fit = tables["search"].filter("fits")["genotype"]
    assert len(fit) == fit.n_unique()
    assert {space.explicit(row) for row in space.enumerate()} >= set(fit.to_list())
    assert len(tables["search"]) > 500
    names = set(tables["tradeoff"]["name"].to_list())
    assert {"set1", "random-set1", "unsearched-conv1@0.5", "unsearched-tested3"} == names


@pytest.mark.slow
def test_the_chosen_model_is_what_was_trained(explored):
    out, _ = explored
    chosen = RunFolder.open(out).read_json("summary.json")["chosen"]
    model = load_model(out / "finalists" / chosen["name"] / "checkpoint")
    assert model.spec.space == CellSpace(operations=NAMES)
    assert model.spec.space.explicit(model.genotype) == chosen["genotype"]
    assert chosen["kernels"] == ["conv1@0.5", "tested3"]
    assert np.isfinite(model(np.zeros((2, 28, 28, 1), np.uint8))).all()


@pytest.mark.slow
def test_the_same_command_goes_on_and_other_operations_are_refused(explored, capsys):
    out, own = explored
    options = (*SMOKE, "--out", str(out), "--load", str(own))
    before = (out / "tables" / "tradeoff.parquet").read_bytes()
    scripts.start(EXPERIMENTS / "explore.py", *options)  # the folder remembers its operations
    assert (out / "tables" / "tradeoff.parquet").read_bytes() == before
    capsys.readouterr()
    said = scripts.refused(EXPERIMENTS / "explore.py", capsys, *options, "--operations", "zero", "conv3")
    assert "--operations zero conv3 differs from this run's zero skip conv1@0.5 tested3" in said
    said = scripts.refused(EXPERIMENTS / "explore.py", capsys, *SMOKE, "--out", str(out))
    assert "loaded" in said  # the file that registers what the run is of


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"operations": ("zero", "skip")}, "--operations zero skip: want at least one that is generic"),
        ({"operations": ("zero", "cnv3")}, "operation 'cnv3' is unknown: did you mean 'conv3'"),
        ({"operations": ("zero", "conv3"), "kernel_sizes": (3,)}, "--kernel-sizes 3: leave them out"),
        ({"operations": ("zero", "skip", "conv3"), "sets": ["conv3@0.5"]}, "--operations zero skip conv3 lacks conv3@"),
        ({"operations": ("zero", "conv3")}, "has skip on edge 0>3"),  # of the preset's cell
        ({"sets": ["3,conv3@0.5"]}, "lacks conv3@0.5"),
        ({"sets": ["3,avgpool"]}, "want different odd sizes, or generic operations"),
        ({"sets": ["3,conv3"]}, "want different odd sizes, or generic operations"),
    ],
)
def test_options_refuse(given, words):
    with pytest.raises(ValueError, match=words):
        resolve(given, {}, get_preset("mnist5k", "smoke"))


def test_sets_of_operations():
    given = {"operations": ("zero", "skip", "conv3", "conv3@0.5", "maxpool3"), "sets": ["3,conv3@0.5", "maxpool3"]}
    options = resolve(given, {}, get_preset("mnist5k", "smoke"))
    assert options.sets == ((3, "conv3@0.5"), ("maxpool3",))
    assert options.space.kernels == (3, "conv3@0.5", "maxpool3")
    assert resolve({}, options.as_json(), get_preset("mnist5k", "smoke")) == options


@pytest.mark.parametrize(("text", "words"), [(None, "no such file"), ("1 / 0", "ZeroDivisionError: division by zero")])
def test_a_file_that_cannot_be_run_is_named(text, words, tmp_path, capsys):
    path = tmp_path / "own.py"
    if text:
        path.write_text(text)
    said = scripts.refused(
        EXPERIMENTS / "explore.py", capsys, *SMOKE, "--load", str(path), "--out", str(tmp_path / "o")
    )
    assert str(path) in said
    assert words in said
    assert not (tmp_path / "o").exists()
