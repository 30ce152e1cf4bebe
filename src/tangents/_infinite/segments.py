"""Networks of convolutions plane by plane: runs of layers between poolings (see `planes.py`).

A network is cut into *segments*: layers that never leave a plane, closed by one that mixes planes
(a pooling) or picks one (Flatten). Pairs of examples go through the segments in groups. What the
layers of a segment read of variances is on a tape, recorded by a walk over equal positions: of the
inputs for the first segment, and later of offset 0 of the pairs (a, a), which come before the pairs
that read it. How the groups are made and put together: `convolutional.py`.

Inside a segment the offsets of the first axis are a loop, so that what one step touches stays in
cache; the pooling at its end runs over the second axis inside the loop, and over the first behind
it.

Compiling takes as long as running some hundred pairs: XLA on CPU takes 20 to 50 ms for each kernel,
but nothing for one that is equal to another to the last constant. So layers of one shape read
arrays of their own (masks, sides) rather than what these are made of.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tangents._infinite.barrier import keep_apart
from tangents._infinite.blocks import resize
from tangents._infinite.execute import State, run
from tangents._infinite.graph import Node, Parallel, Repeat, Serial, any_node, join_needs
from tangents._infinite.layers.window import Padding
from tangents._infinite.planes import (
    ALL,
    LOOP,
    ZERO,
    Axis,
    Passed,
    Planes,
    Pooled,
    looped_insides,
    pool,
    valid_positions,
)
from tangents._infinite.sides import Pairs, norms, stacked, variances
from tangents._infinite.tape import Tape
from tangents._infinite.tile import Layout, Need, Signal, Tile

STEP = 2**15
"""Entries of one array in a step of the loop: 128 KiB in float32, a part of a core's cache."""


class Unplanned(Exception):
    """The network has a layer that offset planes do not serve."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """Layers that stay in their planes, and the one that closes them (None at the end).

    before, after: signals before the layers and before the closing one. start: place of the first
    layer. strides: their product, per spatial axis.
    """

    nodes: tuple[Node, ...]
    close: Any
    before: Signal
    after: Signal
    start: int
    strides: tuple[int, ...]

    @property
    def walked(self) -> Serial:
        """The layers that the walk passes: Flatten keeps to offset 0."""
        if self.close is None or _closing(self.close) != "flatten":
            return Serial(self.nodes, self.start)
        return Serial((*self.nodes, self.close), self.start)

    def reads_norm(self) -> bool:
        """Do its layers read no more of variances than sqrt(var1 var2)?"""
        alone = Need(Layout.DIAGONAL, Layout.NONE)

        def reads_more(node):
            inside = node.children() or node.reads_norm
            return not inside and join_needs(node.needs(alone)).side > Layout.NONE

        return not any_node(self.walked, reads_more)

    def only_equal(self) -> bool:
        """Is offset 0 all that is needed?"""
        return _closing(self.close) == "flatten" or not self.before.spatial


def _strides(node: Node, signal: Signal) -> tuple[int, ...] | list:
    """Product of the strides of a run of layers; raises where a layer leaves its plane."""
    ones = (1,) * len(signal.spatial)
    if isinstance(node, Serial):
        total: Any = ones
        for child in node.nodes:
            total = _combine(total, child, signal)
            signal = child.signal(signal)
        return total
    if isinstance(node, Repeat):
        if any(s != 1 for s in _strides(node.node, signal)):
            raise Unplanned
        return ones
    if not node.plane_wise:
        raise Unplanned
    return node.plane_strides(signal)


def _combine(total: Any, child: Node, signal: Any) -> Any:
    """Strides after one more layer; lists while there are branches."""
    if isinstance(child, Parallel):
        if not isinstance(total, list):
            raise Unplanned
        pairs = zip(total, child.nodes, signal, strict=True)
        return [tuple(np.multiply(t, _strides(c, s)).tolist()) for t, c, s in pairs]
    if isinstance(child, Serial):
        for inner in child.nodes:
            total = _combine(total, inner, signal)
            signal = inner.signal(signal)
        return total
    if isinstance(total, list):
        if not child.plane_wise or not child.many_inputs or len(set(total)) > 1:
            raise Unplanned
        return total[0]
    out = child.signal(signal)
    if isinstance(out, list):
        if not child.plane_wise:
            raise Unplanned
        return [total] * len(out)
    return tuple(np.multiply(total, _strides(child, signal)).tolist())


def _flat(node: Node) -> list[Node]:
    if isinstance(node, Serial):
        return [n for child in node.nodes for n in _flat(child)]
    return [node]


def _closes(node: Node, signal: Signal) -> bool:
    if node.closes_planes == "windows":
        if node.normalize_edges or node.padding == Padding.CIRCULAR:  # pyright: ignore
            raise Unplanned
        return True
    return bool(node.closes_planes and signal.spatial)


def _closing(node: Node | None) -> str:
    return "" if node is None else node.closes_planes


def segments(node: Node, signal: Signal) -> list[Segment]:
    """Cut a network; raises `Unplanned` where it cannot be."""
    nodes, out, run_of, start = _flat(node), [], [], 0
    before: Any = signal
    total: Any = (1,) * len(signal.spatial)
    for i, child in enumerate(nodes):
        if isinstance(signal, Signal) and _closes(child, signal):
            merged = None if run_of or not out else _merged(out[-1], child, signal)
            if merged is not None:
                out[-1] = dataclasses.replace(out[-1], close=merged)
                signal = before = child.signal(signal)
                start = i + 1
                continue
            out.append(Segment(tuple(run_of), child, before, signal, start, total))
            signal = before = child.signal(signal)
            run_of, start, total = [], i + 1, (1,) * len(signal.spatial)
            continue
        if not isinstance(child, (Parallel, Repeat)) and not child.plane_wise:
            raise Unplanned
        total = _combine(total, child, signal)
        signal = child.signal(signal)
        run_of.append(child)
    if isinstance(signal, list) or signal.spatial:
        raise Unplanned
    return [*out, Segment(tuple(run_of), None, before, signal, start, total)]


def _merged(last: Segment, node: Any, signal: Signal) -> Node | None:
    """Two poolings in a row as one, if windows of the first meet each position once, or None."""
    first: Any = last.close
    if _closing(first) != "windows" or _closing(node) != "windows" or first.average != node.average:
        return None
    one, two = first._windows(last.after.shape), node._windows(signal.shape)
    edges = any(w.lo or w.hi for w in (*one, *two))
    if edges or any(w.stride != w.size for w in one):
        return None
    pairs = list(zip(one, two, strict=True))
    return dataclasses.replace(
        first,
        window_shape=tuple(a.size * b.size for a, b in pairs),
        strides=tuple(a.stride * b.stride for a, b in pairs),
        padding=Padding.VALID,
    )


def moduli(cut: list[Segment]) -> list[tuple[int, ...]]:
    """M of each axis at the start of each segment: sizes rounded up to all strides that follow."""
    sizes = cut[0].before.spatial
    total = [1] * len(sizes)
    for segment in cut:
        if segment.before.spatial:
            steps = _steps(segment)
            total = [t * s * p for t, s, p in zip(total, segment.strides, steps, strict=True)]
    out, current = [], [-(-n // t) * t for n, t in zip(sizes, total, strict=True)]
    for segment in cut:
        out.append(tuple(current) if segment.before.spatial else ())
        if segment.before.spatial:
            steps = _steps(segment)
            current = [
                c // (s * p) for c, s, p in zip(current, segment.strides, steps, strict=True)
            ]
    return out


def fits(cut: list[Segment]) -> bool:
    """Do the sizes go with planes: poolings divide, and what wraps around has M positions?"""
    for segment, modulus in zip(cut, moduli(cut), strict=True):
        if segment.only_equal():
            continue
        signal, here = segment.before, modulus
        for node in segment.nodes:
            if not _wraps_whole(node, signal, here):
                return False
            strides = _combine((1,) * len(here), node, signal)
            if isinstance(strides, list):
                break  # branches join in the next layer; inside them nothing wraps (see below)
            signal = node.signal(signal)
            here = tuple(h // s for h, s in zip(here, strides, strict=True))
    return True


def _wraps_whole(node: Node, signal: Any, modulus: tuple[int, ...]) -> bool:
    if getattr(node, "padding", None) == Padding.CIRCULAR:
        return isinstance(signal, Signal) and signal.spatial == modulus
    return all(_wraps_whole(child, None, modulus) for child in node.children())


def _steps(segment: Segment) -> tuple[int, ...]:
    if _closing(segment.close) == "windows":
        return segment.close.strides
    return (1,) * len(segment.before.spatial)


# ---- one segment ---------------------------------------------------------------------------------


def axes_of(segment: Segment, modulus: tuple[int, ...], pairs: int) -> tuple[Axis, ...]:
    """What is held of each spatial axis while so many pairs pass a segment."""
    if segment.only_equal():
        return tuple(Axis(1, s, ZERO) for s in segment.strides)
    planes = [m // s for m, s in zip(modulus, segment.strides, strict=True)]
    size = math.prod(planes) * math.prod(segment.before.spatial) * pairs
    first = LOOP if size > 2 * STEP and len(planes) > 0 else ALL
    return tuple(
        Axis(p, s, ALL if k else first)
        for k, (p, s) in enumerate(zip(planes, segment.strides, strict=True))
    )


def _passed(node: Node, signal: Any, scale: int) -> list[Passed]:
    """The windows of a run of layers along the first axis. scale: of the planes before it."""
    out = []
    if isinstance(node, Parallel):
        for child, each in zip(node.nodes, signal, strict=True):
            out += _passed(child, each, scale)
        return out
    inside = node.nodes if isinstance(node, Serial) else node.children()
    for child in inside:
        out += _passed(child, signal, scale)
        scale //= _first_stride(child, signal)
        signal = child.signal(signal)
    if not inside:
        for w in node.plane_windows(signal)[:1]:
            out.append((signal.spatial[0], scale // w.stride, w))
    return out


def _first_stride(node: Node, signal: Any) -> int:
    if isinstance(node, Parallel):
        return _first_stride(node.nodes[0], signal[0])
    if isinstance(node, Serial):
        total = 1
        for child in node.nodes:
            total *= _first_stride(child, signal)
            signal = child.signal(signal)
        return total
    many = isinstance(signal, list)
    return 1 if many or isinstance(node, Repeat) else node.plane_strides(signal)[0]


def _same(pairs: Pairs, axes: tuple[Axis, ...], offset: Any) -> Any:
    """Entries (Q,) of an example with itself at one position."""
    if pairs.same is None:
        return None
    same: Any = np.ones((1,), bool)
    for axis in axes[::-1]:
        here: Any = np.arange(axis.held) == 0
        if axis.mode == LOOP:
            here = jnp.reshape(jnp.asarray(offset) == 0, (1,))
        same = (here[:, None] & same).reshape(-1)
    return (same[:, None] & pairs.same).reshape(-1)


def plane_state(segment: Segment, tile: Any, side: Any, planes: Planes, n: int) -> State:
    """The state before a segment: of planes with a tile, of variances without one."""
    signal = resize(segment.before, n)
    return State(
        tile=tile,
        side1=side,
        side2=None,
        mask1=None,
        mask2=None,
        index1=None,
        index2=None,
        x1_is_x2=None,
        in1=signal,
        in2=signal,
        layout=Layout.DIAGONAL if tile is None else Layout.PLANES,
        side_layout=Layout.NONE if side is None else Layout.DIAGONAL,
        side_pairs=False,
        shared=tile is None,
        planes=planes,
    )


def record(
    segment: Segment,
    variance: jax.Array,
    axes: tuple[Axis, ...],
    keep: bool,
    roots: bool,
    apart: bool,
) -> Tape:
    """What the layers of a segment read of the variances `(n, *spatial)` before it.

    roots: do the layers read square roots of them.
    """
    n = variance.shape[0]
    state = plane_state(segment, None, variance, Planes(axes, n, apart=apart), n)
    tape = Tape(keep, None, roots)
    need = Need(Layout.DIAGONAL, Layout.DIAGONAL)
    run(segment.walked, state, need, (None, None), {}, tape)
    return stacked(tape) if roots else tape


def through(
    segment: Segment,
    modulus: tuple[int, ...],
    source: Callable[[tuple[Axis, ...], Any], Tile],
    tape1: Tape,
    tape2: Tape,
    pairs: Pairs,
    want_gap: bool,
    apart: bool,
) -> Any:
    """A group of pairs through a segment and the layer that closes it.

    source: `(axes, offset) -> tile` at the input, arrays `(*spatial, Q)`.

    Returns:
      `(cov12, ntk, gap12)`: `(*spatial, *offsets, P)` of all offsets where positions are left, else
      `(P,)`.
    """
    axes = axes_of(segment, modulus, pairs.size)
    lay = norms if tape1.roots else variances
    sides = lay(tape1, tape2, pairs, axes)
    looped = bool(axes) and axes[0].mode == LOOP
    passed = _passed(segment.walked, segment.before, axes[0].scale) if axes else []

    def at(offset: Any) -> Any:
        entries, offset = sides(offset)
        tile = source(axes, offset)
        tile = keep_apart(tile) if apart and passed else tile
        same = _same(pairs, axes, offset)
        planes = Planes(axes, pairs.size, offset, same, tape1.roots, apart)
        if looped:
            planes = planes.replace(
                inside=looped_insides(axes[0], passed, offset, tile.cov12.dtype)
            )
        state = plane_state(segment, tile, None, planes, pairs.size)
        tape = Tape(want_gap, entries)
        state = run(segment.walked, state, Need(Layout.PLANES, Layout.NONE), (None, None), {}, tape)
        return _close_inner(segment, state.tile, state.planes)

    if not looped:
        return _close_outer(segment, at(None), Planes(_final(axes), pairs.size), False).whole()
    fn = jax.checkpoint(at)
    start, length = jnp.zeros((), int), axes[0].planes
    _, tiles = lax.scan(lambda d, _: (d + 1, fn(d)), start, None, length)
    return _close_outer(segment, tiles, Planes(_final(axes), pairs.size), True).whole()


def _final(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
    return tuple(dataclasses.replace(a, scale=1) for a in axes)


def each_array(fn: Callable[[Any], Any], tile: Tile) -> Tile:
    """`fn` on the arrays of a tile; a zero without axes stays."""
    return jax.tree.map(lambda a: fn(a) if a.ndim else a, tile)


def _close_inner(segment: Segment, tile: Tile, planes: Planes) -> Tile:
    """The closing layer inside the loop: on all axes but the looped one."""
    close, sizes = segment.close, segment.after.spatial
    if not sizes or _closing(close) == "flatten":
        return tile
    held = planes.held
    tile = each_array(lambda a: a.reshape((*a.shape[:-1], *held, planes.pairs)), tile)
    if _closing(close) == "everything":
        valid = [
            _valid_axis(planes, k, n, len(sizes))
            for k, n in enumerate(sizes)
            if not (planes.axes[k].mode == ALL and planes.axes[k].modulus == n)
        ]

        def total(a):
            for v in valid:
                a = a * v.astype(a.dtype)
            return jnp.sum(a, axis=tuple(range(a.ndim - 1)))

        return each_array(total, tile)
    ws = close._windows(segment.after.shape)  # pyright: ignore
    scale = math.prod(close.window_shape) if close.average else 1  # pyright: ignore

    axes = [
        Pooled(k, len(sizes) + k, n, axis.planes, ws[k])
        for k, (n, axis) in enumerate(zip(sizes, planes.axes, strict=True))
        if axis.mode == ALL
    ]
    looped = len(axes) < len(sizes)
    return each_array(lambda a: pool(a, axes, not looped) / scale**2, tile)


def _valid_axis(planes: Planes, k: int, n: int, dims: int) -> jax.Array:
    axis = planes.axes[k]
    if axis.mode == ALL:
        valid = jnp.asarray(valid_positions(n, axis.modulus))
    else:
        valid = ((jnp.arange(n) + planes.offset) % axis.modulus < n)[:, None]
    shape = [1] * (2 * dims + 1)
    shape[k], shape[dims + k] = valid.shape
    return valid.reshape(shape)


def _close_outer(segment: Segment, tile: Tile, planes: Planes, looped: bool) -> Tile:
    """What is left of the closing layer behind the loop, whose axis is in front."""
    close, sizes = segment.close, segment.after.spatial
    if not sizes or _closing(close) == "flatten":
        return tile
    dims = len(sizes)
    if _closing(close) == "everything":
        if looped:
            tile = each_array(lambda a: jnp.sum(a, axis=0), tile)
        scale = math.prod(sizes) ** 2 if close.average else 1
        return each_array(lambda a: a / scale, tile)
    if looped:  # (d0, *positions, 1, *offsets, P)
        tile = jax.tree.map(lambda a: a[0] if a.ndim == 1 else a, tile)
        tile = each_array(lambda a: jnp.moveaxis(jnp.squeeze(a, 1 + dims), 0, dims), tile)
        w = close._windows(segment.after.shape)[0]  # pyright: ignore
        axis = Pooled(0, dims, sizes[0], planes.axes[0].planes, w)
        tile = each_array(lambda a: pool(a, [axis], True), tile)
    return tile


def diagonal(tile: Tile, dims: int) -> jax.Array:
    """Offset 0 of pairs (a, a): variances `(P, *spatial)`."""
    a = tile.cov12
    for _ in range(dims):
        a = lax.index_in_dim(a, 0, dims, keepdims=False)
    return jnp.moveaxis(a, -1, 0)
