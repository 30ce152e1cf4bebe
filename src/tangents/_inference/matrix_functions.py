"""Functions f(K) of a symmetric positive semidefinite matrix, and their derivatives in K.

Gradient flow on a squared loss acts on each eigenvalue λ of the kernel by two functions of time
(Jacot et al. 2018, section 5; Lee et al. 2019, eq. 8 and 9), with s the number of targets:

    risen(λ, t)      = 1 − exp(−λ t / s)               how much of the residual is gone
    integrated(λ, t) = (1 − exp(−λ t / s)) / λ         what the test outputs have seen of it

Where λ = 0 their limits are 0 and t / s; at t = ∞ the second one is the pseudo-inverse.

The derivative of f(K) = U f(Λ) Uᵀ exists wherever f has one, also where eigenvalues coincide and
eigenvectors have none (Daleckii and Krein 1965; Higham, Functions of Matrices, thm 3.11):

    d f(K) = U (D ∘ Uᵀ dK U) Uᵀ,    D_ij = (f(λ_i) − f(λ_j)) / (λ_i − λ_j),  f'(λ_i) at λ_i = λ_j.

With τ = t / s, a ≤ b a pair of eigenvalues and g = `integrated`, quotients that cancel nothing are

    risen        exp(−a τ) g(b − a)
    integrated   −(g(a) − exp(−a τ) g(b − a)) / b                      where b τ ≥ 1,
                 −τ² Σ_k h_k(−a τ, −b τ) / (k + 2)!                    where b τ < 1,

h_k the sum of all monomials of degree k in two variables: the divided difference of exp at three
points.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from tangents._core.precision import DEFAULT as HIGHEST
from tangents._core.typing import Array


def null_tolerance(eigenvalues: Array) -> Array:
    """Eigenvalues at or below this are zero as far as rounding lets one tell: min(n, 16) ε λ_max.

    The worst-case bound n ε λ_max would count real eigenvalues of float32 kernels of thousands of
    rows as zero. Measured errors of symmetric eigensolvers stay below 5 ε λ_max up to n = 1500,
    also for kernels of rank n / 2.
    """
    eps = min(eigenvalues.shape[-1], 16) * jnp.finfo(eigenvalues.dtype).eps
    return eps * jnp.max(jnp.abs(eigenvalues))


def risen(eigenvalues: Array, t: Array, size: int) -> Array:
    """1 − exp(−λ t / s) for t of shape (T, 1): shape (T, n). Eigenvalues below 0 count as 0."""
    lam = jnp.maximum(eigenvalues, 0)
    infinite = jnp.isinf(t)
    finite_t = jnp.where(infinite, 0, t)
    limit = (lam > null_tolerance(eigenvalues)).astype(lam.dtype)
    return jnp.where(infinite, limit, -jnp.expm1(-lam * (finite_t / size)))


def integrated(eigenvalues: Array, t: Array, size: int) -> Array:
    """(1 − exp(−λ t / s)) / λ for t of shape (T, 1): shape (T, n), with its limits at 0 and ∞."""
    lam = jnp.maximum(eigenvalues, 0)
    infinite = jnp.isinf(t)
    limit = jnp.where(lam > null_tolerance(eigenvalues), 1 / jnp.where(lam > 0, lam, 1), 0)
    return jnp.where(infinite, limit, _integrated(lam, jnp.where(infinite, 0, t) / size))


def _integrated(lam: Array, tau: Array) -> Array:
    """(1 − exp(−λ τ)) / λ for λ ≥ 0 and finite τ."""
    x = lam * tau
    # Two forms of one function: dividing by x never divides by zero times something large, dividing
    # by λ does not overflow where t is large.
    safe_x = jnp.where((x == 0) | (x > 1), 1, x)
    early = tau * jnp.where(x == 0, 1, -jnp.expm1(-safe_x) / safe_x)
    late = -jnp.expm1(-x) / jnp.where(lam > 0, lam, 1)
    return jnp.where(x > 1, late, early)


def _pairs(eigenvalues: Array, t: Array, size: int) -> tuple[Array, ...]:
    """(a, b, whether they are zero, (n, n) each; whether t is infinite and τ, (T, 1, 1) each)."""
    lam = jnp.maximum(eigenvalues, 0)
    low = jnp.minimum(lam[:, None], lam[None, :])
    high = jnp.maximum(lam[:, None], lam[None, :])
    null = null_tolerance(eigenvalues)
    infinite = jnp.isinf(t)[..., None]
    tau = jnp.where(infinite, 0, t[..., None]) / size
    return low, high, low <= null, high <= null, infinite, tau


def risen_quotients(eigenvalues: Array, t: Array, size: int) -> Array:
    """Divided differences of `risen`: t of shape (T, 1), result (T, n, n)."""
    low, high, low_null, high_null, infinite, tau = _pairs(eigenvalues, t, size)
    limit = jnp.where(low_null & ~high_null, 1 / jnp.where(high > 0, high, 1), 0)
    return jnp.where(infinite, limit, jnp.exp(-low * tau) * _integrated(high - low, tau))


def integrated_quotients(eigenvalues: Array, t: Array, size: int) -> Array:
    """Divided differences of `integrated`: t of shape (T, 1), result (T, n, n)."""
    low, high, low_null, high_null, infinite, tau = _pairs(eigenvalues, t, size)
    safe_low, safe_high = (jnp.where(a > 0, a, 1) for a in (low, high))
    # Of the pseudo-inverse: its null space turns into the range and back at the rate 1 / b².
    limit = jnp.where(low_null, 1 / safe_high**2, -1 / (safe_low * safe_high))
    limit = jnp.where(high_null, 0, limit)
    late = _integrated(low, tau) - jnp.exp(-low * tau) * _integrated(high - low, tau)
    # Powers of numbers below 1: 18 terms reach the rounding of float64.
    x, y = (jnp.minimum(a * tau, 1) for a in (low, high))
    power, monomials = jnp.ones_like(y), jnp.ones_like(y)
    early = monomials / 2
    for k in range(1, 18):
        power = -power * y
        monomials = power - x * monomials
        early = early + monomials * (1 / math.factorial(k + 2))
    finite = jnp.where(high * tau < 1, -early * tau * tau, -late / safe_high)
    return jnp.where(infinite, limit, finite)


def _speeds(kind: str, eigenvalues: Array, t: Array, size: int) -> Array:
    """The derivative of a function in t: (T, n)."""
    lam = jnp.maximum(eigenvalues, 0)
    left = jnp.exp(-lam * jnp.where(jnp.isinf(t), 0, t) / size)
    speed = left / size * (lam if kind == "risen" else jnp.ones_like(lam))
    return jnp.where(jnp.isinf(t), 0, speed)


FUNCTIONS = {"risen": (risen, risen_quotients), "integrated": (integrated, integrated_quotients)}


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def function_product(
    kind: str,
    size: int,
    k: Array | None,
    eigen: tuple[Array, Array],
    t: Array,
    rhs: Array,
    left: Array | None = None,
) -> Array:
    """f(K) rhs, or leftᵀ f(K) rhs: (T, n, c) or (T, m, c), for rhs (n, c) and left (n, m).

    Args:
        kind: 'risen' or 'integrated'.
        size: s.
        k: the matrix, in which the result is differentiated; None if it is constant.
        eigen: its eigenvalues and its eigenvectors as rows; no derivative is taken through them.
        t: times, (T, 1).
        rhs: (n, c).
        left: None, or (n, m).
    """
    values, modes = eigen
    return _product(FUNCTIONS[kind][0](values, t, size), modes, rhs, left)


def _product(weights: Array, modes: Array, rhs: Array, left: Array | None) -> Array:
    inside = jnp.matmul(modes, rhs, precision=HIGHEST)
    n, c = inside.shape
    # One product for all times: (m, n) @ (n, T·c) reads the eigenmodes once.
    scaled = (weights.T[:, :, None] * inside[:, None, :]).reshape(n, -1)
    out = jnp.matmul(_basis(modes, left), scaled, precision=HIGHEST)
    return jnp.moveaxis(out.reshape(out.shape[0], -1, c), 1, 0)


def _basis(modes: Array, left: Array | None) -> Array:
    return modes.T if left is None else jnp.matmul(left.T, modes.T, precision=HIGHEST)


def _function_product_jvp(kind, size, primals, tangents):
    k, eigen, t, rhs, left = primals
    d_k, _, d_t, d_rhs, d_left = tangents
    value = function_product(kind, size, k, eigen, t, rhs, left)
    values, modes = eigen if k is None else _differentiable(k, eigen)
    changes = []
    if _moves(d_rhs):
        changes.append(function_product(kind, size, k, eigen, t, d_rhs, left))
    if _moves(d_left):
        changes.append(function_product(kind, size, k, eigen, t, rhs, d_left))
    if _moves(d_t):
        speeds = d_t * _speeds(kind, values, t, size)
        changes.append(_product(speeds, modes, rhs, left))
    if _moves(d_k):
        inside = jnp.matmul(modes, rhs, precision=HIGHEST)
        turned = _within(modes, d_k) * FUNCTIONS[kind][1](values, t, size)
        turned = jnp.matmul(turned, inside, precision=HIGHEST)
        changes.append(jnp.matmul(_basis(modes, left), turned, precision=HIGHEST))
    return value, sum(changes[1:], changes[0]) if changes else jnp.zeros_like(value)


# Zeros are told apart, so that only what moves is computed.
function_product.defjvp(_function_product_jvp, symbolic_zeros=True)


def _moves(tangent: Array | None) -> bool:
    return tangent is not None and not isinstance(tangent, SymbolicZero)


def _within(modes: Array, d_k: Array) -> Array:
    """Uᵀ dK U, of the symmetric part of dK."""
    d_k = (d_k + d_k.T) / 2
    return jnp.matmul(jnp.matmul(modes, d_k, precision=HIGHEST), modes.T, precision=HIGHEST)


@jax.custom_jvp
def _differentiable(k: Array, eigen: tuple[Array, Array]) -> tuple[Array, Array]:
    """`eigen` itself, with the derivative of an eigendecomposition of `k`.

    Only second derivatives of `function_product` see it; they are NaN where eigenvalues coincide.
    """
    return eigen


@_differentiable.defjvp
def _differentiable_jvp(primals, tangents):
    k, eigen = primals
    values, modes = _differentiable(k, eigen)
    inner = _within(modes, tangents[0])
    gaps = values[None, :] - values[:, None]
    same = jnp.eye(len(values), dtype=bool)
    turn = jnp.where(same, 0, inner / jnp.where(same, 1, gaps))
    change = jnp.matmul(turn.T, modes, precision=HIGHEST)
    return (values, modes), (jnp.diagonal(inner), change)
