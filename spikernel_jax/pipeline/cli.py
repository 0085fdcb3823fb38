"""What the experiment scripts share: options, errors in one line, progress lines."""

import contextlib
import dataclasses
import hashlib
import io
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro
from rich.console import Console
from rich.markdown import Markdown

from spikernel_jax.io import machine, signals
from spikernel_jax.io.processes import ALONE, Processes, initialise
from spikernel_jax.io.scalars import scalar_writer
from spikernel_jax.io.voice import Voice, print_to_nobody
from spikernel_jax.pipeline import job
from spikernel_jax.pipeline.options import NAMES_OF_OPTIONS
from spikernel_jax.pipeline.presets import Preset, get_preset

Options = TypeVar("Options")


@dataclasses.dataclass(frozen=True)
class OutputOptions:
    """What is printed while a script works."""

    quiet: bool = False
    """Print results alone, no progress."""
    json: bool = False
    """Print progress as JSON, an object a line, and results on standard error."""
    tensorboard: Path | None = None
    """Folder for TensorBoard: loss and accuracy of every epoch that is trained."""


@dataclasses.dataclass(frozen=True)
class Shared(OutputOptions):
    """Options of every experiment script."""

    data: str | None = None
    """Data set: mnist5k (embedded, the default), mnist, fashion_mnist, cifar10, cifar100, tiny_imagenet; or a path
    of a folder of images, a folder per class."""
    preset: str | None = None
    """Widths, time steps, epochs and budgets: cpu (the default), gpu or smoke."""
    out: Path | None = None
    """Run folder; default runs/DATA-PRESET-seedSEED."""
    seed: int | None = None
    """Seed of everything random; default 0."""
    data_dir: Path | None = None
    """Where prepared data lie; default the environment's TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    bits: int | None = None
    """Width of weights, membranes and activations on the device; default the preset's."""
    compilation_cache: str | None = None
    """Folder of compiled programs, reused by later runs, or off; default a folder of the user's cache."""
    load: tuple[Path, ...] = ()
    """Python files that are run first, which register operations or scores of one's own; a run keeps to them."""


@dataclasses.dataclass(frozen=True)
class BudgetOptions:
    """What the device has."""

    memory_budget: str | None = None
    """Memory the chosen model may take, in bytes or as 512KiB; default the preset's, and no limit with --device."""
    device: str | None = None
    """Device whose limits the chosen model must keep to: cortex-m4, cortex-m7, ice40-up5k, loihi-2, spinnaker2, akida,
    xylo, speck, or FILE.toml:NAME of one's own."""


@dataclasses.dataclass(frozen=True)
class SetOptions(BudgetOptions):
    """Which kernel sets are searched, and how."""

    sets: tuple[str, ...] = ()
    """Kernel sets, as 1,3 3,5 or 1,3,5; default all pairs of the sizes of step 1."""
    keep: Literal["rule", "all"] | None = None
    """rule (the default) drops a set that another one of no more memory surpasses by over one standard error;
    all keeps all."""
    strategy: Literal["trainings", "halving", "exhaustive", "random"] | None = None
    """trainings (the default) scores every distinct forward cell that fits the budget at low fidelity, trains the
    first few of each set for two epochs and the best of these for two more; halving scores the best tenth of each set
    at medium and the best hundredth at full fidelity, and trains none; exhaustive scores every cell at one fidelity;
    random draws samples a set, as SNASNet and SpiKernel."""
    fidelity: Literal["low", "medium", "full"] | None = None
    """Sizes that exhaustive and random score with; default low."""
    samples: int | None = None
    """Draws a set of the random strategy; default 1000."""
    search_epochs: int | None = None
    """Epochs that the short trainings of the trainings strategy take together; default the preset's."""
    search_seconds: float | None = None
    """The same in seconds, of which the first two trainings show how many epochs they are."""
    method: Literal["shared", "batched", "each"] | None = None
    """How cells are scored: shared (the default for forward cells) computes once what they have in common in cell 1,
    batched does too and lets tiles of them go through the rest side by side, each scores every cell by itself. Scores
    are the same up to rounding. On an accelerator a long search times batched beside the default first."""


@dataclasses.dataclass(frozen=True)
class ImpactOptions:
    """What step 1 compares."""

    kernel_sizes: tuple[int, ...] = ()
    """Kernel sizes of step 1; default the preset's."""
    operations: tuple[str, ...] = ()
    """What an edge may hold, instead of kernel sizes: zero skip conv3@0.5 dwconv5 avgpool and others, also registered
    ones of one's own (--load). Step 1 compares those that read spikes, and step 3 searches all of them as one set."""
    cell: str | None = None
    """Cell of step 1 with K for the kernel size, as '0>1:convK 1>3:convK 0>3:skip'; default the preset's."""


@dataclasses.dataclass(frozen=True)
class MachineOptions:
    """How a machine is used for training."""

    huge_pages: bool = True
    """Start the process once more, in its place, with memory in huge pages where Linux gives them on demand: on a CPU
    training is about a fifth faster."""


@dataclasses.dataclass(frozen=True)
class TrainingOptions(MachineOptions):
    """How networks are trained."""

    recipe: str | None = None
    """tuned (the default) or snasnet, the paper's own."""


@dataclasses.dataclass(frozen=True)
class SizeOptions:
    """How large a study is."""

    epochs: int | None = None
    """Epochs of each training; default the preset's."""
    channels: int | None = None
    """Width C; default the preset's."""
    limit_train: int | None = None
    """Training images; default the preset's."""


@dataclasses.dataclass(frozen=True)
class TableOptions(OutputOptions):
    """What is held against a table of trained cells, and which."""

    table: str = "cifar10"
    """A published table, or a path of one that experiments/trained_cells.py has made."""
    out: Path | None = None
    """Run folder; default runs/KIND-TABLE-HALF-seedSEED."""
    half: Literal["looking", "held_out"] = "held_out"
    """The half of the cells that figures are of; the other is for looking, where choices are made."""
    seed: int = 0
    """Seed of everything random."""
    data_dir: Path | None = None
    """Where prepared data lie; default the environment's TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    compilation_cache: str | None = None
    """Folder of compiled programs, reused by later runs, or off; default a folder of the user's cache."""


@dataclasses.dataclass(frozen=True)
class RatedTableOptions(TableOptions):
    """How its cells are scored."""

    replicates: int = 4
    """Draws of weights and images for each score."""
    batch: int = 128
    """Images a draw."""


@dataclasses.dataclass(frozen=True)
class ProcessOptions:
    """Which processes share the work; none of the three where Slurm, Kubernetes, Open MPI or a TPU pod tells."""

    coordinator: str | None = None
    """HOST:PORT of process 0, which all processes reach."""
    processes: int | None = None
    """How many processes share the work."""
    process_id: int | None = None
    """Which of them this is, from 0."""


_voice = Voice()  # of this process; `main` makes the one that the options ask for


def say(text: str) -> None:
    """Says a line of progress, in the manner that the script was asked for."""
    _voice.say(text)


def results() -> Console:
    """Where a script prints what it found; asked for once it is found, since the moving line ends here."""
    return _voice.results


def present(found: Any) -> None:
    """Prints a result, text or one of rich's, when the work that it is given by is done."""
    results().print(found)


def join_processes(options: ProcessOptions) -> Processes:
    """The processes that a script's options or its cluster name; errors as `processes.initialise`."""
    return initialise(options.coordinator, options.processes, options.process_id, say=say)


def show(markdown: str) -> None:
    """Prints Markdown as a terminal shows it."""
    present(Markdown(markdown))


def study_of(options: Shared) -> tuple[str, str, int]:
    """Data set, preset's name and seed of a study; ValueError on a seed that is none."""
    return options.data or "mnist5k", options.preset or "cpu", job.check_seed(options.seed or 0)


def study_preset(options: Shared, *names: str, **changes: Any) -> tuple[str, str, int, Preset]:
    """Data set, preset's name, seed and preset of a study, in which options of these names replace fields.

    Raises:
      ValueError: naming the option that is wrong.
    """
    data, name, seed = study_of(options)
    given = {field: getattr(options, field) for field in ("bits", *names)}
    return data, name, seed, get_preset(data, name, **given, **changes)


def open_job(options: Shared, **named: Any) -> job.Job:
    """The job of the four steps that a script's options ask for; arguments and errors as `job.open_job`."""
    given = {name: value for name, value in vars(options).items() if name in NAMES_OF_OPTIONS}
    return job.open_job(
        options.out,
        data=options.data,
        preset=options.preset,
        seed=options.seed,
        data_dir=options.data_dir,
        given=given,
        say=say if named.get("processes", ALONE).first else lambda _: None,
        loaded={path.name: _LOADED[path.resolve()] for path in options.load},
        method=getattr(options, "method", None),
        like=getattr(options, "from_", None),
        **named,
    )


_LOADED: dict[Path, str] = {}  # files that were run, and the digest of each


def _run_file(path: Path) -> None:
    """Runs a Python file for what it registers, once a process.

    Raises:
      ValueError: if it is not there, or raises something.
    """
    if path.resolve() in _LOADED:
        return
    if not path.is_file():
        raise ValueError(f"--load {path}: no such file")
    try:
        runpy.run_path(str(path))
    except Exception as error:
        raise ValueError(f"--load {path}: {type(error).__name__}: {error}") from error
    _LOADED[path.resolve()] = hashlib.sha256(path.read_bytes()).hexdigest()


def main(options_type: type[Options], body: Callable[[Options], None], description: str) -> None:
    """Parses the command line and runs a script; bad input is one line on stderr and exit 2.

    Work that a signal stopped after saving says so in one line and exits with 143 (SIGTERM) or 130 (SIGINT). A
    SIGINT that is ignored from the start, as in a background job of a shell without job control, stays ignored.
    """
    for stream in (sys.stdout, sys.stderr):  # a terminal's alphabet must not end a run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        options = tyro.cli(options_type, description=description)
        sys.stdout.flush()
    except BrokenPipeError:
        print_to_nobody()
        sys.exit(0)
    script = Path(body.__code__.co_filename).resolve()
    started = script in (Path(word).resolve() for word in sys.orig_argv[1:])  # else another program calls it
    if started and getattr(options, "huge_pages", False):
        machine.restart_with_huge_pages()
    machine.set_up(getattr(options, "compilation_cache", None))
    global _voice
    try:
        with contextlib.ExitStack() as held:
            _voice = _voice_of(options, held)
            for path in getattr(options, "load", ()):
                _run_file(path)
            body(options)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except signals.StoppedError as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.exit_status)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    finally:
        _voice.end()
        _voice = Voice()


def _voice_of(options: Any, held: contextlib.ExitStack) -> Voice:
    quiet, json, folder = (getattr(options, name, None) for name in ("quiet", "json", "tensorboard"))
    if quiet and json:
        raise ValueError("--quiet and --json: give one of them")
    hears = held.enter_context(scalar_writer(folder)) if folder else None
    return Voice("json" if json else "quiet" if quiet else "lines", hears)
