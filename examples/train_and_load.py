"""Trains one cell for two epochs, exports it, and loads it back."""

import tempfile
from pathlib import Path

from spikernel_jax import CellSpace, NetworkSpec, TrainConfig, evaluate, load_dataset, load_model, save_model, train
from spikernel_jax.io import machine

machine.set_up()
data = load_dataset("mnist5k", limit_train=1000, limit_validation=200, limit_test=200)
space = CellSpace(kernel_sizes=(3,))
spec = NetworkSpec(data.image_shape, data.num_classes, space, channels=8, time_steps=2, stem_stride=2)
cell = space.parse("0>1:conv3 0>3:skip 1>3:conv3")
config = TrainConfig(epochs=2, batch_size=16, optimiser="muon", learning_rate=0.02)
model = train(spec, cell, data, config, progress=print)
with tempfile.TemporaryDirectory() as folder:
    save_model(Path(folder) / "model", model)
    again = load_model(Path(folder) / "model")
print(again.text, f"test accuracy {evaluate(again, data.test):.3f}", again(data.test.images[:3]).argmax(1))
