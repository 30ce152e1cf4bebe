"""Coefficients of Hermite series with sampled orders (`sampled.py`): made on the host, in float64.

    beta_n(sd) = E[phi'(sd z) he_n(z)] = int phi'(sd z) he_n(z) g(z) dz

for small n over all of z, and for a large order over |z| sqrt(n) up to some 200 only, with a window
that falls off smoothly there. Beyond, phi'(sd z) has no structure as fine as the waves of he_n, so
that what is left out is nothing: either sqrt(n) is so large that phi' looks smooth next to its kink
at 0, or it is so small that phi' has become a line.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.polynomial import chebyshev

from tangents._infinite.dual import hermite_functions

Evaluate = Callable[[np.ndarray], list[np.ndarray]]  # phi and phi'

FIRST = 64  # terms that are summed one by one
OCTAVES = 46  # [N, 2 N), [2 N, 4 N), ... of which a few n are taken
REACH = 1e6  # largest deviation
_SHIFT = 0.5
_FINEST = 30.0  # rad per unit of phi's argument that are held in single precision
SMALL = 1.5  # deviations that count as no smaller there
_PARTS = 26  # halvings towards 0, where phi' changes on the scale of 1 / sd
_WIDEST = 12.2  # z at which he_n(z) g(z) is nothing
_NEAR, _FAR = 30.0, 1e9  # there, if not before, a function is a line
_WINDOW = 165.0, 11.0  # z sqrt(n) at its middle, and its width


class Precision(NamedTuple):
    """Ends: pairs of terms that correct the ends of integrals. nodes: orders of each octave.

    deviations: Chebyshev points of log(_SHIFT + sd). holds: bound on relative errors of E[phi^2]
    and E[phi'^2]. finest: rad per unit of phi's argument beyond which waves of he_n do not count
    where phi is smooth. more_octaves: count where a derivative jumps, for powers of n are left.
    """

    ends: int
    nodes: int
    deviations: int
    holds: float
    finest: float
    more_octaves: int

    @property
    def one_by_one(self) -> int:
        """Terms that are summed one by one, ends included."""
        return FIRST + 2 * self.ends


SINGLE = Precision(1, 5, 72, 2e-6, 45.0, 10)
DOUBLE = Precision(4, 12, 300, 1e-12, 100.0, 18)


@functools.cache
def orders(precision: Precision) -> tuple[np.ndarray, np.ndarray]:
    """Mu = n + 1 of the sampled even n, which is n of the odd ones, and weights, (octaves, nodes).

    A sum over every second n is half an integral that begins one below.
    """
    x, w = np.polynomial.legendre.leggauss(precision.nodes)
    start = FIRST * 2.0 ** np.arange(OCTAVES)[:, None]
    return start * (1 + (x + 1) / 2), start * w / 4


# Of sum_(j >= 0) f(a + 1 + 2 j) - 1/2 int_a^inf f: factors of f', f''', ... at a
# (Euler and Maclaurin, of midpoints: DLMF 2.10.1 and 24.4.27).
_MIDPOINT = (2 / 24, -7 * 2**3 / 5760, 31 * 2**5 / 967680, -127 * 2**7 / 154828800)


@functools.cache
def first_weights(precision: Precision) -> np.ndarray:
    """Of the terms that are summed one by one; the last ones correct the integrals' ends."""
    number = precision.ends
    degrees, places = (np.arange(1, 2 * number, 2) for _ in range(2))
    derivatives = [f * math.factorial(d) for f, d in zip(_MIDPOINT, degrees, strict=False)]
    found = np.linalg.solve(2.0 * places ** degrees[:, None], derivatives)
    weights = np.ones(precision.one_by_one)
    for parity in (0, 1):
        end = FIRST - 1 + parity
        weights[end + places] = found
        weights[end - places] -= found
    return weights


def constants(precision: Precision) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of all beta_n: n, weights, and beta_n^2 of a unit step."""
    first, (mu, weight) = np.arange(precision.one_by_one), (a.ravel() for a in orders(precision))
    zero = hermite_functions.first(np.zeros(1), len(first))[:, 0]
    step = np.zeros(len(first))
    step[0] = 1 / 4
    step[1::2] = zero[:-1:2] ** 2 / first[1::2]
    order = np.concatenate([first, mu - 1, mu])
    weights = np.concatenate([first_weights(precision), weight, weight])
    return order, weights, np.concatenate([step, 0 * mu, hermite_functions.power(mu, 0) ** 2])


def node(sd: Any, log: Callable) -> Any:
    """The deviation as a number in [-1, 1]."""
    low, high = math.log(_SHIFT), math.log(_SHIFT + REACH)
    return 2 * (log(_SHIFT + sd) - low) / (high - low) - 1


def _deviations(number: int) -> tuple[np.ndarray, np.ndarray]:
    points = np.cos(np.pi * (np.arange(number) + 0.5) / number)
    low, high = math.log(_SHIFT), math.log(_SHIFT + REACH)
    return points, np.exp((points + 1) / 2 * (high - low) + low) - _SHIFT


# ---- quadrature ----------------------------------------------------------------------------------


def _panels(edges: np.ndarray, nodes: int) -> tuple[np.ndarray, np.ndarray]:
    x, w = np.polynomial.legendre.leggauss(nodes)
    half = np.diff(edges)[:, None] / 2
    return (edges[:-1, None] + half * (1 + x)).ravel(), (half * w).ravel()


def _edges(length: float, number: int) -> np.ndarray:
    """Panels of one length, the first of them halved again and again."""
    halved = length * 2.0 ** np.arange(-_PARTS, 0)
    return np.concatenate([[0], halved, length * np.arange(1, number + 1)])


@functools.cache
def _all_of_z() -> tuple[np.ndarray, np.ndarray]:
    return _panels(_edges(0.8, 16), 28)


@functools.cache
def _waves(precision: Precision) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each octave z, and functions of even and odd n with weights, (z, n)."""
    y, w = _panels(_edges(10.0, 24), 24)
    middle, width = _WINDOW
    w = w * np.vectorize(math.erfc)((y - middle) / width) / 2
    out = []
    for mu in orders(precision)[0]:
        root = math.sqrt(mu[0])
        # All as long as each other, so that phi' is compiled once.
        z = np.minimum(y / root, _WIDEST)
        weight = np.where(z < _WIDEST, w, 0) / root
        even = hermite_functions.later(mu - 1, z[None], False)
        odd = hermite_functions.later(mu, z[None], True)
        out.append((z, (weight * even).T, (weight * odd).T))
    return out


def _features(evaluate: Evaluate, precision: Precision, sd: np.ndarray) -> np.ndarray:
    """(E[phi] - phi(0)) / sd and the beta_n, (deviations, features)."""

    def parts(z):
        above, below = (evaluate(sign * sd[:, None] * z)[1] for sign in (1, -1))
        return above + below, above - below

    z, w = _all_of_z()
    even, odd = parts(z)
    tail = np.vectorize(math.erfc)(z / math.sqrt(2)) / 2
    functions = w * hermite_functions.first(z, precision.one_by_one)
    of_even = np.arange(precision.one_by_one) % 2 == 0
    mean = (odd @ (w * tail))[:, None]
    betas = np.where(of_even, even @ functions.T, odd @ functions.T)
    evens, odds = [], []
    for z, of_even, of_odd in _waves(precision):
        even, odd = parts(z)
        evens.append(even @ of_even)
        odds.append(odd @ of_odd)
    return np.concatenate([mean, betas, *evens, *odds], 1)


# ---- the table -----------------------------------------------------------------------------------


class Sampled(NamedTuple):
    """Of a function.

    rows: (features, coefficients), of (E[phi] - phi(0)) / sd, of the beta_n one by one, and of
      those of sampled even and odd n, all times 1 + sd where bounded. start: phi(0). jumps: at 0,
      of the first three derivatives. bounded: phi' vanishes at both ends.
    """

    precision: Precision
    rows: np.ndarray
    start: float
    jumps: tuple[float, float, float]
    bounded: bool


def sampled(
    fn: Callable[[Any], Any], jumps: tuple[float, float, float], precision: Precision = SINGLE
) -> Sampled | None:
    """Of a function smooth apart from 0, where three derivatives may jump; None: of another kind.

    Its rules are compared with quadratures of phi^2 and phi'^2.
    """

    @jax.jit
    def both(x):
        return jax.jvp(fn, (x,), (jnp.ones_like(x),))

    def evaluate(x):
        with jax.ensure_compile_time_eval(), jax.enable_x64(True):
            return [np.asarray(a, np.float64) for a in both(jnp.asarray(x, jnp.float64))]

    start, *_ = evaluate(np.zeros(3))[0]
    x = np.concatenate([np.geomspace(1e-3, 1e6, 99), [_FAR]])
    slopes = np.stack([evaluate(side * x)[1] for side in (-1, 1)])
    size, (lower, upper) = np.max(np.abs(slopes[:, x < _NEAR])), slopes[:, -1]
    # Of one that grows faster than a line small deviations would drown in the table.
    if not np.max(np.abs(slopes)) < 10 * size:
        return None
    # Of one without a step its closed form would grow beyond what it is a part of.
    if abs(upper - lower) < 0.05 * abs(jumps[0]):
        return None
    bounded = bool(max(abs(upper), abs(lower)) < 1e-12 * size)
    points, sd = _deviations(precision.deviations)
    table = _features(evaluate, precision, sd)
    if not np.all(np.isfinite(table)):
        return None
    if bounded:
        table *= 1 + sd[:, None]
    basis = chebyshev.chebvander(points, len(points) - 1)
    found = Sampled(precision, np.linalg.solve(basis, table).T, float(start), jumps, bounded)
    return found if _holds(found, evaluate) else None


def _holds(found: Sampled, evaluate: Evaluate) -> bool:
    """Are E[phi^2] and E[phi'^2] those of a quadrature, between the points?"""
    sd = np.array([0.03, 0.4, 2.0, 9.0, 70.0, 1e3, 1e5])
    z, w = _panels(np.concatenate([[0], np.geomspace(1e-8, 13, 200)]), 12)
    w = w * hermite_functions.DENSITY * np.exp(-z * z / 2)
    ahead, behind = (evaluate(sign * sd[:, None] * z) for sign in (1, -1))
    want = [(a * a + b * b) @ w for a, b in zip(ahead, behind, strict=True)]
    basis = chebyshev.chebvander(node(sd, np.log), found.rows.shape[1] - 1)
    mean, betas = coefficients(found, found.rows @ basis.T, sd, np)
    order, weight, step = (c[:, None] for c in constants(found.precision))
    bend = found.jumps[0] ** 2
    value = mean**2 + sd**2 * np.sum(weight / (order + 1) * betas**2, 0)
    slope = np.sum(weight * (betas**2 - bend * step), 0) + bend / 2
    pairs = zip((value, slope), want, strict=True)
    return all(np.all(np.abs(g - v) < found.precision.holds * v) for g, v in pairs)


# ---- on the host and in the program --------------------------------------------------------------


def coefficients(found: Sampled, features: Any, sd: Any, xp: Any = jnp) -> tuple[Any, Any]:
    """E[phi], and all beta_n, from what is tabulated.

    In single precision those of finer waves are what the jumps at 0 leave: noise of so many would
    add up.
    """
    features = features / (1 + sd) if found.bounded else features
    mean, betas = found.start + sd * features[0], features[1:]
    if found.precision != SINGLE:
        return mean, betas
    root, bend, curve, third = (
        xp.asarray(a, betas.dtype).reshape((-1,) + (1,) * sd.ndim) for a in _limits(found)
    )
    rate = xp.minimum(root / (_FINEST * xp.sqrt(sd * sd + SMALL**2)), 1.5)
    fade, first = xp.exp(-(rate**8)), found.precision.one_by_one
    limit = bend + sd * (curve + sd * third)
    return mean, xp.concatenate([betas[:first], betas[first:] * fade + limit * (1 - fade)])


def _limits(found: Sampled) -> tuple[np.ndarray, ...]:
    """Of the sampled n: sqrt(n), and beta_n at large n, as coefficients of powers of sd."""
    mu = orders(found.precision)[0].ravel()
    bend, curve, third = found.jumps
    odd = (hermite_functions.power(mu, k) for k in (0, 2))
    bends, thirds = (
        np.concatenate([0 * mu, jump * p]) for jump, p in zip((bend, third), odd, strict=True)
    )
    curves = np.concatenate([curve * hermite_functions.power(mu - 1, 1), 0 * mu])
    return np.sqrt(np.concatenate([mu - 1, mu])), bends, curves, thirds
