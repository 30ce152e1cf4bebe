"""Eigenvalues of kernels and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tangents._core.precision import DEFAULT as HIGHEST
from tangents._core.typing import Array
from tangents._inference.layout import is_concrete, matrix


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of a kernel in descending order; made by `tangents.spectrum`. A PyTree.

    Attributes:
        eigenvalues: (k,), the largest first.
        eigenvectors: (n, k) in columns.
        error_bounds: (k,): within this distance of each value there is an eigenvalue, the norm of
            K u − λ u.
        trace: of the kernel; NaN if not known.
        size: n.
    """

    eigenvalues: Array
    eigenvectors: Array
    error_bounds: Array
    trace: Array
    size: int = field(metadata={"static": True}, default=0)

    @property
    def complete(self) -> bool:
        """Whether these are all eigenvalues."""
        return self.eigenvalues.shape[0] == self.size


def spectrum(kernel: Any, k: int | None = None, *, tol: float = 0.0, seed: int = 0) -> Spectrum:
    r"""The eigenvalues of a kernel: all of a matrix, or the k largest of any operator.

    The leading k come from the implicitly restarted Lanczos method (ARPACK), which needs products
    only. Each has an error bound, measured and not assumed: for symmetric K some eigenvalue lies
    within ‖K u − λ u‖ of λ (Parlett 1998, theorem 4.5.1).

    Args:
        kernel: a symmetric matrix (n, n); a kernel with axes in pairs; or any object with `shape`,
            `dtype` and `@`, such as `tangents.ntk_operator`.
        k: how many, less than n. None takes all; only of a matrix, and possible under `jit`.
        tol: relative accuracy asked of ARPACK; 0 is the precision of the kernel.
        seed: of the start vector.

    Returns:
        `Spectrum`.

    Raises:
        ValueError: if k is out of range, or None for an operator.

    Examples:
        >>> import jax.numpy as jnp, tangents
        >>> tangents.spectrum(jnp.diag(jnp.array([1., 3., 2.]))).eigenvalues.tolist()
        [3.0, 2.0, 1.0]
    """
    dense = isinstance(kernel, jax.Array | np.ndarray)
    if dense:
        kernel = matrix(jnp.asarray(kernel))
    elif not all(hasattr(kernel, a) for a in ("shape", "dtype", "__matmul__")):
        raise TypeError(
            f"spectrum: kernel is a {type(kernel).__name__}; pass a matrix, such as kernel.ntk, or "
            "an operator with shape, dtype and @."
        )
    n = kernel.shape[0]
    if tuple(kernel.shape) != (n, n):
        raise ValueError(f"spectrum: kernel has shape {tuple(kernel.shape)}, but must be square.")
    if k is None or (dense and k == n):
        if not dense:
            raise ValueError(
                f"spectrum: all eigenvalues need a matrix: pass k < {n}, or kernel.materialise()."
            )
        values, vectors = jnp.linalg.eigh(kernel)
        values, vectors = values[::-1], vectors[:, ::-1]
        bounds = _residuals(jnp.matmul(kernel, vectors, precision=HIGHEST), values, vectors)
        return Spectrum(values, vectors, bounds, jnp.trace(kernel), n)
    if not 0 < k < n:
        raise ValueError(f"spectrum: k={k} is out of range: pass 1 to {n - 1}, or None for all.")
    if dense and not is_concrete(kernel):
        raise ValueError("spectrum: under jit pass k=None; Lanczos is driven from the host.")
    return _leading(kernel, k, dense, tol, seed)


def _leading(kernel: Any, k: int, dense: bool, tol: float, seed: int) -> Spectrum:
    import scipy.sparse.linalg as sparse

    n, dtype = kernel.shape[0], np.dtype(kernel.dtype)
    start = np.random.default_rng(seed).normal(size=n).astype(dtype)
    if dense:
        operator: Any = np.asarray(kernel)
    else:
        # One column as a block: NTK operators compile blocks and vectors apart.
        product = lambda v: np.asarray(kernel @ jnp.asarray(v, dtype).reshape(n))
        shape: Any = (n, n)
        operator = sparse.LinearOperator(shape, product, dtype=dtype)  # pyright: ignore
    accuracy: Any = tol
    values, vectors = sparse.eigsh(operator, k, which="LA", v0=start, tol=accuracy)
    order = np.argsort(values)[::-1]
    values, vectors = jnp.asarray(values[order]), jnp.asarray(vectors[:, order])
    if dense:
        images, trace = jnp.matmul(kernel, vectors, precision=HIGHEST), jnp.trace(kernel)
    else:
        images = jnp.stack([jnp.asarray(kernel @ v) for v in vectors.T], axis=1)
        known = hasattr(kernel, "trace") and callable(kernel.trace)
        trace = jnp.asarray(kernel.trace() if known else jnp.nan, values.dtype)
    return Spectrum(values, vectors, _residuals(images, values, vectors), trace, n)


def _residuals(images: Array, values: Array, vectors: Array) -> Array:
    return jnp.linalg.norm(images - vectors * values, axis=0)


def as_spectrum(kernel: Any) -> Spectrum:
    """The spectrum of a matrix; a `Spectrum` is itself."""
    return kernel if isinstance(kernel, Spectrum) else spectrum(kernel)


def effective_dimension(kernel: Any, ridge: float | Array) -> Array:
    r"""d(ρ) = Σ λ / (λ + ρ): how many directions a ridge of ρ leaves free.

    Of an incomplete `Spectrum` with a known trace it is a lower bound: what is missing of the trace
    counts with 1 / (λ_k + ρ), since no missing eigenvalue exceeds λ_k.

    Args:
        kernel: a matrix, or a `Spectrum`.
        ridge: ρ > 0; an array gives one dimension for each.

    Returns:
        Shape of `ridge`. Source: Zhang 2005; Caponnetto and De Vito 2007.

    Examples:
        >>> import jax.numpy as jnp, tangents
        >>> float(tangents.effective_dimension(jnp.eye(4), 1.0))
        2.0
    """
    s = as_spectrum(kernel)
    values = jnp.maximum(s.eigenvalues, 0)
    ridge = jnp.asarray(ridge, values.dtype)
    free = jnp.sum(values / (values + ridge[..., None]), axis=-1)
    if s.complete:
        return free
    missing = jnp.maximum(s.trace - jnp.sum(values), 0)
    rest = missing / (values[-1] + ridge)
    return free + jnp.where(jnp.isnan(rest), 0, rest)


def condition_number(kernel: Any, ridge: float | Array = 0.0) -> Array:
    r"""(λ_max + ρ) / (λ_min + ρ); infinite if K + ρ I is not positive definite.

    Args:
        kernel: a matrix, or a complete `Spectrum`.
        ridge: ρ.

    Examples:
        >>> import jax.numpy as jnp, tangents
        >>> float(tangents.condition_number(jnp.diag(jnp.array([4., 1.])), 1.0))
        2.5
    """
    s = as_spectrum(kernel)
    if not s.complete:
        raise ValueError(
            f"condition_number: the spectrum has {s.eigenvalues.shape[0]} of {s.size} eigenvalues; "
            "the smallest is needed. `tangents.solve` estimates the condition as it goes."
        )
    least = s.eigenvalues[-1] + ridge
    largest = s.eigenvalues[0] + ridge
    return jnp.where(least > 0, largest / jnp.where(least > 0, least, 1), jnp.inf)
