"""The necessary work of ranking forward cells, in closed form: what no way of computing the scores can avoid.

One replicate: one bank of weights, one batch of B images, T time steps. Whatever candidates have in common in
cell 1 is computed once:

    stem              once
    cell 1, node 0    LIF and Gram once
    cell 1, node 1    LIF and Gram once for each distinct operation on (0,1), where a convolution reads them
    cell 1, node 2    sum, LIF and Gram once for each distinct value: operations on (0,1), (0,2) and (1,2), or on
                      (0,2) alone where (1,2) is zero
    cell 1, edges     each operation with weights (edge, operation, value of its source node) once; one without, as
                      average pooling, of a value once
    each candidate    sum into node 3; norm, LIF, Gram, convolution, norm and pooling of the transition; cell 2;
                      norm, LIF and Gram of the last layer, and the head as far as its LIF

Cell 2 has an input of its own in each candidate: only within a candidate is anything computed once, a node's LIF and
its average pooling, however many edges leave the node. A node that operations read through different neurons has a LIF
for each. Node 0 of cell 1 is constant over time: skips and average
pooling of it, and sums and norms of nothing else, cost one step. Edges of dead nodes cost nothing, nor do equal
candidates after the first. Beyond that no two values are taken for the same: a node that a lone skip feeds counts as
a node of its own.

Conventions, a multiply-add being 2 FLOPs:

    convolution       2 for each weight and pixel, so 2 k² C_in C_out, borders counted in full
    Gram              2 N for each of the B (B + 1) / 2 pairs of images, for each LIF site and time step
    LIF               5 a neuron and time step: leak (3), threshold, reset
    batch norm        6 a value: mean (1), variance (3), scale and shift (2)
    node sums         1 a value for each input after the first
    pooling           of edges as operations declare it (`flops`), average pooling 5 a value: 3×3 in two passes (4),
                      division; 2×2 of the transition: 4 a value that comes out; p×p of the snasnet head: p² a value
                      that comes out
    bytes             each layer's input is read once and its output written once, 4 bytes a value, and each weight
                      that any candidate uses is read once. Layers are: a convolution with its norm (and, in the
                      transition, its pooling), a LIF with the norm before it, a Gram matrix (which reads spikes), an
                      average pooling, a node's sum of at least two inputs.

Not counted: rho from a Gram matrix and the log-determinant (of the order of B² and B³, where a layer's are B² N),
Gram matrices as output, the head behind its last LIF (no score reads it).
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spikernel_jax.cells.canonical import NOTHING
from spikernel_jax.snn import cost
from spikernel_jax.snn.spec import NetworkSpec

LIF_FLOPS = 5  # a neuron and time step
NORM_FLOPS = 6  # a value
_VALUE_BYTES = 4

Codes = NDArray[np.int64]


class Work(NamedTuple):
    """Necessary work of one replicate: FLOPs by part, and bytes."""

    stem: int  # its convolution
    convolution: int  # of both cells and the transition, and the snasnet head's first linear layer
    gram: int
    lif: int
    norm: int
    sums: int  # of what comes into nodes
    pooling: int
    bytes: int

    @property
    def flops(self) -> int:
        """All FLOPs."""
        return self.stem + self.convolution + self.gram + self.lif + self.norm + self.sums + self.pooling


def necessary_work(spec: NetworkSpec, genotypes: ArrayLike, batch: int) -> Work:
    """Work of ranking genotypes in one replicate.

    Args:
      spec: the network; forward cells only.
      genotypes: codes [n, E], or [n, 2, E] for two cells of their own.
      batch: images B.

    Returns:
      The work; zeros for n = 0.

    Raises:
      ValueError: on feedback cells, a wrong shape or batch, or rows that are no cells of the space.
    """
    if spec.space.feedback:
        raise ValueError("feedback=True: the necessary work of feedback cells is not known in closed form")
    if not (isinstance(batch, int | np.integer) and batch >= 1):
        raise ValueError(f"batch={batch!r} must be a whole number of at least 1")
    pairs = cost.pairs(cost.checked_genotypes(spec, genotypes))
    if not len(pairs):
        return Work(*[0] * len(Work._fields))
    alive = spec.space.prune(pairs.reshape(-1, pairs.shape[-1])).reshape(pairs.shape).astype(np.int64)
    pairs = np.unique(alive, axis=0)
    tally = _Tally(spec, int(batch))
    tally.stem()
    first = _cell1(tally, pairs[:, 0])
    tally.between(len(pairs), first)
    _cell2(tally, pairs[:, 1])
    tally.after(len(pairs))
    tally.weights(pairs)
    return tally.work()


class _Tally:
    """Adds up work; `steps` are time steps, summed over all times a layer is computed."""

    def __init__(self, spec: NetworkSpec, batch: int):
        self.spec, self.batch, self.time = spec, batch, spec.time_steps
        self.parts = dict.fromkeys(Work._fields, 0)
        self.pixels = [h * w for h, w in map(spec.cell_size, range(2))]
        self.values = [pixels * spec.cell_channels(cell) for cell, pixels in enumerate(self.pixels)]
        operations = [spec.space.operation(code) for code in range(spec.space.num_ops)]
        layers = [list(operation.layers(spec.channels).values()) for operation in operations]
        # By code: weights in each cell, layers, their norms; and what it computes beside them.
        self.weights_of = [np.array([o.weights(spec.cell_channels(cell)) for o in operations]) for cell in range(2)]
        self.layers_of = np.array([len(own) for own in layers])
        self.norms_of = np.array([sum(layer.norm for layer in own) for own in layers])
        self.flops_of = np.array([operation.flops for operation in operations])
        self.pooling: list[int] = np.flatnonzero((self.layers_of == 0) & (self.flops_of > 0)).tolist()
        self.readers = [np.array(reader.codes) for reader in spec.readers]
        self.reads = np.any([*self.readers, np.zeros(len(operations), bool)], axis=0)

    def add(self, part: str, flops: int, moved: int = 0) -> None:
        """FLOPs and values moved, both for one image."""
        self.parts[part] += int(flops) * self.batch
        self.parts["bytes"] += int(moved) * self.batch * _VALUE_BYTES

    def convs(self, cell: int, codes: Codes) -> None:
        """Layers of a cell, all T steps each, with their norms; operations without weights count nothing."""
        values, pixels = self.values[cell], self.pixels[cell]
        moved = 2 * values * self.time * int(self.layers_of[codes].sum())
        self.add("convolution", 2 * pixels * self.time * int(self.weights_of[cell][codes].sum()), moved)
        self.add("norm", NORM_FLOPS * values * self.time * int(self.norms_of[codes].sum()))

    def fires(self, neurons: int, times: int, *, read: int | None = None) -> None:
        """LIF layers, T steps each, with their Gram matrices; `read` are the values they read, all together."""
        steps = times * self.time
        self.add("lif", LIF_FLOPS * neurons * steps, neurons * steps + (neurons * steps if read is None else read))
        # (B + 1) / 2 pairs an image, so doubled FLOPs are whole.
        self.add("gram", neurons * steps * (self.batch + 1), neurons * steps)

    def pools(self, cell: int, code: int, steps: int) -> None:
        """An operation of edges without weights."""
        self.add("pooling", int(self.flops_of[code]) * self.values[cell] * steps, 2 * self.values[cell] * steps)

    def sums(self, cell: int, there: NDArray[Any], varies: NDArray[Any]) -> int:
        """Sums of inputs [inputs, n], those that do not vary over time added up first; time steps that come out."""
        there, varies = there > 0, varies > 0
        fixed, varying = (there & ~varies).sum(0), (there & varies).sum(0)
        steps = np.where(varying > 0, self.time, 1)
        additions = np.maximum(fixed - 1, 0) + self.time * np.where(varying > 0, varying - (fixed == 0), 0)
        moved = np.where(fixed + varying > 1, fixed + self.time * varying + steps, 0)
        self.add("sums", self.values[cell] * int(additions.sum()), self.values[cell] * int(moved.sum()))
        return int(steps.sum())

    def stem(self) -> None:
        """The stem with its norm, one step."""
        h, w, channels = self.spec.image_shape
        self.add("stem", 2 * 9 * channels * self.values[0], h * w * channels + self.values[0])
        self.add("norm", NORM_FLOPS * self.values[0])

    def between(self, candidates: int, steps: int) -> None:
        """The transition; `steps` are those of its input, all candidates together."""
        (values, pooled), times = self.values, candidates * self.time
        channels = self.spec.channels
        self.add("norm", NORM_FLOPS * values * steps)
        self.fires(values, candidates, read=values * steps)
        self.add("convolution", 2 * 9 * channels * 2 * values * times, (values + pooled) * times)
        self.add("norm", NORM_FLOPS * 2 * values * times)
        self.add("pooling", 4 * pooled * times)

    def after(self, candidates: int) -> None:
        """Last layer and head."""
        spec, values, times = self.spec, self.values[1], candidates * self.time
        self.add("norm", NORM_FLOPS * values * times)
        self.fires(values, candidates)
        if spec.head == "snasnet":
            area = spec.head_pool**2
            self.add("pooling", area * spec.features * times, (values + spec.features) * times if area > 1 else 0)
            linear = 2 * spec.features * spec.head_hidden
            self.add("convolution", linear * times, (spec.features + spec.head_hidden) * times)
            self.fires(spec.head_hidden, candidates)

    def weights(self, pairs: Codes) -> None:
        """Bytes of all weights in use, read once."""
        layers = self.spec.fixed_layers()
        sizes = [layer.weights for name, layer in layers.items() if name != "head.out"]
        affine = sum(2 * layer.channels for layer in layers.values() if layer.norm)
        for cell in range(2):
            channels = self.spec.cell_channels(cell)
            for edge in range(pairs.shape[2]):
                used = np.unique(pairs[:, cell, edge])
                sizes.append(int(self.weights_of[cell][used].sum()))
                affine += 2 * channels * int(self.norms_of[used].sum())
        self.parts["bytes"] += _VALUE_BYTES * (sum(sizes) + affine)

    def work(self) -> Work:
        """What was added up."""
        return Work(**self.parts)


def _distinct(*columns: NDArray[np.generic]) -> NDArray[np.int64]:
    """Distinct rows of columns [n], as columns again."""
    return np.unique(np.stack([column.astype(np.int64) for column in columns]), axis=1)


def _values(tally: _Tally, who: NDArray[np.bool_], name: list[Codes], varies: NDArray[np.bool_]) -> tuple[int, int]:
    """Distinct values that a node has in these candidates, and their time steps, all together."""
    varying = _distinct(*(column[who] for column in name), varies[who])[-1]
    return len(varying), int(np.where(varying, tally.time, 1).sum())


def _cell1(tally: _Tally, rows: Codes) -> int:
    """Adds cell 1 of all candidates; returns the time steps of node 3, summed over candidates."""
    reads = tally.reads
    e01, e02, e12, e03, e13, e23 = rows.T
    # Whether what an edge gives changes over time: node 0 does not, nor does what is made of it without spikes.
    vary01, vary02, vary03 = reads[e01], reads[e02], reads[e03]
    vary12 = reads[e12] | ((e12 != NOTHING) & vary01)
    vary2 = vary02 | vary12
    vary13 = reads[e13] | ((e13 != NOTHING) & vary01)
    vary23 = reads[e23] | ((e23 != NOTHING) & vary2)
    nodes = [  # what names the node's value, whether it varies, the edges that read it
        ([np.zeros_like(e01)], np.zeros_like(vary01), [e01, e02, e03]),
        ([e01], vary01, [e12, e13]),
        ([np.where(e12 == NOTHING, NOTHING, e01), e02, e12], vary2, [e23]),
    ]
    for name, varies, readers in nodes:
        for op in readers:
            tally.convs(0, _distinct(*name, op)[-1])
        for reader in tally.readers:
            count, steps = _values(tally, np.any([reader[op] for op in readers], axis=0), name, varies)
            tally.fires(tally.values[0], count, read=tally.values[0] * steps)
        for code in tally.pooling:
            count, steps = _values(tally, np.any([op == code for op in readers], axis=0), name, varies)
            tally.pools(0, code, count * tally.time if reads[code] else steps)
    columns = _distinct(*nodes[2][0], e02 != NOTHING, e12 != NOTHING, vary02, vary12)
    tally.sums(0, columns[3:5], columns[5:])
    return tally.sums(0, np.stack([e03 != NOTHING, e13 != NOTHING, e23 != NOTHING]), np.stack([vary03, vary13, vary23]))


def _cell2(tally: _Tally, rows: Codes) -> None:
    """Adds cell 2 of all candidates; everything in it varies over time."""
    e01, e02, e12, e03, e13, e23 = rows.T
    for readers in ([e01, e02, e03], [e12, e13], [e23]):
        for op in readers:
            tally.convs(1, op)
        for reader in tally.readers:
            tally.fires(tally.values[1], int(np.any([reader[op] for op in readers], axis=0).sum()))
        for code in tally.pooling:
            tally.pools(1, code, tally.time * int(np.any([op == code for op in readers], axis=0).sum()))
    for inputs in ([e02, e12], [e03, e13, e23]):
        there = np.stack(inputs) != NOTHING
        tally.sums(1, there, there)
