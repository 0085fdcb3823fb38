"""The scoring engine for forward cells: necessary work only, in two compiled programs.

In cell 1 all candidates see the same input, the stem's current, and share one bank of weights. So

- the stem, and what each operation on edge (0,3) makes of it, are computed once (`prepare`);
- candidates that agree on the edges of nodes 1 and 2 are a group: those nodes, their spikes, and what each
  operation on (1,3) and (2,3) makes of them are computed once a group, those operations alone that a candidate
  of the group holds;
- of cell 1, a candidate itself costs a sum of three arrays that are there already.

Behind it, each candidate has an input of its own: transition, cell 2 and head are run one candidate after
another (`lax.switch` runs only the operations it holds), in loops whose trip counts are data: any list of
candidates runs the same program.

Behind cell 1 a candidate goes through time in pieces of `steps`: all T steps at once (layer by layer) or one
after another, with membranes carried along. The results are the same; one step's activations may fit a cache
where those of all steps do not.

Feedback cells share nothing after their first time step: `score_each` runs them one after another.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

from spikernel_jax.cells.canonical import FORWARD_EDGES
from spikernel_jax.scoring.scores import SpikeTerms, collect, get_score, normalised_hamming, spike_terms
from spikernel_jax.snn import layers, network
from spikernel_jax.snn.spec import NetworkSpec, Reader

Array = jax.Array

E01, E02, E12, E03, E13, E23 = range(len(FORWARD_EDGES))
PREFIX = [E01, E02, E12]  # the edges of nodes 1 and 2


@dataclasses.dataclass(frozen=True)
class Program:
    """How candidates are scored; static under ``jit``.

    Attributes:
      spec: the network.
      score: a registered score.
      steps: time steps that go through the layers together; divides T.
      bfloat16: whether convolutions and Gram matrices read their spikes in bfloat16.
      tile: candidates that go through the network as one batch (`batched`); 1 where they go one after another.
    """

    spec: NetworkSpec
    score: str
    steps: int
    bfloat16: bool
    tile: int = 1

    @property
    def spike_dtype(self) -> Any:
        """Type of spikes; None is that of the currents."""
        return jnp.bfloat16 if self.bfloat16 else None


class Shared(NamedTuple):
    """What all candidates share for one bank and one batch."""

    x0_BHWC: Array  # the stem's current
    spikes_RTBHWC: tuple[Array, ...]  # of node 0 of cell 1, through each of the spec's readers
    rho_RTBB: tuple[Array, ...]  # of node 0's LIFs
    direct_OTBHWC: Array  # each operation on edge (0,3)


class Groups(NamedTuple):
    """Candidates in runs that agree on `PREFIX`, for `score_groups`; arrays padded to the chunk."""

    rows: NDArray[np.int32]  # [chunk, 2, E] codes of both cells
    starts: NDArray[np.int32]  # [chunk + 1] first candidate of each group, then the number of candidates
    groups: NDArray[np.int32]  # [] how many groups
    needs: NDArray[np.bool_]  # [chunk, 2, O] which operations on (1,3) and (2,3) a group needs


def order(rows: NDArray[np.int8]) -> NDArray[np.int64]:
    """Order of genotypes [n, 2, E] in which those that share work are neighbours."""
    cell1 = rows[:, 0]
    return np.lexsort([*rows[:, 1].T, *cell1[:, [E23, E13, E03, *reversed(PREFIX)]].T])


def group(rows: NDArray[np.int8], chunk: int, num_ops: int) -> Groups:
    """Groups of genotypes [n, 2, E] that lie in `order`, n at most `chunk`."""
    n = len(rows)
    prefix = rows[:, 0, PREFIX]
    first = np.flatnonzero(np.r_[n > 0, (prefix[1:] != prefix[:-1]).any(1)])
    starts = np.full(chunk + 1, n, np.int32)
    starts[: len(first)] = first
    needs = np.zeros((chunk, 2, num_ops), bool)
    index = np.repeat(np.arange(len(first)), np.diff(np.r_[first, n]))
    for side, edge in enumerate((E13, E23)):
        needs[index, side, rows[:, 0, edge]] = True
    return Groups(padded(rows, chunk), starts, np.asarray(len(first), np.int32), needs)


def padded(rows: NDArray[np.int8], chunk: int) -> NDArray[np.int32]:
    """Rows [n, 2, E] in an array of `chunk` rows, so that any number of them runs one program."""
    result = np.zeros((chunk, *rows.shape[1:]), np.int32)
    result[: len(rows)] = rows
    return result


def _begin(program: Program, pair: Any, bank: network.Params, state: network.State) -> network.Pass:
    return network.Pass(
        program.spec,
        pair,
        bank,
        None,
        state,
        train=True,
        observe=normalised_hamming,
        spike_dtype=program.spike_dtype,
    )


def prepare(program: Program, bank: network.Params, images_BHWC: Array) -> Shared:
    """What all candidates share: stem, node 0 of cell 1, and the operations on edge (0,3)."""
    spec, steps = program.spec, program.spec.time_steps
    net = _begin(program, np.eye(1, len(spec.space.edges), E03, dtype=np.int8)[0], bank, {})
    x0_BHWC = net.stem(images_BHWC)
    x0 = x0_BHWC[None]
    currents = layers.every_step(x0, steps)
    fired = [net.spikes(reader.neuron, jnp.zeros_like(x0_BHWC), currents)[1:] for reader in spec.readers]
    spikes, rho = tuple(s for s, _ in fired), tuple(r for _, r in fired)
    direct = [_operation(net, E03, op, x0, spikes) for op in range(spec.space.num_ops)]
    return Shared(x0_BHWC, spikes, rho, jnp.stack(direct))


def _operation(net: network.Pass, edge: int, op: Any, x: Array, spikes: tuple[Array, ...]) -> Array:
    """One operation on an edge of cell 1 over all T steps."""
    steps = net.spec.time_steps
    value = net.operation("cell1", edge, op, x, dict(zip(net.spec.readers, spikes, strict=True)), steps)
    return jnp.zeros((steps, *x.shape[1:]), x.dtype) if value is None else value


def _node(net: network.Pass, x_TBHWC: Array, needs: Array, *codes: Array) -> tuple[tuple[Array, ...], ...]:
    """Spikes and rho of a node of cell 1 through each reader, zeros unless some operation reads through it.

    Args:
      net: the pass.
      x_TBHWC: the node's value.
      needs: bool [num_ops], operations of one edge that leaves the node.
      *codes: operations of others.
    """

    def run(reader: Reader) -> tuple[Array, Array]:
        return net.spikes(reader.neuron, jnp.zeros_like(x_TBHWC[0]), x_TBHWC)[1:]

    fired = []
    for reader in net.spec.readers:
        read = jnp.asarray(reader.codes)
        fires = functools.reduce(jnp.logical_or, (read[code] for code in codes), (needs & read).any())
        shapes = jax.eval_shape(functools.partial(run, reader))
        nothing = functools.partial(jax.tree.map, jnp.zeros_like, shapes)
        fired.append(lax.cond(fires, functools.partial(run, reader), nothing))
    return tuple(spikes for spikes, _ in fired), tuple(rho for _, rho in fired)


def of_group(
    program: Program, shared: Shared, bank: network.Params, groups: Groups, g: Array, tables: tuple[Array, Array]
) -> tuple[tuple[Array, Array], dict[str, Array]]:
    """What the candidates of a group share: tables of operations on (1,3) and (2,3), and rho of cell 1's LIFs.

    The tables are those of the group before, with the entries that this one needs put in: an operation's value is
    [T, B, H, W, C], and none's is always 0.
    """
    spec = program.spec
    x0 = shared.x0_BHWC[None]
    row, needs = groups.rows[groups.starts[g], 0], groups.needs[g]
    net = _begin(program, row, bank, {})
    x1 = _operation(net, E01, row[E01], x0, shared.spikes_RTBHWC)
    x2 = _operation(net, E02, row[E02], x0, shared.spikes_RTBHWC)
    spikes1, rho1 = _node(net, x1, needs[0], row[E12])
    x2 = x2 + _operation(net, E12, row[E12], x1, spikes1)
    spikes2, rho2 = _node(net, x2, needs[1])

    def filled(table: Array, side: int, edge: int, x: Array, spikes: tuple[Array, ...]) -> Array:
        for op in range(1, spec.space.num_ops):
            entry = lambda table, op=op: table.at[op].set(_operation(net, edge, op, x, spikes))  # noqa: E731
            table = lax.cond(needs[side, op], entry, lambda table: table, table)
        return table

    records = {
        reader.site("cell1", node): rho
        for node, rhos in enumerate((shared.rho_RTBB, rho1, rho2))
        for reader, rho in zip(spec.readers, rhos, strict=True)
    }
    return (filled(tables[0], 0, E13, x1, spikes1), filled(tables[1], 1, E23, x2, spikes2)), records


def score_groups(program: Program, shared: Shared, bank: network.Params, groups: Groups) -> tuple[Array, Array]:
    """Scores and LIF calls [chunk] of grouped forward candidates; zeros behind the last one."""

    def one_group(g: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        results, tables = carry
        tables, records = of_group(program, shared, bank, groups, g, tables)

        def one(i: Array, results: tuple[Array, Array]) -> tuple[Array, Array]:
            pair = groups.rows[i]
            codes = (pair[0, E03], pair[0, E13], pair[0, E23])
            parts = list(zip((shared.direct_OTBHWC, *tables), codes, strict=True))
            terms = collect(records | _behind_cell1(program, pair, bank, parts), program.spec.sites(pair))
            return _noted(program, results, i, terms)

        return lax.fori_loop(groups.starts[g], groups.starts[g + 1], one, results), tables

    empty = jnp.zeros_like(shared.direct_OTBHWC)
    results = _nothing(groups.rows, shared.x0_BHWC.dtype)
    results, _ = lax.fori_loop(0, groups.groups, one_group, (results, (empty, empty)))
    return results


def score_each(
    program: Program, bank: network.Params, images_BHWC: Array, rows: Array, count: Array
) -> tuple[Array, Array]:
    """Scores and LIF calls [chunk] of the first `count` of rows [chunk, 2, E], one whole network each.

    Time steps go one after another if `program.steps` is less than T, and where feedback needs it.
    """
    step_by_step = program.spec.space.feedback or program.steps < program.spec.time_steps

    def one(i: Array, results: tuple[Array, Array]) -> tuple[Array, Array]:
        terms, _ = spike_terms(
            program.spec, rows[i], bank, images_BHWC, spike_dtype=program.spike_dtype, step_by_step=step_by_step
        )
        return _noted(program, results, i, terms)

    return lax.fori_loop(0, count, one, _nothing(rows, images_BHWC.dtype))


def _nothing(rows: Any, dtype: Any) -> tuple[Array, Array]:
    return jnp.zeros(rows.shape[0], dtype), jnp.zeros(rows.shape[0], dtype)


def _noted(program: Program, results: tuple[Array, Array], i: Array, terms: SpikeTerms) -> tuple[Array, Array]:
    scores, calls = results
    return scores.at[i].set(get_score(program.score)(terms)), calls.at[i].set(terms.calls)


def _behind_cell1(
    program: Program, pair: Array, bank: network.Params, parts: list[tuple[Array, Array]]
) -> dict[str, Array]:
    """Records of all LIF sites behind cell 1, whose output is the sum of `parts`, each an entry of a table."""
    steps = program.steps

    def piece(state: network.State, t: Array) -> tuple[network.State, dict[str, Array]]:
        net = _begin(program, pair, bank, state)
        sizes = (1, steps, *parts[0][0].shape[2:])
        first, *others = (lax.dynamic_slice(table, (op, t, 0, 0, 0, 0), sizes)[0] for table, op in parts)
        net.after_cell1(sum(others, first), steps, None)
        return net.state, net.records

    shapes, _ = jax.eval_shape(piece, {}, jnp.int32(0))
    state = jax.tree.map(jnp.zeros_like, shapes)
    _, records = lax.scan(piece, state, jnp.arange(0, program.spec.time_steps, steps))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), records)
