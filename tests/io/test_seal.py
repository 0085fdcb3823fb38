"""Seals: every flipped bit, every mix-up and every moment of a kill."""

import json
import os

import numpy as np
import polars as pl
import pytest

from spikernel_jax.io import files, seal
from spikernel_jax.io.run_folder import RunFolder

VALUE = {"bits": 8, "sets": [[1, 3], None], "name": "é", "score": 24.04}


def test_what_is_written_is_read(tmp_path):
    seal.write_json(tmp_path / "x.json", VALUE, "run/x")
    assert seal.read_json(tmp_path / "x.json", "run/x", "") == VALUE
    assert json.loads((tmp_path / "x.json").read_text())["bits"] == 8  # for people, too
    seal.write(tmp_path / "t", b"content", "run/t")
    assert seal.read(tmp_path / "t", "run/t", "") == b"content"
    seal.write(tmp_path / "t", b"again", "run/t")
    assert seal.read(tmp_path / "t", "run/t", "") == b"again"


@pytest.mark.parametrize(
    "text",
    ["[]", '"8"', "8", "null", "{}", '{"bits": 8}', '{"bits": 7, "sets": [[1, 3], null], "name": "é", "score": 24.04}'],
)
def test_other_json_is_refused(text, tmp_path):
    seal.write_json(tmp_path / "x.json", VALUE, "run/x")
    written = json.loads((tmp_path / "x.json").read_text())
    there = json.loads(text)
    (tmp_path / "x.json").write_text(
        json.dumps(there | {"seal": written["seal"]} if isinstance(there, dict) else there)
    )
    with pytest.raises(ValueError, match=r"x\.json is not as this run wrote it: do this") as error:
        seal.read_json(tmp_path / "x.json", "run/x", "do this")
    assert "\n" not in str(error.value)


def test_another_owners_file_is_refused(tmp_path):
    seal.write_json(tmp_path / "x.json", VALUE, "run/x")
    seal.write(tmp_path / "t", b"content", "run/t")
    for owner in ("other/x", "run/y"):
        with pytest.raises(ValueError, match="is not as this run wrote it"):
            seal.read_json(tmp_path / "x.json", owner, "")
        with pytest.raises(ValueError, match="is not as this run wrote it"):
            seal.read(tmp_path / "t", owner, "")
    (tmp_path / "t.seal").unlink()
    with pytest.raises(ValueError, match="is not as this run wrote it"):
        seal.read(tmp_path / "t", "run/t", "")


def test_no_flipped_bit_of_a_table_reaches_the_parser(tmp_path):
    run = RunFolder.create(tmp_path / "run", {"seed": 0})
    table = pl.DataFrame({"genotype": ["0>3:skip"] * 50, "score": np.linspace(0, 1, 50)})
    run.write_table("search", table)
    path = run.path / "tables" / "search.parquet"
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(300):
        spoilt = bytearray(whole)
        spoilt[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        path.write_bytes(spoilt)
        with pytest.raises(ValueError, match=r"search\.parquet is not as this run wrote it: delete it and run it"):
            run.read_table("search", "it")
    path.write_bytes(whole)
    assert run.read_table("search", "it").equals(table)
    other = RunFolder.create(tmp_path / "other", {"seed": 0})
    other.write_table("search", table.with_columns(score=pl.col("score") + 1))
    for name in ("search.parquet", "search.parquet.seal"):
        (path.parent / name).write_bytes((other.path / "tables" / name).read_bytes())
    with pytest.raises(ValueError, match="is not as this run wrote it"):
        run.read_table("search", "it")  # with its seal, but another run's


def test_the_file_there_is_sealed_at_every_moment(tmp_path, monkeypatch):
    """Killed before any of the moves by which it is written, the earlier file or the new one can be read."""
    real, moves = os.replace, []
    for survived in range(4):
        seal.write(tmp_path / "t", b"old", "o")
        moves.clear()

        def move(*where, survived=survived):
            if len(moves) == survived:
                raise KeyboardInterrupt
            moves.append(where)
            real(*where)

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "replace", move)
            if survived < 3:
                with pytest.raises(KeyboardInterrupt):
                    seal.write(tmp_path / "t", b"new", "o")
            else:
                seal.write(tmp_path / "t", b"new", "o")
        assert seal.read(tmp_path / "t", "o", "") == (b"old" if survived < 2 else b"new")


@pytest.mark.parametrize("name", ["exp [lr=0.1]", "a]b", "back\\slash", "what?", "all*", "line\nbreak", "\udcff"])
def test_paths_that_checkpoints_cannot_have_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match="choose another") as error:
        RunFolder.create(tmp_path / name, {})
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
