"""The angular gap of inputs: s - |<x1, x2>| / n without cancellation, s = |x1| |x2| / n.

With unit vectors u = x / |x| and the sign of their product,

    gap / s = 1 - |<u1, u2>| = |u1 -+ u2|^2 / 2.

What kernels need is the angle sqrt(2 gap / s) to the rounding of the type. A product of matrices
gives 1 - |<u1, u2>| to that rounding, so its root loses half of the digits near 0. Three ways, each
taken for the whole block where one of its pairs needs it:

- pairs far apart: the product itself;
- closer ones: entries split into high + low, where high has so few digits that products of high
  parts are summed without any rounding (every partial sum is a multiple of the same power of two
  and below 1; the idea of Ozaki et al. 2012), and what low parts add is small;
- the closest: the difference, entry by entry, which costs a pass over (n1, n2, channels).

Few channels (images) are always differenced.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tangents._core import precision
from tangents._infinite.dual.angle import reciprocal, safe_sqrt

_FEW_CHANNELS = 16
_FAR = 0.2  # 1 - |cos| above which the product's rounding does not matter (angles over 37 degrees)


def _unit(x: jax.Array) -> jax.Array:
    return x * reciprocal(safe_sqrt(jnp.sum(x * x, -1, keepdims=True)))


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """<a_i, b_j> at equal positions: `(n1, n2, *spatial)`."""
    s = "abcdefgh"[: a.ndim - 2]
    return jnp.einsum(f"x{s}z,y{s}z->xy{s}", a, b, precision=precision.DEFAULT)


def _difference(u1: jax.Array, u2: jax.Array, sign: jax.Array) -> jax.Array:
    """|u1 - sign u2|^2 / 2, never held entry by entry."""
    d = u1[:, None] - sign[..., None] * u2[None]
    return jnp.sum(d * d, -1) / 2


def _split(u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """High parts are multiples of 2^-q: sums of their products, up to 2, fit in a significand."""
    step = 2.0 ** ((jnp.finfo(u.dtype).nmant - 1) // 2)
    high = jnp.round(u * step) / step
    return high, u - high


def _from_halves(u1: jax.Array, u2: jax.Array, sign: jax.Array) -> jax.Array:
    (h1, l1), (h2, l2) = _split(u1), _split(u2)
    # |u|^2 / 2, taken apart in the same way
    big1, big2 = (jnp.sum(h * h, -1) / 2 for h in (h1, h2))
    small1, small2 = (jnp.sum(low * (u + h), -1) / 2 for h, low, u in ((h1, l1, u1), (h2, l2, u2)))
    half = sign * _product(h1, h2) / 2
    big = (big1[:, None] - half) + (big2[None] - half)  # without a sum that would be rounded at 1
    small = small1[:, None] + small2[None] - sign * (_product(h1, l2) + _product(l1, u2))
    return big + small


@jax.custom_jvp
def relative_input_gap(x1: jax.Array, x2: jax.Array, cosine: jax.Array, known: Any) -> jax.Array:
    """1 - |cos| of inputs `(n, *spatial, channels)` at equal positions, `(n1, n2, *spatial)`.

    cosine: cos, to a few roundings. known: boolean `(n1, n2)`, pairs whose gap is zero and set by
    the caller; or None.
    """
    u1, u2 = _unit(x1), _unit(x2)
    sign = jnp.where(cosine < 0, -1, 1).astype(x1.dtype)
    if x1.shape[-1] <= _FEW_CHANNELS:
        return jnp.minimum(_difference(u1, u2, sign), 1)

    def any_below(gap, bound):
        close = gap < bound
        if known is not None:
            close = close & ~known.reshape(known.shape + (1,) * (close.ndim - 2))
        return jnp.any(close)

    # Below this the error of the split product, a rounding of its low parts, shows in the angle.
    closest = 100 * float(jnp.finfo(x1.dtype).eps)

    def closer(_):
        gap = _from_halves(u1, u2, sign)
        return lax.cond(
            any_below(gap, closest), lambda g: _difference(u1, u2, sign), lambda g: g, gap
        )

    gap = 1 - jnp.minimum(jnp.abs(cosine), 1)
    return jnp.clip(lax.cond(any_below(gap, _FAR), closer, lambda g: g, gap), 0, 1)


@relative_input_gap.defjvp
def _relative_input_gap_jvp(primals, tangents):
    cosine, change = primals[2], tangents[2]
    return relative_input_gap(*primals), jnp.where(cosine < 0, change, -change)


def with_gap(x1: jax.Array, x2: jax.Array, cov12: jax.Array, var1, var2, known: Any):
    """`(cov12, gap12)` of inputs; the covariance of close pairs from their gap.

    var1, var2: variances, broadcastable to cov12.
    """
    root1, root2 = safe_sqrt(var1), safe_sqrt(var2)
    relative = relative_input_gap(x1, x2, cov12 * reciprocal(root1) * reciprocal(root2), known)
    s = root1 * root2
    gap = s * relative
    near = jnp.where(cov12 < 0, gap - s, s - gap)
    return jnp.where(relative < 0.5, near, cov12), gap
