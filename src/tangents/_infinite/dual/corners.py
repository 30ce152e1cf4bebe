"""Corners in single precision: what two kinks leave in the dual of a function.

With h = a / sd1, k = b / sd2 for kinks at a, b >= 0, the correlation rho and s = sqrt(1 - rho^2),
the event z1 > h, z2 > k is a wedge in the plane of two independent normal numbers. Its corner is at
distance R from 0,

    R^2 = (h^2 + k^2 - 2 rho h k) / s^2,

and the perpendiculars from 0 to its sides make angles phi1, phi2 with the line to the corner:
cos(phi1) = h / R, sin(phi1) = (k - rho h) / (s R). In polar coordinates (Owen 1956, "Tables for
computing bivariate normal probabilities") L = P(z1 > h, z2 > k) and F = E[(z1 - h)_+ (z2 - k)_+]
of `orthant.py` fall into functions of (h, phi1) and the same of (k, phi2):

    L = u_h(phi1) + u_k(phi2),    F = rho L + h k (y_h(phi1) + y_k(phi2)),

    u_h(phi) = 1/2pi int_phi^(pi/2) exp(-h^2 / 2 cos(x)^2) dx,
    y_h(phi) = -1/2pi int_phi^(pi/2) cos(2 x) / h^2 exp(-h^2 / 2 cos(x)^2) dx.

With a kink at 0, h = 0, the first function vanishes, sin(phi2) = -rho, and

    L = u_k(phi2),    F = rho L + w_k(phi2),    w_k = (cos(phi2) - k sqrt(2 pi) Q(R) / g(R)) g2,

g2 = exp(-R^2 / 2) / 2pi. Over exp(-R^2 / 2) all three are for phi >= 0 close to short
polynomials in

    x = 2 cos(phi) / (1 + cos(phi) + sin(phi)),

whose coefficients belong to one side; negative angles follow from u(phi) + u(-phi) = Q(h),
y(phi) + y(-phi) = Q(h) - g(h) / h and w(-phi) = w(phi). So a corner takes an exponential and four
short polynomials. Nothing is singular at rho = 1.

Other moments follow from L and F by the recurrence of `orthant.py`, which reads the probability
that one of both is above its kink where the other is at its own, g(h) Q(p), p = (k - rho h) / s.
With R^2 = h^2 + p^2 it is the exponential of the corner times Q(p) / g(p), of p >= 0 one more
polynomial, that of all kinks.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.polynomial import chebyshev

from tangents._core.typing import Array
from tangents._infinite.dual.chebyshev import evaluate
from tangents._infinite.dual.orthant import density, upper_tail

_LEAST = 0.15  # least standard deviation: below, exp(-R^2 / 2) < 1e-9
_POINTS = 24  # Chebyshev points of the deviation
_FIT = 128  # points of x
_WEIGHT = 1e-3  # of the error where exp(-R^2 / 2) vanishes
_MILLS_AT, _MILLS_DEGREE = 0.4, 9  # to 2e-8

# Added to a number below 2^22, it leaves an integer in the last digits.
_TO_INTEGER = 1.5 * 2**23
# 2^f = sum c_m f^m, |f| <= 1/2
_POWERS_OF_TWO = tuple(
    float(c)
    for c in np.polynomial.Chebyshev.interpolate(np.exp2, 5, domain=[-0.5, 0.5])
    .convert(kind=np.polynomial.Polynomial)
    .coef
)


class Fit(NamedTuple):
    """Polynomials of a degree for standard deviations up to `reach`, in units of a kink's place."""

    reach: float
    degree: int


FITS = Fit(1.75, 10), Fit(4.0, 12)
_SHORTER = Fit(0.75, 8), Fit(1.0, 9)  # as exact as the first, of places further out
_USUAL = 1.75  # deviations that the first of `fits` reaches where no kink is close to 0


def fit_for(reach: float) -> Fit:
    """The shortest polynomials that reach so far, in units of a place."""
    return next(fit for fit in (*_SHORTER, *FITS) if fit.reach >= reach * (1 - 1e-6))


def fits(place: float) -> tuple[Fit, Fit]:
    """Of growing reach, for a function whose least place is this; each is compiled."""
    short, long = FITS
    return fit_for(min(_USUAL / place, short.reach)), long


# ---- on the host ---------------------------------------------------------------------------------


def _variable(phi: np.ndarray) -> np.ndarray:
    return 2 * np.cos(phi) / (1 + np.cos(phi) + np.sin(phi))


def _beyond(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nodes b and weights w of int_t^inf f(x) exp((t^2 - x^2) / 2) dx = sum w f(t + b)."""
    node, weight = np.polynomial.legendre.leggauss(200)
    t = t[:, None]
    length = np.minimum(9.5, 45 / np.maximum(t, 1e-3))
    root = (node + 1) / 2
    b = length * root**3
    return b, np.exp(-t * b - b**2 / 2) * length * root**2 * (3 * weight / 2)


def _over_exponential(h: float, phi: np.ndarray) -> tuple[np.ndarray, ...]:
    """u, y and w of h, times `exp(R^2 / 2)`, by quadrature in p = h tan(x)."""
    p, distance = h * np.tan(phi), h / np.maximum(np.cos(phi), 1e-12)
    b, mass = _beyond(p)
    q = p[:, None] + b
    step = np.sum(mass * h / (h * h + q * q), 1)
    ramp = step - np.sum(mass, 1) / h + np.sin(phi) * np.cos(phi) / (h * h)
    flat = np.cos(phi) - h * np.sum(_beyond(distance)[1], 1)
    return tuple(f / (2 * math.pi) for f in (step, ramp, flat))


def _at_deviations(reach: float) -> tuple[np.ndarray, np.ndarray]:
    nodes = np.cos(np.pi * (np.arange(_POINTS) + 0.5) / _POINTS)
    low, high = (sd / (1 + sd) for sd in (_LEAST, reach))
    inside = (nodes + 1) / 2 * (high - low) + low
    return nodes, inside / (1 - inside)


@functools.cache
def _rows(fit: Fit) -> np.ndarray:
    """Chebyshev coefficients in the deviation of the powers of x, (u y w, degree + 1, points)."""
    nodes = np.cos(np.pi * (np.arange(_FIT) + 0.5) / _FIT)
    angles = np.linspace(0, np.pi / 2, 20001)
    phi = np.interp(-(nodes + 1) / 2, -_variable(angles), angles)
    basis = chebyshev.chebvander(2 * _variable(phi) - 1, fit.degree)
    number = fit.degree + 1
    powers = np.stack([_padded(chebyshev.cheb2poly(e), number) for e in np.eye(number)])
    at, deviations = _at_deviations(fit.reach)
    found = []
    for sd in deviations:
        weight = (np.exp(-((np.tan(phi) / sd) ** 2) / 2) + _WEIGHT)[:, None]
        values = np.stack(_over_exponential(1 / sd, phi), 1)
        best = np.linalg.lstsq(basis * weight, values * weight, rcond=None)[0]
        found.append((best.T @ powers).ravel())
    rows = np.linalg.solve(chebyshev.chebvander(at, _POINTS - 1), np.stack(found)).T
    return rows.reshape(3, number, _POINTS)


def _padded(coefficients: np.ndarray, number: int) -> np.ndarray:
    return np.pad(coefficients, (0, number - len(coefficients)))


# ---- in the program ------------------------------------------------------------------------------


class Side(NamedTuple):
    """Of one kink and one side. u, y, w: coefficients (w may have none).

    all_u, all_y: u(phi) + u(-phi) and the same of y.
    """

    sd: Array
    u: Array
    y: Array
    w: Array
    all_u: Array
    all_y: Array


def side(fit: Fit, place: float, sd: Array, flat: bool) -> Side:
    """Of a kink at `place` > 0. flat: is there one at 0, so that w is wanted?"""
    low, high = (e / (1 + e) for e in (_LEAST, fit.reach))
    inside = jnp.clip(sd, _LEAST * place, fit.reach * place)
    node = (2 / (high - low)) * (inside / (place + inside) - low) - 1
    rows = _rows(fit)[: 3 if flat else 2]
    found = evaluate(rows.reshape(-1, _POINTS), jnp.clip(node, -1, 1))
    u, y, *w = found.reshape((*rows.shape[:2], *sd.shape))
    h = place / sd
    tail = upper_tail(h)
    return Side(sd, u, y, w[0] if flat else u[:0], tail, tail - density(h) / h)


@functools.cache
def _mills() -> tuple[float, ...]:
    """Powers of x whose sum times x is Q(p) exp(p^2 / 2), x = 1 / (1 + _MILLS_AT p)."""
    nodes = (np.cos(np.pi * (np.arange(_FIT) + 0.5) / _FIT) + 1) / 2
    p = (1 / nodes - 1) / _MILLS_AT
    values = np.sum(_beyond(p)[1], 1) / math.sqrt(2 * math.pi) / nodes
    fitted = chebyshev.Chebyshev.fit(nodes, values, _MILLS_DEGREE, domain=[0, 1])
    return tuple(map(float, fitted.convert(kind=np.polynomial.Polynomial).coef))


def _polynomial(coefficients: Any, x: Array) -> Array:
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


class Angle(NamedTuple):
    """Of a pair. dist: sd1 sd2 - cov, a product with its sign turned where -rho is meant.

    root: sd1 sd2 s, half_rate: -1 / 2 root^2. acute: can no angle of a corner be negative, as where
    the correlation is?
    """

    dist: Array
    root: Array
    half_rate: Array
    acute: bool = False


class Corner(NamedTuple):
    """L, and sd1 sd2 (F - rho L)."""

    step: Array
    ramp: Array


def _legs(
    places: tuple[float, float], one: Side, two: Side, angle: Angle
) -> tuple[tuple[Array, Array], Array]:
    """Over sd_i R sd1 sd2 s the first are sin(phi_i); the second over (sd1 sd2 s)^2 is R^2.

    cos(phi_i) is a place times `angle.root`, over the same.
    """
    a, b = places
    apart = a * (one.sd - two.sd) if a == b else b * one.sd - a * two.sd
    legs = one.sd * apart + a * angle.dist, b * angle.dist - two.sd * apart
    return legs, apart * apart + (2 * a * b) * angle.dist


def corner(places: tuple[float, float], one: Side, two: Side, angle: Angle) -> Corner:
    """Of kinks at two places > 0, one for either side."""
    legs, squared = _legs(places, one, two, angle)
    distance, factor = jnp.sqrt(squared), _exponential(squared * angle.half_rate)
    steps, ramps = [], []
    for place, side_, leg in zip(places, (one, two), legs, strict=True):
        size = leg if angle.acute else jnp.abs(leg)
        across = place * angle.root
        x = 4 * across / (across + side_.sd * distance + size) - 1
        u, y = factor * _polynomial(side_.u, x), factor * _polynomial(side_.y, x)
        steps.append(u if angle.acute else jnp.where(leg < 0, side_.all_u - u, u))
        ramps.append(y if angle.acute else jnp.where(leg < 0, side_.all_y - y, y))
    return Corner(steps[0] + steps[1], (places[0] * places[1]) * (ramps[0] + ramps[1]))


class Moments(NamedTuple):
    """sd1^i sd2^j E[(z1 - h)_+^i (z2 - k)_+^j]."""

    m00: Array
    m01: Array
    m10: Array
    m11: Array
    m12: Array
    m21: Array
    m22: Array


def moments(places: tuple[float, float], one: Side, two: Side, angle: Angle, cov: Array) -> Moments:
    """Of kinks at two places > 0, as `corner`; cov: with its sign turned where -rho is meant."""
    a, b = places
    found = corner(places, one, two, angle)
    legs, squared = _legs(places, one, two, angle)
    factor = _exponential(squared * angle.half_rate) * (1 / math.sqrt(2 * math.pi))
    cuts, tails = [], []
    for place, side_, leg in zip(places, (one, two), legs, strict=True):
        size = leg if angle.acute else jnp.abs(leg)
        across = side_.sd * angle.root
        x = across / (across + _MILLS_AT * size)
        cut = factor * x * _polynomial(_mills(), x)
        if not angle.acute:
            cut = jnp.where(leg < 0, density(place / side_.sd) - cut, cut)
        cuts.append(cut)
        both = factor * (angle.root / (side_.sd * math.sqrt(2 * math.pi)))
        tails.append(both - leg / (side_.sd * side_.sd) * cut)
    v1, v2 = one.sd * one.sd, two.sd * two.sd
    m00, m11 = found.step, cov * found.step + found.ramp
    m10 = one.sd * cuts[0] + cov / two.sd * cuts[1] - a * m00
    m01 = two.sd * cuts[1] + cov / one.sd * cuts[0] - b * m00
    m02 = v2 * m00 - b * m01 + cov / one.sd * tails[0]
    m12, m21 = v2 * m10 - b * m11 + cov * m01, v1 * m01 - a * m11 + cov * m10
    return Moments(m00, m01, m10, m11, m12, m21, v1 * m02 - a * m12 + 2 * cov * m11)


def flat_corner(
    place: float, side_: Side, other_sd: Array, cov: Array, product: Array, angle: Angle
) -> Corner:
    """Of a kink at `place`, on the side of `side_`, and one at 0 on the other; over product."""
    x = 4 * angle.root / (product + angle.root + jnp.abs(cov)) - 1
    factor = _exponential((place * other_sd) ** 2 * angle.half_rate)
    u, w = factor * _polynomial(side_.u, x), factor * _polynomial(side_.w, x)
    return Corner(jnp.where(cov < 0, u, side_.all_u - u), w)
