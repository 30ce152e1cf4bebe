"""LAPACK and BLAS on the host, through SciPy, on arrays where they lie.

XLA's own factorisations on CPUs call the same LAPACK, with copies before and after. NumPy is left
out on purpose: it brings a second OpenBLAS, whose threads go on spinning after each product and
take the cores from this one (measured: a Cholesky factor after a NumPy product takes 2.5 times as
long).

Matrices are symmetric, so that a row-major array is as good as its transpose, a view in LAPACK's
order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tangents._scale.host_array import aligned


def _routine(name: str, dtype: Any) -> Any:
    from scipy.linalg import get_lapack_funcs

    return get_lapack_funcs((name,), dtype=np.dtype(dtype))[0]


def shifted(k: np.ndarray, ridge: float, dtype: Any) -> np.ndarray:
    """A copy of K + ridge·I in LAPACK's order."""
    copy = aligned(k.shape, dtype).T
    np.copyto(copy, k.T, casting="unsafe")
    if ridge:
        diagonal = np.arange(copy.shape[0])
        copy[diagonal, diagonal] += np.asarray(ridge, dtype)
    return copy


def cholesky(k: np.ndarray, ridge: float, dtype: Any) -> np.ndarray | None:
    """Lower factor of K + ridge·I, with rubbish above the diagonal; None if it breaks down."""
    factor, failed = _routine("potrf", dtype)(
        shifted(k, ridge, dtype), lower=1, clean=0, overwrite_a=1
    )
    return None if failed else factor


def cholesky_solve(factor: np.ndarray, rhs: np.ndarray) -> np.ndarray:
    """(L Lᵀ)⁻¹ rhs in the precision of the factor: `rhs` (n, c)."""
    solution, _ = _routine("potrs", factor.dtype)(factor, rhs.astype(factor.dtype), lower=1)
    return solution


def reciprocal_condition(factor: np.ndarray, norm: float) -> float:
    """1 / condition number in the 1-norm, estimated from a Cholesky factor of the matrix."""
    return float(_routine("pocon", factor.dtype)(factor, norm, uplo="L")[0])


def eigh(k: np.ndarray, ridge: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, ascending, and eigenvectors of K + ridge·I, in columns; NaN if that fails."""
    values, vectors, failed = _routine("syevd", k.dtype)(
        shifted(k, ridge, k.dtype), lower=1, overwrite_a=1
    )
    if failed:
        values, vectors = np.full_like(values, np.nan), np.full_like(vectors, np.nan)
    return values, vectors


def gram(f: np.ndarray) -> np.ndarray:
    """The triangle of Fᵀ F that `cholesky` reads, zeros elsewhere; F (n, r).

    Computed in the precision of F, returned in float64.
    """
    from scipy.linalg import get_blas_funcs

    syrk: Any = get_blas_funcs(("syrk",), dtype=f.dtype)[0]
    return syrk(1.0, f.T, lower=1).astype(np.float64).T


def whitened(f: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """F L⁻ᵀ in the precision of F (n, r)."""
    from scipy.linalg import get_blas_funcs

    trsm: Any = get_blas_funcs(("trsm",), dtype=f.dtype)[0]
    return trsm(1.0, lower.astype(f.dtype), f.T, lower=1).T


def product64(k: np.ndarray, x: np.ndarray, rows: int = 256) -> np.ndarray:
    """K x in float64 for a symmetric matrix of any precision and x (n, c) in float64."""
    from scipy.linalg import get_blas_funcs

    gemm: Any = get_blas_funcs(("gemm",), dtype=np.dtype(np.float64))[0]
    xt = np.asarray(x, np.float64, order="C").T
    if k.dtype == np.float64:
        return gemm(1.0, xt, k.T).T
    # K in float64 a block of rows at a time: a whole copy would triple the memory.
    out = np.empty((xt.shape[0], k.shape[0]), order="F")
    block = np.empty((rows, k.shape[1]))
    for start in range(0, k.shape[0], rows):
        part = k[start : start + rows]
        wide = block[: len(part)]
        np.copyto(wide, part)
        out[:, start : start + rows] = gemm(1.0, xt, wide.T)
    return out.T
