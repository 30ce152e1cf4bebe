"""Flatten: all positions and channels in one channel axis.

K' = mean over positions i of K(i, i),  T' likewise.
"""

from __future__ import annotations

import jax.numpy as jnp

from tangents._infinite.graph import Node, node
from tangents._infinite.layer import Layer
from tangents._infinite.layers.gap import average_over_positions
from tangents._infinite.tile import Layout, Need, spatial_diagonal


@node
class FlattenNode(Node):
    """(N, H, W, C) to (N, HWC)."""

    batch_axis: int = 0
    batch_axis_out: int = 0
    name = "Flatten"
    closes_planes = "flatten"

    def input_axes(self):
        return self.batch_axis, None

    def out_shape(self, shape):
        batch = shape[self.batch_axis]
        features = 1
        for i, size in enumerate(shape):
            features *= 1 if i == self.batch_axis % len(shape) else size
        return (batch, features) if self.batch_axis_out % 2 == 0 else (features, batch)

    def gaussian(self, incoming):
        return False

    def signal(self, signal):
        batch = self.batch_axis_out % 2
        if self.batch_axis % len(signal.shape) != signal.batch_axis:
            raise ValueError(
                f"Flatten has batch_axis={self.batch_axis}, and its input of shape {signal.shape} "
                f"has batch_axis={signal.batch_axis}: pass batch_axis={signal.batch_axis}"
            )
        shape = self.out_shape(signal.shape)
        return signal.replace(
            shape=shape, batch_axis=batch, channel_axis=1 - batch, is_gaussian=False
        )

    def _flat(self, x):
        x = jnp.moveaxis(x, self.batch_axis, 0)
        x = x.reshape((x.shape[0], -1))
        return jnp.moveaxis(x, 0, self.batch_axis_out)

    def apply(self, params, x, *, mask=None, **kwargs):
        return self._flat(x)

    def mask_out(self, mask, shape):
        return self._flat(jnp.broadcast_to(mask, shape))

    def needs(self, need):
        return Need(Layout.DIAGONAL, min(need.side, Layout.DIAGONAL))

    def out_layout(self, layout, wanted):
        return wanted

    def rule(self, context, tile):
        n = context.n_batch
        if context.layout == Layout.PLANES:
            axes = tuple(range(len(context.in1.spatial)))
            out = tile.linear(lambda a: jnp.mean(a, axis=axes))
            if context.carries(tile):
                arrays = (tile.cov12, tile.gap12, *context.variances)
                out = out._replace(gap12=average_over_positions(*arrays, axes))
            return out

        def mean(a):
            a = spatial_diagonal(a, n) if context.layout == Layout.FULL else a
            return jnp.mean(a, axis=tuple(range(n, a.ndim)))

        out = tile.linear(mean)
        if context.layout == Layout.DIAGONAL and context.carries(tile):
            axes = tuple(range(n, tile.cov12.ndim))
            gap12 = average_over_positions(tile.cov12, tile.gap12, *context.variances, axes)
            out = out._replace(gap12=gap12)
        return out


def Flatten(batch_axis: int = 0, batch_axis_out: int = 0) -> Layer:
    """All axes but the batch in one: (N, H, W, C) to (N, HWC).

    At infinite width the mean over equal positions, K' = mean_i K(i, i). The output is not
    Gaussian (its entries are few and far from alike): a `Dense` must come before the next
    nonlinearity.

    Args:
      batch_axis: batch axis of the input.
      batch_axis_out: batch axis of the output: 0 or 1 (-1, -2); the other is the channel axis.

    Raises:
      ValueError: for another `batch_axis_out`.

    Examples:
        >>> import jax
        >>> from tangents import stax
        >>> stax.Flatten()[0](jax.random.key(0), (-1, 4, 5, 3))[0]
        (-1, 60)
    """
    if batch_axis_out not in (0, 1, -1, -2):
        raise ValueError(f"Flatten: batch_axis_out={batch_axis_out} must be 0, 1, -1 or -2")
    return Layer(FlattenNode(batch_axis, batch_axis_out))
