"""What a rule sees: a tile of covariances, the signals around it, and its context.

A *signal* describes an activation (shape, axes, is it Gaussian); it is static. A *tile* holds the
covariances of pairs of examples. A *context* holds what a rule may ask about the pairs: the
variances of both sides, masks, patterns, and which pairs are one example in one draw.

Arrays start with the pair axes: two of them, `(n1, n2)`, when all pairs of two batches are
computed, one, `(n,)`, when only the pairs (a, a) are. Then follow the spatial axes in the layout of
the tile: `FULL` is `(H, H, W, W, ...)`, every position of x1 against every position of x2 (the two
copies of an axis stand together, x1's first); `DIAGONAL` is `(H, W, ...)`, equal positions only.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


def add_up(arrays: Iterable[jax.Array]) -> jax.Array:
    """Their sum, at least one; without the 0 that `sum` starts from."""
    return functools.reduce(operator.add, arrays)


class Layout(enum.IntEnum):
    """Which pairs of spatial positions an array holds. Ordered: more comes later.

    PLANES: some or all of them, sorted by offset, spatial axes in front (`planes.py`).
    """

    NONE = 0
    DIAGONAL = 1
    FULL = 2
    PLANES = 3


class Need(NamedTuple):
    """What is needed on one edge of the graph: layout of the tile and of the sides."""

    tile: Layout
    side: Layout

    def join(self, other: Need) -> Need:
        """The least need that serves both."""
        return Need(max(self.tile, other.tile), max(self.side, other.side))


class Picked(NamedTuple):
    """One array of a stack of them, cut out where it is read."""

    stack: Any
    place: Any

    def array(self) -> Any:
        """The array itself."""
        return lax.dynamic_index_in_dim(self.stack, self.place, keepdims=False)


class Rest(NamedTuple):
    """What the tangent kernel is beyond cov12, in place of itself: the next layer adds the two.

    Averages of both are then one kernel to compile, and no array is read to add it.
    """

    array: Any

    @property
    def ndim(self) -> int:
        return self.array.ndim


class Tile(NamedTuple):
    """Covariances of pairs of examples.

    cov12: second moments E[y(x1) y(x2)] over random weights (the NNGP kernel).
    ntk: the tangent kernel; `None` where it was not asked for (always in a side pass), and a
      zero of no axes before the first trainable layer; a `Rest` before nodes that take one.
    gap12: sqrt(var1 var2) - |cov12|, carried where near-parallel inputs would lose digits; `None`
      where it is not carried. A rule that cannot carry it returns `None`.
    """

    cov12: Any
    ntk: Any = None
    gap12: Any = None

    def whole(self) -> Tile:
        """With the tangent kernel itself."""
        if not isinstance(self.ntk, Rest):
            return self
        beyond = self.ntk.array
        return self._replace(ntk=beyond + self.cov12 if beyond.ndim else self.cov12)

    def linear(self, fn: Callable[[Any], Any], gap: bool = False) -> Tile:
        """Apply a linear map to cov12 and to the ntk; to the gap only if it passes through."""
        ntk = self.ntk if self.ntk is None or self.ntk.ndim == 0 else fn(self.ntk)
        carried = fn(self.gap12) if gap and self.gap12 is not None else None
        return Tile(fn(self.cov12), ntk, carried)


@dataclasses.dataclass(frozen=True)
class Signal:
    """A static description of one activation: shape, axes (non-negative), Gaussian or not.

    drawn: are there random weights between the last `FanOut` and here (if not, the branches of the
    FanOut are dependent).
    """

    shape: tuple[int, ...]
    batch_axis: int = 0
    channel_axis: int = -1
    is_gaussian: bool = False
    drawn: bool = True

    def __post_init__(self):
        ndim = len(self.shape)
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "batch_axis", self.batch_axis % ndim)
        object.__setattr__(self, "channel_axis", self.channel_axis % ndim)

    def replace(self, **changes) -> Signal:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def spatial_axes(self) -> tuple[int, ...]:
        """The axes that are neither batch nor channel, in order."""
        return tuple(
            i for i in range(len(self.shape)) if i not in (self.batch_axis, self.channel_axis)
        )

    @property
    def spatial(self) -> tuple[int, ...]:
        """Sizes of the spatial axes."""
        return tuple(self.shape[i] for i in self.spatial_axes)

    @property
    def batch(self) -> int:
        return self.shape[self.batch_axis]

    @property
    def width(self) -> int:
        """Number of channels."""
        return self.shape[self.channel_axis]


def spatial_diagonal(a: jax.Array, n_batch: int) -> jax.Array:
    """`(pairs, H, H, W, W)` to `(pairs, H, W)`.

    By strided slices: `jnp.diagonal` is a gather, and XLA on CPU (JAX 0.10.2) computed wrong
    numbers where one was fused with a convolution between two nonlinearities
    (`test_whole_programs_agree_with_layer_programs`).
    """
    for i in range((a.ndim - n_batch) // 2):
        axis = n_batch + i
        size = a.shape[axis]
        a = a.reshape((*a.shape[:axis], size * size, *a.shape[axis + 2 :]))
        a = lax.slice_in_dim(a, 0, size * size, size + 1, axis) if size else a
    return a


def example_diagonal(a: jax.Array) -> jax.Array:
    """`(n, n, ...)` to `(n, ...)`."""
    n = a.shape[0]
    return lax.slice_in_dim(a.reshape((n * n, *a.shape[2:])), 0, n * n, n + 1) if n else a[0:0, 0]


def embed_diagonal(a: jax.Array, n_batch: int) -> jax.Array:
    """`(pairs, H, W)` to `(pairs, H, H, W, W)`, zero where positions differ."""
    for i in range(a.ndim - n_batch):
        axis = n_batch + 2 * i
        size = a.shape[axis]
        eye = jnp.eye(size, dtype=bool).reshape((size, size) + (1,) * (a.ndim - axis - 1))
        a = jnp.where(eye, jnp.expand_dims(a, axis), jnp.zeros((), a.dtype))
    return a


def pair_positions(
    a1: jax.Array, a2: jax.Array, layout: Layout, all_pairs: bool
) -> tuple[jax.Array, jax.Array]:
    """Bring `(n1, H, W)` and `(n2, H, W)` to shapes that broadcast to a tile of pairs."""
    if layout == Layout.FULL:
        n_spatial = a1.ndim - 1
        a1 = jnp.expand_dims(a1, tuple(2 + 2 * i for i in range(n_spatial)))
        a2 = jnp.expand_dims(a2, tuple(1 + 2 * i for i in range(n_spatial)))
    if all_pairs:
        a1, a2 = a1[:, None], a2[None]
    return a1, a2


@dataclasses.dataclass(frozen=True)
class Context:
    """What a rule may ask about the pairs of its tile. Everything but arrays is static.

    in1, in2, out1, out2: signals before and after the node, of x1 and of x2.
    layout: layout of the tile that comes in (and, unless the rule changes it, goes out).
    all_pairs: `True`: two pair axes `(n1, n2)`; `False`: one, the pairs (a, a).
    side1, side2: covariances of the pairs (a, a) of each side before this node, in `side_layout`;
      with two pair axes if `side_pairs`. `None` where no node needs them.
    mask1, mask2: boolean, `(n, H, W)`, `True` = masked position; or `None`.
    pattern1, pattern2: graph patterns of `Aggregate`, or `None`.
    same: boolean array over the pair axes, `True` where the pair is one example in one draw
      (`None`: no such pair).
    need: the `Need` of the nodes after this one; a rule may return more than `need.tile`.
    channel_masks: masks differ between channels (a rule that counts positions refuses them).
    has_gap: the tile comes with a gap, so equal examples are known by it.
    planes: the `Planes` of a tile in that layout, whose sides are laid out like itself.
    prepared: what the node read of both sides before (`Node.side_maker`), or None.
    """

    in1: Any
    in2: Any
    out1: Any
    out2: Any
    layout: Any
    all_pairs: bool
    side1: Any = None
    side2: Any = None
    side_layout: Any = Layout.NONE
    side_pairs: bool = False
    mask1: Any = None
    mask2: Any = None
    pattern1: Any = None
    pattern2: Any = None
    same: Any = None
    need: Any = None
    channel_masks: bool = False
    has_gap: bool = False
    planes: Any = None
    prepared: Any = None

    def carries(self, tile: Tile) -> bool:
        """Is there a gap to carry, and the variances that takes?"""
        return tile.gap12 is not None and self.side1 is not None

    @property
    def n_batch(self) -> int:
        """Number of pair axes."""
        return 2 if self.all_pairs else 1

    def variance(self, side: int) -> jax.Array:
        """Second moments of one example at one position, `(n, H, W)`; side is 1 or 2."""
        a = self.side1 if side == 1 else self.side2
        if self.side_pairs:
            a = example_diagonal(a)
        return spatial_diagonal(a, 1) if self.side_layout == Layout.FULL else a

    @property
    def variances(self) -> tuple[jax.Array, jax.Array]:
        """`(var1, var2)`, broadcastable to `tile.cov12`; one and the same for equal entries."""
        if self.norm is not None:
            return self.norm, self.norm  # of an example with itself it is the variance
        if self.layout == Layout.PLANES:
            var1, var2 = self.side1, self.side2
        else:
            var1, var2 = self.pair(self.variance(1), self.variance(2))
        same = self.same_entries
        if same is not None and self.in1 == self.in2 and not self.has_gap:
            # Also where a compiler computes the two sides with different roundings.
            var2 = in_value(same, var1, var2)
        return var1, var2

    @property
    def norm(self) -> jax.Array | None:
        """sqrt(var1 var2) where that is what stands for the sides (`Planes.roots`)."""
        return self.side1 if self.layout == Layout.PLANES and self.planes.roots else None

    @property
    def equal_entries(self) -> bool:
        """Is the tile a side: pairs (a, a) at equal positions?"""
        return not self.all_pairs and self.layout == Layout.DIAGONAL

    @property
    def same_entries(self) -> jax.Array | None:
        """True where a pair is one example in one draw at one position; broadcasts to the tile."""
        if self.layout == Layout.PLANES:
            return self.planes.same
        same = self.same
        if same is None:
            return None
        if self.layout != Layout.FULL:
            return same.reshape(same.shape + (1,) * len(self.in1.spatial))
        for size in self.in1.spatial:
            same = same[..., None, None] & jnp.eye(size, dtype=bool)
        return same

    def pair(self, a1: jax.Array, a2: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Bring `(n1, H, W)` and `(n2, H, W)` to shapes that broadcast to the tile."""
        return pair_positions(a1, a2, self.layout, self.all_pairs)


def in_value(same: jax.Array, value: jax.Array, array: jax.Array) -> jax.Array:
    """`array` with `value` where `same`, but with its own derivative.

    The two are the same number up to rounding, so their difference and the sum are exact.
    """
    return array + lax.stop_gradient(jnp.where(same, value - array, jnp.zeros((), array.dtype)))


def position_mask(mask: jax.Array | None, signal: Signal) -> jax.Array | None:
    """A mask that broadcasts to `signal.shape` as `(n, H, W)`: positions masked in all channels."""
    if mask is None:
        return None
    sizes = [1 if i == signal.channel_axis else s for i, s in enumerate(signal.shape)]
    mask = jnp.all(mask, axis=signal.channel_axis, keepdims=True)
    mask = jnp.broadcast_to(mask, sizes)
    order = (signal.batch_axis, *signal.spatial_axes, signal.channel_axis)
    return jnp.squeeze(jnp.transpose(mask, order), -1)


def check_axis_set(axes: Sequence[int], ndim: int) -> tuple[int, ...]:
    """Axes modulo `ndim`, as a tuple."""
    return tuple(a % ndim for a in axes)
