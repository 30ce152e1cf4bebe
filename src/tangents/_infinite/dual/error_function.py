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
from tangents._infinite.dual.angle import affine_gap, norm, reciprocal, sine_squared
from tangents._infinite.dual.form import Dual, DualKernel
from tangents._infinite.dual.single_precision import arcsine_of_legs, is_single


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


def _arcsine_gap(k, pair: Damped, gap12: Array, var1: Array, var2: Array):
    """`(sqrt(a_1 a_2) - |arcsin(rho')|, a_1, a_2)` with a_i = arcsin(t_i); nothing cancels.

    With m = sqrt(t_1 t_2), the correlation of parallel inputs, and a = arcsin(m) there are two
    parts. Of another direction: m - |rho'| = k sqrt(q_1 q_2) gap12, and

        sin(a - |arcsin(rho')|) = (m^2 - rho'^2) / (m cos(arcsin(rho')) + |rho'| cos(a)).

    Of another norm: with d_1 = a_1 - a, d_2 = a - a_2, bent = d_1 - d_2, apart = d_1 + d_2,

        sqrt(a_1 a_2) - a = (a bent - d_1 d_2) / (sqrt(a_1 a_2) + a),
        d_1 d_2 = (apart^2 - bent^2) / 4,   a = (a_1 + a_2 - bent) / 2,

    where the sines of d_1, d_2, apart and bent all have the factor t_1 - t_2 = k q_1 q_2 (var1 -
    var2).
    """
    q1, q2 = pair.rest1, pair.rest2
    t1, t2 = k * var1 * q1, k * var2 * q2
    cos1, cos2 = jnp.sqrt(q1 * (2 - q1)), jnp.sqrt(q2 * (2 - q2))
    a1, a2 = _arcsine(t1, cos1), _arcsine(t2, cos2)
    mean, cos_mean = norm(t1, t2), jnp.sqrt(q1 + t1 * q2)

    size = jnp.abs(pair.cosine)
    to_mean = k * jnp.sqrt(q1) * jnp.sqrt(q2) * gap12 * (mean + size)
    sine = to_mean * reciprocal(mean * pair.sine + size * cos_mean)
    turned = _arcsine(sine, cos_mean * pair.sine + mean * size)

    change = k * (var1 - var2) * q1 * q2
    scale1, scale2 = t1 * cos_mean + mean * cos1, t2 * cos_mean + mean * cos2
    inverse = reciprocal(scale1 * scale2)
    sine1, sine2 = t1 * scale2 * inverse, t2 * scale1 * inverse  # of d_1, d_2, over the change
    other1, other2 = cos1 * cos_mean + t1 * mean, cos2 * cos_mean + t2 * mean
    squared, both = change * change, sine1 * other2 + sine2 * other1
    across = (t1 + t2) * reciprocal((t1 * cos2 + t2 * cos1) * both)
    sine = squared * mean * inverse * across * (sine1 + sine2)
    bent = _arcsine(sine, other1 * other2 + squared * sine1 * sine2)
    sine = change * across * both
    small = sine * (1 + sine * sine * (1 / 6 + 3 / 40 * sine * sine))
    apart = jnp.where(jnp.abs(sine) < 0.05, small, a1 - a2)
    middle = (a1 + a2 - bent) / 2
    wider = middle * bent - (apart * apart - bent * bent) / 4
    wider = wider * reciprocal(norm(a1, a2) + middle)
    return jnp.maximum(turned + wider, 0), a1, a2


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
    rest = pair.rest1 * pair.rest2
    root = pair.sine * jax.lax.rsqrt(rest)  # sqrt(d)
    phi_phi = 0.25 + pair.arcsine / (2 * math.pi)
    t1, t2 = var1 * pair.rest1, var2 * pair.rest2
    nngp = cov12 * phi_phi + (t1 * t2 * root + cov12 * cov12 * rest / root) / (2 * math.pi)
    inverse = rest / (pair.sine * pair.sine)  # 1 / d
    d_nngp = phi_phi + cov12 / root * (pair.rest1 + pair.rest2 + inverse) / (2 * math.pi)
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
