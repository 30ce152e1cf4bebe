"""A symmetric positive semidefinite kernel, factored once: eigenspaces and its inverse."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tangents._core.precision import DEFAULT as HIGHEST
from tangents._core.typing import Array
from tangents._inference import lapack
from tangents._inference.layout import is_concrete, regularise
from tangents._inference.matrix_functions import function_product
from tangents._scale.host_array import taken_over


def _regular(pivots: Any, dtype: Any) -> Any:
    # The squared ratio of the pivots bounds the condition number from below. A matrix that is
    # singular to working precision may still factorise, into rounding errors.
    xp = np if isinstance(pivots, np.ndarray) else jnp
    ratio = xp.min(pivots) / xp.max(pivots)
    return xp.all(xp.isfinite(pivots)) & (ratio**2 > 8 * float(jnp.finfo(dtype).eps))


class Factorisation:
    """K + r I as a matrix: its eigendecomposition and its inverse, each computed once.

    What is computed from concrete arrays is concrete also inside `jit` or `vmap` and is kept; what
    depends on tracers is computed anew in each trace, so that no tracer outlives its trace.
    Concrete matrices on a CPU are factored by LAPACK where they lie.
    """

    def __init__(self, k: Array, diag_reg: Any = 0.0, absolute: bool = False, *, caller: str = ""):
        """`k` (n, n); the ridge is `diag_reg` times the mean diagonal, or absolute."""
        self._k, self._diag_reg, self._absolute, self._caller = k, diag_reg, absolute, caller
        self._kept: dict[str, Any] = {}
        self.dtype = k.dtype
        self._concrete = is_concrete(k, diag_reg)
        self._on_host = self._concrete and all(d.platform == "cpu" for d in k.devices())

    def _keep(self, name: str, compute):
        if name in self._kept:
            return self._kept[name]
        if not self._concrete:
            return compute()
        with jax.ensure_compile_time_eval():
            self._kept[name] = compute()
        return self._kept[name]

    def computed(self) -> dict[str, Any]:
        """The eigendecomposition and Cholesky factors so far, as data."""
        return {name: kept for name, kept in self._kept.items() if name != "matrix"}

    def take_over(self, computed: dict[str, Any]) -> None:
        """Keep what another factorisation of the same matrix has computed."""
        for name, (first, second) in computed.items():
            if name != "eigen" and first is not None:
                if name != f"factor {first.dtype}":
                    continue  # rounded on its way, where JAX has no float64: computed again
                if self._on_host:
                    # LAPACK reads it column by column.
                    first, second = np.asfortranarray(first), np.bool_(second)
            self._kept[name] = (first, second)

    def matrix(self) -> Array:
        """K + r I."""
        return self._keep("matrix", lambda: regularise(self._k, self._diag_reg, self._absolute))

    def variable(self) -> Array | None:
        """K + r I if results may be differentiated in it, None if it is constant."""
        return None if self._concrete else self.matrix()

    def _host(self) -> tuple[np.ndarray, float]:
        """K and r on the host."""
        k = np.asarray(self._k)
        scale = 1.0 if self._absolute else float(np.mean(np.diagonal(k)))
        return k, float(np.asarray(self._diag_reg)) * scale

    def eigen(self) -> tuple[Array, Array]:
        """Eigenvalues of K + r I, ascending, and its eigenvectors as *rows*.

        No derivative is taken through them: see `matrix_functions`.
        """

        def compute() -> tuple[Array, Array]:
            if self._on_host:
                values, vectors = lapack.eigh(*self._host())
                return jnp.asarray(values), taken_over(vectors.T)
            values, vectors = jnp.linalg.eigh(lax.stop_gradient(self.matrix()))
            return values, vectors.T

        return self._keep("eigen", compute)

    def _factor(self, dtype: Any) -> tuple[Any, Any]:
        """Lower Cholesky factor in `dtype`, and whether it may be used: not broken, not singular.

        The factor is NumPy's where LAPACK made it.
        """

        def compute() -> tuple[Any, Any]:
            if self._on_host:
                factor = lapack.cholesky(*self._host(), dtype)
                if factor is None:
                    return None, np.False_
                return factor, np.asarray(_regular(np.diagonal(factor), self.dtype))
            # Derivatives go around the factor: see `_solve_traced`.
            factor = jnp.linalg.cholesky(lax.stop_gradient(self.matrix()))
            return factor, _regular(jnp.diagonal(factor), self.dtype)

        return self._keep(f"factor {jnp.dtype(dtype)}", compute)

    def usable(self) -> Any:
        """Whether a Cholesky factor serves: a boolean, traced if the matrix is."""
        for name, kept in self._kept.items():
            if name.startswith("factor"):
                return kept[1]
        return self._factor(self.dtype)[1]

    def solve(self, rhs: Array) -> Array:
        """(K + r I)⁻¹ rhs; the pseudo-inverse where the matrix is singular.

        A float32 matrix and right-hand side that are concrete give a float64 solution, rounded.

        Raises:
            ValueError: eagerly, if the matrix has an eigenvalue that is negative beyond rounding.
        """
        n, c = rhs.shape
        dtype = self.dtype
        if self._on_host and is_concrete(rhs) and 12 * c > n:
            # So many right-hand sides cost more in refinement than a factor in float64 does.
            dtype = np.dtype(np.float64)
        factor, usable = self._factor(dtype)
        if not self._concrete:
            # Also where only derivatives are traced and `usable` is known.
            return lax.cond(
                usable,
                _solve_traced,
                lambda k, f, r: self._pseudo_inverse(r),
                self.matrix(),
                factor,
                rhs,
            )
        if not usable:
            self._check_semidefinite()
            return self._pseudo_inverse(rhs)
        if not is_concrete(rhs):
            # Inside a trace the right-hand side is not there to hand to LAPACK.
            if isinstance(factor, np.ndarray):
                return jax.scipy.linalg.cho_solve((jnp.asarray(factor.T), False), rhs)
            return jax.scipy.linalg.cho_solve((factor, True), rhs)
        if isinstance(factor, np.ndarray):
            apply = lambda b: lapack.cholesky_solve(factor, b)
        else:
            apply = lambda b: np.asarray(
                jax.scipy.linalg.cho_solve((factor, True), jnp.asarray(b, self.dtype))
            )
        b = np.asarray(rhs)
        refined = b.dtype == np.float32 and np.dtype(dtype) == np.float32
        x = self._refined(apply, b) if refined else apply(b)
        return jnp.asarray(x, rhs.dtype)

    def project(self, rhs: Array) -> Array:
        """The part of rhs in the range of K + r I: all of it, unless the matrix is singular."""
        usable = self.usable()
        if is_concrete(usable):
            return rhs if usable else self._at_infinity("risen", rhs)
        return lax.cond(usable, lambda r: r, lambda r: self._at_infinity("risen", r), rhs)

    def _refined(self, solve: Any, rhs: np.ndarray) -> np.ndarray:
        # Corrections from residuals in float64 on the host bring the error of a float32
        # factorisation from 1e-4 to the rounding of the result. Each multiplies the error by the
        # same factor, which the first shows: where its square is small enough, one will do.
        k, ridge = self._host()
        b = rhs.astype(np.float64)
        x = np.asarray(solve(rhs), np.float64)
        last = 1.0
        for _ in range(4):
            residual = b - lapack.product64(k, x) - ridge * x
            change = np.asarray(solve(residual.astype(np.float32)), np.float64)
            size = np.linalg.norm(change) / max(np.linalg.norm(x), 1e-300)
            if not size < 0.5 * last:
                break
            x, error, last = x + change, size * size / last, size
            if error < 1e-8:
                break
        return x

    def _pseudo_inverse(self, rhs: Array) -> Array:
        return self._at_infinity("integrated", rhs)

    def _at_infinity(self, kind: str, rhs: Array) -> Array:
        forever = jnp.full((1, 1), jnp.inf, rhs.dtype)
        return function_product(kind, 1, self.variable(), self.eigen(), forever, rhs)[0]

    def _check_semidefinite(self) -> None:
        values = np.asarray(self.eigen()[0])  # on the host: this may be running inside some trace
        smallest = float(values[0])
        tolerance = len(values) * float(np.finfo(values.dtype).eps) * float(np.abs(values).max())
        if not np.isfinite(smallest):
            raise ValueError(f"{self._caller}: the kernel has entries that are NaN or infinite.")
        if smallest < -max(tolerance, 1e-30):
            k, ridge = self._host()
            mean = float(np.mean(np.diagonal(k))) + ridge
            needed = -2 * smallest
            raise ValueError(
                f"{self._caller}: the kernel is not positive semidefinite: its smallest eigenvalue "
                f"is {smallest:.3g}, its largest {float(values[-1]):.3g}, so there is no limit of "
                f"infinite time. Pass diag_reg={needed / mean:.2g} (relative to the mean diagonal) "
                "or more, or compute the kernel in float64."
            )


def _solve_traced(k: Array, factor: Array, rhs: Array) -> Array:
    """K⁻¹ rhs by the factor of K; differentiated as the solution of a linear system.

    So a factor that broke down, which this branch does not use, cannot spoil a derivative.
    """
    k = (k + k.T) / 2  # so that the derivative in K is symmetric
    return lax.custom_linear_solve(
        lambda x: jnp.matmul(k, x, precision=HIGHEST),
        rhs,
        lambda _, b: jax.scipy.linalg.cho_solve((factor, True), b),
        symmetric=True,
    )
