"""What each part of a recipe or network is worth: a base, and rows that each change one thing about it.

Every row is trained with the base's images, epochs and seeds; what counts is the difference to the base, seed by seed.
A learning rate belongs to its optimiser, so optimisers are compared at several. Validation images alone are used: the
test split is not touched.
"""

import dataclasses
import itertools
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spikernel_jax.cells.space import CellSpace
from spikernel_jax.pipeline import trials
from spikernel_jax.pipeline.job import Job
from spikernel_jax.pipeline.options import impact_genotypes
from spikernel_jax.pipeline.presets import Preset, Sizes, get_preset, get_timed_preset, is_timed
from spikernel_jax.pipeline.trials import Trial
from spikernel_jax.report import pages
from spikernel_jax.report.intervals import columns, interval, points
from spikernel_jax.snn.cost import parameters_of, width_for
from spikernel_jax.snn.spec import NetworkSpec
from spikernel_jax.training.recipe import RECIPES, TrainConfig

if TYPE_CHECKING:
    import polars as pl

BASE = "base"
_KERNEL = 3  # the base's kernel size


@dataclasses.dataclass(frozen=True)
class Row:
    """One change to the base.

    Attributes:
      name: of the row; part of a folder's name.
      group: what kind of change it is.
      config: fields of `TrainConfig` and their values.
      spec: fields of `NetworkSpec`.
      neuron: fields of `NeuronSpec`.
      kernel_size: of the cells' convolutions.
      cell: in explicit notation; None keeps the base's.
      as_large_as: a kernel size; the width is then the one at which the network's parameters come nearest to those of
        this kernel size at the base's width. None keeps the base's width.
    """

    name: str
    group: str
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    spec: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    neuron: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    kernel_size: int = _KERNEL
    cell: str | None = None
    as_large_as: int | None = None

    def __str__(self) -> str:
        """The change in words."""
        words = [f"{name}={value}" for part in (self.config, self.spec, self.neuron) for name, value in part.items()]
        if self.kernel_size != _KERNEL:
            words.append(f"{self.kernel_size}x{self.kernel_size}")
        if self.cell:
            words.append(f"cell {self.cell}")
        if self.as_large_as:
            words.append(f"C for the parameters of {self.as_large_as}x{self.as_large_as}")
        return ", ".join(words)


def _optimiser(name: str, rate: float, **others: Any) -> Row:
    return Row(f"{name}-{rate}", "optimiser", {"optimiser": name, "learning_rate": rate, **others})


ROWS = {
    row.name: row
    for row in (
        Row("sgd", "optimiser", {"optimiser": "sgd"}),
        *(Row(f"rate-{rate}", "optimiser", {"learning_rate": rate}) for rate in (0.05, 0.1, 0.2, 0.4)),
        Row("nesterov", "optimiser", {"optimiser": "nesterov"}),
        *(_optimiser("sgd", rate, momentum=0.9, weight_decay=5e-4) for rate in (0.05, 0.2, 0.4, 0.8, 1.6)),
        # Their decay is times the learning rate, so it is larger than SGD's.
        *(_optimiser("adamw", rate, weight_decay=0.05) for rate in (0.001, 0.003, 0.01)),
        *(_optimiser("muon", rate, weight_decay=0.05) for rate in (0.005, 0.02, 0.05, 0.1)),
        Row("cosine", "schedule", {"schedule": "cosine", "warmup": 0.0}),
        Row("warm-up", "schedule", {"schedule": "cosine", "warmup": 0.1}),
        Row("one-cycle", "schedule", {"schedule": "one_cycle", "warmup": 0.0}),
        *(
            Row(f"one-cycle-{rate}", "schedule", {"schedule": "one_cycle", "warmup": 0.0, "learning_rate": rate})
            for rate in (0.1, 0.2, 0.4)
        ),
        Row("tet", "loss", {"loss": "tet"}),
        Row("smoothing", "loss", {"label_smoothing": 0.1}),
        Row("tet-smoothing", "loss", {"loss": "tet", "label_smoothing": 0.1}),
        Row("no-smoothing", "loss", {"label_smoothing": 0.0}),
        *(Row(f"crop-{pixels}", "augmentation", {"padding": pixels}) for pixels in (2, 4)),
        Row("no-crop", "augmentation", {"padding": 0}),
        Row("trivial", "augmentation", {"trivial": True}),
        Row("cutout", "augmentation", {"cutout": 8}),
        Row("mixup", "augmentation", {"mix": "mixup"}),
        Row("mixup-0.2", "augmentation", {"mix": "mixup", "mix_alpha": 0.2}),
        Row("cutmix", "augmentation", {"mix": "cutmix"}),
        Row("ema", "weights", {"ema": 0.999}),
        Row("no-ema", "weights", {"ema": 0.0}),
        Row("whiten", "weights", {"stem_init": "whitened"}),
        Row("decay-kernels", "weights", {"decayed": "kernels"}),
        Row("no-decay", "weights", {"weight_decay": 0.0}),
        Row("norm-over-time", "network", spec={"norm": "over_time"}),
        Row("head-snasnet", "network", spec={"head": "snasnet"}),
        Row("head-snasnet-dropout", "network", spec={"head": "snasnet", "dropout": 0.5}),
        *(Row(f"steps-{steps}", "time", spec={"time_steps": steps}) for steps in (1, 2, 4, 5, 6)),
        *(Row(f"slope-{slope}", "neuron", neuron={"surrogate_scale": slope}) for slope in (1.0, 4.0)),
        *(Row(name, "neuron", neuron={"surrogate": name}) for name in ("atan", "triangle", "sigmoid")),
        *(Row(f"threshold-{value}", "neuron", neuron={"v_threshold": value}) for value in (0.5, 1.0)),
        Row("triangle-0.5", "neuron", neuron={"surrogate": "triangle", "v_threshold": 0.5}),
        Row("atan-1.0", "neuron", neuron={"surrogate": "atan", "v_threshold": 1.0}),
        Row("soft-reset", "neuron", neuron={"reset": "soft"}),
        Row("spikes-4", "neuron", neuron={"reset": "soft", "max_spikes": 4}),
        Row("tau-2", "neuron", neuron={"tau": 2.0}),
        # That of the four steps before a search, and the one that they chose on CIFAR-10 (results/cifar10-cpu-seed0).
        Row("cell-unsearched", "cell", cell="0>1:conv3 0>3:skip 1>3:conv3"),
        Row("cell-searched", "cell", cell="0>1:conv3 1>2:conv3 0>3:skip 2>3:conv3"),
        # Fewer convolutions one after the other, each wider.
        Row("depth-1", "depth", cell="0>1:conv3 0>3:skip 1>3:skip", as_large_as=3),
        Row("depth-2", "depth", cell="0>1:conv3 0>3:skip 1>3:conv3", as_large_as=3),
        Row("k5", "width", kernel_size=5),
        Row("k3-wide", "width", as_large_as=5),
        Row("k5-narrow", "width", kernel_size=5, as_large_as=3),
        Row("recipe-tuned", "recipe", RECIPES["tuned"]),
        Row("learn-tau", "neuron", neuron={"learn_tau": True}),
        Row("learn-threshold", "neuron", neuron={"learn_threshold": True}),
        Row("shortcut-spike", "network", spec={"shortcut": "spike"}),
    )
}
GROUPS = tuple(dict.fromkeys(row.group for row in ROWS.values()))


@dataclasses.dataclass(frozen=True)
class Base:
    """What rows change.

    Attributes:
      recipe: what `config` is called.
      spec: the network.
      config: the recipe.
      genotypes: the cell [E] at each kernel size that a row needs.
    """

    recipe: str
    spec: NetworkSpec
    config: TrainConfig
    genotypes: dict[int, NDArray[np.int8]]

    def trial(self, row: Row, seed: int) -> Trial:
        """The training of a row; ValueError where its change is none that can be trained."""
        try:
            config = dataclasses.replace(self.config, **row.config)
            neuron = dataclasses.replace(self.spec.neuron, **row.neuron)
            spec = dataclasses.replace(self.spec, **{"neuron": neuron, **row.spec})
            genotype = spec.space.parse(row.cell) if row.cell else self.genotypes[row.kernel_size]
            if row.as_large_as:
                wanted = parameters_of(self.spec, self.genotypes[row.as_large_as])
                spec = dataclasses.replace(spec, channels=width_for(spec, genotype, wanted))
        except ValueError as error:
            raise ValueError(f"row {row.name}: {error}") from None
        return Trial(row.name, seed, spec, tuple(genotype.tolist()), config)

    def rows(self) -> dict[str, Row]:
        """The rows that change something and are not an earlier row again, by name; the base comes first."""
        found: dict[tuple[Any, ...], Row] = {}
        for row in (Row(BASE, BASE), *ROWS.values()):
            trial = self.trial(row, 0)
            found.setdefault((trial.spec, trial.genotype, trial.config), row)
        return {row.name: row for row in found.values()}

    def choose(self, names: Sequence[str], groups: Sequence[str]) -> list[Row]:
        """The base, and the rows of these names and groups; all if none is named.

        Raises:
          ValueError: one line on a name that is unknown, or of a row that equals the base or an earlier row.
        """
        there = self.rows()
        for name in names:
            if name not in ROWS:
                raise ValueError(f"--rows {name!r} is unknown; known: {', '.join(ROWS)}")
            if name not in there:
                raise ValueError(f"--rows {name!r} is the base or another row again: {ROWS[name]}")
        for group in groups:
            if group not in GROUPS:
                raise ValueError(f"--groups {group!r} is unknown; known: {', '.join(GROUPS)}")
        every = not names and not groups
        return [row for row in there.values() if every or row.name in (BASE, *names) or row.group in groups]


def make_base(
    data: str,
    name: str,
    recipe: str | None = None,
    *,
    bits: int | None = None,
    precision: str | None = None,
    **given: Any,
) -> tuple[Preset, Base]:
    """The base on a data set, and the preset of its study.

    Args:
      data: a known data set.
      name: of a preset of the four steps, whose cell (at 3x3), network, batch size and epochs are the base's; or of one
        of trainings in a given time, whose recipe is the base's too.
      recipe: a name in `recipe.RECIPES`, ``"snasnet"`` by default; only with a preset of the four steps.
      bits: that memory is counted at; None is the preset's.
      precision: of convolutions; None is the recipe's.
      **given: fields of the preset, `epochs` and `batch_size` among them, with other values; None keeps the preset's.

    Raises:
      ValueError: one line on the first setting that is wrong.
    """
    given = {field: value for field, value in given.items() if value is not None}
    sizes: tuple[int, ...] = (_KERNEL, 5)
    space = CellSpace(sizes)
    if is_timed(name):
        timed, called = get_timed_preset(data, name), f"of {name}"
        if recipe:
            raise ValueError(f"--base-recipe {recipe}: --preset {name} has a recipe of its own; give one of the two")
        if "epochs" not in given:
            raise ValueError(
                f"--epochs is not given: --preset {name} trains as long as a time allows; say how many here"
            )
        of_training = {field: given.pop(field) for field in ("epochs", "batch_size") if field in given}
        config = dataclasses.replace(timed.training, **of_training)
        timed = dataclasses.replace(timed, **given)
        same = {field.name: getattr(timed, field.name) for field in dataclasses.fields(Sizes)}
        same |= {"epochs": config.epochs, "batch_size": config.batch_size}
        same["impact_cell"] = timed.cell.replace(f"conv{_KERNEL}", "convK")
        preset = dataclasses.replace(get_preset(data, "cpu", bits=bits), **same)
        spec = timed.network(data, space)
    else:
        preset, called = get_preset(data, name, bits=bits, **given), recipe or "snasnet"
        spec, config = preset.network(data, space), preset.training(data, called)
    if precision:
        config = dataclasses.replace(config, precision=precision)
    genotypes: dict[int, np.ndarray] = dict(
        zip(sizes, impact_genotypes(space, preset.impact_cell).values(), strict=True)
    )
    return preset, Base(called, spec, config, genotypes)


def ablate(job: Job, base: Base, rows: Sequence[Row], seeds: Sequence[int], deadline: float) -> "pl.DataFrame":
    """Trains all rows seed by seed, goes on where a killed process stopped, and writes what there is after each.

    Leaves ``tables/recipe_ablation.parquet`` and ``report.md``, with what other commands trained in the folder.

    Args:
      job: run folder, data, seed and `bits`.
      base: of `make_base`.
      rows: what to train; the base among them.
      seeds: of the trainings.
      deadline: no training is begun after this time of `time.monotonic`.

    Returns:
      The table, by row and seed: `row`, `group`, `change`, `seed`, `kernel_size`, `channels`, `time_steps`, `epochs`,
      and what `trials.run` gives. Empty if nothing was trained.
    """
    wanted = [base.trial(row, seed) for seed, row in itertools.product(seeds, rows)]
    job.say(f"{len(wanted)} trainings of {base.config.epochs} epochs: {len(rows)} rows, {len(seeds)} seeds")
    clock, table = trials.Clock(wanted), _gather(job, base)
    for number, trial in enumerate(wanted, start=1):
        if trials.finished(job, trial) is None and time.monotonic() >= deadline:
            continue
        trials.run(job, trial, clock, f"{number}/{len(wanted)}", keep_diverged=True)
        table = _gather(job, base)
        job.run.write_table("recipe_ablation", table)
        pages.write_report(job.run, _sections(job, base, over_seeds(table), _missing(job, wanted)))
    if missing := _missing(job, wanted):
        job.say(f"time is over with {len(missing)} of {len(wanted)} trainings missing: {_by_seed(missing)}")
    return table


def _missing(job: Job, wanted: Iterable[Trial]) -> list[Trial]:
    return [trial for trial in wanted if trials.finished(job, trial) is None]


def _by_seed(missing: Sequence[Trial]) -> str:
    parts = itertools.groupby(missing, lambda trial: trial.seed)
    return "; ".join(f"seed {seed}: {', '.join(trial.kind for trial in part)}" for seed, part in parts)


def _gather(job: Job, base: Base) -> "pl.DataFrame":
    """The table of all trainings of the run folder that are done."""
    import polars as pl

    found = []
    for row in base.rows().values():
        done = (job.run.path / "trainings").glob(f"{row.name}-seed*/result.json")
        for seed in sorted(int(path.parent.name.rpartition("-seed")[2]) for path in done):
            trial = base.trial(row, seed)
            what = {"row": row.name, "group": row.group, "change": str(row), "seed": seed}
            sizes = {"channels": trial.spec.channels, "time_steps": trial.spec.time_steps}
            about = {"kernel_size": row.kernel_size, **sizes, "epochs": trial.config.epochs}
            found.append(what | about | (trials.finished(job, trial) or {}))
    types: Any = dict.fromkeys(("synops", "energy_nj", "validation_accuracy"), pl.Float64)
    return pl.DataFrame(found, schema_overrides=types | {"diverged_epoch": pl.Int64} if found else None)


def over_seeds(table: "pl.DataFrame") -> "pl.DataFrame":
    """A line for each row: statistics over seeds, and the paired difference to the base.

    Args:
      table: of `ablate`.

    Returns:
      `row`, `group`, `change`, `kernel_size`, `channels`, `time_steps`, `epochs`, `parameters`; `seconds` (mean); `n`
      trainings, of which `diverged`; `validation` of those that did not, and `difference` to the base over the `pairs`
      of equal seeds (means) with `_sd`, `_low` and `_high` (95 % t-interval, NaN for one training). Null where there
      is nothing; the difference also where a training of the row diverged, as the others would flatter it.
    """
    import polars as pl

    accuracy = {
        row: dict(part.drop_nulls("validation_accuracy").select("seed", "validation_accuracy").iter_rows())
        for (row,), part in table.group_by("row", maintain_order=True)
    }
    same = ("row", "group", "change", "kernel_size", "channels", "time_steps", "epochs", "parameters")
    nothing = dict.fromkeys(columns("", interval([0.0])))
    lines = []
    for (name,), own in table.group_by("row", maintain_order=True):
        here, there = accuracy[name], accuracy.get(BASE, {})
        diverged = len(own) - len(here)
        pairs = [] if name == BASE or diverged else [here[seed] - there[seed] for seed in here if seed in there]
        line = {column: own[column][0] for column in same}
        line |= {"seconds": float(np.mean(own["seconds"].to_numpy())), "n": len(own), "diverged": diverged}
        for field, values in (("validation", list(here.values())), ("difference", pairs)):
            found = columns("", interval(values)) if values else nothing
            line |= {field + end: value for end, value in found.items()}
        lines.append(line | {"pairs": len(pairs)})
    ends = ("", "_sd", "_low", "_high")
    types: Any = {field + end: pl.Float64 for field in ("validation", "difference") for end in ends}
    return pl.DataFrame(lines, schema_overrides=types)


def summary_markdown(summary: "pl.DataFrame", narrow: bool = False) -> str:
    """The summary as Markdown, accuracies in per cent; `narrow` leaves out what a terminal has no room for."""
    import polars as pl

    rows = []
    for row in summary.iter_rows(named=True):
        diverged = f"**{row['diverged']} of {row['n']} diverged**"
        rows.append({
            "group": row["group"], "row": row["row"], "change": row["change"] or "-", "n": row["n"],
            "validation % ± sd [95 %]": points(row, "validation") + (f"; {diverged}" if row["diverged"] else ""),
            "minus base, paired ± sd [95 %]": points(row, "difference", "+"), "pairs": row["pairs"],
            "C": row["channels"], "T": row["time_steps"], "parameters": f"{row['parameters']:,}",
            "epochs": row["epochs"], "training s": row["seconds"],
        })  # fmt: skip
    table = pl.DataFrame(rows)
    wide = ("group", "change", "pairs", "C", "T", "epochs")
    return pages.markdown_table(table, [name for name in table.columns if not (narrow and name in wide)])


def _sections(job: Job, base: Base, summary: "pl.DataFrame", missing: Sequence[Trial]) -> list[tuple[str, str]]:
    record = job.run.record()
    starts = [record["environment"], *record["resumed"]]
    commands = dict.fromkeys(shlex.join(["python", *start["command"]]) for start in starts)
    where = record["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    spec = base.spec
    config = ", ".join(f"{name}={value}" for name, value in dataclasses.asdict(base.config).items())
    about = (
        f"{job.data.source}\n\n{len(job.data.train.labels):,} training and {len(job.data.validation.labels):,} "
        f"validation images; the test split is not touched. Base: recipe {base.recipe} ({config}); cell "
        f"`{job.preset.impact_cell}` with K = {_KERNEL}, C = {spec.channels}, T = {spec.time_steps}, {spec.head} head, "
        f"stem stride {spec.stem_stride}, norm {spec.norm}, surrogate {spec.neuron.surrogate}, threshold "
        f"{spec.neuron.v_threshold:g}.\n\n```sh\n" + "\n".join(commands) + "\n```\n\n"
        f"Python {where['python']}, {versions}; {where['platform']}, {where['cpus']} CPUs."
    )
    table = (
        "After the last epoch. Each row is one change to the base. Differences are taken seed by seed, and not where a "
        "training diverged. Intervals are Student's t over seeds, 95 % each, not corrected for their number: of rows "
        "that change nothing, one in twenty still leaves 0 out. Rows with one training have none. Seconds have "
        "compilation in them, which a row's first training pays.\n\n"
    )
    sections = [("Run", about), ("Validation accuracy", table + summary_markdown(summary))]
    if missing:
        sections.append(("Missing", f"Not trained yet, of those last asked for: {_by_seed(missing)}."))
    return sections
