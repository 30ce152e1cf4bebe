"""A symmetric positive semidefinite kernel, factored once: eigenspaces and limits.

Gradient flow on a squared loss acts on each eigenvalue λ of the kernel by two functions of time
(Jacot et al. 2018, section 5; Lee et al. 2019, eq. 8 and 9), with s the number of targets:

    risen(λ, t)      = 1 − exp(−λ t / s)               how much of the residual is gone
    integrated(λ, t) = (1 − exp(−λ t / s)) / λ         what the test outputs have seen of it

Where λ = 0 their limits are 0 and t / s; at t = ∞ the second one is the pseudo-inverse.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tangents._core.precision import DEFAULT as HIGHEST
from tangents._core.typing import Array
from tangents._inference.layout import is_concrete, regularise


def risen(eigenvalues: Array, t: Array, size: int) -> Array:
    """1 − exp(−λ t / s) for t of shape (T, 1): shape (T, n). Eigenvalues below 0 count as 0."""
    lam = jnp.maximum(eigenvalues, 0)
    infinite = jnp.isinf(t)
    finite_t = jnp.where(infinite, 0, t)
    limit = (lam > null_tolerance(eigenvalues)).astype(lam.dtype)
    return jnp.where(infinite, limit, -jnp.expm1(-lam * (finite_t / size)))


def integrated(eigenvalues: Array, t: Array, size: int) -> Array:
    """(1 − exp(−λ t / s)) / λ for t of shape (T, 1): shape (T, n), with its limits at 0 and ∞."""
    lam = jnp.maximum(eigenvalues, 0)
    infinite = jnp.isinf(t)
    time = jnp.where(infinite, 0, t) / size
    x = lam * time
    # Two forms of one function: dividing by x never divides by zero times something large, dividing
    # by λ does not overflow where t is large.
    safe_x = jnp.where((x == 0) | (x > 1), 1, x)
    early = time * jnp.where(x == 0, 1, -jnp.expm1(-safe_x) / safe_x)
    safe_lam = jnp.where(lam > 0, lam, 1)
    late = -jnp.expm1(-x) / safe_lam
    limit = jnp.where(lam > null_tolerance(eigenvalues), 1 / safe_lam, 0)
    return jnp.where(infinite, limit, jnp.where(x > 1, late, early))


def null_tolerance(eigenvalues: Array) -> Array:
    """Eigenvalues at or below this are zero as far as rounding lets one tell: n ε λ_max."""
    eps = jnp.finfo(eigenvalues.dtype).eps
    return eigenvalues.shape[-1] * eps * jnp.max(jnp.abs(eigenvalues))


def _regular(pivots: Any, dtype: Any) -> Any:
    # The squared ratio of the pivots bounds the condition number from below. A matrix that is
    # singular to working precision may still factorise, into rounding errors.
    xp = np if isinstance(pivots, np.ndarray) else jnp
    ratio = xp.min(pivots) / xp.max(pivots)
    return xp.all(xp.isfinite(pivots)) & (ratio**2 > float(jnp.finfo(dtype).eps))


class Factorisation:
    """K + r I as a matrix: its eigendecomposition and its inverse, each computed once.

    What is computed from concrete arrays is concrete also inside `jit` or `vmap` and is kept; what
    depends on tracers is computed anew in each trace, so that no tracer outlives its trace.
    """

    def __init__(self, k: Array, diag_reg: Any = 0.0, absolute: bool = False, *, caller: str = ""):
        """`k` (n, n); the ridge is `diag_reg` times the mean diagonal, or absolute."""
        self._k, self._diag_reg, self._absolute, self._caller = k, diag_reg, absolute, caller
        self._kept: dict[str, Any] = {}

    def _keep(self, name: str, compute):
        if name in self._kept:
            return self._kept[name]
        if not is_concrete(self._k, self._diag_reg):
            return compute()
        with jax.ensure_compile_time_eval():
            self._kept[name] = compute()
        return self._kept[name]

    def matrix(self) -> Array:
        """K + r I."""
        return self._keep("matrix", lambda: regularise(self._k, self._diag_reg, self._absolute))

    def eigh(self) -> tuple[Array, Array]:
        """Eigenvalues, ascending, and eigenvectors of K + r I."""
        return self._keep("eigh", lambda: tuple(jnp.linalg.eigh(self.matrix())))

    def apply(self, values: Array, rhs: Array) -> Array:
        """U diag(values) Uᵀ rhs: `values` (T, n), `rhs` (n, c), result (T, n, c)."""
        _, vectors = self.eigh()
        inside = jnp.matmul(vectors.T, rhs, precision=HIGHEST)
        n, c = inside.shape
        # One product for all times: (n, n) @ (n, T·c) reads the eigenvectors once.
        scaled = (values.T[:, :, None] * inside[:, None, :]).reshape(n, -1)
        out = jnp.matmul(vectors, scaled, precision=HIGHEST)
        return jnp.moveaxis(out.reshape(n, -1, c), 0, 1)

    def cholesky(self) -> tuple[Any, Any]:
        """A function that solves with K + r I, and whether it may: finite and not singular."""

        def compute():
            if is_concrete(self._k, self._diag_reg) and self._on_cpu():
                return self._cholesky_on_host()
            factor = jnp.linalg.cholesky(self.matrix())
            pivots = jnp.diagonal(factor)
            solve = lambda r: jax.scipy.linalg.cho_solve((factor, True), r)
            return solve, _regular(pivots, factor.dtype)

        return self._keep("cholesky", compute)

    def _on_cpu(self) -> bool:
        return all(d.platform == "cpu" for d in self.matrix().devices())

    def _cholesky_on_host(self) -> tuple[Any, Any]:
        # LAPACK on the array where it lies, without XLA's copies. It is symmetric, so that its
        # transpose, a view in the order LAPACK wants, is as good.
        import scipy.linalg

        try:
            k = np.asarray(self.matrix()).T
            factor = scipy.linalg.cho_factor(k, lower=True, check_finite=False)
        except np.linalg.LinAlgError:
            return None, np.False_
        pivots = np.diagonal(factor[0])
        solve = lambda r: scipy.linalg.cho_solve(factor, np.asarray(r), check_finite=False)
        return solve, np.asarray(_regular(pivots, pivots.dtype))

    def usable(self) -> Any:
        """Whether the Cholesky factor serves: a boolean, traced if the matrix is."""
        return self.cholesky()[1]

    def solve(self, rhs: Array) -> Array:
        """(K + r I)⁻¹ rhs; the pseudo-inverse where the matrix is singular.

        Raises:
            ValueError: eagerly, if the matrix has an eigenvalue that is negative beyond rounding.
        """
        solve, usable = self.cholesky()
        if not is_concrete(usable):
            return lax.cond(usable, solve, self._pseudo_inverse, rhs)
        if not usable:
            self._check_semidefinite()
            return self._pseudo_inverse(rhs)
        if is_concrete(rhs):
            return self._refined(solve, rhs)
        if self._on_cpu():
            # Inside a trace the right-hand side is not there to hand to LAPACK.
            factor = self._keep("factor", lambda: jnp.linalg.cholesky(self.matrix()))
            return jax.scipy.linalg.cho_solve((factor, True), rhs)
        return solve(rhs)

    def project(self, rhs: Array) -> Array:
        """The part of rhs in the range of K + r I: all of it, unless the matrix is singular."""
        usable = self.usable()

        def range_part(r: Array) -> Array:
            values, _ = self.eigh()
            return self.apply((values > null_tolerance(values)).astype(r.dtype)[None], r)[0]

        if is_concrete(usable):
            return rhs if usable else range_part(rhs)
        return lax.cond(usable, lambda r: r, range_part, rhs)

    def _refined(self, solve: Any, rhs: Array) -> Array:
        if rhs.dtype != jnp.float32:
            return jnp.asarray(solve(rhs))
        # Corrections from residuals in float64 on the host bring the error of a float32
        # factorisation from 1e-4 to the rounding of the result. Each multiplies the error by the
        # same factor, which the first shows: where its square is small enough, one will do.
        k, b = np.asarray(self.matrix()), np.asarray(rhs, np.float64)
        x = np.asarray(solve(rhs), np.float64)
        last = 1.0
        for _ in range(4):
            change = np.asarray(solve((b - product64(k, x)).astype(np.float32)), np.float64)
            size = np.linalg.norm(change) / max(np.linalg.norm(x), 1e-300)
            if not size < 0.5 * last:
                break
            x, error, last = x + change, size * size / last, size
            if error < 1e-8:
                break
        return jnp.asarray(x, rhs.dtype)

    def _pseudo_inverse(self, rhs: Array) -> Array:
        values, _ = self.eigh()
        return self.apply(integrated(values, jnp.full((1, 1), jnp.inf, values.dtype), 1), rhs)[0]

    def _check_semidefinite(self) -> None:
        values, _ = self.eigh()
        values = np.asarray(values)  # on the host: this may be running inside somebody's trace
        smallest = float(values[0])
        tolerance = len(values) * float(np.finfo(values.dtype).eps) * float(np.abs(values).max())
        if not np.isfinite(smallest):
            raise ValueError(f"{self._caller}: the kernel has entries that are NaN or infinite.")
        if smallest < -max(tolerance, 1e-30):
            mean = float(np.mean(np.diagonal(np.asarray(self.matrix()))))
            ridge = -2 * smallest
            raise ValueError(
                f"{self._caller}: the kernel is not positive semidefinite: its smallest eigenvalue "
                f"is {smallest:.3g}, its largest {float(values[-1]):.3g}, so there is no limit of "
                f"infinite time. Pass diag_reg={ridge / mean:.2g} (relative to the mean diagonal) "
                "or more, or compute the kernel in float64."
            )


def product64(k: np.ndarray, x: np.ndarray, rows: int = 1024) -> np.ndarray:
    """K x in float64 for a matrix of any precision."""
    # K in float64 a block of rows at a time: a whole copy would triple the memory.
    if k.dtype == np.float64:
        return k @ x
    out = np.empty(x.shape, np.float64)
    for start in range(0, k.shape[0], rows):
        out[start : start + rows] = k[start : start + rows].astype(np.float64) @ x
    return out
