"""Damages a finished run, file by file: the same command must then err in one line, or give the right result.

python tests/faults/attack.py --long       # 300 mutations of every kind of file, 20 kills; 25 minutes on 2 cores
"""

import contextlib
import dataclasses
import io
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import scripts

EXPLORE = Path(__file__).resolve().parents[2] / "experiments" / "explore.py"
SMOKE = ("--preset", "smoke", "--recipe", "snasnet")
TABLES = ("impact", "search", "finalists", "baselines", "tradeoff")


def flip(content: bytes, rng: np.random.Generator) -> bytes:
    """One bit."""
    spoilt = bytearray(content)
    spoilt[rng.integers(len(spoilt))] ^= 1 << rng.integers(8)
    return bytes(spoilt)


def digit(content: bytes, rng: np.random.Generator) -> bytes:
    """One digit is another one, which leaves numbers in text as plausible as before."""
    places = [i for i, byte in enumerate(content) if 48 <= byte <= 57]  # "0" to "9"
    if not places:
        return flip(content, rng)
    at = places[rng.integers(len(places))]
    return content[:at] + str((int(chr(content[at])) + int(rng.integers(1, 10))) % 10).encode() + content[at + 1 :]


KINDS: dict[str, Callable[[bytes, np.random.Generator], bytes]] = {
    "a bit": flip,
    "a digit": digit,
    "cut": lambda content, rng: content[: rng.integers(len(content))],
    "empty": lambda content, rng: b"",
    "other JSON": lambda content, rng: (b"[]", b"{}", b'"8"', b"8", b"null")[rng.integers(5)],
    "more": lambda content, rng: content + bytes(rng.integers(0, 256, 9).tolist()),
}


def files_of(folder: Path) -> list[Path]:
    """What a later start may read."""
    unread = (".png", ".pdf", ".lock", ".md")
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in unread)


def result_of(folder: Path) -> tuple[list[pl.DataFrame], str]:
    """What a run found, time apart."""
    tables = [pl.read_parquet((folder / "tables" / f"{name}.parquet").read_bytes()) for name in TABLES]
    chosen = json.loads((folder / "summary.json").read_text())["chosen"]
    return tables, json.dumps({name: value for name, value in chosen.items() if name != "checkpoint"}, sort_keys=True)


def outcome(folder: Path, right: tuple[list[pl.DataFrame], str]) -> str:
    """What the same command does now: "named" in one line, "right", or a word on what is wrong."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            scripts.start(EXPLORE, *SMOKE, "--out", str(folder))
    except SystemExit as stop:
        lines = err.getvalue().splitlines()
        return "named" if stop.code == 2 and len(lines) == 1 and lines[0].startswith("error: ") else f"said {lines}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    tables, chosen = result_of(folder)
    same = chosen == right[1] and all(a.equals(b) for a, b in zip(tables, right[0], strict=True))
    return "right" if same else "a wrong result in silence"


def attack(finished: Path, other: Path, mutations: int, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """Mutates one file at a time of a copy.

    Args:
      finished: a run of `SMOKE`.
      other: another run of it, whose files are put in the place of this one's now and then.
      mutations: how many.
      seed: which.

    Returns:
      Counts of "named" and "right", and a line on each that is neither.
    """
    rng, counts, wrong = np.random.default_rng(seed), Counter(), []
    right, paths = result_of(finished), [path.relative_to(finished) for path in files_of(finished)]
    kinds = sorted({(path.parts[0], path.suffix or path.name) for path in paths})
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / finished.name
        for number in itertools.count():
            if counts.total() == mutations:
                break
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(finished, folder)
            kind = kinds[number % len(kinds)]
            own = [path for path in paths if (path.parts[0], path.suffix or path.name) == kind]
            path = own[rng.integers(len(own))]
            how = ["gone", "another run's", *KINDS][rng.integers(2 + len(KINDS))]
            content = (folder / path).read_bytes()
            if how == "gone":
                (folder / path).unlink()
            elif how == "another run's":
                if not (other / path).exists():
                    continue
                (folder / path).write_bytes((other / path).read_bytes())
            elif content:
                (folder / path).write_bytes(KINDS[how](content, rng))
            found = outcome(folder, right)
            counts[found if found in ("named", "right") else "wrong"] += 1
            if found not in ("named", "right"):
                wrong.append(f"{path}: {how}: {found}")
    return counts, wrong


def kills(finished: Path, times: int, seed: int = 0) -> list[str]:
    """Kills a run of `SMOKE` at moments drawn at random and lets it end; a line on each that ends otherwise."""
    rng, right, wrong, number = np.random.default_rng(seed), result_of(finished), [], 0
    while number < times:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / finished.name
            command = [sys.executable, str(EXPLORE), *SMOKE, "--out", str(folder)]
            ended = None
            while ended is None and number < times:
                process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
                try:
                    ended = process.wait(rng.uniform(4, 25))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    number += 1
            last = subprocess.run(command, capture_output=True, text=True)
            if last.returncode:
                wrong.append(f"after {number} kills: {last.stderr.strip()[-300:]}")
            else:
                tables, chosen = result_of(folder)
                if chosen != right[1] or not all(a.equals(b) for a, b in zip(tables, right[0], strict=True)):
                    wrong.append(f"after {number} kills: a wrong result in silence")
    return wrong


@dataclasses.dataclass(frozen=True)
class Options:
    """How much is attacked."""

    long: bool = False
    """300 mutations and 20 kills instead of 24 mutations."""
    seed: int = 0
    """Which."""


def main(options: Options) -> None:
    """Makes two runs, attacks the first, and prints the counts."""
    with tempfile.TemporaryDirectory() as scratch:
        runs = [Path(scratch) / name for name in ("own", "other")]
        for seed, run in enumerate(runs):
            scripts.start(EXPLORE, *SMOKE, "--seed", str(seed), "--out", str(run))
        counts, wrong = attack(runs[0], runs[1], 300 if options.long else 24, options.seed)
        if options.long:
            wrong += kills(runs[0], 20, options.seed)
            counts["kills"] = 20
    print(dict(counts), *wrong, sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main(tyro.cli(Options))
