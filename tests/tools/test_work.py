"""Closed form of the necessary work against a walk over all candidates that remembers what is computed already."""

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from spikernel_jax.cells.space import CellSpace
from spikernel_jax.snn.spec import NetworkSpec
from work import Work, necessary_work

SPACE = CellSpace((1, 3))


def make_spec(space: CellSpace = SPACE, head: str = "gap", **fields: Any) -> NetworkSpec:
    settings: dict[str, Any] = {"channels": 2, "time_steps": 3, "head_hidden": 5} | fields
    return NetworkSpec((7, 6, 3), 4, space, head=head, **settings)


# Operation -> width -> the LIF that it reads, weights of its layers (the last with a norm), FLOPs a value beside them.
MEANING: dict[str, Callable[[int], tuple[str | None, list[int], int]]] = {
    "skip": lambda c: (None, [], 0),
    "avgpool": lambda c: (None, [], 5),
    "avgpool5": lambda c: (None, [], 9),
    "maxpool3": lambda c: ("own", [], 4),
    "dwconv3@0.5": lambda c: ("0.5", [9 * c, c * c], 0),
    "conv3@0.5": lambda c: ("0.5", [9 * c * c], 0),
    "conv1x5d2": lambda c: ("own", [5 * c * c], 0),
    **{f"conv{k}": lambda c, k=k: ("own", [k * k * c * c], 0) for k in (1, 3, 5, 7)},
}
VARIED = CellSpace(operations=("zero", *MEANING))


class Walk:
    """Every layer of every candidate in turn; what has a name is computed for the first who asks."""

    def __init__(self, spec: NetworkSpec, batch: int):
        self.spec, self.batch, self.done, self.tally = spec, batch, set(), Counter()
        self.kernels: dict[Any, int] = {}  # values of each weight tensor in use

    def once(self, *name: Any) -> bool:
        fresh = name not in self.done
        self.done.add(name)
        return fresh

    def moved(self, values: int) -> None:
        self.tally["bytes"] += 4 * values

    def fire(self, neurons: int, steps_in: int, norm: bool = False) -> None:
        batch, time = self.batch, self.spec.time_steps
        self.tally["norm"] += norm * 6 * neurons * batch * steps_in
        self.tally["lif"] += 5 * neurons * batch * time
        self.moved(neurons * batch * (steps_in + time))
        for _ in itertools.combinations_with_replacement(range(batch), 2):
            self.tally["gram"] += 2 * neurons * time
        self.moved(neurons * batch * time)

    def convolve(self, part: str, shape: tuple[int, int, int, int, int], steps: int, out: int | None = None) -> None:
        h, w, k, c_in, c_out = shape
        images = self.batch * steps
        self.tally[part] += 2 * k * k * c_in * c_out * h * w * images
        self.tally["norm"] += 6 * h * w * c_out * images
        self.moved((h * w * c_in + (h * w * c_out if out is None else out)) * images)

    def cell(self, index: int, row: list[int], owner: Any, steps0: int) -> int:
        """`owner` is what node 0's value is called; returns the time steps of node 3."""
        spec = self.spec
        (h, w), c, time = spec.cell_size(index), spec.cell_channels(index), spec.time_steps
        values: dict[int, tuple[Any, int]] = {0: ((index, owner), steps0)}  # name, time steps
        codes = dict(zip(spec.space.edges, row, strict=True))
        for node in (1, 2, 3):
            terms, inputs = [], []
            for source in range(node):
                code = codes[source, node]
                if code == 0:
                    continue
                name, steps = values[source]
                lif, layers, pool = MEANING[spec.space.operations[code]](c)
                if lif is not None and self.once("lif", name, lif):
                    self.fire(h * w * c, steps)
                steps = steps if lif is None else time
                if layers and self.once("layers", name, source, node, code):
                    for weights in layers:
                        self.tally["convolution"] += 2 * weights * h * w * self.batch * time
                        self.moved(2 * h * w * c * self.batch * time)
                    self.tally["norm"] += 6 * h * w * c * self.batch * time
                if layers:
                    self.kernels[index, source, node, code] = sum(layers) + 2 * c
                if pool and self.once("pool", name, code):
                    self.tally["pooling"] += pool * h * w * c * self.batch * steps
                    self.moved(2 * h * w * c * self.batch * steps)
                terms.append((source, node, code, name))
                inputs.append(steps)
            name = (tuple(terms), owner if node == 3 else None)  # the sum into node 3 is each candidate's own
            steps = max(inputs, default=1)
            if len(terms) > 1 and (node == 3 or self.once("sum", name)):
                fixed, varying = [s for s in inputs if s == 1], [s for s in inputs if s > 1]
                images = h * w * c * self.batch
                for _ in fixed[1:]:
                    self.tally["sums"] += images
                for _ in [*fixed[:1], *varying][1:] if varying else []:
                    self.tally["sums"] += images * time
                self.moved((sum(inputs) + steps) * images)
            values[node] = (name, steps)
        return values[3][1]

    def stem(self) -> None:
        (h, w), c = self.spec.cell_size(0), self.spec.channels
        height, width, c_in = self.spec.image_shape
        self.tally["stem"] += 2 * 9 * c_in * c * h * w * self.batch
        self.tally["norm"] += 6 * h * w * c * self.batch
        self.moved((height * width * c_in + h * w * c) * self.batch)
        self.kernels["stem"] = 9 * c_in * c + 2 * c

    def candidate(self, pair: np.ndarray) -> None:
        spec = self.spec
        (h, w), (h2, w2), c, time = spec.cell_size(0), spec.cell_size(1), spec.channels, spec.time_steps
        steps = self.cell(0, pair[0].tolist(), "stem", 1)
        self.fire(h * w * c, steps, norm=True)
        self.convolve("convolution", (h, w, 3, c, 2 * c), time, h2 * w2 * 2 * c)
        self.tally["pooling"] += 4 * h2 * w2 * 2 * c * self.batch * time
        self.cell(1, pair[1].tolist(), tuple(pair.ravel().tolist()), time)
        self.fire(h2 * w2 * 2 * c, time, norm=True)
        self.kernels |= {"transition": 9 * c * 2 * c + 4 * c, "transition.in": 2 * c, "last": 4 * c}
        if spec.head == "snasnet":
            p, images = spec.head_pool, self.batch * time
            pooled = (h2 // p) * (w2 // p) * 2 * c
            if p > 1:
                self.moved((h2 * w2 * 2 * c + pooled) * images)
            self.tally["pooling"] += p * p * pooled * images
            self.tally["convolution"] += 2 * pooled * spec.head_hidden * images
            self.moved((pooled + spec.head_hidden) * images)
            self.fire(spec.head_hidden, time)
            self.kernels["hidden"] = pooled * spec.head_hidden

    def work(self, pairs: np.ndarray) -> Work:
        self.stem()
        for pair in pairs:
            if self.once("candidate", *pair.ravel().tolist()):
                self.candidate(pair)
        self.moved(sum(self.kernels.values()))
        return Work(**{name: self.tally[name] for name in Work._fields})


def drawn(space: CellSpace, n: int, seed: int) -> np.ndarray:
    if space is VARIED:  # too many to list
        return space.sample(jax.random.key(seed), n)
    cells = space.enumerate()
    return cells[np.random.default_rng(seed).choice(len(cells), n)]


@pytest.mark.parametrize(
    ("spec", "batch"),
    [
        (make_spec(), 3),
        (make_spec(head="snasnet"), 2),
        (make_spec(head="snasnet", head_pool=1, stem_stride=2), 1),
        (make_spec(CellSpace((1, 3, 5, 7), max_kernel_sizes=2), channels=3), 4),
        pytest.param(make_spec(VARIED), 2, marks=pytest.mark.slow),
    ],
)
def test_equals_a_walk_over_all_candidates(spec, batch):
    for n in (1, 2, 300):
        singles, others = drawn(spec.space, n, n), drawn(spec.space, n, n + 1)
        twins = np.stack([singles, singles], 1)
        assert necessary_work(spec, singles, batch) == Walk(spec, batch).work(twins)
        mixed = np.stack([singles, others], 1)
        assert necessary_work(spec, mixed, batch) == Walk(spec, batch).work(mixed)


def test_a_whole_space_equals_its_walk():
    cells = CellSpace((3,)).enumerate()
    spec = make_spec(CellSpace((3,)))
    assert necessary_work(spec, cells, 2) == Walk(spec, 2).work(np.stack([cells, cells], 1))


def test_single_cells_by_hand():
    spec = NetworkSpec((4, 4, 1), 2, SPACE, channels=2, time_steps=3)  # 32 values in cell 1, 16 in cell 2
    skip = Work(
        stem=2 * 9 * 32 * 2,
        convolution=2 * 9 * 2 * 64 * 6,  # the transition: 64 values out of 2 channels, 2 images of 3 steps
        gram=3 * 2 * (32 + 16) * 3,  # 3 pairs of images
        lif=5 * (32 + 16) * 6,
        norm=6 * (32 * 2 + 32 * 2 + 64 * 6 + 16 * 6),  # stem and transition's input are constant: one step
        sums=0,
        pooling=4 * 16 * 6,
        bytes=4 * ((16 + 32) * 2 + (32 * 2 + 3 * 32 * 6) + 16 * 6 + 3 * 16 * 6)
        + 4 * (18 + 4 + 4 + 72 + 8 + 8),  # layers, then weights and norms
    )
    assert necessary_work(spec, [SPACE.parse("0>3:skip")], 2) == skip
    assert skip.flops == 1152 + 13824 + 864 + 1440 + 3648 + 384

    # A convolution in each cell: its LIF, its Gram, itself, its norm; the transition's input now varies.
    conv = necessary_work(spec, [SPACE.parse("0>3:conv3")], 2)
    assert conv.convolution - skip.convolution == 2 * 9 * (2 * 32 + 4 * 16) * 6
    assert conv.lif - skip.lif == 5 * (32 + 16) * 6
    assert conv.gram == 2 * skip.gram
    assert conv.norm - skip.norm == 6 * (32 + 16) * 6 + 6 * 32 * 4
    assert (conv.sums, conv.pooling, conv.stem) == (skip.sums, skip.pooling, skip.stem)
    # The LIF reads a constant in cell 1; then spikes out, into Gram, into the convolution, and its output.
    extra = 32 * 2 + 4 * 32 * 6 + 5 * 16 * 6 + 32 * 4
    assert conv.bytes - skip.bytes == 4 * (extra + 9 * 4 + 4 + 9 * 16 + 8)


def test_what_is_shared_counts_once():
    spec = make_spec()
    parse = SPACE.parse
    one, two = parse("0>1:conv3 1>3:conv3 0>3:skip"), parse("0>1:conv3 1>3:conv1 0>3:skip")
    both, alone = necessary_work(spec, [one, two], 2), [necessary_work(spec, [row], 2) for row in (one, two)]
    images = 2 * spec.time_steps
    saved = sum(work.convolution for work in alone) - both.convolution
    assert saved == 2 * 9 * 2 * (7 * 6 * 2) * images  # conv3 on (0,1) of cell 1
    assert sum(work.lif for work in alone) - both.lif == 2 * 5 * (7 * 6 * 2) * images  # nodes 0 and 1
    assert both.stem == alone[0].stem
    assert necessary_work(spec, [one, two, one], 2) == both
    dead = parse("0>1:conv3 0>2:conv3 1>3:conv3 0>3:skip")  # node 2 leads nowhere
    assert necessary_work(spec, [dead], 2) == alone[0]


def test_no_candidates_no_work():
    assert necessary_work(make_spec(), np.zeros((0, 6), np.int8), 4) == Work(*[0] * 8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch": 0}, "batch=0 must be a whole number of at least 1"),
        ({"batch": 2.5}, "batch=2.5 must"),
        ({"genotypes": [[1, 1, 1]]}, "genotypes have shape"),
        ({"genotypes": [[0, 0, 0, 0, 0, 1]]}, "edge 0>3"),
        ({"spec": make_spec(CellSpace(feedback=True))}, "feedback=True"),
    ],
)
def test_refuses_bad_input(change, words):
    arguments: dict[str, Any] = {"spec": make_spec(), "genotypes": [[0, 0, 0, 1, 0, 0]], "batch": 2} | change
    with pytest.raises(ValueError, match=words):
        necessary_work(**arguments)
