"""Duals of piecewise linear functions with kinks at p or -p (or both) in single precision.

With h = p / sd1, k = p / sd2, the correlation rho and s = sqrt(1 - rho^2), the event z1 > h, z2 > k
is a wedge in the plane of two independent normal numbers. Its corner is at distance R from 0,

    R^2 = (h^2 + k^2 - 2 rho h k) / s^2,

and the perpendiculars from 0 to its sides make angles phi1, phi2 with the line to the corner:
cos(phi1) = h / R, sin(phi1) = (k - rho h) / (s R). In polar coordinates (Owen 1956, "Tables for
computing bivariate normal probabilities") L = P(z1 > h, z2 > k) and F = E[(z1 - h)_+ (z2 - k)_+]
of `orthant.py` fall into functions of (h, phi1) and the same of (k, phi2):

    L = u_h(phi1) + u_k(phi2),    F = rho L + h k (y_h(phi1) + y_k(phi2)),

    u_h(phi) = 1/2pi int_phi^(pi/2) exp(-h^2 / 2 cos(x)^2) dx,
    y_h(phi) = -1/2pi int_phi^(pi/2) cos(2 x) / h^2 exp(-h^2 / 2 cos(x)^2) dx.

Over exp(-R^2 / 2), which both have in common, they are for phi >= 0 close to polynomials of degree
12 in

    x = 2 cos(phi) / (1 + cos(phi) + sin(phi)),

whose coefficients belong to one side; negative angles follow from u(phi) + u(-phi) = Q(h) and
y(phi) + y(-phi) = Q(h) - g(h) / h. So a corner takes an exponential and four short polynomials, and
a function with kinks at p and -p has two corners for a pair, of rho and of -rho. Nothing is
singular at rho = 1, and the sine comes from differences of what is given, exact where it is small.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.polynomial import chebyshev

from tangents._core import precision
from tangents._core.typing import Array
from tangents._infinite.barrier import made_once, made_together, taken_apart
from tangents._infinite.dual.orthant import density, upper_tail

REACH = 2.5  # largest standard deviation, in units of p
_LEAST = 0.15  # below, exp(-R^2 / 2) < 1e-9
_NO_LESS = 1e-4  # deviations that count as no smaller
_DEGREE = 12
_POINTS = 24  # Chebyshev points of the deviation
_FIT = 128  # points of x
_WEIGHT = 1e-3  # of the error where exp(-R^2 / 2) vanishes
_STRAIGHT, _ROUNDING = 2e-7, 1e-12  # of the largest value of a function
_EQUAL = 1e-22  # squared distance of equal inputs, in units of p


# Added to a number below 2^22, it leaves an integer in the last digits.
_TO_INTEGER = 1.5 * 2**23
# 2^f = sum c_m f^m, |f| <= 1/2
_POWERS_OF_TWO = tuple(
    float(c)
    for c in np.polynomial.Chebyshev.interpolate(np.exp2, 5, domain=[-0.5, 0.5])
    .convert(kind=np.polynomial.Polynomial)
    .coef
)


class PiecewiseLinear(NamedTuple):
    """constant + linear x + upper (x - place)_+ + lower (-x - place)_+, place > 0."""

    constant: float
    linear: float
    place: float
    upper: float
    lower: float


# ---- on the host ---------------------------------------------------------------------------------


def _variable(phi: np.ndarray) -> np.ndarray:
    return 2 * np.cos(phi) / (1 + np.cos(phi) + np.sin(phi))


def _over_exponential(h: float, phi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`exp(R^2 / 2) u_h(phi)` and `exp(R^2 / 2) y_h(phi)`, by quadrature in p = h tan(x)."""
    node, weight = np.polynomial.legendre.leggauss(200)
    p = h * np.tan(phi)[:, None]
    length = np.minimum(9.5, 45 / np.maximum(p, 1e-3))
    root = (node + 1) / 2
    beyond = length * root**3
    mass = np.exp(-p * beyond - beyond**2 / 2) * length * root**2 * (3 * weight / 2) / (2 * math.pi)
    q = p + beyond
    step = np.sum(mass * h / (h * h + q * q), 1)
    ramp = step - np.sum(mass, 1) / h + np.sin(phi) * np.cos(phi) / (2 * math.pi * h * h)
    return step, ramp


def _at_deviations() -> tuple[np.ndarray, np.ndarray]:
    nodes = np.cos(np.pi * (np.arange(_POINTS) + 0.5) / _POINTS)
    low, high = (sd / (1 + sd) for sd in (_LEAST, REACH))
    inside = (nodes + 1) / 2 * (high - low) + low
    return nodes, inside / (1 - inside)


@functools.cache
def _rows() -> np.ndarray:
    """Chebyshev coefficients in the deviation of the powers of x for u, then for y."""
    nodes = np.cos(np.pi * (np.arange(_FIT) + 0.5) / _FIT)
    angles = np.linspace(0, np.pi / 2, 20001)
    phi = np.interp(-(nodes + 1) / 2, -_variable(angles), angles)
    basis = chebyshev.chebvander(2 * _variable(phi) - 1, _DEGREE)
    powers = np.stack([_padded(chebyshev.cheb2poly(e)) for e in np.eye(_DEGREE + 1)])
    at, deviations = _at_deviations()
    fits = []
    for sd in deviations:
        weight = (np.exp(-((np.tan(phi) / sd) ** 2) / 2) + _WEIGHT)[:, None]
        both = np.stack(_over_exponential(1 / sd, phi), 1)
        fit = np.linalg.lstsq(basis * weight, both * weight, rcond=None)[0]
        fits.append((fit.T @ powers).ravel())
    return np.linalg.solve(chebyshev.chebvander(at, _POINTS - 1), np.stack(fits)).T


def _padded(coefficients: np.ndarray) -> np.ndarray:
    return np.pad(coefficients, (0, _DEGREE + 1 - len(coefficients)))


# ---- in the program ------------------------------------------------------------------------------


class _Side(NamedTuple):
    """Of one side. u, y: coefficients. all_u, all_y: u(phi) + u(-phi) and the same of y.

    slope, value: summands of the expectations that belong to it.
    """

    var: Array
    sd: Array
    u: Array
    y: Array
    all_u: Array
    all_y: Array
    slope: Array
    value: Array


def _side(fn: PiecewiseLinear, scale: float, var: Array) -> _Side:
    place = fn.place * scale
    var = jnp.maximum(var * (scale * scale), (_NO_LESS * place) ** 2)
    sd = jnp.sqrt(var)
    low, high = (e / (1 + e) for e in (_LEAST, REACH))
    inside = jnp.clip(sd, _LEAST * place, REACH * place)
    node = (2 / (high - low)) * (inside / (place + inside) - low) - 1
    order = jnp.arange(_POINTS, dtype=var.dtype)[:, None]
    basis = jnp.cos(order * jnp.arccos(jnp.clip(node.reshape(-1), -1, 1)))
    rows = jnp.asarray(_rows(), var.dtype)
    coefficients = jnp.matmul(rows, basis, precision=precision.DEFAULT)
    u, y = jnp.split(coefficients.reshape((-1, *var.shape)), 2)
    h = place / sd
    tail, at = upper_tail(h), density(h)
    jump = fn.upper - fn.lower
    above = sd / scale * (at - h * tail)  # E[(x - place)_+]
    same = fn.upper**2 + fn.lower**2
    return _Side(
        var,
        sd,
        same * u,
        same * fn.place**2 * y,
        same * tail,
        same * fn.place**2 * (tail - at / h),
        fn.linear * jump * tail,
        fn.constant * (fn.upper + fn.lower) * above,
    )


def _polynomial(coefficients: Array, x: Array) -> Array:
    total = coefficients[-1]
    for m in reversed(range(len(coefficients) - 1)):
        total = total * x + coefficients[m]
    return total


def _exponential(x: Array) -> Array:
    """exp(x) of x <= 0 in float32, to 1e-7, without what `jnp.exp` does for other numbers."""
    power = jnp.maximum(x * (1 / math.log(2)), -126.0)
    fraction = power - jax.lax.round(power, jax.lax.RoundingMethod.TO_NEAREST_EVEN)
    total = jnp.full_like(x, _POWERS_OF_TWO[-1])
    for c in _POWERS_OF_TWO[-2::-1]:
        total = total * fraction + c
    exponent = jax.lax.bitcast_convert_type(power + _TO_INTEGER, jnp.int32) << 23
    return jax.lax.bitcast_convert_type(
        jax.lax.bitcast_convert_type(total, jnp.int32) + exponent, jnp.float32
    )


class _Legs(NamedTuple):
    """Var - cov of either side, their sum: squared distance of both, and var1 var2 - cov^2.

    Over (sd distance) they are sin(phi), and the root of the determinant is cos(phi).
    """

    first: Array
    second: Array
    squared: Array
    det: Array


class _Corner(NamedTuple):
    """L, and (F - rho L) / h k."""

    step: Array
    ramp: Array


def _corner(one: _Side, two: _Side, legs: _Legs, rate: Array, obtuse: bool) -> _Corner:
    """rate: -p^2 / 2 det. obtuse: may an angle be negative, so that a leg is?"""
    distance, root = jnp.sqrt(legs.squared), jnp.sqrt(legs.det)
    factor = _exponential(legs.squared * rate)
    first, second = legs.first, legs.second
    # Where rounding makes both negative, at rho = 1, the smaller deviation counts.
    none = -float(np.finfo(np.float32).tiny)
    negative = first < jnp.minimum(second, 0), second <= jnp.minimum(first, none)
    steps, ramps = [], []
    for side, leg, behind in zip((one, two), (first, second), negative, strict=True):
        size = jnp.abs(leg) if obtuse else leg
        x = 4 * root / (root + side.sd * distance + size) - 1
        u, y = factor * _polynomial(side.u, x), factor * _polynomial(side.y, x)
        steps.append(jnp.where(behind, side.all_u - u, u) if obtuse else u)
        ramps.append(jnp.where(behind, side.all_y - y, y) if obtuse else y)
    return _Corner(steps[0] + steps[1], ramps[0] + ramps[1])


def sums(fn: PiecewiseLinear, cov12: Array, side1: Array, side2: Array):
    """E[phi phi] and E[phi' phi'] by `made_together`, for deviations up to REACH p."""
    scale = 2.0 ** -round(math.log2(fn.place))  # exact
    one, two = _side(fn, scale, side1), _side(fn, scale, side2)
    one, two = made_once((one, two), cov12)
    other = 2 * fn.upper * fn.lower / (fn.upper**2 + fn.lower**2)
    signed = cov12 * (scale * scale)
    cov = jnp.abs(signed) if other else signed
    first, second = one.var - cov, two.var - cov
    # Lower bounds that fit each other: equal inputs stay equal.
    det = jnp.maximum(one.var * second + cov * first, _EQUAL * one.var)
    squared = jnp.maximum(jnp.abs(first + second), _EQUAL)
    rate = (-((fn.place * scale) ** 2) / 2) / det
    step, ramp = _corner(one, two, _Legs(first, second, squared, det), rate, True)
    if other:
        first, second = one.var + cov, two.var + cov
        far = _corner(one, two, _Legs(first, second, first + second, det), rate, False)
        step, ramp = _both(_Corner(step, ramp), far, other, signed)
    slope = step + (one.slope + fn.linear**2) + two.slope
    value = cov12 * slope + ramp
    if fn.constant:
        value = value + (one.value + fn.constant**2) + two.value
    return made_together(value, slope)


def _both(near: _Corner, far: _Corner, other: float, cov: Array) -> _Corner:
    """The corner of rho, and `other` times that of -rho, where steps count with the other sign."""
    if other == -1:  # an odd function
        ramp = near.ramp - far.ramp
        return _Corner(near.step + far.step, jnp.where(cov < 0, -ramp, ramp))
    (step, against), (ramp, mirrored) = (
        (jnp.where(cov < 0, b, a), jnp.where(cov < 0, a, b)) for a, b in zip(near, far, strict=True)
    )
    return _Corner(step - other * against, ramp + other * mirrored)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def dual(fn: PiecewiseLinear, exact: Callable, cov12, var1, var2, side1, side2):
    """Nngp and d_nngp; `exact(cov12, var1, var2, side1, side2)` for large deviations.

    Derivatives are those of `exact`.
    """
    largest = jnp.maximum(jnp.max(side1, initial=0), jnp.max(side2, initial=0))

    def near(cov12, var1, var2, side1, side2):
        return sums(fn, cov12, side1, side2)

    def far(*args):
        return made_together(*exact(*args))

    within = largest <= (REACH * fn.place) ** 2
    return taken_apart(jax.lax.cond(within, near, far, cov12, var1, var2, side1, side2))


@dual.defjvp
def _dual_jvp(fn, exact, primals, tangents):
    return dual(fn, exact, *primals), jax.jvp(exact, primals, tangents)[1]


# ---- which functions -----------------------------------------------------------------------------


def line(
    fn: Callable[[Any], Any], kinks: Sequence[tuple[float, Sequence[float]]]
) -> tuple[float, float] | None:
    """Constant and linear coefficient of what is left of fn without the ramps of its kinks.

    kinks: (place, (jump of fn, of fn', of fn'', of fn''')). None: there is more to it than a line.
    """
    if not kinks or any(jumps[0] or jumps[2] or jumps[3] for _, jumps in kinks):
        return None
    far = 4 * max(1.0, *(abs(place) for place, _ in kinks))
    x = np.linspace(-far, far, 4097)
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        y = np.asarray(jax.jit(fn)(jnp.asarray(x)), np.float64)
    rest = y - sum(jumps[1] * np.maximum(x - place, 0) for place, jumps in kinks)
    found = np.polynomial.polynomial.polyfit(x, rest, 1)
    error = np.abs(rest - np.polynomial.polynomial.polyval(x, found))
    size = np.max(np.abs(y))
    if not np.max(error) <= _STRAIGHT * size:
        return None
    constant, linear = (float(c) if abs(c) > _ROUNDING * size else 0.0 for c in found)
    return constant, linear


def bent(
    rest: tuple[float, float] | None, kinks: Sequence[tuple[float, Sequence[float]]]
) -> PiecewiseLinear | None:
    """The function in the form of this file, if its kinks are at one distance from 0."""
    distances = {abs(place) for place, _ in kinks}
    if rest is None or len(distances) != 1 or 0.0 in distances:
        return None
    (place,) = distances
    upper = float(sum(jumps[1] for at, jumps in kinks if at > 0))
    lower = float(sum(jumps[1] for at, jumps in kinks if at < 0))
    # (x + p)_+ = (x + p) + (-x - p)_+
    constant, linear = rest[0] + lower * place, rest[1] + lower
    constant = constant if abs(constant) > _ROUNDING * abs(lower * place) else 0.0
    return PiecewiseLinear(constant, linear, float(place), upper, lower)
