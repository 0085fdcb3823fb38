"""Independent draws for each candidate, the reference's way."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from spikernel_jax import score_independently
from spikernel_jax.cells.space import CellSpace
from spikernel_jax.scoring import independent
from spikernel_jax.snn.neurons import NeuronSpec
from spikernel_jax.snn.spec import NetworkSpec

KEY = jax.random.key(3)
SPEC = NetworkSpec((8, 8, 1), 4, CellSpace((1, 3)), channels=2, time_steps=2)
# One kernel size, so that fewer branches have to be compiled.
NARROW = NetworkSpec((8, 8, 1), 4, CellSpace((3,)), channels=2, time_steps=2)
POOL = np.random.default_rng(0).integers(256, size=(12, 8, 8, 1), dtype=np.uint8)
GOOD_ROW = [[0, 0, 0, 1, 0, 0]]


def independently(rows: Any, key: jax.Array = KEY, **options: Any) -> Any:
    settings: dict[str, Any] = {"mean": (0.4,), "std": (0.3,), "batch": 4, "padding": 1, "flip": True, "chunk": 3}
    settings = {"spec": NARROW} | settings | options
    return score_independently(rows, key, POOL, **settings)


def test_independent_draws():
    cells = np.array([[0, 0, 0, 1, 0, 0], [0, 0, 0, 2, 0, 0], [2, 0, 0, 1, 2, 0]], np.int8)
    first = independently(cells)
    again = independently(cells[[2, 0]])
    assert (again.replicates == first.replicates[[2, 0]]).all()  # reproducible, whoever else runs
    doubled = independently(cells[[1, 1, 1]])
    assert (doubled.replicates == first.replicates[1]).all()
    other = independently(cells, jax.random.key(4))
    assert (other.replicates != first.replicates).all()
    assert (first.replicates[:, 0] != first.replicates[:, 1]).all()
    assert (first.lif_calls == 2 * np.array([2, 4, 6])).all()
    learning = dataclasses.replace(NARROW, neuron=NeuronSpec(learn_tau=True, learn_threshold=True))
    assert (independently(cells, spec=learning).replicates == first.replicates).all()
    with pytest.raises(ValueError, match="shortcut='spike'"):
        independently(cells, spec=dataclasses.replace(NARROW, shortcut="spike"))


def test_independent_draws_score_one_network_on_several_batches(monkeypatch):
    """Weights and dropout mask are a candidate's own, alike in its replicates; each batch is another."""
    spec = NetworkSpec((8, 8, 1), 4, CellSpace((3,)), channels=2, time_steps=2, head="snasnet", head_hidden=8,
                       neurons_per_class=2, dropout=0.5, neuron=NeuronSpec(v_threshold=0.01))  # fmt: skip
    seen = []  # no other test has this spec, so the program is traced here, with the spy in it

    def spied(spec: Any, score: Any, genotype: Any, bank: Any, images: Any, keep: Any) -> Any:
        jax.debug.callback(lambda *drawn: seen.append(jax.tree.map(np.asarray, drawn)), bank, images, keep)
        return real(spec, score, genotype, bank, images, keep)

    real = independent._score
    monkeypatch.setattr(independent, "_score", spied)
    cells = np.array([[0, 0, 0, 2, 0, 0], [0, 0, 0, 1, 0, 0]], np.int8)
    got = score_independently(cells, KEY, POOL, spec, mean=(0.4,), std=(0.3,), batch=4, seeds=3, padding=1)
    jax.effects_barrier()
    assert np.isfinite(got.replicates).all()
    assert len(seen) == 6

    def alike(draws: list[Any]) -> list[int]:
        """How many of the six passes hold each pass's draw."""
        drawn = [draw.tobytes() for draw in draws]
        return [drawn.count(value) for value in drawn]

    assert alike([bank["cell1.e03.conv3"]["kernel"] for bank, _, _ in seen]) == [3] * 6
    assert alike([bank["head.hidden"]["kernel"] for bank, _, _ in seen]) == [3] * 6
    assert alike([keep for _, _, keep in seen]) == [3] * 6
    assert alike([images for _, images, _ in seen]) == [1] * 6


@pytest.mark.parametrize("kind", [list, np.array])
def test_independent_draws_take_any_sequence_of_means(kind):
    got = independently(GOOD_ROW, mean=kind([0.4]), std=kind([0.3]))
    assert (got.replicates == independently(GOOD_ROW).replicates).all()


def test_luck_tells_equal_cells_apart():
    conv3 = NARROW.space.code("conv3")
    equal = np.array([[0, 0, 0, conv3, 0, 0], [1, 0, 0, conv3, 0, 0]], np.int8)  # node 1 leads nowhere
    assert np.ptp(independently(equal).scores) > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"score": "zen"}, "score='zen' is unknown"),
        ({"batch": 13}, "batch=13 must be between 1 and the 12 images"),
        ({"batch": 0}, "batch=0"),
        ({"seeds": 0}, "seeds=0"),
        ({"rows": [GOOD_ROW * 2]}, r"want \[n, E\]"),
        ({"rows": [[0, 0, 0, 0, 0, 1]]}, "edge 0>3"),
        ({"pool": POOL[:, :7]}, "shape"),
        ({"pool": np.full(POOL.shape, np.nan, np.float32)}, "NaN"),
    ],
)
def test_independent_draws_refuse_bad_input(change, words):
    options: dict[str, Any] = {"batch": 4} | change
    rows, pool = options.pop("rows", GOOD_ROW), options.pop("pool", POOL)
    with pytest.raises(ValueError, match=words) as error:
        score_independently(rows, KEY, pool, SPEC, mean=(0.4,), std=(0.3,), **options)
    assert "\n" not in str(error.value)
