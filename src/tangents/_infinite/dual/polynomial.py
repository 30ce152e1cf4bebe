"""Duals of polynomials, without a division and without a basis change.

    E[p(u) p(v)] = sum_k cov12^k / k!  E[p^(k)(u)] E[p^(k)(v)]

(the Hermite expansion of Daniely et al. 2016, lemma 11, with Stein's lemma for its coefficients);
E[p^(k)(u)] is a polynomial in the variance.
"""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp

from tangents._core.typing import Array
from tangents._infinite.dual.arc_cosine import double_factorial
from tangents._infinite.dual.form import Dual, DualKernel


def _mean_derivative(coefficients, k: int, var: Array) -> Array:
    """E[p^(k)(u)], u ~ N(0, var), for p(x) = sum_j c_j x^j."""
    total = jnp.zeros_like(var)
    for j in range(len(coefficients) - 1, k - 1, -1):
        if (j - k) % 2 == 0:
            factor = math.perm(j, k) * double_factorial(j - k - 1)
            total = total * var + coefficients[j] * factor
    return total


def _expectation(coefficients, cov12: Array, var1: Array, var2: Array) -> Array:
    total = jnp.zeros(jnp.broadcast_shapes(cov12.shape, var1.shape, var2.shape), cov12.dtype)
    for k in range(len(coefficients) - 1, -1, -1):
        one = _mean_derivative(coefficients, k, var1) * _mean_derivative(coefficients, k, var2)
        total = total * cov12 + one / math.factorial(k)
    return total


def _derivative(coefficients) -> tuple:
    return tuple(j * c for j, c in enumerate(coefficients))[1:]


def _dual_of(coefficients, cov12, var1, var2) -> Dual:
    return Dual(
        _expectation(coefficients, cov12, var1, var2),
        _expectation(_derivative(coefficients), cov12, var1, var2),
    )


def _polynomial(hyper, x: Array) -> Array:
    total = jnp.zeros_like(x)
    for c in reversed(hyper["coef"]):
        total = total * x + c
    return total


def _polynomial_dual(hyper, cov12, var1, var2, gap12=None) -> Dual:
    return _dual_of(hyper["coef"], cov12, var1, var2)


def _polynomial_diagonal(hyper, var: Array) -> Array:
    return _expectation(hyper["coef"], var, var, var)


POLYNOMIAL = DualKernel(_polynomial, _polynomial_dual, _polynomial_diagonal)
"""`hyper = {"coef": (c_0, c_1, ...)}`: phi(x) = sum_k c_k x^k."""


@functools.cache
def monomial(degree: int) -> DualKernel:
    """phi(x) = x^degree; no hyperparameters."""
    coefficients = (0,) * degree + (1,)

    def dual(hyper, cov12, var1, var2, gap12=None) -> Dual:
        return _dual_of(coefficients, cov12, var1, var2)

    def diagonal(hyper, var):
        return double_factorial(2 * degree - 1) * var**degree

    return DualKernel(lambda hyper, x: x**degree, dual, diagonal)


@functools.cache
def hermite(degree: int) -> DualKernel:
    """phi(x) = He_n(x) / sqrt(n!), the normalised probabilists' polynomial; no hyperparameters.

    For unit variances the dual is cov12^n (Daniely et al. 2016, lemma 11). Other variances come in
    through E[He_m(u)] = (m - 1)!! (var - 1)^(m/2), m even:

        E = n! sum_k cov12^k / k! ((n-k-1)!! / (n-k)!)^2 ((var1 - 1)(var2 - 1))^((n-k)/2).
    """
    n = degree

    def expectation(n, cov12, var1, var2):
        excess = (var1 - 1) * (var2 - 1)
        total = jnp.zeros(jnp.broadcast_shapes(cov12.shape, excess.shape), cov12.dtype)
        for k in range(n % 2, n + 1, 2):
            odd = double_factorial(n - k - 1) / math.factorial(n - k)
            weight = math.factorial(n) / math.factorial(k) * odd**2
            total = total + weight * cov12**k * excess ** ((n - k) // 2)
        return total

    def dual(hyper, cov12, var1, var2, gap12=None) -> Dual:
        nngp = expectation(n, cov12, var1, var2)
        if n == 0:
            return Dual(nngp, jnp.zeros_like(nngp))
        # He_n' = n He_(n-1), so the normalised polynomials have slope sqrt(n).
        return Dual(nngp, n * expectation(n - 1, cov12, var1, var2))

    def phi(hyper, x):
        before, value = jnp.zeros_like(x), jnp.ones_like(x)
        for k in range(n):  # He_(k+1) = x He_k - k He_(k-1), each over sqrt((k+1)!)
            after = (x * value - math.sqrt(k) * before) / math.sqrt(k + 1)
            before, value = value, after
        return value

    def diagonal(hyper, var):
        return expectation(n, var, var, var)

    return DualKernel(phi, dual, diagonal)
