"""Hermite series of large standard deviations: their high terms are sampled.

Where a function changes within a distance of 1 from 0 and is a line on either side, at a deviation
sd the coefficients of phi' (`expansion.py`)

    beta_n = E[phi'(sd z) he_n(z)],    E[phi'(u) phi'(v)] = sum_n beta_n(sd1) beta_n(sd2) rho^n,
    E[phi(u) phi(v)] = E[phi(u)] E[phi(v)] + sd1 sd2 sum_n beta_n beta_n rho^(n + 1) / (n + 1)

begin to fall at n = sd^2 only. So thousands of terms are needed, or jumps of high derivatives in
closed form, which grow like powers of sd and cancel. But beta_n is smooth in n, for even and for
odd n: he_n(x / sd) is close to a cosine or sine of sqrt(n + 1/2) x / sd. So of [N, 2 N),
[2 N, 4 N), ... a Gauss rule takes a few n each (not integers: Hermite functions of real order),
and 4e15 terms are 230.

With phi' = s_- for x < 0, s_+ for x > 0 and a rest psi that falls off, nothing cancels:

    beta_n = (s_+ - s_-) he_(n-1)(0) g(0) / sqrt(n) + 1 / sd int psi(x) he_n(x / sd) g(x / sd) dx.

They are tabulated on the host in the deviation. Orders beyond those of the finest detail of psi are
left out, and for a jump of phi' itself its closed form (`arc_cosine.py`) is put in their place.

The gap is a sum of terms that do not cancel either: with k^2 = E[phi^2] and alpha_n the
coefficients of phi over k,

    1 - E[phi(u) phi(v)] / k1 k2 = sum_n (alpha_n - alpha_n')^2 / 2 + alpha_n alpha_n' (1 - rho^n).
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
from tangents._infinite.dual import arc_cosine
from tangents._infinite.dual.angle import reciprocal, relative_gap, safe_sqrt, sine_squared

REACH = 1e6  # largest deviation; beyond, functions are lines or steps to a rounding
_FIRST = 64  # terms that are summed one by one
_NODES = 5  # of [N, 2 N)
_OCTAVES = 46
_FINEST = 30.0  # rad per unit of phi's argument that are held
_SMALL = 1.5  # deviations that count as no smaller there
_WIDEST = 40.0  # distance at which phi has become a line
_DEVIATIONS, _SHIFT = 72, 0.5  # Chebyshev points of log(_SHIFT + sd)
_HOLDS = 2e-6
_DENSITY = 1 / math.sqrt(2 * math.pi)  # at 0


class Sampled(NamedTuple):
    """Of a function: lines at both ends, and what is tabulated.

    rows: (features, coefficients): of E[phi], of beta_n for n < _FIRST + 2, and of sampled even and
      odd n. start: phi(0). step: s_+ - s_-. jumps: of phi', phi'' and phi''' at
      0. bounded: s_+ = s_- = 0.
    """

    rows: np.ndarray
    start: float
    step: float
    jumps: tuple[float, float, float]
    bounded: bool


# ---- on the host ---------------------------------------------------------------------------------


@functools.cache
def _orders() -> tuple[np.ndarray, np.ndarray]:
    """Mu = n + 1 of the sampled even n, which is n of the odd ones, and weights, (octaves, nodes).

    A sum over every second n is half an integral that begins one below.
    """
    x, w = np.polynomial.legendre.leggauss(_NODES)
    start = _FIRST * 2.0 ** np.arange(_OCTAVES)[:, None]
    return start * (1 + (x + 1) / 2), start * w / 4


@functools.cache
def _first_weights() -> np.ndarray:
    """Of the terms that are summed one by one.

    The last ones are the end correction of the integral (Euler and Maclaurin): f' / 12.
    """
    weights = np.ones(_FIRST + 2)
    weights[-4:-2], weights[-2:] = 23 / 24, 1 / 24
    return weights


def _at_zero(order: np.ndarray) -> np.ndarray:
    """|he_n(0)| g(0), for real n between the even ones."""
    n = np.minimum(order, 1e5)
    log_gamma = np.vectorize(math.lgamma)
    inside = np.exp(log_gamma(n + 1) / 2 - n / 2 * np.log(2) - log_gamma(n / 2 + 1))
    far = (2 / (np.pi * order)) ** 0.25 * (1 - 1 / (8 * order))
    return _DENSITY * np.where(order > 1e5, far, inside)


def _power(order: np.ndarray, power: int) -> np.ndarray:
    """Coefficients of max(x, 0)^power / power!, of even or odd n, with the sign of he_n."""
    below = order - power - 1
    falling = np.prod([order - i for i in range(power + 1)], 0)
    return (-1) ** ((power + 1) // 2) * _at_zero(below) / np.sqrt(falling)


def _waves(order: np.ndarray, z: np.ndarray, odd: bool) -> np.ndarray:
    """he_n(z) g(z) over |he_n(0)| g(0), or over |he_n'(0)| g(0), (n, z), to 1e-7 for n >= 64.

    y = he_n(z) exp(-z^2 / 4) solves y'' + q y = 0, q = n + 1/2 - z^2 / 4: the phase and its slope
    to second order (Bender & Orszag 1978, sec. 10.1, eq. 10.1.13).
    """
    square = order[:, None] + 0.5
    root = np.sqrt(square)
    sine = z / (2 * root)
    inside = sine < 0.9  # beyond, the weight exp(-z^2 / 4) is nothing
    sine = np.where(inside, sine, 0)
    if np.max(sine) < 0.02:
        s2 = sine * sine
        phase = square * sine * (2 - s2 / 3 - s2 * s2 / 20) + z / (16 * square * root)
        amplitude = 1 + s2 / 4
    else:
        cosine = np.sqrt(1 - sine * sine)
        tangent = sine / cosine
        phase = square * (np.arcsin(sine) + sine * cosine)
        phase = phase + (tangent / 8 + 5 / 48 * tangent**3) / square
        q = square * cosine * cosine
        slope = np.sqrt(q) * (1 + 1 / (16 * q * q) + 5 / 128 * z * z / q**3)
        amplitude = np.sqrt(root * (1 + 1 / (16 * square * square)) / slope)
    wave = np.sin(phase) / root if odd else np.cos(phase)
    return np.where(inside, wave * amplitude * np.exp(-z * z / 4), 0)


def _first_functions(z: np.ndarray) -> np.ndarray:
    """he_n(z) g(z) of the first n, (n, z)."""
    rows = [_DENSITY * np.exp(-z * z / 2)]
    rows.append(z * rows[0])
    for n in range(1, _FIRST + 1):
        rows.append((z * rows[n] - math.sqrt(n) * rows[n - 1]) / math.sqrt(n + 1))
    return np.stack(rows)


@functools.cache
def _rule(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Of [0, 1], with more nodes near 0."""
    t, w = np.polynomial.legendre.leggauss(nodes)
    t = (t + 1) / 2
    return t * t, w * t / 2


class _Ends(NamedTuple):
    """Of a function: its slopes at both ends, and how far away they are."""

    upper: float
    lower: float
    width: float


def _ends(x: np.ndarray, above: np.ndarray, below: np.ndarray) -> _Ends | None:
    """Where phi' at x and -x has become constant to 1e-8, if it does."""
    if not np.all(np.isfinite(above + below)):
        return None
    rest = np.maximum(np.abs(above - above[-1]), np.abs(below - below[-1]))
    size = np.max(np.abs(above) + np.abs(below))
    far = np.flatnonzero(rest > 1e-8 * size)
    width = float(x[min(far[-1] + 1, len(x) - 1)]) if len(far) else 1.0
    if not width < _WIDEST:
        return None
    upper, lower = (float(s) if abs(s) > 1e-12 * size else 0.0 for s in (above[-1], below[-1]))
    return _Ends(upper, lower if abs(lower - upper) > 1e-12 * size else upper, max(width, 1.0))


def _tail(z: np.ndarray) -> np.ndarray:
    """P(Z > z)."""
    return np.vectorize(math.erfc)(z / math.sqrt(2)) / 2


def _limits(jumps: Sequence[float], sd: Any) -> tuple[np.ndarray, np.ndarray]:
    """Beta_n at large n, of even and odd ones: what jumps at 0 leave."""
    mu = _orders()[0].ravel()
    bend, curve, third = jumps
    return curve * sd * _power(mu - 1, 1), bend * _power(mu, 0) + third * sd**2 * _power(mu, 2)


_RULES = (0.8, 48), (6.0, 100), (np.inf, 360)  # number of nodes below a rate of a wave


def _places(width: float, sd: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """Nodes and weights of each rule, up to where the function is a line or the density 0."""
    width = min(width, 9.5 * sd)
    return [(width * x, 2 * width * w) for x, w in (_rule(nodes) for _, nodes in _RULES)]


def _features_at(
    psi: Sequence[tuple], ends: _Ends, jumps: Sequence[float], sd: float
) -> np.ndarray:
    """E[phi] - phi(0) - step sd g(0), and the beta_n, at one deviation.

    psi: for each rule, nodes over sd, and even and odd part of psi with the weights over sd.
    """
    step = ends.upper - ends.lower
    z, even, odd = psi[-1]
    mean = np.sum(odd * _tail(z)) * sd
    first, zero = _first_functions(z), _first_functions(np.zeros(1))[:, 0]
    n = np.arange(_FIRST + 2)
    betas = np.where(n % 2 == 0, first @ even, first @ odd)
    betas[0] += (ends.upper + ends.lower) / 2
    betas[1::2] += step * zero[:-1:2] / np.sqrt(n[1::2])

    mu = _orders()[0].ravel()
    rate = np.sqrt(mu) / math.hypot(sd, _SMALL)
    evens, odds = _limits(jumps, sd)
    lowest = 0.0
    for (highest, _), (z, even, odd) in zip(_RULES, psi, strict=True):
        some = np.flatnonzero((rate < 2 * _FINEST) & (rate >= lowest) & (rate < highest))
        lowest = highest
        if not len(some):
            continue
        order, height = mu[some], _at_zero(mu[some] - 1)
        fade = np.exp(-((rate[some] / (1.6 * _FINEST)) ** 12))
        full = height * (_waves(order - 1, z, False) @ even)
        evens[some] += fade * (full - evens[some])
        full = np.sqrt(order) * height * (_waves(order, z, True) @ odd)
        odds[some] += fade * (step * _power(order, 0) + full - odds[some])
    return np.concatenate([[mean], betas, evens, odds])


def _node(sd: Any, log: Callable) -> Any:
    low, high = math.log(_SHIFT), math.log(_SHIFT + REACH)
    return 2 * (log(_SHIFT + sd) - low) / (high - low) - 1


def _deviations() -> np.ndarray:
    points = np.cos(np.pi * (np.arange(_DEVIATIONS) + 0.5) / _DEVIATIONS)
    low, high = math.log(_SHIFT), math.log(_SHIFT + REACH)
    return np.exp((points + 1) / 2 * (high - low) + low) - _SHIFT


def sampled(fn: Callable[[Any], Any], jumps: Sequence[float]) -> Sampled | None:
    """Of a function smooth apart from 0, where phi', phi'' and phi''' jump; None: of another kind.

    Its rules are compared with quadratures of phi^2 and phi'^2.
    """

    @jax.jit
    def both(x):
        return jax.jvp(fn, (x,), (jnp.ones_like(x),))

    def evaluate(x):
        with jax.ensure_compile_time_eval(), jax.enable_x64(True):
            return [np.asarray(a, np.float64) for a in both(jnp.asarray(x, jnp.float64))]

    far = np.geomspace(1 / 256, 256, 600)
    edges = np.concatenate([[0], np.geomspace(1e-3, 9.5e5, 140)])
    within, weights = np.polynomial.legendre.leggauss(12)
    half = np.diff(edges)[:, None] / 2
    panels, weights = (edges[:-1, None] + half * (1 + within)).ravel(), (half * weights).ravel()
    ahead = np.concatenate([far, panels])
    (values, slopes), (below, slopes_below) = evaluate(ahead), evaluate(-ahead)
    ends = _ends(far, slopes[: len(far)], slopes_below[: len(far)])
    if ends is None or not np.all(np.isfinite(values + below)):
        return None
    step = ends.upper - ends.lower
    # Of a function without a step its closed form would grow beyond what it is a part of.
    if abs(step) < 0.05 * abs(jumps[0]):
        return None
    bounded = ends.upper == 0 == ends.lower
    start = float(evaluate(0 * ahead)[0][0])
    sd = _deviations()
    places = [_places(ends.width, float(s)) for s in sd]
    x = np.concatenate([nodes for each in places for nodes, _ in each])
    above, below_ = (
        evaluate(side * x)[1] - end for side, end in ((1, ends.upper), (-1, ends.lower))
    )
    cuts = np.cumsum([len(nodes) for each in places for nodes, _ in each])[:-1]
    parts = iter(zip(np.split(above, cuts), np.split(below_, cuts), strict=True))
    features = []
    for s, each in zip(sd, places, strict=True):
        psi = []
        for (nodes, w), (up, down) in zip(each, parts):
            psi.append((nodes / s, (up + down) * w / s, (up - down) * w / s))
        features.append(_features_at(psi, ends, jumps, float(s)))
    table = np.stack(features)
    table[:, 0] *= (1 + sd) / sd
    if bounded:
        table[:, 1:] *= 1 + sd[:, None]
    basis = chebyshev.chebvander(_node(sd, np.log), _DEVIATIONS - 1)
    rows = np.linalg.solve(basis, table).T
    found = Sampled(rows, start, step, (jumps[0], jumps[1], jumps[2]), bounded)
    squares = [
        p[len(far) :] ** 2 + m[len(far) :] ** 2
        for p, m in ((values, below), (slopes, slopes_below))
    ]
    return found if _holds(found, panels, weights, squares) else None


def _holds(found: Sampled, x: np.ndarray, weights: np.ndarray, squares: list[np.ndarray]) -> bool:
    """Are E[phi^2] and E[phi'^2] those of a quadrature, between the points?

    squares: phi(x)^2 + phi(-x)^2, and the same of phi'.
    """
    sd = np.array([0.03, 0.4, 2.0, 9.0, 70.0, 1e3, 1e5])
    basis = chebyshev.chebvander(_node(sd, np.log), _DEVIATIONS - 1)
    mean, betas = _coefficients(found, found.rows @ basis.T, sd, np)
    order, weight, kink = (c[:, None] for c in _constants(found))
    value = mean**2 + sd**2 * np.sum(weight / (order + 1) * betas**2, 0)
    slope = np.sum(weight * (betas**2 - kink), 0) + found.jumps[0] ** 2 / 2
    z = x / sd[:, None]
    density = weights * _DENSITY / sd[:, None] * np.exp(-z * z / 2)
    pairs = list(zip((value, slope), squares, strict=True))
    return all(np.all(np.abs(g - density @ q) < _HOLDS * (density @ q)) for g, q in pairs)


# ---- both ----------------------------------------------------------------------------------------


def _constants(found: Sampled) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of all beta_n: n, weights, and the squares of what the jump of phi' is at even and odd n."""
    first, (mu, weight) = np.arange(_FIRST + 2), (a.ravel() for a in _orders())
    zero = _first_functions(np.zeros(1))[:, 0]
    kink = np.zeros(_FIRST + 2)
    kink[0] = 1 / 4
    kink[1::2] = zero[:-1:2] ** 2 / first[1::2]
    order = np.concatenate([first, mu - 1, mu])
    weights = np.concatenate([_first_weights(), weight, weight])
    kinks = np.concatenate([kink, 0 * mu, _power(mu, 0) ** 2])
    return order, weights, found.jumps[0] ** 2 * kinks


def _coefficients(found: Sampled, features: Any, sd: Any, xp: Any = jnp) -> tuple[Any, Any]:
    """E[phi], and all beta_n, from what is tabulated; without waves finer than are held."""
    mean = found.start + sd * (found.step * _DENSITY + features[0] / (1 + sd))
    betas = features[1:] / (1 + sd) if found.bounded else features[1:]
    root, bend, curve, third = (
        xp.asarray(a, betas.dtype).reshape((-1,) + (1,) * sd.ndim) for a in _far(found)
    )
    rate = xp.minimum(root / (_FINEST * xp.sqrt(sd * sd + _SMALL**2)), 1.5)
    fade, first = xp.exp(-(rate**8)), _FIRST + 2
    limit = bend + sd * (curve + sd * third)
    return mean, xp.concatenate([betas[:first], betas[first:] * fade + limit * (1 - fade)])


def _far(found: Sampled) -> tuple[np.ndarray, ...]:
    """Of the sampled n: sqrt(n), and beta_n at large n, as coefficients of powers of sd."""
    mu = _orders()[0].ravel()
    unit = np.eye(3) * np.asarray(found.jumps)[:, None]
    limits = (np.concatenate(_limits(jumps, 1.0)) for jumps in unit)
    return np.sqrt(np.concatenate([mu - 1, mu])), *limits


# ---- in the program ------------------------------------------------------------------------------


class _Side(NamedTuple):
    """Of one side, k^2 = E[phi^2]: sd / k, E[phi] / k, and sd beta_n / k as in `_constants`.

    scale: k. outer: k / sd. sd is within the table, k that of the given deviation.
    """

    ratio: Array
    mean: Array
    betas: Array
    scale: Array
    outer: Array


def _polynomials(u: Array, number: int) -> Array:
    """T_n(u), (number, *u.shape), by their recurrence: a loop is quickly compiled."""

    def following(pair, _):
        before, now = pair
        return (now, 2 * u * now - before), before

    return jax.lax.scan(following, (jnp.ones_like(u), u), None, length=number)[1]


def _side(found: Sampled, var: Array) -> _Side:
    given = safe_sqrt(var)
    sd = jnp.clip(given, 1e-9, REACH)
    basis = _polynomials(_node(sd, jnp.log).reshape(-1), _DEVIATIONS)
    rows = jnp.asarray(found.rows, var.dtype)
    features = jnp.matmul(rows, basis, precision=precision.DEFAULT)
    mean, betas = _coefficients(found, features.reshape((-1, *var.shape)), sd)
    order, weight, _ = _constants(found)
    weights = jnp.asarray(weight / (order + 1), var.dtype)
    over = jnp.sqrt((mean / sd) ** 2 + jnp.tensordot(weights, betas * betas, 1))
    scale, stretch = over * sd, given / sd
    # Beyond the table a line goes on, and steps are as high as before.
    scale = scale * (jnp.minimum(stretch, 1) if found.start == 0 else 1)
    scale = scale * (1 if found.bounded else jnp.maximum(stretch, 1))
    outer = over / (jnp.maximum(stretch, 1) if found.bounded else 1)
    return _Side(1 / over, mean / (over * sd), betas / over, scale, outer)


def _sides(found: Sampled, side1: Array, side2: Array) -> tuple[_Side, _Side]:
    """Both at once, so that there is less to compile."""
    both = _side(found, jnp.concatenate([side1.reshape(-1), side2.reshape(-1)]))
    one, two = (
        _Side(*(a[..., part].reshape((*a.shape[:-1], *side.shape)) for a in both))
        for part, side in (
            (slice(None, side1.size), side1),
            (slice(side1.size, None), side2),
        )
    )
    return one, two


class _Pair(NamedTuple):
    """rho, 1 - |rho|, and the product of both sd / k."""

    rho: Array
    deviation: Array
    ratios: Array


def _first_terms(one: _Side, two: _Side, pair: _Pair, constants: Any) -> tuple[Array, Array]:
    """1 - E[phi phi] / k1 k2 and the sum of alpha alpha' n rho^(n-1) of terms one by one."""
    zero = jnp.zeros_like(pair.rho)

    def add(carry, term):
        near, ahead, running, slope = carry
        a, b, weight, integrated, kink = term
        product = a * b - kink * pair.ratios
        near = near + integrated / 2 * (a - b) ** 2
        running = running + integrated * product  # sum_n c_n (1 - rho^n) / (1 - rho)
        return (
            near,
            ahead * pair.rho + running,
            running,
            slope * pair.rho + weight * product,
        ), None

    near = (one.mean - two.mean) ** 2 / 2 + zero
    count = _FIRST + 2
    terms = (one.betas[:count], two.betas[:count], *(c[:count] for c in constants))
    carry = (near, zero, zero, zero)
    near, ahead, _, slope = jax.lax.scan(add, carry, terms, reverse=True)[0]
    toward = jnp.where(pair.rho < 0, 2 - pair.deviation, pair.deviation)
    return near + toward * ahead, slope


def _sampled_terms(
    one: _Side, two: _Side, pair: _Pair, constants: Any, octaves: Array | None
) -> tuple[Array, Array]:
    """As `_first_terms`. octaves: how many count; None: all, and reverse mode keeps little."""
    negative, size = pair.rho < 0, 1 - pair.deviation
    inverse = 1 / jnp.maximum(size, 0.25)  # below, the powers are zero
    log = jnp.log1p(-jnp.minimum(pair.deviation, 0.75))
    orders = jnp.asarray(_orders()[0], log.dtype)

    def powers_of(mu: Array) -> Array:
        """|rho|^mu - 1."""
        return jnp.expm1(log * mu.reshape((-1,) + (1,) * log.ndim))

    def add(near, slope, less, terms):
        a, b, weight, integrated, _ = terms[0]
        a2, b2, weight2, integrated2, kink2 = terms[1]
        product, product2 = a * b, a2 * b2 - kink2 * pair.ratios
        gap, gap2 = jnp.where(negative, 2 + less, -less), pair.deviation - size * less
        closer = integrated * ((a - b) ** 2 / 2 + product * gap)
        closer = closer + integrated2 * ((a2 - b2) ** 2 / 2 + product2 * gap2)
        power = 1 + less
        steeper = weight * product * power * inverse
        steeper = steeper + weight2 * product2 * jnp.where(negative, -power, power)
        return near + jnp.sum(closer, 0), slope + jnp.sum(steeper, 0)

    def blocks(start: int) -> list[Array]:
        parts = []
        for c in (one.betas, two.betas, *constants):
            part = c[start : start + orders.size]
            rank = max(log.ndim + 1 - part.ndim, 0) if part.ndim == 1 else 0
            parts.append(part.reshape((_OCTAVES, _NODES, *c.shape[1:], *(1,) * rank)))
        return parts

    first = _FIRST + 2
    terms = blocks(first), blocks(first + orders.size)
    zero = jnp.zeros_like(pair.rho)

    def octave(i, carry):
        near, slope, less = carry
        return *add(near, slope, less, jax.tree.map(lambda c: c[i], terms)), less * (2 + less)

    @jax.checkpoint
    def anew(carry, block):
        (near, slope), (mu, terms) = carry, block
        return add(near, slope, powers_of(mu), terms), None

    if octaves is None:
        return jax.lax.scan(anew, (zero, zero), (orders, terms))[0]
    count = jnp.minimum(octaves.astype(jnp.int32), _OCTAVES)
    return jax.lax.fori_loop(0, count, octave, (zero, zero, powers_of(orders[0])))[:2]


def sums(
    found: Sampled,
    cov12: Array,
    side1: Array,
    side2: Array,
    gap12: Array | None,
    carried: bool = True,
) -> tuple[Array, Array, tuple[Array, Array]]:
    """k1 k2 - E[phi phi], E[phi' phi'], and k1 and k2, at any deviations.

    carried: powers are squared from octave to octave, which has no derivative in reverse mode.
    """
    one, two = _sides(found, side1, side2)
    inverse = reciprocal(safe_sqrt(side1)) * reciprocal(safe_sqrt(side2))
    if gap12 is not None:
        deviation = relative_gap(side1, side2, gap12)
    else:
        cosine = jnp.minimum(jnp.abs(cov12) * inverse, 1)
        deviation = jnp.clip(sine_squared(cov12, side1, side2) / (1 + cosine), 0, 1)
    rho = jnp.where(cov12 < 0, deviation - 1, 1 - deviation)
    pair = _Pair(rho, deviation, one.ratio * two.ratio)
    order, weight, kink = _constants(found)
    constants = tuple(jnp.asarray(c, rho.dtype) for c in (weight, weight / (order + 1), kink))
    largest = jnp.maximum(jnp.max(side1, initial=0), jnp.max(side2, initial=0))
    finest = (1.5 * _FINEST) ** 2 * (jax.lax.stop_gradient(largest) + _SMALL**2)
    octaves = jnp.log2(finest / _FIRST) + 1
    if any(found.jumps):
        octaves = octaves + 10  # powers of n are left
    near, slope = _first_terms(one, two, pair, constants)
    more, steeper = _sampled_terms(one, two, pair, constants, octaves if carried else None)
    near, slope = near + more, slope + steeper
    if found.jumps[0]:
        one_ = jnp.ones_like(rho)
        ramps = arc_cosine.RELU.dual({}, rho, one_, one_, deviation)
        assert ramps.gap12 is not None
        bend = found.jumps[0] ** 2 * pair.ratios
        near, slope = near + bend * ramps.gap12, slope + bend * ramps.d_nngp
    outer = one.outer * two.outer
    near = jnp.maximum(near, 0) * (one.scale * two.scale)
    return near, slope * outer, (one.scale, two.scale)
