"""All pairs of a convolutional network, by segments and planes (`segments.py`, `planes.py`).

With x2 = None the pairs a <= b are one loop, (a, a) first, which leaves what the layers read of
variances in buffers (`one_loop`). Its reverse would keep a copy of these at each step, so
derivatives are taken of two loops, (a, a) and the rest, with the tapes of the first handed to the
second (`two_loops`). With x2 the pairs (a, a) of both batches are a loop before that of all pairs.

A network that needs equal positions only (it ends in Flatten, without a pooling) is computed in
rectangles, a block of examples of x1 against a block of x2, with variances as small as the blocks.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tangents._infinite.barrier import keep_apart
from tangents._infinite.blocks import grid
from tangents._infinite.dual.angle import reciprocal, safe_sqrt
from tangents._infinite.dual.single_precision import is_single
from tangents._infinite.execute import run
from tangents._infinite.planes import LOOP, ZERO, Axis, Planes, arrange, at_offset
from tangents._infinite.segments import (
    STEP,
    Pairs,
    Segment,
    axes_of,
    diagonal,
    each_array,
    plane_state,
    record,
    through,
)
from tangents._infinite.tape import Tape, join_sides, map_sides
from tangents._infinite.tile import Layout, Need, Tile, add_up


@dataclasses.dataclass(frozen=True)
class Network:
    """A cut network with what is asked of it. x1, x2: `(N, *spatial, channels)`; x2 None: x1.

    forward: are values alone computed, no derivatives.
    """

    cut: list[Segment]
    moduli: list[tuple[int, ...]]
    want_ntk: bool
    want_gap: bool
    x1: jax.Array
    x2: jax.Array | None
    group: int
    block: tuple[int, int] = (1, 32)
    forward: bool = False

    @property
    def carries(self) -> bool:
        """Is the angular gap carried, which no pooling lets through?"""
        return self.want_gap and self.cut[0].only_equal()

    def record(self, g: int, variance: jax.Array) -> Tape:
        """The tape of a segment, from the variances `(n, *spatial)` before it."""
        segment = self.cut[g]
        axes = axes_of(segment, self.moduli[g], variance.shape[0])
        roots = self.forward and is_single(variance) and segment.reads_norm()
        return record(segment, variance, axes, self.carries, roots, self.forward)

    @property
    def reads(self) -> int:
        """Number of segments up to the last that reads variances."""
        alone = Need(Layout.DIAGONAL, Layout.NONE)
        last = [g for g, s in enumerate(self.cut) if s.walked.needs(alone).side > Layout.NONE]
        return max(last, default=-1) + 1


def _from_inputs(network: Network, x1: jax.Array, x2: jax.Array, want_ntk: bool):
    """The source of the first segment: second moments of the inputs of a group of pairs."""
    channels = x1.shape[-1]
    segment, modulus = network.cut[0], network.moduli[0]
    axes = axes_of(segment, modulus, x1.shape[0])
    ntk = jnp.zeros((), x1.dtype) if want_ntk else None
    if segment.only_equal():  # then only pairs (a, a) are computed one by one
        cov12 = jnp.moveaxis(jnp.sum(x1 * x2, -1), 0, -1) / channels
        gap12 = jnp.zeros_like(cov12) if network.carries else None
        return lambda axes, offset: Tile(cov12, ntk, gap12)
    each2 = jax.vmap(lambda a: arrange(a, axes, 2), -1)(x2)

    def source(axes, offset):
        second = each2
        if offset is not None:
            second = at_offset(each2, offset, axes[0].scale, axes[0].modulus, axis=1)
        # Side 1 is the same at all offsets, and is not written for each of them.
        first = jnp.moveaxis(x1, (-1, 0), (0, -1))[..., None, :]
        apart = second.reshape((*second.shape[:-1], -1, x1.shape[0]))
        cov12 = add_up(a * b for a, b in zip(first, apart, strict=True)) / channels
        return Tile(cov12.reshape(second.shape[1:]), ntk)

    return source


def _from_planes(tile: Tile, dims: int):
    """The source of a later segment: the planes that its strides leave, of those there are."""

    def source(axes, offset):
        def pick(a):
            for k, axis in reversed(list(enumerate(axes))):
                place = dims + k
                if axis.mode == ZERO:
                    a = lax.slice_in_dim(a, 0, 1, 1, place)
                elif axis.mode == LOOP:
                    a = lax.dynamic_slice_in_dim(a, offset * axis.scale, 1, place)
                else:
                    a = lax.slice_in_dim(a, 0, None, axis.scale, place)
            return a.reshape((*a.shape[:dims], -1))

        return each_array(pick, tile)

    return source


def own_pairs(network: Network, x: jax.Array, stop: int, want_ntk: bool) -> Any:
    """The pairs (a, a) of some examples through `stop` segments: `(tapes, tile)`."""
    n = x.shape[0]
    tapes, tile = [], None
    pairs = Pairs(jnp.arange(n), jnp.arange(n), n, jnp.ones((n,), bool))
    for g, segment in enumerate(network.cut[:stop]):
        modulus = network.moduli[g]
        if tile is None:
            variance = jnp.sum(x * x, -1) / x.shape[-1]
            source = _from_inputs(network, x, x, want_ntk)
        else:
            dims = len(segment.before.spatial)
            variance, source = diagonal(tile, dims), _from_planes(tile, dims)
        tape = network.record(g, variance)
        tapes.append(tape)
        if g == stop - 1 and stop < len(network.cut):
            return tapes, None  # nothing reads what is behind
        tile = through(
            segment, modulus, source, tape, tape, pairs, network.carries, network.forward
        )
    return tapes, tile


def other_pairs(
    network: Network, tapes1: list, tapes2: list, x2: jax.Array, pairs: Pairs, kept: list
) -> Tile:
    """A group of pairs through all segments.

    kept: entries of all examples for the segments behind those that have tapes. The pairs (a, a) of
    the group fill in theirs, which are replaced in the list, before the group reads them.
    """
    a = jnp.take(network.x1, pairs.first, axis=0, mode="clip")
    b = jnp.take(x2, pairs.second, axis=0, mode="clip")
    source = _from_inputs(network, a, b, network.want_ntk)
    tile: Any = None
    for g, segment in enumerate(network.cut):
        dims = len(segment.before.spatial)
        if g:
            source = _from_planes(tile, dims)
        if g < len(tapes1):
            tape1, tape2 = tapes1[g], tapes2[g]
        elif g < len(tapes1) + len(kept):
            tape1 = tape2 = network.record(g, diagonal(tile, dims))
            place = g - len(tapes1)
            tape1.entries = kept[place] = _filled(tape1, kept[place], pairs)
        else:
            tape1 = tape2 = _silent(network, g)
        tile = through(
            segment,
            network.moduli[g],
            source,
            tape1,
            tape2,
            pairs,
            network.carries,
            network.forward,
        )
    return tile


def _filled(tape: Tape, kept: list, pairs: Pairs) -> list:
    """Entries of all examples with those of the pairs (a, a) of a group in their places.

    Of other pairs the entries are nonsense, may be NaN, and are dropped.
    """

    def fill(all_of_them, some, axis):
        n = all_of_them.shape[axis]
        if pairs.size == 1:
            place = pairs.first[0].astype(jnp.uint32)  # which cannot be negative: no look for that
            old = lax.dynamic_slice_in_dim(all_of_them, place, 1, axis)
            new = jnp.where(pairs.same[0], some, old)
            return lax.dynamic_update_slice_in_dim(all_of_them, new, place, axis)
        places = (slice(None),) * axis + (jnp.where(pairs.same, pairs.first, n),)
        return all_of_them.at[places].set(some, mode="drop")

    return jax.tree.map(fill, kept, tape.entries, tape.map(lambda a, axis: axis, tape.entries))


def _silent(network: Network, g: int) -> Tape:
    """The tape of a segment whose layers read nothing."""
    segment = network.cut[g]
    variance = jnp.zeros((1, *segment.before.spatial), network.x1.dtype)
    tape = network.record(g, variance)
    tape.entries = jax.tree.map(lambda a: None, tape.entries)
    return tape


def _groups(n: int, size: int) -> np.ndarray:
    """Numbers 0 ... n-1 in groups of `size`; the last is repeated to fill up."""
    count = -(-n // size)
    return np.minimum(np.arange(count * size), n - 1).reshape(count, size)


def _own(network: Network, x: jax.Array, stop: int, want_ntk: bool) -> Any:
    """`own_pairs` of all examples, in groups."""
    alone = stop < 2 and stop < len(network.cut)  # variances before the first segment alone
    if alone and network.forward and x[..., 0].size <= STEP:
        return own_pairs(network, x, stop, want_ntk)
    groups = _groups(x.shape[0], min(network.group, x.shape[0]))
    recorded = []

    @jax.checkpoint
    def one(index):
        tapes, tile = own_pairs(network, jnp.take(x, index, axis=0), stop, want_ntk)
        recorded[:] = [tape.holding(None) for tape in tapes]
        return [t.entries for t in tapes], tile

    stacked, tile = lax.map(one, jnp.asarray(groups))
    n = x.shape[0]

    def join(a, axis):
        a = jnp.moveaxis(a, 0, axis)
        a = a.reshape((*a.shape[:axis], -1, *a.shape[axis + 2 :]))
        return lax.slice_in_dim(a, 0, n, axis=axis)

    tapes = [
        tape.holding(tape.map(join, entries))
        for entries, tape in zip(stacked, recorded, strict=True)
    ]
    if tile is not None:
        tile = Tile(*(a if a is None else join(a, 0) if a.ndim == 2 else a[0] for a in tile))
    return tapes, tile


class _Inputs(NamedTuple):
    """Inputs with the examples on the last axis, where a block of them is a slice.

    channels: `(C, *spatial, N)`; where the gap is carried divided by roots `(*spatial, N)`, the
    root of each position's second moment, else None.
    """

    channels: jax.Array
    roots: jax.Array | None


def _inputs(x: jax.Array, want_gap: bool) -> _Inputs:
    channels = jnp.moveaxis(jnp.moveaxis(x, 0, -1), -2, 0)
    if not want_gap:
        return _Inputs(channels, None)
    roots = safe_sqrt(jnp.sum(channels * channels, axis=0) / channels.shape[0])
    return _Inputs(channels * reciprocal(roots), roots)


def _examples_last(tape: Tape) -> list:
    return map_sides(lambda a, axis: jnp.moveaxis(a, axis, -1), tape.entries)


def _block(tree: Any, start: Any, size: int, place: int) -> Any:
    """Some examples, from the last axis: as `(..., size, 1)` for place -1."""

    def take(a):
        return jnp.expand_dims(lax.dynamic_slice_in_dim(a, start, size, axis=-1), place)

    return jax.tree.map(take, tree)


def _moments(one: _Inputs, two: _Inputs, known: Any) -> tuple[Any, Any]:
    """`(cov12, gap12)` of two blocks of inputs, `(*spatial, t1, t2)`."""
    channels = one.channels.shape[0]

    def mean(fn):
        if channels > _UNROLLED:
            return jnp.sum(fn(one.channels, two.channels), axis=0) / channels
        each = zip(one.channels, two.channels, strict=True)
        return add_up(fn(u, v) for u, v in each) / channels

    cosine = mean(lambda u, v: u * v)
    if one.roots is None or two.roots is None:
        return cosine, None
    sign = jnp.where(cosine < 0, -1, 1).astype(cosine.dtype)
    relative = mean(lambda u, v: (u - sign * v) ** 2) / 2
    s = one.roots * two.roots
    gap12 = s * jnp.minimum(relative, 1)
    if known is not None:
        gap12 = jnp.where(known, 0, gap12)
    return jnp.where(gap12 < s / 2, sign * (s - gap12), s * cosine), gap12


_UNROLLED = 16
"""Channels up to which sums over them are written out: reductions of few terms are slow."""


def rectangle(
    network: Network, inputs: tuple, tapes: tuple, starts: Any, sizes: Any, same: Any
) -> Tile:
    """A block of examples against a block, of a network that needs equal positions only.

    Arrays end in the axes of both blocks, so variances stay as small as the blocks.
    inputs, tapes: of both sides, examples last.
    """
    (i, j), (t1, t2) = starts, sizes
    known = None
    if same is not None:
        first = lax.dynamic_slice_in_dim(same[0], i, t1)
        second = lax.dynamic_slice_in_dim(same[1], j, t2)
        known = same[2] & (first[:, None] == second[None])
    blocks = _block(inputs[0], i, t1, -1), _block(inputs[1], j, t2, -2)
    cov12, gap12 = _moments(*keep_apart(blocks), known)
    tile = Tile(cov12, jnp.zeros((), cov12.dtype) if network.want_ntk else None, gap12)
    for g, segment in enumerate(network.cut):
        axes = tuple(Axis(1, s, ZERO) for s in segment.strides)
        planes = Planes(axes, t1 * t2, None, known)
        state = plane_state(segment, tile, None, planes, t1)
        if g < min(map(len, tapes)):
            one, two = _block(tapes[0][g], i, t1, -1), _block(tapes[1][g], j, t2, -2)
        else:
            one = two = _silent(network, g).entries
        tape = Tape(network.carries, join_sides(one, two))
        need = Need(Layout.PLANES, Layout.NONE)
        tile = run(segment.walked, state, need, (None, None), {}, tape).tile
    return tile


def compute_rectangles(
    network: Network, same: Any, tapes1: list, tapes2: list, block: tuple[int, int]
) -> Tile:
    """All pairs of a network that needs equal positions only, `(N1, N2)`."""
    n1 = network.x1.shape[0]
    n2 = n1 if network.x2 is None else network.x2.shape[0]
    symmetric = network.x2 is None
    sizes = min(block[0], n1), min(block[1], n2)
    rows, columns = grid(n1, n2, *sizes, symmetric)
    one_side = _inputs(network.x1, network.carries), [*map(_examples_last, tapes1)]
    other_side = one_side
    if network.x2 is not None:
        other_side = _inputs(network.x2, network.carries), [*map(_examples_last, tapes2)]
    inputs, tapes = zip(one_side, other_side, strict=True)

    @jax.checkpoint
    def one(i, j):
        tile = rectangle(network, inputs, tapes, (i, j), sizes, same)
        return tile._replace(gap12=None)

    def body(k, buffers):
        i, j = row_starts[k], column_starts[k]

        def put(buffer, part):
            if not part.ndim:
                return buffer
            buffer = lax.dynamic_update_slice(buffer, part, (i, j))
            return lax.dynamic_update_slice(buffer, part.T, (j, i)) if symmetric else buffer

        return jax.tree.map(put, buffers, one(i, j))

    row_starts, column_starts = jnp.asarray(rows), jnp.asarray(columns)
    shapes = jax.eval_shape(one, 0, 0)
    buffers = jax.tree.map(lambda a: jnp.zeros((n1, n2) if a.ndim else (), a.dtype), shapes)
    return lax.fori_loop(0, len(rows), body, buffers)


def compute_segments(network: Network, same: Any, want_sides: bool) -> tuple[Tile, Any, Any]:
    """`(tile, variances of x1, of x2)` at the output: `(N1, N2)`, `(N1,)`, `(N2,)`.

    same: None, or `(numbers of x1, numbers of x2, are the inputs equal)`.
    """
    if network.cut[0].only_equal():
        tapes1, tapes2, *sides = _both_sides(network, want_sides)
        return compute_rectangles(network, same, tapes1, tapes2, network.block), *sides
    layers = [(segment.nodes, segment.close) for segment in network.cut]

    def compute(forward, layers, x1, x2, same):
        cut = [
            dataclasses.replace(segment, nodes=nodes, close=close)
            for segment, (nodes, close) in zip(network.cut, layers, strict=True)
        ]
        return _by_planes(
            dataclasses.replace(network, cut=cut, x1=x1, x2=x2, forward=forward), same, want_sides
        )

    # Values alone are cheaper in ways that have no derivatives, or none in little memory.
    value = jax.custom_jvp(functools.partial(compute, True))
    value.defjvp(functools.partial(jax.jvp, functools.partial(compute, False)))
    return value(layers, network.x1, network.x2, same)


def _by_planes(network: Network, same: Any, want_sides: bool) -> tuple[Tile, Any, Any]:
    n1 = network.x1.shape[0]
    if network.x2 is None:
        one = network.forward or network.reads <= 1
        line, place = one_loop(network) if one else two_loops(network), _places(n1)
        square = each_array(lambda a: jnp.take(a, jnp.asarray(place)), line)
        return square, line.cov12[:n1] if want_sides else None, None
    n2 = network.x2.shape[0]
    tapes1, tapes2, *sides = _both_sides(network, want_sides)
    i, j = (a.ravel() for a in np.meshgrid(np.arange(n1), np.arange(n2), indexing="ij"))

    def known(first, second):
        if same is None:
            return None
        return same[2] & (jnp.take(same[0], first) == jnp.take(same[1], second))

    line = _line_of_pairs(network, tapes1, tapes2, i, j, known)
    return each_array(lambda a: a.reshape((n1, n2)), line), *sides


def _both_sides(network: Network, want_sides: bool) -> tuple[list, list, Any, Any]:
    """`(tapes of x1, of x2, variances of x1, of x2)`, the latter at the output, if wanted."""
    x1, x2 = network.x1, network.x2
    n1, stop = x1.shape[0], len(network.cut) if want_sides else network.reads
    # As one batch: the program of the pairs (a, a) is compiled once.
    both = x1 if x2 is None else jnp.concatenate([x1, x2])
    tapes, own = _own(network, both, stop, False)
    sides = None if own is None else own.cov12
    if x2 is None:
        return tapes, tapes, sides, None

    def some(start, end):
        def cut(a, axis):
            return lax.slice_in_dim(a, start, end, axis=axis)

        kept = [tape.holding(tape.map(cut, tape.entries)) for tape in tapes]
        return kept, None if sides is None else sides[start:end]

    (tapes1, side1), (tapes2, side2) = some(0, n1), some(n1, both.shape[0])
    return tapes1, tapes2, side1, side2


def _line_of_pairs(
    network: Network, tapes1: list, tapes2: list, i: np.ndarray, j: np.ndarray, known: Any
) -> Tile:
    """Pairs (i, j) in groups: arrays `(pairs,)`. known: which are one example, of their numbers."""

    @jax.checkpoint
    def one(group):
        first, second = group
        pairs = Pairs(first, second, first.shape[0], known(first, second))
        x2 = network.x1 if network.x2 is None else network.x2
        return other_pairs(network, tapes1, tapes2, x2, pairs, [])

    groups = _groups(len(i), min(network.group, len(i)))
    parts = lax.map(one, (jnp.asarray(i[groups]), jnp.asarray(j[groups])))
    return Tile(*(_line(a, len(i)) for a in parts))


def _places(n: int) -> np.ndarray:
    """Where the pair (i, j) or (j, i) stands in `_upper`, `(n, n)`."""
    i, j = _upper(n)
    place = np.zeros((n, n), int)
    place[i, j] = place[j, i] = np.arange(len(i))
    return place


def _upper(n: int) -> tuple[np.ndarray, np.ndarray]:
    """The pairs on and above the diagonal, (a, a) first."""
    i, j = np.triu_indices(n, 1)
    return np.concatenate([np.arange(n), i]), np.concatenate([np.arange(n), j])


def one_loop(network: Network) -> Tile:
    """The pairs `_upper` of one batch in the order they stand in, as one loop.

    The variances before the first segment are those of the inputs. Of the later ones they are what
    the pairs (a, a) make of them: these come first, and leave their tapes in buffers.
    """
    x, reads = network.x1, network.reads
    tapes, _ = _own(network, x, min(reads, 1), False)
    i, j = _upper(x.shape[0])
    if reads <= 1:
        return _line_of_pairs(network, tapes, tapes, i, j, jnp.equal)

    def step(kept, group):
        first, second = group
        pairs = Pairs(first, second, first.shape[0], first == second)
        kept = list(kept)
        return kept, other_pairs(network, tapes, tapes, x, pairs, kept)

    kept = [_empty(network, g) for g in range(1, reads)]
    groups = _groups(len(i), min(network.group, len(i)))
    _, parts = lax.scan(step, kept, (jnp.asarray(i[groups]), jnp.asarray(j[groups])))
    return Tile(*(_line(a, len(i)) for a in parts))


def _empty(network: Network, g: int) -> list:
    """Entries of a segment's tape for all examples, zeros."""
    variance = jnp.zeros((network.x1.shape[0], *network.cut[g].before.spatial), network.x1.dtype)
    shapes = jax.eval_shape(lambda v: network.record(g, v).entries, variance)
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)


def two_loops(network: Network) -> Tile:
    """`one_loop`, the pairs (a, a) before all others: what is differentiated."""
    x, n = network.x1, network.x1.shape[0]
    tapes, own = _own(network, x, len(network.cut), network.want_ntk)
    if n == 1:
        return own
    i, j = (a[n:] for a in _upper(n))
    rest = _line_of_pairs(network, tapes, tapes, i, j, lambda first, second: None)
    pairs = zip(own, rest, strict=True)
    return Tile(*(a if a is None or a.ndim == 0 else jnp.concatenate([a, b]) for a, b in pairs))


def _line(a: Any, n: int) -> Any:
    return a if a is None else a.reshape(-1)[:n] if a.ndim == 2 else a[0]


def block_size(cut: list[Segment]) -> tuple[int, int]:
    """Examples in a block of `rectangle`: the second axis is the one that is vectorised."""
    pairs = 2 * STEP // math.prod(cut[0].before.spatial)
    second = 8 if pairs < 256 else 16
    return max(pairs // second, 1), second


def group_size(cut: list[Segment], modulus: tuple[int, ...], carries: bool) -> int:
    """Pairs in a group, so that a step of the first loop stays in cache."""
    first = cut[0]
    if first.only_equal():
        return max(STEP // math.prod(first.before.spatial), 1)
    step = math.prod(first.before.spatial) * math.prod(
        m // s for m, s in zip(modulus[1:], first.strides[1:], strict=True)
    )
    return max(STEP // step, 1)
