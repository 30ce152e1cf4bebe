"""Tiles of examples: kernels of more pairs than fit in memory at once.

A tile is a block of examples of x1 against a block of x2, computed on its own and put in its
place. That is legal where no layer mixes examples. With x2 = None only tiles on and above the
diagonal are computed, the others are their transposes. Under tracing the tiles are a `lax.map`,
rematerialised in reverse mode, so that gradients stay within the budget too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tangents._core.memory import chunks, format_bytes, resolve_budget
from tangents._infinite.blocks import transpose_pairs
from tangents._infinite.execute import is_cut
from tangents._infinite.graph import Node, Parallel, Repeat, Serial, any_node, at, join_needs
from tangents._infinite.kernel import Kernel
from tangents._infinite.tile import Layout, Need, Signal

_LIVE = 6
"""Arrays of the size of a layer's covariance that live at once, beside the result (measured)."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """What one layer of a network computes: its place and what goes in and comes out."""

    place: str
    node: Node
    before: Any
    after: Any
    need_in: Any
    need_out: Need

    @property
    def entries(self) -> int:
        """Covariance entries of one pair of examples, the larger of input and output."""
        return max(
            [
                _entries(signal, join_needs(need).tile)
                for signals, need in ((self.before, self.need_in), (self.after, self.need_out))
                for signal in (signals if isinstance(signals, (list, tuple)) else [signals])
            ]
        )


def _entries(signal: Signal, layout: Layout) -> int:
    return math.prod(signal.spatial) ** (2 if layout == Layout.FULL else 1)


def stages(node: Node, signal: Any, need: Any, place: str = "") -> tuple[list[Stage], Any]:
    """The layers of a graph in the order they run, and the signal after the last."""

    def inside(name: str) -> str:
        return f"{place} > {name}" if place else name

    if is_cut(node):
        return [Stage(place or node.name, node, signal, signal, node.needs(need), need)], None
    if isinstance(node, Serial):
        needs = [need]
        for child in reversed(node.nodes):
            needs.append(child.needs(needs[-1]))
        out = []
        for (name, child), n in zip(node.places(), needs[-2::-1], strict=True):
            if signal is None:  # what follows a layer of the user's own is known when it has run
                break
            with at(name):
                more, signal = stages(child, signal, n, inside(name))
            out += more
        return out, signal
    if isinstance(node, Parallel):
        needs = need if isinstance(need, list) else [need] * len(node.nodes)
        out, signals = [], []
        node._check(signal)
        for (name, child), s, n in zip(node.places(), signal, needs, strict=True):
            with at(name):
                more, after = stages(child, s, n, inside(name))
            out += more
            signals.append(after)
        return out, None if any(s is None for s in signals) else signals
    if isinstance(node, Repeat):
        out, need = [], node.needs(need)
        for turn in range(node.n):
            with at(node.place):
                more, signal = stages(node.node, signal, need, inside(f"turn {turn}"))
            out += more
            if signal is None:
                break
        return out, signal
    after = node.signal(signal)
    stage = Stage(place or node.name, node, signal, after, node.needs(need), join_needs(need))
    return [stage], after


def bytes_a_pair(node: Node, signal: Any, need: Need, want_ntk: bool) -> int:
    """Bytes that one pair of examples takes while the network is computed."""
    listed, _ = stages(node, signal, need)
    largest = max([s.entries for s in listed], default=1)
    itemsize = jnp.zeros(()).dtype.itemsize
    return largest * itemsize * _LIVE * (2 if want_ntk else 1)


def can_tile(node: Node, side_pairs: bool) -> bool:
    """May examples be computed apart from each other?"""
    return not side_pairs and not any_node(node, lambda n: n.mixes_examples or is_cut(n))


def tile_sizes(n1: int, n2: int, pair: int, memory: Any) -> tuple[int, int]:
    """Examples of x1 and of x2 in a tile that stays within the budget."""
    budget = resolve_budget(memory)
    if memory is not None and pair > budget:
        raise ValueError(
            f"kernel_fn: memory={memory!r} is less than one pair of examples takes, "
            f"{format_bytes(pair)}: that is the least it can be"
        )
    pairs = max(budget // pair, 1)
    t1 = min(n1, max(math.isqrt(pairs), 1))
    t2 = min(n2, max(pairs // max(t1, 1), 1))
    return min(n1, max(pairs // max(t2, 1), 1)), t2


def _batch_shape(kernel: Kernel, n1: int, n2: int) -> dict[str, Any]:
    shapes = {}
    for field, n in (("shape1", n1), ("shape2", n2)):
        shape = list(getattr(kernel, field))
        shape[kernel.batch_axis] = n
        shapes[field] = tuple(shape)
    return shapes


def _assemble(grid: list[list[Kernel]], symmetric: bool, n1: int, n2: int) -> Kernel:
    """One Kernel from a grid of tiles; `symmetric`: those below the diagonal are None."""
    first = grid[0][0]
    full = not first.diagonal_spatial

    def blocks(field):
        if getattr(first, field) is None or jnp.ndim(getattr(first, field)) == 0:
            return getattr(first, field)
        rows = []
        for i in range(len(grid)):
            row = []
            for j in range(len(grid[i])):
                if symmetric and j < i:
                    row.append(transpose_pairs(getattr(grid[j][i], field), full))
                else:
                    row.append(getattr(grid[i][j], field))
            rows.append(jnp.concatenate(row, axis=1))
        return jnp.concatenate(rows, axis=0)

    def along(field, kernels, axis):
        parts = [getattr(k, field) for k in kernels]
        return None if parts[0] is None else jnp.concatenate(parts, axis=axis)

    diagonal = [grid[i][i] for i in range(len(grid))] if symmetric else [row[0] for row in grid]
    axis = first.batch_axis
    mask1 = along("mask1", diagonal, axis)
    return first.replace(
        nngp=blocks("nngp"),
        ntk=blocks("ntk"),
        cov1=along("cov1", diagonal, 0),
        cov2=None if symmetric else along("cov2", grid[0], 0),
        mask1=mask1,
        mask2=mask1 if symmetric else along("mask2", grid[0], axis),
        **_batch_shape(first, n1, n2),
    )


def _each_output(results: list[list[Any]], join: Callable[[list[list[Kernel]]], Kernel]) -> Any:
    """Assemble every output of a network with several."""
    first = results[0][0]
    if isinstance(first, list):
        return [
            _each_output([[None if r is None else r[i] for r in row] for row in results], join)
            for i in range(len(first))
        ]
    return join(results)


Tile = Callable[[Any, Any, bool], Any]


def eager_tiles(
    tile: Tile, n1: int, n2: int, t1: int, t2: int, symmetric: bool, progress: Any = None
) -> Any:
    """Tiles one after another; `tile(examples of x1, examples of x2, are they one block)`."""
    if symmetric:
        t2 = t1
    rows = [np.arange(s.start, s.stop) for s in chunks(n1, t1)]
    columns = rows if symmetric else [np.arange(s.start, s.stop) for s in chunks(n2, t2)]
    grid: list[list[Any]] = [[None] * len(columns) for _ in rows]
    places = [(i, j) for i in range(len(rows)) for j in range(len(columns))]
    places = [(i, j) for i, j in places if not (symmetric and j < i)]
    for i, j in places if progress is None else progress(places):
        grid[i][j] = tile(rows[i], columns[j], symmetric and i == j)
    return _each_output(grid, lambda g: _assemble(g, symmetric, n1, n2))


def _divisor(n: int, most: int) -> int:
    return next(d for d in range(max(min(n, most), 1), 0, -1) if n % d == 0)


def traced_tiles(tile: Tile, n1: int, n2: int, t1: int, t2: int, symmetric: bool) -> Any:
    """Tiles as a loop of the compiled program; their sizes divide the numbers of examples."""
    t1, t2 = _divisor(n1, t1), _divisor(n2, t2)
    rows, columns = n1 // t1, n2 // t2

    @jax.checkpoint
    def one(k):
        i, j = k // columns, k % columns
        return tile(i * t1 + jnp.arange(t1), j * t2 + jnp.arange(t2), False)

    stacked = jax.lax.map(one, jnp.arange(rows * columns))

    def pick(k):
        return jax.tree.map(lambda a: a[k], stacked)

    grid = [[pick(i * columns + j) for j in range(columns)] for i in range(rows)]
    return _each_output(grid, lambda g: _whole(_assemble(g, False, n1, n2), symmetric))


def _whole(kernel: Kernel, symmetric: bool) -> Kernel:
    """With x2 = None the second side is not repeated."""
    return kernel.replace(cov2=None, mask2=kernel.mask1) if symmetric else kernel
