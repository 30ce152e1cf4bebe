"""Arc-cosine kernels: piecewise linear functions, rectified monomials, sign.

With theta the angle of the pair, s = sqrt(var1 var2), and x_+ = max(x, 0),

    E[u_+^n v_+^n] = s^n J_n(theta) / (2 pi)        (Cho & Saul 2009, eq. 3 to 6),
    J_0 = pi - theta,   J_1 = sin(theta) + (pi - theta) cos(theta),   ...

Every J_n is p_n(cos theta) (pi - theta) + q_n(cos theta) sin(theta) with polynomials p_n, q_n of
integer coefficients. Here it is written s^n J_n = pi P_n - T_n, with the *wedge*

    T_n = s^n (theta p_n - sin(theta) q_n) = O(theta^(2 n + 1)),     T_0 = theta,
    d T_n / d cov12 = n^2 T_(n-1),

which is what makes the kernel differ from a polynomial one: it vanishes at equal inputs, so that
they come out exact, and it is homogeneous of degree n in s, which gives its derivative in the
variances without a cusp: d T_n = n T_n ds/s + n^2 T_(n-1) s d cos(theta).

The derivatives of T_0 in the inputs are infinite at theta = 0 and pi. Returned is 0, so that at
equal (and opposite) inputs the gradient of d_nngp, and of the NNGP of `Sign`, in an input is the
symmetric subgradient. At zero variance phi' is taken as the mean of its two one-sided values.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp

from tangents._core.typing import Array
from tangents._infinite.dual.angle import (
    angle,
    arcsine,
    cosine_change,
    norm,
    poles,
    relative_gap,
    sides,
)
from tangents._infinite.dual.form import Dual, DualKernel
from tangents._infinite.dual.single_precision import (
    folded_angle_of_root,
    is_single,
    segment,
    segment_of_root,
)

Hyper = Mapping[str, Any]

# Below this angle (radians) the wedge is summed from its series when a gap is carried.
_SERIES_BELOW = 1.0
_SERIES_TERMS = 14


def double_factorial(n: int) -> int:
    """The double factorial n!! for n >= -1."""
    return math.prod(range(n, 0, -2))


@functools.cache
def full_moment(n: int) -> tuple[int, ...]:
    """Coefficients of p_n(rho) = E[u^n v^n] for unit variances (Isserlis 1918)."""
    return tuple(
        math.comb(n, k) ** 2 * math.factorial(k) * double_factorial(n - k - 1) ** 2
        if (n - k) % 2 == 0
        else 0
        for k in range(n + 1)
    )


@functools.cache
def _sine_factor(n: int) -> tuple[int, ...]:
    """Coefficients of q_n, from J_n' = n^2 J_(n-1):  p - x q + (1 - x^2)(q' - n^2 q_(n-1)) = 0."""
    if n == 0:
        return ()
    p, before = full_moment(n), dict(enumerate(_sine_factor(n - 1)))
    q = [0] * (n + 2)
    for k in range(n, 0, -1):
        rest = n * n * (before.get(k, 0) - before.get(k - 2, 0))
        q[k - 1] = (p[k] + (k + 1) * q[k + 1] - rest) // k
    return tuple(q[:n])


@functools.cache
def _wedge_series(n: int) -> tuple[float, ...]:
    """Taylor coefficients in theta^2 of T_n / (s^n theta^(2n+1)); T_n = -n^2 int T_(n-1) sin."""
    terms = _SERIES_TERMS + n
    series = [Fraction(1)] + [Fraction(0)] * terms  # T_0 = theta, coefficients of theta^(2k+1)
    sine = [Fraction((-1) ** k, math.factorial(2 * k + 1)) for k in range(terms + 1)]
    for m in range(1, n + 1):
        product = [sum(series[i] * sine[k - i] for i in range(k + 1)) for k in range(terms)]
        # product[k] belongs to theta^(2k+2), its integral to theta^(2k+3)
        series = [Fraction(0)] + [-m * m * c / (2 * k + 3) for k, c in enumerate(product)]
    return tuple(float(c) for c in series[n : n + _SERIES_TERMS])


def _homogeneous(coefficients: tuple[int, ...], x: Array, w: Array) -> Array:
    """sum_k a_k x^k w^((d - k)/2), d the degree; every second coefficient is zero."""
    degree = len(coefficients) - 1
    total = jnp.full_like(x, coefficients[-1])
    for k in range(degree - 2, -1, -2):  # Horner in x^2 against powers of w
        power = w ** ((degree - k) // 2)
        total = total * x * x + coefficients[k] * power
    return total * x if degree % 2 else total


def _product(degree: int, var1: Array, var2: Array) -> Array:
    # Not formed where it is not used: it may overflow where its root does not.
    return var1 * var2 if degree >= 2 else jnp.ones_like(var1)


def _evaluate_moment(n: int, cov12: Array, var1: Array, var2: Array) -> Array:
    """P_n = E[u^n v^n] = s^n p_n."""
    return _homogeneous(full_moment(n), cov12, _product(n, var1, var2))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def wedge(n: int, cov12: Array, var1: Array, var2: Array, *gap12: Array) -> Array:
    """T_n for n >= 1; see the head of this file."""
    if n == 1 and gap12 and is_single(cov12):
        # Folded to the nearer pole: T_1(cov12) = pi cov12 + T_1(-cov12).
        cut = norm(var1, var2) * segment(relative_gap(var1, var2, *gap12))
        return math.pi * jnp.minimum(cov12, 0) - cut
    opposite, adjacent, squared = sides(cov12, var1, var2, *gap12)
    s = norm(var1, var2)
    theta = jnp.arctan2(opposite, adjacent)
    if not gap12:
        height = s * opposite * jax.lax.rsqrt(squared)
        return theta * _evaluate_moment(n, cov12, var1, var2) - height * _homogeneous(
            _sine_factor(n), cov12, _product(n - 1, var1, var2)
        )
    one = jnp.ones_like(adjacent)
    direct = theta * _homogeneous(full_moment(n), adjacent, one)
    direct = direct - opposite * _homogeneous(_sine_factor(n), adjacent, one)
    small = jnp.minimum(theta, _SERIES_BELOW)
    series = jnp.zeros_like(theta)
    for coefficient in reversed(_wedge_series(n)):
        series = series * small * small + coefficient
    series = series * small ** (2 * n + 1)
    return s**n * jnp.where(theta < _SERIES_BELOW, series, direct)


def _wedge(n: int, *pair: Array) -> Array:
    return angle(*pair) if n == 0 else wedge(n, *pair)


@wedge.defjvp
def _wedge_jvp(n, primals, tangents):
    value = wedge(n, *primals)
    change, relative = cosine_change(primals, tangents)
    return value, n * value * relative + n * n * _wedge(n - 1, *primals) * change


# ---- piecewise linear: phi(x) = a min(x, 0) + b max(x, 0) ----------------------------------------


def _piecewise_linear(
    phi: Callable[[Hyper, Array], Array], slopes: Callable[[Hyper], tuple[Any, Any]]
) -> DualKernel:
    """Dual of a min(x, 0) + b max(x, 0), `(a, b) = slopes(hyper)`.

    Half the kernel of a x and of b x, less a wedge for what the kink takes away. Nothing overflows
    for large variances, as the angle is taken apart from the norm.
    """

    def dual(hyper, cov12, var1, var2, gap12=None) -> Dual:
        a, b = slopes(hyper)
        mean = (a * a + b * b) / 2
        kink = (a - b) * (a - b) / (2 * math.pi)
        if gap12 is None:
            nngp = mean * cov12 - kink * wedge(1, cov12, var1, var2)
            return Dual(nngp, mean - kink * angle(cov12, var1, var2))
        # Folded to the nearer pole: T_1(cov12) = pi cov12 + T_1(-cov12).
        cut = kink * wedge(1, jnp.abs(cov12), var1, var2, gap12)
        negative, s = cov12 < 0, norm(var1, var2)
        nngp = jnp.where(negative, a * b, mean) * cov12 - cut
        near = jnp.where(negative, (a + b) * (a + b) / 2 * s - a * b * gap12, mean * gap12) + cut
        gap = jnp.where(nngp < 0, mean * s + nngp, near)
        return Dual(nngp, mean - kink * angle(cov12, var1, var2, gap12), gap)

    def of_norm(hyper, cov12, s, gap12) -> Dual:
        a, b = slopes(hyper)
        mean = (a * a + b * b) / 2
        kink = (a - b) * (a - b) / (2 * math.pi)
        deviation = jnp.where(s > 0, gap12 / jnp.where(s > 0, s, 1), 1)
        # All that both results share: a compiler that will not compute it twice writes one array.
        root = jnp.sqrt(jnp.clip(deviation, 0, 1))
        negative, theta = cov12 < 0, folded_angle_of_root(root)
        nngp = jnp.where(negative, a * b, mean) * cov12 + kink * s * segment_of_root(root)
        return Dual(nngp, mean - kink * jnp.where(negative, math.pi - theta, theta))

    def diagonal(hyper, var):
        a, b = slopes(hyper)
        return (a * a + b * b) / 2 * var

    return DualKernel(phi, dual, diagonal, True, True, of_norm)


def _abrelu(hyper: Hyper, x: Array) -> Array:
    return hyper["a"] * jnp.minimum(x, 0) + hyper["b"] * jnp.maximum(x, 0)


def _leaky_relu(hyper: Hyper, x: Array) -> Array:
    return jnp.where(x >= 0, x, hyper["alpha"] * x)


RELU = _piecewise_linear(lambda hyper, x: jax.nn.relu(x), lambda hyper: (0.0, 1.0))
"""No hyperparameters (Cho & Saul 2009, n = 1)."""

LEAKY_RELU = _piecewise_linear(_leaky_relu, lambda hyper: (hyper["alpha"], 1.0))
"""`hyper = {"alpha": ...}` (Tsuchida et al. 2018, eq. 6)."""

ABS = _piecewise_linear(lambda hyper, x: jnp.abs(x), lambda hyper: (-1.0, 1.0))
"""No hyperparameters."""

ABRELU = _piecewise_linear(_abrelu, lambda hyper: (hyper["a"], hyper["b"]))
"""`hyper = {"a": ..., "b": ...}`."""


# ---- sign ----------------------------------------------------------------------------------------


def _sign_dual(hyper, cov12, var1, var2, gap12=None) -> Dual:
    pair = (cov12, var1, var2) if gap12 is None else (cov12, var1, var2, gap12)
    nngp = 2 / math.pi * arcsine(*pair)
    gap = None
    if gap12 is not None:  # E[sign(u)^2] is 1, and 0 at zero variance
        fold = angle(jnp.abs(cov12), var1, var2, gap12)
        gap = jnp.where(norm(var1, var2) > 0, 2 / math.pi * fold, 0)
    return Dual(nngp, jnp.zeros_like(nngp), gap)


def _sign_diagonal(hyper: Hyper, var: Array) -> Array:
    return (var > 0).astype(var.dtype)


SIGN = DualKernel(lambda hyper, x: jnp.sign(x), _sign_dual, _sign_diagonal, carries_gap=True)
"""E[sign(u) sign(v)] = 2/pi arcsin(rho) (Sheppard 1899). phi' = 0, so d_nngp = 0: the tangent
kernel of what is before a sign does not pass it."""


# ---- rectified monomials: phi(x) = x_+^n ---------------------------------------------------------


def _half_moment(n: int, pair: tuple[Array, ...]) -> Array:
    """E[u_+^n v_+^n]."""
    if n == 0:
        return 0.5 - angle(*pair) / (2 * math.pi)
    return _evaluate_moment(n, *pair[:3]) / 2 - wedge(n, *pair) / (2 * math.pi)


def _moment_gap(n: int, cov12: Array, s: Array, near: Array) -> Array:
    """s^n p_n(1) - P_n, with the factor `near` = s - cov12 taken out."""
    total = jnp.zeros_like(cov12)
    for k, coefficient in enumerate(full_moment(n)):
        if coefficient:
            powers = (s ** (n - 1 - j) * cov12**j for j in range(k))
            total = total + coefficient * sum(powers, jnp.zeros_like(cov12))
    return near * total


@functools.cache
def rectified_monomial(degree: int) -> DualKernel:
    """phi(x) = max(x, 0)^degree, with the unit step for degree 0 (1/2 at 0); no hyperparameters.

    Cho & Saul 2009, eq. 3 to 11, for any degree. Finite at correlation 1 and -1.
    """
    n = degree

    def phi(hyper, x):
        if n == 0:
            return jnp.heaviside(x, 0.5)
        return jnp.maximum(x, 0) ** n

    def dual(hyper, cov12, var1, var2, gap12=None) -> Dual:
        pair = (cov12, var1, var2) if gap12 is None else (cov12, var1, var2, gap12)
        nngp = _half_moment(n, pair)
        d_nngp = n * n * _half_moment(n - 1, pair) if n else jnp.zeros_like(nngp)
        gap = None
        if gap12 is not None and n == 0:
            gap = jnp.where(norm(var1, var2) > 0, angle(*pair) / (2 * math.pi), 0)
        elif gap12 is not None:
            s = norm(var1, var2)
            smooth = _moment_gap(n, cov12, s, poles(cov12, s, gap12)[0])
            gap = smooth / 2 + wedge(n, *pair) / (2 * math.pi)
        return Dual(nngp, d_nngp, gap)

    def diagonal(hyper, var):
        if n == 0:
            return jnp.where(var > 0, 0.5, 0.25).astype(var.dtype)
        return double_factorial(2 * n - 1) / 2 * var**n

    return DualKernel(phi, dual, diagonal, carries_gap=True)
