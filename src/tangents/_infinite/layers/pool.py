"""Pooling: linear maps on positions, the same in every channel.

    K' = P K P^T,  T' = P T P^T,

with P the average (or sum) over windows or over everything (Novak et al. 2019, sec. 3; Arora et al.
2019, sec. 4.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from tangents._infinite.graph import Node, node
from tangents._infinite.layer import Layer
from tangents._infinite.layers.axes import check_axes, check_channel_masks, check_spatial
from tangents._infinite.layers.linear import activation_mask, linear_rule
from tangents._infinite.layers.window import (
    Padding,
    along,
    as_padding,
    window_mask,
    window_sum,
    windows,
)
from tangents._infinite.tile import Layout, Need


def needs_all_pairs(need: Need) -> Need:
    """Covariances of all pairs of positions, on the sides too if anybody needs these."""
    return Need(Layout.FULL, Layout.FULL if need.side > Layout.NONE else Layout.NONE)


class _Pooling(Node):
    """What all poolings share."""

    average: bool
    batch_axis: int
    channel_axis: int

    def input_axes(self):
        return self.batch_axis, self.channel_axis

    def needs(self, need):
        return needs_all_pairs(need)

    def rule(self, context, tile):
        if self.average:
            check_channel_masks(self, context)
        m1 = activation_mask(context.mask1, context.in1)
        m2 = activation_mask(context.mask2, context.in2)
        return linear_rule(
            context,
            tile,
            lambda x: self.apply((), x, mask=m1),
            lambda x: self.apply((), x, mask=m2),
        )


@node
class PoolNode(_Pooling):
    """Average or sum over windows."""

    average: bool
    window_shape: tuple[int, ...]
    strides: tuple[int, ...]
    padding: Padding
    normalize_edges: bool = False
    batch_axis: int = 0
    channel_axis: int = -1
    closes_planes = "windows"

    @property
    def name(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return "AvgPool" if self.average else "SumPool"

    def _axes(self, ndim: int) -> tuple[int, ...]:
        skip = (self.batch_axis % ndim, self.channel_axis % ndim)
        axes = tuple(i for i in range(ndim) if i not in skip)
        if len(axes) != len(self.window_shape):
            raise ValueError(
                f"{self.name}: window_shape={self.window_shape} has {len(self.window_shape)} axes, "
                f"and the input has {len(axes)} spatial axes: they must be as many"
            )
        return axes

    def _windows(self, shape):
        sizes = [shape[a] for a in self._axes(len(shape))]
        return windows(sizes, self.window_shape, self.strides, self.padding)

    def out_shape(self, shape):
        ws = self._windows(shape)
        out = along(self._axes(len(shape)), lambda i, size: ws[i].out_size(size), shape)
        if self.padding == Padding.SAME and out[self.batch_axis] == -1:
            # The contract's reference results have 0 for an unknown batch size here, and here only.
            out = along([self.batch_axis], lambda i, size: 0, out)
        return out

    def signal(self, signal):
        check_axes(self, signal)
        check_spatial(self, signal)
        return super().signal(signal)

    def apply(self, params, x, *, mask=None, **kwargs):
        axes, ws = self._axes(x.ndim), self._windows(x.shape)
        y = window_sum(x, axes, ws)
        if not self.average:
            return y
        total = math.prod(self.window_shape)
        ones = jnp.ones([x.shape[a] if a in axes else 1 for a in range(x.ndim)], x.dtype)
        if mask is None:
            return y / (window_sum(ones, axes, ws) if self.normalize_edges else total)
        missing = jnp.where(mask, ones, 0 * ones)
        there = window_sum(ones, axes, ws) if self.normalize_edges else total
        count = there - window_sum(missing, axes, ws)
        return y / jnp.where(count > 0, count, jnp.ones((), x.dtype))

    def mask_out(self, mask, shape):
        axes = self._axes(len(shape))
        mask = jnp.broadcast_to(
            mask, [shape[a] if a in axes else m for a, m in enumerate(mask.shape)]
        )
        return window_mask(mask, axes, self._windows(shape))


@node
class GlobalPoolNode(_Pooling):
    """Average or sum over all positions."""

    average: bool
    batch_axis: int = 0
    channel_axis: int = -1
    closes_planes = "everything"

    @property
    def name(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return "GlobalAvgPool" if self.average else "GlobalSumPool"

    def _axes(self, ndim: int) -> tuple[int, ...]:
        skip = (self.batch_axis % ndim, self.channel_axis % ndim)
        return tuple(i for i in range(ndim) if i not in skip)

    def out_shape(self, shape):
        axes = self._axes(len(shape))
        return tuple(s for i, s in enumerate(shape) if i not in axes)

    def signal(self, signal):
        check_axes(self, signal)
        check_spatial(self, signal)
        out = super().signal(signal.replace(shape=signal.shape))
        batch = 0 if signal.batch_axis < signal.channel_axis else 1
        return out.replace(batch_axis=batch, channel_axis=1 - batch)

    def apply(self, params, x, *, mask=None, **kwargs):
        axes = self._axes(x.ndim)
        y = jnp.sum(x, axis=axes)
        if not self.average:
            return y
        total = math.prod(x.shape[a] for a in axes)
        if mask is None:
            return y / total
        sizes = [x.shape[a] if a in axes else m for a, m in enumerate(mask.shape)]
        there = ~jnp.broadcast_to(mask, sizes)
        count = jnp.sum(there.astype(x.dtype), axis=axes)
        return y / jnp.where(count > 0, count, jnp.ones((), x.dtype))

    def mask_out(self, mask, shape):
        return jnp.all(mask, axis=self._axes(len(shape)))


def _pool(average, window_shape, strides, padding, normalize_edges, batch_axis, channel_axis):
    strides = (1,) * len(window_shape) if strides is None else tuple(strides)
    return Layer(
        PoolNode(
            average,
            tuple(window_shape),
            strides,
            as_padding(padding),
            normalize_edges,
            batch_axis,
            channel_axis,
        )
    )


def AvgPool(
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Any = "VALID",
    normalize_edges: bool = False,
    batch_axis: int = 0,
    channel_axis: int = -1,
) -> Layer:
    """Average over windows.

    Args:
      window_shape: window size along each spatial axis.
      strides: steps of the window; None: ones.
      padding: 'VALID', 'SAME' or 'CIRCULAR'.
      normalize_edges: with 'SAME', divide by the number of entries inside the input; by default by
        the size of the window, also at edges. Masked entries never count.
      batch_axis: batch axis of the input.
      channel_axis: channel axis of the input.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import stax
        >>> _, pool, _ = stax.AvgPool((2,), padding="SAME", normalize_edges=True)
        >>> pool((), jnp.array([1.0, 3.0, 5.0]).reshape(1, 3, 1)).ravel().tolist()
        [2.0, 4.0, 5.0]
    """
    return _pool(True, window_shape, strides, padding, normalize_edges, batch_axis, channel_axis)


def SumPool(
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Any = "VALID",
    batch_axis: int = 0,
    channel_axis: int = -1,
) -> Layer:
    """Sum over windows.

    Args:
      window_shape: window size along each spatial axis.
      strides: steps of the window; None: ones.
      padding: 'VALID', 'SAME' or 'CIRCULAR'.
      batch_axis: batch axis of the input.
      channel_axis: channel axis of the input.

    Examples:
        >>> import jax
        >>> from tangents import stax
        >>> stax.SumPool((2, 2), strides=(2, 2))[0](jax.random.key(0), (-1, 6, 4, 3))[0]
        (-1, 3, 2, 3)
    """
    return _pool(False, window_shape, strides, padding, False, batch_axis, channel_axis)


def GlobalAvgPool(batch_axis: int = 0, channel_axis: int = -1) -> Layer:
    """Average over all positions (that are not masked); the spatial axes go.

    At infinite width the mean over all pairs of positions, K' = mean_ij K(i, j).

    Args:
      batch_axis: batch axis of the input.
      channel_axis: channel axis of the input.

    Examples:
        >>> import jax
        >>> from tangents import stax
        >>> stax.GlobalAvgPool()[0](jax.random.key(0), (-1, 6, 4, 3))[0]
        (-1, 3)
    """
    return Layer(GlobalPoolNode(True, batch_axis, channel_axis))


def GlobalSumPool(batch_axis: int = 0, channel_axis: int = -1) -> Layer:
    """Sum over all positions; the spatial axes go.

    Args:
      batch_axis: batch axis of the input.
      channel_axis: channel axis of the input.

    Examples:
        >>> import jax
        >>> from tangents import stax
        >>> stax.GlobalSumPool()[0](jax.random.key(0), (-1, 6, 4, 3))[0]
        (-1, 3)
    """
    return Layer(GlobalPoolNode(False, batch_axis, channel_axis))
