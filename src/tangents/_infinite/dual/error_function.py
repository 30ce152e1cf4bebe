"""Duals of the error function and of GELU.

Both contain E[Phi(u) Phi(v)], an arcsine of a correlation damped by the width of the step. Its
complement is computed without cancellation from the angle of the pair: with
q_i = 1 / (1 + k var_i), t_i = 1 - q_i = k var_i q_i and rho = cos(theta),

    rho'  = k cov12 sqrt(q_1 q_2),
    1 - rho'^2 = q_1 + t_1 q_2 + t_1 t_2 sin(theta)^2 > 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tangents._core.typing import Array
from tangents._infinite.barrier import made_once
from tangents._infinite.dual.angle import (
    affine_gap,
    norm,
    reciprocal,
    safe_sqrt,
    sine_squared,
)
from tangents._infinite.dual.form import Dual, DualKernel
from tangents._infinite.dual.single_precision import (
    arcsine_of_legs,
    is_single,
    sine_ratio_squared,
)


class Damped(NamedTuple):
    """Correlation rho' of the pair after adding noise of variance 1/k to both: its two legs.

    rest1, rest2: q_1, q_2 of the head of this file.
    """

    cosine: Array
    sine: Array
    rest1: Array
    rest2: Array

    @property
    def arcsine(self) -> Array:
        """arcsin(rho')."""
        return _arcsine(self.cosine, self.sine)


@jax.custom_jvp
def _arcsine(cosine: Array, sine: Array) -> Array:
    """arctan2 of legs on the unit circle."""
    if is_single(cosine):
        return arcsine_of_legs(cosine, sine)
    return jnp.arctan2(cosine, sine)


@_arcsine.defjvp
def _arcsine_jvp(primals, tangents):
    (cosine, sine), (d_cosine, d_sine) = primals, tangents
    return _arcsine(cosine, sine), sine * d_cosine - cosine * d_sine


def damped(k, cov12: Array, var1: Array, var2: Array, gap12: Array | None = None) -> Damped:
    """The damped correlation; `sine` is never zero."""
    rest1, rest2 = 1 / (1 + k * var1), 1 / (1 + k * var2)
    t1, t2 = k * var1 * rest1, k * var2 * rest2
    extra = () if gap12 is None else (gap12,)
    squared = rest1 + t1 * rest2 + t1 * t2 * sine_squared(cov12, var1, var2, *extra)
    cosine = k * cov12 * jnp.sqrt(rest1) * jnp.sqrt(rest2)
    return Damped(cosine, jnp.sqrt(squared), rest1, rest2)


# ---- phi(x) = a erf(b x) + c ---------------------------------------------------------------------


def _erf(hyper, x: Array) -> Array:
    return hyper["a"] * jax.scipy.special.erf(hyper["b"] * x) + hyper["c"]


def _erf_dual(hyper, cov12, var1, var2, gap12=None) -> Dual:
    a, b, c = hyper["a"], hyper["b"], hyper["c"]
    k = 2 * b * b
    pair = damped(k, cov12, var1, var2, gap12)
    scale = a * a * (2 / math.pi)
    slope = k * jnp.sqrt(pair.rest1) * jnp.sqrt(pair.rest2) / pair.sine
    odd = scale * pair.arcsine
    gap = None
    if gap12 is not None:
        gap, own1, own2 = (scale * part for part in _arcsine_gap(k, pair, gap12, var1, var2))
        gap = affine_gap(odd, gap, own1, own2, jnp.ones_like(scale), c * c)
    return Dual(odd + c * c, scale * slope, gap)


class _Own(NamedTuple):
    """Of one example: t, a = arcsin(t), pi/2 - a, and the half angles of both."""

    t: Array
    angle: Array
    rest: Array
    half: tuple[Array, Array]
    half_rest: tuple[Array, Array]


def _own(t: Array, rest: Array) -> _Own:
    cosine = jnp.sqrt(rest * (2 - rest))
    halves = []
    for sine, other in ((t, cosine), (cosine, t)):
        half_cosine = jnp.sqrt((1 + other) / 2)
        halves.append((sine / (2 * half_cosine), half_cosine))
    return _Own(t, _arcsine(t, cosine), _arcsine(cosine, t), *halves)


def _sine_of_sum(one: tuple[Array, Array], two: tuple[Array, Array]) -> Array:
    return one[0] * two[1] + one[1] * two[0]


def _arcsine_gap(k, pair: Damped, gap12: Array, var1: Array, var2: Array):
    """`(sqrt(a_1 a_2) - r, a_1, a_2)` with a_i = arcsin(t_i) and r = |arcsin(rho')|.

    With m = sqrt(t_1 t_2), the correlation of parallel inputs, m - |rho'| = k sqrt(q_1 q_2) gap12.
    With s = (a_1 + a_2) / 2 and d = (a_1 - a_2) / 2, t_1 t_2 = sin(s)^2 - sin(d)^2, so

        sin(s - r) sin(s + r) = sin(s)^2 - rho'^2 = (m - |rho'|) (m + |rho'|) + sin(d)^2,
        s - sqrt(a_1 a_2) = d^2 / (s + sqrt(a_1 a_2)),

    and only their difference cancels, for small inputs of different norms. There `_small_gap`; of
    one small input beside a large one digits are lost.
    """
    q1, q2 = pair.rest1, pair.rest2
    owns = _own(k * var1 * q1, q1), _own(k * var2 * q2, q2)
    one, two = made_once(owns, (var1.shape, var2.shape), gap12)
    m, turned = norm(one.t, two.t), k * jnp.sqrt(q1) * jnp.sqrt(q2) * gap12
    # From the gap alone: beside the covariance, errors of both would feed each other with depth.
    size = m - turned

    # Near pi/2 the differences of a_i have digits in what is missing.
    apart = jnp.where(one.t + two.t > 1.4, two.rest - one.rest, one.angle - two.angle)
    apart = jnp.square(apart / 2)
    middle, s = (one.angle + two.angle) / 2, norm(one.angle, two.angle)
    sine_s, cosine_s = _sine_of_sum(one.half, two.half), _sine_of_sum(one.half_rest, two.half_rest)
    product = turned * (m + size) + apart * _sine_ratio_squared(apart)
    sine = product * reciprocal(sine_s * pair.sine + cosine_s * size)
    wide = _arcsine(sine, cosine_s * pair.sine + sine_s * size)
    wide = wide - apart * reciprocal(middle + s)
    small = _small_gap(one.t, two.t, m, turned)
    wide = jnp.where(m > 0, jnp.maximum(wide, 0), 0)
    reach = 0.25 if is_single(m) else 0.01
    return jnp.where(one.t + two.t < reach, small, wide), one.angle, two.angle


def _sine_ratio_squared(square: Array) -> Array:
    """(sin(d) / d)^2 of d^2, for |d| <= pi/4."""
    if is_single(square):
        return sine_ratio_squared(square)
    return jnp.square(jnp.sinc(safe_sqrt(square) / math.pi))


def _small_gap(t1: Array, t2: Array, m: Array, turned: Array) -> Array:
    """Series of both arcsin(m) - r, in `turned` = m - |rho'|, and sqrt(a_1 a_2) - arcsin(m).

    The second is m e (1/12 + ...) with e = (t_1 - t_2)^2, to 1e-5 of itself for t_1 + t_2 = 1/4,
    and to 1e-13 for 0.01.
    """
    p, e, size = t1 * t2, jnp.square(t1 - t2), m - turned
    first = m * m + m * size + size * size
    second = m**4 + size * (m**3 + size * (m * m + m * size + size * size))
    widened = 1 / 12 + 49 / 1440 * (e + 4 * p)
    widened = widened + e * (2357 / 120960 * e + 2357 / 20160 * p) + 5389 / 30240 * p * p
    return turned * (1 + first / 6 + 3 / 40 * second) + m * e * widened


def _erf_diagonal(hyper, var: Array) -> Array:
    return _erf_dual(hyper, var, var, var).nngp


ERF = DualKernel(_erf, _erf_dual, _erf_diagonal, carries_gap=True)
"""`hyper = {"a", "b", "c"}`: E = 2 a^2/pi arcsin(2 b^2 cov12 / sqrt((1 + 2 b^2 var1)(1 + 2 b^2
var2))) + c^2 (Williams 1996, eq. 11)."""


# ---- phi(x) = x Phi(x) ---------------------------------------------------------------------------


def _gelu(hyper, x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


def _gelu_dual(hyper, cov12, var1, var2, gap12=None) -> Dual:
    # With d = det(I + Sigma) = sine^2 / (rest1 rest2) and g the standard normal density,
    # E[g(u) g(v)] = 1 / (2 pi sqrt(d)); Stein's lemma, applied twice, gives both expectations.
    pair = damped(1, cov12, var1, var2, gap12)
    extra = () if gap12 is None else (gap12,)
    d = 1 + (var1 + var2) + var1 * var2 * sine_squared(cov12, var1, var2, *extra)
    root = (2 * math.pi) * jnp.sqrt(d)
    phi_phi = 0.25 + pair.arcsine / (2 * math.pi)
    squares = (var1 * var2 * d + cov12 * cov12) * (pair.rest1 * pair.rest2)
    nngp = cov12 * phi_phi + squares / root
    d_nngp = phi_phi + cov12 * (pair.rest1 + pair.rest2 + 1 / d) / root
    return Dual(nngp, d_nngp)


def _gelu_diagonal(hyper, var: Array) -> Array:
    return _gelu_dual(hyper, var, var, var).nngp


GELU = DualKernel(_gelu, _gelu_dual, _gelu_diagonal)
"""Tsuchida et al. 2020 ("Avoiding kernel fixed points: computing with ELU and GELU infinite
networks", sec. 3.1), for unequal variances; no hyperparameters."""

GELU_TANH = DualKernel(
    lambda hyper, x: jax.nn.gelu(x, approximate=True), _gelu_dual, _gelu_diagonal
)
"""The tanh approximation of phi, with the dual of the exact one."""
