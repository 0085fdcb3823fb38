"""Training of one network, resumable to the bit."""

import dataclasses
import functools
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import chex
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

from spikernel_jax.data import Dataset, epoch_batches
from spikernel_jax.io.checks import whole
from spikernel_jax.io.signals import StopRequest
from spikernel_jax.snn import network, rounding
from spikernel_jax.snn.model import Model, hashable
from spikernel_jax.snn.spec import NetworkSpec, spec_to_json
from spikernel_jax.training.devices import devices_for, own, to_all, to_one
from spikernel_jax.training.evaluation import as_data, evaluate
from spikernel_jax.training.keep import kept
from spikernel_jax.training.recipe import TrainConfig
from spikernel_jax.training.step import Program, TrainState, in_calls, train_steps
from spikernel_jax.training.whitening import whitened_stem

Array = jax.Array


class TrainingDivergedError(ValueError):
    """The loss or a weight is no longer finite."""


def _digest_of(*arrays: Any) -> str:
    """A fingerprint of arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def train(
    spec: NetworkSpec,
    genotype: Any,
    data: Dataset,
    config: TrainConfig,
    *,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    one_program: bool = False,
    until: int | None = None,
    start: Model | None = None,
    devices: Sequence[Any] | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Model:
    """Trains a network; the test split is not touched.

    With a folder, the state is saved after every epoch and the metrics appended to ``metrics.jsonl``
    there; a run that was killed at any instant goes on from the last epoch and ends with the same weights
    to the bit on the same devices, and on others up to rounding. SIGTERM and SIGINT save after the steps that run.

    The batch is shared by devices (`devices.devices_for`). On those of several processes (`jax.distributed`), all of
    them call this alike and without a folder; on its own, a process trains and saves by itself.

    Args:
      spec: the network.
      genotype: a fixed cell of `spec.space`: codes [E] or [2, E].
      data: images; the validation split is evaluated after every epoch.
      config: the recipe.
      seed: decides weights, order, augmentation and dropout.
      folder: where to save; None saves nothing.
      one_program: let all cells of the space share one compiled program, where compilation costs more than a short
        training: the genotype is data, and each edge runs the operation that it names. Weights are then those of the
        genotype's own program up to rounding. Muon orthogonalises the kernels of operations not in use, too.
      until: the epoch after which to stop for now, with a folder to go on from; None trains to the end.
      start: whose weights and statistics to begin with, of the same network; None draws them by the seed.
      devices: that may share the batch; None is all of all processes.
      progress: called with each epoch's metrics.
      say: prints a line where a damaged checkpoint is passed over.

    Returns:
      The model after the last epoch; ``metrics`` holds the last epoch's, and the settings.

    Raises:
      ValueError: where data and spec do not fit, the batch is larger than the data, the folder has no room or
        holds another run or a damaged ``metrics.jsonl``, or devices of several processes are given one.
      TrainingDivergedError: at once when the loss is not finite, or at an epoch's end when a weight is not;
        that epoch is not saved.
      StoppedError: a signal asked to stop; all is saved.

    Example:
      >>> from spikernel_jax import CellSpace, NetworkSpec, TrainConfig, load_dataset, train
      >>> data = load_dataset("mnist5k", limit_train=16, limit_validation=16, limit_test=16)
      >>> spec = NetworkSpec((28, 28, 1), 10, CellSpace((3,)), channels=2, time_steps=1, stem_stride=2)
      >>> cell = spec.space.parse("0>1:conv3 0>3:skip 1>3:conv3")
      >>> model = train(spec, cell, data, TrainConfig(epochs=1, batch_size=8))
      >>> model(data.test.images).shape
      (16, 10)
    """
    if folder is not None and not own(jax.devices() if devices is None else devices):
        raise ValueError(
            f"folder={folder}: {jax.process_count()} processes train together without one; give None, or "
            "devices=jax.local_devices() to train in each by itself"
        )
    ends = config.epochs if until is None else whole("until", until, 1, config.epochs)
    running, state = begin(spec, genotype, data, config, seed, one_program=one_program, start=start, among=devices)
    last: dict[str, Any] = {}
    with kept(None if folder is None else Path(folder), running.fingerprint, running.devices, say) as keeper:
        state = keeper.restore(state, running.steps, config.epochs * running.steps)
        for epoch in range(begun := int(state.step) // running.steps, ends):
            try:
                state = running.epoch(state, epoch, keeper.stop)
            except TrainingDivergedError as error:
                raise TrainingDivergedError(f"{error}{keeper.last_saved}") from None
            if int(state.step) == (epoch + 1) * running.steps:
                keeper.log(last := running.metrics(state, epoch))
                if progress:
                    progress(last)
            keeper.save(int(state.step), state)
        last = last or keeper.logged(max(begun, ends))
    return running.model(state, last | running.settings)


def begin(
    spec: NetworkSpec,
    genotype: Any,
    data: Dataset,
    config: TrainConfig,
    seed: int,
    *,
    one_program: bool,
    start: Model | None = None,
    among: Sequence[Any] | None = None,
) -> tuple["Running", TrainState]:
    """A training and its state before the first step; arguments and errors as `train`, whose devices are `among`."""
    codes, seed = hashable(genotype), whole("seed", seed, 0, 2**32 - 1)  # a key holds 32 bits of it
    spec.codes(codes)
    _check_fit(spec, data, config)
    if start is not None and (start.spec, start.genotype) != (spec, codes):
        raise ValueError(f"start is a model of another network: {start.text}, {start.spec}")
    steps = len(data.train.labels) // config.batch_size
    devices = devices_for(config.batch_size, among)
    fixed = None if one_program else codes
    program = Program(spec, fixed, config, config.epochs * steps, data.mean, data.std, devices)
    settings = {
        "spec": spec_to_json(spec),
        "genotype": np.asarray(codes).tolist(),
        "config": dataclasses.asdict(config),
        "seed": seed,
        "data": data.name,
        "train_digest": _digest_of(data.train.images, data.train.labels),
    } | ({"one_program": True} if one_program else {})
    if start is not None:
        settings["start"] = _digest_of(*jax.tree.leaves((start.params, start.stats)))
    root = jax.random.key(seed)
    init_key, order_key, step_key = (jax.random.fold_in(root, i) for i in range(3))
    begun = start and as_data(start, one_program)[2]
    if config.stem_init == "whitened" and not begun:
        params, stats = network.init(init_key, spec, fixed)
        kernel = whitened_stem(params["stem"]["kernel"], data, spec.stem_stride)
        begun = params | {"stem": params["stem"] | {"kernel": kernel}}, stats
    state = program.start(init_key, begun)
    return Running(program, codes, data, order_key, step_key, settings, among), state


def _check_fit(spec: NetworkSpec, data: Dataset, config: TrainConfig) -> None:
    if data.image_shape != spec.image_shape:
        raise ValueError(f"image_shape={spec.image_shape} of the spec is not that of {data.name}: {data.image_shape}")
    if data.num_classes != spec.num_classes:
        raise ValueError(f"num_classes={spec.num_classes} of the spec is not that of {data.name}: {data.num_classes}")
    if config.batch_size > len(data.train.labels):
        raise ValueError(
            f"batch_size={config.batch_size} is larger than the data: {len(data.train.labels)} training images"
        )


class Running:
    """One training: its data on the devices, epoch by epoch.

    Attributes:
      program: what its steps are compiled for.
      step_key: of what steps draw.
      cell: the genotype on the devices, where it is data.
      settings: all that its result follows from, for the model.
    """

    def __init__(
        self,
        program: Program,
        codes: tuple[Any, ...],
        data: Dataset,
        order_key: Array,
        step_key: Array,
        settings: dict[str, Any],
        among: Sequence[Any] | None,
    ):
        """Nothing but the genotype goes to the devices yet."""
        self._among = among
        self.program, self.step_key, self.settings = program, step_key, settings
        self._codes, self._data, self._order_key = codes, data, order_key
        self.cell = to_all(program.devices, np.asarray(codes, np.int32)) if program.genotype is None else ()
        self._started = time.perf_counter()

    # Where several trainings run as one batch, only one of them puts the images on the devices.
    @functools.cached_property
    def images(self) -> Array:
        """For training, uint8, on the devices."""
        return to_all(self.program.devices, self._data.train.images)

    @functools.cached_property
    def labels(self) -> Array:
        """Of the images, on the devices."""
        return to_all(self.program.devices, self._data.train.labels)

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return len(self._data.train.labels) // self.program.config.batch_size

    @property
    def devices(self) -> jax.sharding.Mesh:
        """That share a batch."""
        return self.program.devices

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The settings as JSON gives them back."""
        return json.loads(json.dumps(self.settings))

    def order(self, epoch: int) -> np.ndarray:
        """Places of the images of an epoch's batches: [steps, B]."""
        key = jax.random.fold_in(self._order_key, epoch)
        return np.asarray(epoch_batches(key, len(self._data.train.labels), self.program.config.batch_size))

    def model(self, state: TrainState, metrics: dict[str, Any]) -> Model:
        """What the state is worth: its moving average, where the recipe has one."""
        program, codes = self.program, self._codes
        params, stats = to_one(state.average or (state.params, state.stats))
        if bits := program.config.weight_bits:
            params = rounding.straight_through(program.spec, params, bits)
        if program.genotype is None:
            params, stats = (network.subnetwork(program.spec, own, codes) for own in (params, stats))
        return Model(program.spec, codes, params, stats, program.mean, program.std, metrics)

    def epoch(self, state: TrainState, epoch: int, stop: StopRequest | None = None) -> TrainState:
        """The state after an epoch that may have begun already, or where it was told to stop."""
        self.start_clock()
        program, order = self.program, self.order(epoch)
        begun = int(state.step) - epoch * len(order)
        if not begun:
            zeros = to_all(program.devices, (jnp.float32(0), jnp.int32(0)))
            state = dataclasses.replace(state, loss_sum=zeros[0], right=zeros[1])
        losses: list[Array] = []
        for rows, count in in_calls(order, begun):
            state, values = train_steps(program, state, self.cell, self.step_key, self.images, self.labels, rows, count)
            losses.append(values[:count])
            if len(losses) > 1 and not np.isfinite(losses[-2]).all():  # a call late: the device never waits
                break
            if stop and stop.requested:
                break
        self.check_finite(state, epoch, np.concatenate(losses).tolist(), epoch * len(order) + begun)
        return state

    def start_clock(self) -> None:
        """Seconds of an epoch's metrics are those since this."""
        self._started = time.perf_counter()

    def check_finite(self, state: TrainState, epoch: int, losses: list[float], first_step: int) -> None:
        """Raises TrainingDivergedError where a loss since a step, or a weight, is not finite."""
        remedy = f"lower learning_rate={self.program.config.learning_rate}, or check the images"
        for index, value in enumerate(losses):
            if not math.isfinite(value):
                raise TrainingDivergedError(
                    f"the loss is {value} at step {first_step + index} (epoch {epoch + 1}): {remedy}"
                )
        try:  # the last update comes after the last loss
            chex.assert_tree_all_finite((state.params, state.stats))
        except AssertionError:
            raise TrainingDivergedError(f"weights are not finite after epoch {epoch + 1}: {remedy}") from None

    def metrics(self, state: TrainState, epoch: int) -> dict[str, Any]:
        """Of an epoch that has just ended; its seconds are those since this process began it."""
        steps = int(state.step) // (epoch + 1)
        seconds = time.perf_counter() - self._started
        return {
            "epoch": epoch + 1,
            "train_loss": float(state.loss_sum) / steps,
            "train_accuracy": int(state.right) / (steps * self.program.config.batch_size),
            "validation_accuracy": evaluate(
                self.model(state, {}),
                self._data.validation,
                one_program=self.program.genotype is None,
                devices=self._among,
            ),
            "seconds": round(seconds, 3),
        }
