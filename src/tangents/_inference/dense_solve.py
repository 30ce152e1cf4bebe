"""Direct solvers of (K + ridge·I) x = y for a matrix K."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tangents._core.precision import DEFAULT as HIGHEST
from tangents._core.typing import Array
from tangents._inference import double_float, lapack
from tangents._inference.lapack import product64
from tangents._inference.layout import regularise
from tangents._inference.matrix_functions import null_tolerance
from tangents._inference.solution import (
    CONVERGED,
    NOT_CONVERGED,
    NOT_FINITE,
    NOT_POSITIVE_DEFINITE,
    Solution,
    solution,
)

REFINEMENTS = 8


def relative(residual: Any, y: Any) -> Any:
    """‖residual‖ / ‖y‖, the worst column; a column of zeros counts absolutely."""
    xp = jnp if isinstance(residual, jax.Array) else np
    sizes = xp.linalg.norm(y, axis=0)
    return xp.max(xp.linalg.norm(residual, axis=0) / xp.where(sizes > 0, sizes, 1))


def refine64(
    k: np.ndarray, ridge: float, solve: Callable[[np.ndarray], np.ndarray], y: np.ndarray
) -> tuple[np.ndarray, float, int]:
    """Iterative refinement in float64 on the host: (x, relative residual, corrections made).

    `solve` is an approximate inverse in any precision. It stops where a correction no longer halves
    the residual, and returns the best.
    """
    x = np.zeros(y.shape)
    residual, best = y, np.inf
    kept, steps = x, 0
    while steps <= REFINEMENTS:
        change = np.asarray(solve(residual), np.float64)
        if not np.isfinite(change).all():
            break
        x = x + change
        residual = y - product64(k, x) - ridge * x
        size = relative(residual, y)
        if not size < best:
            break
        improved, best, kept = size < 0.5 * best, size, x
        if not improved or size == 0:
            break
        steps += 1
    return kept, float(best), steps


def cholesky_eager(k: Array, ridge: float, y: Array, method: str, rtol: float | None) -> Solution:
    """Cholesky with float64 refinement: in float32 first if `method` is 'mixed' or K is float32.

    Where float32 fails or its refinement stalls, float64 on the host follows.
    """
    k_host = np.asarray(k)
    y_host = np.asarray(y, np.float64)
    if not (np.isfinite(y_host).all() and np.isfinite(np.sum(k_host))):
        return solution("none", jnp.full_like(y, jnp.nan), status=NOT_FINITE)
    stages = ["float32", "float64"] if method == "mixed" or k.dtype == jnp.float32 else ["float64"]
    if method == "float64":
        stages = ["float64"]
    scale = _norm_bound(k_host, ridge)
    for stage in stages:
        solve, condition = _factor32(k, ridge) if stage == "float32" else _factor64(k_host, ridge)
        if solve is None:
            continue
        x, residual, steps = refine64(k_host, ridge, solve, y_host)
        # Solved: a residual as asked for, or one as small as the rounding of x to float64 leaves.
        rounding = 64 * np.finfo(np.float64).eps * scale
        floor = rounding * float(np.max(np.linalg.norm(x, axis=0) / _sizes(y_host)))
        wanted = max(floor, 1e-10) if rtol is None else rtol
        if residual <= wanted or stage == stages[-1]:
            value = jnp.asarray(x, y.dtype)
            correction = None
            if y.dtype != jnp.float64:
                correction = jnp.asarray(x - np.asarray(value, np.float64), y.dtype)
            return solution(
                f"cholesky {stage}, refined in float64",
                value,
                correction=correction,
                residual=residual,
                condition=condition,
                iterations=steps,
                status=CONVERGED if residual <= wanted else NOT_CONVERGED,
            )
    smallest, largest = extreme_eigenvalues(k_host, ridge)
    return solution(
        "cholesky",
        jnp.full_like(y, jnp.nan),
        status=NOT_POSITIVE_DEFINITE,
        smallest_eigenvalue=smallest,
        needed_ridge=enough_ridge(ridge, smallest, largest, k.shape[0], k.dtype),
    )


def enough_ridge(ridge, smallest, largest, n: int, dtype: Any):
    """A ridge under which an eigenvalue `smallest` becomes safely positive."""
    return ridge + 2 * abs(smallest) + n * float(jnp.finfo(dtype).eps) * abs(largest)


def _sizes(y: np.ndarray) -> np.ndarray:
    sizes = np.linalg.norm(y, axis=0)
    return np.where(sizes > 0, sizes, 1)


def _norm_bound(k: np.ndarray, ridge: float) -> float:
    # ‖K‖ ≥ mean row sum of a typical kernel; the largest diagonal entry bounds it from below too.
    ones = np.ones((k.shape[0], 1), k.dtype) / np.sqrt(k.shape[0])
    return max(float(np.linalg.norm(k @ ones)), float(np.abs(np.diagonal(k)).max())) + abs(ridge)


def _factor32(k: Array, ridge: float):
    if all(d.platform == "cpu" for d in k.devices()):
        factor = lapack.cholesky(np.asarray(k), ridge, np.float32)
        if factor is None:
            return None, np.nan
        inverse = lambda r: lapack.cholesky_solve(factor, r)
        norm = _one_norm(np.asarray(k), ridge)
        condition = 1 / max(lapack.reciprocal_condition(factor, norm), 1e-300)
    else:
        k32 = regularise(k.astype(jnp.float32), ridge, True)
        factor = jnp.linalg.cholesky(k32, symmetrize_input=False)
        if not bool(jnp.isfinite(factor[-1, -1])):
            return None, np.nan
        apply_inverse = lambda r: jax.scipy.linalg.cho_solve((factor, True), r)
        inverse = lambda r: np.asarray(apply_inverse(jnp.asarray(r, jnp.float32)))
        condition = float(condition_estimate(k32, apply_inverse))

    def solve(r: np.ndarray) -> np.ndarray:
        # Residuals shrink below what float32 can hold: scale each column to size 1.
        sizes = _sizes(r)
        return np.asarray(inverse(r / sizes), np.float64) * sizes

    return solve, condition


def _factor64(k: np.ndarray, ridge: float):
    factor = lapack.cholesky(k, ridge, np.float64)
    if factor is None:
        return None, np.nan
    condition = 1 / max(lapack.reciprocal_condition(factor, _one_norm(k, ridge)), 1e-300)
    return lambda r: lapack.cholesky_solve(factor, r), condition


def _one_norm(k: np.ndarray, ridge: float) -> float:
    """The largest column sum of |K + ridge·I|, a block of rows at a time."""
    rows = 256
    diagonal = np.diagonal(k)
    largest = 0.0
    for start in range(0, k.shape[0], rows):
        part = slice(start, start + rows)
        sums = np.abs(k[part]).sum(axis=1, dtype=np.float64)
        sums += np.abs(diagonal[part] + ridge) - np.abs(diagonal[part])
        largest = max(largest, float(sums.max()))
    return largest


def condition_estimate(k: Array, inverse: Callable[[Array], Array], steps: int = 4) -> Array:
    """λ_max / λ_min from below, by power iteration with K and with its inverse."""
    start = jnp.cos(jnp.arange(k.shape[0], dtype=k.dtype) ** 2)[:, None]

    def largest(apply) -> Array:
        v, size = start, jnp.ones((), k.dtype)
        for _ in range(steps):
            v = v / jnp.linalg.norm(v)
            v = apply(v)
            size = jnp.linalg.norm(v)
        return size

    return largest(lambda v: jnp.matmul(k, v, precision=HIGHEST)) * largest(inverse)


def extreme_eigenvalues(k: np.ndarray, ridge: float) -> tuple[float, float]:
    """Smallest and largest eigenvalue of K + ridge·I: exact up to 3000 rows, else by Lanczos."""
    import scipy.linalg
    import scipy.sparse.linalg as sparse

    if k.shape[0] <= 3000:
        values = scipy.linalg.eigvalsh(k.astype(np.float64))
        return float(values[0]) + ridge, float(values[-1]) + ridge
    loose: Any = 1e-3
    ends = [sparse.eigsh(k, 1, which=w, tol=loose, return_eigenvectors=False) for w in ("SA", "LA")]
    return float(ends[0][0]) + ridge, float(ends[1][0]) + ridge


def cholesky_traced(k: Array, ridge: Array, y: Array, steps: int = 3) -> Solution:
    """Cholesky under `jit`: status in the result, residuals in float64 or double-float."""
    matrix = regularise(k, ridge, True)
    factor = jnp.linalg.cholesky(matrix, symmetrize_input=False)
    usable = jnp.all(jnp.isfinite(jnp.diagonal(factor)))
    solve = lambda r: jax.scipy.linalg.cho_solve((factor, True), r)
    x = solve(y)
    correction = None
    if k.dtype == jnp.float32 and jnp.result_type(float) == jnp.float32:
        x, correction, residual = double_float.refine(solve, k, ridge, x, y, steps)
        method = "cholesky float32, refined in double-float"
    else:
        # The ridge is added in the wide precision: rounded into a float32 diagonal it would change.
        wide = k.astype(jnp.result_type(float))
        wide = regularise(wide, ridge.astype(wide.dtype), True)
        target = y.astype(wide.dtype)
        total = x.astype(wide.dtype)
        for _ in range(steps if k.dtype == jnp.float32 else 1):
            change = solve((target - jnp.matmul(wide, total, precision=HIGHEST)).astype(k.dtype))
            total = total + change.astype(wide.dtype)
        residual = target - jnp.matmul(wide, total, precision=HIGHEST)
        x = total.astype(y.dtype)
        if y.dtype == jnp.float32:
            correction = (total - x.astype(wide.dtype)).astype(y.dtype)
        method = f"cholesky {k.dtype}, refined in {wide.dtype}"

    def ends(m: Array) -> tuple[Array, Array]:
        values = jnp.linalg.eigvalsh(m)
        return values[0], values[-1]

    nan = jnp.full((), jnp.nan, k.dtype)
    smallest, largest = lax.cond(usable, lambda m: (nan, nan), ends, matrix)
    finite = jnp.isfinite(jnp.sum(k)) & jnp.isfinite(jnp.sum(y))
    status = jnp.where(usable, CONVERGED, NOT_POSITIVE_DEFINITE)
    return solution(
        method,
        x,
        correction=correction,
        residual=relative(residual, y.astype(residual.dtype)),
        condition=condition_estimate(matrix, solve),
        iterations=steps,
        status=jnp.where(finite, status, NOT_FINITE),
        smallest_eigenvalue=smallest,
        needed_ridge=enough_ridge(ridge, smallest, largest, k.shape[0], k.dtype),
    )


def eigh_path(k: Array, ridges: Array, y: Array, eigen: Any = None) -> Solution:
    """One eigendecomposition for any number of ridges, `ridges` (r,): `value` (r, n, c).

    Directions whose eigenvalue plus ridge is zero to rounding are left out (pseudo-inverse).
    """
    values, vectors = jnp.linalg.eigh(k) if eigen is None else eigen
    shifted = values[None, :] + ridges[:, None]
    tolerance = null_tolerance(values)
    null = jnp.abs(shifted) <= tolerance
    weights = jnp.where(null, 0, 1 / jnp.where(null, 1, shifted))
    inside = jnp.matmul(vectors.T, y, precision=HIGHEST)
    value = jnp.einsum("ij,rj,jc->ric", vectors, weights, inside, precision=HIGHEST)
    back = jnp.einsum("ij,rjc->ric", k, value, precision=HIGHEST)
    residual = y - back - ridges[:, None, None] * value
    sizes = jnp.linalg.norm(y, axis=0)
    worst = jnp.max(jnp.linalg.norm(residual, axis=1) / jnp.where(sizes > 0, sizes, 1), axis=-1)
    smallest = shifted[:, 0]
    negative = smallest < -tolerance
    status = jnp.where(negative, NOT_POSITIVE_DEFINITE, CONVERGED)
    finite = jnp.isfinite(jnp.sum(k)) & jnp.isfinite(jnp.sum(y))
    magnitude = jnp.where(null, jnp.inf, jnp.abs(shifted))
    return solution(
        "eigh",
        value,
        residual=worst,
        condition=jnp.max(jnp.abs(shifted), 1) / jnp.min(magnitude, 1),
        iterations=jnp.zeros(ridges.shape, jnp.int32),
        status=jnp.where(finite, status, NOT_FINITE),
        smallest_eigenvalue=jnp.where(negative, smallest, jnp.nan),
        needed_ridge=jnp.where(negative, ridges + 2 * jnp.abs(smallest) + tolerance, jnp.nan),
    )
