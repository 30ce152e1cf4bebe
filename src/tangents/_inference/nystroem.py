"""Nyström preconditioners: a low-rank part of K that is inverted exactly.

For K ≈ F Fᵀ of rank r, with eigenvalues λ down to λ_r, and a ridge ρ

    P = F Fᵀ + (λ_r + ρ) I,

which is that of Frangella, Tropp, Udell 2023 (eq. 5.3) but for λ + λ_r + ρ in place of λ + ρ, a
factor of 2 at most. The rank grows until what is left is no larger than the ridge, or no longer
pays.

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
from tangents._inference import lapack

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
    """P⁻¹ from F with F Fᵀ ≈ K: P = F Fᵀ + μI with μ = λ_r + ρ, up to the factor μ.

    By Woodbury P⁻¹ = I − B Bᵀ with B = F L⁻ᵀ, L Lᵀ = Fᵀ F + μI. No eigenvectors are needed: of a
    rank of 2000 they took 2.9 s, this takes 1.5.
    """
    if factor.shape[1] == 0:
        return lambda v: v
    host = np.asarray(factor)
    # In the precision of F: its columns are graded, and rounding is relative to each of them.
    gram = lapack.gram(host)
    first = _factorised(gram, ridge)
    level = 1 / _largest_of_inverse(first)
    return jax.tree_util.Partial(
        _apply, jnp.asarray(lapack.whitened(host, _factorised(gram, level)))
    )


def _factorised(gram: np.ndarray, shift: float) -> np.ndarray:
    """Cholesky factor of the Gram matrix plus the shift, or plus the first that makes one exist."""
    trace = float(np.trace(gram))
    for attempt in [shift, *(trace * 10.0**p for p in range(-15, 1))]:
        if attempt >= shift and (lower := lapack.cholesky(gram, attempt, np.float64)) is not None:
            return lower
    raise FloatingPointError("solve: the products of the kernel are not finite.")


def _largest_of_inverse(lower: np.ndarray, steps: int = 4) -> float:
    """Largest eigenvalue of (L Lᵀ)⁻¹ by power iteration; near enough from below."""
    v, size = np.random.default_rng(0).normal(size=(lower.shape[0], 1)), 1.0
    for _ in range(steps):
        v = lapack.cholesky_solve(lower, v / np.linalg.norm(v))
        size = float(np.linalg.norm(v))
    return size


@jax.jit
def _apply(basis: Array, v: Array) -> Array:
    # vᵀ B rather than Bᵀ v: half of the time on CPUs.
    inside = jnp.matmul(v.T, basis, precision=HIGHEST).T
    return v - jnp.matmul(basis, inside, precision=HIGHEST)
