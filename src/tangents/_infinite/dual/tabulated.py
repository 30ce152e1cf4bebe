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
(Price 1958), and integrals of the p_m are short sums of such polynomials. They are taken from the
equal end, where

    E[phi(u) phi(v)] = k1 k2 (1 - sum_r (h_r(sd1) - h_r(sd2))^2) - sd1 sd2 int_rho^1 ... d rho,
    k = E[phi^2]^(1/2):

what is subtracted is the gap after the layer, without cancellation, as long as the integral is a
product of 1 - rho. Where phi is smooth x = rho, p_0 = 1, p_m = 2 T_m, and that is so by Fejer's sum

    (1 - T_n(x)) / (1 - x) = n + 2 sum_(0 < k < n) (n - k) T_k(x).

Of an odd phi there are even m alone, and the dual of phi is odd in rho.

Where phi has a kink at 0 all is smooth in the angle, and singular in rho at both ends. Then
rho = x (3 - x^2) / 2, that is x = 2 sin((pi / 2 - theta) / 3), and p_m are Gegenbauer polynomials
of weight d rho = 3/2 (1 - x^2) dx, q_m those of weight (1 - x^2)^2, scaled as in `_combined`:

    int_x^1 p_m d rho = 3 / (m + 3) (1 - x^2)^2 q_(m-1),    int_x^1 p_0 d rho = 1 - rho

(DLMF 18.9.20).
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
from tangents._infinite.barrier import made_together
from tangents._infinite.dual import pieces
from tangents._infinite.dual.angle import reciprocal, relative_gap, safe_sqrt, sine_squared
from tangents._infinite.dual.chebyshev import evaluate
from tangents._infinite.dual.single_precision import opening

# Largest standard deviations: longer tables cost more for each pair, and each is compiled.
_SHORT, _USUAL, _LONG = 1.75, 3.0, 8.0

_DEVIATIONS = 28  # Chebyshev points of the standard deviation
_ANGLES = 40  # at most, of x
_PIECES = 64
_TOLERANCE, _SPREAD = 1e-7, 1e-9
_HOLDS = (8e-7, 1e-6)  # errors of value and slope with which a table is used
_REACH = 8.5  # of the radius
_RADII, _PANEL = 64, 24  # nodes of the radius, and of the polar angle between two kinks
_CHUNK = 8192

Scalar = Callable[[Any], Any]


class Factors(NamedTuple):
    """sum_m p_m(x) sum_r sign_mr f_mr f_mr.

    ranks: numbers of products of every m. rows: (sum of ranks, coefficients in the deviation).
    last: the last p_m(1). integrated: how many m count in the integral.
    """

    ranks: tuple[int, ...]
    rows: np.ndarray
    signs: np.ndarray
    last: float
    integrated: int


class Shape(enum.Enum):
    """What is known of phi, and with it x and the p_m.

    ODD: phi is odd and smooth, x = 2 rho^2 - 1. SMOOTH: x = rho. KINKED: it is not smooth at 0.
    """

    ODD = enum.auto()
    SMOOTH = enum.auto()
    KINKED = enum.auto()


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """Of phi', and what belongs to one side of phi.

    reach: the largest deviation. scales: k and E[phi'^2]^(1/2). spread: the h_r. powers: of the
    deviation that are neither in E[phi'^2]^(1/2) and the rows of slope, nor in k.
    """

    reach: float
    shape: Shape
    slope: Factors
    scales: pieces.Pieces
    spread: np.ndarray
    powers: tuple[int, int]

    @property
    def features(self) -> int:
        """Numbers that belong to one side."""
        return 3 + len(self.slope.rows) + len(self.spread)

    @property
    def signed(self) -> bool:
        """Is the dual of phi odd in rho?"""
        return self.shape == Shape.ODD


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


def _expectations(
    evaluate: Callable, thetas: np.ndarray, sd: np.ndarray, derivatives: tuple[int, ...] = (0, 1)
) -> list[np.ndarray]:
    """`E[g(sd_i x) g(sd_j y)]`, (angles, i, j), for g = phi, phi'; x and y at an angle."""
    y, w = np.polynomial.legendre.leggauss(_RADII)
    r = (y + 1) * _REACH / 2
    w = w * _REACH / 2 * r * np.exp(-r * r / 2) / (2 * np.pi)
    out: list[list[np.ndarray]] = [[] for _ in derivatives]
    for theta in thetas:
        angle, weight = _panels(float(theta))
        weights = w[:, None] * weight
        x = r[:, None] * np.cos(angle + theta / 2)
        values = evaluate(sd[:, None, None] * x)
        for results, g in zip(out, (values[k] for k in derivatives), strict=True):
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


def _integrals(shape: Shape, number: int) -> np.ndarray:
    """The largest integral of each p_m."""
    theta = np.linspace(1e-3, np.pi / 2 if shape == Shape.ODD else np.pi, 400)
    x = 2 * np.sin((np.pi / 2 - theta) / 3) if shape == Shape.KINKED else np.cos(theta)
    units = [[*np.zeros(m), 1.0] for m in range(number)]
    sums = (_SUMS[shape](c, number, x, 1 - x, 1 + x)[0] for c in units)
    return np.asarray([np.max(np.abs(s)) for s in sums])


def _angles_of(shape: Shape, x: np.ndarray) -> np.ndarray:
    if shape == Shape.KINKED:
        return np.pi / 2 - 3 * np.arcsin(x / 2)
    return np.arccos(np.sqrt((x + 1) / 2) if shape == Shape.ODD else x)


def _factors(shape: Shape, x: np.ndarray, values: np.ndarray, scale: np.ndarray) -> Factors:
    """values: (x, i, j), over the scales of i and j."""
    points = _points()
    ranks, rows, signs = [], [], []
    coefficients = np.linalg.solve(_polynomials(shape, x, len(x)), values.reshape(len(x), -1))
    peaks = _polynomials(shape, np.ones(1), len(x))[0]
    integrals = _integrals(shape, len(x))
    integrated = 0
    for m, (c, peak) in enumerate(zip(coefficients.reshape(values.shape), peaks, strict=True)):
        size, vectors = np.linalg.eigh((c + c.T) / 2)
        order = np.argsort(-np.abs(size))
        # Gegenbauer polynomials are large close to x = 1 alone, where sums are made right.
        power = 0.75 if shape == Shape.KINKED else 1
        worst = np.abs(size) * np.max(vectors**2, 0) * peak**power
        keep = [k for k in order if worst[k] > _TOLERANCE]
        ranks.append(len(keep))
        if keep and np.max(np.abs(c)) * integrals[m] > _TOLERANCE / 5:
            integrated = m + 1
        for k in keep:
            rows.append(np.sqrt(abs(size[k])) * vectors[:, k])
            signs.append(np.sign(size[k]))
    last = max([m for m, rank in enumerate(ranks) if rank], default=-1)
    at_points = np.stack(rows, 1) if rows else np.zeros((_DEVIATIONS, 0))
    at_points = at_points * scale[:, None]
    found = _series_in(points, at_points).T, np.asarray(signs), float(peaks[last])
    return Factors(tuple(ranks[: last + 1]), *found, integrated)


def _table(evaluate: Callable, reach: float, shape: Shape) -> Table:
    points, sd = _deviations(reach)
    x = np.cos(np.pi * (np.arange(_ANGLES) + 0.5) / _ANGLES)
    equal, equal_slope = (e[0] for e in _expectations(evaluate, np.zeros(1), sd))
    (slopes,) = _expectations(evaluate, _angles_of(shape, x), sd, (1,))
    own_slope = np.sqrt(np.diagonal(equal_slope))
    outside = np.where(own_slope > 0, own_slope, 1)
    power = _power(sd, own_slope)
    slopes = slopes / outside[:, None] / outside
    slope = _factors(shape, x, slopes, own_slope / sd**power)

    own = np.sqrt(np.diagonal(equal))
    order = _power(sd, own)
    columns = _series_in(points, np.stack([own / sd**order, own_slope / sd**power], 1)).T

    def of_scales(x):
        return chebyshev.chebval(_node(x, reach), columns.T)

    scales = pieces.pieces(of_scales, reach, _PIECES)
    outside = np.where(own > 0, own, 1)
    share, vectors = np.linalg.eigh(equal / outside[:, None] / outside)
    keep = share > _SPREAD * share[-1]
    spread = np.sqrt(share[keep] / 2) * vectors[:, keep]
    spread = _series_in(points, spread - spread.mean(0)).T
    return Table(reach, shape, slope, scales, spread, (power, order))


# ---- in the program ------------------------------------------------------------------------------


class _Side(NamedTuple):
    """Of one side.

    sd: the deviation, of which those outside of the table count as the largest. size: k. repair:
    of `_repair`.
    """

    sd: Any
    size: Any
    repair: Any
    slope: Any
    spread: Any


def features(table: Table, var: Array) -> Array:
    """What pairs need of one side, `(table.features, *var.shape)`."""
    sd = jnp.minimum(jnp.sqrt(var), table.reach)
    rows = np.concatenate([table.slope.rows, table.spread])
    slope, spread = jnp.split(evaluate(rows, _node(sd, table.reach)), [len(table.slope.rows)])
    size, own = pieces.evaluate(table.scales, sd)
    power, order = table.powers
    if power:
        slope, own = slope * sd**power, own * sd**power
    scales = jnp.stack([sd, size * sd**order, _repair(table, slope, own)])
    return jnp.concatenate([scales, slope, spread])


def scale(found: Array) -> Array:
    """The root of E[phi^2], of `features`."""
    return found[1]


def _repair(table: Table, slope: Any, own: Any) -> Any:
    """What makes the sums right where inputs are equal: there errors would add up over layers.

    KINKED: half of what the last p_m gets, since what is left out are polynomials that are large
    close to x = 1 alone. Else a factor of both sums.
    """
    # In the order of pairs, so that roundings are the same.
    total = _SUMS[table.shape](_coefficients(table.slope, slope, slope), 0, 1.0, 0.0, 2.0)[1]
    if table.shape == Shape.KINKED:
        return (own * own - total) * (0.5 / table.slope.last)
    positive, xp = total > 0, np if isinstance(own, np.ndarray) else jnp
    return xp.where(positive, own / xp.sqrt(xp.where(positive, total, 1)), 0)


def _side(table: Table, found: Any) -> _Side:
    end = 3 + len(table.slope.rows)
    return _Side(found[0], found[1], found[2], found[3:end], found[end : table.features])


def _coefficients(factors: Factors, one: Any, two: Any) -> list[Any]:
    """Of the p_m, from the products of both sides."""
    out, start = [], 0
    for rank in factors.ranks:
        total: Any = 0.0
        for k in range(start, start + rank):
            product = one[k] * two[k]
            total = total + product if factors.signs[k] > 0 else total - product
        out.append(total)
        start += rank
    return out


def _both_sums(table: Table, one: _Side, two: _Side, x: Any, ahead: Any, behind: Any) -> Any:
    """The integral of the dual of phi' in rho up to 1, and the dual; 1 - x and 1 + x are exact."""
    c, number = _coefficients(table.slope, one.slope, two.slope), table.slope.integrated
    if table.shape == Shape.KINKED:
        if c:
            c[-1] = c[-1] + (one.repair + two.repair)
        return _kinked(c, number, x, ahead, behind)
    factor = one.repair * two.repair
    return tuple(factor * s for s in _SUMS[table.shape](c, number, x, ahead, behind))


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


def _after(values: list[Any]) -> list[Any]:
    """Sums of all values behind each."""
    return list(itertools.accumulate(values[:0:-1]))[::-1]


def _over_distance(b: list[Any]) -> list[Any]:
    """Coefficients of (sum_m b_m T_m(1) - sum_m b_m T_m(x)) / (1 - x) in p_m = 2 T_m."""
    return list(itertools.accumulate(reversed(_after(b))))[::-1]


def _odd(c: list[Any], integrated: int, rho: Any, ahead: Any, behind: Any) -> tuple[Any, Any]:
    """The integral up to rho = 1 and the sum, of rho >= 0; p_m = 2 T_2m(rho)."""
    used = c[:integrated]
    differences = [a - b for a, b in zip(used, [*used, 0.0][1:], strict=True)]
    b = [d * (1 / (2 * m + 1)) for m, d in enumerate(differences)]  # of T_(2m+1), the integral
    # Of the same over rho, in the p_m = 2 T_m(x): T_(2m+1) = rho (p_m - p_(m-1) + p_(m-2) ...).
    over_rho = list(itertools.accumulate(reversed(b), lambda later, own: own - later))[::-1]
    twice = behind + behind
    x = 1 - ahead * twice
    rest = _combined(_over_distance(over_rho), _chebyshev, x)
    return ahead * (sum(b) + 2 * rho * twice * rest), _combined(c, _chebyshev, x)


def _smooth(c: list[Any], integrated: int, rho: Any, ahead: Any, behind: Any) -> tuple[Any, Any]:
    """The integral up to rho = 1 and the sum; p_m = 2 T_m(rho)."""
    del behind
    used = c[:integrated]
    pairs = zip(used, [*used, 0.0, 0.0][2:], strict=True)
    b = [0.0, *((a - b) * (1 / m) for m, (a, b) in enumerate(pairs, 1))]
    return ahead * _combined(_over_distance(b), _chebyshev, rho), _combined(c, _chebyshev, rho)


def _kinked(c: list[Any], integrated: int, x: Any, ahead: Any, behind: Any) -> tuple[Any, Any]:
    """The integral up to x = 1 and the sum."""
    b = [a * (3 / (m + 3)) for m, a in enumerate(c[1:integrated], 1)]
    rest = behind * behind * _combined(b, _GEGENBAUER_2, x)
    return ahead * ahead * (c[0] * ((1 + behind) / 2) + rest), _combined(c, _GEGENBAUER_1, x)


# Of (coefficients, how many are integrated, x, 1 - x, 1 + x): the integral up to rho = 1, the sum.
_SUMS = {Shape.ODD: _odd, Shape.SMOOTH: _smooth, Shape.KINKED: _kinked}


class Sums(NamedTuple):
    """What a table says of pairs.

    pair: k1 k2 - nngp (k1 k2 - |nngp| where `Table.signed`) and d_nngp, as `made_together` keeps
      them. scales: k1 and k2.
    """

    pair: Any
    scales: tuple[Array, Array]


def _deviation(cov12: Array, side1: Array, side2: Array, gap12: Any) -> Array:
    """1 - |cos(theta)|."""
    if gap12 is not None:
        return relative_gap(side1, side2, gap12)
    inverse = reciprocal(safe_sqrt(side1)) * reciprocal(safe_sqrt(side2))
    cosine = jnp.minimum(jnp.abs(cov12) * inverse, 1)
    return sine_squared(cov12, side1, side2) / (1 + cosine)


def sums(table: Table, both: Any, cov12: Array, side1: Array, side2: Array, gap12: Any) -> Sums:
    """From the tables; larger deviations than are in it count as the largest.

    both: `features` of both sides.
    """
    one, two = (_side(table, found) for found in both)
    near = _deviation(cov12, side1, side2, gap12)
    if table.shape == Shape.KINKED:
        near = opening(near)
    x, ends = 1 - near, (near, 2 - near)
    if not table.signed:
        negative = cov12 < 0
        x = jnp.where(negative, -x, x)
        ends = tuple(jnp.where(negative, b, a) for a, b in (ends, ends[::-1]))
    integral, slope = _both_sums(table, one, two, x, *ends)
    scales = one.size, two.size
    apart = sum((a - b) ** 2 for a, b in zip(one.spread, two.spread, strict=True))
    value = jnp.maximum(one.sd * two.sd * integral + scales[0] * scales[1] * apart, 0)
    # Of few terms either may be a number.
    value, slope = (jnp.broadcast_to(a, x.shape).astype(x.dtype) for a in (value, slope))
    return Sums(made_together(value, slope), scales)


# ---- making tables -------------------------------------------------------------------------------


def tables_of(fn: Scalar, kinked: bool) -> tuple[Table, ...]:
    """Tables of a function smooth apart from 0, of growing reach, that hold it.

    The longer one, the more products it takes for all pairs, so that a short one pays; but each is
    compiled. Without a kink a function that the long one holds takes few products anyway.

    kinked: is it not smooth at 0.

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
    shape = Shape.KINKED if kinked else Shape.ODD if odd else Shape.SMOOTH

    def made(reach: float) -> tuple[Table, ...]:
        table = _table(evaluate, reach, shape)
        return (table,) if _holds(table, evaluate) else ()

    usual, longer = made(_USUAL), made(_LONG)
    short = () if usual and longer and not kinked else made(_SHORT)
    return short + usual + (longer if usual else ())


def _holds(table: Table, evaluate: Callable) -> bool:
    """Is the table right between its points?"""
    sd = np.array([0.004, 0.04, 0.2, 0.4, 0.7, 0.97]) * table.reach
    thetas = np.array([0.0, 0.02, 0.3, 1.1, 2.0, 3.0])
    sizes = [np.sqrt(np.diagonal(e[0])) for e in _expectations(evaluate, thetas[:1], sd)]
    exact = _expectations(evaluate, thetas, sd)

    basis = chebyshev.chebvander(_node(sd, table.reach), _DEVIATIONS - 1)
    slopes, spread = (basis @ table.slope.rows.T).T * sd ** table.powers[0], basis @ table.spread.T
    side = _Side(sd, sizes[0], _repair(table, slopes, sizes[1]), slopes, spread)
    row = side._replace(repair=side.repair[:, None], slope=slopes[..., None])
    theta = thetas[:, None, None]
    negative, near = theta > np.pi / 2, 2 * np.sin(np.minimum(theta, np.pi - theta) / 2) ** 2
    if table.shape == Shape.KINKED:
        near = 1 - 2 * np.sin((np.pi / 2 - np.minimum(theta, np.pi - theta)) / 3)
    turned = negative & (not table.signed)
    x, ahead = np.where(turned, near - 1, 1 - near), np.where(turned, 2 - near, near)
    integral, slope = _both_sums(table, row, side, x, ahead, 2 - ahead)
    apart = ((spread[:, None] - spread) ** 2).sum(-1)
    value = side.size[:, None] * side.size * (1 - apart) - sd[:, None] * sd * integral
    if table.signed:
        value = np.where(negative, -value, value)
    for got, want, own, bound in zip((value, slope), exact, sizes, _HOLDS, strict=True):
        own = np.maximum(own, np.finfo(float).tiny)
        if not np.max(np.abs(got - want) / own[:, None] / own) < bound:
            return False
    return True
