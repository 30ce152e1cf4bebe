"""The gap after a nonlinearity between inputs that are close, without cancellation.

With k = E[phi(sd z)^2]^(1/2), u = sd1 z1, v = sd2 z2 and D = sd1 - sd2, the gap after a layer,
k1 k2 - E[phi(u) phi(v)], is that of parallel inputs and what the angle adds (Price 1958),

    (k1 k2 - E[phi(sd1 z) phi(sd2 z)]) + sd1 sd2 int_rho^1 E[phi'(u) phi'(v)] d rho.

Where phi' jumps by J at a place b, h = b / sd, the first is

    C D^2 - sum_b J^2 g(h) |h|^3 |D|^3 / (12 sd) + O(D^4),
    C = (E[phi'(sd z)^2 z^2] - (d k / d sd)^2) / 2,

C being the mean of both sides and g the density. The integrand is nearly linear in the angle, with

    E[phi'(sd1 z) phi'(sd2 z)] = (m1 + m2 - sum_b J^2 |Q(h1) - Q(h2)|) / 2 + O(D^2),
    m = E[phi'(sd z)^2],    Q(h) = P(z > h),

at its end, so that the integral is (1 - rho) (a third of this and two thirds of the integrand).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tangents._core.typing import Array
from tangents._infinite.dual.angle import safe_sqrt
from tangents._infinite.dual.orthant import density, upper_tail

_REACH = {4: 7.0, 8: 9.0}  # of the quadrature, in standard deviations, by bytes of a number
_NODES = {4: 24, 8: 48}  # for each piece of the line


class Ends(NamedTuple):
    """What belongs to one side: k, C, the factor of |D|^3, m, and sum_b J^2 Q(|h|)."""

    size: Array
    square: Array
    cube: Array
    slope: Array
    moving: Array


def gap_of_close(one: Ends, two: Ends, apart: Array, gap12: Array, slope: Array) -> Array:
    """The gap after the layer.

    Args:
      one, two: of both sides.
      apart: D.
      gap12: the gap before the layer, sd1 sd2 (1 - rho).
      slope: E[phi'(u) phi'(v)].
    """
    size = jnp.abs(apart)
    parallel = size * size * ((one.square + two.square) + size * (one.cube + two.cube))
    at_end = one.slope + two.slope - jnp.abs(one.moving - two.moving)
    return jnp.maximum(parallel, 0) * 0.5 + gap12 * (at_end * (1 / 6) + slope * (2 / 3))


def are_close(apart: Array, product: Array, gap: Array, scale: Array) -> Array:
    """Is the form above better than a difference of numbers of size `scale` that leaves `gap`?

    product: sd1 sd2.
    """
    rounding = float(jnp.finfo(gap.dtype).eps) / 2
    near = apart * apart <= (rounding**0.5) * product
    return near & (gap <= 10 * rounding ** (2 / 3) * scale)


def ends_of(
    phi: Callable[[Array], Array], kinks: Sequence[tuple[float, Sequence[Any]]], sd: Array
) -> Ends:
    """By quadrature between the kinks. kinks: (place, jumps of phi, phi', ...)."""
    itemsize = sd.dtype.itemsize
    x, w = (jnp.asarray(a, sd.dtype) for a in np.polynomial.legendre.leggauss(_NODES[itemsize]))
    away = jnp.maximum(sd, float(jnp.finfo(sd.dtype).tiny) ** 0.25)
    places = sorted({0.0, *(place for place, _ in kinks)})
    far = _REACH[itemsize] * jnp.ones_like(sd)
    cuts = [-far, *(jnp.clip(p / away, -far, far) for p in places), far]
    moments = [jnp.zeros_like(sd)] * 4
    for low, high in itertools.pairwise(cuts):
        half = ((high - low) / 2)[..., None]
        z = low[..., None] + half * (1 + x)
        value, slope = jax.jvp(phi, (sd[..., None] * z,), (jnp.ones_like(z),))
        mass = half * w * density(z)
        for i, f in enumerate((value * value, value * slope * z, (slope * z) ** 2, slope * slope)):
            moments[i] = moments[i] + jnp.sum(mass * f, -1)
    square, d_half, weighted, slope = moments
    size = safe_sqrt(square)
    d_size = d_half / jnp.where(size > 0, size, 1)
    moving, cube = jnp.zeros_like(sd), jnp.zeros_like(sd)
    for place, jumps in kinks:
        if place == 0.0:
            continue
        h, jump = abs(place) / away, jumps[1] * jumps[1]
        moving = moving + jump * upper_tail(h)
        cube = cube - jump * density(h) * jnp.minimum(h, 1e3) ** 3 / (12 * away)
    return Ends(size, (weighted - d_size**2) / 2, cube, slope, moving)


def gap_after(
    one: Ends, two: Ends, sd1: Array, sd2: Array, pair: tuple[Array, Array], dual: tuple
) -> Array:
    """The gap, sqrt(E[phi(u)^2] E[phi(v)^2]) - |E[phi(u) phi(v)]|; derivatives are its.

    Args:
      one, two: of both sides, whose deviations are sd1, sd2.
      pair: cov12 and the gap of it.
      dual: E[phi(u) phi(v)] and E[phi'(u) phi'(v)].
    """
    (cov12, gap12), (nngp, slope) = pair, dual
    scale = one.size * two.size
    direct = jnp.maximum(scale - jnp.abs(nngp), 0)
    least = gap_of_close(one, two, sd1 - sd2, gap12, slope)
    closer = (cov12 > 0) & are_close(sd1 - sd2, sd1 * sd2, direct, scale)
    return direct + jax.lax.stop_gradient(jnp.where(closer, least - direct, 0))
