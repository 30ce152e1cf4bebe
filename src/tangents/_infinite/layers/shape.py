"""Layers that move entries about: ImageResize, Index (with Slice), Identity.

All are linear and the same in every channel: K' = L1 K L2^T (see `linear.py`); resizing is a matrix
along each axis (Keys 1981 for the cubic one).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tangents._infinite.graph import Node, node
from tangents._infinite.layer import Layer
from tangents._infinite.layers.axes import check_axes
from tangents._infinite.layers.linear import linear_rule
from tangents._infinite.layers.pool import needs_all_pairs
from tangents._infinite.tile import Layout


@node
class IdentityNode(Node):
    """y = x."""

    name = "Identity"
    plane_wise = True
    takes_rest = True

    def apply(self, params, x, *, mask=None, **kwargs):
        return x

    def parts_apart(self, state):
        return True

    def rule(self, context, tile):
        return tile


def Identity() -> Layer:
    """The identity, for the branches of a residual network.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import stax
        >>> _, same, _ = stax.Identity()
        >>> same((), jnp.ones(2)).tolist()
        [1.0, 1.0]
    """
    return Layer(IdentityNode())


def _method_name(method: Any) -> str:
    return method if isinstance(method, str) else method.name.lower()


@node
class ResizeNode(Node):
    """jax.image.resize."""

    shape: tuple[int, ...]
    method: str
    antialias: bool = True
    precision: Any = lax.Precision.HIGHEST
    batch_axis: int = 0
    channel_axis: int = -1
    name = "ImageResize"

    def input_axes(self):
        return self.batch_axis, self.channel_axis

    @property
    def mixes_examples(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.shape[self.batch_axis] != -1

    @property
    def needs_side_pairs(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.mixes_examples

    def out_shape(self, shape):
        if len(shape) != len(self.shape):
            raise ValueError(
                f"ImageResize: shape={self.shape} must have an entry for each of the "
                f"{len(shape)} axes of the input (-1 keeps an axis)"
            )
        return tuple(old if new == -1 else new for old, new in zip(shape, self.shape, strict=True))

    def signal(self, signal):
        check_axes(self, signal)
        if self.shape[signal.channel_axis] not in (-1, signal.width):
            raise ValueError(
                f"ImageResize: shape={self.shape} must be -1 at the channel axis: the infinite "
                "limit keeps the channels"
            )
        return super().signal(signal)

    def _resize(self, x, method=None):
        return jax.image.resize(
            x,
            self.out_shape(x.shape),
            self.method if method is None else method,
            antialias=self.antialias,
            precision=self.precision,
        )

    def apply(self, params, x, *, mask=None, **kwargs):
        return self._resize(x)

    def _weights(self, n_in: int, n_out: int) -> jax.Array:
        eye = jnp.eye(n_in)
        return jax.image.resize(eye, (n_out, n_in), self.method, antialias=self.antialias)

    def mask_out(self, mask, shape):
        # Missing where nothing that is there has a weight.
        there = ~mask
        for axis, (n_in, n_out) in enumerate(zip(shape, self.out_shape(shape), strict=True)):
            if n_in == n_out or there.shape[axis] == 1:
                continue
            reads = self._weights(n_in, n_out) != 0
            there = jnp.moveaxis(there, axis, -1)
            there = jnp.any(there[..., None, :] & reads, axis=-1)
            there = jnp.moveaxis(there, -1, axis)
        return ~there

    def out_examples(self, index, out):
        return index if self.shape[self.batch_axis] == -1 else jnp.arange(out.batch)

    def needs(self, need):
        return need if self.method == "nearest" else needs_all_pairs(need)

    def rule(self, context, tile):
        # The axes of a covariance are resized like the activation's; what stands in the place of
        # channels there is as wide as the other side.
        def resize(x):
            shape = list(self.shape)
            shape[self.channel_axis] = -1
            node = ResizeNode(tuple(shape), self.method, self.antialias, self.precision)
            return node._resize(x)

        return linear_rule(context, tile, resize, resize)


def ImageResize(
    shape: Sequence[int],
    method: Any,
    antialias: bool = True,
    precision: Any = lax.Precision.HIGHEST,
    batch_axis: int = 0,
    channel_axis: int = -1,
) -> Layer:
    """Resize by interpolation, as `jax.image.resize`.

    Args:
      shape: sizes of all axes of the output; -1 keeps an axis. The channel axis must be kept.
      method: 'nearest', 'linear' ('bilinear', ...), 'cubic', 'lanczos3', ... or a
        `jax.image.ResizeMethod`.
      antialias: as in `jax.image.resize`.
      precision: precision of the products.
      batch_axis: batch axis of the input.
      channel_axis: channel axis of the input.

    Examples:
        >>> import jax
        >>> from tangents import stax
        >>> layer = stax.ImageResize((-1, 4, 6, -1), "linear")
        >>> layer[0](jax.random.key(0), (-1, 8, 8, 3))[0]
        (-1, 4, 6, 3)
    """
    shape = tuple(shape)
    if -len(shape) <= channel_axis < len(shape) and shape[channel_axis] != -1:
        raise ValueError(f"ImageResize: shape={shape} must be -1 at the channel axis")
    node = ResizeNode(shape, _method_name(method), antialias, precision, batch_axis, channel_axis)
    return Layer(node)


class _SliceMaker:
    """`Slice[1:3, ..., ::2]` is the tuple of indices."""

    def __getitem__(self, idx: Any) -> Any:
        return idx

    def __repr__(self):
        return "Slice"


Slice = _SliceMaker()
"""`stax.Slice[1:3, ..., ::2]` is the index `(slice(1, 3), Ellipsis, slice(None, None, 2))`."""


def _hashable(item: Any) -> Any:
    """Index arrays as tuples of ints; slices stay."""
    if isinstance(item, (list, tuple, np.ndarray, jax.Array)):
        return tuple(int(i) for i in np.asarray(item).ravel())
    return item


class IndexItems(tuple):
    """The entries of an index, hashable also where slices are not (Python 3.11)."""

    def __hash__(self):
        return hash(tuple(repr(item) for item in self))


@node
class IndexNode(Node):
    """x[idx]."""

    idx: Any
    batch_axis: int = 0
    channel_axis: int = -1
    name = "Index"

    def input_axes(self):
        return self.batch_axis, self.channel_axis

    @property
    def mixes_examples(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        # The rank is not known here, so an Ellipsis in front may hide the batch axis.
        return not (self.batch_axis == 0 and self.idx[:1] == (slice(None),))

    def _items(self, ndim: int) -> list[Any]:
        """One item for each axis."""
        idx = self.idx if isinstance(self.idx, tuple) else (self.idx,)
        if any(item is None for item in idx):
            raise NotImplementedError("Index: new axes (None) are not supported")
        where = [i for i, item in enumerate(idx) if item is Ellipsis]
        if len(where) > 1:
            raise ValueError("Index: an index can only have one ellipsis (...)")
        before, after = (idx[: where[0]], idx[where[0] + 1 :]) if where else (idx, ())
        rest = ndim - len(before) - len(after)
        if rest < 0:
            raise ValueError(f"Index: {len(before) + len(after)} indices for {ndim} axes")
        return [*before, *([slice(None)] * rest), *after]

    def out_shape(self, shape):
        out = []
        for size, item in zip(shape, self._items(len(shape)), strict=True):
            if size == -1 and item != slice(None):
                raise ValueError(
                    f"Index: an axis of unknown size (-1) in shape {shape} cannot be indexed: give "
                    "its size"
                )
            if isinstance(item, slice):
                out.append(size if item == slice(None) else len(range(*item.indices(size))))
            elif isinstance(item, tuple):
                out.append(len(item))
            elif not -size <= item < size:
                raise ValueError(f"Index: {item} is out of range for an axis of size {size}")
        return tuple(out)

    def signal(self, signal):
        check_axes(self, signal)
        items = self._items(len(signal.shape))
        if not isinstance(items[signal.batch_axis], (slice, tuple)):
            raise NotImplementedError(
                "Index: the batch axis cannot be dropped: index it by a slice"
            )
        if items[signal.channel_axis] != slice(None):
            raise NotImplementedError(
                "Index: the channel axis can only be taken whole: the infinite limit has no single "
                "channels"
            )
        if sum(isinstance(item, tuple) for item in items) > 1:
            raise NotImplementedError("Index: at most one axis can be indexed by a list")
        dropped = [i for i, item in enumerate(items) if isinstance(item, int)]
        if dropped and any(isinstance(item, tuple) for item in items):
            raise NotImplementedError("Index: a list and integers cannot be mixed in one index")
        batch, channel = (
            axis - sum(d < axis for d in dropped)
            for axis in (signal.batch_axis, signal.channel_axis)
        )
        return signal.replace(
            shape=self.out_shape(signal.shape), batch_axis=batch, channel_axis=channel
        )

    def _index(self, ndim: int) -> tuple:
        return tuple(
            np.asarray(item) if isinstance(item, tuple) else item for item in self._items(ndim)
        )

    def apply(self, params, x, *, mask=None, **kwargs):
        return x[self._index(x.ndim)]

    def mask_out(self, mask, shape):
        sizes = [
            m if item == slice(None) else s
            for m, s, item in zip(mask.shape, shape, self._items(len(shape)), strict=True)
        ]
        return jnp.broadcast_to(mask, sizes)[self._index(len(shape))]

    def out_examples(self, index, out):
        dropped = sum(isinstance(item, int) for item in self.idx)
        item = self._items(len(out.shape) + dropped)[self.batch_axis]
        return _take(index, 0, item)

    def rule(self, context, tile):
        items = self._items(len(context.in1.shape))
        batch = items[context.in1.batch_axis]
        width = 2 if context.layout == Layout.FULL else 1
        n = context.n_batch

        def take(a):
            axis = 0
            for item in [batch] * n:
                a = _take(a, axis, item)
                axis += 1
            for i in context.in1.spatial_axes:
                for _ in range(width):
                    a = _take(a, axis, items[i])
                    axis += 0 if isinstance(items[i], int) else 1
            return a

        return tile.linear(take, gap=True)


def _take(a: jax.Array, axis: int, item: Any) -> jax.Array:
    index: list[Any] = [slice(None)] * a.ndim
    index[axis] = np.asarray(item) if isinstance(item, tuple) else item
    return a[tuple(index)]


def make_index(idx: Any) -> Any:
    """A hashable index."""
    if isinstance(idx, tuple):
        return IndexItems(_hashable(item) for item in idx)
    return IndexItems((_hashable(idx),))


def Index(idx: Any, batch_axis: int = 0, channel_axis: int = -1) -> Layer:
    """Index activations as NumPy would, `y = x[idx]`.

    Args:
      idx: what `stax.Slice[...]` gives: integers (the axis goes), slices, `...`, at most one list.
        The batch axis takes slices and lists, the channel axis only `:`.
      batch_axis: batch axis of the input.
      channel_axis: channel axis of the input.

    Raises:
      ValueError: in `init_fn`, if an axis of unknown size (-1) is indexed.

    Examples:
        >>> import jax
        >>> from tangents import stax
        >>> stax.Index(stax.Slice[:, 0, ::2])[0](jax.random.key(0), (-1, 5, 6, 3))[0]
        (-1, 3, 3)
    """
    return Layer(IndexNode(make_index(idx), batch_axis, channel_axis))
