"""One compiled program for many pairs of examples, in blocks that stay in cache.

1. The side pass: covariances of the pairs (a, a), once for every example, in blocks; what each node
   will read of them is kept on a tape (`execute.Tape`).
2. The blocks: examples of x1 against examples of x2, one block after another in a loop; with
   x2 = None those on and above the diagonal, the others are their transposes.

A block is the walk of the plain path on fewer pairs, so there is nothing here that knows a layer.
The last block of a row overlaps the one before it where sizes do not divide. In reverse mode
blocks are computed again, so that gradients keep no more than one of them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tangents._infinite.execute import State, run
from tangents._infinite.tape import Tape, join_sides, map_sides, prepared
from tangents._infinite.tile import Layout, Signal

_SHARE = 1
"""Numbers that are kept of the sides, beside variances, for each pair of examples."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Numbers of examples: of x1 and x2 in a block, and in a block of the side pass."""

    rows: int
    columns: int
    sides: int


@dataclasses.dataclass(frozen=True)
class Batch:
    """Examples of one side: inputs, masks (trees), a graph pattern, and their numbers."""

    x: Any
    mask: Any
    pattern: Any
    index: Any
    axes: Any
    size: int

    def take(self, start: Any, size: int) -> Batch:
        """`size` examples from `start` on, which may be traced."""
        if size == self.size:
            return self

        def cut(a, axis):
            if isinstance(a, list):
                return [cut(u, v) for u, v in zip(a, axis, strict=True)]
            return a if a is None else lax.dynamic_slice_in_dim(a, start, size, axis[0])

        pattern, index = (
            a if a is None else lax.dynamic_slice_in_dim(a, start, size)
            for a in (self.pattern, self.index)
        )
        return Batch(cut(self.x, self.axes), cut(self.mask, self.axes), pattern, index, None, size)


def _starts(n: int, size: int) -> np.ndarray:
    """Where blocks start; the last one ends at n."""
    return np.minimum(np.arange(0, n, size), n - size)


def _join(stacked: jax.Array, n: int, axis: int) -> jax.Array:
    """Blocks stacked on a first axis, joined along `axis` of each; the last overlaps."""
    blocks, size = stacked.shape[0], stacked.shape[axis + 1]
    last = lax.slice_in_dim(stacked[-1], blocks * size - n, size, axis=axis)
    shape = stacked.shape[1:]
    whole = jnp.moveaxis(stacked[:-1], 0, axis)
    whole = whole.reshape((*shape[:axis], (blocks - 1) * size, *shape[axis + 1 :]))
    return jnp.concatenate([whole, last], axis=axis)


def resize(signal: Signal, n: int) -> Signal:
    """The signal of another number of examples."""
    shape = list(signal.shape)
    shape[signal.batch_axis] = n
    return signal.replace(shape=tuple(shape))


def _each(fn: Any, state: Any, *others: Any) -> Any:
    """`fn` on every state of a tree of them."""
    if isinstance(state, (list, tuple)):
        return [_each(fn, *each) for each in zip(state, *others, strict=True)]
    return fn(state, *others)


def side_pass(node: Any, plan: Any, batch: Batch, size: int, kwargs: Any, inputs: Any) -> Any:
    """`(state without a tile, tape entries)` of all examples, `size` at a time."""
    size = min(size, batch.size)

    def one(start):
        part = batch.take(start, size)
        state = _each(lambda s: s.replace(tile=None), inputs(part, None, True))
        tape = Tape(plan.want_gap)
        state = run(node, state, plan.need, (part.pattern, part.pattern), kwargs, tape)
        return state, tape.entries

    if size >= batch.size:
        return one(0)
    state, entries = lax.map(one, jnp.asarray(_starts(batch.size, size)))
    entries = map_sides(lambda a, axis: _join(a, batch.size, axis), entries)

    def whole(s: State) -> State:
        n = batch.size
        mask = s.mask1
        if mask is not None:
            axis = s.in1.batch_axis
            mask = _join(mask, n, axis) if mask.shape[axis + 1] > 1 else mask[0]
        signal = resize(s.in1, n)
        side1 = None if s.side1 is None else _join(s.side1, n, 0)
        return s.replace(side1=side1, mask1=mask, index1=None, index2=None, in1=signal, in2=signal)

    return _each(whole, state), entries


def compute_blocks(
    node: Any, plan: Any, batch1: Batch, batch2: Batch | None, blocks: Blocks, kwargs: Any, inputs
) -> Any:
    """The state after a network, from blocks.

    Args:
      node, plan: the network and what is asked of it.
      batch1, batch2: the examples; None: those of x1.
      blocks: their sizes.
      kwargs: for layers.
      inputs: `(batch1, batch2 or None, sides) -> state` at the input; without sides it has no more
        of them than the gap takes.
    """
    symmetric = batch2 is None
    end1, tape1 = side_pass(node, plan, batch1, blocks.sides, kwargs, inputs)
    if batch2 is None:
        batch2, end2, tape2 = batch1, end1, tape1
    else:
        end2, tape2 = side_pass(node, plan, batch2, blocks.sides, kwargs, inputs)
    n1, n2, t1, t2 = batch1.size, batch2.size, blocks.rows, blocks.columns
    tape1, tape2 = prepared(tape1, tape2, _SHARE * n1 * n2)

    @jax.checkpoint
    def one(i, j):
        part1, part2 = batch1.take(i, t1), batch2.take(j, t2)

        def cut(start, size, whole):
            return lambda a, axis: (
                a if size == whole else lax.dynamic_slice_in_dim(a, start, size, axis)
            )

        entries = join_sides(map_sides(cut(i, t1, n1), tape1), map_sides(cut(j, t2, n2), tape2))
        state = inputs(part1, part2, False)
        patterns = (part1.pattern, part2.pattern)
        state = run(node, state, plan.need, patterns, kwargs, Tape(plan.want_gap, entries))
        return _each(_tile_only, state)

    if t1 == n1 and t2 == n2:
        return _assemble(one(0, 0), end1, end2, symmetric, n1, n2)
    shapes = jax.eval_shape(one, 0, 0)
    buffers = jax.tree.map(
        lambda a: jnp.zeros((n1, n2, *a.shape[2:]) if a.ndim else (), a.dtype), shapes
    )
    full = _each(lambda s: jax.tree.map(lambda a: s.layout == Layout.FULL, s), shapes)
    rows, columns = grid(n1, n2, t1, t2, symmetric)

    def body(k, buffers):
        i, j = rows[k], columns[k]

        def put(buffer, part, full):
            if not part.ndim:
                return buffer
            zeros = (0,) * (part.ndim - 2)
            buffer = lax.dynamic_update_slice(buffer, part, (i, j, *zeros))
            if symmetric:
                part = transpose_pairs(part, full)
                buffer = lax.dynamic_update_slice(buffer, part, (j, i, *zeros))
            return buffer

        return jax.tree.map(put, buffers, one(i, j), full)

    rows, columns = jnp.asarray(rows), jnp.asarray(columns)
    buffers = lax.fori_loop(0, len(rows), body, buffers)
    return _assemble(buffers, end1, end2, symmetric, n1, n2)


def _tile_only(s: State) -> State:
    nothing = dict.fromkeys(("mask1", "mask2", "index1", "index2", "x1_is_x2"))
    return s.replace(tile=s.tile._replace(gap12=None), **nothing)


def grid(n1: int, n2: int, t1: int, t2: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    """Starts of all blocks; if symmetric, of those that reach above the diagonal."""
    i, j = np.meshgrid(_starts(n1, t1), _starts(n2, t2), indexing="ij")
    i, j = i.ravel(), j.ravel()
    wanted = (j + t2 > i) if symmetric else np.ones(len(i), bool)
    return i[wanted], j[wanted]


def _assemble(tiles: Any, end1: Any, end2: Any, symmetric: bool, n1: int, n2: int) -> Any:
    def join(tile: State, a: State, b: State) -> State:
        return tile.replace(
            side1=a.side1,
            side2=None if symmetric else b.side1,
            x1_is_x2=a.x1_is_x2,
            mask1=a.mask1,
            mask2=None if symmetric else b.mask1,
            in1=resize(tile.in1, n1),
            in2=resize(tile.in2, n2),
            side_layout=a.side_layout,
            shared=symmetric,
        )

    return _each(join, tiles, end1, end2)


def transpose_pairs(a: Any, full: bool) -> Any:
    """`K(x2, x1)` from `K(x1, x2)`: pair axes swapped, and positions if both are held."""
    if a is None or jnp.ndim(a) == 0:
        return a
    order = [1, 0, *range(2, a.ndim)]
    if full:
        for i in range(2, a.ndim, 2):
            order[i], order[i + 1] = i + 1, i
    return jnp.transpose(a, order)


def block_sizes(n1: int, n2: int, entries: int, most: int) -> Blocks:
    """Sizes for blocks of about `most` covariance entries, `entries` for one pair."""
    pairs = max(most // entries, 1)
    columns = min(n2, max(int(np.sqrt(pairs)), min(pairs, 32)))
    rows = min(n1, max(pairs // columns, 1))
    return Blocks(rows, columns, min(max(n1, n2), pairs))
