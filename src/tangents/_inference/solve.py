"""Linear systems with kernels: `tangents.solve`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tangents._core.precision import DEFAULT as HIGHEST
from tangents._core.typing import Array
from tangents._inference import conjugate_gradients as cg
from tangents._inference import dense_solve, nystroem
from tangents._inference.lapack import product64
from tangents._inference.layout import floating, is_concrete, matrix
from tangents._inference.solution import (
    CONVERGED,
    NOT_CONVERGED,
    NOT_FINITE,
    NOT_POSITIVE_DEFINITE,
    Solution,
    solution,
)

METHODS = ("auto", "cholesky", "mixed", "float64", "eigh", "cg")
Apply = Callable[[Array], Array]
DIRECT_ROWS = 8_000
"""Matrices up to this size are factorised unless another method is asked for (measured on CPU)."""

COLUMNS = 8
"""Right-hand sides of a matrix come in multiples of this."""
RANKS = 8
"""A preconditioner found adaptively has at most one rank in so many rows."""


def solve(
    kernel: Any,
    y: Array,
    ridge: Any = 0.0,
    *,
    method: str = "auto",
    rtol: float | None = None,
    max_iterations: int = 1000,
    preconditioner: str | int | Callable[[Array], Array] | None = "auto",
    throw: bool = True,
    progress: Callable[[int, float], None] | None = None,
) -> Solution:
    r"""Solve (K + ridge·I) x = y for a kernel K, and say how it went.

    Args:
        kernel: a matrix (n, n); a kernel with axes in pairs (n, n, c, c); or any object with
            `shape`, `dtype` and `@` on (n, k) blocks, such as `tangents.ntk_operator`. Symmetric
            positive semidefinite.
        y: right-hand sides, (n,) or (n, k); or any shape of n entries in all, such as the targets
            (examples, outputs) of an operator over both.
        ridge: added to the diagonal, as it is. A 1-D array of ridges asks for all solutions from
            one eigendecomposition ('eigh').
        method: 'cholesky' in the precision of the kernel, refined in float64; 'mixed', a float32
            factor refined in float64, with float64 to follow where that stalls; 'float64', on the
            host; 'eigh'; 'cg', preconditioned conjugate gradients; 'auto' takes 'cholesky' ('mixed'
            for large float64) for matrices up to 8000 rows, else 'cg'.
        rtol: relative residual asked for. Default: 1e-6 for 'cg' (of a float32 operator or under
            `jit`: what its products can resolve), the rounding of the solution for direct methods.
        max_iterations: of 'cg'.
        preconditioner: of 'cg': 'auto' or 'nystroem' (rank found adaptively), a rank, None, or a
            function on (n, k) blocks. Under `jit` 'auto' is the diagonal of a matrix.
        throw: raise `SolveError` on failure. Under `jit` nothing can be raised: look at
            `result.success`.
        progress: called with (iteration, relative residual) in each iteration of an eager 'cg'.

    Returns:
        `Solution`: value, correction, residual, condition, iterations, status, success, remedy.

    Raises:
        SolveError: if the system was not solved and `throw`; the message holds the remedy.
        ValueError: if shapes or names do not fit.

    Examples:
        >>> import jax.numpy as jnp
        >>> import tangents
        >>> k = jnp.array([[2., 1.], [1., 2.]])
        >>> result = tangents.solve(k, jnp.array([3., 3.]))
        >>> [round(float(v), 5) for v in result.value], bool(result.success)
        ([1.0, 1.0], True)

    Sources: iterative refinement, Higham, Accuracy and Stability of Numerical Algorithms, ch. 12;
    preconditioner, Frangella, Tropp, Udell, SIAM J. Matrix Anal. Appl. 44 (2023).
    """
    dense = isinstance(kernel, jax.Array | np.ndarray)
    if not dense and not all(hasattr(kernel, a) for a in ("shape", "dtype", "__matmul__")):
        hint = " Pass one of its matrices, such as kernel.ntk." if hasattr(kernel, "nngp") else ""
        raise TypeError(
            f"solve: kernel is a {type(kernel).__name__}; it needs shape, dtype and @.{hint}"
        )
    if method not in METHODS:
        raise ValueError(f"solve: method={method!r} is not one of {', '.join(map(repr, METHODS))}.")
    if dense:
        kernel = jnp.asarray(kernel)
        if kernel.ndim % 2 or kernel.ndim == 0:
            raise ValueError(f"solve: kernel has shape {kernel.shape}, but its axes come in pairs.")
        kernel = matrix(kernel)
    n = kernel.shape[0]
    if len(kernel.shape) != 2 or kernel.shape[1] != n:
        raise ValueError(f"solve: kernel has shape {tuple(kernel.shape)}, but must be square.")
    y = jnp.asarray(y)
    if (y.ndim == 0 or y.shape[0] != n) and y.size != n:
        raise ValueError(
            f"solve: y has shape {y.shape}, but a kernel of shape ({n}, {n}) needs ({n},) or "
            f"({n}, k), or {n} entries in all."
        )
    dtype = floating(jnp.zeros((), kernel.dtype), y)
    block = y.astype(dtype).reshape(n, -1)
    chosen = _choose(method, dense, n, dtype, jnp.ndim(ridge))
    if chosen != "cg" and not dense:
        raise ValueError(
            f"solve: method={chosen!r} needs a matrix, but kernel is a {type(kernel).__name__}: "
            "pass kernel.materialise(), or method='cg'."
        )
    if jnp.ndim(ridge) == 1 and chosen != "eigh":
        raise ValueError(f"solve: several ridges need method='eigh', not {method!r}.")
    if chosen == "eigh":
        ridges = jnp.atleast_1d(jnp.asarray(ridge, dtype))
        result = dense_solve.eigh_path(kernel.astype(dtype), ridges, block)
        if jnp.ndim(ridge) == 0:
            result = jax.tree.map(lambda a: a[0], result)
        shape = jnp.shape(ridge) + y.shape
    elif chosen == "cg":
        result = _by_cg(kernel, block, ridge, rtol, max_iterations, preconditioner, progress)
        shape = y.shape
    else:
        eager = is_concrete(kernel, y, ridge)
        if eager:
            result = dense_solve.cholesky_eager(kernel, float(ridge), block, chosen, rtol)
        else:
            result = dense_solve.cholesky_traced(
                kernel.astype(jnp.float32) if chosen == "mixed" else kernel,
                jnp.asarray(ridge, kernel.dtype),
                block if kernel.dtype == dtype else block.astype(kernel.dtype),
            )
        shape = y.shape
    result = _reshaped(result, shape)
    return result.checked() if throw else result


def _choose(method: str, dense: bool, n: int, dtype: Any, ridge_axes: int) -> str:
    if method != "auto":
        return method
    if ridge_axes == 1:
        return "eigh"
    if not dense or n > DIRECT_ROWS:
        return "cg"
    return "mixed" if dtype == jnp.float64 and n >= 1000 else "cholesky"


def _reshaped(result: Solution, shape: tuple[int, ...]) -> Solution:
    from dataclasses import replace

    correction = None if result.correction is None else result.correction.reshape(shape)
    return replace(result, value=result.value.reshape(shape), correction=correction)


@jax.jit
def _dense_product(k: Array, ridge: Array, v: Array) -> Array:
    return jnp.matmul(k, v, precision=HIGHEST) + ridge * v


def _by_cg(
    kernel: Any,
    y: Array,
    ridge: Any,
    rtol: float | None,
    max_iterations: int,
    preconditioner: Any,
    progress: Callable[[int, float], None] | None,
) -> Solution:
    dense = isinstance(kernel, jax.Array)
    dtype = jnp.dtype(kernel.dtype)
    shift = jnp.asarray(ridge, dtype)
    if dense:
        apply = lambda v: _dense_product(kernel, shift, v)
    else:
        apply = lambda v: jnp.asarray(kernel @ v) + shift * v
    # An operator may hold tracers that cannot be seen from outside: its product shows them, and
    # entries that are NaN or infinite.
    mean = jnp.full((y.shape[0], 1), 1 / y.shape[0], dtype)
    finite = jnp.all(jnp.isfinite(kernel if dense else jnp.asarray(kernel @ mean)))
    if is_concrete(y, ridge, finite):
        if not finite:
            return solution("cg", jnp.full_like(y, jnp.nan), status=NOT_FINITE)
        return _cg_eagerly(
            kernel, apply, y, float(ridge), rtol, max_iterations, preconditioner, progress
        )
    inverse: Any = preconditioner
    if preconditioner == "auto" or preconditioner is None:
        inverse = lambda v: v
        if preconditioner == "auto" and dense:
            diagonal = jnp.diagonal(kernel)[:, None] + shift
            inverse = lambda v: v / diagonal
    if not callable(inverse):
        raise ValueError(
            "solve: under jit a Nyström preconditioner cannot be built: pass preconditioner=None, "
            "'auto' or a function."
        )
    y = y.astype(dtype)
    if rtol is None:
        rtol = 1e-6 if dtype == jnp.float64 else 1e-4
    sizes = jnp.linalg.norm(y, axis=0)
    known: Any = inverse
    out = cg.run_traced(apply, y, known, rtol * sizes, max_iterations)
    residual = dense_solve.relative(y - apply(out.x), y)
    # The recurrence loses the true residual by rounding: allow it a little.
    status = jnp.where(residual <= 2 * rtol, CONVERGED, NOT_CONVERGED)
    status = jnp.where(out.indefinite, NOT_POSITIVE_DEFINITE, status)
    return solution(
        "cg",
        out.x,
        residual=residual,
        condition=out.condition,
        iterations=out.iterations,
        status=jnp.where(finite & jnp.all(jnp.isfinite(y)), status, NOT_FINITE),
        smallest_eigenvalue=jnp.where(out.indefinite, out.rayleigh, jnp.nan),
        needed_ridge=jnp.where(out.indefinite, ridge + 2 * jnp.abs(out.rayleigh), jnp.nan),
    )


def _preconditioned(
    kernel: Any, ridge: float, apply: Apply, n: int, preconditioner: Any
) -> tuple[Apply, str]:
    """An approximate inverse, and what the result calls the method."""
    if preconditioner is None or (preconditioner == "auto" and n <= 64):
        return lambda v: v, "cg"
    if callable(preconditioner):
        given: Any = preconditioner
        return given, "cg"
    rank = preconditioner if isinstance(preconditioner, int) else None
    if isinstance(kernel, jax.Array):
        # Reading r columns and orthogonalising costs n r²; an iteration n² per right-hand side.
        limit = rank or int(min(n // 2, max(100, n // RANKS)))
        factor = nystroem.columns_of(kernel, ridge, limit)
    else:
        bare = lambda v: apply(v) - ridge * v
        dtype = jnp.dtype(kernel.dtype)
        factor = nystroem.sketch_of(bare, n, dtype, ridge, rank or min(n // 2, 256))
    return nystroem.preconditioner(factor, ridge), f"cg, Nyström rank {factor.shape[1]}"


def _residual64(
    kernel: Any, apply: Apply, ridge: float, target: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """The function x -> target − (K + ridge·I) x in float64, as well as the kernel allows."""
    if isinstance(kernel, jax.Array):
        host = np.asarray(kernel)
        return lambda x: target - product64(host, x) - ridge * x

    def residual_of(x: np.ndarray) -> np.ndarray:
        high = jnp.asarray(x, kernel.dtype)
        low = jnp.asarray(x - np.asarray(high, np.float64), kernel.dtype)
        image = np.asarray(apply(high), np.float64)
        if np.any(np.asarray(low)):
            image = image + np.asarray(apply(low), np.float64)
        return target - image

    return residual_of


def _cg_eagerly(
    kernel: Any,
    apply: Apply,
    y: Array,
    ridge: float,
    rtol: float | None,
    max_iterations: int,
    preconditioner: Any,
    progress: Callable[[int, float], None] | None,
) -> Solution:
    n, dtype = y.shape[0], jnp.dtype(kernel.dtype)
    target = np.asarray(y, np.float64)
    if not np.isfinite(target).all():
        return solution("cg", jnp.full_like(y, jnp.nan), status=NOT_FINITE)
    inverse, label = _preconditioned(kernel, ridge, apply, n, preconditioner)
    residual_of = _residual64(kernel, apply, ridge, target)
    wanted = 1e-6 if rtol is None else rtol
    x, best, done, out, status = _restarted(
        apply,
        inverse,
        residual_of,
        target,
        dtype,
        wanted,
        max_iterations,
        progress,
        isinstance(kernel, jax.Array),
    )
    if (
        status == NOT_CONVERGED
        and rtol is None
        and not isinstance(kernel, jax.Array)
        and done < max_iterations
    ):
        # Products with a float32 operator are no better than its rounding: that is as far as the
        # default asks to go. The residual in the result says how far that is.
        size = dense_solve.relative(x, target) * _norm(apply, n, dtype)
        status = CONVERGED if best <= 16 * float(jnp.finfo(dtype).eps) * size else status
    smallest = needed = np.nan
    if status == NOT_POSITIVE_DEFINITE and out is not None:
        smallest = _smallest_eigenvalue(apply, n, dtype, out.rayleigh)
        needed = ridge + 2 * abs(smallest)
    value = jnp.asarray(x, y.dtype)
    correction = None
    if y.dtype != jnp.float64:
        correction = jnp.asarray(x - np.asarray(value, np.float64), y.dtype)
    return solution(
        label,
        value,
        correction=correction,
        residual=best,
        condition=np.nan if out is None else out.condition,
        iterations=done,
        status=status,
        smallest_eigenvalue=smallest,
        needed_ridge=needed,
    )


def _restarted(
    apply: Apply,
    inverse: Apply,
    residual_of: Callable[[np.ndarray], np.ndarray],
    target: np.ndarray,
    dtype: Any,
    rtol: float,
    max_iterations: int,
    progress: Callable[[int, float], None] | None,
    padded: bool,
) -> tuple[np.ndarray, float, int, cg.Outcome | None, int]:
    """Conjugate gradients in the kernel's precision, restarted on residuals in float64.

    A recurrence in float32 alone stops at 1e-2 to 1e-5, wherever its own residual says it is. If
    `padded`, columns of zeros make their number one that products are fast with. Returns the
    solution, its relative residual, iterations, the last run's outcome and the status.
    """
    sizes = np.linalg.norm(target, axis=0)
    scale = np.where(sizes > 0, sizes, 1)
    columns = target.shape[1]
    x, residual, done = np.zeros(target.shape), target, 0
    best, out = np.inf, None
    # What float32 products with an ill-conditioned kernel gain before their rounding shows.
    inner = 1e-2 if dtype == jnp.float32 else 1e-10
    # XLA's product with 16 columns takes two thirds of the time of that with 10 (CPU, one core).
    more = -columns % COLUMNS if padded and columns > 1 else 0
    while done < max_iterations:
        now = np.linalg.norm(residual, axis=0)
        unit = np.where(now > 0, now, 1)
        goal = np.maximum(0.5 * rtol * scale / unit, inner)
        out = cg.run_eagerly(
            apply,
            jnp.asarray(np.pad(residual / unit, ((0, 0), (0, more))), dtype),
            inverse,
            np.pad(goal, (0, more), constant_values=1),
            max_iterations - done,
            progress,
            np.pad(scale / unit, (0, more), constant_values=1),
            done,
        )
        done += int(out.iterations)
        if out.indefinite:
            return x, best, done, out, NOT_POSITIVE_DEFINITE
        trial = x + np.asarray(out.x, np.float64)[:, :columns] * unit
        residual = residual_of(trial)
        size = float(dense_solve.relative(residual, target))
        if not size < best:
            break
        if size <= inner * min(best, 1.0):
            # The recurrence said the truth: the next one may go further, restarts cost iterations.
            inner = min(inner, 1e-4)
        stalled, best, x = size > 0.7 * best, size, trial
        if best <= rtol:
            return x, best, done, out, CONVERGED
        if stalled:
            break
    return x, best, done, out, NOT_CONVERGED


def _norm(apply: Callable[[Array], Array], n: int, dtype: Any, steps: int = 5) -> float:
    """Largest eigenvalue from below, by power iteration."""
    v, size = jnp.asarray(np.random.default_rng(0).normal(size=(n, 1)), dtype), 1.0
    for _ in range(steps):
        v = apply(v / jnp.linalg.norm(v))
        size = float(jnp.linalg.norm(v))
    return size


def _smallest_eigenvalue(
    apply: Callable[[Array], Array], n: int, dtype: Any, bound: float
) -> float:
    """By Lanczos; `bound`, a Rayleigh quotient, where that does not converge."""
    import scipy.sparse.linalg as sparse

    product = lambda v: np.asarray(apply(jnp.asarray(v, dtype).reshape(n, 1)))[:, 0]
    shape: Any = (n, n)
    operator = sparse.LinearOperator(shape, product, dtype=np.dtype(dtype))  # pyright: ignore
    loose: Any = 1e-2
    try:
        found = sparse.eigsh(operator, 1, which="SA", tol=loose, return_eigenvectors=False)
        return min(float(found[0]), bound)
    except (sparse.ArpackError, TypeError):
        return bound
