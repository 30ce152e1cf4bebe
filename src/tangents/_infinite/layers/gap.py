"""The angular gap A = sqrt(v1 v2) - |K| through layers with random weights.

An average of covariances K' = mean_t K_t (over taps of a window, or positions) has
v' = mean_t v_t, and with a_t = sqrt(v1_t), b_t = sqrt(v2_t)

    sqrt(v1' v2') - K' = mean_t (a_t b_t - K_t) + D,
    D = sqrt(v1' v2') - mean_t a_t b_t
      = sqrt(v1' v2') / 2 mean_t (a_t / sqrt v1' - b_t / sqrt v2')^2,

the deficit of Cauchy and Schwarz, never negative and without cancellation. A sum of branches is
such an average without the division. Weights and biases: `dual.angle.affine_gap`.

The gap is to the nearer pole (equal or opposite), so every step keeps the distances to both,
s - K and s + K, and the sign of the result says which one counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from tangents._core.typing import Array
from tangents._infinite.barrier import keep_apart
from tangents._infinite.dual.angle import poles, reciprocal, safe_sqrt
from tangents._infinite.layers.window import Window, extended_all, taps
from tangents._infinite.tile import add_up


def average_over_windows(
    cov12: Array, gap12: Array, var1: Array, var2: Array, axes: Sequence[int], ws: Sequence[Window]
) -> tuple[Array, Array, Array, Array]:
    """`(cov12, gap12, var1, var2)` averaged over windows, axis by axis; equal positions only."""
    cov12, gap12, var1, var2 = (extended_all(a, axes, ws) for a in (cov12, gap12, var1, var2))
    for axis, w in zip(axes, ws, strict=True):

        def parts(a, axis=axis, w=w):
            return taps(a, axis, w)

        roots1, roots2 = parts(safe_sqrt(var1)), parts(safe_sqrt(var2))
        var1, var2 = (add_up(parts(v)) / w.size for v in (var1, var2))
        inverse1, inverse2 = reciprocal(safe_sqrt(var1)), reciprocal(safe_sqrt(var2))
        near = far = deficit = jnp.zeros((), cov12.dtype)
        for c, gap, a, b in zip(parts(cov12), parts(gap12), roots1, roots2, strict=True):
            to_equal, to_opposite = poles(c, a * b, gap)
            near, far = near + to_equal, far + to_opposite
            difference = a * inverse1 - b * inverse2
            deficit = deficit + difference * difference
        cov12 = add_up(parts(cov12)) / w.size
        deficit = safe_sqrt(var1) * safe_sqrt(var2) * deficit / (2 * w.size)
        gap12 = jnp.where(cov12 < 0, far, near) / w.size + deficit
        # An axis reads each entry of the one before as often as it has taps.
        cov12, gap12 = keep_apart((cov12, gap12))
    return cov12, gap12, var1, var2  # pyright: ignore[reportReturnType]


def average_over_positions(
    cov12: Array, gap12: Array, var1: Array, var2: Array, axes: tuple[int, ...]
) -> Array:
    """The gap of the mean over some axes."""
    a, b = safe_sqrt(var1), safe_sqrt(var2)
    to_equal, to_opposite = poles(cov12, a * b, gap12)
    mean1, mean2 = (jnp.mean(v, axes, keepdims=True) for v in (var1, var2))
    difference = a * reciprocal(safe_sqrt(mean1)) - b * reciprocal(safe_sqrt(mean2))
    s = jnp.squeeze(safe_sqrt(mean1), axes) * jnp.squeeze(safe_sqrt(mean2), axes)
    deficit = s / 2 * jnp.mean(difference * difference, axes)
    near, far = jnp.mean(to_equal, axes), jnp.mean(to_opposite, axes)
    return jnp.where(jnp.mean(cov12, axes) < 0, far, near) + deficit


def gap_of_sum(cov12s: Sequence[Array], gap12s: Sequence[Array], variances: Sequence) -> Array:
    """The gap of K_1 + K_2 + ...; variances: `(var1, var2)` of each."""
    root1, root2 = (safe_sqrt(add_up(each)) for each in zip(*variances, strict=True))
    inverse1, inverse2 = reciprocal(root1), reciprocal(root2)
    near, far, deficit = [], [], []
    for cov12, gap12, (var1, var2) in zip(cov12s, gap12s, variances, strict=True):
        a, b = safe_sqrt(var1), safe_sqrt(var2)
        to_equal, to_opposite = poles(cov12, a * b, gap12)
        near.append(to_equal)
        far.append(to_opposite)
        deficit.append((a * inverse1 - b * inverse2) ** 2)
    near, far, deficit = (add_up(terms) for terms in (near, far, deficit))
    return jnp.where(add_up(cov12s) < 0, far, near) + root1 * root2 * deficit / 2
