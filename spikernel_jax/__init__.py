"""SpiKernel in JAX: kernel-size exploration and training-free search for spiking neural networks."""

from importlib import metadata

from spikernel_jax.cells.space import CellSpace
from spikernel_jax.data import load_dataset, make_dataset
from spikernel_jax.operations.builtin import chain
from spikernel_jax.operations.check import check_operation
from spikernel_jax.operations.operation import Layer, Operation, get_operation, register_operation
from spikernel_jax.scoring.bank import make_bank
from spikernel_jax.scoring.independent import score_independently
from spikernel_jax.scoring.population import score_population
from spikernel_jax.scoring.replicates import Scores
from spikernel_jax.snn.cost import costs
from spikernel_jax.snn.model import Model, NNXModel
from spikernel_jax.snn.neurons import NeuronSpec
from spikernel_jax.snn.snasnet import load_snasnet
from spikernel_jax.snn.spec import NetworkSpec
from spikernel_jax.studies.tables import load_trained_cells
from spikernel_jax.training.checkpoint import load_model, save_model
from spikernel_jax.training.evaluation import evaluate
from spikernel_jax.training.loop import train
from spikernel_jax.training.recipe import TrainConfig
from spikernel_jax.training.together import train_together

__version__ = metadata.version("spikernel-jax")

__all__ = [
    "CellSpace",
    "Layer",
    "Model",
    "NNXModel",
    "NetworkSpec",
    "NeuronSpec",
    "Operation",
    "Scores",
    "TrainConfig",
    "chain",
    "check_operation",
    "costs",
    "evaluate",
    "get_operation",
    "load_dataset",
    "load_model",
    "load_snasnet",
    "load_trained_cells",
    "make_bank",
    "make_dataset",
    "register_operation",
    "save_model",
    "score_independently",
    "score_population",
    "train",
    "train_together",
]
