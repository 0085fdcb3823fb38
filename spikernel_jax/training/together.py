"""Several trainings as one batch: what fills an accelerator that a small network leaves idle."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spikernel_jax.data import Dataset
from spikernel_jax.snn.model import Model, hashable
from spikernel_jax.snn.spec import NetworkSpec
from spikernel_jax.training.devices import to_all
from spikernel_jax.training.loop import begin
from spikernel_jax.training.recipe import TrainConfig
from spikernel_jax.training.step import TrainState, in_calls, train_steps_together

State = TrainState  # of K trainings: every leaf has a leading axis [K]


def train_together(
    spec: NetworkSpec,
    genotypes: Sequence[Any],
    data: Dataset,
    config: TrainConfig,
    seeds: Sequence[int],
    *,
    one_program: bool = False,
    progress: Callable[[list[dict[str, Any]]], None] | None = None,
) -> list[Model]:
    """Trains several cells, or a cell with several seeds, at once: each model is what `train` makes, up to rounding.

    The trainings are vmapped: their convolutions become grouped ones, which two CPU cores are slow at. Where cells
    differ, every edge computes all operations for all of them, and each cell keeps its own. Nothing is saved on the
    way.

    Args:
      spec: the network.
      genotypes: of each training a fixed cell of `spec.space`: codes [E] or [2, E].
      data: images; the validation split is evaluated after every epoch.
      config: the recipe.
      seeds: one of each training.
      one_program: as in `train`; the trainings of all cells share one program then. Cells that differ need it.
      progress: called with each epoch's metrics, one a seed. `seconds` are those of all trainings together.

    Returns:
      The models, in the order of the seeds.

    Raises:
      ValueError: as `train`, and where there is no seed, not a cell for each, or no one program for cells that differ.
      TrainingDivergedError: at an epoch's end, when a loss or a weight of one of them is not finite.

    Example:
      >>> from spikernel_jax import CellSpace, NetworkSpec, TrainConfig, load_dataset, train_together
      >>> data = load_dataset("mnist5k", limit_train=16, limit_validation=16, limit_test=16)
      >>> spec = NetworkSpec((28, 28, 1), 10, CellSpace((3,)), channels=2, time_steps=1, stem_stride=2)
      >>> cell = spec.space.parse("0>1:conv3 0>3:skip 1>3:conv3")
      >>> models = train_together(spec, [cell, cell], data, TrainConfig(epochs=1, batch_size=8), seeds=(0, 1))
      >>> [model.metrics["seed"] for model in models]
      [0, 1]
    """
    if not seeds:
        raise ValueError("seeds=() must hold at least one")
    if len(genotypes) != len(seeds):
        raise ValueError(f"{len(genotypes)} genotypes and {len(seeds)} seeds: want a cell and a seed of each training")
    if (apart := len(set(map(hashable, genotypes))) > 1) and not one_program:
        raise ValueError("one_program=False: cells that differ are trained as one batch in one program alone")
    each = zip(genotypes, seeds, strict=True)
    pairs = [begin(spec, cell, data, config, seed, one_program=one_program) for cell, seed in each]
    runs = [running for running, _ in pairs]
    first = runs[0]
    program, cells = first.program, first.cell
    if apart:
        cells = to_all(program.devices, np.array([spec.codes(cell) for cell in map(hashable, genotypes)], np.int32))
    states: State = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(state for _, state in pairs))
    keys_K, states = to_all(program.devices, (jnp.stack([running.step_key for running in runs]), states))
    metrics: list[dict[str, Any]] = []
    for epoch in range(config.epochs):
        for running in runs:
            running.start_clock()
        zeros = to_all(program.devices, (jnp.zeros(len(runs)), jnp.zeros(len(runs), jnp.int32)))
        states = states.replace(loss_sum=zeros[0], right=zeros[1])  # pyright: ignore[reportAttributeAccessIssue]
        order_SKB = np.stack([running.order(epoch) for running in runs], 1)
        losses = []
        for rows, count in in_calls(order_SKB):
            fed = (cells, keys_K, first.images, first.labels, rows, count)
            states, values = train_steps_together(program, apart, states, *fed)
            losses.append(values[:count])
        losses_SK = np.concatenate(losses)
        alone = _each(states, len(runs))
        for running, state, own in zip(runs, alone, losses_SK.T, strict=True):
            running.check_finite(state, epoch, own.tolist(), epoch * first.steps)
        metrics = [running.metrics(state, epoch) for running, state in zip(runs, alone, strict=True)]
        if progress:
            progress(metrics)
    return [
        running.model(state, last | running.settings)
        for running, state, last in zip(runs, _each(states, len(runs)), metrics, strict=True)
    ]


def _each(states: State, count: int) -> list[TrainState]:
    """The states one by one."""
    return [jax.tree.map(lambda leaf, k=k: leaf[k], states) for k in range(count)]
