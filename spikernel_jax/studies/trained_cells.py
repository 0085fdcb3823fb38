"""A table of trained cells: what a score, a count or a short training is worth is measured on it.

Cells of the union of the kernel sets, stratified by the depth of the convolution path, the number of convolutions and
the largest kernel, so that no one count explains the table; each trained over several seeds by one short recipe. All
trainings share one compiled program.
"""

import dataclasses
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from numpy.typing import NDArray

from spikernel_jax.cells.kernels import kernel_set_text, operation_of
from spikernel_jax.cells.space import CellSpace
from spikernel_jax.io.store import ResultStore
from spikernel_jax.io.units import duration
from spikernel_jax.io.voice import Moving
from spikernel_jax.pipeline.job import Job
from spikernel_jax.report import pages, ranking
from spikernel_jax.scoring import counts
from spikernel_jax.search.queue import digest
from spikernel_jax.snn import cost
from spikernel_jax.snn.model import Model
from spikernel_jax.snn.spec import NetworkSpec, spec_to_json
from spikernel_jax.studies.tables import ABOUT, half_of
from spikernel_jax.training.evaluation import evaluate, measure_spikes
from spikernel_jax.training.loop import train
from spikernel_jax.training.recipe import TrainConfig
from spikernel_jax.training.together import train_together

if TYPE_CHECKING:
    import polars as pl

Rows = NDArray[np.int8]
_MOST_SEEDS, _MOST_AT_ONCE = 100, 10_000
_WRITE_EVERY = 20  # trainings


@dataclasses.dataclass(frozen=True)
class Study:
    """What is trained.

    Attributes:
      spec: the network, of the union space.
      config: the recipe.
      rows: cells [n, E], in the order in which they are trained: the first of them are stratified, too.
      seeds: trainings of each.
      at_once: trainings that are one batch; None is one on a CPU, and all seeds of a cell on an accelerator.
    """

    spec: NetworkSpec
    config: TrainConfig
    rows: Rows
    seeds: int
    at_once: int | None = None


def make_study(
    spec: NetworkSpec, config: TrainConfig, cells: int, seeds: int, key: jax.Array, at_once: int | None = None
) -> Study:
    """The study of so many cells; ValueError on the first setting that is wrong."""
    space = spec.space
    listed = space.enumerate()
    if not 1 <= cells <= len(listed):
        raise ValueError(f"--cells {cells} must be from 1 to {len(listed):,}, the distinct cells")
    if not 1 <= seeds <= _MOST_SEEDS:
        raise ValueError(f"--seeds {seeds} must be from 1 to {_MOST_SEEDS}")
    if at_once is not None and not 1 <= at_once <= _MOST_AT_ONCE:
        raise ValueError(f"--at-once {at_once} must be from 1 to {_MOST_AT_ONCE}")
    return Study(spec, config, stratified(space, listed, cells, key), seeds, at_once)


def stratum(space: CellSpace, row: Any) -> tuple[int, int, int]:
    """Depth of the convolution path, number of convolutions, weights of the largest one's kernel."""
    sizes = [operation.weights(1) for *_, operation in space.held(row)]
    return counts.depth(space, row), sum(size > 0 for size in sizes), max(sizes, default=0)


def stratified(space: CellSpace, listed: Rows, count: int, key: jax.Array) -> Rows:
    """Cells, one of each stratum in turn, drawn within it; fewer are the first of more."""
    shuffled = listed[np.asarray(jax.random.permutation(key, len(listed)))]
    strata: dict[tuple[int, int, int], list[Any]] = {}
    for row in shuffled:
        strata.setdefault(stratum(space, row), []).append(row)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*(strata[name] for name in sorted(strata))))
    return np.stack(list(itertools.islice((row for row in turns if row is not None), count)))


def _sizes_text(space: CellSpace, row: Any) -> str:
    """The kernels that a cell uses, as ``3,5``."""
    used = {operation.name for *_, operation in space.held(row)}
    return kernel_set_text([kernel for kernel in space.kernels if operation_of(kernel) in used])


def _facts(job: Job, study: Study) -> dict[str, Any]:
    """What `tables.read_table` gives of a table: all that it follows from, as JSON has it."""
    record = job.run.record()
    return {
        "spec": spec_to_json(study.spec),
        "recipe": dataclasses.asdict(study.config),
        "data": job.data.name,
        "limits": job.preset.limits,
        "source": job.data.source,
        "run": record["config"],
        "environment": record["environment"],
        "cells": len(study.rows),
        "seeds": study.seeds,
    }


def train_cells(job: Job, study: Study) -> "pl.DataFrame":
    """Trains every cell over all seeds, each once however often it is asked for, and writes the table as it grows.

    Leaves ``cells/`` (a piece for each training), ``tables/trained_cells.parquet`` (of `table_of`) and ``report.md``.
    Seeds are the outer loop, so that a run cut short has all cells of its first seeds.

    Args:
      job: run folder, data, and the option `bits`.
      study: what is trained.

    Returns:
      The table.
    """
    facts = {"spec": spec_to_json(study.spec), "config": dataclasses.asdict(study.config), "seed": job.seed}
    images = digest(job.data.train.images, job.data.validation.images, job.data.test.images)
    # Neither the number of cells nor that of seeds is in it, so that a table can grow.
    store = ResultStore(job.run.folder("cells"), facts | {"data": job.data.name, "images": images})
    store.sweep()
    done = store.done()
    job.say(f"{len(study.rows)} cells, {study.seeds} seeds, {study.config.epochs} epochs each; {len(done)} are there")
    wanted = [(seed, place) for seed, place, _ in _wanted(study) if _index(seed, place) not in done]
    began, fresh, written = time.perf_counter(), 0, 0
    at_once = study.at_once or (1 if jax.default_backend() == "cpu" else None)
    for batch in batches(wanted, at_once):
        found = _trained(job, study, batch)
        for (seed, place), own in zip(batch, found, strict=True):
            store.save(_index(seed, place), row=study.rows[place], **own)
        fresh += len(batch)
        left = (time.perf_counter() - began) / fresh * (len(wanted) - fresh)
        accuracies = ", ".join(f"{100 * own['validation'][-1]:.1f}" for own in found)
        number, of = len(done) + fresh, len(done) + len(wanted)
        text = study.spec.space.explicit(study.rows[batch[-1][1]])
        seeds = ", ".join(map(str, dict.fromkeys(seed for seed, _ in batch)))
        job.say(Moving(
            f"  {number}/{of}  seed {seeds}  {text}  validation {accuracies} %  {duration(left)} left",
            done=number, of=of, genotype=text, left_seconds=left,
        ))  # fmt: skip
        if fresh - written >= _WRITE_EVERY:
            _write(job, study, store)
            written = fresh
    return _write(job, study, store)


def batches(wanted: Sequence[tuple[int, int]], at_once: int | None) -> list[Sequence[tuple[int, int]]]:
    """Trainings that are made at once.

    Args:
      wanted: seed and cell's place of each training.
      at_once: how many; None is all of a cell's seeds.
    """
    if at_once is not None:
        return [wanted[first : first + at_once] for first in range(0, len(wanted), at_once)]
    places = dict.fromkeys(place for _, place in wanted)
    return [[own for own in wanted if own[1] == place] for place in places]


def _index(seed: int, place: int) -> int:
    """Number of a training's piece."""
    return seed * 1_000_000 + place


def _wanted(study: Study) -> Iterator[tuple[int, int, NDArray[np.int8]]]:
    for seed, (place, row) in itertools.product(range(study.seeds), enumerate(study.rows)):
        yield seed, place, row


def _trained(job: Job, study: Study, batch: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """What is kept of each training of a batch."""
    epochs: list[list[dict[str, Any]]] = []
    rows, seeds = [study.rows[place] for _, place in batch], [job.seed * 1000 + seed for seed, _ in batch]
    given: Any = {"data": job.data, "config": study.config, "one_program": True}
    if len(batch) > 1:
        models = train_together(study.spec, rows, seeds=seeds, progress=epochs.append, **given)
    else:
        (row,), (seed,) = rows, seeds
        models = [train(study.spec, row, seed=seed, progress=lambda record: epochs.append([record]), **given)]
    each = zip(models, zip(*epochs, strict=True), strict=True)
    return [_kept(job, study, model, own, len(batch)) for model, own in each]


def _kept(job: Job, study: Study, model: Model, epochs: Sequence[dict[str, Any]], together: int) -> dict[str, Any]:
    """What is kept of a training, and its part of the seconds of so many."""
    spikes = measure_spikes(model, job.data.validation, one_program=True)
    sites = study.spec.sites(model.genotype)
    neurons = sum(site.neurons for site in sites.values())
    return {
        "validation": np.array([epoch["validation_accuracy"] for epoch in epochs]),
        "train_loss": np.array([epoch["train_loss"] for epoch in epochs]),
        "seconds": sum(epoch["seconds"] for epoch in epochs) / together,
        "test": evaluate(model, job.data.test, one_program=True),
        "synops": cost.synaptic_operations(study.spec, np.asarray(model.genotype), spikes),
        "firing_rate": sum(own.sum() for own in spikes.values()) / (neurons * study.spec.time_steps),
    }


def table_of(job: Job, study: Study, store: ResultStore) -> "pl.DataFrame":
    """A row for each training that is done: cell, counts of it, what it costs, and its accuracies.

    `validation` is a list, by epoch; `firing_rate` the spikes of a neuron and time step, on validation images.
    """
    import polars as pl

    total, space = cost.costs(study.spec, study.rows, job.options.bits), study.spec.space
    done, rows = store.done(), []
    for seed, place, row in _wanted(study):
        if (index := _index(seed, place)) not in done:
            continue
        kept = store.load(index)
        deep, convolutions, _ = stratum(space, row)
        rows.append({
            "genotype": space.explicit(row), "half": half_of(space, row), "seed": job.seed * 1000 + seed,
            "kernel_sizes": _sizes_text(space, row), "depth": deep, "convolutions": convolutions,
            "parameters": int(total.parameters[place]), "memory_bytes": int(total.memory_bytes[place]),
            "synops": float(kept["synops"]), "firing_rate": float(kept["firing_rate"]),
            "validation": kept["validation"].tolist(), "validation_accuracy": float(kept["validation"][-1]),
            "test_accuracy": float(kept["test"]), "seconds": float(kept["seconds"]),
        })  # fmt: skip
    return pl.DataFrame(rows)


def retest(table: "pl.DataFrame") -> float:
    """`ranking.retest` of final validation accuracies, of the cells that have all seeds."""
    wide = table.pivot("seed", index="genotype", values="validation_accuracy").drop_nulls()
    return ranking.retest(wide.drop("genotype").to_numpy())


def _write(job: Job, study: Study, store: ResultStore) -> "pl.DataFrame":
    import polars as pl

    table = table_of(job, study, store)
    job.run.write_table("trained_cells", table, {ABOUT: json.dumps(_facts(job, study))})
    mean = table.group_by("genotype", maintain_order=True).agg(
        pl.col("depth", "convolutions", "parameters", "synops", "validation_accuracy").mean(), pl.len().alias("n")
    )
    lines = [
        {
            "what": what,
            "Kendall tau-b with validation accuracy": ranking.kendall(mean[what], mean["validation_accuracy"]),
        }
        for what in ("depth", "convolutions", "parameters", "synops")
    ]
    by_depth = mean.group_by("depth").agg(
        pl.len().alias("cells"), (100 * pl.col("validation_accuracy").mean()).alias("validation %")
    ).sort("depth")  # fmt: skip
    spec = study.spec
    about = (
        f"{job.data.source}\n\n{len(mean)} cells of {len(study.rows)}, C = {spec.channels}, T = {spec.time_steps}, "
        f"stem stride {spec.stem_stride}, {study.config.epochs} epochs; retest Kendall τ between seeds "
        f"{retest(table):.3f}. Seconds of a training: median {table['seconds'].median():.1f}."
    )
    agreeing = pl.DataFrame(lines)
    pages.write_report(
        job.run,
        [
            ("Run", about),
            ("Counts of a cell", pages.markdown_table(agreeing, agreeing.columns)),
            ("By depth", pages.markdown_table(by_depth, by_depth.columns)),
        ],
    )
    return table
