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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tangents._infinite.blocks import resize
from tangents._infinite.dual.angle import safe_sqrt
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
    arrange,
    at_offset,
    looped_insides,
    pool,
    valid_positions,
)
from tangents._infinite.tape import Tape, join_sides, map_sides
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


@dataclasses.dataclass(frozen=True)
class Pairs:
    """A group of pairs: numbers of the examples of both sides.

    same: boolean (size,), pairs of one example in one draw; or None.
    """

    first: Any
    second: Any
    size: int
    same: Any


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
    segment: Segment, variance: jax.Array, axes: tuple[Axis, ...], keep: bool, roots: bool
) -> Tape:
    """What the layers of a segment read of the variances `(n, *spatial)` before it.

    roots: do the layers read square roots of them.
    """
    n = variance.shape[0]
    state = plane_state(segment, None, variance, Planes(axes, n), n)
    tape = Tape(keep, None, roots)
    need = Need(Layout.DIAGONAL, Layout.DIAGONAL)
    run(segment.walked, state, need, (None, None), {}, tape)
    return tape


class _Laid(NamedTuple):
    """Entries of a tape laid out for a group of pairs, all of one shape and scale in one array.

    stacks: `(entries, *spatial, Q)`. place: which stack and entries of it each leaf of the tape is.
    scales: of the stacks along the first axis. leading: axes of each leaf before that of examples.
    """

    stacks: list
    place: list[tuple[int, int, int]]
    scales: list[int]
    leading: list[tuple[int, ...]]
    tree: Any

    def entries(self, stacks: list) -> list:
        """The entries of the tape, of these stacks."""
        leaves = [
            stacks[k][start:end].reshape((*leading, *stacks[k].shape[1:]))
            for (k, start, end), leading in zip(self.place, self.leading, strict=True)
        ]
        return jax.tree.unflatten(self.tree, leaves)

    def cut(self, axis: Axis, offset: Any) -> list:
        """The stacks of side 2 at one offset of the looped axis."""
        return [
            at_offset(stack, offset, scale, axis.planes * scale, axis=1)
            for stack, scale in zip(self.stacks, self.scales, strict=True)
        ]


def _laid_out(tape: Tape, index: Any, axes: tuple[Axis, ...], side: int) -> _Laid:
    """A tape of all examples for a group of pairs; index: numbers of the examples of one side."""
    leaves, tree = jax.tree.flatten(tape.entries)
    of_examples = jax.tree.leaves(map_sides(lambda a, axis: axis, tape.entries))
    pairs = zip(tape.entries, tape.scales, strict=True)
    scales = [s for entry, s in pairs for _ in jax.tree.leaves(entry)]
    each = list(zip(leaves, of_examples, scales, strict=True))
    turned = {(leaf.shape[axis + 1 :], scale) for leaf, axis, scale in each if axis}
    alike: dict[Any, list] = {}
    place: list[Any] = []
    for n, (leaf, axis, scale) in enumerate(each):
        flat = leaf.reshape((-1, *leaf.shape[axis:]))
        kind = (leaf.shape[axis + 1 :], scale)
        # A few layers without a run are equal kernels if each reads an array of its own.
        kind = (*kind, None if kind in turned else n)
        stack = alike.setdefault(kind, [])
        start = sum(len(other) for other in stack)
        stack.append(flat)
        place.append((list(alike).index(kind), start, start + len(flat)))
    stacks = []
    for (_, scale, _), stack in alike.items():
        here = [dataclasses.replace(a, scale=s) for a, s in zip(axes, scale, strict=True)]
        some = jnp.take(jnp.concatenate(stack), index, axis=1, mode="clip")
        some = safe_sqrt(some) if tape.roots else some
        stacks.append(jax.vmap(lambda a, here=here: arrange(a, here, side))(some))
    leading = [leaf.shape[:axis] for leaf, axis in zip(leaves, of_examples, strict=True)]
    # Fused into the layers that read them, these gathers came out wrong on CPU (JAX 0.10.2).
    stacks = lax.optimization_barrier(stacks)
    return _Laid(stacks, place, [scale[0] if scale else 1 for _, scale, _ in alike], leading, tree)


def through(
    segment: Segment,
    modulus: tuple[int, ...],
    source: Callable[[tuple[Axis, ...], Any], Tile],
    tape1: Tape,
    tape2: Tape,
    pairs: Pairs,
    want_gap: bool,
) -> Any:
    """A group of pairs through a segment and the layer that closes it.

    source: `(axes, offset) -> tile` at the input, arrays `(*spatial, Q)`.

    Returns:
      `(cov12, ntk, gap12)`: `(*spatial, *offsets, P)` of all offsets where positions are left, else
      `(P,)`.
    """
    axes = axes_of(segment, modulus, pairs.size)
    sides1 = _laid_out(tape1, pairs.first, axes, 1)
    sides2 = _laid_out(tape2, pairs.second, axes, 2)
    looped = bool(axes) and axes[0].mode == LOOP
    passed = _passed(segment.walked, segment.before, axes[0].scale) if looped else []

    def at(offset: Any) -> Any:
        cut1, cut2 = sides1.stacks, sides2.stacks
        if looped:
            # Nothing made of the sides is moved out of the loop: it is less to read them.
            cut1, offset = lax.optimization_barrier((cut1, offset))
            cut2 = sides2.cut(axes[0], offset)
        tile = source(axes, offset)
        planes = Planes(axes, pairs.size, offset, _same(pairs, axes, offset), tape1.roots)
        if looped:
            planes = planes.replace(
                inside=looped_insides(axes[0], passed, offset, tile.cov12.dtype)
            )
        state = plane_state(segment, tile, None, planes, pairs.size)
        tape = Tape(want_gap, join_sides(sides1.entries(cut1), sides2.entries(cut2)))
        state = run(segment.walked, state, Need(Layout.PLANES, Layout.NONE), (None, None), {}, tape)
        return _close_inner(segment, state.tile, state.planes)

    if not looped:
        return _close_outer(segment, at(None), Planes(_final(axes), pairs.size), False)
    fn = jax.checkpoint(at)
    start, length = jnp.zeros((), int), axes[0].planes
    _, tiles = lax.scan(lambda d, _: (d + 1, fn(d)), start, None, length)
    return _close_outer(segment, tiles, Planes(_final(axes), pairs.size), True)


def _final(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
    return tuple(dataclasses.replace(a, scale=1) for a in axes)


def each_array(fn: Callable[[Any], Any], tile: Tile) -> Tile:
    """`fn` on the arrays of a tile; a zero without axes stays."""
    return Tile(*(a if a is None or a.ndim == 0 else fn(a) for a in tile))


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
        tile = Tile(*(a if a is None else a[0] if a.ndim == 1 else a for a in tile))
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
