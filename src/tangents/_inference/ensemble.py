"""Mean and covariance of infinitely many infinitely wide networks during gradient flow.

With R(t) = Θ⁻¹ (1 − exp(−η t Θ / s)) Θ_XT and K, Θ the NNGP and NTK (Lee et al. 2019, eq. 16):

    ntk    mean Rᵀ y,   cov K_TT + Rᵀ K R − (K_TX R + h.c.)
    nngp   the same with K for Θ (only the last layer is trained), where it collapses to
           cov K_TT − K_TX K⁻¹ (1 − exp(−2 η t K / s)) K_XT.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tangents._core.get import Get, canonical_get, select
from tangents._core.precision import DEFAULT as HIGHEST
from tangents._core.typing import Array, Axes, PyTree
from tangents._inference.eigenspace import Factorisation
from tangents._inference.gaussian_process import (
    Gaussian,
    kernel_of,
    limit,
    propagated,
    symmetric,
)
from tangents._inference.gradient_flow import as_targets, as_times
from tangents._inference.layout import (
    Layout,
    floating,
    from_matrix,
    is_concrete,
    matrix,
)
from tangents._inference.matrix_functions import function_product
from tangents._inference.predictor import Predictor, remembered

KernelFn = Callable[..., Any]
CALLER = "gradient_descent_mse_ensemble"


@remembered
def gradient_descent_mse_ensemble(
    kernel_fn: KernelFn,
    x_train: PyTree,
    y_train: Array,
    learning_rate: float = 1.0,
    diag_reg: float = 0.0,
    diag_reg_absolute_scale: bool = False,
    trace_axes: Axes = (-1,),
    **kernel_fn_train_train_kwargs: Any,
) -> Predictor:
    r"""The distribution of infinitely wide networks trained by gradient flow on the squared error.

    Each network starts at an independent draw with mean zero and covariance K (the NNGP) and
    follows `gradient_descent_mse` with the NTK; the result is the mean and covariance over draws.

    Args:
        kernel_fn: `kernel_fn(x1, x2, get, **kwargs)` that returns 'nngp' and 'ntk', e.g. from
            `stax.serial`, `empirical_kernel_fn` (with its parameters bound) or
            `monte_carlo_kernel_fn`.
        x_train: training inputs.
        y_train: targets (n, c). The loss is ½ · mean over all outputs.
        learning_rate: η; it only multiplies time.
        diag_reg: added to the kernel that is inverted, as a multiple of its mean diagonal.
        diag_reg_absolute_scale: whether `diag_reg` is added as it is.
        trace_axes: axes of `y_train` over which the kernels are a multiple of the identity.
        **kernel_fn_train_train_kwargs: further arguments of `kernel_fn` for (x_train, x_train);
            pairs are for the first and second input.

    Returns:
        `predict_fn(t=None, x_test=None, get=None, compute_cov=False,
        **kernel_fn_test_test_kwargs)`: time or array of times (None: infinity), test inputs (None:
        the training set), 'nngp', 'ntk' or a tuple (None: both). The result is the mean (m, c), or
        `Gaussian(mean, covariance)` with covariance (m, m) if `compute_cov`, with the axes of `t`
        in front; a named tuple for several. Keyword arguments are those of `kernel_fn(x_test,
        x_test)`; for (test, train) the first half of a pair is taken from here and the second from
        the training arguments. It may be called under `jit` and `vmap`; kernels of the training set
        and their factors are kept.

    Raises:
        NotImplementedError: if `get` names another kernel.
        ValueError: if shapes do not fit, or training and test arguments conflict.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import predict
        >>> def kernel_fn(x1, x2, get):
        ...     return {'nngp': x1 @ (x1 if x2 is None else x2).T}[get]
        >>> make = predict.gradient_descent_mse_ensemble
        >>> predict_fn = make(kernel_fn, jnp.eye(2), jnp.ones((2, 1)))
        >>> predict_fn(t=1.0, x_test=jnp.ones((3, 2)), get='nngp').shape
        (3, 1)
    """
    y = as_targets(y_train, caller=CALLER)
    layout = Layout.of(y.shape, trace_axes, caller=CALLER)
    ridge = diag_reg, diag_reg_absolute_scale
    ensemble = _Ensemble(
        kernel_fn, x_train, y, layout, learning_rate, ridge, kernel_fn_train_train_kwargs
    )

    def predict_fn(
        t: Any = None,
        x_test: PyTree = None,
        get: Get = None,
        compute_cov: bool = False,
        **kernel_fn_test_test_kwargs: Any,
    ):
        """Mean or `Gaussian` at time `t` on `x_test`; see `gradient_descent_mse_ensemble`."""
        wanted = canonical_get(get)
        names = (
            ("nngp", "ntk") if wanted is None else (wanted,) if isinstance(wanted, str) else wanted
        )
        for name in names:
            if name not in ("nngp", "ntk"):
                raise NotImplementedError(f"{CALLER}: get={name!r} is not one of 'nngp', 'ntk'.")
        if t is None:
            results = ensemble.at_infinity(names, x_test, compute_cov, kernel_fn_test_test_kwargs)
        else:
            results = ensemble.at_times(t, names, x_test, compute_cov, kernel_fn_test_test_kwargs)
        return select("Gaussians", wanted, results)

    return Predictor(predict_fn, ensemble.computed, ensemble.take_over)


class _Ensemble:
    """Networks trained on one set: its kernels and their factors, kept once they are concrete."""

    def __init__(
        self,
        kernel_fn: KernelFn,
        x_train: PyTree,
        y: Array,
        layout: Layout,
        learning_rate: Any,
        ridge: tuple[Any, bool],
        train_kwargs: dict[str, Any],
    ):
        self.kernel_fn, self.x_train, self.train_kwargs = kernel_fn, x_train, train_kwargs
        self.y, self.layout, self.learning_rate, self.ridge = y, layout, learning_rate, ridge
        self.kept_kernels: dict[str, Any] = {}
        self.kept_factors: dict[str, Factorisation] = {}

    def train_kernels(self, names: tuple[str, ...]) -> dict[str, Array]:
        """Kernels of the training set by name, kept once they are concrete."""
        missing = tuple(n for n in names if n not in self.kept_kernels)
        found = dict(self.kept_kernels)
        if missing:
            concrete = is_concrete(self.x_train, self.train_kwargs)
            with _eager_where(concrete):
                computed = _kernels(self.kernel_fn, self.x_train, None, missing, self.train_kwargs)
            for name, k in computed.items():
                self.layout.check_train(k, caller=CALLER, argument=f"kernel_fn(x_train)[{name!r}]")
            found.update(computed)
            if is_concrete(computed):
                self.kept_kernels.update(computed)
        return found

    def factor(self, name: str) -> Factorisation:
        if name in self.kept_factors:
            return self.kept_factors[name]
        k = matrix(self.train_kernels((name,))[name])
        made = Factorisation(k.astype(floating(k, self.y)), *self.ridge, caller=CALLER)
        if is_concrete(k):
            self.kept_factors[name] = made
        return made

    def computed(self) -> dict[str, Any]:
        """Kernels of the training set and their factors so far, as data."""
        factors = {name: made.computed() for name, made in self.kept_factors.items()}
        return {"kernels": dict(self.kept_kernels), "factors": factors}

    def take_over(self, computed: dict[str, Any]) -> None:
        """Keep what another ensemble of the same networks has computed."""
        self.kept_kernels.update(computed["kernels"])
        for name, factors in computed["factors"].items():
            self.factor(name).take_over(factors)

    def test_kernels(self, x_test, needed, compute_cov, test_kwargs):
        """Kernels of (test, train) by name, and the NNGP of (test, test) for covariances."""
        pair = _test_train_kwargs(test_kwargs, self.train_kwargs)
        k_td = _kernels(self.kernel_fn, x_test, self.x_train, needed, pair)
        for name, k in k_td.items():
            self.layout.check_test(
                k, caller=CALLER, argument=f"kernel_fn(x_test, x_train)[{name!r}]"
            )
        if not compute_cov:
            return k_td, None
        return k_td, _kernels(self.kernel_fn, x_test, None, ("nngp",), test_kwargs)["nngp"]

    def at_infinity(self, names, x_test, compute_cov, test_kwargs):
        if x_test is None:
            zero = jnp.zeros(tuple(d for s in self.layout.kept_shape for d in (s, s)), self.y.dtype)
            return {name: Gaussian(self.y, zero) if compute_cov else self.y for name in names}
        needed = _needed(names, compute_cov)
        k_dd = self.train_kernels(needed)
        k_td, k_tt = self.test_kernels(x_test, needed, compute_cov, test_kwargs)
        nngp = (k_dd["nngp"], k_td["nngp"]) if compute_cov else None
        return {
            name: limit(name, self.layout, self.factor(name), self.y, k_td[name], k_tt, nngp)
            for name in names
        }

    def at_times(self, t, names, x_test, compute_cov, test_kwargs):
        needed = _needed(names, compute_cov)
        k_dd = self.train_kernels(needed)
        k_td, k_tt = {}, None
        if x_test is not None:
            k_td, k_tt = self.test_kernels(x_test, needed, compute_cov, test_kwargs)
        results = {}
        for name in names:
            solver = self.factor(name)
            times = as_times(t, solver.dtype, CALLER), jnp.asarray(self.learning_rate, solver.dtype)
            # Of 'nngp' the kernel that moves the outputs is the one of their first covariance.
            own = name == "nngp"
            k0 = None
            if compute_cov and not own:
                k0 = k_dd["nngp"]
            elif compute_cov and x_test is None:
                k0 = solver.matrix()
            k0_td = None if own or not compute_cov else k_td.get("nngp")
            matrices = k_td.get(name), k0, k0_td, k_tt
            known = solver.variable(), solver.eigen()
            mean, cov = _distribution(self.layout, compute_cov, *known, self.y, *times, *matrices)
            results[name] = Gaussian(mean, cov) if compute_cov else mean
        return results


def _eager_where(concrete: bool):
    import contextlib

    return jax.ensure_compile_time_eval() if concrete else contextlib.nullcontext()


def _needed(names: tuple[str, ...], compute_cov: bool) -> tuple[str, ...]:
    """Kernels that predictions of `names` need: covariances of 'ntk' need the NNGP too."""
    if compute_cov and "nngp" not in names:
        return (*names, "nngp")
    return tuple(names)


def _kernels(
    kernel_fn: KernelFn, x1: PyTree, x2: PyTree, names: tuple[str, ...], kwargs: dict[str, Any]
) -> dict[str, Array]:
    """The kernels `names` as a dictionary; one call for all of them."""
    if len(names) == 1:
        result = kernel_fn(x1, x2, names[0], **kwargs)
        return {names[0]: kernel_of(result, names[0], caller=CALLER, argument="kernel_fn(...)")}
    result = kernel_fn(x1, x2, names, **kwargs)
    return {n: kernel_of(result, n, caller=CALLER, argument="kernel_fn(...)") for n in names}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _distribution(
    layout: Layout,
    compute_cov: bool,
    k: Array | None,
    eigen: tuple[Array, Array],
    y: Array,
    t: Array,
    rate: Array,
    k_td: Any,
    k0: Any,
    k0_td: Any,
    k_tt: Any,
) -> tuple[Array, Array | None]:
    """Mean and covariance at times `t`, on the training set if `k_td` is None.

    `k0`, `k0_td`: the covariance of (train, train) and (test, train) at t = 0; `k0_td` is None
    where it is `k_td`.
    """
    n, dtype = layout.rows, eigen[0].dtype
    flat = (t * rate).reshape(-1, 1)
    apply = lambda kind, times, rhs, left=None: function_product(
        kind, layout.size, k, eigen, times, rhs, left
    )
    rhs = layout.targets(y.astype(dtype))
    cov = None
    if k_td is None:
        kept, mean = layout.kept_shape, apply("risen", flat, rhs)
        if compute_cov:
            # exp(−Θ t / s): what is left of the initial draw.
            left = jnp.eye(n, dtype=dtype) - apply("risen", flat, jnp.eye(n, dtype=dtype))
            inner = jnp.matmul(matrix(k0).astype(dtype), left, precision=HIGHEST)
            cov = jnp.matmul(left, inner, precision=HIGHEST)
    else:
        kept = k_td.shape[0::2]
        weights = apply("integrated", flat, rhs)
        mean = jnp.matmul(matrix(k_td).astype(dtype), weights, precision=HIGHEST)
        if compute_cov:
            cross, prior = matrix(k_td).astype(dtype).T, matrix(k_tt).astype(dtype)
            if k0_td is None:
                cov = prior - apply("integrated", 2 * flat, cross, cross)
            else:
                response = apply("integrated", flat, cross)
                first, first_td = matrix(k0).astype(dtype), matrix(k0_td).astype(dtype)
                cov = propagated(prior, first, first_td, response)
    if cov is not None:
        cov = from_matrix(symmetric(cov), kept, kept, t.shape)
    return layout.restore(mean, kept, t.shape), cov


def _test_train_kwargs(test: dict[str, Any], train: dict[str, Any]) -> dict[str, Any]:
    """Arguments for (test, train): first halves of the test pairs, second of the training pairs."""
    merged: dict[str, Any] = {}
    for name in {**train, **test}:
        if name not in test:
            # Not necessarily one half for each side: the parameters of a layer are a pair too.
            merged[name] = train[name]
            continue
        if name not in train:
            if _is_pair(test[name]):
                raise ValueError(
                    f"{CALLER}: {name} is a pair of arrays, but the training arguments have none: "
                    f"pass {name} both to gradient_descent_mse_ensemble and to predict_fn."
                )
            merged[name] = test[name]
            continue
        first, second = test[name], train[name]
        if _is_pair(first) and _is_pair(second):
            merged[name] = (first[0], second[1])
        elif name == "rng" and first is not None and second is not None:
            merged[name] = first if _equal(first, second) else (first, second)
        elif _equal(first, second):
            merged[name] = first
        else:
            raise ValueError(
                f"{CALLER}: {name} is {second!r} for the training set but {first!r} for the test "
                "set: kernels between the two need one value, or a pair for each."
            )
    return merged


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and not isinstance(value[0], str)


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    leaves_a, leaves_b = jax.tree.leaves(a), jax.tree.leaves(b)
    if len(leaves_a) != len(leaves_b):
        return False
    if not is_concrete(a, b):
        return all(x is y for x, y in zip(leaves_a, leaves_b))
    return all(
        np.shape(x) == np.shape(y) and bool(np.all(np.asarray(x) == np.asarray(y)))
        for x, y in zip(leaves_a, leaves_b)
    )
