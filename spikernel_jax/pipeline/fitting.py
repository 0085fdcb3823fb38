"""A finished model for weights of few bits: rounded, and where that is asked for trained on for them."""

import dataclasses
from typing import NamedTuple

from spikernel_jax.data import Split
from spikernel_jax.embedded import integer
from spikernel_jax.embedded.calibration import CALIBRATED, calibrated
from spikernel_jax.embedded.lower import WEIGHT_BITS, WIDTHS
from spikernel_jax.embedded.program import Program
from spikernel_jax.io.voice import Moving
from spikernel_jax.pipeline.job import Job
from spikernel_jax.snn.cost import parameters_of
from spikernel_jax.snn.model import Model
from spikernel_jax.training.loop import train
from spikernel_jax.training.recipe import TrainConfig

_SLOWER = 0.25  # a share of the learning rate that the model was trained with


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is asked for.

    Attributes:
      widths: of weights.
      width: of currents and membranes.
      tune: epochs of training for weights of few bits.

    Raises:
      ValueError: naming the option, its value and what would be right.
    """

    widths: tuple[int, ...]
    width: int
    tune: int

    def __post_init__(self) -> None:
        """Refuses what no device has, before any work."""
        (least, most), (narrowest, widest), given = WEIGHT_BITS, WIDTHS, self.widths
        if not given or len(set(given)) < len(given) or not all(least <= own <= most for own in given):
            shown = " ".join(map(str, given))
            raise ValueError(f"--widths {shown}: want different widths of weights from {least} to {most}")
        if not narrowest <= self.width <= widest:
            raise ValueError(f"--membrane-bits {self.width} must be from {narrowest} to {widest}")
        if self.tune < 0:
            raise ValueError(f"--tune {self.tune} must be at least 0")


class Fitted(NamedTuple):
    """A model, its program, and what that says of validation images."""

    model: Model
    program: Program
    found: integer.Result
    accuracy: float


def accuracy(found: integer.Result, split: Split) -> float:
    """The share of images whose greatest logit is their label's."""
    return float((found.logits_BK.argmax(1) == split.labels).mean())


def float_bytes(model: Model) -> int:
    """Of the parameters of a float32 network."""
    return 4 * parameters_of(model.spec, model.genotype)


def program_of(job: Job, model: Model, bits: int, width: int) -> Program:
    """The program of a model, calibrated on the run's training images."""
    return calibrated(model, job.data.train.images[:CALIBRATED], bits, width)


def rounded(job: Job, model: Model, program: Program) -> Fitted:
    """What a program of the model, as it is, says of validation images."""
    found = integer.run(program, job.data.validation.images)
    return Fitted(model, program, found, accuracy(found, job.data.validation))


def trained_on(job: Job, name: str, model: Model, bits: int, epochs: int) -> Model:
    """The model after more epochs, with weights of so many bits wherever they are multiplied.

    Killed, it goes on where it was: its checkpoints are in the run's folder `tuning`.

    Args:
      job: whose images and folder.
      name: of the model in the run.
      model: with the recipe and the seed that it was trained with among its metrics.
      bits: of weights, 2 to 8; 0 leaves them as they are.
      epochs: more than 0.
    """
    was = TrainConfig(**model.metrics["config"])
    config = dataclasses.replace(
        was, epochs=epochs, learning_rate=_SLOWER * was.learning_rate, warmup=0.0, weight_bits=bits
    )
    training = f"{name}-{f'int{bits}' if bits else 'float32'}-{epochs}"
    return train(
        model.spec,
        model.genotype,
        job.data,
        config,
        seed=model.metrics["seed"],
        folder=job.run.folder("tuning") / training,
        start=model,
        progress=lambda record: job.say(
            Moving(
                f"    epoch {record['epoch']}/{epochs}  validation {100 * record['validation_accuracy']:.1f} %",
                name=training,
                of=epochs,
                **record,
            )
        ),
        say=job.say,
    )
