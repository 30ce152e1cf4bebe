"""Kernel regression: the ridge in closed form, predictions with variances, evidence.

With A = K + ρ I = U (Λ + ρ) Uᵀ and targets y ~ N(0, s A) (n examples, c outputs):

    leave-one-out     y_i − m_{−i} = [A⁻¹ y]_i / [A⁻¹]_ii,   v_{−i} = s / [A⁻¹]_ii
    evidence          log p(y) = −½ yᵀ A⁻¹ y / s − (c/2) log det (s A) − (n c / 2) log 2π
    scale             s = yᵀ A⁻¹ y / (n c), which maximises the evidence

(Rasmussen and Williams 2006, eq. 2.30, 5.10 to 5.12.)
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tangents._core.precision import DEFAULT as HIGHEST
from tangents._core.typing import Array
from tangents._inference import lapack
from tangents._inference.gaussian_process import Gaussian
from tangents._inference.layout import as_matrix_argument, floating, is_concrete, matrix
from tangents._inference.matrix_functions import null_tolerance
from tangents._scale.host_array import taken_over

CRITERIA = ("leave-one-out", "marginal-likelihood")


def as_system(kernel: Any, y: Any, *, caller: str) -> tuple[Array, Array]:
    """The kernel as (n, n) and the targets as (n, c)."""
    k = matrix(as_matrix_argument(kernel, caller=caller, argument="k_train_train"))
    y = jnp.asarray(y)
    n = k.shape[0]
    if k.ndim != 2 or k.shape[1] != n:
        raise ValueError(f"{caller}: k_train_train has shape {k.shape}, but must be square.")
    if y.ndim == 0 or (y.shape[0] != n and y.size != n):
        raise ValueError(
            f"{caller}: y_train has shape {y.shape}, but k_train_train of shape {k.shape} needs "
            f"({n},) or ({n}, c)."
        )
    dtype = floating(k, y)
    return k.astype(dtype), y.astype(dtype).reshape(n, -1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KernelRegression:
    """A fitted kernel regression; made by `fit_kernel_regression`. A PyTree.

    Attributes:
        weights: A⁻¹ y, (n, c): the mean prediction is K_test,train · weights.
        ridge: ρ, the noise variance in units of the scale.
        scale: s; predictive variances are multiples of it.
        eigenvalues: of K, ascending; exactly 0 where they are zero to rounding.
        eigenvectors: of K, in columns.
        log_marginal_likelihood: of the targets at this ridge and scale; NaN if K + ρ I is not
            positive definite.
        leave_one_out_error: mean squared leave-one-out residual.
        targets_shape: shape of one example's targets.
    """

    weights: Array
    ridge: Array
    scale: Array
    eigenvalues: Array
    eigenvectors: Array
    log_marginal_likelihood: Array
    leave_one_out_error: Array
    targets_shape: tuple[int, ...] = field(metadata={"static": True}, default=())

    def predict(
        self, k_test_train: Array, k_test_test: Array | None = None, noise: bool = False
    ) -> Any:
        """Mean, or `Gaussian(mean, covariance or variances)`, of the latent function.

        Args:
            k_test_train: (m, n).
            k_test_test: (m, m) for the covariance (m, m), or its diagonal (m,) for the variances.
            noise: whether to add the noise variance ρ s, that is, predict targets.

        Returns:
            The mean (m, ...), or a `Gaussian` if `k_test_test` is given; the covariance is the same
            for every output.
        """
        k_td = matrix(jnp.asarray(k_test_train)).astype(self.weights.dtype)
        if k_td.shape[-1] != self.weights.shape[0]:
            raise ValueError(
                f"KernelRegression.predict: k_test_train has shape {k_td.shape}, but was fitted on "
                f"{self.weights.shape[0]} examples: pass (m, {self.weights.shape[0]})."
            )
        mean = jnp.matmul(k_td, self.weights, precision=HIGHEST)
        mean = mean.reshape((-1, *self.targets_shape))
        if k_test_test is None:
            return mean
        k_tt = jnp.asarray(k_test_test).astype(k_td.dtype)
        inside = jnp.matmul(k_td, self.eigenvectors, precision=HIGHEST)
        weights = _inverse(self.eigenvalues, self.ridge)
        extra = self.ridge if noise else 0.0
        if k_tt.ndim == 1:
            explained = jnp.sum(inside**2 * weights, axis=1)
            # Rounding may leave a variance below zero where it is zero.
            return Gaussian(mean, self.scale * (jnp.maximum(k_tt - explained, 0) + extra))
        explained = jnp.matmul(inside * weights, inside.T, precision=HIGHEST)
        covariance = matrix(k_tt) - explained + extra * jnp.eye(k_td.shape[0], dtype=k_td.dtype)
        return Gaussian(mean, self.scale * (covariance + covariance.T) / 2)


def fit_kernel_regression(
    k_train_train: Array,
    y_train: Array,
    ridge: float | Array | str = "leave-one-out",
    *,
    ridges: Array | None = None,
    scale: float | Array | None = None,
) -> KernelRegression:
    r"""Fit kernel ridge regression, or equally the posterior of a Gaussian process.

    One eigendecomposition serves every ridge: leave-one-out errors and evidence are closed forms in
    it, evaluated on a grid that is refined twice around its best point. It may run under `jit`,
    `vmap` and, in the targets, `grad`. Concrete float32 kernels on a CPU are decomposed in float64,
    where small ridges keep their meaning; elsewhere no ridge below 16 ε λ_max is chosen in the
    precision of the kernel (2e-6 λ_max in float32).

    Args:
        k_train_train: (n, n); or with all outputs in pairs, (n, n, c, c).
        y_train: targets (n,) or (n, c). Centre them: the prior mean is zero.
        ridge: a number, or the criterion that chooses it: 'leave-one-out' (squared error) or
            'marginal-likelihood'.
        ridges: candidates. Default: 10⁻⁸ to 10² times the mean diagonal.
        scale: factor s of all variances. Default: 1 where `ridge` is a number, otherwise the value
            of greatest evidence.

    Returns:
        `KernelRegression`.

    Raises:
        ValueError: if shapes do not fit or the criterion is not known.

    Examples:
        >>> import jax.numpy as jnp
        >>> import tangents
        >>> x = jnp.linspace(-1, 1, 8)
        >>> k = jnp.exp(-(x[:, None] - x) ** 2)
        >>> fit = tangents.fit_kernel_regression(k, jnp.sin(3 * x), ridge='marginal-likelihood')
        >>> fit.predict(k).shape
        (8,)
    """
    caller = "fit_kernel_regression"
    k, y = as_system(k_train_train, y_train, caller=caller)
    shape = jnp.shape(y_train)[1:] if jnp.shape(y_train)[0] == k.shape[0] else ()
    if isinstance(ridge, str) and ridge not in CRITERIA:
        raise ValueError(
            f"{caller}: ridge={ridge!r} is not a number, {CRITERIA[0]!r} or {CRITERIA[1]!r}."
        )
    criterion = ridge if isinstance(ridge, str) else ""
    if not criterion:
        ridges = jnp.asarray(ridge, k.dtype)
        scale = 1.0 if scale is None else scale
    fitted: Any = _fitted(criterion, *_eigen(k), y, ridges, scale)
    return KernelRegression(*fitted, targets_shape=tuple(shape))


def _eigen(k: Array) -> tuple[Array, Array, Array]:
    """Eigenvalues of K, its eigenvectors, and the size below which the values are rounding.

    Of a concrete float32 matrix in float64: errors of float32 eigenvalues, some ε λ_max, are larger
    than the noise of many data. The rounding of its entries remains, which is spread over all
    eigenvalues (‖E‖ ≈ ε ‖K‖_F / √n for independent errors; sixteen times that is allowed for).
    """
    if is_concrete(k) and all(d.platform == "cpu" for d in k.devices()):
        values, vectors = lapack.eigh(np.asarray(k).astype(np.float64, copy=False))
        if k.dtype != jnp.float64:
            eps = float(jnp.finfo(k.dtype).eps)
            tolerance = 16 * eps * float(np.linalg.norm(values)) / np.sqrt(len(values))
            narrow = lambda part: jnp.asarray(np.asarray(part, k.dtype))
            return narrow(values), narrow(vectors), narrow(tolerance)
        values, vectors = jnp.asarray(values), taken_over(vectors)
    else:
        values, vectors = jnp.linalg.eigh(k)
    return values, vectors, null_tolerance(values)


@functools.partial(jax.jit, static_argnums=0)
def _fitted(
    criterion: str,
    values: Array,
    vectors: Array,
    rounding: Array,
    y: Array,
    ridges: Any,
    scale: Any,
) -> tuple[Array, ...]:
    """The fields of a `KernelRegression`; `ridges` are candidates, or the ridge if no criterion."""
    values = jnp.where(jnp.abs(values) <= rounding, 0, values)
    inside = jnp.matmul(vectors.T, y, precision=HIGHEST)
    ridge = ridges
    if criterion:
        ridge = _choose(criterion, values, vectors, rounding, inside, ridges, scale)
    evidence, scale = _evidence(values, inside, ridge, scale)
    errors = _leave_one_out(values, vectors, inside, ridge)[0]
    weights = jnp.matmul(vectors, _inverse(values, ridge)[:, None] * inside, precision=HIGHEST)
    return weights, ridge, scale, values, vectors, evidence, jnp.mean(errors**2)


def _inverse(values: Array, ridge: Array) -> Array:
    """1 / (λ + ρ), and 0 where that is not positive."""
    shifted = values + ridge
    return jnp.where(shifted > 0, 1 / jnp.where(shifted > 0, shifted, 1), 0)


def _evidence(values: Array, inside: Array, ridge: Array, scale: Any) -> tuple[Array, Array]:
    n, c = inside.shape
    shifted = values + ridge
    shifted = jnp.where(shifted > 0, shifted, jnp.nan)
    fit = jnp.sum(inside**2 / shifted[:, None])
    s = fit / (n * c) if scale is None else jnp.asarray(scale, values.dtype)
    logdet = jnp.sum(jnp.log(shifted)) + n * jnp.log(s)
    return -0.5 * (fit / s + c * logdet + n * c * jnp.log(2 * jnp.pi)), s


def _leave_one_out(values, vectors, inside, ridge) -> tuple[Array, Array]:
    """Residuals (n, c), and the diagonal of A⁻¹ (n,)."""
    weights = _inverse(values, ridge)
    diagonal = jnp.matmul(vectors**2, weights, precision=HIGHEST)
    solved = jnp.matmul(vectors, weights[:, None] * inside, precision=HIGHEST)
    return solved / diagonal[:, None], diagonal


def _choose(criterion: str, values, vectors, rounding, inside, ridges, scale) -> Array:
    def loss(ridge: Array) -> Array:
        if criterion == "marginal-likelihood":
            return -_evidence(values, inside, ridge, scale)[0]
        return jnp.mean(_leave_one_out(values, vectors, inside, ridge)[0] ** 2)

    def best(grid: Array) -> Array:
        losses = jax.lax.map(loss, grid)
        return jnp.argmin(jnp.where(jnp.isnan(losses), jnp.inf, losses))

    mean = jnp.mean(jnp.maximum(values, 0))
    if ridges is not None:
        grid = jnp.asarray(ridges, values.dtype)
        return grid[best(grid)]
    grid = mean * jnp.logspace(-8, 2, 61, dtype=values.dtype)
    # Ridges below the rounding of the eigenvalues fit rounding errors.
    grid = jnp.maximum(grid, rounding)
    for _ in range(2):
        place, last = best(grid), len(grid) - 1
        low, high = grid[jnp.maximum(place - 1, 0)], grid[jnp.minimum(place + 1, last)]
        grid = low * (high / low) ** jnp.linspace(0, 1, 21, dtype=values.dtype)
    return grid[best(grid)]


def leave_one_out(
    k_train_train: Array, y_train: Array, ridge: float | Array = 0.0
) -> tuple[Array, Array]:
    r"""Leave-one-out predictions without refitting.

    m_i = y_i − [A⁻¹ y]_i / [A⁻¹]_ii and v_i = 1 / [A⁻¹]_ii − ρ, with A = K + ρ I: what a fit on all
    other examples predicts for example i, and its variance.

    Args:
        k_train_train: (n, n).
        y_train: (n,) or (n, c).
        ridge: ρ.

    Returns:
        Means in the shape of `y_train`, and latent variances (n,).

    Examples:
        >>> import jax.numpy as jnp, tangents
        >>> means, variances = tangents.leave_one_out(jnp.eye(3), jnp.ones(3), 0.1)
        >>> means.shape, variances.shape
        ((3,), (3,))
    """
    k, y = as_system(k_train_train, y_train, caller="leave_one_out")
    values, vectors, _ = _eigen(k)
    inside = jnp.matmul(vectors.T, y, precision=HIGHEST)
    errors, diagonal = _leave_one_out(values, vectors, inside, jnp.asarray(ridge, k.dtype))
    return (y - errors).reshape(jnp.shape(y_train)), 1 / diagonal - ridge


def log_marginal_likelihood(
    k_train_train: Array, y_train: Array, ridge: float | Array = 0.0, scale: Any = 1.0
) -> Array:
    r"""Evidence of a Gaussian process, log p(y), for y ~ N(0, s (K + ρ I)), outputs independent.

        log p(y) = −½ Σ_c y_cᵀ (s A)⁻¹ y_c − (c/2) log det (s A) − (n c / 2) log 2π

    Differentiable in everything: `jax.grad` of it through a kernel function gives the gradient in
    W_std, b_std and the noise, and comparing it across architectures chooses their depth.

    Args:
        k_train_train: K, (n, n).
        y_train: (n,) or (n, c).
        ridge: ρ, the noise variance in units of `scale`.
        scale: s; None takes the value that maximises the evidence.

    Returns:
        A scalar; NaN if K + ρ I is not positive definite.

    Examples:
        >>> import jax, jax.numpy as jnp, tangents
        >>> k, y = jnp.eye(3), jnp.ones(3)
        >>> evidence = lambda noise: tangents.log_marginal_likelihood(k, y, noise)
        >>> round(float(jax.grad(evidence)(0.5)), 3)
        -0.333
    """
    k, y = as_system(k_train_train, y_train, caller="log_marginal_likelihood")
    n, c = y.shape
    shifted = k + jnp.asarray(ridge, k.dtype) * jnp.eye(n, dtype=k.dtype)
    factor = jnp.linalg.cholesky(shifted, symmetrize_input=True)
    white = jax.scipy.linalg.solve_triangular(factor, y, lower=True)
    fit = jnp.sum(white**2)
    s = fit / (n * c) if scale is None else jnp.asarray(scale, k.dtype)
    logdet = 2 * jnp.sum(jnp.log(jnp.diagonal(factor))) + n * jnp.log(s)
    return -0.5 * (fit / s + c * logdet + n * c * jnp.log(2 * jnp.pi))
