"""Residuals to twice the precision of float32, in float32: what float64 would do where x64 is off.

A number is a pair hi + lo. A float32 product of two 12-bit halves is exact, so a product of a
matrix entry and a pair is a sum of exact terms, and only sums need Knuth's error-free
transformation. The halves are cut by masking bits, which no compiler flag for fast arithmetic can
undo.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from tangents._core.typing import Array


def _halves(a: Array) -> tuple[Array, Array]:
    bits = lax.bitcast_convert_type(a, jnp.uint32) & jnp.uint32(0xFFFFF000)
    high = lax.bitcast_convert_type(bits, jnp.float32)
    return high, a - high


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """S + e = a + b exactly, s = fl(a + b) (Knuth)."""
    s = a + b
    virtual = s - a
    return s, (a - (s - virtual)) + (b - virtual)


def residual(k: Array, ridge: Array, high: Array, low: Array, y: Array) -> Array:
    """Y − (K + ridge·I)(high + low), each (n, c), accurate to about 2⁻⁴⁵ of its terms.

    One column of K at a time: the loop carries pairs (n, c).
    """
    high_1, high_2 = _halves(high)
    low_1, low_2 = _halves(low)

    def add(total: tuple[Array, Array], term: Array) -> tuple[Array, Array]:
        s, e = two_sum(total[0], term)
        return s, total[1] + e

    def subtract_products(total, column: Array, parts) -> tuple[Array, Array]:
        column_1, column_2 = _halves(column)
        for part in parts:
            for half in (column_1, column_2):
                total = add(total, -half * part)
        return total

    def step(total, inputs):
        column, *parts = inputs
        return subtract_products(total, column[:, None], [p[None, :] for p in parts]), None

    start = (y, jnp.zeros_like(y))
    total, _ = lax.scan(step, start, (k.T, high_1, high_2, low_1, low_2))
    total = subtract_products(
        total, jnp.broadcast_to(ridge, y.shape), [high_1, high_2, low_1, low_2]
    )
    return total[0] + total[1]


def refine(solve, k: Array, ridge: Array, x: Array, y: Array, steps: int) -> tuple[Array, ...]:
    """(high, low, residual): the solution as a pair after `steps` corrections, keeping the best.

    `solve` is an approximate inverse in float32.
    """

    def step(_, carry):
        high, low, res, best = carry
        change = solve(res)
        new_high, error = two_sum(high, change)
        new_high, new_low = two_sum(new_high, low + error)
        new_res = residual(k, ridge, new_high, new_low, y)
        size = jnp.linalg.norm(new_res, axis=0)
        better = size < best
        pick = lambda a, b: jnp.where(better, a, b)
        return pick(new_high, high), pick(new_low, low), pick(new_res, res), pick(size, best)

    low = jnp.zeros_like(x)
    res = residual(k, ridge, x, low, y)
    carry = (x, low, res, jnp.linalg.norm(res, axis=0))
    high, low, res, _ = jax.lax.fori_loop(0, steps, step, carry)
    return high, low, res
