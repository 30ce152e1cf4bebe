"""Duals of exponentials: trigonometric functions, Gaussians, and their product.

All are Gaussian integrals of exp(quadratic + linear), with real or imaginary coefficients:
E[exp(i x)] = exp(-var/2) on u - v and u + v for the trigonometric ones.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from tangents._core.typing import Array
from tangents._infinite.dual.angle import norm, poles, reciprocal, safe_sqrt, sine_squared
from tangents._infinite.dual.form import Dual, DualKernel


def squared_distance(cov12: Array, var1: Array, var2: Array, gap12: Array | None = None) -> Array:
    """E[(u - v)^2] = var1 + var2 - 2 cov12; with the gap, without cancellation."""
    if gap12 is None:
        return var1 + var2 - 2 * cov12
    root_sum = safe_sqrt(var1) + safe_sqrt(var2)
    root_difference = (var1 - var2) * reciprocal(root_sum)
    return root_difference * root_difference + 2 * poles(cov12, norm(var1, var2), gap12)[0]


# ---- phi(x) = a sin(b x + c), a cos(b x + c) -----------------------------------------------------


def _wave_dual(hyper, cos_2c, cov12, var1, var2, gap12) -> Dual:
    """E[sin sin] = (E cos(difference) - E cos(sum)) / 2; `cos_2c` is the phase of the sum."""
    a, b = hyper["a"], hyper["b"]
    near = jnp.exp(-b * b / 2 * squared_distance(cov12, var1, var2, gap12))
    far = cos_2c * jnp.exp(-b * b / 2 * (var1 + var2 + 2 * cov12))
    return Dual(a * a / 2 * (near - far), a * a * b * b / 2 * (near + far))


def _sin(hyper, x: Array) -> Array:
    return hyper["a"] * jnp.sin(hyper["b"] * x + hyper["c"])


def _sin_dual(hyper, cov12, var1, var2, gap12=None) -> Dual:
    return _wave_dual(hyper, jnp.cos(2 * hyper["c"]), cov12, var1, var2, gap12)


def _sin_diagonal(hyper, var: Array) -> Array:
    return _sin_dual(hyper, var, var, var).nngp


SIN = DualKernel(_sin, _sin_dual, _sin_diagonal)
"""`hyper = {"a", "b", "c"}`. Pearce et al. 2020 (cosine); Louart et al. 2018, table 1."""


def _cos(hyper, x: Array) -> Array:
    return hyper["a"] * jnp.cos(hyper["b"] * x + hyper["c"])


def _cos_dual(hyper, cov12, var1, var2, gap12=None) -> Dual:
    # cos(x) = sin(x + pi/2), and adding pi to 2 c changes the sign.
    return _wave_dual(hyper, -jnp.cos(2 * hyper["c"]), cov12, var1, var2, gap12)


def _cos_diagonal(hyper, var: Array) -> Array:
    return _cos_dual(hyper, var, var, var).nngp


COS = DualKernel(_cos, _cos_dual, _cos_diagonal)
"""`hyper = {"a", "b", "c"}`."""


def _rbf(hyper, x: Array) -> Array:
    return math.sqrt(2) * jnp.sin(jnp.sqrt(2 * hyper["gamma"]) * x + math.pi / 4)


def _rbf_dual(hyper, cov12, var1, var2, gap12=None) -> Dual:
    gamma = hyper["gamma"]
    nngp = jnp.exp(-gamma * squared_distance(cov12, var1, var2, gap12))
    return Dual(nngp, 2 * gamma * nngp)


RBF = DualKernel(_rbf, _rbf_dual, lambda hyper, var: jnp.ones_like(var))
"""`hyper = {"gamma"}`: exp(-gamma E[(u - v)^2]) (Rahimi & Recht 2007)."""


# ---- phi(x) = exp(-x^2) sin(x) -------------------------------------------------------------------


def _gabor(hyper, x: Array) -> Array:
    return jnp.exp(-x * x) * jnp.sin(x)


def _gabor_dual(hyper, cov12, var1, var2, gap12=None) -> Dual:
    # exp(-u^2 - v^2) leaves a Gaussian of covariance Sigma (I + 2 Sigma)^-1 and mass 1/sqrt(d),
    # d = det(I + 2 Sigma); sin u sin v is half a difference of cosines under it.
    total = var1 + var2
    determinant4 = 4 * var1 * var2 * sine_squared(cov12, var1, var2)
    d = 1 + 2 * total + determinant4
    weight = jax.lax.rsqrt(d) * jnp.exp(-(total + determinant4) / (2 * d))
    r = cov12 / d
    d_sinh = 4 * r * (1 + (1 + total) / d)  # d log(weight) / d cov12
    d_cosh = 1 / d + 8 * r * r  # d r / d cov12
    nngp = weight * jnp.sinh(r)
    return Dual(nngp, d_sinh * nngp + d_cosh * weight * jnp.cosh(r))


def _gabor_diagonal(hyper, var: Array) -> Array:
    return _gabor_dual(hyper, var, var, var).nngp


GABOR = DualKernel(_gabor, _gabor_dual, _gabor_diagonal)
"""No hyperparameters."""


# ---- phi(x) = a exp(b x) -------------------------------------------------------------------------


def _exp(hyper, x: Array) -> Array:
    return hyper["a"] * jnp.exp(hyper["b"] * x)


def _exp_dual(hyper, cov12, var1, var2, gap12=None) -> Dual:
    a, b = hyper["a"], hyper["b"]
    nngp = a * a * jnp.exp(b * b * ((var1 + var2) / 2 + cov12))
    return Dual(nngp, b * b * nngp)


def _exp_diagonal(hyper, var: Array) -> Array:
    return _exp_dual(hyper, var, var, var).nngp


EXP = DualKernel(_exp, _exp_dual, _exp_diagonal)
"""`hyper = {"a", "b"}` (Mairal et al. 2014; Daniely et al. 2016, table 1)."""


# ---- phi(x) = a exp(b x^2) -----------------------------------------------------------------------


def _gaussian(hyper, x: Array) -> Array:
    return hyper["a"] * jnp.exp(hyper["b"] * x * x)


def _gaussian_dual(hyper, cov12, var1, var2, gap12=None) -> Dual:
    # d = det(I - 2 b Sigma). For b > 0 the expectation is infinite unless it is positive.
    a, b = hyper["a"], hyper["b"]
    determinant4 = 4 * var1 * var2 * sine_squared(cov12, var1, var2)
    d = 1 - 2 * b * (var1 + var2) + b * b * determinant4
    finite = (d > 0) & (1 - 2 * b * var1 > 0)
    inverse = 1 / jnp.where(finite, d, 1)
    nngp = a * a * jnp.sqrt(inverse)
    d_nngp = 4 * b * b * cov12 * inverse * nngp
    return Dual(jnp.where(finite, nngp, jnp.inf), jnp.where(finite, d_nngp, jnp.inf))


def _gaussian_diagonal(hyper, var: Array) -> Array:
    return _gaussian_dual(hyper, var, var, var).nngp


GAUSSIAN = DualKernel(_gaussian, _gaussian_dual, _gaussian_diagonal)
"""`hyper = {"a", "b"}` (Williams 1996, sec. 3.2). Infinite, as the expectation is, for
2 b var >= 1."""


# ---- s exp(gamma (rho + shift)) -----------------------------------------------------------------


def _no_phi(hyper, x: Array) -> Array:
    raise NotImplementedError(
        "ExpNormalized has no finite-width apply_fn: its nonlinearity depends on the variance of "
        "its input; only kernel_fn is defined"
    )


@functools.cache
def exp_normalized(do_clip: bool) -> DualKernel:
    """The kernel s exp(gamma (rho + shift)), rho the correlation; `hyper = {"gamma", "shift"}`.

    The normalised Gaussian kernel of Shankar et al. 2020 ("Neural kernels without tangents",
    sec. 3), homogeneous in the norms like that of a ReLU. `do_clip` keeps rho in [-1, 1] against
    rounding. At zero variance rho is 0.
    """

    def correlation(cov12, s, gap12):
        positive = s > 0
        if gap12 is not None:
            rho = jnp.where(positive, 1 - poles(cov12, s, gap12)[0] * reciprocal(s), 0)
        else:
            rho = cov12 * reciprocal(s)
        if do_clip:  # the derivative is that of the function that is not clipped
            rho = rho + jax.lax.stop_gradient(jnp.clip(rho, -1, 1) - rho)
        return rho

    def dual(hyper, cov12, var1, var2, gap12=None) -> Dual:
        gamma, shift = hyper["gamma"], hyper["shift"]
        s = norm(var1, var2)
        value = jnp.exp(gamma * (correlation(cov12, s, gap12) + shift))
        gap = None
        if gap12 is not None:
            rest = -jnp.expm1(-gamma * poles(cov12, s, gap12)[0] * reciprocal(s))
            gap = s * jnp.exp(gamma * (1 + shift)) * rest
        return Dual(s * value, gamma * value, gap)

    def diagonal(hyper, var):
        return var * jnp.exp(hyper["gamma"] * (1 + hyper["shift"]))

    return DualKernel(_no_phi, dual, diagonal)
