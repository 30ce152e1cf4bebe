"""Posteriors of Gaussian processes with the kernels of a network.

With K = NNGP, Θ = NTK, data (X, y), test inputs T, and K, Θ regularised where they are inverted:

    nngp    mean K_TX K⁻¹ y     cov K_TT − K_TX K⁻¹ K_XT               (Lee et al. 2018)
    ntk     mean Θ_TX Θ⁻¹ y     cov K_TT + A K A' − (A K_XT + h.c.),   A = Θ_TX Θ⁻¹
            (infinitely many networks trained to t = ∞; Lee et al. 2019, eq. 16)
    ntkgp   mean Θ_TX Θ⁻¹ y     cov Θ_TT − Θ_TX Θ⁻¹ Θ_XT               (He et al. 2020)
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tangents._core.get import Get, canonical_get, select
from tangents._core.precision import DEFAULT as HIGHEST
from tangents._core.typing import Array, Axes
from tangents._inference.eigenspace import Factorisation
from tangents._inference.gradient_flow import as_targets, outputs_of_weights
from tangents._inference.layout import (
    Layout,
    as_matrix_argument,
    floating,
    from_matrix,
    matrix,
)
from tangents._inference.predictor import Predictor, remembered


class Gaussian(NamedTuple):
    """Mean and covariance of outputs.

    Attributes:
        mean: shape of the outputs, e.g. (m, c).
        covariance: the axes of the outputs in pairs without trace axes, e.g. (m, m): it is the same
            for every traced output.
    """

    mean: Array
    covariance: Array


def kernel_of(kernels: Any, name: str, *, caller: str, argument: str) -> Array:
    """The matrix `name` of a `Kernel` or named tuple; an array stands for itself."""
    if not (hasattr(kernels, "nngp") or hasattr(kernels, "ntk")):
        return as_matrix_argument(kernels, caller=caller, argument=argument)
    found = getattr(kernels, name, None)
    if found is None:
        raise ValueError(
            f"{caller}: {argument} has no {name!r} kernel, which this prediction needs: compute it "
            f"with kernel_fn(x1, x2, ('nngp', 'ntk'))."
        )
    return as_matrix_argument(found, caller=caller, argument=f"{argument}.{name}")


def has_both(kernels: Any) -> bool:
    """Whether `kernels` is an object that holds an NNGP beside an NTK."""
    return getattr(kernels, "nngp", None) is not None and getattr(kernels, "ntk", None) is not None


@remembered
def gp_inference(
    k_train_train: Any,
    y_train: Array,
    diag_reg: float = 0.0,
    diag_reg_absolute_scale: bool = False,
    trace_axes: Axes = (-1,),
) -> Predictor:
    r"""Mean and covariance of 'nngp', 'ntk' and 'ntkgp' predictions (see the formulas in the
    module).

    'nngp' is the posterior of an infinitely wide Bayesian network (equally, of one whose last layer
    is trained to convergence), 'ntk' the distribution of infinitely wide networks trained to
    convergence by gradient flow, 'ntkgp' the posterior of the process whose prior is the NTK.

    Args:
        k_train_train: a matrix (n, n), or an object with fields `nngp` and `ntk` (a `Kernel` or a
            named tuple from `kernel_fn(x, None, ('nngp', 'ntk'))`). 'ntk' with covariance needs
            both.
        y_train: targets (n, c).
        diag_reg: noise variance, as a multiple of the mean diagonal of the kernel inverted.
        diag_reg_absolute_scale: whether `diag_reg` is added as it is.
        trace_axes: axes of `y_train` over which the kernel is a multiple of the identity.

    Returns:
        `predict_fn(get=None, k_test_train=None, k_test_test=None)`. `get` is 'nngp', 'ntk',
        'ntkgp', or a tuple of them; None is ('nngp', 'ntk'). The result is the mean (m, c), or a
        `Gaussian(mean, covariance)` if `k_test_test` is given (of the NNGP; of the NTK for
        'ntkgp'), and a named tuple of these for several. Without `k_test_train` it is the training
        set: `y_train` with covariance zero. May be called under `jit` and `vmap`.

    Raises:
        ValueError: if a needed kernel is missing, shapes do not fit, or the kernel is not positive
            semidefinite; a singular kernel is inverted on its range.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import predict
        >>> k = jnp.array([[2., 1.], [1., 2.]])
        >>> posterior = predict.gp_inference(k, jnp.array([[1.], [3.]]), diag_reg=0.1)
        >>> mean, cov = posterior('nngp', jnp.array([[1., 1.]]), jnp.array([[2.]]))
        >>> mean.shape, cov.shape
        ((1, 1), (1, 1))
    """
    caller = "gp_inference"
    y = as_targets(y_train, caller=caller)
    layout = Layout.of(y.shape, trace_axes, caller=caller)
    factors: dict[str, Factorisation] = {}

    def factor(name: str) -> Factorisation:
        if name not in factors:
            k = kernel_of(k_train_train, name, caller=caller, argument="k_train_train")
            layout.check_train(k, caller=caller)
            k = matrix(k).astype(floating(k, y))
            factors[name] = Factorisation(k, diag_reg, diag_reg_absolute_scale, caller=caller)
        return factors[name]

    def predict_one(kind: str, k_test_train: Any, k_test_test: Any):
        name = "ntk" if kind == "ntkgp" else kind
        if k_test_train is None:
            k = kernel_of(k_train_train, name, caller=caller, argument="k_train_train")
            mean = y.astype(floating(k, y))
            zero = jnp.zeros(tuple(d for s in layout.kept_shape for d in (s, s)), mean.dtype)
            return mean if k_test_test is None else Gaussian(mean, zero)
        k_td = kernel_of(k_test_train, name, caller=caller, argument="k_test_train")
        layout.check_test(k_td, caller=caller)
        if k_test_test is None:
            return limit(kind, layout, factor(name), y, k_td)
        k_tt = kernel_of(
            k_test_test, name if kind == "ntkgp" else "nngp", caller=caller, argument="k_test_test"
        )
        nngp = None
        if kind == "ntk":
            if not (has_both(k_train_train) and has_both(k_test_train)):
                raise ValueError(
                    f"{caller}: the covariance of 'ntk' needs both kernels: pass objects with "
                    "fields nngp and ntk as k_train_train and k_test_train, from "
                    "kernel_fn(x1, x2, ('nngp', 'ntk'))."
                )
            nngp = (
                kernel_of(k_train_train, "nngp", caller=caller, argument="k_train_train"),
                kernel_of(k_test_train, "nngp", caller=caller, argument="k_test_train"),
            )
        return limit(kind, layout, factor(name), y, k_td, k_tt, nngp)

    def predict_fn(get: Get = None, k_test_train: Any = None, k_test_test: Any = None):
        """Posterior mean, or `Gaussian`, of each kernel in `get`; see `gp_inference`."""
        wanted = canonical_get(get)
        names = (
            ("nngp", "ntk") if wanted is None else (wanted,) if isinstance(wanted, str) else wanted
        )
        for name in names:
            if name not in ("nngp", "ntk", "ntkgp"):
                raise ValueError(f"{caller}: get={name!r} is not known: 'nngp', 'ntk' or 'ntkgp'.")
        results = {name: predict_one(name, k_test_train, k_test_test) for name in names}
        return select("Gaussians", wanted, results)

    def take_over(computed: dict[str, Any]) -> None:
        for name, factors_so_far in computed.items():
            factor(name).take_over(factors_so_far)

    return Predictor(
        predict_fn,
        lambda: {name: made.computed() for name, made in factors.items()},
        take_over,
    )


def limit(
    kind: str,
    layout: Layout,
    solver: Factorisation,
    y: Array,
    k_td: Array,
    k_tt: Array | None = None,
    nngp: tuple[Array, Array] | None = None,
) -> Any:
    """The prediction at infinite time: its mean, or a `Gaussian` if `k_tt` is given.

    `solver` has the kernel of `kind`; `nngp` are the NNGPs of (train, train) and (test, train),
    which 'ntk' needs for its covariance.
    """
    if k_tt is None:
        weights = solver.solve(_right_sides(layout, solver.dtype, y, None))
        return outputs_of_weights(k_td, weights[None], jnp.zeros((), solver.dtype), layout, ())
    # Targets and Θ_XT in one solve.
    solved = solver.solve(_right_sides(layout, solver.dtype, y, k_td))
    return Gaussian(*_gaussian(layout, kind == "ntk", solved, k_td, k_tt, nngp))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _right_sides(layout: Layout, dtype: Any, y: Array, k_td: Array | None) -> Array:
    targets = layout.targets(y.astype(dtype))
    if k_td is None:
        return targets
    return jnp.concatenate([targets, matrix(k_td).astype(dtype).T], axis=1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gaussian(
    layout: Layout,
    spread: bool,
    solved: Array,
    k_td: Array,
    k_tt: Array,
    nngp: tuple[Array, Array] | None,
) -> tuple[Array, Array]:
    dtype, tests = solved.dtype, matrix(k_tt).shape[0]
    weights, cross = solved[:, :-tests], solved[:, -tests:]
    mean = outputs_of_weights(k_td, weights[None], jnp.zeros((), dtype), layout, ())
    prior = matrix(k_tt).astype(dtype)
    if spread and nngp is not None:
        nngp_dd, nngp_td = (matrix(k).astype(dtype) for k in nngp)
        covariance = propagated(prior, nngp_dd, nngp_td, cross)
    else:
        covariance = prior - jnp.matmul(matrix(k_td).astype(dtype), cross, precision=HIGHEST)
    kept = k_td.shape[0::2]
    return mean, from_matrix(symmetric(covariance), kept, kept)


def propagated(prior: Array, nngp_dd: Array, nngp_td: Array, response: Array) -> Array:
    """K_TT + R' K R − (K_TX R + h.c.): what a linear map R of the training outputs leaves of K."""
    both = jnp.matmul(nngp_td, response, precision=HIGHEST)
    inner = jnp.matmul(nngp_dd, response, precision=HIGHEST)
    spread = jnp.matmul(jnp.swapaxes(response, -1, -2), inner, precision=HIGHEST)
    return prior + spread - both - jnp.swapaxes(both, -1, -2)


def symmetric(values: Array) -> Array:
    """The symmetric part of matrices (..., m, m)."""
    return (values + jnp.swapaxes(values, -1, -2)) / 2
