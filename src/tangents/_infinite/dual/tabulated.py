"""Dual kernels of one function in single precision: tabulated once, evaluated as short sums.

The normalised dual of phi is a function of the correlation and of two standard deviations. In the
angle it is smooth, so a Chebyshev series in x holds it (x = rho, for a phi with kinks at 0
x = 1 - 2 theta / pi, in which nothing is singular), and each coefficient, a symmetric function of
both deviations, is a short sum of products:

    E[phi(u) phi(v)] = sum_m T_m(x) sum_r +-f_mr(sd1) f_mr(sd2).

The table is made on the host in float64 when a program is traced, once for a function: the
expectation at Chebyshev points of x and of the deviations, by quadrature in polar coordinates whose
panels end at the kinks; the coefficients' eigenvectors with eigenvalues above a tolerance are the
f_mr. They belong to one side each, so that of a pair some tens of multiplications are left, with
neither a branch nor a transcendental function, in Clenshaw's recurrence. phi' has a table of its
own. (Han et al. 2022, "Fast neural kernel embeddings for general activations", truncate the series
of powers of rho, which needs as many terms as there are, close to rho = 1.)

Where the slope of phi jumps, kernels are wanted to the last digit of the angle. There

    E[phi(u) phi(v)] = k1 k2 (1 - sum_r (h_r(sd1) - h_r(sd2))^2 - theta^2 G),   k = E[phi^2]^(1/2),

with G as above: what is subtracted, times k1 k2, is the gap after the layer, without cancellation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.polynomial import chebyshev

from tangents._core import precision
from tangents._core.typing import Array
from tangents._infinite.dual.angle import reciprocal, relative_gap, safe_sqrt, sine_squared
from tangents._infinite.dual.single_precision import folded_angle

# Largest standard deviations: longer tables cost more for each pair, and each is compiled.
_SHORT, _USUAL, _LONG = 1.75, 2.5, 8.0

_DEVIATIONS = 28  # Chebyshev points of the standard deviation
_ANGLES = 40  # at most, of x
_TOLERANCE = {"value": 6e-8, "slope": 2e-7}
_HOLDS = (8e-7, 1e-6)  # errors of value and slope with which a table is used
_REACH = 8.5  # of the radius
_RADII, _PANEL = 64, 24  # nodes of the radius, and of the polar angle between two kinks
_CHUNK = 8192

Scalar = Callable[[Any], Any]


class Factors(NamedTuple):
    """sum_m T_m(x) sum_r sign_mr f_mr f_mr.

    ranks: numbers of products of every m. rows: (sum of ranks, coefficients in the deviation).
    odd: None; True: the sum is in 2 x^2 - 1 and has the factor x; False: without that factor.
    """

    ranks: tuple[int, ...]
    rows: np.ndarray
    signs: np.ndarray
    odd: bool | None


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """Of phi (with kinks, of G) and of phi'.

    reach: the largest deviation. powers: of the deviation that are not in the rows of each. scale,
    spread: k and the h_r.
    """

    reach: float
    value: Factors
    slope: Factors
    kinked: bool
    carries_gap: bool
    powers: tuple[int, int]
    scale: Any = None
    spread: Any = None


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


def _factors(
    x: np.ndarray, values: np.ndarray, scale: np.ndarray, tolerance: float, odd: bool | None
) -> Factors:
    """values: (x, i, j), over the scales of i and j."""
    points = _points()
    ranks, rows, signs = [], [], []
    for c in _series_in(x, values):
        size, vectors = np.linalg.eigh((c + c.T) / 2)
        order = np.argsort(-np.abs(size))
        keep = [k for k in order if abs(size[k]) * np.max(vectors[:, k] ** 2) > tolerance]
        ranks.append(len(keep))
        for k in keep:
            rows.append(np.sqrt(abs(size[k])) * vectors[:, k] * scale)
            signs.append(np.sign(size[k]))
    last = max([m for m, rank in enumerate(ranks) if rank], default=-1)
    at_points = np.stack(rows, 1) if rows else np.zeros((_DEVIATIONS, 0))
    return Factors(
        tuple(ranks[: last + 1]), _series_in(points, at_points).T, np.asarray(signs), odd
    )


def _table(
    evaluate: Callable, reach: float, parity: int | None, kinked: bool, bends: bool
) -> Table:
    points, sd = _deviations(reach)
    x = np.cos(np.pi * (np.arange(_ANGLES) + 0.5) / _ANGLES)
    if kinked:
        thetas = np.pi / 2 * (1 - x)
    else:
        thetas = np.arccos(x if parity is None else np.sqrt((x + 1) / 2))
    equal = [e[0] for e in _expectations(evaluate, np.zeros(1), sd)]
    result: dict[str, Any] = {}
    each = zip(("value", "slope"), _expectations(evaluate, thetas, sd), equal, strict=True)
    for k, (name, values, same) in enumerate(each):
        size = np.sqrt(np.diagonal(same))
        power = _power(sd, size)
        outside = np.where(size > 0, size, 1)
        values = values / outside[:, None] / outside
        scale = size / sd**power
        odd = None if parity is None else bool((parity + k) % 2)
        if kinked and name == "value":
            same = same / outside[:, None] / outside
            values = (same - values) / (thetas**2)[:, None, None]
            share, vectors = np.linalg.eigh(same)
            keep = share > 1e-10 * share[-1]
            spread = np.sqrt(share[keep] / 2) * vectors[:, keep]
            spread = spread - spread.mean(0)
            result["spread"] = _series_in(points, spread).T
            result["scale"] = _series_in(points, scale)[None]
        elif odd:
            values = values / np.cos(thetas)[:, None, None]
        result[name] = _factors(x, values, scale, _TOLERANCE[name], odd), power
    value, slope = result.pop("value"), result.pop("slope")
    return Table(reach, value[0], slope[0], kinked, bends, (value[1], slope[1]), **result)


# ---- in the program ------------------------------------------------------------------------------


def _in_deviation(rows: np.ndarray, sd: Array, reach: float) -> Array:
    """Chebyshev series in the deviation, (rows, *sd.shape)."""
    u = _node(sd, reach).reshape(-1)
    # T_(n+k) = 2 T_n T_k - T_(n-k) doubles their number: few operations to compile.
    basis = jnp.stack([jnp.ones_like(u), u])
    while len(basis) < rows.shape[1]:
        top = 2 * u * basis[-1] - basis[-2]
        mirrored = jnp.concatenate([top[None], basis[:0:-1]])
        basis = jax.lax.optimization_barrier(jnp.concatenate([basis, 2 * top * basis - mirrored]))
    basis = basis[: rows.shape[1]]
    out = jnp.matmul(jnp.asarray(rows, u.dtype), basis, precision=precision.DEFAULT)
    return out.reshape((rows.shape[0], *sd.shape))


class _Features(NamedTuple):
    value: Array
    slope: Array
    scale: Any
    spread: Any


def _features(table: Table, var: Array) -> _Features:
    sd = jnp.sqrt(var)
    parts = [table.value.rows, table.slope.rows]
    if table.kinked:
        parts += [table.scale, table.spread]
    out = _in_deviation(np.concatenate(parts), jnp.minimum(sd, table.reach), table.reach)
    ends = np.cumsum([len(p) for p in parts])
    value, slope, *rest = jnp.split(out, ends[:-1])
    powers = [sd**p if p else None for p in table.powers]
    value, slope = (a if p is None else a * p for a, p in zip((value, slope), powers, strict=True))
    if not rest:
        return _Features(value, slope, None, None)
    scale = rest[0][0] if powers[0] is None else rest[0][0] * powers[0]
    return _Features(value, slope, scale, rest[1])


def _sum(factors: Factors, one: Array, two: Array, x: Array) -> Array:
    """Clenshaw's recurrence, the products of a coefficient added to it one by one."""
    y = x if factors.odd is None else 2 * x * x - 1
    twice = 2 * y
    before, total = jnp.zeros_like(x), jnp.zeros_like(x)
    end = len(one)
    for m in reversed(range(len(factors.ranks))):
        after = (y if m == 0 else twice) * total - before
        for k in range(end - factors.ranks[m], end):
            after = after + one[k] * two[k]
        end -= factors.ranks[m]
        before, total = total, after
    return total * x if factors.odd else total


class Sums(NamedTuple):
    """What a table says of pairs. near: k1 k2 - nngp with kinks, else nngp."""

    near: Array
    d_nngp: Array
    scale1: Any
    scale2: Any


def _angles(cov12: Array, side1: Array, side2: Array, gap12: Any, sharp: bool) -> Array:
    """sharp: does rounding of the correlation near 1 matter (where no slope jumps it does not)?"""
    if gap12 is not None:
        deviation = relative_gap(side1, side2, gap12)
    else:
        inverse = reciprocal(safe_sqrt(side1)) * reciprocal(safe_sqrt(side2))
        cosine = jnp.minimum(jnp.abs(cov12) * inverse, 1)
        deviation = 1 - cosine
        if sharp:
            deviation = sine_squared(cov12, side1, side2) / (1 + cosine)
    theta = folded_angle(deviation)
    return jnp.where(cov12 < 0, math.pi - theta, theta)


def sums(table: Table, cov12: Array, side1: Array, side2: Array, gap12: Any) -> Sums:
    """From the tables; larger deviations than are in it count as the largest."""
    # Made once: fused into the sums over pairs they would be made again for each pair.
    one, two = _features(table, side1), _features(table, side2)
    one = one._replace(
        value=one.value * _signs(table.value, one.value),
        slope=one.slope * _signs(table.slope, one.slope),
    )
    one, two = jax.lax.optimization_barrier((one, two))
    if table.kinked:
        theta = _angles(cov12, side1, side2, gap12, table.carries_gap)
        x = 1 - theta * (2 / math.pi)
        near = theta * theta * _sum(table.value, one.value, two.value, x)
        apart = sum((a - b) ** 2 for a, b in zip(one.spread, two.spread, strict=True))
        near = jnp.maximum(near + one.scale * two.scale * apart, 0)
    else:
        inverse = reciprocal(safe_sqrt(side1)) * reciprocal(safe_sqrt(side2))
        x = jnp.clip(cov12 * inverse, -1, 1)
        near = _sum(table.value, one.value, two.value, x)
    return Sums(near, _sum(table.slope, one.slope, two.slope, x), one.scale, two.scale)


def _signs(factors: Factors, features: Array) -> Array:
    shape = (len(factors.signs),) + (1,) * (features.ndim - 1)
    return jnp.asarray(factors.signs, features.dtype).reshape(shape)


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
    parity = next(
        (p for p, other in ((1, -there), (0, there)) if np.allclose(here, other, 0, 1e-13 * size)),
        None,
    )
    parity = None if kinked else parity

    def made(reach: float) -> tuple[Table, ...]:
        table = _table(evaluate, reach, parity, kinked, bends)
        return (table,) if _holds(table, evaluate) else ()

    usual = made(_USUAL)
    longer = usual and made(_LONG)
    return usual + longer if longer or not usual else made(_SHORT) + usual


def _holds(table: Table, evaluate: Callable) -> bool:
    sd = np.array([0.004, 0.04, 0.2, 0.4, 0.7, 0.97]) * table.reach
    thetas = np.array([0.0, 0.02, 0.3, 1.1, 2.0, 3.0])
    sizes = [np.sqrt(np.diagonal(e[0])) for e in _expectations(evaluate, thetas[:1], sd)]
    exact = _expectations(evaluate, thetas, sd)
    y = 2 * np.cos(thetas) ** 2 - 1
    x = np.cos(thetas)
    if table.kinked:
        x = y = 1 - thetas * (2 / np.pi)
    basis = chebyshev.chebvander(_node(sd, table.reach), _DEVIATIONS - 1)
    for k, factors in enumerate((table.value, table.slope)):
        rows = (basis @ factors.rows.T).T * sd ** table.powers[k]
        z = x if factors.odd is None else y
        terms = np.repeat(np.arange(len(factors.ranks)), factors.ranks)
        each = chebyshev.chebvander(z, max(len(factors.ranks) - 1, 0))[:, terms] * factors.signs
        got = np.einsum("tr,ri,rj->tij", each, rows, rows)
        got = got * x[:, None, None] if factors.odd else got
        if table.kinked and k == 0:
            scale = (basis @ table.scale.T)[:, 0] * sd ** table.powers[0]
            spread = basis @ table.spread.T
            apart = ((spread[:, None] - spread) ** 2).sum(-1)
            got = scale[:, None] * scale * (1 - apart) - (thetas**2)[:, None, None] * got
        size = np.maximum(sizes[k], np.finfo(float).tiny)
        error = np.abs(got - exact[k]) / size[:, None] / size
        if not np.max(error) < _HOLDS[k]:
            return False
    return True
