"""Duals of functions that are quadratic between kinks, such as `hard_swish`, in single precision.

    phi(x) = c0 + c1 x + c2 x^2 + sum_a [U_a(x - p_a) + D_a(-x - p_a)],    p_a > 0,
    U(t) = bend t_+ + curve t_+^2 / 2,    D likewise.

Products of two such arches are the moments of a corner (`corners.py`), of rho where both are on one
side, else of -rho. Those of an arch and a polynomial, and of polynomials, belong to one side but
for powers of cov12, as E[f(v) (z1^2 - 1)] = rho^2 E[f''(v)] var2 and so on: with a mean
m = c0 + c2 var, e0 = E[U + D] and its derivatives in the mean e1, e2,

    m m + m e0 + e0 m + cov12 (c1^2 + c1 (e1 + e1)) + cov12^2 (2 c2^2 + c2 (e2 + e2)).

Squares of ramps grow like variances and cancel, so that of float32 little is left for deviations
above four times the nearest place. The gap after the layer is a difference, or where inputs are
close comes from derivatives at equal inputs (`close.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tangents._core.typing import Array
from tangents._infinite.barrier import made_together
from tangents._infinite.dual import close, corners
from tangents._infinite.dual.by_corners import (
    NO_LESS,
    Pair,
    Sums,
    angles_of,
    kinks_of,
    pair_of,
    unit,
)
from tangents._infinite.dual.orthant import density, upper_tail
from tangents._infinite.dual.prepared import pack, unpack
from tangents._infinite.dual.remainder import Kinks, polynomial


class PiecewiseQuadratic(NamedTuple):
    """See the head of this file. upper, lower: (bend, curve) of every place."""

    constant: float
    linear: float
    square: float
    places: tuple[float, ...]
    upper: tuple[tuple[float, float], ...]
    lower: tuple[tuple[float, float], ...]

    @property
    def signed(self) -> bool:
        """Is the dual close to an odd function of the correlation?"""
        return False

    @property
    def even(self) -> bool:
        return self.upper == self.lower and not self.linear

    @property
    def kinks(self) -> list[tuple[float, tuple[float, float, float]]]:
        """(place, jumps of phi, phi', phi'')."""
        up = [(p, (0.0, bend, curve)) for p, (bend, curve) in zip(self.places, self.upper)]
        low = [(-p, (0.0, bend, -curve)) for p, (bend, curve) in zip(self.places, self.lower)]
        return up + low

    def of_scale(self, scale: float) -> PiecewiseQuadratic:
        """Scale phi(x / scale)."""

        def bent(arches: tuple) -> tuple:
            return tuple((bend, curve / scale) for bend, curve in arches)

        places = tuple(scale * p for p in self.places)
        polynomial = scale * self.constant, self.linear, self.square / scale
        return PiecewiseQuadratic(*polynomial, places, bent(self.upper), bent(self.lower))

    def __call__(self, x: Array) -> Array:
        """phi(x)."""
        total = self.constant + x * (self.linear + x * self.square)
        for sign, arches in ((1, self.upper), (-1, self.lower)):
            for p, (bend, curve) in zip(self.places, arches, strict=True):
                t = jnp.maximum(sign * x - p, 0)
                total = total + t * (bend + t * (curve / 2))
        return total

    def features(self, fit: corners.Fit, var: Array) -> Array:
        """What pairs need of one side, `(numbers, *var.shape)`."""
        return pack(_side_of(self, fit, var), var.shape)

    def size(self, fit: corners.Fit, var: Array) -> Array:
        """E[phi^2]^(1/2)."""
        return _side_of(self, fit, var).ends.size / unit(self.places)

    def sums(
        self, fit: corners.Fit, both: Any, cov12: Array, side1: Array, side2: Array, gap12: Any
    ) -> Sums:
        """In single precision, for deviations up to `fit.reach` times the least place.

        both: `features` of both sides.
        """
        return _sums(self, fit, both, cov12, side1, side2, gap12)


def form_of(fn: Callable[[Any], Any], kinks: Kinks, tolerance: float) -> PiecewiseQuadratic | None:
    """`fn` in the form of this file, if there is nothing else to it, and nothing at 0.

    tolerance: of the largest value.
    """
    if not is_piecewise_quadratic(fn, kinks, tolerance) or any(place == 0 for place, _ in kinks):
        return None
    found = polynomial(fn, kinks, tolerance, 2)
    assert found is not None
    at = {float(place): (float(jumps[1]), float(jumps[2])) for place, jumps in kinks}
    places = tuple(sorted({abs(p) for p in at}))
    lower = [at.get(-p, (0.0, 0.0)) for p in places]
    constant, linear, square = found
    upper = tuple(at.get(p, (0.0, 0.0)) for p in places)
    lower = tuple((bend, -curve) for bend, curve in lower)
    return PiecewiseQuadratic(constant, linear, square, places, upper, lower)


def is_piecewise_quadratic(fn: Callable[[Any], Any], kinks: Kinks, tolerance: float) -> bool:
    """Is `fn` a quadratic polynomial between kinks?"""
    if not kinks or any(jumps[0] or jumps[3] for _, jumps in kinks):
        return False
    return polynomial(fn, kinks, tolerance, 2) is not None


# ---- one side ------------------------------------------------------------------------------------


class _Side(NamedTuple):
    """Of one side, in units of `fn`. kinks: of every place. means: m, e0, e1, e2."""

    sd: Array
    kinks: tuple[corners.Side, ...]
    means: tuple[Array, Array, Array, Array]
    ends: close.Ends


def _side_of(fn: PiecewiseQuadratic, fit: corners.Fit, var: Array) -> _Side:
    scale = unit(fn.places)
    fn = fn.of_scale(scale)
    sd = jnp.sqrt(var * (scale * scale))
    away = jnp.maximum(sd, NO_LESS * min(fn.places))
    e0 = e1 = e2 = jnp.zeros_like(sd)
    for p, up, low in zip(fn.places, fn.upper, fn.lower, strict=True):
        tail, g = upper_tail(p / away), density(p / away)
        ramp = away * g - p * tail
        arch = (away * away + p * p) * tail - p * away * g  # of its square
        bend, curve = up[0] + low[0], up[1] + low[1]
        e0 = e0 + (bend * ramp + (curve / 2) * arch)
        e1 = e1 + ((up[0] - low[0]) * tail + (up[1] - low[1]) * ramp)
        e2 = e2 + (bend * g / away + curve * tail)
    means = fn.constant + fn.square * sd * sd, e0, e1, e2
    kinks = kinks_of(fit, fn.places, away, flat=False)
    return _Side(sd, kinks, means, close.ends_of(fn, fn.kinks, sd))


# ---- pairs ---------------------------------------------------------------------------------------


def _of_polynomials(fn: PiecewiseQuadratic, one: _Side, two: _Side, cov: Array) -> tuple:
    """E[phi phi] and E[phi' phi'] but for products of two arches."""
    (m, a0, a1, a2), (n, b0, b1, b2) = one.means, two.means
    first = fn.linear * (fn.linear + a1 + b1)
    second = fn.square * (2 * fn.square + a2 + b2)
    value = m * n + (m * b0 + a0 * n) + cov * (first + cov * second)
    return value, first + 2 * cov * second


def _of_arches(fn: PiecewiseQuadratic, one: _Side, two: _Side, pair: Pair) -> tuple[Array, Array]:
    """What products of two arches add to E[phi phi] and E[phi' phi']."""
    cov = pair.cov12
    negative, size = cov < 0, jnp.abs(cov)
    away = one.kinks[0].sd, two.kinks[0].sd
    angles = angles_of(pair, (one.sd, two.sd), away, min(fn.places))
    value, slope = jnp.zeros_like(cov), jnp.zeros_like(cov)
    for a, b in np.ndindex(len(fn.places), len(fn.places)):
        places, kinks = (fn.places[a], fn.places[b]), (one.kinks[a], two.kinks[b])
        same = np.outer(fn.upper[a], fn.upper[b]) + np.outer(fn.lower[a], fn.lower[b])
        other = np.outer(fn.upper[a], fn.lower[b]) + np.outer(fn.lower[a], fn.upper[b])
        alike = np.array_equal(same, other)  # then only the slope tells both sides apart
        if np.any(same) and np.any(other):
            near = corners.moments(places, *kinks, angles.nearer, size)
            far = corners.moments(places, *kinks, angles.farther, -size)
            ahead, behind = near, far
            if not alike:
                ahead = corners.Moments(*(jnp.where(negative, y, x) for x, y in zip(near, far)))
                behind = corners.Moments(*(jnp.where(negative, x, y) for x, y in zip(near, far)))
        elif np.any(same):
            ahead = behind = corners.moments(places, *kinks, angles.signed, cov)
        elif np.any(other):
            ahead = behind = corners.moments(places, *kinks, angles.turned, -cov)
        else:
            continue
        steps = jnp.zeros_like(cov)
        for turns, factors, m in ((1, same, ahead), (-1, other, behind)):
            if np.any(factors):
                (bends, bend1), (bend2, curves) = ((float(f) for f in row) for row in factors)
                value = value + bends * m.m11 + (bend2 * m.m21 + bend1 * m.m12) / 2
                value = value + curves / 4 * m.m22
                own = bends * m.m00 + bend2 * m.m10 + bend1 * m.m01 + curves * m.m11
                steps = steps + turns * own
        slope = slope + (jnp.where(negative, -steps, steps) if alike else steps)
    return value, slope


def _sums(
    fn: PiecewiseQuadratic,
    fit: corners.Fit,
    both: Any,
    cov12: Array,
    side1: Array,
    side2: Array,
    gap12: Any,
) -> Sums:
    of_side = functools.partial(_side_of, fn, fit)
    one, two = (unpack(a, jax.eval_shape(of_side, side)) for a, side in zip(both, (side1, side2)))
    scale = unit(fn.places)
    fn = fn.of_scale(scale)
    pair = pair_of(scale, (one.sd, two.sd), cov12, side1, side2, gap12)
    turned = pair.cov12 < 0
    if fn.even:
        pair = pair._replace(cov12=jnp.abs(pair.cov12))
    value, slope = _of_polynomials(fn, one, two, pair.cov12)
    more, steeper = _of_arches(fn, one, two, pair)
    value, slope = value + more, slope + steeper
    size = one.ends.size * two.ends.size
    near, apart = size - value, one.sd - two.sd
    least = close.gap_of_close(one.ends, two.ends, apart, pair.gap12, slope)
    closer = (pair.cov12 >= 0) & close.are_close(apart, pair.product, near, size)
    near = jnp.maximum(jnp.where(closer, least, near), 0) / (scale * scale)
    if fn.even:
        slope = jnp.where(turned, -slope, slope)
    return Sums(made_together(near, slope), (one.ends.size / scale, two.ends.size / scale))
