"""Rules of layers that act on every channel by one linear map L, the same in all channels.

    K' = L1 K L2^T,  T' = L1 T L2^T

so the layer's own `apply` computes its rule: first on the copies of x1's positions with everything
of x2 in the place of channels, then the other way round.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tangents._infinite.tile import Context, Layout, Signal, Tile

Map = Callable[[jax.Array], jax.Array]


def _on_one_side(a: jax.Array, fn: Map, own: list[int], before: Signal, after: Signal) -> jax.Array:
    """Apply `fn` to the axes `own` (batch, *spatial) of `a`; they come out in front."""
    rest = [i for i in range(a.ndim) if i not in own]
    rest_shape = [a.shape[i] for i in rest]
    x = jnp.transpose(a, (*own, *rest)).reshape((*(a.shape[i] for i in own), -1))
    # (batch, *spatial, channel) to the places these axes have in the activation, and back.
    places = (before.batch_axis, *before.spatial_axes, before.channel_axis)
    y = fn(jnp.transpose(x, [places.index(i) for i in range(x.ndim)]))
    y = jnp.transpose(y, (after.batch_axis, *after.spatial_axes, after.channel_axis))
    return y.reshape((*y.shape[:-1], *rest_shape))


def both_sides(a: jax.Array, fn1: Map, fn2: Map, context: Context) -> jax.Array:
    """L1 a L2^T for `(pairs, H, H, W, W)`; with one pair axis both maps keep it."""
    n = context.n_batch
    n_in = len(context.in1.spatial_axes)
    n_out = len(context.out1.spatial_axes)
    own1 = [0, *(n + 2 * i for i in range(n_in))]
    a = _on_one_side(a, fn1, own1, context.in1, context.out1)
    # Now: batch of x1, its n_out positions, batch of x2 (if there are two), its n_in positions.
    if n == 2:
        own2 = [1 + n_out, *(2 + n_out + i for i in range(n_in))]
        a = _on_one_side(a, fn2, own2, context.in2, context.out2)
        # Batch of x2, its positions, batch of x1, its positions.
        order = [1 + n_out, 0]
        first = 2 + n_out
    else:
        own2 = [0, *(1 + n_out + i for i in range(n_in))]
        a = _on_one_side(a, fn2, own2, context.in2, context.out2)
        order = [0]
        first = 1 + n_out
    for i in range(n_out):
        order += [first + i, 1 + i]
    return jnp.transpose(a, order)


def on_diagonal(a: jax.Array, fn1: Map, fn2: Map, context: Context) -> jax.Array:
    """The same for a map that does not mix positions, on `(pairs, H, W)`."""
    n = context.n_batch
    positions = list(range(n, a.ndim))
    if n == 1:
        for fn, before, after in (
            (fn1, context.in1, context.out1),
            (fn2, context.in2, context.out2),
        ):
            a = _on_one_side(a, fn, [0, *positions], before, after)
        return a
    a = _on_one_side(a, fn1, [0, *positions], context.in1, context.out1)  # n1, positions, n2
    n_out = a.ndim - 2
    own = [n_out + 1, *range(1, n_out + 1)]
    a = _on_one_side(a, fn2, own, context.in2, context.out2)  # n2, positions, n1
    return jnp.transpose(a, (n_out + 1, 0, *range(1, n_out + 1)))


def linear_rule(context: Context, tile: Tile, fn1: Map, fn2: Map) -> Tile:
    """Covariances after the maps fn1 (of x1's activations) and fn2 (of x2's)."""
    if context.layout == Layout.FULL:
        return tile.linear(lambda a: both_sides(a, fn1, fn2, context))
    return tile.linear(lambda a: on_diagonal(a, fn1, fn2, context))


def activation_mask(mask: jax.Array | None, signal: Signal) -> jax.Array | None:
    """A position mask `(n, H, W)` in the places of the activation's axes, one channel."""
    if mask is None:
        return None
    places = (signal.batch_axis, *signal.spatial_axes, signal.channel_axis)
    return jnp.transpose(mask[..., None], [places.index(i) for i in range(len(places))])
