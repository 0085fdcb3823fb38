"""Copies what a run measured into results/: report, figures, tables, configuration, by request the model; no paths.

Use: ``python tools/publish_run.py runs/mnist5k-cpu-seed0``

The copy is a run's folder too, sealed as one: ``--page`` or ``experiments/report.py`` draws its page,
``tools/compare_runs.py`` compares it. ``--checkpoint`` puts the model of a training in a given time beside it.
"""

import dataclasses
import os
import re
import shutil
from pathlib import Path
from typing import Any

import tyro

from spikernel_jax.io import seal
from spikernel_jax.io.files import atomic_folder
from spikernel_jax.io.run_folder import RunFolder
from spikernel_jax.pipeline import cli
from spikernel_jax.report.page import PAGE, write_page
from spikernel_jax.training.checkpoint import load_model, save_model

NEEDED = ("config.json", "report.md")  # of a finished run
MEASURED = ("tables", "training/metrics.jsonl")  # one of them too
CHECKPOINT = "checkpoint"
KEPT = (*NEEDED, *MEASURED, "plan.json", "summary.json", "figures")


@dataclasses.dataclass(frozen=True)
class Options:
    """Which run to publish, and where."""

    run: tyro.conf.Positional[Path]
    """A finished run's folder."""
    results: Path = Path("results")
    """Where results are kept; the run gets a folder of its name."""
    page: bool = False
    """Draw its page there too, 2 to 5 MB."""
    checkpoint: bool = False
    """Export its checkpoint/ there too."""


def publish(options: Options) -> None:
    """Copies the finished parts of a run; an earlier copy is replaced once the new one is whole.

    Absolute paths in the texts are cut to their last component: they tell of a machine, not of the run.

    Raises:
      ValueError: the run is not finished, or a file is not as it wrote it, or its copy would lie in it, on it or
        around it, or would replace something that is no earlier copy, or has a checkpoint that it lacks.
    """
    run = RunFolder.open(options.run)
    missing = [name for name in NEEDED if not (run.path / name).exists()]
    if not any((run.path / name).exists() for name in MEASURED):
        missing.append(" or ".join(MEASURED))
    if missing:
        raise ValueError(f"{run.path} is not finished: it has no {', '.join(missing)}")
    source = run.path.resolve()
    target = options.results.resolve() / source.name
    if source in (target, *target.parents) or target.resolve() in (source, *source.parents):
        raise ValueError(f"{run.path} and its copy {target} would overlap: choose another --results")
    if os.path.lexists(target):
        ours = target.is_dir() and not target.is_symlink()
        tops = {Path(name).parts[0] for name in KEPT} | {PAGE, CHECKPOINT}
        if ours and not options.checkpoint and (target / CHECKPOINT).exists():
            raise ValueError(
                f"{target} has a checkpoint, which the new copy would not: give --checkpoint, or move it away"
            )
        if not ours or any(entry.name not in tops for entry in target.iterdir()):
            raise ValueError(f"{target} is there and is no published run: move it away")
    model = load_model(run.path / CHECKPOINT) if options.checkpoint else None
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(target) as fresh:
        fresh.mkdir()
        for name in KEPT:
            if (source / name).exists():
                (fresh / name).parent.mkdir(exist_ok=True)
                _publish_file(run, name, fresh / name)
        if model is not None:
            save_model(fresh / CHECKPOINT, model)  # made anew, it knows nothing of where the run's own was
    if options.page:
        write_page([options.results / source.name])  # drawn of the copy: the run's own may name paths
    cli.say(f"published {target}")


def _publish_file(run: RunFolder, name: str, target: Path) -> None:
    """Copies a file or folder, texts without absolute paths, and then sealed anew."""
    source = run.path / name
    if source.is_dir():
        shutil.copytree(source, target)
    elif name == "config.json":
        seal.write_json(target, _without_paths(run.record()), name)
    elif source.suffix == ".json":
        seal.write_json(target, _without_paths(run.read_json(name)), f"{run.id}/{name}")
    else:
        target.write_text(_text_without_paths(source.read_text("utf-8")), "utf-8")


def _without_paths(value: Any) -> Any:
    """A JSON value whose strings hold no absolute paths."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    option, equals, path = value.rpartition("=") if value.startswith("--") else ("", "", value)
    # A whole string is looked at first, since a path may have blanks.
    return option + equals + (Path(path).name if os.path.isabs(path) else _text_without_paths(path))


# Two components at least, so that "a /b" stays; what precedes rules out relative paths, fractions and URLs.
_ABSOLUTE = re.compile(r"""(?<![\w.~:/<-])/(?:[^\s/"'`()<>|,;]+/)+([^\s/"'`()<>|,;]*)""")


def _text_without_paths(text: str) -> str:
    return _ABSOLUTE.sub(lambda found: found[1] or Path(found[0]).name, text)


if __name__ == "__main__":
    cli.main(Options, publish, __doc__ or "")
