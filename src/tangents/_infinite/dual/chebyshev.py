"""Many Chebyshev series at the same points: what belongs to one side of a tile."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from tangents._core import precision
from tangents._core.typing import Array


def evaluate(rows: np.ndarray, u: Array) -> Array:
    """sum_k rows[:, k] T_k(u), (rows, *u.shape), for u in [-1, 1]."""
    flat = u.reshape(-1)
    # T_(n+k) = 2 T_n T_k - T_(n-k) doubles their number: few operations to compile, and no cosine.
    basis = jnp.stack([jnp.ones_like(flat), flat])
    while len(basis) < rows.shape[1]:
        top = 2 * flat * basis[-1] - basis[-2]
        mirrored = jnp.concatenate([top[None], basis[:0:-1]])
        basis = jax.lax.optimization_barrier(jnp.concatenate([basis, 2 * top * basis - mirrored]))
    basis = basis[: rows.shape[1]]
    out = jnp.matmul(jnp.asarray(rows, flat.dtype), basis, precision=precision.DEFAULT)
    return out.reshape((rows.shape[0], *u.shape))
