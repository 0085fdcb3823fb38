"""StableHLO: the model's logits, in a process that knows JAX alone."""

import os
import subprocess
import sys

import jax
import numpy as np

from embedded_models import every_kind, images, model_of
from spikernel_jax.embedded import stablehlo

READER = """
import sys
import jax, numpy as np
exported = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
np.save(sys.argv[3], exported.call(np.load(sys.argv[2])))
assert not [name for name in sys.modules if name.startswith("spikernel")]
"""


@every_kind
def test_logits_are_the_models(name):
    model = model_of(name)
    exported = jax.export.deserialize(bytearray(stablehlo.export(model)))
    assert set(exported.platforms) == {"cpu", "cuda", "tpu"}
    for count in (1, 7):
        np.testing.assert_array_equal(exported.call(images(count)), model(images(count)))


def test_it_is_read_without_the_package(tmp_path):
    model = model_of("sizes")
    (tmp_path / "model").write_bytes(stablehlo.export(model))
    np.save(tmp_path / "images.npy", images(5))
    names = [str(tmp_path / name) for name in ("model", "images.npy", "logits.npy")]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONSAFEPATH": "1"}
    subprocess.run([sys.executable, "-c", READER, *names], check=True, env=environment, timeout=200)
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), model(images(5)))
