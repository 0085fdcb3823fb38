"""Scores ten cells without training, and prints them best first."""

import jax

from spikernel_jax import CellSpace, NetworkSpec, load_dataset, make_bank, score_population
from spikernel_jax.data import normalise
from spikernel_jax.io import machine

machine.set_up()
data = load_dataset("mnist5k")
space = CellSpace(kernel_sizes=(3, 5))
spec = NetworkSpec(data.image_shape, data.num_classes, space, channels=8, time_steps=2, stem_stride=2)
cells = space.sample(jax.random.key(0), 10)
bank = make_bank(jax.random.key(1), spec, seeds=2)  # two draws of weights, each with images of its own
images = normalise(data.train.images[:32], data.mean, data.std).reshape(2, 16, *data.image_shape)
found = score_population(cells, bank, images, spec)
for i in (-found.scores).argsort():
    print(f"{found.scores[i]:8.2f} ± {found.standard_errors[i]:.2f}  {space.explicit(cells[i])}")
