"""Offset planes: covariances sorted by the difference of their positions.

An infinite convolution averages K(i, i') along diagonals: the entries of one offset i' - i form a
*plane* that convolutions and nonlinearities never leave, from the first layer to the pooling. So a
plane is computed through all of them while it is in cache, and of a network that flattens its
images only the plane of offset 0 is needed.

Offsets are taken modulo M (at least the size n): the plane d holds the offsets d and d - M, whose
positions are disjoint, so that all M planes of n positions hold the n^2 pairs once:

    plane d at position i:  K(i, (i + d) mod M),  nothing where that is beyond the edge.

With stride s the plane d of M / s comes from the plane s d of M. A window at output position o with
tap t reads position o s + t - lo of both inputs; where the second one falls beyond the edge, the
entry is masked (the first one finds padding).

Arrays are `(*spatial, Q)` with Q = (offsets of each axis, pairs of examples) in one axis: the last
axis is long, whatever the sizes of images, and shifts along spatial axes move whole rows of it. The
first spatial axis may be *looped*: one offset, a traced number, at a time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tangents._infinite.barrier import keep_apart
from tangents._infinite.layers.window import Window, extend, extended, taps

ZERO, LOOP, ALL = "zero", "loop", "all"
"""Which offsets of an axis an array holds: 0 alone, one traced offset, all M of them."""


@dataclasses.dataclass(frozen=True)
class Axis:
    """One spatial axis: planes d = 0 ... planes - 1 stand for the offsets scale * d mod M.

    M = scale * planes: the planes are those of the end of a run of layers, `scale` the product of
    the strides from here to there.
    """

    planes: int
    scale: int
    mode: str

    @property
    def modulus(self) -> int:
        """M at this layer."""
        return self.planes * self.scale

    @property
    def held(self) -> int:
        """Number of offsets in an array."""
        return self.planes if self.mode == ALL else 1


@dataclasses.dataclass(frozen=True)
class Planes:
    """Which offsets a tile holds; `offset`: the plane of the looped axis. pairs: of examples.

    same: boolean (Q,), entries of an example with itself at one position; or None.
    roots: are norms of pairs what stands for the sides. apart: is every layer compiled as if alone,
    where values alone are computed. inside: what `looped_insides` gives for the windows of the
    layers.
    """

    axes: tuple[Axis, ...]
    pairs: int
    offset: Any = None
    same: Any = None
    roots: bool = False
    apart: bool = False
    inside: Any = dataclasses.field(default_factory=dict)

    def replace(self, **changes: Any) -> Planes:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def strided(self, strides: Sequence[int]) -> Planes:
        """After a layer with these strides."""
        if all(s == 1 for s in strides):
            return self
        axes = (
            dataclasses.replace(a, scale=a.scale // s)
            for a, s in zip(self.axes, strides, strict=True)
        )
        return self.replace(axes=tuple(axes))

    @property
    def held(self) -> tuple[int, ...]:
        """Offsets held of each axis."""
        return tuple(a.held for a in self.axes)

    def spread(self, a: Any, k: int) -> Any:
        """`(n, held offsets of axis k)` to something that broadcasts to `(*spatial, Q)`."""
        held = [1] * len(self.axes)
        held[k] = a.shape[1]
        a = a.reshape((a.shape[0], *held, 1))
        if self.axes[k].mode == ALL:
            a = np.broadcast_to(a, (a.shape[0], *self.held, self.pairs))
        a = a.reshape((a.shape[0], -1))
        return a.reshape((a.shape[0],) + (1,) * (len(self.axes) - 1 - k) + (-1,))


jax.tree_util.register_pytree_node(
    Planes,
    lambda p: ((p.offset, p.same, p.inside), (p.axes, p.pairs, p.roots, p.apart)),
    lambda aux, of: Planes(aux[0], aux[1], of[0], of[1], aux[2], aux[3], of[2]),
)


Passed = tuple[int, int, Window]
"""A window along an axis: number of positions before it, scale of the planes behind it."""


def _inside(axis: Axis, n: int, w: Window) -> np.ndarray:
    """`(planes, taps, output positions)`: is the second position inside the input?

    axis: behind the window. n: positions before it.
    """
    o = np.arange(w.out_size(n))
    second = (o + axis.scale * np.arange(axis.planes)[:, None]) % axis.modulus
    read = second[:, None] * w.stride + (np.arange(w.size) - w.lo)[:, None]
    return (read >= 0) & (read < n)


def looped_insides(axis: Axis, passed: Iterable[Passed], offset: Any, dtype: Any) -> dict:
    """`(taps, output positions)` at one offset of a looped axis: 0 where nothing is read, or None.

    All are as large as the largest, so that they are looked up by one kernel.

    Looked up once and written, so that layers of equal shapes are equal kernels, compiled once.
    """
    out: dict[Passed, Any] = dict.fromkeys(passed)
    tables = {
        (n, scale, w): _inside(dataclasses.replace(axis, scale=scale), n, w)
        for n, scale, w in sorted(out)
    }
    tables = {k: t for k, t in tables.items() if not k[2].wrap and not t.all()}
    shape = np.max([t.shape for t in tables.values()], axis=0, initial=0)
    for k, table in tables.items():
        table = np.pad(table, [(0, m - n) for m, n in zip(shape, table.shape, strict=True)])
        out[k] = lax.dynamic_index_in_dim(jnp.asarray(table, dtype), offset, 0, False)
    return keep_apart(out) if tables else out


def _second_inside(planes: Planes, k: int, n: int, w: Window, dtype: Any) -> list[Any]:
    """For each tap: is the second position inside the input? `None` where it always is.

    planes: those after the window.
    """
    axis = planes.axes[k]
    if axis.mode == ZERO or w.wrap:
        return [None] * w.size
    if axis.mode == LOOP:
        found = planes.inside[n, axis.scale, w]
        if found is None:
            return [None] * w.size
        return [planes.spread(found[t, : w.out_size(n), None], k) for t in range(w.size)]
    table = _inside(axis, n, w)
    return [
        None if table[:, t].all() else planes.spread(table[:, t].T.astype(dtype), k)
        for t in range(w.size)
    ]


def window_sum_planes(
    a: jax.Array, sizes: Sequence[int], after: Planes, ws: Sequence[Window]
) -> jax.Array:
    """Sum over the taps of a window, both positions moving as one, of an extended array.

    sizes: numbers of positions before it was extended. after: behind the window.
    """
    for k, w in enumerate(ws):
        n = sizes[k]
        parts = taps(a, k, w)
        inside = _second_inside(after, k, n, w, a.dtype)
        total = None
        for part, mask in zip(parts, inside, strict=True):
            if mask is not None:
                part = part * mask
            total = part if total is None else total + part
        a = total  # pyright: ignore[reportAssignmentType]
    return a


class Pooled(NamedTuple):
    """An axis to pool: place of its positions and offsets, numbers of them, and the window."""

    positions: int
    offsets: int
    n: int
    modulus: int
    window: Window

    @property
    def whole(self) -> bool:
        """Is there one window, the whole axis?"""
        w = self.window
        return w.size == self.n and not w.lo and not w.hi and w.dilation == 1


def pool(a: jax.Array, axes: Sequence[Pooled], written: bool) -> jax.Array:
    """Sum over windows of both positions along some axes; all M offsets are at hand.

    Along one, out[d, o] = sum over taps t, u of K[(s d + u - t) mod M, o s + t - lo].
    written: is the array extended along all of the axes, positions and offsets, in one copy. These
    are the fewest kernels to compile; inside a loop over the planes of another axis they are slow.
    """
    for axis in axes:
        if axis.whole:
            a = _pool_whole(a, axis)
    axes = [axis for axis in axes if not axis.whole]
    if written and axes:
        for axis in axes:
            a = extend(a, axis.positions, axis.window)
        a = lax.optimization_barrier(_around(a, axes))
    for axis in axes:
        a = _pool_axis(a, axis, written)
    return a


def _pool_whole(a: jax.Array, axis: Pooled) -> jax.Array:
    """One window: a sum, of which every offset but 0 is beyond the edge."""
    k, place, n, modulus, w = axis
    if modulus > n:
        shape = [1] * a.ndim
        shape[k], shape[place] = n, modulus
        a = a * jnp.asarray(valid_positions(n, modulus).reshape(shape), a.dtype)
    beyond = [(0, 0)] * a.ndim
    beyond[place] = (0, modulus // w.stride - 1)
    return jnp.pad(jnp.sum(a, axis=(k, place), keepdims=True), beyond)


def _around(a: jax.Array, axes: Sequence[Pooled]) -> jax.Array:
    """Planes of consecutive axes from 1 - size on, around the torus that they are."""
    if len(axes) == 1:
        w, around = axes[0].window, [(0, 0)] * a.ndim
        around[axes[0].offsets] = (w.size - 1, max(w.size - w.stride, 0))
        return jnp.pad(a, around, mode="wrap")
    moduli = tuple(axis.modulus for axis in axes)
    wanted = [
        np.arange(1 - w.size, m + max(w.size - w.stride, 0)) % m
        for m, w in zip(moduli, (axis.window for axis in axes), strict=True)
    ]
    index = np.ravel_multi_index(np.meshgrid(*wanted, indexing="ij"), moduli)
    first = axes[0].offsets
    before, after = a.shape[:first], a.shape[first + len(axes) :]
    a = a.reshape((*before, math.prod(moduli), *after))
    return jnp.take(a, jnp.asarray(index), axis=first, mode="clip")


def _pool_axis(a: jax.Array, axis: Pooled, written: bool) -> jax.Array:
    k, place, n, modulus, w = axis
    s = w.stride
    parts = taps(a if written else extended(a, k, w), k, w)
    n_out = parts[0].shape[k]
    o, d = np.arange(n_out)[:, None], np.arange(modulus // s)[None]
    second = ((o + d) % (modulus // s)) * s - w.lo
    total = None
    for t, part in enumerate(parts):
        for u in range(w.size):
            # Every s-th plane from u - t on, around the torus that they are.
            if written:
                first = w.size - 1 + u - t
                moved = lax.slice_in_dim(part, first, first + modulus - s + 1, s, place)
            else:
                turns, first = divmod(u - t, s)
                moved = lax.slice_in_dim(part, first, None, s, place)
                moved = jnp.roll(moved, -turns, place) if turns else moved
            inside = (second + u >= 0) & (second + u < n)
            if not inside.all() and not w.wrap:
                shape = [1] * moved.ndim
                shape[k], shape[place] = inside.shape
                moved = moved * jnp.asarray(inside.reshape(shape), a.dtype)
            total = moved if total is None else total + moved
    return total  # pyright: ignore[reportReturnType]


def valid_positions(n: int, modulus: int) -> np.ndarray:
    """`(n, M)`: is position (i + d) mod M inside."""
    return (np.arange(n)[:, None] + np.arange(modulus)[None]) % modulus < n


def shifted(a: jax.Array, k: int, axis: Axis, n: int) -> jax.Array:
    """Second positions of axis k of `(*spatial, offsets so far, P)`, zero beyond the edge.

    All offsets: their axis stands before P. A looped axis: rows 0 ... M + n - 1, of which
    `at_offset` takes n.
    """
    if axis.mode == ZERO:
        return jnp.expand_dims(a, -2)
    beyond = [(0, 0)] * a.ndim
    beyond[k] = (0, axis.modulus - n)
    whole = jnp.pad(a, beyond) if axis.modulus > n else a
    if axis.mode == LOOP:
        return jnp.expand_dims(jnp.concatenate([whole, a], axis=k), -2)
    index = np.arange(n)[:, None] + axis.scale * np.arange(axis.planes)[None]
    # k: positions, k + 1: offsets. Never outside, and "clip" is cheaper than to look.
    taken = jnp.take(whole, jnp.asarray(index % axis.modulus), axis=k, mode="clip")
    return jnp.moveaxis(taken, k + 1, -2)


def arrange(a: jax.Array, axes: Sequence[Axis], side: int) -> jax.Array:
    """Variances `(P, *spatial)` of one side as `(*spatial, Q)`; a looped axis is not yet cut."""
    a = jnp.moveaxis(a, 0, -1)
    sizes = a.shape[:-1]
    for k, axis in enumerate(axes):
        if side == 2:
            a = shifted(a, k, axis, sizes[k])
        else:
            a = jnp.broadcast_to(a[..., None, :], (*a.shape[:-1], axis.held, a.shape[-1]))
    return a.reshape((*a.shape[: len(sizes)], math.prod(a.shape[len(sizes) :])))


def at_offset(a: jax.Array, offset: Any, scale: int, modulus: int, axis: int = 0) -> jax.Array:
    """The rows of a looped axis at one offset."""
    n = a.shape[axis] - modulus
    return lax.dynamic_slice_in_dim(a, offset * scale, n, axis=axis)
