"""Normalisation: LayerNorm and RMSNorm, without trained gain.

    K' = K / sqrt((v1 + eps) (v2 + eps)),  T' = T / sqrt((v1 + eps) (v2 + eps)),

v the second moment averaged over the normalised axes beside the channels (Novak et al. 2020, app.
E; Yang 2019, sec. 7). LayerNorm subtracts a mean that vanishes only for Gaussian inputs; RMSNorm
subtracts none. The tangent kernel of the normaliser itself vanishes like 1/width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from tangents._infinite.graph import Node, hyper, node
from tangents._infinite.layer import Layer
from tangents._infinite.layers.axes import check_axes, check_channel_masks
from tangents._infinite.tile import Layout, Need, Tile


@node
class NormNode(Node):
    """(x - mean) / sqrt(eps + variance), or x / sqrt(eps + second moment)."""

    axis: tuple[int, ...]
    eps: Any = hyper(1e-12)
    batch_axis: int = 0
    channel_axis: int = -1
    center: bool = True

    @property
    def name(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return "LayerNorm" if self.center else "RMSNorm"

    def input_axes(self):
        return self.batch_axis, self.channel_axis

    @property
    def mixes_examples(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        # The rank is not known here: a negative axis may be the batch axis.
        return any(a == self.batch_axis or (a < 0 and a != self.channel_axis) for a in self.axis)

    def _axes(self, ndim: int) -> tuple[int, ...]:
        axes = tuple(sorted({a % ndim for a in self.axis}))
        if self.channel_axis % ndim not in axes:
            raise ValueError(
                f"{self.name}: axis={self.axis} must contain the channel axis ({self.channel_axis})"
            )
        return axes

    def out_shape(self, shape):
        self._axes(len(shape))
        return shape

    def signal(self, signal):
        check_axes(self, signal)
        if self.center and not signal.is_gaussian:
            raise NotImplementedError(
                "the infinite-width limit of LayerNorm needs a Gaussian input: put a layer with "
                "random weights (Dense, Conv, ...) directly before it, or take RMSNorm"
            )
        return super().signal(signal)

    def apply(self, params, x, *, mask=None, **kwargs):
        axes = self._axes(x.ndim)
        if mask is None:
            count = jnp.asarray(math.prod(x.shape[a] for a in axes), x.dtype)
            there = jnp.ones((), x.dtype)
        else:
            there = jnp.broadcast_to(~mask, x.shape).astype(x.dtype)
            count = jnp.maximum(jnp.sum(there, axis=axes, keepdims=True), jnp.ones((), x.dtype))
        if self.center:
            x = (x - jnp.sum(x, axis=axes, keepdims=True) / count) * there
        moment = jnp.sum(x * x, axis=axes, keepdims=True) / count
        scale = moment + self.eps
        return x * lax.rsqrt(jnp.where(scale > 0, scale, jnp.ones((), x.dtype)))

    def needs(self, need):
        return Need(need.tile, max(need.side, Layout.DIAGONAL))

    def rule(self, context, tile):
        check_channel_masks(self, context)
        moments = []
        for side, signal, mask in (
            (1, context.in1, context.mask1),
            (2, context.in2, context.mask2),
        ):
            v = context.variance(side)
            places = (signal.batch_axis, *signal.spatial_axes)
            axes = [i for i, a in enumerate(places) if a in self._axes(len(signal.shape))]
            there = jnp.ones_like(v) if mask is None else (~mask).astype(v.dtype)
            count = jnp.maximum(jnp.sum(there, axis=axes, keepdims=True), jnp.ones((), v.dtype))
            mean = jnp.sum(v * there, axis=axes, keepdims=True) / count
            scale = self.eps + jnp.broadcast_to(mean, v.shape)
            moments.append(jnp.where(scale > 0, scale, jnp.ones((), v.dtype)))
        s1, s2 = context.pair(*moments)
        # One square root each, so that a pair of equal examples divides by exactly its moment.
        scale = jnp.sqrt(s1 * s2)
        return Tile(*tile.linear(lambda a: a / scale))


def LayerNorm(
    axis: int | Sequence[int] = -1,
    eps: Any = 1e-12,
    batch_axis: int = 0,
    channel_axis: int = -1,
) -> Layer:
    """Normalise to mean 0 and variance 1 over some axes; no trained gain or bias.

    At infinite width, for Gaussian inputs, K' = K / sqrt((v1 + eps) (v2 + eps)) with v the variance
    averaged over the axes named beside the channel axis.

    Args:
      axis: axes to average over; they must contain the channel axis.
      eps: added to the variance.
      batch_axis: batch axis of the input.
      channel_axis: channel axis of the input.

    Raises:
      ValueError: if `axis` does not contain the channel axis.
      NotImplementedError: in `kernel_fn`, if the input is not Gaussian.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import stax
        >>> _, _, kernel_fn = stax.serial(stax.Dense(1), stax.LayerNorm())
        >>> kernel_fn(3.0 * jnp.eye(2), None, "nngp").round(6).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    node = NormNode(axes, eps, batch_axis, channel_axis, True)
    if channel_axis not in axes and all(a >= 0 for a in axes) and channel_axis >= 0:
        node._axes(max(*axes, channel_axis) + 1)
    return Layer(node)


def RMSNorm(
    axis: int | Sequence[int] = -1,
    eps: Any = 1e-12,
    batch_axis: int = 0,
    channel_axis: int = -1,
) -> Layer:
    """Divide by the root of the mean square over some axes; no trained gain.

    y = x / sqrt(eps + mean x²) (Zhang & Sennrich 2019). At infinite width
    K' = K / sqrt((v1 + eps) (v2 + eps)) as for `LayerNorm`, and for any input, Gaussian or not: no
    mean is subtracted.

    Args:
      axis: axes to average over; they must contain the channel axis.
      eps: added to the mean square.
      batch_axis: batch axis of the input.
      channel_axis: channel axis of the input.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import stax
        >>> _, norm, _ = stax.RMSNorm()
        >>> norm((), jnp.array([[3.0, 3.0]])).round(5).tolist()
        [[1.0, 1.0]]
    """
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    return Layer(NormNode(axes, eps, batch_axis, channel_axis, False))
