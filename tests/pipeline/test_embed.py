"""Who decides whether a model trained for few bits is exported: validation images, and no others."""

import dataclasses
import types
from typing import Any

import numpy as np
import pytest

from embedded_models import images, model_of
from spikernel_jax.data import Split
from spikernel_jax.embedded import integer
from spikernel_jax.embedded.calibration import calibrated
from spikernel_jax.pipeline import embed, fitting

MODEL, OTHER = model_of("sizes"), model_of("sizes", seed=1)
IMAGES = images(60)


@pytest.mark.parametrize("better", [True, False])
def test_validation_decides(better, monkeypatch, tmp_path):
    model = dataclasses.replace(MODEL, metrics={"config": {}, "seed": 0})
    programs = [calibrated(own, IMAGES, 2) for own in (MODEL, OTHER)]
    classes = [integer.run(own, IMAGES).logits_BK.argmax(1) for own in programs]
    assert (classes[0] != classes[1]).any()
    labels = classes[1] if better else classes[0]  # all right of one, some wrong of the other
    used = []

    def train(spec, genotype, data, config, *, start, **_):
        used.append((config.weight_bits, config.epochs, start is model))
        return OTHER

    monkeypatch.setattr(fitting, "train", train)
    # There are no test images to look at.
    data = types.SimpleNamespace(train=Split(IMAGES, 0 * labels), validation=Split(IMAGES, labels))
    run = types.SimpleNamespace(folder=lambda name: tmp_path)
    job: Any = types.SimpleNamespace(data=data, run=run, say=print)
    settings = embed.Settings((2,), 8, 3, 0, "gcc")
    found, alone = embed._fitted(job, "k", model, programs[0], settings, exact=1.1)
    assert used == [(2, 3, True)]
    assert (found.model is OTHER) == better
    assert alone == pytest.approx(np.mean(labels == classes[0]))
    assert np.mean(found.found.logits_BK.argmax(1) == labels) == 1
    nothing, _ = embed._fitted(job, "k", model, programs[0], settings, exact=alone)
    assert nothing.model is model
    assert len(used) == 1  # nothing lost, nothing trained
