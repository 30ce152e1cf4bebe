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
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tangents._core.typing import Array
from tangents._infinite.barrier import made_once, made_together, taken_apart
from tangents._infinite.dual import close, corners
from tangents._infinite.dual.angle import safe_sqrt
from tangents._infinite.dual.orthant import density, upper_tail
from tangents._infinite.dual.prepared import Prepared, pack, prepare, unpack
from tangents._infinite.dual.single_precision import folded_angle, segment

STRAIGHT = {4: 2e-7, 8: 1e-12}  # tolerances by bytes of a number
_ROUNDING = 1e-12  # of the largest value of a function
_FAR = 1e5  # where lines are looked at, in units of where kinks are
_NO_LESS = 1e-4  # deviations that count as no smaller, in units of a place
_EQUAL = 1e-22  # gap of equal inputs, in units of a place squared
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


# ---- which functions -----------------------------------------------------------------------------


def form_of(
    fn: Callable[[Any], Any],
    kinks: Sequence[tuple[float, Sequence[float]]],
    tolerance: float,
) -> PiecewiseLinear | None:
    """`fn` in the form of this file, if there is nothing else to it.

    kinks: (place, (jump of fn, of fn', of fn'', of fn''')). tolerance: of the largest value.
    """
    if not kinks or any(jumps[0] or jumps[2] or jumps[3] for _, jumps in kinks):
        return None
    found, size = _rest(fn, kinks, tolerance, 1)
    if found is None:
        return None
    constant, linear = (float(c) if abs(c) > _ROUNDING * size else 0.0 for c in found)
    bend = sum(float(jumps[1]) for place, jumps in kinks if place == 0)
    above = linear + bend
    places = sorted({abs(float(place)) for place, _ in kinks if place != 0})
    jump_at = {float(place): float(jumps[1]) for place, jumps in kinks}
    upper = tuple(jump_at.get(p, 0.0) for p in places)
    lower = tuple(jump_at.get(-p, 0.0) for p in places)
    if abs(above) <= _ROUNDING * max(abs(linear), abs(bend)):
        above = 0.0
    return PiecewiseLinear(constant, linear, above, tuple(places), upper, lower)


def is_piecewise_quadratic(
    fn: Callable[[Any], Any],
    kinks: Sequence[tuple[float, Sequence[float]]],
    tolerance: float,
) -> bool:
    """Is `fn` a quadratic polynomial between kinks? Arguments as in `form_of`."""
    if not kinks or any(jumps[0] or jumps[3] for _, jumps in kinks):
        return False
    return _rest(fn, kinks, tolerance, 2)[0] is not None


def _rest(
    fn: Callable[[Any], Any],
    kinks: Sequence[tuple[float, Sequence[float]]],
    tolerance: float,
    degree: int,
) -> tuple[np.ndarray | None, float]:
    """The polynomial that is left without kinks, if it is one, and the largest value nearby."""
    near = 4 * max(1.0, *(abs(place) for place, _ in kinks))
    far = np.geomspace(near, _FAR * near, 64)
    x = np.concatenate([np.linspace(-near, near, 4097), far, -far])
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        y = np.asarray(jax.jit(fn)(jnp.asarray(x)), np.float64)
    if not np.all(np.isfinite(y)):
        return None, 0.0
    ramps = [(_ramp(x, place), place, jumps) for place, jumps in kinks]
    parts = [jumps[1] * ramp for ramp, _, jumps in ramps]
    # A ramp inwards differs by a line, and with another sign its square by a polynomial.
    parts += [(-1 if place < 0 else 1) * jumps[2] / 2 * r**2 for r, place, jumps in ramps]
    rest = y - sum(parts)
    found = np.polynomial.polynomial.polyfit(x[:4097], rest[:4097], degree)
    error = np.abs(rest - np.polynomial.polynomial.polyval(x, found))
    size = float(np.max(np.abs(y[:4097])))
    sizes = np.max(np.abs(np.stack([y, *parts])), 0) if degree > 1 else np.abs(y)
    return (found, size) if np.all(error <= tolerance * np.maximum(size, sizes)) else (None, size)


def _ramp(x: np.ndarray, place: float) -> np.ndarray:
    """With a kink at `place`, outwards of 0."""
    return np.maximum(-x + place, 0) if place < 0 else np.maximum(x - place, 0)


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
    """(a, b, factor of the corner of rho, factor of the corner of -rho)."""
    index = range(len(fn.places))
    found = []
    for a in index:
        for b in index:
            same = fn.upper[a] * fn.upper[b] + fn.lower[a] * fn.lower[b]
            other = fn.upper[a] * fn.lower[b] + fn.lower[a] * fn.upper[b]
            found.append((a, b, same, other))
    return found


def _ends(fn: PiecewiseLinear, sd: Array) -> tuple[Array, Array, close.Ends]:
    """K of the base, `more`, and what close inputs need."""
    mu = fn.bend / _ROOT_2PI
    base = fn.constant**2 + 2 * fn.constant * mu * sd + fn.mean * sd * sd  # k^2 of the base
    ramps = jnp.zeros_like(sd)  # what is to be added
    d_half = fn.constant * mu + fn.mean * sd  # half of the derivative of k^2
    weighted = jnp.full_like(sd, fn.mean)  # E[phi'^2 z^2]
    slope, moving, cube = weighted, jnp.zeros_like(sd), jnp.zeros_like(sd)
    away = jnp.maximum(sd, _NO_LESS * min(fn.places, default=0.0))
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
    away = jnp.maximum(sd, _NO_LESS * min(fn.places))
    for p, up, low in zip(fn.places, fn.upper, fn.lower, strict=True):
        tail, g = upper_tail(p / away), density(p / away)
        slope = slope + (fn.below * (up - low) - fn.bend * low) * tail
        value = value + fn.constant * (up + low) * (sd * g - p * tail)
    reach = fit.reach * min(fn.places)
    fits = [corners.fit_for(reach / p) for p in fn.places]  # places further out take shorter ones
    pairs = zip(fits, fn.places, strict=True)
    kinks = tuple(corners.side(own, p, away, bool(fn.bend)) for own, p in pairs)
    return _Side(sd, kinks, slope, value, *_ends(fn, sd))


# ---- pairs ---------------------------------------------------------------------------------------


class _Pair(NamedTuple):
    cov12: Array
    product: Array
    gap12: Array


class _Parts(NamedTuple):
    """E[phi phi] and E[phi' phi'], and the gap of the base: if `signed` of |rho|, else of rho."""

    value: Array
    slope: Array
    gap: Array


def _base(fn: PiecewiseLinear, one: _Side, two: _Side, pair: _Pair) -> _Parts:
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


def _ramps(fn: PiecewiseLinear, one: _Side, two: _Side, pair: _Pair) -> _Parts:
    """What ramps add to E[phi phi] and E[phi' phi'], of |rho| if `signed`; no gap."""
    cov = pair.cov12
    negative, size = cov < 0, jnp.abs(cov)
    # Deviations that count as larger than they are further apart: zero is uncorrelated.
    product = one.kinks[0].sd * two.kinks[0].sd
    gap12 = jnp.maximum(pair.gap12 + (product - pair.product), _EQUAL * min(fn.places) ** 2)
    root = jnp.sqrt(gap12 * (2 * product - gap12))
    half_rate = -0.5 / (root * root)
    nearer = corners.Angle(gap12, root, half_rate)
    farther = corners.Angle(2 * product - gap12, root, half_rate, acute=True)
    signed = corners.Angle(jnp.where(negative, farther.dist, gap12), root, half_rate)
    turned = corners.Angle(jnp.where(negative, gap12, farther.dist), root, half_rate)
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
            for kink, sd in zip(kinks, (two.kinks[0].sd, one.kinks[0].sd), strict=True):
                found = corners.flat_corner(place, kink, sd, cov, product, nearer)
                slope = slope + factor * found.step
                ramp = ramp + (factor * pair.product) * found.ramp
    if fn.odd:
        return _Parts(size * slope + ramp, slope, ramp)
    value = cov * slope + ramp + (one.value + two.value)
    return _Parts(jnp.where(negative, -value, value) if fn.signed else value, slope, ramp)


# ---- the dual ------------------------------------------------------------------------------------


class Sums(NamedTuple):
    """What is summed of pairs.

    pair: k1 k2 - nngp (of odd functions - |nngp|) and d_nngp, by `made_together`.
    """

    pair: Any
    scales: tuple[Array, Array]


def _scale(fn: PiecewiseLinear) -> float:
    """In units of which the least place is about 1: a power of two, which is exact."""
    return 2.0 ** -round(math.log2(min(fn.places, default=1.0)))


def _side_of(fn: PiecewiseLinear, fit: corners.Fit, var: Array) -> _Side:
    scale = _scale(fn)
    return _side(fn.of_scale(scale), fit, jnp.sqrt(var * (scale * scale)))


def features(fn: PiecewiseLinear, fit: corners.Fit, var: Array) -> Array:
    """What pairs need of one side, `(numbers, *var.shape)`."""
    return pack(_side_of(fn, fit, var), var.shape)


def sums(
    fn: PiecewiseLinear,
    fit: corners.Fit,
    both: Any,
    cov12: Array,
    side1: Array,
    side2: Array,
    gap12: Any,
) -> Sums:
    """In single precision, for deviations up to `fit.reach` times the least place.

    both: `features` of both sides.
    """
    of_side = functools.partial(_side_of, fn, fit)
    one, two = (unpack(a, jax.eval_shape(of_side, side)) for a, side in zip(both, (side1, side2)))
    scale = _scale(fn)
    fn, square = fn.of_scale(scale), scale * scale
    cov, product = cov12 * square, one.sd * two.sd
    if gap12 is None:
        var1, var2, size = side1 * square, side2 * square, jnp.abs(cov)
        det = var1 * (var2 - size) + size * (var1 - size)
        gap = jnp.maximum(det, 0) / jnp.where(product > 0, product + size, 1)
    else:
        gap = jnp.clip(gap12 * square, 0, product)
    pair = _Pair(cov, product, gap)
    base = _base(fn, one, two, pair)
    near, slope = base.gap, base.slope
    if fn.places:
        more = _ramps(fn, one, two, pair)
        slope = slope + more.slope
        near = _near(fn, one, two, pair, base, more)
    scales = one.ends.size / scale, two.ends.size / scale
    return Sums(made_together(near / square, slope), scales)


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


def _fits(fn: PiecewiseLinear) -> tuple[corners.Fit, corners.Fit]:
    return corners.fits(min(fn.places, default=math.inf))


def _level(fn: PiecewiseLinear, side1: Array, side2: Array) -> Array:
    """Which of `_fits` reaches; their number: none does."""
    largest = jnp.maximum(jnp.max(side1, initial=0), jnp.max(side2, initial=0))
    reaches = [(fit.reach * min(fn.places, default=math.inf)) ** 2 for fit in _fits(fn)]
    return sum(((largest > r).astype(jnp.int32) for r in reaches), start=jnp.int32(0))


def prepare_sides(fn: PiecewiseLinear, *sides: Array) -> Prepared:
    """What belongs to one side each."""
    forms = [functools.partial(features, fn, fit) for fit in _fits(fn)]
    return prepare(forms, _level(fn, sides[0], sides[-1]), sides)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def dual(fn: PiecewiseLinear, exact: Callable, prepared, cov12, var1, var2, side1, side2, *gap12):
    """Nngp, d_nngp and, if given, the gap, in single precision.

    exact: `(cov12, var1, var2, side1, side2, gap12) -> (nngp, d_nngp, (k1, k2), gap)` for
      deviations beyond all `_fits`. Derivatives are its.
    prepared: of both sides, by `prepare_sides`, or None.
    """
    gap = gap12[0] if gap12 else None

    def near(fit, prepared, cov12, var1, var2, side1, side2, gap):
        if prepared is None:
            found = tuple(features(fn, fit, side) for side in (side1, side2))
            found = made_once(found, (side1.shape, side2.shape), cov12)
        else:
            found = prepared.sides
        return sums(fn, fit, found, cov12, side1, side2, gap)

    def far(prepared, cov12, var1, var2, side1, side2, gap):
        value, slope, scales, gap = exact(cov12, var1, var2, side1, side2, gap)
        # Where it is small its rounding may have another sign.
        size = jnp.maximum(jnp.where(cov12 < 0, -value, value), 0) if fn.signed else value
        near = scales[0] * scales[1] - size
        near = near if gap is None else jnp.where(size < 0, near, gap)
        return Sums(made_together(near, slope), scales)

    args = prepared, cov12, var1, var2, side1, side2, gap
    branches = [functools.partial(near, fit) for fit in _fits(fn)]
    if fn.places:
        level = _level(fn, side1, side2) if prepared is None else prepared.level
        pair, scales = jax.lax.switch(level, [*branches, far], *args)
    else:
        pair, scales = branches[0](*args)
    near_, slope = taken_apart(pair)
    scale = scales[0] * scales[1]
    size = scale - near_
    gap_ = jnp.where(size < 0, scale + size, near_)
    nngp = jnp.where(cov12 < 0, -size, size) if fn.signed else size
    return (nngp, slope, gap_) if gap12 else (nngp, slope)


@dual.defjvp
def _dual_jvp(fn, exact, primals, tangents):
    prepared, *primals = primals

    def values(cov12, var1, var2, side1, side2, *gap12):
        gap = gap12[0] if gap12 else None
        nngp, slope, _, gap = exact(cov12, var1, var2, side1, side2, gap)
        return (nngp, slope, gap) if gap12 else (nngp, slope)

    change = jax.jvp(values, tuple(primals), tuple(tangents[1:]))[1]
    return dual(fn, exact, prepared, *primals), change


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def diagonal(fn: PiecewiseLinear, exact: Callable, var: Array) -> Array:
    """E[phi(u)^2], in value what `dual` gives for equal inputs."""

    def near(fit, var):
        return _side_of(fn, fit, var).ends.size / _scale(fn)

    def far(var):
        return exact(var, var, var, var, var, None)[2][0]

    branches = [functools.partial(near, fit) for fit in _fits(fn)]
    if not fn.places:
        scale = branches[0](var)
    else:
        scale = jax.lax.switch(_level(fn, var, var), [*branches, far], var)
    return scale * scale


@diagonal.defjvp
def _diagonal_jvp(fn, exact, primals, tangents):
    def value(var):
        return exact(var, var, var, var, var, None)[0]

    return diagonal(fn, exact, *primals), jax.jvp(value, primals, tangents)[1]
