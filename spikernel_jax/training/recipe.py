"""Recipes: optimiser, schedule, loss and augmentation of a training.

The defaults are SNASNet's recipe (Kim et al., ECCV 2022, section 5.1): SGD with momentum, cosine schedule,
cross-entropy on the mean output over time. The rest are changes to it that recent work trains with. `RECIPES` are
those that go by a name.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spikernel_jax.data import augment, cutmix, cutout, mixup, normalise, trivial_augment
from spikernel_jax.io.checks import require_known, whole
from spikernel_jax.snn.rounding import BITS
from spikernel_jax.training.muon import muon

Array = jax.Array

OPTIMISERS = ("sgd", "nesterov", "adamw", "muon")
SCHEDULES = ("cosine", "one_cycle")
LOSSES = ("mean", "tet")
MIXES = ("none", "mixup", "cutmix")
DECAYED = ("all", "kernels")
PRECISIONS = ("float32", "bfloat16")
STEM_INITS = ("random", "whitened")

# Fields of `TrainConfig`. Epochs, batch size and the learning rate of SGD are a preset's; a recipe of another optimiser
# sets a learning rate of its own.
RECIPES: dict[str, dict[str, Any]] = {
    "snasnet": {
        "optimiser": "sgd",
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "schedule": "cosine",
        "final_fraction": 0.01,
        "loss": "mean",
    },
    "tuned": {
        "optimiser": "muon",
        "learning_rate": 0.02,
        "momentum": 0.95,
        "weight_decay": 0.05,
        "loss": "mean",
    },
}
DEFAULT_RECIPE = "tuned"


def named_recipe(name: str) -> dict[str, Any]:
    """The changes to `TrainConfig` that a recipe's name stands for; ValueError naming the known ones."""
    if name not in RECIPES:
        raise ValueError(f"--recipe {name!r} is unknown; known: {', '.join(RECIPES)}")
    return dict(RECIPES[name])


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a network is trained.

    Attributes:
      epochs: passes over the training images.
      batch_size: images per step.
      learning_rate: the largest of the schedule.
      final_fraction: of the learning rate, where the cosine ends.
      momentum: of SGD; Adam's first and Muon's beta.
      weight_decay: of `decayed` parameters; before the momentum with SGD, decoupled with AdamW and Muon. What
        neurons learn, scalars, is never decayed.
      padding: of the random crop, in pixels.
      flip: random horizontal flips.
      optimiser: ``"sgd"``, ``"nesterov"``, ``"adamw"``, or ``"muon"`` (Jordan et al. 2024: kernels, those of
        stem and classifier among them, as matrices of k·k·C_in rows; all else, norms too, by Adam at the same rate).
      schedule: ``"cosine"``, or ``"one_cycle"`` (Smith & Topin 2018: up in the first 30 % of the steps, then down).
      warmup: fraction of the steps in which the cosine's rate rises from 0.
      loss: cross-entropy of the ``"mean"`` output over time, or ``"tet"``: the mean over time of each step's
        cross-entropy (Deng et al., ICLR 2022, without the regulariser).
      label_smoothing: share of the target that goes to all classes alike.
      trivial: TrivialAugment (Müller & Hutter, ICCV 2021).
      cutout: side of a black square, in pixels; 0 is none.
      mix: ``"none"``, ``"mixup"`` or ``"cutmix"``.
      mix_alpha: of the Beta distribution that shares are drawn from.
      decayed: ``"all"`` parameters, or the ``"kernels"`` alone.
      precision: of spikes and weights where convolutions multiply them: ``"float32"``, or ``"bfloat16"``, whose
        products are summed in float32. Norms, membranes, the loss and the weights that are updated stay in float32.
      ema: decay a step of the moving average of weights and statistics that is evaluated and exported; 0 is none.
      weight_bits: of kernels wherever they are multiplied, evaluated and exported, from 2 to 8 (`snn.rounding`); their
        gradients move kernels of float32. 0 is no rounding.
      stem_init: how the stem begins: ``"random"``, or ``"whitened"``, so that it whitens patches of the training
        images (`whitening`).

    Raises:
      ValueError: naming the field, its value, and what would be right.

    Example:
      >>> from spikernel_jax import TrainConfig
      >>> TrainConfig(epochs=5, optimiser="muon", learning_rate=0.02).schedule
      'cosine'
    """

    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 0.1
    final_fraction: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    padding: int = 0
    flip: bool = False
    optimiser: str = "sgd"
    schedule: str = "cosine"
    warmup: float = 0.0
    loss: str = "mean"
    label_smoothing: float = 0.0
    trivial: bool = False
    cutout: int = 0
    mix: str = "none"
    mix_alpha: float = 1.0
    decayed: str = "all"
    ema: float = 0.0
    precision: str = "float32"
    weight_bits: int = 0
    stem_init: str = "random"

    def __post_init__(self) -> None:
        """Refuses what cannot be trained with."""
        for name in ("epochs", "batch_size"):
            object.__setattr__(self, name, whole(name, getattr(self, name), 1, 1_000_000_000))
        for name in ("flip", "trivial"):
            if not isinstance(getattr(self, name), bool | np.bool_):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False")
        for name in ("learning_rate", "mix_alpha"):
            if not (math.isfinite(value := getattr(self, name)) and value > 0):
                raise ValueError(f"{name}={value} must be finite and above 0")
        if not 0 <= self.final_fraction <= 1:
            raise ValueError(f"final_fraction={self.final_fraction} must be from 0 to 1")
        for name in ("momentum", "warmup", "label_smoothing", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1)")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight_decay={self.weight_decay} must be finite and at least 0")
        for name in ("padding", "cutout"):
            object.__setattr__(self, name, whole(name, getattr(self, name), 0, 4096))
        if self.weight_bits:
            whole("weight_bits", self.weight_bits, *BITS)
        require_known(self, optimiser=OPTIMISERS, schedule=SCHEDULES, loss=LOSSES)
        require_known(self, mix=MIXES, decayed=DECAYED, precision=PRECISIONS, stem_init=STEM_INITS)
        if self.schedule == "one_cycle" and self.warmup:
            raise ValueError(f"warmup={self.warmup}: the one_cycle schedule has a rise of its own; give warmup=0")


def learning_rates(config: TrainConfig, total_steps: int) -> optax.Schedule:
    """The learning rate by step."""
    peak = config.learning_rate
    if config.schedule == "one_cycle":
        return optax.cosine_onecycle_schedule(total_steps, peak)
    rise = round(config.warmup * total_steps)
    if not rise:
        return optax.cosine_decay_schedule(peak, total_steps, alpha=config.final_fraction)
    return optax.warmup_cosine_decay_schedule(0.0, peak, rise, total_steps, peak * config.final_fraction)


def optimiser(config: TrainConfig, total_steps: int, *, together: bool = False) -> optax.GradientTransformation:
    """The optimiser of a training of so many steps.

    Args:
      config: the recipe.
      total_steps: of the whole training.
      together: treat all parameters as one array, where the recipe treats all alike: many small ones take longer.
    """
    inner = _optimiser(config, total_steps)
    if together and config.optimiser != "muon" and config.decayed == "all":
        inner = optax.flatten(inner)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        # Decay alone reads the values of parameters: seen as 0, neurons' scalars are not drawn to tau = 2.
        seen = jax.tree.map(lambda leaf: leaf if leaf.ndim else jnp.zeros_like(leaf), params)
        return inner.update(updates, state, seen)

    return optax.GradientTransformation(inner.init, update)


def _optimiser(config: TrainConfig, total_steps: int) -> optax.GradientTransformation:
    rates = learning_rates(config, total_steps)
    mask: Any = _kernels if config.decayed == "kernels" else None
    if config.optimiser == "adamw":
        return optax.adamw(rates, config.momentum, weight_decay=config.weight_decay, mask=mask)
    if config.optimiser == "muon":
        return muon(rates, config.momentum, config.weight_decay, kernels_alone=mask is not None)
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay, mask),
        optax.sgd(rates, config.momentum, nesterov=config.optimiser == "nesterov"),
    )


def _kernels(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def inputs(
    config: TrainConfig, key: Array, images: Array, labels_B: Array, num_classes: int, mean: Any, std: Any
) -> tuple[Array, Array]:
    """A batch as the network gets it.

    Args:
      config: the recipe.
      key: of the step.
      images: uint8 [B, H, W, C].
      labels_B: classes.
      num_classes: K.
      mean: per channel, of pixel/255.
      std: per channel, of pixel/255.

    Returns:
      Augmented and normalised images [B, H, W, C], and targets [B, K], rows of sum 1.
    """
    trivial, crops, holes, mixes = jax.random.split(key, 4)
    x = trivial_augment(trivial, images) if config.trivial else images
    x = augment(crops, x, config.padding, config.flip)
    x = normalise(cutout(holes, x, config.cutout) if config.cutout else x, mean, std)
    targets = jax.nn.one_hot(labels_B, num_classes)
    if config.label_smoothing:
        targets = optax.smooth_labels(targets, config.label_smoothing)
    if config.mix == "none":
        return x, targets
    return (mixup if config.mix == "mixup" else cutmix)(mixes, x, targets, config.mix_alpha)


def loss(config: TrainConfig, logits_TBK: Array, targets_BK: Array) -> Array:
    """The loss, scalar."""
    if config.loss == "tet":
        return optax.softmax_cross_entropy(logits_TBK, targets_BK[None]).mean()
    return optax.softmax_cross_entropy(logits_TBK.mean(0), targets_BK).mean()


def averaged(config: TrainConfig, average: Any, new: Any, step: Array) -> Any:
    """The moving average after a step: its decay grows to `ema`, so that the start is soon forgotten."""
    decay = jnp.minimum(config.ema, (1 + step) / (10 + step))
    return optax.incremental_update(new, average, 1 - decay)
