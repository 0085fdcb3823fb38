"""The spiking network: one definition for a fixed genotype (training) and a traced one (scoring).

With a fixed genotype, Python picks each edge's operation while tracing and only that genotype's
weights exist. With a traced genotype, ``lax.switch`` picks it at run time, from a bank that holds
the weights of every operation. A mixture (a supernet: [E, num_ops] weights) sums the operations of an
edge by its weights. Nothing else differs.

Sources: Kim et al., ECCV 2022 (SNASNet), sections 3 and 4, and its public code; Fang et al., ICCV 2021, for
what LIF layers learn, and NeurIPS 2021, for shortcuts of spikes.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spikernel_jax.operations import convolution
from spikernel_jax.operations.operation import Operation
from spikernel_jax.snn import choosing, layers, neurons
from spikernel_jax.snn.choosing import Stats
from spikernel_jax.snn.spec import CELLS, NetworkSpec, Reader, edge_prefix, layer_name

Array = jax.Array
# Layer name -> {"kernel", "scale", "bias"}, those that it has; LIF site -> what it learns. One name can be both.
Params = dict[str, dict[str, Array]]
State = dict[str, Any]  # LIF site -> membrane potential; "<cell>.feedback" -> (f0, f1, f2)
Fired = Callable[[Array, Array], tuple[Array, Array, Any]]  # (v, x) -> v after, spikes, record of a LIF layer
Observe = Callable[[Array], Any]  # spikes [T, B, ...] of one LIF layer -> pytree, leading axis T


class Output(NamedTuple):
    """What a forward pass gives back."""

    logits_TBK: Array  # of every time step
    stats: Stats | None  # running statistics after the pass
    state: State  # membrane potentials and feedback after the last time step
    records: dict[str, Any]  # LIF site -> what `observe` made of its spikes, leading axis T

    @property
    def logits_BK(self) -> Array:
        """Mean logits over time."""
        return self.logits_TBK.mean(0)


def init(key: Array, spec: NetworkSpec, genotype: Any = None) -> tuple[Params, Stats]:
    """Parameters and running statistics at the start, float32.

    Every array's key is folded in by its layer's name, so the weights of a fixed genotype are those
    that the whole bank (``genotype=None``) has in the same places.

    Args:
      key: a typed PRNG key.
      spec: the network.
      genotype: fixed, [E] or [2, E]; None makes the bank of every operation on every edge.

    Returns:
      Parameters and statistics by layer name.
    """
    params: Params = {}
    stats: Stats = {}
    for name, layer in spec.layers(genotype).items():
        layer_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        entry: dict[str, Array] = {}
        if name.startswith("head."):
            # SNASNet's N(0, 0.01²) would leave the gradient of a head without hidden neurons too small.
            deviation = 0.01 if spec.head == "snasnet" else layer.shape[0] ** -0.5
            entry["kernel"] = layers.init_linear(layer_key, layer.shape, deviation)
        elif layer.shape:
            entry["kernel"] = layers.init_conv(layer_key, layer.shape)
        if layer.norm:
            entry |= layers.init_affine(layer.channels)
            stats[name] = layers.init_running(layer.channels)
        elif layer.bias:
            entry["bias"] = jnp.zeros(layer.channels)
        params[name] = entry
    if learned := spec.neuron.learned:
        for site in spec.sites(genotype):
            params[site] = params.get(site, {}) | {name: jnp.float32(start) for name, start in learned.items()}
    return params, stats


def subnetwork(spec: NetworkSpec, bank: dict[str, Any], genotype: Any) -> dict[str, Any]:
    """The part of a bank (parameters or statistics) that a fixed genotype uses."""
    names = spec.layers(genotype).keys() | spec.sites(genotype).keys()
    return {name: entry for name, entry in bank.items() if name in names}


def in_bank(own: dict[str, Any], bank: dict[str, Any]) -> dict[str, Any]:
    """A genotype's part (parameters or statistics) in the bank's places, zeros elsewhere; inverse of `subnetwork`."""
    return {
        layer: {name: own.get(layer, {}).get(name, jnp.zeros(leaf.shape, leaf.dtype)) for name, leaf in entry.items()}
        for layer, entry in bank.items()
    }


def dropout_mask(key: Array, spec: NetworkSpec, batch: int) -> Array | None:
    """Which head inputs are kept, bool [B, features]; None where the network has no dropout."""
    if spec.dropout == 0:
        return None
    return jax.random.bernoulli(key, 1 - spec.dropout, (batch, spec.features))


Spikes = Mapping[Reader, Array]  # of one node, through each LIF that operations read it through


class _Edge(NamedTuple):
    """What an operation finds on the edge that it works on: `operations.operation.Edge`."""

    net: "Pass"
    cell: str
    edge: tuple[int, int]
    operation: str
    stats: Stats  # running ones of the operation's layers, gathered as they are normed

    def weights(self, part: str = "") -> Array:
        return self.net.params[layer_name(self.cell, self.edge, self.operation, part)]["kernel"]

    def norm(self, y_TBHWC: Array, part: str = "") -> Array:
        name = layer_name(self.cell, self.edge, self.operation, part)
        y_TBHWC, running = self.net.normed(name, y_TBHWC)
        if running is not None:
            self.stats[name] = running
        return y_TBHWC


class Pass:
    """One pass over a stretch of time steps: reads parameters and state, gathers their successors.

    The dictionaries it fills live only while jax traces; the functions around it are pure. Spikes are handed on
    in `spike_dtype` (None: that of the currents). They are small whole numbers, of which bfloat16 loses nothing.
    """

    def __init__(
        self,
        spec: NetworkSpec,
        genotype: Any,
        params: Params,
        stats: Stats | None,
        state: State,
        *,
        train: bool,
        observe: Observe | None,
        spike_dtype: Any = None,
        axis_name: str | None = None,
    ):
        """Arguments as those of `apply`; statistics and state are those that the pass starts from."""
        self.spec, self.params, self.train, self.observe = spec, params, train, observe
        self.spike_dtype, self.axis_name = spike_dtype, axis_name
        self.codes = dict(zip(CELLS, spec.codes(genotype), strict=True))
        codes = self.codes[CELLS[0]]
        self.choose = choosing.chooser(codes)
        self.sites = spec.sites(genotype)
        self.stats = None if stats is None else dict(stats)
        self.state = dict(state)
        self.records: dict[str, Any] = {}

    def norm(self, name: str, x_TBHWC: Array) -> Array:
        """Batch norm of layer `name`, its running statistics moved on."""
        y, running = self.normed(name, x_TBHWC)
        if self.stats is not None and running is not None:
            self.stats[name] = running
        return y

    def normed(self, name: str, x_TBHWC: Array) -> tuple[Array, Any]:
        """Batch norm of layer `name`, and its running statistics after the pass."""
        over_time = self.spec.norm == "over_time" and name != "stem"
        return layers.batch_norm(
            x_TBHWC,
            self.params[name],
            None if self.stats is None else self.stats[name],
            train=self.train,
            norm="over_time" if over_time else "per_step",
            gain=self.spec.neuron.v_threshold if over_time else 1.0,
            axis_name=self.axis_name,
        )

    def stem(self, images_BHWC: Array) -> Array:
        """The current that every time step reads, [B, H, W, C]."""
        x = convolution.conv(images_BHWC, self.params["stem"]["kernel"], self.spec.stem_stride)
        return self.norm("stem", x[None])[0]

    def spikes(
        self, neuron: neurons.NeuronSpec, v_N: Array, x_TN: Array, learned: neurons.Learned | None = None
    ) -> tuple[Array, Array, Any]:
        """Membranes after, spikes of, and record of a LIF layer with these learned scalars."""
        v_end, spikes = neurons.run(neuron, v_N, x_TN, learned)
        if self.spike_dtype is not None:
            spikes = spikes.astype(self.spike_dtype)
        if not self.observe:
            return v_end, spikes, ()
        spikes = lax.optimization_barrier(spikes)  # else XLA computes them anew for each reader
        return v_end, spikes, self.observe(spikes)

    def learned(self, site: str) -> neurons.Learned | None:
        """What a LIF layer has learned; None where the spec's neuron learns nothing."""
        return {name: self.params[site][name] for name in self.spec.neuron.learned} or None

    def fire(self, site: str, x_TBN: Array, neuron: neurons.NeuronSpec | None = None) -> Array:
        """Spikes of a LIF layer of the network's or another neuron; zeros where no edge reads them."""
        calls = self.sites[site].calls if site in self.sites else 0
        if isinstance(calls, int) and calls == 0:
            return jnp.zeros(x_TBN.shape, self.spike_dtype or x_TBN.dtype)
        v = self.state.get(site)
        v = jnp.zeros(x_TBN.shape[1:], x_TBN.dtype) if v is None else v
        learned = self.learned(site)
        fired = lambda v, x: self.spikes(neuron or self.spec.neuron, v, x, learned)  # noqa: E731
        result = fired(v, x_TBN) if isinstance(calls, int) else self.where_read(calls, fired, v, x_TBN)
        self.state[site], spikes, record = result
        if self.observe:
            self.records[site] = record
        return spikes

    def where_read(self, calls: Array, fired: Fired, v_N: Array, x_TN: Array) -> tuple[Array, Array, Any]:
        """What `fired` gives where a traced number of edges reads the spikes; a layer that none reads costs nothing."""
        nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(fired, v_N, x_TN)[1:])
        return lax.cond(calls > 0, lambda: fired(v_N, x_TN), lambda: (v_N, *nothing))

    def operation(
        self,
        cell: str,
        position: int,
        code: Any,
        x: Array,
        spikes: Spikes,
        steps: int,
        total: Array | None = None,
    ) -> Array | None:
        """What operation `code` makes of its source node on one edge, [T, B, H, W, C], added to `total`.

        Args:
          cell: ``"cell1"`` or ``"cell2"``.
          position: of the edge in the space's order; says whose weights an operation has.
          code: of the genotype's kind; a zero that is fixed gives `total`.
          x: the source node's value, [T or 1, B, H, W, C].
          spikes: the source node's spikes [T, B, H, W, C] by the spec's readers; what reads none takes x.
          steps: T.
          total: what other edges brought to the same node; None is nothing.
        """
        space, readers = self.spec.space, self.spec.readers
        shape, edge = (steps, *x.shape[1:]), space.edges[position]

        def made(code: int, operation: Operation) -> tuple[Array, Stats]:
            own = next((reader for reader in readers if reader.codes[code]), None)
            read = x if own is None else spikes[own]
            if own is not None and not operation.reads_spikes:
                read = read.astype(x.dtype)  # a shortcut of spikes adds them to currents
            after: Stats = {}
            y = operation.apply(_Edge(self, cell, edge, operation.name, after), read)
            if jnp.shape(y) != read.shape:
                raise ValueError(f"operation {operation.name!r} makes {jnp.shape(y)} of {read.shape}: want that shape")
            return y.astype(x.dtype), after

        makes = [lambda code=code: made(code, space.operation(code)) for code in range(1, space.num_ops)]
        like = jax.ShapeDtypeStruct(shape, x.dtype)
        if self.stats is None:
            return self.choose(code, makes, like, total, {})[0]
        own = {name: entry for name, entry in self.stats.items() if name.startswith(edge_prefix(cell, edge))}
        total, own = self.choose(code, makes, like, total, own)
        self.stats |= own
        return total

    def cell(self, cell: str, x0: Array, time_steps: int) -> Array:
        """One cell over a stretch of time steps: x0 [T or 1, B, H, W, C] -> node 3, [T, B, H, W, C].

        A leading axis of 1 is an input that stays the same at every time step.
        """
        edges = self.spec.space.edges
        feedback = self.state.get(f"{cell}.feedback") if self.spec.space.feedback else None
        if self.spec.space.feedback and feedback is None:
            feedback = (jnp.zeros_like(x0[0]),) * 3
        values: list[Array] = []  # what leaves each node
        spikes: list[Spikes] = []

        def total(target: int, sources: range) -> Array:
            result = None
            for source in sources:
                i = edges.index((source, target))
                code = self.codes[cell][i]
                result = self.operation(cell, i, code, values[source], spikes[source], time_steps, result)
            return jnp.zeros((time_steps, *x0.shape[1:]), x0.dtype) if result is None else result

        for node in range(4):
            x = x0 if node == 0 else total(node, range(node))
            value = x if feedback is None or node == 3 else x + feedback[node]
            values.append(value)
            full = layers.every_step(value, time_steps)
            spikes.append({r: self.fire(r.site(cell, node), full, r.neuron) for r in self.spec.readers})
        if feedback is not None:
            self.state[f"{cell}.feedback"] = tuple(total(n, range(n + 1, 4))[0] for n in range(3))
        return layers.every_step(values[3], time_steps)

    def head(self, spikes_TBHWC: Array, dropout_keep: Array | None) -> Array:
        """Logits of every time step, [T, B, K]."""
        spec = self.spec
        spikes_TBHWC = spikes_TBHWC.astype(jnp.promote_types(spikes_TBHWC.dtype, jnp.float32))
        if spec.head == "snasnet":
            x = layers.downsample(spikes_TBHWC, spec.head_pool)
            x_TBF = x.reshape(*x.shape[:-3], -1)
        else:
            x_TBF = spikes_TBHWC.mean((-3, -2))
        if dropout_keep is not None:
            x_TBF = x_TBF * dropout_keep / (1 - spec.dropout)
        out = self.params["head.out"]
        if spec.head == "gap":
            return x_TBF @ out["kernel"] + out["bias"]
        hidden = self.fire("head", x_TBF @ self.params["head.hidden"]["kernel"])
        y = hidden @ out["kernel"] + out["bias"]
        return y.reshape(*y.shape[:-1], spec.num_classes, spec.neurons_per_class).mean(-1)

    def run(self, x0_BHWC: Array, time_steps: int, dropout_keep: Array | None) -> Array:
        """All layers over `time_steps` steps of the constant current x0; logits [T, B, K]."""
        return self.after_cell1(self.cell("cell1", x0_BHWC[None], time_steps), time_steps, dropout_keep)

    def after_cell1(self, x: Array, time_steps: int, dropout_keep: Array | None) -> Array:
        """Transition, cell 2 and head on the output of cell 1, [T, B, H, W, C]; logits [T, B, K]."""
        x = self.fire("transition", self.norm("transition.in", x))
        x = self.norm("transition.conv", convolution.conv(x, self.params["transition.conv"]["kernel"]))
        x = self.cell("cell2", layers.downsample(x, 2), time_steps)
        return self.head(self.fire("last", self.norm("last", x)), dropout_keep)


def apply(
    spec: NetworkSpec,
    genotype: Any,
    params: Params,
    images_BHWC: Array,
    *,
    stats: Stats | None = None,
    state: State | None = None,
    train: bool = False,
    dropout_keep: Array | None = None,
    step_by_step: bool | None = None,
    observe: Observe | None = None,
    spike_dtype: Any = None,
    axis_name: str | None = None,
) -> Output:
    """Runs the network on a batch.

    Args:
      spec: the network.
      genotype: fixed (NumPy array, tuple or list of codes) or traced (jax array), [E] or [2, E]; or a
        mixture, a jax array [E, num_ops] of weights of at least 0.
      params: a genotype's parameters, or a bank's.
      images_BHWC: normalised images, float.
      stats: running statistics of batch norm; None keeps none (then `train` must be True).
      state: membranes and feedback to start from; None starts at zero, as every new image does.
      train: batch statistics if True, running statistics if False.
      dropout_keep: mask of `dropout_mask`; None for no dropout.
      step_by_step: loop over time outside the layers; None does so only for feedback cells, which
        need it. The result is the same; layer by layer is faster.
      observe: what to record of each LIF layer's spikes.
      spike_dtype: type of the spikes, and so of the convolutions' inputs; None is that of the currents.
      axis_name: of the mapped axis whose devices share the batch; batch statistics are then those of all shares.

    Returns:
      Logits, and the successors of statistics and state.

    Raises:
      ValueError: if layer by layer is asked of feedback cells, or tdBN step by step.
    """
    if step_by_step is None:
        step_by_step = spec.space.feedback
    if spec.space.feedback and not step_by_step:
        raise ValueError("step_by_step=False: feedback cells can only run step by step")
    if spec.norm == "over_time" and step_by_step:
        raise ValueError("step_by_step=True: norm='over_time' needs all time steps at once")
    if stats is not None and spec.is_mixture(genotype):
        raise ValueError("stats: a mixture of operations keeps no running statistics; give stats=None")

    def begin(stats: Stats | None, state: State) -> Pass:
        return Pass(
            spec,
            genotype,
            params,
            stats,
            state,
            train=train,
            observe=observe,
            spike_dtype=spike_dtype,
            axis_name=axis_name,
        )

    stem = begin(stats, {})
    x0_BHWC = stem.stem(images_BHWC)
    state = state or {}

    if not step_by_step:
        net = begin(stem.stats, state)
        logits_TBK = net.run(x0_BHWC, spec.time_steps, dropout_keep)
        return Output(logits_TBK, net.stats, net.state, net.records)

    def one_step(carry: tuple[Stats | None, State], _: None) -> tuple[Any, Any]:
        net = begin(*carry)
        logits_1BK = net.run(x0_BHWC, 1, dropout_keep)
        return (net.stats, net.state), (logits_1BK[0], jax.tree.map(lambda leaf: leaf[0], net.records))

    # The scan's carry needs every membrane from the start; a trace tells their shapes at no cost.
    (_, shapes), _ = jax.eval_shape(one_step, (stem.stats, state), None)
    state = jax.tree.map(jnp.zeros_like, shapes) | state
    (end_stats, end_state), (logits_TBK, records) = lax.scan(
        one_step, (stem.stats, state), None, length=spec.time_steps
    )
    return Output(logits_TBK, end_stats, end_state, records)


def parameter_count(params: Params) -> int:
    """Number of parameters in a tree."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
