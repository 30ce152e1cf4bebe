"""Global self-attention (Hron et al. 2020, "Infinite attention").

With scores divided by d ("linear scaling", queries = keys) the weights become deterministic,

    G(x) = zeta(W_q W_k K(x, x)),     K' = (W_o W_v)^2 G(x1) K G(x2)^T + b^2,   (eq. 11, 12)
    T' = 2 (K' - b^2) + b^2 + (W_o W_v)^2 G(x1) T G(x2)^T.

With scores divided by sqrt(d) and zeta the identity they stay random,

    K'(i, i') = (W_o W_v W_q W_k)^2 K(i, i') sum_jj' K(j, j')^2 + b^2,          (eq. 9)

and T' follows by the product rule. Positional embeddings p ~ N(0, W_p^2 R) add W_p^2 R(i, i') to K
(sum), or are averaged with it by numbers of channels (concatenation); R(i, i') is the decay
function of |i - i'|_p^p, or 1 at equal positions.
"""

from __future__ import annotations

import enum
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tangents._core import precision
from tangents._infinite.graph import Node, hyper, node
from tangents._infinite.layer import Layer
from tangents._infinite.layers.axes import (
    check_axes,
    check_channel_masks,
    check_spatial,
    collapse_channels,
)
from tangents._infinite.layers.pool import needs_all_pairs
from tangents._infinite.tile import Layout, Need, Tile, example_diagonal

_einsum = functools.partial(jnp.einsum, precision=precision.DEFAULT)


class AttentionMechanism(enum.Enum):
    """What turns scores into weights."""

    SOFTMAX = "SOFTMAX"
    IDENTITY = "IDENTITY"
    ABS = "ABS"
    RELU = "RELU"

    def fn(self) -> Callable[..., jax.Array]:
        """The function, of an array of scores and an axis (the keys')."""
        return {
            "SOFTMAX": lambda a, axis=-1: jax.nn.softmax(a, axis=axis),
            "IDENTITY": lambda a, axis=-1: a,
            "ABS": lambda a, axis=-1: jnp.abs(a),
            "RELU": lambda a, axis=-1: jnp.maximum(a, jnp.zeros((), a.dtype)),
        }[self.value]


class PositionalEmbedding(enum.Enum):
    """How positional embeddings enter: not at all, added, or as further channels."""

    NONE = "NONE"
    SUM = "SUM"
    CONCAT = "CONCAT"


def _weights(mechanism: AttentionMechanism, scores: jax.Array, missing: Any) -> jax.Array:
    """Attention weights; `missing` (broadcasts to the scores) are keys that are not there."""
    if missing is None:
        return mechanism.fn()(scores)
    zero = jnp.zeros((), scores.dtype)
    if mechanism != AttentionMechanism.SOFTMAX:
        return jnp.where(missing, zero, mechanism.fn()(scores))
    lowest = jnp.asarray(jnp.finfo(scores.dtype).min, scores.dtype)
    weights = jax.nn.softmax(jnp.where(missing, lowest, scores), axis=-1)
    return jnp.where(missing, zero, weights)  # zeros too where every key is missing


def _distances(spatial: tuple[int, ...], p: float) -> np.ndarray:
    """|i - i'|_p^p between all positions, (P, P)."""
    grid = np.stack(np.meshgrid(*map(np.arange, spatial), indexing="ij"), -1)
    points = grid.reshape((-1, len(spatial)))
    return (np.abs(points[:, None] - points[None]) ** p).sum(-1)


@node
class AttentionNode(Node):
    """Self-attention over all positions."""

    n_chan_out: int
    n_chan_key: int
    n_chan_val: int
    n_heads: int
    linear_scaling: bool
    W_key_std: Any = hyper(1.0)
    W_value_std: Any = hyper(1.0)
    W_query_std: Any = hyper(1.0)
    W_out_std: Any = hyper(1.0)
    b_std: Any = hyper(None)
    mechanism: AttentionMechanism = AttentionMechanism.SOFTMAX
    embedding: PositionalEmbedding = PositionalEmbedding.NONE
    p_norm: float = 2
    decay_fn: Any = None
    n_chan_pos_emb: int | None = None
    W_pos_emb_std: Any = hyper(1.0)  # pyright: ignore[reportGeneralTypeIssues]
    val_pos_emb: bool = False
    batch_axis: int = 0
    channel_axis: int = -1
    name = "GlobalSelfAttention"
    random_weights = True

    def input_axes(self):
        return self.batch_axis, self.channel_axis

    def out_shape(self, shape):
        shape = list(shape)
        shape[self.channel_axis] = self.n_chan_out
        return tuple(shape)

    def gaussian(self, incoming):
        return True

    def signal(self, signal):
        check_axes(self, signal)
        check_spatial(self, signal)
        if not self.linear_scaling and self.mechanism != AttentionMechanism.IDENTITY:
            raise NotImplementedError(
                "GlobalSelfAttention: with linear_scaling=False the infinite limit is known for "
                f"attention_mechanism='IDENTITY' only, and it is {self.mechanism.value!r}"
            )
        return super().signal(signal)

    # ---- finite width --------------------------------------------------------------------------

    def _embedding_width(self, channels: int) -> int:
        if self.embedding == PositionalEmbedding.CONCAT and self.n_chan_pos_emb is not None:
            return self.n_chan_pos_emb
        return channels

    def init_params(self, rng, shape):
        if self.linear_scaling:
            warnings.warn(
                "GlobalSelfAttention: with linear_scaling=True one matrix serves for queries and "
                "keys (tied weights), and no query weights are drawn.",
                stacklevel=2,
            )
        keys = jax.random.split(rng, 6)
        channels, ndim = shape[self.channel_axis], len(shape)
        wide = channels
        position = None
        if self.embedding != PositionalEmbedding.NONE:
            sizes = list(shape)
            sizes[self.batch_axis] = 1
            sizes[self.channel_axis] = self._embedding_width(channels)
            position = jax.random.normal(keys[5], sizes)
            if self.embedding == PositionalEmbedding.CONCAT:
                wide = channels + sizes[self.channel_axis]
        heads = self.n_heads
        query = None
        if not self.linear_scaling:
            query = jax.random.normal(keys[0], (heads, wide, self.n_chan_key))
        key = jax.random.normal(keys[1], (heads, wide, self.n_chan_key))
        rows = wide if self.val_pos_emb else channels
        value = jax.random.normal(keys[2], (heads, rows, self.n_chan_val))
        out = jax.random.normal(keys[3], (heads * self.n_chan_val, self.n_chan_out))
        b = None
        if self.b_std is not None:
            b_shape = [1] * ndim
            b_shape[self.channel_axis] = self.n_chan_out
            b = jax.random.normal(keys[4], b_shape)
        return query, key, value, out, b, position

    def _flat(self, x):
        """(batch, positions, channels) and the shape to go back."""
        x = jnp.moveaxis(x, (self.batch_axis, self.channel_axis), (0, -1))
        return x.reshape((x.shape[0], -1, x.shape[-1])), x.shape[1:-1]

    def apply(self, params, x, *, mask=None, **kwargs):
        query, key, value, out, b, position = params
        flat, spatial = self._flat(x)
        missing = None
        if mask is not None:
            missing = self._flat(
                jnp.broadcast_to(
                    collapse_channels(mask, self.channel_axis),
                    (
                        *(
                            1 if i == self.channel_axis % x.ndim else s
                            for i, s in enumerate(x.shape)
                        ),
                    ),
                )
            )[0]
        embedded = flat
        if position is not None:
            p = self.W_pos_emb_std * self._correlate(self._flat(position)[0], spatial)
            if self.embedding == PositionalEmbedding.SUM:
                embedded = flat + p
            else:
                wide = jnp.broadcast_to(p, (flat.shape[0], *p.shape[1:]))
                embedded = jnp.concatenate([flat, wide], axis=-1)
            if missing is not None:
                embedded = jnp.where(missing, jnp.zeros((), x.dtype), embedded)
        values_of = embedded if self.val_pos_emb else flat
        keys = _einsum("npc,hck->nhpk", embedded, key)
        queries = keys if query is None else _einsum("npc,hck->nhpk", embedded, query)
        scale = self.n_chan_key if self.linear_scaling else self.n_chan_key**0.5
        scores = _einsum("nhik,nhjk->nhij", queries, keys)
        scores = scores * (self.W_query_std * self.W_key_std / (scale * embedded.shape[-1]))
        absent = None if missing is None else missing[:, None, None, :, 0]
        weights = _weights(self.mechanism, scores, absent)
        values = _einsum("npc,hcv->nhpv", values_of, value)
        # Rows of W_out: values outer, heads inner.
        heads = _einsum("nhij,nhjv->nivh", weights, values)
        heads = heads.reshape((*heads.shape[:2], -1))
        scale = (values_of.shape[-1] * heads.shape[-1]) ** 0.5
        y = _einsum("nia,ao->nio", heads, out) * (self.W_value_std * self.W_out_std / scale)
        y = y.reshape((y.shape[0], *spatial, y.shape[-1]))
        y = jnp.moveaxis(y, (0, -1), (self.batch_axis, self.channel_axis))
        return y if b is None else y + self.b_std * b

    def _correlate(self, position, spatial):
        """Rows of standard normal embeddings to rows of covariance R."""
        if self.decay_fn is None:
            return position
        values, vectors = jnp.linalg.eigh(self._R(spatial, position.dtype))
        root = vectors * jnp.sqrt(jnp.maximum(values, jnp.zeros((), values.dtype)))
        return _einsum("ij,njc->nic", _einsum("ij,kj->ik", root, vectors), position)

    def mask_out(self, mask, shape):
        return collapse_channels(mask, self.channel_axis)

    # ---- infinite width ------------------------------------------------------------------------

    def _R(self, spatial, dtype):
        """Covariance of embeddings between positions, (P, P)."""
        if self.decay_fn is None:
            return jnp.eye(math.prod(spatial), dtype=dtype)
        return self.decay_fn(jnp.asarray(_distances(spatial, self.p_norm), dtype))

    def needs(self, need):
        full = needs_all_pairs(need)
        return Need(full.tile, Layout.FULL) if self.linear_scaling else full

    def rule(self, context, tile):
        check_channel_masks(self, context)
        spatial, n = context.in1.spatial, context.n_batch
        P = math.prod(spatial)
        R = self.W_pos_emb_std**2 * self._R(spatial, tile.cov12.dtype)
        wide = self._embedding_width(context.in1.width)

        def there(m, k):
            if m is None:
                return 1
            m = (~m).astype(R.dtype).reshape((m.shape[0], P))
            return m if not context.all_pairs else m[:, None] if k == 1 else m[None]

        def embed(a, keep1, keep2):
            """Add positional embeddings to covariances (pairs, P, P)."""
            if self.embedding == PositionalEmbedding.NONE:
                return a
            seen = R
            if not isinstance(keep1, int):
                seen = seen * keep1[..., :, None]
            if not isinstance(keep2, int):
                seen = seen * keep2[..., None, :]
            if self.embedding == PositionalEmbedding.SUM:
                return a + seen
            width = context.in1.width
            return (width * a + wide * seen) / (width + wide)

        def flat(a, n):
            return a if a.ndim == 0 else _flat_positions(a, n, P)

        keep1, keep2 = there(context.mask1, 1), there(context.mask2, 2)
        K = flat(tile.cov12, n)
        # Without a tangent kernel the zero of no axes takes its place and is dropped at the end.
        T = jnp.zeros((), K.dtype) if tile.ntk is None else flat(tile.ntk, n)
        Ke, Te = embed(K, keep1, keep2), embed(T, keep1, keep2)
        Kv, Tv = (Ke, Te) if self.val_pos_emb else (K, T)
        scale = (self.W_out_std * self.W_value_std) ** 2
        if self.linear_scaling:
            G = [
                self._attention(context, side, m, P, embed)
                for side, m in ((1, context.mask1), (2, context.mask2))
            ]
            spec = "nij,nmjl,mkl->nmik" if context.all_pairs else "nij,njl,nkl->nik"

            def mix(a):
                return a if a.ndim == 0 else scale * _einsum(spec, G[0], a, G[1])

            K = mix(Kv)
            T = 2 * K + mix(jnp.broadcast_to(Tv, Kv.shape) if Tv.ndim else Tv)
        else:
            scale = scale * (self.W_query_std * self.W_key_std) ** 2

            def product(a, b, c):
                return scale * a * jnp.sum(b * c, axis=(-2, -1), keepdims=True)

            K = product(Ke, Ke, Kv)
            Te, Tv = jnp.broadcast_to(Te, Ke.shape), jnp.broadcast_to(Tv, Kv.shape)
            T = 4 * K + product(Te, Ke, Kv) + product(Ke, Te, Kv) + product(Ke, Ke, Tv)
        if self.b_std is not None:
            K, T = K + self.b_std**2, T + self.b_std**2
        K, T = _unflat_positions(K, n, spatial), _unflat_positions(T, n, spatial)
        return Tile(K, None if tile.ntk is None else T)

    def _attention(self, context, side, mask, P, embed):
        """Attention weights of one side, (n, P, P)."""
        a = context.side1 if side == 1 else context.side2
        if context.side_pairs:
            a = example_diagonal(a)
        a = _flat_positions(a, 1, P)
        keep = 1 if mask is None else (~mask).astype(a.dtype).reshape((mask.shape[0], P))
        scores = self.W_query_std * self.W_key_std * embed(a, keep, keep)
        missing = None if mask is None else mask.reshape((mask.shape[0], 1, P))
        return _weights(self.mechanism, scores, missing)


def _flat_positions(a: jax.Array, n: int, P: int) -> jax.Array:
    """`(pairs, H, H, W, W)` to `(pairs, P, P)`."""
    spatial = (a.ndim - n) // 2
    order = [*range(n), *(n + 2 * i for i in range(spatial))]
    order += [n + 2 * i + 1 for i in range(spatial)]
    return jnp.transpose(a, order).reshape((*a.shape[:n], P, P))


def _unflat_positions(a: jax.Array, n: int, spatial: tuple[int, ...]) -> jax.Array:
    """The inverse of `_flat_positions`."""
    a = a.reshape((*a.shape[:n], *spatial, *spatial))
    k = len(spatial)
    return jnp.transpose(a, [*range(n), *(n + i + k * j for i in range(k) for j in range(2))])


def GlobalSelfAttention(
    n_chan_out: int,
    n_chan_key: int,
    n_chan_val: int,
    n_heads: int,
    linear_scaling: bool = True,
    W_key_std: Any = 1.0,
    W_value_std: Any = 1.0,
    W_query_std: Any = 1.0,
    W_out_std: Any = 1.0,
    b_std: Any = None,
    attention_mechanism: Any = "SOFTMAX",
    pos_emb_type: Any = "NONE",
    pos_emb_p_norm: float = 2,
    pos_emb_decay_fn: Callable[[Any], Any] | None = None,
    n_chan_pos_emb: int | None = None,
    W_pos_emb_std: Any = 1.0,
    val_pos_emb: bool = False,
    batch_axis: int = 0,
    channel_axis: int = -1,
) -> Layer:
    """Multi-head self-attention over all positions (Hron et al. 2020).

    Head by head A = ζ(Q Kᵀ / scale) V with Q = W_query_std x W_Q / √n, and so on; heads are
    concatenated and multiplied by W_out. Formulas of the infinite limit stand at the head of the
    file.

    Args:
      n_chan_out: number of output channels.
      n_chan_key: channels of keys and queries, in each head.
      n_chan_val: channels of values, in each head.
      n_heads: number of heads.
      linear_scaling: divide scores by `n_chan_key` and let queries be keys (one matrix serves as
        both, Q is None); else divide by its square root.
      W_key_std: standard deviation of key weights.
      W_value_std: standard deviation of value weights.
      W_query_std: standard deviation of query weights.
      W_out_std: standard deviation of output weights.
      b_std: standard deviation of the output bias; None: no bias.
      attention_mechanism: ζ: 'SOFTMAX', 'IDENTITY', 'ABS' or 'RELU'. With `linear_scaling=False`
        the infinite limit is known for 'IDENTITY' only.
      pos_emb_type: positional embeddings: 'NONE', 'SUM' or 'CONCAT'.
      pos_emb_p_norm: p of the distance |i - i'|_p^p between positions.
      pos_emb_decay_fn: covariance of embeddings as a function of that distance; None: independent.
      n_chan_pos_emb: channels of concatenated embeddings; None: as many as the input has.
      W_pos_emb_std: standard deviation of embeddings.
      val_pos_emb: do values see the embeddings, too.
      batch_axis: batch axis of the input.
      channel_axis: channel axis of the input.

    Warns:
      UserWarning: in `init_fn` with `linear_scaling`, that queries and keys share their weights.

    Returns:
      A layer with parameters `(Q | None, K, V, W_out, b | None, pos_emb | None)`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import stax
        >>> attention = stax.GlobalSelfAttention(4, 4, 4, 2)
        >>> _, _, kernel_fn = stax.serial(stax.Dense(4), attention, stax.GlobalAvgPool())
        >>> kernel_fn(jnp.ones((2, 3, 5)), None, "ntk").round(6).tolist()
        [[3.0, 3.0], [3.0, 3.0]]
    """
    node = AttentionNode(
        n_chan_out,
        n_chan_key,
        n_chan_val,
        n_heads,
        linear_scaling,
        W_key_std,
        W_value_std,
        W_query_std,
        W_out_std,
        b_std,
        AttentionMechanism(attention_mechanism),
        PositionalEmbedding(pos_emb_type),
        pos_emb_p_norm,
        pos_emb_decay_fn,
        n_chan_pos_emb,
        W_pos_emb_std,
        val_pos_emb,
        batch_axis,
        channel_axis,
    )
    return Layer(node)
