"""Duals of arbitrary functions: by the user's own formula, or by Gauss-Hermite quadrature."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tangents._core.typing import Array
from tangents._infinite.dual.angle import reciprocal, safe_sqrt, sine_squared
from tangents._infinite.dual.form import Dual, DualKernel

Scalar = Callable[[Array], Array]


def derivative(fn: Scalar) -> Scalar:
    """The derivative of a function that acts on every element alone."""
    return lambda x: jax.jvp(fn, (x,), (jnp.ones_like(x),))[1]


# ---- the user's own formula ----------------------------------------------------------------------


def _over_elements(fn: Callable, *arrays: Array) -> Array:
    """Apply a function of scalars to every element of arrays that broadcast together."""
    arrays = tuple(jnp.broadcast_arrays(*arrays))
    flat = jax.vmap(fn)(*(a.reshape(-1) for a in arrays))
    return flat.reshape(arrays[0].shape)


@functools.lru_cache(maxsize=256)  # one kernel for one set of functions: it is a key of plans
def elementwise(
    fn: Callable | None, nngp_fn: Callable | None, d_nngp_fn: Callable | None
) -> DualKernel:
    """As given by the user; `d_nngp_fn` by automatic differentiation (Price 1958) if absent."""
    name = getattr(fn if fn is not None else nngp_fn, "__name__", "Elementwise")

    def phi(hyper, x):
        if fn is None:
            raise NotImplementedError(
                f"Elementwise({name}) was built without fn, so it has no finite-width apply_fn: "
                "pass Elementwise(fn, nngp_fn)"
            )
        return fn(x)

    def dual(hyper, cov12, var1, var2, gap12=None) -> Dual:
        if nngp_fn is None:
            raise NotImplementedError(
                f"Elementwise({name}) was built without nngp_fn, so it has no kernel_fn: pass "
                "Elementwise(fn, nngp_fn), or ElementwiseNumerical(fn, deg) to have it integrated"
            )
        slope = jax.grad(nngp_fn) if d_nngp_fn is None else d_nngp_fn
        pair = (cov12, var1, var2)
        return Dual(_over_elements(nngp_fn, *pair), _over_elements(slope, *pair))

    def diagonal(hyper, var):
        return dual(hyper, var, var, var).nngp

    return DualKernel(phi, dual, diagonal)


# ---- two-dimensional Gauss-Hermite ---------------------------------------------------------------


@functools.cache
def _nodes(deg: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes x and weights w with E[f(z)] = sum w f(x), z standard normal."""
    x, w = np.polynomial.hermite.hermgauss(deg)
    return x * math.sqrt(2), w / math.sqrt(math.pi)


def _integrate(deg: int, fn: Callable, cov12: Array, var1: Array, var2: Array) -> Array:
    """E[fn(u, v)] with u = sqrt(var1) x and v = cov12/sqrt(var1) x + sqrt(var2) sin(theta) y.

    A loop over the deg^2 nodes keeps the memory at a few arrays of the size of the result.
    """
    x, w = _nodes(deg)
    dtype = cov12.dtype
    root1 = safe_sqrt(var1)
    along = cov12 * reciprocal(root1)
    across = safe_sqrt(var2 * sine_squared(cov12, var1, var2))

    def add(total, node):
        x_i, y_j, weight = node
        return total + weight * fn(root1 * x_i, along * x_i + across * y_j), None

    nodes = tuple(
        jnp.asarray(a.reshape(-1), dtype)
        for a in (np.repeat(x, deg), np.tile(x, deg), np.outer(w, w))
    )
    shape = jnp.broadcast_shapes(cov12.shape, var1.shape, var2.shape)
    return jax.lax.scan(add, jnp.zeros(shape, dtype), nodes)[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def expectation(deg: int, f: Scalar, df: Scalar, cov12: Array, var1: Array, var2: Array) -> Array:
    """E[f(u) f(v)] by quadrature. Differentiable at equal inputs, where the nodes are not:

    d/d cov12 = E[f'(u) f'(v)] and, by Stein's lemma,
    d/d var1 = E[f''(u) f(v)] / 2 = (E[u f'(u) f(v)] - cov12 E[f'(u) f'(v)]) / (2 var1).
    """
    return _integrate(deg, lambda u, v: f(u) * f(v), cov12, var1, var2)


@expectation.defjvp
def _expectation_jvp(deg, f, df, primals, tangents):
    cov12, var1, var2 = primals
    d_cov12, d_var1, d_var2 = tangents
    slope = expectation(deg, df, derivative(df), cov12, var1, var2)
    left = _integrate(deg, lambda u, v: u * df(u) * f(v), cov12, var1, var2)
    right = _integrate(deg, lambda u, v: f(u) * v * df(v), cov12, var1, var2)
    change = (left - cov12 * slope) * reciprocal(var1) * d_var1
    change = change + (right - cov12 * slope) * reciprocal(var2) * d_var2
    return expectation(deg, f, df, *primals), slope * d_cov12 + change / 2


@functools.lru_cache(maxsize=256)
def elementwise_numerical(fn: Scalar, deg: int, df: Scalar | None) -> DualKernel:
    """The dual of fn by Gauss-Hermite quadrature with deg x deg nodes.

    Exact for polynomials of degree below deg. The error for other functions is not estimated:
    compare two values of deg.
    """
    slope = derivative(fn) if df is None else df

    def dual(hyper, cov12, var1, var2, gap12=None) -> Dual:
        return Dual(
            expectation(deg, fn, slope, cov12, var1, var2),
            expectation(deg, slope, derivative(slope), cov12, var1, var2),
        )

    def diagonal(hyper, var):
        x, w = (jnp.asarray(a, var.dtype) for a in _nodes(deg))
        u = safe_sqrt(var)[..., None] * x
        return jnp.sum(w * fn(u) ** 2, -1)

    return DualKernel(lambda hyper, x: fn(x), dual, diagonal)
