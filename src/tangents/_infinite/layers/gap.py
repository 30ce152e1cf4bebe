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

import math
from collections.abc import Sequence

import jax.numpy as jnp

from tangents._core.typing import Array
from tangents._infinite.dual.angle import poles, reciprocal, safe_sqrt
from tangents._infinite.layers.window import Window, extended_all, taps, window_sum
from tangents._infinite.tile import add_up


def average_over_windows(
    cov12: Array, gap12: Array, var1: Array, var2: Array, axes: Sequence[int], ws: Sequence[Window]
) -> tuple[Array, Array, Array, Array]:
    """`(cov12, gap12, var1, var2)` averaged over windows; equal positions only."""
    size = math.prod(w.size for w in ws)
    root1, root2 = safe_sqrt(var1), safe_sqrt(var2)
    near, far = poles(cov12, root1 * root2, gap12)
    near, far, var1, var2 = (window_sum(a, axes, ws) / size for a in (near, far, var1, var2))
    mean1, mean2 = safe_sqrt(var1), safe_sqrt(var2)
    inverse1, inverse2 = reciprocal(mean1), reciprocal(mean2)
    each1, each2 = (_all_taps(a, axes, ws) for a in (root1, root2))
    deficit = add_up((a * inverse1 - b * inverse2) ** 2 for a, b in zip(each1, each2, strict=True))
    gap12 = jnp.minimum(near, far) + mean1 * mean2 * deficit / (2 * size)
    return (far - near) / 2, gap12, var1, var2


def _all_taps(a: Array, axes: Sequence[int], ws: Sequence[Window]) -> list[Array]:
    """What each tap of a window of several axes reads."""
    parts = [extended_all(a, axes, ws)]
    for axis, w in zip(axes, ws, strict=True):
        parts = [tap for part in parts for tap in taps(part, axis, w)]
    return parts


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
