"""A job: the settings of one run, checked as a whole before anything is written, and remembered in its folder.

The options of the steps live in ``options.json`` of the run folder. A later script that does not give an
option takes it from there; one that gives another value is refused, so no two settings mix in one folder.
"""

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spikernel_jax.cells.space import CellSpace
from spikernel_jax.data import DATASETS, Dataset, load_dataset
from spikernel_jax.io.processes import ALONE, Processes
from spikernel_jax.io.run_folder import RunFolder
from spikernel_jax.pipeline import tradeoff
from spikernel_jax.pipeline.presets import Preset, get_preset
from spikernel_jax.scoring.fidelity import NAMES
from spikernel_jax.search.queue import STRATEGIES
from spikernel_jax.snn.cost import costs
from spikernel_jax.snn.spec import NetworkSpec
from spikernel_jax.training.recipe import DEFAULT_RECIPE, named_recipe

Say = Callable[[str], None]

KEEP = ("rule", "all")
_OPTIONS = "options.json"
_LARGEST_SEED = 2**32 // 1000 - 1  # step 1 numbers its trainings seed·1000 + index, and keys hold 32 bits of it


@dataclasses.dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
      run: its folder.
      data: its images.
      preset: its preset.
      seed: of everything random in it.
      options: of its steps: kernel_sizes, cell, sets, keep, strategy, samples, fidelity, memory_budget (bytes), bits,
        recipe.
      say: prints a line of progress.
      processes: this process among those of the job.
    """

    run: RunFolder
    data: Dataset
    preset: Preset
    seed: int
    options: dict[str, Any]
    say: Say
    processes: Processes = ALONE

    @property
    def seeds(self) -> range:
        """Of the trainings of every network."""
        return range(self.seed * 1000, self.seed * 1000 + self.preset.seeds)

    def network(self, space: CellSpace) -> NetworkSpec:
        """The network of a space's cells on the job's images, as it is trained."""
        return self.preset.network(self.data.name, self.data.num_classes, space)

    def key(self, purpose: int) -> jax.Array:
        """The key of one purpose; no two purposes share one."""
        return jax.random.fold_in(jax.random.key(self.seed), purpose)

    def remember(self, *names: str) -> None:
        """Makes options the run's own: called by a step once its input is known to be good, before long work."""
        _, there = settings_there(self.run.path)
        self.run.write_json(_OPTIONS, there | {name: self.options[name] for name in names})


def impact_genotypes(kernel_sizes: Sequence[int], cell: str) -> tuple[CellSpace, dict[int, np.ndarray]]:
    """The space of the sizes, and the cell of step 1 at each size.

    Raises:
      ValueError: on sizes that are not odd, or a cell that is malformed, disconnected, or without convK.
    """
    space = CellSpace(tuple(sorted(kernel_sizes)))
    if "convK" not in cell:
        raise ValueError(f"--cell {cell!r} has no convK: want explicit notation as '0>1:convK 1>3:convK 0>3:skip'")
    return space, {k: space.parse(cell.replace("convK", f"conv{k}")) for k in space.kernel_sizes}


def settings_there(out: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configuration and options of a run folder; both empty where there is no run yet."""
    if not (Path(out) / "config.json").exists():
        return {}, {}
    run = RunFolder.open(out)
    return run.config, run.read_json(_OPTIONS) if (run.path / _OPTIONS).exists() else {}


def default_options(preset: Preset, chosen: dict[str, Any]) -> dict[str, Any]:
    """Every option of the steps as the preset has it, where what is chosen leaves it free."""
    sets = chosen.get("sets") or ()
    sizes = chosen.get("kernel_sizes") or sorted({*preset.kernel_sizes, *itertools.chain.from_iterable(sets)})
    ours = [list(kernel_set) for kernel_set in preset.sets or () if set(kernel_set) <= set(sizes)]
    return {
        "kernel_sizes": sizes,
        "cell": preset.impact_cell,
        "sets": ours if preset.sets and len(ours) == len(preset.sets) else None,
        "keep": preset.keep,
        "strategy": "halving",
        "samples": 1000,
        "fidelity": NAMES[0],
        "memory_budget": tradeoff.parse_bytes(preset.memory_budget),
        "bits": preset.bits,
        "recipe": DEFAULT_RECIPE,
    }


def resolve(given: dict[str, Any], there: dict[str, Any], preset: Preset, *, override: bool = False) -> dict[str, Any]:
    """What a script runs with, of the options it takes: as given, else as remembered, else the default.

    Args:
      given: by name; None is not given.
      there: remembered by earlier scripts of the same run.
      preset: gives the defaults.
      override: let what is given differ from what is remembered.

    Returns:
      A value for every name in `given`.

    Raises:
      ValueError: if an option is given that an earlier script ran with another value of.
    """
    chosen = there | {name: value for name, value in given.items() if value is not None}
    defaults = default_options(preset, chosen)
    result = {}
    for name, value in given.items():
        if value is not None and not override and there.get(name, value) != value:
            raise ValueError(
                f"--{name.replace('_', '-')} {value} differs from this run's {there[name]}: choose another --out"
            )
        result[name] = value if value is not None else there.get(name, defaults[name])
    return result


def _check_options(options: dict[str, Any], data: str, preset: Preset) -> None:
    """Raises ValueError for what the steps would only find out after work was done."""
    if "cell" in options:
        impact_genotypes(options["kernel_sizes"], options["cell"])
    if not 1 <= options.get("bits", 1) <= 64:
        raise ValueError(f"--bits {options['bits']} must be from 1 to 64")
    if "recipe" in options:
        named_recipe(options["recipe"])
    if "keep" not in options:
        return
    if options["keep"] not in KEEP:
        raise ValueError(f"--keep {options['keep']!r} is unknown; known: {', '.join(KEEP)}")
    if options["strategy"] not in STRATEGIES:
        raise ValueError(f"--strategy {options['strategy']!r} is unknown; known: {', '.join(STRATEGIES)}")
    if options["fidelity"] not in NAMES:
        raise ValueError(f"--fidelity {options['fidelity']!r} is unknown; known: {', '.join(NAMES)}")
    if options["samples"] < 1:
        raise ValueError(f"--samples {options['samples']} must be at least 1")
    sets = options["sets"]
    if sets is not None and len({tuple(s) for s in sets}) < len(sets):
        raise ValueError(f"--sets {sets}: one of them comes twice")
    if sets is not None and "kernel_sizes" in options:
        if missing := sorted({*itertools.chain.from_iterable(sets)} - {*options["kernel_sizes"]}):
            raise ValueError(f"--sets {sets}: --kernel-sizes {options['kernel_sizes']} lacks {missing}; add them there")
    if sets is None and len(options.get("kernel_sizes", (1, 3))) < 2:
        raise ValueError(f"--kernel-sizes {options['kernel_sizes']}: one size makes no pairs; give two, or --sets")
    space = CellSpace((1,))  # the smallest cell has no convolutions
    spec = preset.network(data, DATASETS[data].num_classes, space)
    least = int(costs(spec, space.enumerate(), options["bits"]).memory_bytes.min())
    if least > options["memory_budget"]:
        raise tradeoff.NothingFitsError(
            f"no cell fits --memory-budget {tradeoff.format_bytes(options['memory_budget'])} at {options['bits']} "
            f"bits: the smallest takes {tradeoff.format_bytes(least)}"
        )


def check_seed(seed: int) -> int:
    """The seed, if trainings can be numbered from it; ValueError else."""
    if not 0 <= seed <= _LARGEST_SEED:
        raise ValueError(f"--seed {seed} must be from 0 to {_LARGEST_SEED}")
    return seed


def load_images(data: str, data_dir: str | Path | None, preset: Preset, needs: dict[str, int] | None = None) -> Dataset:
    """The images of a data set within a preset's limits.

    Args:
      data: a known data set.
      data_dir: where prepared data lie.
      preset: its limits and batch size.
      needs: numbers of training images that are needed besides a batch, by what needs them.

    Raises:
      ValueError: one line, if the data cannot be read or are too few.
    """
    images = load_dataset(
        data,
        data_dir,
        limit_train=preset.limit_train,
        limit_validation=preset.limit_validation,
        limit_test=preset.limit_test,
        clip=True,
    )
    available = len(images.train.labels)
    for name, needed in ({"batch_size": preset.batch_size} | (needs or {})).items():
        if needed > available:
            raise ValueError(f"{name} = {needed} is larger than the data: {available} training images")
    return images


def _counts(images: Dataset) -> dict[str, int]:
    return {split: len(getattr(images, split).labels) for split in ("train", "validation", "test")}


def open_job(
    out: str | Path | None,
    *,
    data: str | None,
    preset: str | None,
    seed: int | None,
    data_dir: str | None,
    options: dict[str, Any],
    say: Say,
    override: bool = False,
    needs: tuple[str, str] | None = None,
    processes: Processes = ALONE,
) -> Job:
    """Checks all settings, loads the data, and makes or continues the run folder, in that order.

    Of several processes the first makes the folder, and the others wait for it.

    Args:
      out: run folder; None is ``runs/DATA-PRESET-seedSEED``.
      data: data set; None takes the run folder's, else mnist5k.
      preset: None takes the run folder's, else cpu.
      seed: None takes the run folder's, else 0.
      data_dir: where prepared data lie.
      options: of the steps that will run, by name; None takes the run's, else the default.
      say: prints a line of progress.
      override: whether options that are given may differ from the run's, for this job alone.
      needs: a table that an earlier step must have left, and the script that leaves it.
      processes: this process among those of the job.

    Returns:
      The job.

    Raises:
      ValueError: one line on the first thing that is wrong; nothing has been written then.
    """
    config_there, options_there = settings_there(out) if out else ({}, {})
    data = str(data or config_there.get("data", "mnist5k"))
    preset = str(preset or config_there.get("preset", "cpu"))
    seed = int(config_there.get("seed", 0)) if seed is None else seed
    settings = get_preset(data, preset)
    check_seed(seed)
    if out is None:
        out = Path("runs") / f"{data}-{preset}-seed{seed}"
        _, options_there = settings_there(out)
    if needs and not (table := Path(out) / "tables" / f"{needs[0]}.parquet").exists():
        raise ValueError(f"{table} is missing: run {needs[1]} --out {out} first")
    resolved = resolve(options, options_there, settings, override=override)
    _check_options(resolved, data, settings)
    scoring = max(fidelity.images_needed for fidelity in settings.fidelities)
    images = load_images(data, data_dir, settings, {"batch times seeds of a score": scoring})
    config = {
        "data": data,
        "preset": preset,
        "seed": seed,
        "settings": dataclasses.asdict(settings),
        "images": _counts(images),
    }
    if processes.first:
        run = RunFolder.create(out, config)
        processes.tell("run", {"state": run.state(), "options": resolved})
    else:
        first = processes.hear("run")
        if first["options"] != json.loads(json.dumps(resolved)):
            raise ValueError(
                f"options {resolved} differ from process 0's {first['options']}: give all processes the same"
            )
        run = RunFolder.join(out, config, first["state"])
    say(f"data: {images.source}")
    say(f"run folder: {run.path}")
    every = default_options(settings, options_there | resolved) | options_there | resolved
    return Job(run, images, settings, seed, every, say, processes)


def open_experiment(
    out: str | Path,
    config: dict[str, Any],
    *,
    data_dir: str | Path | None,
    preset: Preset,
    options: dict[str, Any],
    say: Say,
) -> Job:
    """Loads the data, and makes or continues the run folder of an experiment whose settings have been checked.

    Args:
      out: run folder.
      config: the settings, `data` and `seed` among them; the numbers of images are added.
      data_dir: where prepared data lie.
      preset: its limits and batch size are used, and it goes into the job.
      options: of the job.
      say: prints a line of progress.

    Raises:
      ValueError: one line on the first thing that is wrong; nothing has been written then.
    """
    images = load_images(config["data"], data_dir, preset)
    run = RunFolder.create(out, config | {"images": _counts(images)})
    say(f"data: {images.source}")
    say(f"run folder: {run.path}")
    return Job(run, images, preset, config["seed"], options, say)


def timed(job: Job, step: str, started: float) -> None:
    """Notes how long a step took; going through a finished step again does not shorten its time."""
    taken = round(time.perf_counter() - started, 1)
    path = job.run.path / "summary.json"
    before = job.run.read_json("summary.json").get("seconds", {}).get(step, 0.0) if path.exists() else 0.0
    job.run.update_summary(seconds={step: max(taken, before)})
    job.say(f"{step} took {taken:.1f} s")
