"""Duals of piecewise linear functions: a bent line through 0, and ramps beyond.

    phi(x) = constant + below min(x, 0) + above max(x, 0)
             + sum_a upper_a (x - p_a)_+ + lower_a (-x - p_a)_+,    p_a > 0.

The dual of the first three terms, the *base*, is an arc-cosine kernel (Cho & Saul 2009) and some
products of means. Two ramps leave a corner (`corners.py`), of rho where both are on one side, else
of -rho; the base and a ramp leave another with a kink at 0. Corners of L and F - rho L sum to
E[phi' phi'] and what E[phi phi] has beside cov12 E[phi' phi'].

The gap after the layer, k1 k2 - |E[phi phi]| with k = E[phi^2]^(1/2), is that of the base, which is
exact, and k1 k2 - k1' k2' (k' of the base) less what ramps add. Where inputs are close and ramps
matter, so that this cancels, it comes from derivatives at equal inputs (`close.py`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tangents._core.typing import Array
from tangents._infinite.barrier import made_together
from tangents._infinite.dual import close, corners
from tangents._infinite.dual.angle import safe_sqrt
from tangents._infinite.dual.by_corners import (
    NO_LESS,
    Pair,
    Sums,
    angles_of,
    kinks_of,
    pair_of,
    pairs_of,
    unit,
)
from tangents._infinite.dual.orthant import density, upper_tail
from tangents._infinite.dual.prepared import pack, unpack
from tangents._infinite.dual.remainder import ROUNDING, Kinks, polynomial
from tangents._infinite.dual.single_precision import folded_angle, segment

STRAIGHT = {4: 2e-7, 8: 1e-12}  # tolerances by bytes of a number
_ROOT_2PI = math.sqrt(2 * math.pi)


class PiecewiseLinear(NamedTuple):
    """See the head of this file."""

    constant: float
    below: float
    above: float
    places: tuple[float, ...] = ()
    upper: tuple[float, ...] = ()
    lower: tuple[float, ...] = ()

    @property
    def bend(self) -> float:
        """The jump of the slope at 0."""
        return self.above - self.below

    @property
    def mean(self) -> float:
        """Mean of the squared slopes at 0."""
        return (self.above**2 + self.below**2) / 2

    @property
    def line(self) -> tuple[float, float]:
        """Constant and linear coefficient of what is left without ramps outwards."""
        return self.constant, self.below

    @property
    def odd(self) -> bool:
        opposite = all(u == -low for u, low in zip(self.upper, self.lower, strict=True))
        return not self.constant and not self.bend and opposite

    @property
    def signed(self) -> bool:
        """Is the dual close to an odd function of the correlation?"""
        return self.odd or bool(self.above and not self.constant and not self.bend)

    @property
    def has_base(self) -> bool:
        return bool(self.constant or self.above or self.below)

    def of_scale(self, scale: float) -> PiecewiseLinear:
        """Scale phi(x / scale)."""
        places = tuple(scale * p for p in self.places)
        return self._replace(constant=scale * self.constant, places=places)

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


# ---- which functions -----------------------------------------------------------------------------


def form_of(fn: Callable[[Any], Any], kinks: Kinks, tolerance: float) -> PiecewiseLinear | None:
    """`fn` in the form of this file, if there is nothing else to it.

    tolerance: of the largest value.
    """
    if not kinks or any(jumps[0] or jumps[2] or jumps[3] for _, jumps in kinks):
        return None
    found = polynomial(fn, kinks, tolerance, 1)
    if found is None:
        return None
    constant, linear = found
    bend = sum(float(jumps[1]) for place, jumps in kinks if place == 0)
    above = linear + bend
    places = sorted({abs(float(place)) for place, _ in kinks if place != 0})
    jump_at = {float(place): float(jumps[1]) for place, jumps in kinks}
    upper = tuple(jump_at.get(p, 0.0) for p in places)
    lower = tuple(jump_at.get(-p, 0.0) for p in places)
    if abs(above) <= ROUNDING * max(abs(linear), abs(bend)):
        above = 0.0
    return PiecewiseLinear(constant, linear, above, tuple(places), upper, lower)


# ---- one side ------------------------------------------------------------------------------------


class _Side(NamedTuple):
    """Of one side, in units of `fn`.

    kinks: of every place. slope, value: summands of E[phi' phi'] and E[phi phi] that belong to the
    side. base: k of the base. more: k = base (1 + more).
    """

    sd: Array
    kinks: tuple[corners.Side, ...]
    slope: Array
    value: Array
    base: Array
    more: Array
    ends: close.Ends


def _pairs(fn: PiecewiseLinear) -> list[tuple[int, int, float, float]]:
    return pairs_of(fn.upper, fn.lower)


def _ends(fn: PiecewiseLinear, sd: Array) -> tuple[Array, Array, close.Ends]:
    """K of the base, `more`, and what close inputs need."""
    mu = fn.bend / _ROOT_2PI
    base = fn.constant**2 + 2 * fn.constant * mu * sd + fn.mean * sd * sd  # k^2 of the base
    ramps = jnp.zeros_like(sd)  # what is to be added
    d_half = fn.constant * mu + fn.mean * sd  # half of the derivative of k^2
    weighted = jnp.full_like(sd, fn.mean)  # E[phi'^2 z^2]
    slope, moving, cube = weighted, jnp.zeros_like(sd), jnp.zeros_like(sd)
    away = jnp.maximum(sd, NO_LESS * min(fn.places, default=0.0))
    h = [p / away for p in fn.places]
    tails, at = [upper_tail(x) for x in h], [density(x) for x in h]
    for p, x, up, low, tail, g in zip(fn.places, h, fn.upper, fn.lower, tails, at, strict=True):
        line, jumps = fn.above * up - fn.below * low, up * up + low * low
        ramps = ramps + 2 * (fn.constant * (up + low) * (sd * g - p * tail) + line * sd * sd * tail)
        d_half = d_half + fn.constant * (up + low) * g + line * (2 * sd * tail + p * g)
        weighted = weighted + 2 * line * (tail + x * g)
        slope = slope + 2 * line * tail
        moving, cube = moving + jumps * tail, cube - jumps * g * x**3 / (12 * away)
    for a, b, same, _ in _pairs(fn):
        p, q, far = fn.places[a], fn.places[b], max(a, b)
        tail, g = tails[far], at[far]
        ramps = ramps + same * ((sd * sd + p * q) * tail - sd * min(p, q) * g)
        d_half = d_half + same * (sd * (tail + h[far] * g) - (p + q) / 2 * g)
        weighted, slope = weighted + same * (tail + h[far] * g), slope + same * tail
    if fn.has_base:
        more = ramps / jnp.where(base > 0, base, 1)
        more = more / (1 + safe_sqrt(jnp.maximum(1 + more, 0)))
        base = safe_sqrt(base)
        size = base * (1 + more)
    else:
        more, size = jnp.zeros_like(sd), safe_sqrt(ramps)
    d_size = d_half / jnp.where(size > 0, size, 1)
    return base, more, close.Ends(size, (weighted - d_size**2) / 2, cube, slope, moving)


def _side(fn: PiecewiseLinear, fit: corners.Fit, sd: Array) -> _Side:
    if not fn.places:
        zero = jnp.zeros_like(sd)
        return _Side(sd, (), zero, zero, *_ends(fn, sd))
    slope = value = jnp.zeros_like(sd)
    away = jnp.maximum(sd, NO_LESS * min(fn.places))
    for p, up, low in zip(fn.places, fn.upper, fn.lower, strict=True):
        tail, g = upper_tail(p / away), density(p / away)
        slope = slope + (fn.below * (up - low) - fn.bend * low) * tail
        value = value + fn.constant * (up + low) * (sd * g - p * tail)
    kinks = kinks_of(fit, fn.places, away, bool(fn.bend))
    return _Side(sd, kinks, slope, value, *_ends(fn, sd))


def _side_of(fn: PiecewiseLinear, fit: corners.Fit, var: Array) -> _Side:
    scale = unit(fn.places)
    return _side(fn.of_scale(scale), fit, jnp.sqrt(var * (scale * scale)))


# ---- pairs ---------------------------------------------------------------------------------------


class _Parts(NamedTuple):
    """E[phi phi] and E[phi' phi'], and the gap of the base: if `signed` of |rho|, else of rho."""

    value: Array
    slope: Array
    gap: Array


def _base(fn: PiecewiseLinear, one: _Side, two: _Side, pair: Pair) -> _Parts:
    cov, product, gap12 = pair
    negative = cov < 0
    if fn.bend:
        deviation = jnp.where(product > 0, gap12 / jnp.where(product > 0, product, 1), 1)
        deviation = jnp.minimum(deviation, 1)
        kink, angle = fn.bend**2 / (2 * math.pi), folded_angle(deviation)
        cut = -kink * product * segment(deviation)
        both = fn.above * fn.below
        far = (fn.above + fn.below) ** 2 / 2 * product - both * gap12
        gap = jnp.where(negative, far, fn.mean * gap12) + cut
        value = jnp.where(negative, both, fn.mean) * cov - cut
        slope = fn.mean - kink * jnp.where(negative, math.pi - angle, angle)
    else:
        far = gap12 if fn.signed else 2 * product - gap12
        gap = fn.mean * jnp.where(negative, far, gap12)
        value, slope = fn.mean * cov, jnp.full_like(cov, fn.mean)
    if fn.constant:
        mu, total = fn.bend / _ROOT_2PI, one.sd + two.sd
        added = fn.constant**2 + fn.constant * mu * total
        value = value + added
        spread = fn.constant**2 * (fn.mean - mu * mu) * (one.sd - two.sd) ** 2
        gap = gap + spread / (one.base * two.base + added + fn.mean * product)
    return _Parts(value, slope, gap)


def _ramps(fn: PiecewiseLinear, one: _Side, two: _Side, pair: Pair) -> _Parts:
    """What ramps add to E[phi phi] and E[phi' phi'], of |rho| if `signed`; no gap."""
    cov = pair.cov12
    negative, size = cov < 0, jnp.abs(cov)
    away = one.kinks[0].sd, two.kinks[0].sd
    product = away[0] * away[1]
    nearer, farther, signed, turned = angles_of(pair, (one.sd, two.sd), away, min(fn.places))
    slope, ramp = one.slope + two.slope, jnp.zeros_like(cov)
    for a, b, same, other in _pairs(fn):
        places, kinks = (fn.places[a], fn.places[b]), (one.kinks[a], two.kinks[b])
        if same and other:
            near, far = (corners.corner(places, *kinks, angle) for angle in (nearer, farther))
            if fn.odd:
                slope = slope + same * (near.step + far.step)
                ramp = ramp + same * (near.ramp - far.ramp)
                continue
            ahead = corners.Corner(*(jnp.where(negative, y, x) for x, y in zip(near, far)))
            behind = corners.Corner(*(jnp.where(negative, x, y) for x, y in zip(near, far)))
            slope = slope + (same * ahead.step - other * behind.step)
            ramp = ramp + (same * ahead.ramp + other * behind.ramp)
        elif same:
            ahead = corners.corner(places, *kinks, signed)
            slope, ramp = slope + same * ahead.step, ramp + same * ahead.ramp
        elif other:
            behind = corners.corner(places, *kinks, turned)
            slope, ramp = slope - other * behind.step, ramp + other * behind.ramp
    if fn.bend:
        for place, up, low, *kinks in zip(
            fn.places, fn.upper, fn.lower, one.kinks, two.kinks, strict=True
        ):
            factor = fn.bend * (up + low)
            for kink, sd in zip(kinks, reversed(away), strict=True):
                found = corners.flat_corner(place, kink, sd, cov, product, nearer)
                slope = slope + factor * found.step
                ramp = ramp + (factor * pair.product) * found.ramp
    if fn.odd:
        return _Parts(size * slope + ramp, slope, ramp)
    value = cov * slope + ramp + (one.value + two.value)
    return _Parts(jnp.where(negative, -value, value) if fn.signed else value, slope, ramp)


def _sums(
    fn: PiecewiseLinear,
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
    base = _base(fn, one, two, pair)
    near, slope = base.gap, base.slope
    if fn.places:
        more = _ramps(fn, one, two, pair)
        slope = slope + more.slope
        near = _near(fn, one, two, pair, base, more)
    scales = one.ends.size / scale, two.ends.size / scale
    return Sums(made_together(near / (scale * scale), slope), scales)


def _near(fn: PiecewiseLinear, one: _Side, two: _Side, pair: _Pair, base: _Parts, more: _Parts):
    turned = pair.cov12 < 0
    if fn.has_base:
        bases = one.base * two.base
        size = bases * (jnp.abs(one.more) + jnp.abs(two.more))
        near = base.gap + (bases * (one.more + two.more + one.more * two.more) - more.value)
    else:
        size = one.ends.size * two.ends.size
        near = size - more.value
    apart = one.sd - two.sd
    least = close.gap_of_close(one.ends, two.ends, apart, pair.gap12, base.slope + more.slope)
    closer = close.are_close(apart, pair.product, near, size)
    closer = closer if fn.odd else closer & ~turned
    return jnp.maximum(jnp.where(closer, least, near), 0)
