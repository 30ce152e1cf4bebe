"""All pairs of a convolutional network, by segments and planes (`segments.py`, `planes.py`).

A network that needs equal positions only (it ends in Flatten, without a pooling) is computed in
rectangles, a block of examples of x1 against a block of x2, with variances as small as the blocks.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tangents._infinite.barrier import keep_apart
from tangents._infinite.blocks import grid
from tangents._infinite.dual.angle import reciprocal, safe_sqrt
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
    """A cut network with what is asked of it. x1, x2: `(N, *spatial, channels)`; x2 None: x1."""

    cut: list[Segment]
    moduli: list[tuple[int, ...]]
    want_ntk: bool
    want_gap: bool
    x1: jax.Array
    x2: jax.Array | None
    group: int
    block: tuple[int, int] = (1, 32)

    @property
    def carries(self) -> bool:
        """Is the angular gap carried, which no pooling lets through?"""
        return self.want_gap and self.cut[0].only_equal()

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
    each1 = [arrange(x1[..., c], axes, 1) for c in range(channels)]
    each2 = [arrange(x2[..., c], axes, 2) for c in range(channels)]

    def source(axes, offset):
        def second(b):
            return b if offset is None else at_offset(b, offset, axes[0].scale, axes[0].modulus)

        products = (a * second(b) for a, b in zip(each1, each2, strict=True))
        return Tile(add_up(products) / channels, ntk)

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
        axes = axes_of(segment, modulus, n)
        tape = record(segment, variance, axes, network.carries)
        tapes.append(tape)
        if g == stop - 1 and stop < len(network.cut):
            return tapes, None  # nothing reads what is behind
        tile = through(segment, modulus, source, tape, tape, pairs, network.carries)
    return tapes, tile


def other_pairs(network: Network, tapes1: list, tapes2: list, x2: jax.Array, pairs: Pairs) -> Tile:
    """A group of pairs through all segments."""
    a, b = jnp.take(network.x1, pairs.first, axis=0), jnp.take(x2, pairs.second, axis=0)
    source = _from_inputs(network, a, b, network.want_ntk)
    tile: Any = None
    for g, segment in enumerate(network.cut):
        if g:
            source = _from_planes(tile, len(segment.before.spatial))
        tape1 = tapes1[g] if g < len(tapes1) else _silent(network, g)
        tape2 = tapes2[g] if g < len(tapes2) else tape1
        tile = through(segment, network.moduli[g], source, tape1, tape2, pairs, network.carries)
    return tile


def _silent(network: Network, g: int) -> Tape:
    """The tape of a segment whose layers read nothing."""
    segment = network.cut[g]
    axes = axes_of(segment, network.moduli[g], 1)
    variance = jnp.zeros((1, *segment.before.spatial), network.x1.dtype)
    tape = record(segment, variance, axes, False)
    tape.entries = jax.tree.map(lambda a: None, tape.entries)
    return tape


def _groups(n: int, size: int) -> np.ndarray:
    """Numbers 0 ... n-1 in groups of `size`; the last is repeated to fill up."""
    count = -(-n // size)
    return np.minimum(np.arange(count * size), n - 1).reshape(count, size)


def _own(network: Network, x: jax.Array, stop: int, want_ntk: bool) -> Any:
    """`own_pairs` of all examples, in groups."""
    groups = _groups(x.shape[0], min(network.group, x.shape[0]))
    scales = []

    @jax.checkpoint
    def one(index):
        tapes, tile = own_pairs(network, jnp.take(x, index, axis=0), stop, want_ntk)
        scales[:] = [t.scales for t in tapes]
        return [t.entries for t in tapes], tile

    stacked, tile = lax.map(one, jnp.asarray(groups))
    n = x.shape[0]

    def join(a, axis):
        a = jnp.moveaxis(a, 0, axis)
        a = a.reshape((*a.shape[:axis], -1, *a.shape[axis + 2 :]))
        return lax.slice_in_dim(a, 0, n, axis=axis)

    tapes = []
    for entries, scale in zip(stacked, scales, strict=True):
        tape = Tape(network.carries)
        tape.entries, tape.scales = map_sides(join, entries), scale
        tapes.append(tape)
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
    x1, x2 = network.x1, network.x2
    whole, n1 = len(network.cut), network.x1.shape[0]
    symmetric = x2 is None
    equal_only = network.cut[0].only_equal()
    # Where variances need no walk over planes, the pairs (a, a) go with the others: the program is
    # half as long. Elsewhere they have to go first, and would be computed twice.
    together = symmetric and not equal_only and not want_sides and network.reads <= 1
    own = symmetric and not equal_only and not together
    stop = whole if own or want_sides else network.reads
    tapes1, own1 = _own(network, x1, stop, own and network.want_ntk)
    tapes2, own2 = tapes1, own1
    if x2 is not None:
        tapes2, own2 = _own(network, x2, stop, False)
        i, j = (a.ravel() for a in np.meshgrid(*map(np.arange, (n1, x2.shape[0])), indexing="ij"))
    else:
        i, j = np.triu_indices(n1, 0 if together else 1)
    if equal_only:
        tile = compute_rectangles(network, same, tapes1, tapes2, network.block)
        sides = [None if own is None else own.cov12 for own in (own1, own2)]
        return tile, sides[0], None if symmetric else sides[1]
    n2 = n1 if x2 is None else x2.shape[0]

    @jax.checkpoint
    def one(group):
        first, second = group
        known = first == second if together else None
        if same is not None and not symmetric:
            known = same[2] & (jnp.take(same[0], first) == jnp.take(same[1], second))
        pairs = Pairs(first, second, first.shape[0], known)
        return other_pairs(network, tapes1, tapes2, x1 if x2 is None else x2, pairs)

    tile = None
    if len(i):
        groups = _groups(len(i), min(network.group, len(i)))
        parts = lax.map(one, (jnp.asarray(i[groups]), jnp.asarray(j[groups])))
        tile = Tile(*(_line(a, len(i)) for a in parts))

    def matrix(a, own):
        if (a if own is None else own).ndim == 0:
            return a if own is None else own
        out = jnp.zeros((n1, n2), x1.dtype)
        if a is not None:
            out = out.at[i, j].set(a)
        if symmetric and a is not None:
            out = out.at[j, i].set(a)
        return out if own is None else out.at[np.arange(n1), np.arange(n1)].set(own)

    cov12 = matrix(tile and tile.cov12, own1.cov12 if own else None)
    ntk = None
    if network.want_ntk:
        ntk = matrix(tile and tile.ntk, own1.ntk if own else None)
    sides = [None if side is None else side.cov12 for side in (own1, own2)]
    return Tile(cov12, ntk), sides[0], None if symmetric else sides[1]


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
