"""Candidates as one batch: a tile of N goes through transition, cell 2 and head side by side.

An accelerator is not filled by one small candidate, and every conditional costs it a trip through its host. Here arrays
carry the candidates behind time, [T, N, B, H, W, C]: LIF, norms, sums, pooling and Gram matrices are `vmap`'s. On each
edge the candidates that hold an operation are gathered, and go through it in blocks of a few sizes, the largest first
and 1 the last: blocks are one convolution over (candidates x T x B) images with the bank's kernel, and no operation is
computed for a candidate that does not hold it. How many blocks there are is data, so one compiled program serves any
population.

In cell 1 candidates share work, as `engine` has it; groups are computed as the tile comes to them. Feedback cells share
nothing: their cell 1 goes through time as a batch, too.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spikernel_jax.scoring import engine
from spikernel_jax.scoring.engine import E03, E13, E23, Groups, Program, Shared
from spikernel_jax.scoring.scores import collect, get_score, normalised_hamming
from spikernel_jax.snn import network, neurons
from spikernel_jax.snn.spec import CELLS, Reader, Site

Array = jax.Array
Carry = TypeVar("Carry")

_BLOCKS = (8, 1)  # candidates that go through an operation together


class _Members(NamedTuple):
    """Some of a tile's candidates."""

    order_N: Array  # int32, a permutation of the tile
    first: Array  # of its places, theirs are from this one
    last: Array  # to before this one

    def over(self, body: Callable[[Array, Carry], Carry], carry: Carry) -> Carry:
        """The carry after `body` has been called with all of them, in blocks: indices [s], and the carry."""
        first = self.first
        for size in (block for block in _BLOCKS if block <= len(self.order_N)):
            blocks = (self.last - first) // size

            def block(b: Array, carry: Carry, first: Array = first, size: int = size) -> Carry:
                return body(lax.dynamic_slice(self.order_N, (first + b * size,), (size,)), carry)

            carry = lax.fori_loop(0, blocks, block, carry)
            first += blocks * size
        return carry


class Population(network.Pass):
    """A pass of N candidates with one bank: values and spikes are [T, N, B, H, W, C], membranes [N, B, H, W, C]."""

    def __init__(self, program: Program, pairs: Array, bank: network.Params, state: network.State):
        """Of int32 pairs [N, 2, E]."""
        spec = program.spec
        fixed = np.eye(1, len(spec.space.edges), E03, dtype=np.int8)[0]  # any: of fixed ones, codes choose operations
        observe = {"train": True, "observe": normalised_hamming, "spike_dtype": program.spike_dtype}
        super().__init__(spec, fixed, bank, None, state, **observe)
        self.codes = {cell: list(pairs[:, index].T) for index, cell in enumerate(CELLS)}
        self.sites = sites_of(program, pairs)

    def operation(
        self,
        cell: str,
        position: int,
        code: Any,
        x: Array,
        spikes: Mapping[Reader, Array],
        steps: int,
        total: Array | None = None,
    ) -> Array:
        """What each candidate's operation, code [N], makes of its source node, added to `total`."""
        order_N = jnp.argsort(code).astype(jnp.int32)
        bounds = jnp.searchsorted(code[order_N], jnp.arange(self.spec.space.num_ops + 1)).astype(jnp.int32)
        result = jnp.zeros((steps, *x.shape[1:]), x.dtype) if total is None else total

        def of_code(code: int, x: Array, read: tuple[Array, ...]) -> Array:
            own = dict(zip(spikes, read, strict=True))
            made = network.Pass.operation(self, cell, position, code, x, own, steps)
            assert made is not None  # a code that is not none's
            return made

        for known in range(1, self.spec.space.num_ops):
            one = jax.vmap(functools.partial(of_code, known), in_axes=1, out_axes=1)

            def block(index_s: Array, result: Array, one: Callable[..., Array] = one) -> Array:
                read = tuple(own[:, index_s] for own in spikes.values())
                return result.at[:, index_s].add(one(x[:, index_s], read))

            result = _Members(order_N, bounds[known], bounds[known + 1]).over(block, result)
        return result

    def spikes(
        self, neuron: neurons.NeuronSpec, v_N: Array, x_TN: Array, learned: neurons.Learned | None = None
    ) -> tuple[Array, Array, Any]:
        """Membranes after, spikes and records of candidates, each by itself."""
        one = functools.partial(super().spikes, neuron, learned=learned)
        return jax.vmap(one, in_axes=(0, 1), out_axes=(0, 1, 1))(v_N, x_TN)

    def where_read(self, calls: Array, fired: network.Fired, v_N: Array, x_TN: Array) -> tuple[Array, Array, Any]:
        """What the candidates fire that read a layer's spikes, calls [N]; zeros of others."""
        reads = calls > 0
        members = _Members(jnp.argsort(~reads).astype(jnp.int32), jnp.int32(0), reads.sum(dtype=jnp.int32))

        def block(index_s: Array, carry: tuple[Array, Array, Any]) -> tuple[Array, Array, Any]:
            v_N, *of_time = carry
            own, *own_of_time = fired(v_N[index_s], x_TN[:, index_s])
            spikes, record = (whole.at[:, index_s].set(part) for whole, part in zip(of_time, own_of_time, strict=True))
            return v_N.at[index_s].set(own), spikes, record

        nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(fired, v_N, x_TN)[1:])
        return members.over(block, (v_N, *nothing))

    def normed(self, name: str, x_TBHWC: Array) -> tuple[Array, Any]:
        """Batch norm of a layer, over each candidate's own values."""
        own = super().normed
        if x_TBHWC.ndim == 5:  # within an operation, of one candidate
            return own(name, x_TBHWC)
        return jax.vmap(lambda x: own(name, x)[0], in_axes=1, out_axes=1)(x_TBHWC), None


def sites_of(program: Program, pairs: Array) -> dict[str, Site]:
    """LIF layers of pairs [N, 2, E]: of each, calls [N], or an int where all candidates have as many."""
    sites = program.spec.sites(pairs[0])

    def traced(pair: Array) -> dict[str, Array]:
        return {name: site.calls for name, site in program.spec.sites(pair).items() if not isinstance(site.calls, int)}

    return sites | {name: sites[name]._replace(calls=calls_N) for name, calls_N in jax.vmap(traced)(pairs).items()}


def tile_scores(program: Program, pairs: Array, records: dict[str, Array]) -> tuple[Array, Array]:
    """Scores and LIF calls [N] of records [T, N, B, B]."""
    score = get_score(program.score)
    terms = jax.vmap(lambda pair, own: collect(own, program.spec.sites(pair)), in_axes=(0, 1))(pairs, records)
    # LAPACK of jaxlib shares a batch of matrices between the threads of a pool, and waits for them in one of these
    # threads: as many devices as threads wait for ever (jaxlib 0.10.2). One matrix at a time is not shared.
    one_by_one = functools.partial(lax.map, score)
    return lax.platform_dependent(terms, cpu=one_by_one, default=jax.vmap(score)), terms.calls


def _in_tiles(
    program: Program, rows: Array, count: Array, dtype: Any, body: Callable[[Array, Array, Carry], Any], carry: Carry
) -> tuple[Array, Array]:
    """Scores and LIF calls [chunk] of the first `count` rows, tile by tile.

    Args:
      program: its tile must divide the chunk.
      rows: [chunk, 2, E].
      count: of candidates.
      dtype: of scores.
      body: (first place, pairs of a tile, carry) -> records [T, N, B, B], and the carry.
      carry: of the first tile.
    """
    n = program.tile

    def one(t: Array, all_carry: tuple[Any, Any, Carry]) -> tuple[Any, Any, Carry]:
        scores, calls, carry = all_carry
        pairs = lax.dynamic_slice_in_dim(rows, t * n, n)
        records, carry = body(t * n, pairs, carry)
        found = tile_scores(program, pairs, records)
        scores, calls = (
            lax.dynamic_update_slice(all_of, own.astype(dtype), (t * n,))
            for all_of, own in zip((scores, calls), found, strict=True)
        )
        return scores, calls, carry

    nothing = jnp.zeros(rows.shape[0], dtype)
    scores, calls, _ = lax.fori_loop(0, -(-count // n), one, (nothing, nothing, carry))
    return scores, calls


def tile_groups(program: Program, shared: Shared, bank: network.Params, groups: Groups) -> tuple[Array, Array]:
    """Scores and LIF calls [chunk] of grouped forward candidates, as `engine.score_groups`; anything behind the last.

    `program.tile` divides the chunk.
    """
    spec, n = program.spec, program.tile
    steps, rows = spec.time_steps, jnp.asarray(groups.rows)
    count = jnp.asarray(groups.starts)[groups.groups]
    of_nodes = [reader.site("cell1", node) for node in (1, 2) for reader in spec.readers]

    def tile(place: Array, pairs: Array, carry: Any) -> Any:
        """Cell 1 of a tile, group by group: the last one of the tile before goes on in this."""
        end = jnp.minimum(place + n, count)

        def put(i: Array, carry: Any) -> Any:
            (_, tables, of_group), x, records = carry
            codes = pairs[i - place, 0]
            value = shared.direct_OTBHWC[codes[E03]] + tables[0][codes[E13]] + tables[1][codes[E23]]
            records = {site: records[site].at[:, i - place].set(of_group[site]) for site in of_nodes}
            return (carry[0], x.at[:, i - place].set(value), records)

        def group(carry: Any) -> Any:
            (g, tables, _), x, records = carry
            tables, found = engine.of_group(program, shared, bank, groups, g, tables)
            kept = (g + 1, tables, {site: found[site] for site in of_nodes})
            ends = jnp.minimum(groups.starts[g + 1], end)
            return lax.fori_loop(groups.starts[g], ends, put, (kept, x, records))

        x = jnp.zeros((steps, n, *shared.x0_BHWC.shape), shared.x0_BHWC.dtype)
        records = {site: jnp.zeros((steps, n, *rho.shape[1:]), rho.dtype) for site, rho in carry[2].items()}
        begun = lax.fori_loop(place, jnp.minimum(groups.starts[carry[0]], end), put, (carry, x, records))
        more = lambda carry: (carry[0][0] < groups.groups) & (groups.starts[carry[0][0]] < end)  # noqa: E731
        kept, x, records = lax.while_loop(more, group, begun)
        for reader, rho in zip(spec.readers, shared.rho_RTBB, strict=True):
            records[reader.site("cell1", 0)] = jnp.broadcast_to(rho[:, None], (steps, n, *rho.shape[1:]))
        net = Population(program, pairs, bank, {})
        net.after_cell1(x, steps, None)
        return records | net.records, kept

    empty = jnp.zeros_like(shared.direct_OTBHWC)
    rho = jax.tree.map(jnp.zeros_like, shared.rho_RTBB[0])
    carry = (jnp.int32(0), (empty, empty), dict.fromkeys(of_nodes, rho))
    return _in_tiles(program, rows, count, shared.x0_BHWC.dtype, tile, carry)


def tile_each(
    program: Program, bank: network.Params, images_BHWC: Array, rows: Array, count: Array
) -> tuple[Array, Array]:
    """Scores and LIF calls [chunk] of the first `count` of rows [chunk, 2, E], as `engine.score_each`.

    Cell 1 goes through time as a batch too, step by step, as feedback needs it. `program.tile` divides the chunk.
    """
    spec, n = program.spec, program.tile

    def tile(place: Array, pairs: Array, carry: tuple[()]) -> Any:
        x0_BHWC = Population(program, pairs, bank, {}).stem(images_BHWC)
        x0 = jnp.broadcast_to(x0_BHWC, (n, *x0_BHWC.shape))

        def one_step(state: network.State, _: None) -> tuple[network.State, dict[str, Array]]:
            net = Population(program, pairs, bank, state)
            net.run(x0, 1, None)
            return net.state, {site: rho[0] for site, rho in net.records.items()}

        state, _ = jax.eval_shape(one_step, {}, None)
        state = jax.tree.map(jnp.zeros_like, state)
        _, records = lax.scan(one_step, state, None, length=spec.time_steps)
        return records, carry

    return _in_tiles(program, rows, count, images_BHWC.dtype, tile, ())
