"""A job: the settings of one run, checked as a whole before anything is written, with its images and its folder."""

import contextlib
import dataclasses
import enum
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from spikernel_jax.cells.space import CellSpace
from spikernel_jax.data import Dataset, load_dataset
from spikernel_jax.io import files
from spikernel_jax.io.processes import ALONE, Processes
from spikernel_jax.io.run_folder import RunFolder
from spikernel_jax.pipeline.options import StepOptions, resolve
from spikernel_jax.pipeline.presets import Preset, Sizes, get_preset
from spikernel_jax.snn.spec import NetworkSpec

Say = Callable[[str], None]

_OPTIONS = "options.json"
_LARGEST_SEED = 2**32 // 1000 - 1  # step 1 numbers its trainings seed·1000 + index, and keys hold 32 bits of it


class Purpose(enum.IntEnum):
    """What a key of a job is for; no two purposes share one."""

    SCORING_BANKS = 101
    SAMPLED_CELLS = 102
    SCORING_IMAGES = 103
    RANDOM_BASELINES = 104
    STRATEGIES_BANKS = 201
    STRATEGIES_SEARCHES = 202
    STRATEGIES_IMAGES = 203


@dataclasses.dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
      run: its folder.
      data: its images.
      preset: its preset.
      seed: of everything random in it.
      options: of the four steps.
      say: prints a line of progress.
      processes: this process among those of the job.
      method: of scoring, of `scorer.METHODS`; None is the machine's own, on accelerators timed (`scoring.choice`).
    """

    run: RunFolder
    data: Dataset
    preset: Preset
    seed: int
    options: StepOptions
    say: Say
    processes: Processes = ALONE
    method: str | None = None

    @property
    def seeds(self) -> range:
        """Of the trainings of every network."""
        return seeds_of(self.seed, self.preset.seeds)

    def network(self, space: CellSpace) -> NetworkSpec:
        """The network of a space's cells on the job's images, as it is trained."""
        return self.preset.network(self.data.name, space, self.data.num_classes)

    def key(self, purpose: Purpose) -> jax.Array:
        """The key of one purpose."""
        return jax.random.fold_in(jax.random.key(self.seed), purpose)

    def remember(self, *names: str) -> None:
        """Makes options the run's own: called by a step once its input is known to be good, before long work."""
        _, there = settings_there(self.run.path)
        options = self.options.as_json()
        self.run.write_json(_OPTIONS, there | {name: options[name] for name in names})

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Times a step that ends well, and notes it; going through a finished one again does not shorten its time."""
        began = time.perf_counter()
        yield
        taken = round(time.perf_counter() - began, 1)
        before = self.run.summary().get("seconds", {}).get(name, 0.0)
        self.run.update_summary(seconds={name: max(taken, before)})
        self.say(f"{name} took {taken:.1f} s")


def seeds_of(seed: int, count: int) -> range:
    """Seeds of the trainings of a run, so that no two runs share one."""
    return range(seed * 1000, seed * 1000 + count)


def check_seed(seed: int) -> int:
    """The seed, if trainings can be numbered from it; ValueError else."""
    if not 0 <= seed <= _LARGEST_SEED:
        raise ValueError(f"--seed {seed} must be from 0 to {_LARGEST_SEED}")
    return seed


def settings_there(out: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configuration and options of a run folder; both empty where there is no run yet."""
    if not (Path(out) / "config.json").exists():
        return {}, {}
    run = RunFolder.open(out)
    return run.config, run.read_json(_OPTIONS) if (run.path / _OPTIONS).exists() else {}


def load_images(data: str, data_dir: str | Path | None, sizes: Sizes, **needs: int) -> Dataset:
    """The images of a data set within a preset's limits.

    Args:
      data: a known data set.
      data_dir: where prepared data lie.
      sizes: the preset.
      **needs: numbers of training images that are needed, by what needs them.

    Raises:
      ValueError: one line, if the data cannot be read or are too few.
    """
    images = load_dataset(data, data_dir, **sizes.limits, clip=True)
    available = len(images.train.labels)
    for name, needed in needs.items():
        if needed > available:
            raise ValueError(f"{name} = {needed} is larger than the data: {available} training images")
    return images


def counts(images: Dataset) -> dict[str, int]:
    """Images of each split, as a run's configuration holds them."""
    return {split: len(getattr(images, split).labels) for split in ("train", "validation", "test")}


def default_folder(data: str, preset: str, seed: int, kind: str = "") -> Path:
    """Where a run goes if no folder is named: ``runs/KIND-DATA-PRESET-seedSEED``, of a path its last part."""
    return Path("runs") / f"{kind}{'-' * bool(kind)}{Path(data).name}-{preset}-seed{seed}"


def open_folder(
    out: str | Path, config: dict[str, Any], images: Dataset, say: Say, processes: Processes = ALONE
) -> RunFolder:
    """Makes a run's folder or continues it, and says so; every run goes through here, once all settings are checked.

    Of several processes the first makes the folder, and the others wait for it.

    Raises:
      ValueError: one line, if the folder is another run's or in use; it stays as it was.
    """
    if processes.first:
        run = RunFolder.create(out, config)
        processes.tell("run", run.state())
    else:
        run = RunFolder.join(out, config, processes.hear("run"))
    say(f"data: {images.source}")
    say(f"run folder: {run.path}")
    return run


def open_job(
    out: str | Path | None,
    *,
    data: str | None,
    preset: str | None,
    seed: int | None,
    data_dir: str | Path | None,
    given: Mapping[str, Any],
    say: Say,
    searches: bool = False,
    override: bool = False,
    needs: tuple[str, str] | None = None,
    processes: Processes = ALONE,
    loaded: Mapping[str, str] | None = None,
    method: str | None = None,
    like: Path | None = None,
) -> Job:
    """Checks all settings, loads the data, and makes or continues the run folder of the four steps, in that order.

    Args:
      out: run folder; None is ``runs/DATA-PRESET-seedSEED``.
      data: data set; None takes the run folder's, else mnist5k.
      preset: None takes the run folder's, else cpu.
      seed: None takes the run folder's, else 0.
      data_dir: where prepared data lie.
      given: options of the steps by name, as `options.resolve` takes them.
      say: prints a line of progress.
      searches: whether step 3's search will run, so that there must be a cell to find.
      override: whether options that are given may differ from the run's, for this job alone.
      needs: a table that an earlier step must have left, and the script that leaves it.
      processes: this process among those of the job.
      loaded: names of files that registered what the options name, and a digest of each, which the run keeps to.
      method: of scoring; it changes scores by rounding only, so it is none of the run's options.
      like: a run to repeat in another folder, as it was.

    Returns:
      The job.

    Raises:
      ValueError: one line on the first thing that is wrong; nothing has been written then.
    """
    config_there, options_there = settings_there(out) if out else ({}, {})
    if like:
        named = {"data": data, "preset": preset, "seed": seed, **given}
        config_there, options_there = _to_repeat(like, out, named, dict(loaded or {}))
    data = str(data or config_there.get("data", "mnist5k"))
    preset = str(preset or config_there.get("preset", "cpu"))
    seed = check_seed(int(config_there.get("seed", 0)) if seed is None else seed)
    settings = get_preset(data, preset)
    if out is None:
        out = default_folder(data, preset, seed)
        _, options_there = settings_there(out)
    if needs and not (table := Path(out) / "tables" / f"{needs[0]}.parquet").exists():
        raise ValueError(f"{table} is missing: run {needs[1]} --out {out} first")
    options = resolve(given, options_there, settings, override=override)
    if searches:
        options.check_search(data, settings)
    scoring = {"batch times seeds of a score": max(fidelity.images_needed for fidelity in settings.fidelities)}
    images = load_images(data, data_dir, settings, batch_size=settings.batch_size, **scoring)
    settled = {"data": data, "preset": preset, "seed": seed, "settings": dataclasses.asdict(settings)}
    settled |= {"loaded": dict(loaded)} if loaded else {}
    _agree(options, processes)
    run = open_folder(out, settled | {"images": counts(images)}, images, say, processes)
    return Job(run, images, settings, seed, options, say, processes, method)


def _to_repeat(
    like: Path, out: str | Path | None, given: Mapping[str, Any], loaded: dict[str, str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configuration and options of a run that another folder is to repeat; ValueError where it would not."""
    config, options = settings_there(like)
    if not config:
        raise ValueError(f"--from {like}: no run's folder, it has no config.json")
    if out is None or Path(out).resolve() == like.resolve():
        raise ValueError(f"--from {like}: give --out, the folder of the new run")
    if more := [name for name, value in given.items() if value is not None and value != ()]:
        raise ValueError(f"--from {like} repeats a run as it was: leave out --{more[0].replace('_', '-')}")
    if (before := config.get("loaded", {})) != loaded:
        raise ValueError(f"--from {like}: give --load the files of that run, unchanged: {', '.join(before) or 'none'}")
    ours = files.as_json(dataclasses.asdict(get_preset(config["data"], config["preset"])), "the preset")
    if differing := files.differences(config["settings"], ours):
        raise ValueError(f"--from {like}: preset {config['preset']} was another one then ({'; '.join(differing)})")
    return config, options


def _agree(options: StepOptions, processes: Processes) -> None:
    """Raises ValueError where another process than the first was given other options."""
    if processes.first:
        processes.tell("options", options.as_json())
    elif (first := processes.hear("options")) != (ours := options.as_json()):
        raise ValueError(f"options {ours} differ from process 0's {first}: give all processes the same")


def open_study(
    out: str | Path, config: dict[str, Any], preset: Preset, *, data_dir: str | Path | None, say: Say, **given: Any
) -> Job:
    """Loads the data, and makes or continues the run folder of a study whose settings have been checked.

    Args:
      out: run folder.
      config: the settings, `data` and `seed` among them; the numbers of images are added.
      preset: its limits and batch size are used, and it goes into the job.
      data_dir: where prepared data lie.
      say: prints a line of progress.
      **given: options of the job, else the preset's.

    Raises:
      ValueError: one line on the first thing that is wrong; nothing has been written then.
    """
    options = resolve(given, {}, preset)
    images = load_images(config["data"], data_dir, preset, batch_size=preset.batch_size)
    run = open_folder(out, config | {"images": counts(images)}, images, say)
    return Job(run, images, preset, config["seed"], options, say)
