"""Nyström preconditioners: a low-rank part of K that is inverted exactly.

For K ≈ U diag(λ) Uᵀ of rank r (Frangella, Tropp, Udell 2023, eq. 5.3)

    P⁻¹ v = v + U ((λ_r + ρ) / (λ + ρ) − 1) Uᵀ v,

where ρ is the ridge and λ_r the smallest eigenvalue kept. The rank grows until what is left is no
larger than the ridge, or no longer pays.

    columns_of   a matrix: columns picked by randomly pivoted Cholesky (Chen, Epperly, Tropp, Webber
                 2023): r columns are read, no product with K is needed
    sketch_of    anything with `@`: a Gaussian sketch, r products at once
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tangents._core.precision import DEFAULT as HIGHEST
from tangents._core.typing import Array

Apply = Callable[[Array], Array]


def columns_of(
    k: np.ndarray | Array, ridge: float, max_rank: int, seed: int = 0, block: int = 64
) -> Array:
    """F with F Fᵀ ≈ K, (n, r): blocks of columns, picked in proportion to what is left of them."""
    rng = np.random.default_rng(seed)
    n = k.shape[0]
    left = np.array(jnp.diagonal(k), np.float64)
    total = left.sum()
    factor = np.zeros((n, max_rank), np.float32 if k.dtype == jnp.float32 else np.float64)
    rank = 0
    while rank < max_rank:
        # What is left is a trace: stop once its mean is below the ridge, or is rounding.
        if left.sum() <= max(0.1 * ridge * n, 1e-6 * total):
            break
        size = min(block, max_rank - rank)
        picked = np.unique(rng.choice(n, size, p=left / left.sum()))
        new = np.array(k[:, picked] if isinstance(k, np.ndarray) else jnp.take(k, picked, axis=1))
        new -= factor[:, :rank] @ factor[picked, :rank].T
        core = new[picked].astype(np.float64)
        values, vectors = np.linalg.eigh((core + core.T) / 2)
        good = values > 1e-6 * values[-1]
        if not good.any() or values[-1] <= 0:
            break
        columns = new @ (vectors[:, good] / np.sqrt(values[good])).astype(new.dtype)
        factor[:, rank : rank + columns.shape[1]] = columns
        rank += columns.shape[1]
        left = np.maximum(left - np.einsum("ij,ij->i", columns, columns, dtype=np.float64), 0)
        left[picked] = 0
        if left.sum() <= 0:
            break
    return jnp.asarray(factor[:, :rank])


def sketch_of(
    apply: Apply, n: int, dtype, ridge: float, max_rank: int, seed: int = 0, start: int = 16
) -> Array:
    """F with F Fᵀ ≈ K, (n, r), from products with random vectors; the rank doubles as needed.

    Stops where the smallest eigenvalue found is below ten ridges.
    """
    rng = np.random.default_rng(seed)
    omega = np.zeros((n, 0))
    image = np.zeros((n, 0))
    factor = np.zeros((n, 1))
    rank = min(start, max_rank)
    while True:
        fresh = rng.normal(size=(n, rank - omega.shape[1]))
        fresh -= omega @ (omega.T @ fresh)
        fresh = np.linalg.qr(fresh)[0]
        omega = np.concatenate([omega, fresh], axis=1)
        product = np.asarray(apply(jnp.asarray(fresh, dtype)), np.float64)
        image = np.concatenate([image, product], axis=1)
        # A small shift keeps the core positive definite (Tropp et al. 2017, alg. 3).
        shift = np.finfo(jnp.dtype(dtype)).eps * np.linalg.norm(image)
        core = omega.T @ image
        values, vectors = np.linalg.eigh((core + core.T) / 2 + shift * np.eye(rank))
        good = values > 1e-6 * values[-1]
        factor = (image + shift * omega) @ (vectors[:, good] / np.sqrt(values[good]))
        smallest = np.linalg.svd(factor, compute_uv=False)[-1] ** 2
        if smallest <= 10 * ridge or not good.all() or 2 * rank > max_rank:
            return jnp.asarray(factor, dtype)
        rank *= 2


def preconditioner(factor: Array, ridge: float) -> Apply:
    """P⁻¹ from F with F Fᵀ ≈ K."""
    if factor.shape[1] == 0:
        return lambda v: v
    gram = np.asarray(jnp.matmul(factor.T, factor, precision=HIGHEST), np.float64)
    values, vectors = np.linalg.eigh(gram)
    good = values > 1e-12 * values[-1]
    values, vectors = values[good], vectors[:, good]
    basis = jnp.matmul(
        factor, jnp.asarray(vectors / np.sqrt(values), factor.dtype), precision=HIGHEST
    )
    gains = jnp.asarray((values[0] + ridge) / (values + ridge) - 1, factor.dtype)[:, None]
    return jax.tree_util.Partial(_apply, basis, gains)


@jax.jit
def _apply(basis: Array, gains: Array, v: Array) -> Array:
    inside = jnp.matmul(basis.T, v, precision=HIGHEST)
    return v + jnp.matmul(basis, gains * inside, precision=HIGHEST)
