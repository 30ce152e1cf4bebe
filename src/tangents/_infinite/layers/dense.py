"""Dense layers and token embeddings.

Covariances of y = (W_std / sqrt(n)) W x + b_std b with W, b standard normal (Lee et al. 2018,
eq. 5; Jacot et al. 2018, thm. 1):

    K' = W_std^2 K + b_std^2
    T' = K' + W_std^2 T

The angular gap beside them: `gap.py`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from tangents._core import precision
from tangents._infinite.graph import Node, hyper, node
from tangents._infinite.inputs import TOKENS
from tangents._infinite.layer import Layer
from tangents._infinite.layers.axes import check_axes, collapse_channels
from tangents._infinite.layers.parameterization import (
    add_bias,
    affine_rule,
    check_parameterization,
    init_bias,
    init_weights,
    scale_weights,
    width_after,
)
from tangents._infinite.tile import Tile


@node
class DenseNode(Node):
    """y = (W_std / sqrt(n)) W x + b_std b, at every position."""

    out_dim: int
    W_std: Any = hyper(1.0)
    b_std: Any = hyper(None)
    batch_axis: int = 0
    channel_axis: int = -1
    parameterization: str = "ntk"
    s: tuple[int, int] = (1, 1)
    name = "Dense"
    plane_wise = True
    random_weights = True

    def input_axes(self):
        return self.batch_axis, self.channel_axis

    def out_shape(self, shape):
        shape = list(shape)
        shape[self.channel_axis] = width_after(self.out_dim, self.parameterization, self.s)
        return tuple(shape)

    def gaussian(self, incoming):
        return True

    def signal(self, signal):
        check_axes(self, signal)
        return super().signal(signal)

    def init_params(self, rng, shape):
        k1, k2 = jax.random.split(rng)
        fan_in = shape[self.channel_axis]
        width = width_after(self.out_dim, self.parameterization, self.s)
        W = init_weights(k1, (fan_in, width), fan_in, self.W_std, self.parameterization, self.s)
        b_shape = [1] * len(shape)
        b_shape[self.channel_axis] = width
        return W, init_bias(k2, b_shape, self.b_std, self.parameterization)

    def apply(self, params, x, *, mask=None, **kwargs):
        W, b = params
        axis = self.channel_axis % x.ndim
        y = jnp.moveaxis(jnp.tensordot(x, W, (axis, 0), precision=precision.DEFAULT), -1, axis)
        y = scale_weights(x.shape[axis], self.W_std, self.parameterization, self.s) * y
        return add_bias(y, b, self.b_std, self.parameterization)

    def mask_out(self, mask, shape):
        return collapse_channels(mask, self.channel_axis)

    def rule(self, context, tile):
        fan_in = context.in1.width
        variances = context.variances if context.carries(tile) else None
        return affine_rule(
            tile,
            self.W_std,
            self.b_std,
            fan_in,
            self.parameterization,
            self.s,
            variances=variances,
        )


def Dense(
    out_dim: int,
    W_std: Any = 1.0,
    b_std: Any = None,
    batch_axis: int = 0,
    channel_axis: int = -1,
    parameterization: str = "ntk",
    s: tuple[int, int] = (1, 1),
) -> Layer:
    """Fully connected layer, y = (W_std / sqrt(n)) W x + b_std b with n = size of the channel axis.

    Applied at every position of an input with more axes than batch and channels. At infinite width
    K' = W_std² K + b_std² and T' = K' + W_std² T (Lee et al. 2018, eq. 5; Jacot et al. 2018).

    Args:
      out_dim: number of output channels.
      W_std: standard deviation of the weights.
      b_std: standard deviation of the biases; None: no bias.
      batch_axis: batch axis of the input.
      channel_axis: channel axis of input and output.
      parameterization: 'ntk', as above, or 'standard': y = W x / sqrt(s0) + b with
        W ~ N(0, W_std² s0 / n), b ~ N(0, b_std²) (Sohl-Dickstein et al. 2020).
      s: with 'standard', the scalings (s0, s1) of input and output width: the layer has
        `out_dim * s1` channels.

    Returns:
      A layer with parameters `(W, b)`: W `(n, out_dim)`, b with ones except on the channel axis, or
      None.

    Examples:
        >>> import jax
        >>> from tangents import stax
        >>> init_fn, apply_fn, kernel_fn = stax.Dense(5, W_std=1.5, b_std=0.1)
        >>> _, (W, b) = init_fn(jax.random.key(0), (-1, 3))
        >>> W.shape, b.shape
        ((3, 5), (1, 5))
    """
    parameterization = check_parameterization(parameterization, "Dense")
    node = DenseNode(
        out_dim, W_std, b_std, batch_axis, channel_axis, parameterization, (s[0], s[1])
    )
    return Layer(node)


@node
class EmbeddingNode(Node):
    """y = W_std E[token]."""

    vocabulary: int
    out_dim: int
    W_std: Any = hyper(1.0)
    name = "Embedding"
    random_weights = True

    def input_axes(self):
        return 0, TOKENS

    def out_shape(self, shape):
        return (*shape, self.out_dim)

    def gaussian(self, incoming):
        return True

    def signal(self, signal):
        # A token is a one-hot vector: the walk gives it a channel axis of its own.
        return signal.replace(
            shape=(*signal.shape[:-1], self.out_dim), is_gaussian=True, drawn=True
        )

    def init_params(self, rng, shape):
        return jax.random.normal(rng, (self.vocabulary, self.out_dim))

    def apply(self, params, x, *, mask=None, **kwargs):
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise TypeError(f"Embedding: the input must hold integer tokens, and is {x.dtype}")
        return self.W_std * jnp.take(params, x, axis=0)

    def mask_out(self, mask, shape):
        return jnp.expand_dims(mask, -1)

    def rule(self, context, tile):
        weight = self.W_std**2
        cov12 = weight * tile.cov12
        gap12 = None if tile.gap12 is None else weight * tile.gap12
        return Tile(cov12, None if tile.ntk is None else cov12, gap12)


def Embedding(vocabulary: int, out_dim: int, W_std: Any = 1.0) -> Layer:
    """Table of token vectors, y = W_std E[token] with E standard normal and trained.

    The first layer of a network on integer inputs `(batch, positions, ...)`. At infinite width
    tokens are uncorrelated: K(t1, t2) = W_std² if t1 = t2, else 0, and T = K (a dense layer on
    one-hot vectors, without the division by their length).

    Args:
      vocabulary: number of tokens.
      out_dim: number of output channels, a new last axis.
      W_std: standard deviation of the entries.

    Returns:
      A layer with one parameter, E `(vocabulary, out_dim)`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import stax
        >>> _, _, kernel_fn = stax.serial(stax.Embedding(10, 4), stax.Flatten(), stax.Dense(1))
        >>> tokens = jnp.array([[1, 2, 3], [1, 2, 4]])
        >>> (3 * kernel_fn(tokens, None, "nngp")).round().tolist()  # tokens in common
        [[3.0, 2.0], [2.0, 3.0]]
    """
    return Layer(EmbeddingNode(vocabulary, out_dim, W_std))
