"""Duals in single precision of functions that are polynomials between kinks, by corners.

What `piecewise_linear.py` and `piecewise_quadratic.py` have in common: their polynomials
(`corners.py`) reach to a deviation, beyond which and for derivatives the closed form serves.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from tangents._core.typing import Array
from tangents._infinite.barrier import made_once, made_together, taken_apart
from tangents._infinite.dual import corners
from tangents._infinite.dual.prepared import Prepared, prepare

NO_LESS = 1e-4  # deviations that count as no smaller, in units of a place
_EQUAL = 1e-22  # gap of equal inputs, in units of a place squared


class Sums(NamedTuple):
    """What is summed of pairs.

    pair: k1 k2 - nngp (of odd functions - |nngp|) and d_nngp, by `made_together`. scales: k1, k2.
    """

    pair: Any
    scales: tuple[Array, Array]


class Form(Protocol):
    """A function; equal ones are equal keys.

    places: of its kinks, without signs, least first. signed: is its dual close to an odd function
    of the correlation?
    """

    @property
    def places(self) -> tuple[float, ...]: ...

    @property
    def signed(self) -> bool: ...

    def features(self, fit: corners.Fit, var: Array) -> Array:
        """What pairs need of one side, `(numbers, *var.shape)`."""
        ...

    def size(self, fit: corners.Fit, var: Array) -> Array:
        """E[phi^2]^(1/2)."""
        ...

    def sums(
        self, fit: corners.Fit, both: Any, cov12: Array, side1: Array, side2: Array, gap12: Any
    ) -> Sums:
        """For deviations up to `fit.reach` times the least place; both: `features` of the sides."""
        ...


def unit(places: tuple[float, ...]) -> float:
    """The power of two, which scales exactly, that takes the least place to about 1."""
    return 2.0 ** -round(math.log2(min(places, default=1.0)))


class Pair(NamedTuple):
    """In units of a function; product: sd1 sd2."""

    cov12: Array
    product: Array
    gap12: Array


def pair_of(
    scale: float, sds: tuple[Array, Array], cov12: Array, side1: Array, side2: Array, gap12: Any
) -> Pair:
    """scale: of the units. sds: deviations in them."""
    square = scale * scale
    cov, product = cov12 * square, sds[0] * sds[1]
    if gap12 is not None:
        return Pair(cov, product, jnp.clip(gap12 * square, 0, product))
    var1, var2, size = side1 * square, side2 * square, jnp.abs(cov)
    det = var1 * (var2 - size) + size * (var1 - size)
    gap = jnp.maximum(det, 0) / jnp.where(product > 0, product + size, 1)
    return Pair(cov, product, gap)


class Angles(NamedTuple):
    """Of a pair, for corners of |rho|, -|rho|, rho and -rho."""

    nearer: corners.Angle
    farther: corners.Angle
    signed: corners.Angle
    turned: corners.Angle


def angles_of(
    pair: Pair, sds: tuple[Array, Array], away: tuple[Array, Array], place: float
) -> Angles:
    """sds: deviations. away: the same, small ones as `NO_LESS` of places. place: the least."""
    negative = pair.cov12 < 0
    product = away[0] * away[1]
    # Deviations that count as larger than they are further apart: zero is uncorrelated. (Not as
    # product - pair.product: fused, that leaves a rounding in some of what reads it.)
    further = (away[0] - sds[0]) * away[1] + sds[0] * (away[1] - sds[1])
    gap12 = jnp.maximum(pair.gap12 + further, _EQUAL * place**2)
    root = jnp.sqrt(gap12 * (2 * product - gap12))
    half_rate = -0.5 / (root * root)
    far = 2 * product - gap12
    return Angles(
        corners.Angle(gap12, root, half_rate),
        corners.Angle(far, root, half_rate, acute=True),
        corners.Angle(jnp.where(negative, far, gap12), root, half_rate),
        corners.Angle(jnp.where(negative, gap12, far), root, half_rate),
    )


def pairs_of(upper: Sequence[float], lower: Sequence[float]) -> list[tuple[int, int, float, float]]:
    """(a, b, factor of the corner of rho, factor of the corner of -rho)."""
    index = range(len(upper))
    found = []
    for a in index:
        for b in index:
            same = upper[a] * upper[b] + lower[a] * lower[b]
            other = upper[a] * lower[b] + lower[a] * upper[b]
            found.append((a, b, same, other))
    return found


def kinks_of(
    fit: corners.Fit, places: tuple[float, ...], away: Array, flat: bool
) -> tuple[corners.Side, ...]:
    """One side of each place, with a kink at 0 if `flat`."""
    reach = fit.reach * min(places)
    fits = [corners.fit_for(reach / p) for p in places]  # places further out take shorter ones
    return tuple(corners.side(own, p, away, flat) for own, p in zip(fits, places, strict=True))


def _fits(fn: Form) -> tuple[corners.Fit, corners.Fit]:
    return corners.fits(min(fn.places, default=math.inf))


def _level(fn: Form, side1: Array, side2: Array) -> Array:
    """Which of `_fits` reaches; their number: none does."""
    largest = jnp.maximum(jnp.max(side1, initial=0), jnp.max(side2, initial=0))
    reaches = [(fit.reach * min(fn.places, default=math.inf)) ** 2 for fit in _fits(fn)]
    return sum(((largest > r).astype(jnp.int32) for r in reaches), start=jnp.int32(0))


def prepare_sides(fn: Form, *sides: Array) -> Prepared:
    """What belongs to one side each."""
    forms = [functools.partial(fn.features, fit) for fit in _fits(fn)]
    return prepare(forms, _level(fn, sides[0], sides[-1]), sides)


class Exact(NamedTuple):
    """Closed forms, `(cov12, var1, var2, side1, side2, gap12) -> (nngp, d_nngp, (k1, k2), gap)`.

    beyond: for deviations beyond the reach of polynomials. anywhere: differentiated.
    """

    beyond: Callable[..., tuple]
    anywhere: Callable[..., tuple]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def dual(fn: Form, exact: Exact, prepared, cov12, var1, var2, side1, side2, *gap12):
    """Nngp, d_nngp and, if given, the gap, in single precision.

    exact: the closed form; its first serves deviations beyond all `_fits`.
    prepared: of both sides, by `prepare_sides`, or None.
    """
    gap = gap12[0] if gap12 else None

    def near(fit, prepared, cov12, var1, var2, side1, side2, gap):
        if prepared is None:
            found = tuple(fn.features(fit, side) for side in (side1, side2))
            found = made_once(found, (side1.shape, side2.shape), cov12)
        else:
            found = prepared.sides
        return fn.sums(fit, found, cov12, side1, side2, gap)

    def far(prepared, cov12, var1, var2, side1, side2, gap):
        value, slope, scales, gap = exact.beyond(cov12, var1, var2, side1, side2, gap)
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
        nngp, slope, _, gap = exact.anywhere(cov12, var1, var2, side1, side2, gap)
        return (nngp, slope, gap) if gap12 else (nngp, slope)

    change = jax.jvp(values, tuple(primals), tuple(tangents[1:]))[1]
    return dual(fn, exact, prepared, *primals), change


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def diagonal(fn: Form, exact: Exact, var: Array) -> Array:
    """E[phi(u)^2], in value what `dual` gives for equal inputs."""

    def near(fit, var):
        return fn.size(fit, var)

    def far(var):
        return exact.beyond(var, var, var, var, var, None)[2][0]

    branches = [functools.partial(near, fit) for fit in _fits(fn)]
    if not fn.places:
        scale = branches[0](var)
    else:
        scale = jax.lax.switch(_level(fn, var, var), [*branches, far], var)
    return scale * scale


@diagonal.defjvp
def _diagonal_jvp(fn, exact, primals, tangents):
    def value(var):
        return exact.anywhere(var, var, var, var, var, None)[0]

    return diagonal(fn, exact, *primals), jax.jvp(value, primals, tangents)[1]
