"""The angle between two Gaussians, to the last digit.

Under (u, v) ~ N(0, [[var1, cov12], [cov12, var2]]) with norm s = sqrt(var1 var2) the correlation is
cos(theta) = cov12 / s. Near theta = 0 and pi the textbook arccos(cov12 / s) keeps half of the
digits: at a distance of 1e-6 the angle of float64 inputs comes out right to 5e-11 only. Two ways
around it stand here:

- from (cov12, var1, var2) alone, the determinant var1 var2 - cov12^2 is computed from split
  factors, so that it is right to its own last digits for the numbers that were given;
- where the caller carries the angular gap A = s - |cov12|, 1 - |cos(theta)| = A / s, which does
  not cancel at all. This is what makes float32 exact near parallel and opposite inputs: there the
  digits are lost when cov12 is rounded, before any dual kernel sees it. (The distance to the nearer
  pole: s - cov12 alone would say nothing about opposite inputs, where it is rounded at 2 s.)

Conventions: a zero variance gives theta = pi/2 (a constant zero is uncorrelated with everything);
a determinant that rounding made negative counts as zero. The derivative of theta is infinite at
theta = 0 and pi, where kernels have a cusp as functions of the inputs; the one returned there is
zero, the symmetric subgradient.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tangents._core.typing import Array
from tangents._infinite.dual.single_precision import (
    arcsine_of_legs,
    folded_angle,
    is_single,
)


class Sides(NamedTuple):
    """Right-angled triangle of the pair: `tan(theta) = opposite / adjacent`, in arbitrary units."""

    opposite: Array
    adjacent: Array
    hypotenuse_squared: Array


def reciprocal(var: Array) -> Array:
    """1 / var, and 0 where var is 0."""
    positive = var > 0
    return jnp.where(positive, 1 / jnp.where(positive, var, 1), 0)


def safe_sqrt(x: Array) -> Array:
    """sqrt(x) whose derivative at 0 is 0, not infinite."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


def norm(var1: Array, var2: Array) -> Array:
    """sqrt(var1 var2), without overflow of the product."""
    return safe_sqrt(var1) * safe_sqrt(var2)


def _split(x: Array) -> tuple[Array, Array]:
    """`x = high + low` exactly, where `high` has half of the significand.

    Products of two high parts are exact, so the result does not depend on whether the compiler
    contracts a product and a sum into one rounding, as Dekker's error-free product would.
    """
    info = jnp.finfo(x.dtype)
    high = lax.reduce_precision(x, info.nexp, (info.nmant + 1) // 2 - 1)
    return high, x - high


def _balanced(cov12: Array, var1: Array, var2: Array) -> tuple[Array, Array, Array]:
    """Scale both variances to about 1 by powers of two: exact, and nothing over- or underflows."""

    def scale(var):
        return 1 / lax.reduce_precision(jnp.sqrt(var), jnp.finfo(var.dtype).nexp, 0)

    zero = (var1 <= 0) | (var2 <= 0)
    var1, var2 = (jnp.where(var > 0, var, 1) for var in (var1, var2))
    scale1, scale2 = scale(var1), scale(var2)
    cov12 = jnp.where(zero, 0, cov12 * scale1 * scale2)
    return cov12, var1 * scale1 * scale1, var2 * scale2 * scale2


def poles(cov12: Array, s: Array, gap12: Array) -> tuple[Array, Array]:
    """`(s - cov12, s + cov12)` from the gap, each right to its own last digits."""
    negative = cov12 < 0
    return jnp.where(negative, 2 * s - gap12, gap12), jnp.where(negative, gap12, 2 * s - gap12)


def affine_gap(
    cov12: Array, gap12: Array, var1: Array, var2: Array, weight: Array, bias: Array | None
) -> Array:
    """The gap after K' = weight K + bias (the squares of W_std and b_std). A bias adds

    sqrt(v1' v2') - weight sqrt(v1 v2) - bias
        = weight bias (sqrt v1 - sqrt v2)^2 / (sqrt(v1' v2') + weight sqrt(v1 v2) + bias).
    """
    if bias is None:
        return weight * gap12
    root1, root2 = safe_sqrt(var1), safe_sqrt(var2)
    s = root1 * root2
    after = safe_sqrt(weight * var1 + bias) * safe_sqrt(weight * var2 + bias)
    total = after + weight * s + bias
    widened = weight * bias * (root1 - root2) ** 2 * reciprocal(total)
    to_equal, to_opposite = poles(cov12, s, gap12)
    opposite = weight * cov12 + bias < 0
    return widened + jnp.where(opposite, weight * to_opposite + 2 * bias, weight * to_equal)


def relative_gap(var1: Array, var2: Array, gap12: Array) -> Array:
    """1 - |cos(theta)| = gap12 / s in [0, 1], and 1 (uncorrelated) where a variance is 0."""
    # Roots and reciprocals of the sides, which are small; of the tile a product is left.
    inverse = reciprocal(safe_sqrt(var1)) * reciprocal(safe_sqrt(var2))
    return jnp.clip(jnp.where(inverse > 0, gap12 * inverse, 1), 0, 1)


def sides(cov12: Array, var1: Array, var2: Array, gap12: Array | None = None) -> Sides:
    """The triangle whose angle is theta; with `gap12`, from the gap. Zero variance: (1, 0, 1)."""
    if gap12 is not None:
        deviation = relative_gap(var1, var2, gap12)
        cosine = jnp.where(cov12 < 0, deviation - 1, 1 - deviation)
        return Sides(safe_sqrt(deviation * (2 - deviation)), cosine, jnp.ones_like(cosine))
    c, a, b = _balanced(cov12, var1, var2)
    (c_high, c_low), (a_high, a_low), (b_high, b_low) = _split(c), _split(a), _split(b)
    determinant = (
        (a_high * b_high - c_high * c_high)
        + (a_high * b_low + a_low * b_high - 2 * c_high * c_low)
        + (a_low * b_low - c_low * c_low)
    )
    return Sides(safe_sqrt(jnp.maximum(determinant, 0)), c, a * b)


def cosine_change(primals, tangents) -> tuple[Array, Array]:
    """`s d cos(theta)` and `d s / s`: what every derivative of a function of theta is made of.

    `primals` and `tangents` are (cov12, var1, var2) or (cov12, var1, var2, gap12). With the gap
    the first needs no cancellation of d_cov12 against the change of the variances.
    """
    cov12, var1, var2, *gap = primals
    d_cov12, d_var1, d_var2, *d_gap = tangents
    relative = (d_var1 * reciprocal(var1) + d_var2 * reciprocal(var2)) / 2
    if gap:
        change = gap[0] * relative - d_gap[0]
        return jnp.where(cov12 < 0, -change, change), relative
    return d_cov12 - cov12 * relative, relative


def _d_angle(primals, tangents) -> Array:
    """The change of theta, and 0 where it is infinite."""
    _, var1, var2, *_ = primals
    opposite, _, squared = sides(*primals)
    change, _ = cosine_change(primals, tangents)
    return -change * reciprocal(norm(var1, var2)) * reciprocal(opposite * lax.rsqrt(squared))


@jax.custom_jvp
def angle(cov12: Array, var1: Array, var2: Array, *gap12: Array) -> Array:
    """The angle in [0, pi], right to its own last digits near 0; optionally from the gap."""
    if gap12 and is_single(cov12):
        theta = folded_angle(relative_gap(var1, var2, *gap12))
        return jnp.where(cov12 < 0, math.pi - theta, theta)
    opposite, adjacent, _ = sides(cov12, var1, var2, *gap12)
    return jnp.arctan2(opposite, adjacent)


@angle.defjvp
def _angle_jvp(primals, tangents):
    return angle(*primals), _d_angle(primals, tangents)


@jax.custom_jvp
def arcsine(cov12: Array, var1: Array, var2: Array, *gap12: Array) -> Array:
    """pi/2 - theta, the arcsine of the correlation; accurate relative to itself near 0."""
    if gap12 and is_single(cov12):
        opposite, adjacent, _ = sides(cov12, var1, var2, *gap12)
        return arcsine_of_legs(adjacent, opposite)
    opposite, adjacent, _ = sides(cov12, var1, var2, *gap12)
    return jnp.arctan2(adjacent, opposite)


@arcsine.defjvp
def _arcsine_jvp(primals, tangents):
    return arcsine(*primals), -_d_angle(primals, tangents)


@jax.custom_jvp
def sine_squared(cov12: Array, var1: Array, var2: Array, *gap12: Array) -> Array:
    """sin(theta)^2 = 1 - correlation^2 in [0, 1]; right to its own last digits."""
    if gap12:
        deviation = relative_gap(var1, var2, *gap12)
        return deviation * (2 - deviation)
    opposite, _, squared = sides(cov12, var1, var2, *gap12)
    return jnp.minimum(opposite * opposite / squared, 1)


@sine_squared.defjvp
def _sine_squared_jvp(primals, tangents):
    cov12, var1, var2, *_ = primals
    change, _ = cosine_change(primals, tangents)
    inverse = reciprocal(norm(var1, var2))
    return sine_squared(*primals), -2 * (cov12 * inverse) * (change * inverse)
