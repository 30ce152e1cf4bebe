"""Dual kernels of one function in single precision: tabulated once, evaluated as short sums.

The dual of phi' is a function of the correlation and of two standard deviations. In a variable x of
the correlation it is a short series of polynomials, and each coefficient, a symmetric function of
both deviations, a short sum of products:

    E[phi'(u) phi'(v)] = sum_m p_m(x) sum_r +-f_mr(sd1) f_mr(sd2).

The table is made on the host in float64 when a program is traced, once for a function: the
expectation at Chebyshev points of x and of the deviations, by quadrature in polar coordinates whose
panels end at the kinks; the coefficients' eigenvectors with eigenvalues above a tolerance are the
f_mr. They belong to one side each, so that of a pair some tens of multiplications are left, with
neither a branch nor a transcendental function, in Clenshaw's recurrence. (Han et al. 2022, "Fast
neural kernel embeddings for general activations", truncate the series of powers of rho, which needs
as many terms as there are, close to rho = 1.)

The dual of phi needs no table of its own, for its derivative in rho is sd1 sd2 times that of phi'
(Price 1958), and integrals of the p_m are short sums of such polynomials. Where phi is smooth
x = rho and p_m = 2 T_m, and the integral starts at rho = 0, where the expectation is a product of
two means. (Of an odd phi there are even m alone.)

Where phi has a kink at 0 all is smooth in the angle, and singular in rho at both ends. Then
rho = x (3 - x^2) / 2, that is x = 2 sin((pi / 2 - theta) / 3), and p_m are Gegenbauer polynomials
of weight d rho = 3/2 (1 - x^2) dx, q_m those of weight (1 - x^2)^2, scaled as in `_combined`:

    int_x^1 p_m d rho = 3 / (m + 3) (1 - x^2)^2 q_(m-1),    int_x^1 p_0 d rho = 1 - rho

(DLMF 18.9.20), and from the same sum

    E[phi(u) phi(v)] = k1 k2 (1 - sum_r (h_r(sd1) - h_r(sd2))^2) - sd1 sd2 int_x^1 ...,
    k = E[phi^2]^(1/2):

what is subtracted is the gap after the layer, without cancellation.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.polynomial import chebyshev

from tangents._core.typing import Array
from tangents._infinite.barrier import made_once, made_together
from tangents._infinite.dual.angle import reciprocal, relative_gap, safe_sqrt, sine_squared
from tangents._infinite.dual.chebyshev import evaluate
from tangents._infinite.dual.single_precision import opening

# Largest standard deviations: longer tables cost more for each pair, and each is compiled.
_SHORT, _USUAL, _LONG = 1.75, 2.5, 8.0

_DEVIATIONS = 28  # Chebyshev points of the standard deviation
_ANGLES = 40  # at most, of x
_TOLERANCE, _SPREAD = 3e-7, 1e-8
_HOLDS = (8e-7, 1e-6)  # errors of value and slope with which a table is used
_REACH = 8.5  # of the radius
_RADII, _PANEL = 64, 24  # nodes of the radius, and of the polar angle between two kinks
_CHUNK = 8192

Scalar = Callable[[Any], Any]


class Factors(NamedTuple):
    """sum_m p_m(x) sum_r sign_mr f_mr f_mr.

    ranks: numbers of products of every m. rows: (sum of ranks, coefficients in the deviation).
    """

    ranks: tuple[int, ...]
    rows: np.ndarray
    signs: np.ndarray


class Shape(enum.Enum):
    """What is known of phi, and with it x and the p_m.

    ODD: phi is odd and smooth, x = 2 rho^2 - 1. SMOOTH: x = rho. BENT: the second derivative jumps
    at 0. KINKED: the first does.
    """

    ODD = enum.auto()
    SMOOTH = enum.auto()
    BENT = enum.auto()
    KINKED = enum.auto()


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """Of phi', and what belongs to one side of phi.

    reach: the largest deviation. size: E[phi] of SMOOTH and BENT, k of KINKED. spread: the h_r of
    KINKED. powers: of the deviation that are not in the rows of slope and size.
    """

    reach: float
    shape: Shape
    slope: Factors
    size: np.ndarray
    spread: np.ndarray
    powers: tuple[int, int]

    @property
    def carries_gap(self) -> bool:
        """Are kernels wanted to the last digit of the angle?"""
        return self.shape == Shape.KINKED


# ---- on the host ---------------------------------------------------------------------------------


def _node(sd: Any, reach: float) -> Any:
    """The deviation in [0, reach] as a number in [-1, 1]; small ones get more room."""
    return 2 * (1 + reach) / reach * (sd / (1 + sd)) - 1


def _points() -> np.ndarray:
    return np.cos(np.pi * (np.arange(_DEVIATIONS) + 0.5) / _DEVIATIONS)


def _deviations(reach: float) -> tuple[np.ndarray, np.ndarray]:
    points = _points()
    u = (points + 1) / 2 * reach / (1 + reach)
    return points, u / (1 - u)


def _panels(theta: float) -> tuple[np.ndarray, np.ndarray]:
    """Polar angles about the bisector of u and v, symmetric about 0, with weights."""
    y, w = np.polynomial.legendre.leggauss(_PANEL)
    near, far = (np.pi - theta) / 2, (np.pi + theta) / 2
    ends = np.array([-far, -near, near, far, 2 * np.pi - far])
    half = np.diff(ends)[:, None] / 2
    return ((ends[:-1, None] + half) + half * y).ravel(), (half * w).ravel()


def _expectations(evaluate: Callable, thetas: np.ndarray, sd: np.ndarray) -> list[np.ndarray]:
    """`E[g(sd_i x) g(sd_j y)]`, (angles, i, j), for g = phi, phi'; x and y at an angle."""
    y, w = np.polynomial.legendre.leggauss(_RADII)
    r = (y + 1) * _REACH / 2
    w = w * _REACH / 2 * r * np.exp(-r * r / 2) / (2 * np.pi)
    out: list[list[np.ndarray]] = [[], []]
    for theta in thetas:
        angle, weight = _panels(float(theta))
        weights = w[:, None] * weight
        x = r[:, None] * np.cos(angle + theta / 2)
        for results, g in zip(out, evaluate(sd[:, None, None] * x), strict=True):
            # The other side is the mirror image, so the function is evaluated once.
            panels = g.reshape(len(sd), _RADII, 4, _PANEL)[:, :, [2, 1, 0, 3], ::-1]
            one, two = (a.reshape(len(sd), -1) for a in (g * weights, panels))
            results.append(one @ two.T)
    return [np.stack(results) for results in out]


def _power(sd: np.ndarray, scale: np.ndarray) -> int:
    """The order in which a function of the deviation vanishes at 0."""
    a, b = np.argsort(sd)[:2]
    with np.errstate(all="ignore"):
        order = np.log(scale[a] / scale[b]) / np.log(sd[a] / sd[b])
    return max(0, round(float(order))) if np.isfinite(order) else 0


def _series_in(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Chebyshev coefficients along the first axis, of values at Chebyshev points x."""
    basis = chebyshev.chebvander(x, len(x) - 1)
    flat = np.linalg.solve(basis, values.reshape(len(x), -1))
    return flat.reshape(values.shape)


def _polynomials(shape: Shape, x: np.ndarray, number: int) -> np.ndarray:
    """p_m(x), (points, number)."""
    weights = _GEGENBAUER_1 if shape == Shape.KINKED else _chebyshev
    columns = [np.ones_like(x), 2 * x]
    for m in range(1, number - 1):
        columns.append(2 * x * columns[-1] - weights(m) * columns[-2])
    return np.stack(columns[:number], 1)


def _angles_of(shape: Shape, x: np.ndarray) -> np.ndarray:
    if shape in (Shape.BENT, Shape.KINKED):
        return np.pi / 2 - 3 * np.arcsin(x / 2)
    return np.arccos(np.sqrt((x + 1) / 2) if shape == Shape.ODD else x)


def _factors(shape: Shape, x: np.ndarray, values: np.ndarray, scale: np.ndarray) -> Factors:
    """values: (x, i, j), over the scales of i and j."""
    points = _points()
    ranks, rows, signs = [], [], []
    coefficients = np.linalg.solve(_polynomials(shape, x, len(x)), values.reshape(len(x), -1))
    peaks = _polynomials(shape, np.ones(1), len(x))[0]
    for c, peak in zip(coefficients.reshape(values.shape), peaks, strict=True):
        size, vectors = np.linalg.eigh((c + c.T) / 2)
        order = np.argsort(-np.abs(size))
        keep = [k for k in order if abs(size[k]) * np.max(vectors[:, k] ** 2) * peak > _TOLERANCE]
        ranks.append(len(keep))
        for k in keep:
            rows.append(np.sqrt(abs(size[k])) * vectors[:, k] * scale)
            signs.append(np.sign(size[k]))
    last = max([m for m, rank in enumerate(ranks) if rank], default=-1)
    at_points = np.stack(rows, 1) if rows else np.zeros((_DEVIATIONS, 0))
    return Factors(tuple(ranks[: last + 1]), _series_in(points, at_points).T, np.asarray(signs))


def _table(evaluate: Callable, reach: float, shape: Shape) -> Table:
    points, sd = _deviations(reach)
    x = np.cos(np.pi * (np.arange(_ANGLES) + 0.5) / _ANGLES)
    equal, equal_slope = (e[0] for e in _expectations(evaluate, np.zeros(1), sd))
    _, slopes = _expectations(evaluate, _angles_of(shape, x), sd)
    own_slope = np.sqrt(np.diagonal(equal_slope))
    outside = np.where(own_slope > 0, own_slope, 1)
    power = _power(sd, own_slope)
    slopes = slopes / outside[:, None] / outside
    slope = _factors(shape, x, slopes, own_slope / sd**power)

    size, spread, order = np.zeros((0, _DEVIATIONS)), np.zeros((0, _DEVIATIONS)), 0
    if shape == Shape.KINKED:
        own = np.sqrt(np.diagonal(equal))
        outside = np.where(own > 0, own, 1)
        share, vectors = np.linalg.eigh(equal / outside[:, None] / outside)
        keep = share > _SPREAD * share[-1]
        spread = np.sqrt(share[keep] / 2) * vectors[:, keep]
        spread = _series_in(points, spread - spread.mean(0)).T
    elif shape != Shape.ODD:  # at right angles the expectation is a product
        apart = _expectations(evaluate, np.full(1, np.pi / 2), sd)[0][0]
        largest = np.argmax(np.diagonal(apart))
        own = apart[largest] / np.sqrt(max(apart[largest, largest], np.finfo(float).tiny))
    else:
        own = np.zeros(0)
    if len(own):
        order = _power(sd, np.abs(own))
        size = _series_in(points, own / sd**order)[None]
    return Table(reach, shape, slope, size, spread, (power, order))


# ---- in the program ------------------------------------------------------------------------------


class _Features(NamedTuple):
    """Of one side. sd: the deviation, of which those outside of the table count as the largest."""

    sd: Array
    slope: Array
    size: Array
    spread: Array


def _features(table: Table, var: Array) -> _Features:
    sd = jnp.minimum(jnp.sqrt(var), table.reach)
    parts = [table.slope.rows, table.size, table.spread]
    out = evaluate(np.concatenate(parts), _node(sd, table.reach))
    slope, size, spread = jnp.split(out, np.cumsum([len(p) for p in parts])[:-1])
    slope, size = (
        a * sd**power if power else a for a, power in zip((slope, size), table.powers, strict=True)
    )
    return _Features(sd, slope, size, spread)


def _coefficients(factors: Factors, one: Any, two: Any) -> list[Any]:
    """Of the p_m, from the products of both sides."""
    ends = itertools.accumulate(factors.ranks)
    terms = [range(end - n, end) for end, n in zip(ends, factors.ranks, strict=True)]
    return [sum(one[k] * two[k] for k in each) for each in terms]


def _combined(coefficients: list[Any], weights: Callable[[int], float], x: Any) -> Any:
    """sum_m c_m p_m(x) with p_0 = 1, p_1 = 2 x, p_(m+1) = 2 x p_m - weights(m) p_(m-1).

    What does not wait for the step before is added first, so that a step is one operation long.
    """
    twice, total, before = 2 * x, 0.0, 0.0
    for m in reversed(range(len(coefficients))):
        rest = coefficients[m] - weights(m + 1) * before
        total, before = rest + twice * total, total
    return total


def _of_weight(order: int) -> Callable[[int], float]:
    """The weights of `_combined` for Gegenbauer polynomials of weight (1 - x^2)^order."""

    def weights(m: int) -> float:
        half = order + 0.5
        return m * (m + 2 * half - 1) / ((m + half) * (m + half - 1))

    return weights


_GEGENBAUER_1, _GEGENBAUER_2 = _of_weight(1), _of_weight(2)


def _chebyshev(m: int) -> float:
    """p_m = 2 T_m."""
    return 2.0 if m == 1 else 1.0


def _second_kind(m: int) -> float:
    """p_m = U_m."""
    return 1.0


def _odd(c: list[Any], rho: Any) -> tuple[Any, Any]:
    """The integral from 0 and the sum; p_m = 2 T_2m(rho)."""
    x = 2 * rho * rho - 1
    differences = [a - b for a, b in zip(c, [*c, 0.0][1:], strict=True)]
    b = [d / (2 * m + 1) for m, d in enumerate(differences)]  # of T_(2m+1) = rho (U_m - U_(m-1))
    of_u = [a - b for a, b in zip(b, [*b, 0.0][1:], strict=True)]
    return rho * _combined(of_u, _second_kind, x), _combined(c, _chebyshev, x)


def _from_zero(c: list[Any], x: Any) -> Any:
    """The integral in x of sum_m c_m p_m(x) from 0; p_m = 2 T_m."""
    pairs = zip(c, [*c, 0.0, 0.0][2:], strict=True)
    b = [0.0, *((a - b) * (0.5 / m) for m, (a, b) in enumerate(pairs, 1))]
    at_zero = sum(2 * (-1) ** (m // 2) * b[m] for m in range(2, len(b), 2))
    return _combined(b, _chebyshev, x) - at_zero


def _smooth(c: list[Any], rho: Any) -> tuple[Any, Any]:
    """The integral from 0 and the sum; p_m = 2 T_m(rho)."""
    return _from_zero(c, rho), _combined(c, _chebyshev, rho)


def _bent(c: list[Any], x: Any) -> tuple[Any, Any]:
    """The integral in rho from 0 and the sum; p_m = 2 T_m(x)."""
    # 3/2 (1 - x^2) p_m = 3/8 (2 p_m - p_(m+2) - p_(m-2)), where p_(-1) = p_1 and p_0 counts twice.
    padded = [*c, 0.0, 0.0, 0.0, 0.0]
    weighted = [(padded[0] - padded[2]) * 0.75, (padded[1] - padded[3]) * 0.375]
    for m in range(2, len(c) + 2):
        weighted.append(padded[m] * 0.75 - (padded[m - 2] + padded[m + 2]) * 0.375)
    return _from_zero(weighted, x), _combined(c, _chebyshev, x)


_FROM_ZERO = {Shape.ODD: _odd, Shape.SMOOTH: _smooth, Shape.BENT: _bent}


def _kinked(c: list[Any], x: Any, ahead: Any, behind: Any) -> tuple[Any, Any]:
    """The integral up to x = 1 and the sum; `ahead` = 1 - x and `behind` = 1 + x are exact."""
    b = [a * (3 / (m + 3)) for m, a in enumerate(c[1:], 1)]
    rest = behind * behind * _combined(b, _GEGENBAUER_2, x)
    return ahead * ahead * (c[0] * ((1 + behind) / 2) + rest), _combined(c, _GEGENBAUER_1, x)


class Sums(NamedTuple):
    """What a table says of pairs.

    pair: nngp, with kinks k1 k2 - nngp, and d_nngp, as `made_together` keeps them. scales: with
      kinks k1 and k2.
    """

    pair: Any
    scales: tuple[Array, ...]


def _deviation(cov12: Array, side1: Array, side2: Array, gap12: Any, sharp: bool) -> Array:
    """1 - |cos(theta)|.

    sharp: does rounding of the correlation near 1 matter (where no slope jumps it does not)?
    """
    if gap12 is not None:
        return relative_gap(side1, side2, gap12)
    inverse = reciprocal(safe_sqrt(side1)) * reciprocal(safe_sqrt(side2))
    cosine = jnp.minimum(jnp.abs(cov12) * inverse, 1)
    return sine_squared(cov12, side1, side2) / (1 + cosine) if sharp else 1 - cosine


def sums(table: Table, cov12: Array, side1: Array, side2: Array, gap12: Any) -> Sums:
    """From the tables; larger deviations than are in it count as the largest."""
    one, two = _features(table, side1), _features(table, side2)
    signs = jnp.asarray(table.slope.signs, one.slope.dtype)
    one = one._replace(slope=one.slope * signs.reshape((-1,) + (1,) * side1.ndim))
    one, two = made_once((one, two), (side1.shape, side2.shape), cov12)
    c = _coefficients(table.slope, one.slope, two.slope)
    product = one.sd * two.sd
    if table.shape in (Shape.BENT, Shape.KINKED):
        near = opening(_deviation(cov12, side1, side2, gap12, table.carries_gap))
        negative, far = cov12 < 0, 2 - near
        x = jnp.where(negative, near - 1, 1 - near)
    if table.shape == Shape.KINKED:
        ends = jnp.where(negative, far, near), jnp.where(negative, near, far)
        integral, slope = _kinked(c, x, *ends)
        scales = one.size[0], two.size[0]
        apart = sum((a - b) ** 2 for a, b in zip(one.spread, two.spread, strict=True))
        value = jnp.maximum(product * integral + scales[0] * scales[1] * apart, 0)
        return Sums(made_together(value, slope), scales)
    if table.shape != Shape.BENT:
        inverse = reciprocal(safe_sqrt(side1)) * reciprocal(safe_sqrt(side2))
        x = jnp.clip(cov12 * inverse, -1, 1)
    integral, slope = _FROM_ZERO[table.shape](c, x)
    value = product * integral
    if len(one.size):
        value = value + one.size[0] * two.size[0]
    # Of few terms either may be a number.
    value, slope = (jnp.broadcast_to(a, x.shape).astype(x.dtype) for a in (value, slope))
    return Sums(made_together(value, slope), ())


# ---- making tables -------------------------------------------------------------------------------


def tables_of(fn: Scalar, kinked: bool, bends: bool) -> tuple[Table, ...]:
    """Tables of a function smooth apart from 0, of growing reach; at most two, that hold it.

    A function that bends too fast for the long table takes many products, so a short one pays.

    kinked: is it not smooth at 0. bends: does its slope jump there, so that the gap is carried on.

    Compared with the quadrature between its points: more than a few tolerances off (a function that
    bends fast, or grows fast) and it is left out.
    """

    @jax.jit
    def both(x):
        return jax.jvp(fn, (x,), (jnp.ones_like(x),))

    def evaluate(x):
        with jax.ensure_compile_time_eval(), jax.enable_x64(True):
            return [np.asarray(a, np.float64) for a in both(jnp.asarray(x))]

    x = np.linspace(0.05, 9.0, 50)
    (here, _), (there, _) = evaluate(x), evaluate(-x)
    size = np.max(np.abs(here)) + np.max(np.abs(there))
    if not np.isfinite(size):
        return ()
    odd = np.allclose(here, -there, 0, 1e-13 * size)
    if kinked:
        shape = Shape.KINKED if bends else Shape.BENT
    else:
        shape = Shape.ODD if odd else Shape.SMOOTH

    def made(reach: float) -> tuple[Table, ...]:
        table = _table(evaluate, reach, shape)
        return (table,) if _holds(table, evaluate) else ()

    usual = made(_USUAL)
    longer = usual and made(_LONG)
    return usual + longer if longer or not usual else made(_SHORT) + usual


def _holds(table: Table, evaluate: Callable) -> bool:
    """Is the table right between its points?"""
    sd = np.array([0.004, 0.04, 0.2, 0.4, 0.7, 0.97]) * table.reach
    thetas = np.array([0.0, 0.02, 0.3, 1.1, 2.0, 3.0])
    sizes = [np.sqrt(np.diagonal(e[0])) for e in _expectations(evaluate, thetas[:1], sd)]
    exact = _expectations(evaluate, thetas, sd)

    basis = chebyshev.chebvander(_node(sd, table.reach), _DEVIATIONS - 1)
    sides = (basis @ table.slope.rows.T).T * sd ** table.powers[0]
    size = (basis @ table.size.T).T * sd ** table.powers[1]
    c = _coefficients(
        table.slope, (sides.T * table.slope.signs).T[:, None, :, None], sides[:, None, None]
    )
    theta, product = thetas[:, None, None], sd[:, None] * sd
    if table.shape == Shape.KINKED:
        x = 2 * np.sin((np.pi / 2 - theta) / 3)
        integral, slope = _kinked(c, x, 1 - x, 1 + x)
        spread = basis @ table.spread.T
        apart = ((spread[:, None] - spread) ** 2).sum(-1)
        value = size[0][:, None] * size[0] * (1 - apart) - product * integral
    else:
        x = np.cos(theta)
        if table.shape == Shape.BENT:
            x = 2 * np.sin((np.pi / 2 - theta) / 3)
        integral, slope = _FROM_ZERO[table.shape](c, x)
        value = product * integral + (size[:, :, None] * size[:, None]).sum(0)
    for got, want, own, bound in zip((value, slope), exact, sizes, _HOLDS, strict=True):
        own = np.maximum(own, np.finfo(float).tiny)
        if not np.max(np.abs(got - want) / own[:, None] / own) < bound:
            return False
    return True
