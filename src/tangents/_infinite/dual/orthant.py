"""Products of two ramps and of two steps, anywhere on the line: what kinks leave behind.

For standard normal z1, z2 of correlation rho = cos(theta), s = sin(theta),

    step:  L(h, k) = P(z1 > h, z2 > k),
    ramp:  F(h, k) = E[(z1 - h)_+ (z2 - k)_+],      d F / d rho = L   (Price 1958).

L comes from Owen's function T (Owen 1956, "Tables for computing bivariate normal probabilities"),

    L = (Q(h) + Q(k)) / 2 - T(h, p/h) - T(k, q/k) - [1/2 where h k < 0],
    T(h, a) = 1/2pi int_0^a exp(-h^2 (1 + x^2) / 2) / (1 + x^2) dx,
    p = (k - rho h) / s,   q = (h - rho k) / s,   Q(h) = P(z > h);

for |a| <= 1 a Gauss-Legendre rule on [0, a] converges by a factor of 21 with each node, whatever h
is, and T(h, p/h) + T(p, h/p) is known for the others. F follows by partial integration,

    F = (rho + h k) L - k g(h) Q(p) - h g(k) Q(q) + s g2(h, k),    g the density,
    s g2(h, k) = s / 2pi exp(-(h^2 + p^2) / 2),

and all M_ij = E[(z1 - h)_+^i (z2 - k)_+^j] by the same (E[z1 f] = E[df/dz1] + rho E[df/dz2]):

    M_ij = (i - 1) M_(i-2)j - h M_(i-1)j + rho j M_(i-1)(j-1),    i > 1.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tangents._core.typing import Array

_ROOT_2PI = math.sqrt(2 * math.pi)


def density(h: Array) -> Array:
    """Density of the standard normal distribution."""
    return jnp.exp(-h * h / 2) / _ROOT_2PI


def upper_tail(h: Array) -> Array:
    """P(z > h)."""
    return lax.erfc(h / math.sqrt(2)) / 2


class Pair(NamedTuple):
    """Correlation of a pair, as both legs of its angle: cosine = rho, sine >= 0."""

    cosine: Array
    sine: Array


def _owen(h: Array, p: Array) -> Array:
    """T(h, p / h)."""
    swap = jnp.abs(p) > jnp.abs(h)
    large, small = jnp.where(swap, p, h), jnp.where(swap, h, p)
    a = small / jnp.where(large == 0, 1, large)
    x, w = np.polynomial.legendre.leggauss(12 if h.dtype == jnp.float64 else 6)
    x, w = (x + 1) / 2, w / 2
    half = large * large / 2
    total = jnp.zeros_like(a)
    for x_j, w_j in zip(x, w, strict=True):
        one = 1 + (a * a) * float(x_j * x_j)
        total = total + float(w_j) * jnp.exp(-half * one) / one
    inner = a * total / (2 * math.pi)
    # T(h, p/h) + T(p, h/p) = Q(h)/2 + Q(p)/2 - Q(h) Q(p) for positive h and p, and odd in both.
    above_h, above_p = upper_tail(jnp.abs(h)), upper_tail(jnp.abs(p))
    both = (above_h + above_p) / 2 - above_h * above_p
    both = jnp.where((h < 0) != (p < 0), -both, both)
    return jnp.where(swap, both - inner, inner)


def _legs(pair: Pair, h: Array, k: Array) -> tuple[Array, Array]:
    """P and q of the head of this file; without cancellation where |rho| is nearly 1."""
    cosine, sine = pair
    sign = jnp.where(cosine < 0, -1.0, 1.0).astype(cosine.dtype)
    ratio = sine / (1 + jnp.abs(cosine))  # tan of half the angle to the nearer pole
    tiny = float(np.sqrt(jnp.finfo(sine.dtype).tiny))
    inverse = 1 / jnp.maximum(sine, tiny)
    apart = (k - sign * h) * inverse
    return apart + sign * h * ratio, -sign * apart + sign * k * ratio


@jax.custom_jvp
def ramps_and_steps(cosine: Array, sine: Array, h: Array, k: Array) -> tuple[Array, Array]:
    """F(h, k) and L(h, k), for cosine and sine >= 0 of the angle.

    The derivative of L, infinite at rho = 1 and h = k, is 0 there: the symmetric subgradient.
    """
    p, q = _legs(Pair(cosine, sine), h, k)
    opposite = (h * k < 0) | ((h * k == 0) & (h + k < 0))
    step = (upper_tail(h) + upper_tail(k)) / 2 - _owen(h, p) - _owen(k, q)
    step = step - jnp.where(opposite, 0.5, 0.0).astype(step.dtype)
    ramp = (cosine + h * k) * step + sine * density(h) * density(p)
    ramp = ramp - k * density(h) * upper_tail(p) - h * density(k) * upper_tail(q)
    return ramp, step


@ramps_and_steps.defjvp
def _ramps_and_steps_jvp(primals, tangents):
    cosine, sine, h, k = primals
    d_cosine, _, d_h, d_k = tangents  # the sine is a function of the cosine
    p, q = _legs(Pair(cosine, sine), h, k)
    ramp, step = ramps_and_steps(*primals)
    positive = sine > 0
    inverse = jnp.where(positive, 1 / jnp.where(positive, sine, 1), 0)
    cut1, cut2 = density(h) * upper_tail(p), density(k) * upper_tail(q)
    mean1, mean2 = cut1 + cosine * cut2, cut2 + cosine * cut1  # E[z1; both], E[z2; both]
    d_ramp = step * d_cosine - (mean2 - k * step) * d_h - (mean1 - h * step) * d_k
    d_step = density(h) * density(p) * inverse * d_cosine - cut1 * d_h - cut2 * d_k
    return (ramp, step), (d_ramp, d_step)


class Moments(NamedTuple):
    """M_ij of the head of this file."""

    m00: Array
    m01: Array
    m10: Array
    m11: Array
    m12: Array
    m21: Array
    m22: Array


class _Edges(NamedTuple):
    """Times the density at h: P(z2 > k) and E[(z2 - k)_+] where z1 = h; then the same at k."""

    cut1: Array
    tail1: Array
    cut2: Array
    tail2: Array


def _edges(cosine: Array, sine: Array, h: Array, k: Array) -> _Edges:
    p, q = _legs(Pair(cosine, sine), h, k)
    cut1, cut2 = density(h) * upper_tail(p), density(k) * upper_tail(q)
    both = sine * density(h) * density(p)
    # k - rho h and h - rho k, also where p and q are infinite.
    sign, closer = (
        jnp.where(cosine < 0, -1, 1).astype(sine.dtype),
        sine * sine / (1 + jnp.abs(cosine)),
    )
    apart = k - sign * h
    leg1, leg2 = apart + sign * h * closer, -sign * apart + sign * k * closer
    return _Edges(cut1, both - leg1 * cut1, cut2, both - leg2 * cut2)


@jax.custom_jvp
def moments(
    products: tuple[Array, Array], cosine: Array, sine: Array, h: Array, k: Array
) -> Moments:
    """All of them from F and L, of any thresholds; the sine is a function of the cosine."""
    ramp, step = products
    edges = _edges(cosine, sine, h, k)
    m10 = edges.cut1 + cosine * edges.cut2 - h * step
    m01 = edges.cut2 + cosine * edges.cut1 - k * step
    m02 = step - k * m01 + cosine * edges.tail1
    m12, m21 = m10 - k * ramp + cosine * m01, m01 - h * ramp + cosine * m10
    return Moments(step, m01, m10, ramp, m12, m21, m02 - h * m12 + 2 * cosine * ramp)


@moments.defjvp
def _moments_jvp(primals, tangents):
    _, cosine, sine, h, k = primals
    _, d_cosine, _, d_h, d_k = tangents
    m = moments(*primals)
    edges = _edges(cosine, sine, h, k)
    m20 = m.m00 - h * m.m10 + cosine * edges.tail2
    m02 = m.m00 - k * m.m01 + cosine * edges.tail1
    positive = sine > 0
    inverse = jnp.where(positive, 1 / jnp.where(positive, sine, 1), 0)
    p, _ = _legs(Pair(cosine, sine), h, k)
    peak = density(h) * density(p) * inverse
    in_cosine = Moments(peak, edges.cut1, edges.cut2, m.m00, 2 * m.m01, 2 * m.m10, 4 * m.m11)
    in_h = Moments(edges.cut1, edges.tail1, m.m00, m.m01, m02, 2 * m.m11, 2 * m.m12)
    in_k = Moments(edges.cut2, m.m00, edges.tail2, m.m10, 2 * m.m11, m20, 2 * m.m21)
    return m, jax.tree.map(lambda a, b, c: a * d_cosine - b * d_h - c * d_k, in_cosine, in_h, in_k)


# ---- Hermite coefficients of truncated powers ----------------------------------------------------


def power_coefficients(h: Array, order: int, n: int) -> Array:
    """E[(z - h)_+^m / m! he_j(z)] for j < n and m = `order`, as (n, *h.shape); m = 0 is a step.

    he_j are the normalised probabilists' polynomials. By partial integration
    E[f he_j] = E[f^(j)] / sqrt(j!): for j > m a derivative of the density, g(h) he_(j-m-1)(h), and
    for j <= m an integral of it, I_i = (I_(i-2) - h I_(i-1)) / i.
    """

    def next_two(pair, j):  # g(h) he_j(h), where a zero stays zero
        before, value = pair
        return (value, (near * value - jnp.sqrt(j) * before) / jnp.sqrt(j + 1)), value

    # Farther out the density is zero, and reverse mode would overflow to infinity times zero.
    far = 38.0 if h.dtype == jnp.float64 else 13.0
    near = jnp.clip(h, -far, far)
    start = jnp.zeros_like(h), density(h)
    count = jnp.arange(n - order - 1, dtype=h.dtype)
    weighted = jax.lax.scan(next_two, start, count)[1]
    integrals: list[Any] = [start[1], upper_tail(h)]  # I_(-1), I_0
    for i in range(1, order + 1):
        integrals.append((integrals[-2] - h * integrals[-1]) / i)
    low = [integrals[order + 1 - j] / math.sqrt(math.factorial(j)) for j in range(order + 1)]
    scale = np.asarray([1 / math.sqrt(math.perm(j, order + 1)) for j in range(order + 1, n)])
    high = weighted * jnp.asarray(scale, h.dtype).reshape((-1,) + (1,) * h.ndim)
    return jnp.concatenate([jnp.stack(low), high])
