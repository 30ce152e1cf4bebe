"""Power series in the correlation whose coefficients are products of numbers of both sides."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tangents._core.typing import Array

_UNROLLED = 40
_BLOCK = 16


class Form(NamedTuple):
    """Exponents start, start + step, ...; `falling`: times n (n-1) ..., a derivative of that order.

    The first product of coefficients is added, the others are subtracted.
    """

    start: int
    step: int
    falling: int = 0


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def total(form: Form, one: tuple[Array, ...], two: tuple[Array, ...], rho: Array) -> Array:
    """sum_n one_n two_n n (n-1) ... rho^(n - falling)."""
    return _sum(form, one, two, rho)


@total.defjvp
def _total_jvp(form, primals, tangents):
    # The change of the coefficients goes through the plain sum: it is linear, and keeps nothing
    # but rho for reverse mode.
    one, two, rho = primals
    d_one, d_two, d_rho = tangents
    slope = total(form._replace(falling=form.falling + 1), one, two, rho)
    change = slope * d_rho + _sum(form, d_one, two, rho) + _sum(form, one, d_two, rho)
    return total(form, one, two, rho), change


def _sum(form: Form, one: tuple[Array, ...], two: tuple[Array, ...], rho: Array) -> Array:
    exponents = np.asarray(range(form.start, form.start + form.step * len(one[0]), form.step))
    keep = np.flatnonzero(exponents >= form.falling)
    if not len(keep):
        return jnp.zeros_like(rho)
    factors = np.asarray([float(math.perm(int(n), form.falling)) for n in exponents[keep]])
    shape = (len(keep),) + (1,) * (one[0].ndim - 1)
    factors = jnp.asarray(factors, rho.dtype).reshape(shape)
    first = int(keep[0])
    left = [(1 if i == 0 else -1) * factors * c[first:] for i, c in enumerate(one)]
    right = [c[first:] for c in two]
    base = rho if form.step == 1 else rho * rho
    found = _horner(left, right, base)
    start = int(exponents[first]) - form.falling
    return found if start == 0 else found * rho**start


def _term(left, right, n) -> Array:
    total = left[0][n] * right[0][n]
    for a, b in zip(left[1:], right[1:], strict=True):
        total = total + a[n] * b[n]
    return total


def _horner(left: list[Array], right: list[Array], base: Array) -> Array:
    # Made once: fused into the sum over pairs they would be made again for each pair.
    left, right = jax.lax.optimization_barrier(left), jax.lax.optimization_barrier(right)
    terms = left[0].shape[0]
    total = jnp.zeros(jnp.broadcast_shapes(left[0].shape[1:], right[0].shape[1:], base.shape))
    total = total.astype(base.dtype)
    if terms <= _UNROLLED:
        for n in reversed(range(terms)):
            total = total * base + _term(left, right, n)
        return total
    pad = -terms % _BLOCK

    def blocks(c):
        c = jnp.concatenate([c, jnp.zeros((pad, *c.shape[1:]), c.dtype)])
        return c.reshape(((terms + pad) // _BLOCK, _BLOCK, *c.shape[1:]))

    def add(total, block):
        for n in reversed(range(_BLOCK)):
            total = total * base + _term(block[0], block[1], n)
        return total, None

    return jax.lax.scan(add, total, ([*map(blocks, left)], [*map(blocks, right)]), reverse=True)[0]
