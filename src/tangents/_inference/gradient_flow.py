"""Gradient flow on the mean squared error, in closed form (Lee et al. 2019, eq. 8 and 9)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tangents._core.precision import DEFAULT as HIGHEST
from tangents._core.typing import Array, Axes
from tangents._inference.eigenspace import Factorisation
from tangents._inference.layout import (
    Layout,
    as_matrix_argument,
    floating,
    is_concrete,
    matrix,
)
from tangents._inference.matrix_functions import function_product
from tangents._inference.predictor import Predictor, remembered


@remembered
def gradient_descent_mse(
    k_train_train: Array,
    y_train: Array,
    learning_rate: float = 1.0,
    diag_reg: float = 0.0,
    diag_reg_absolute_scale: bool = False,
    trace_axes: Axes = (-1,),
) -> Predictor:
    r"""Outputs during gradient flow on the mean squared error, with a constant kernel.

    The loss is ½ · mean((f − y)²) over *all* outputs, so with s = `y_train.size` and step size η

        f_train(t) = f_train(0) + (1 − exp(−η t Θ / s)) (y − f_train(0))
        f_test(t)  = f_test(0) + Θ_test,train Θ⁻¹ (1 − exp(−η t Θ / s)) (y − f_train(0)).

    `k steps` of gradient descent with learning rate η correspond to t = k. For a singular Θ the
    second line is its limit: the zero eigenspace contributes t / s at finite t and nothing at
    infinity (the pseudo-inverse).

    Args:
        k_train_train: kernel of the training set: the axes of `y_train` in pairs, without
            `trace_axes`, e.g. (n, n) for targets (n, c), or (n, n, c, c) with `trace_axes=()`.
        y_train: targets, e.g. (n, c).
        learning_rate: η; it only multiplies time.
        diag_reg: added to the diagonal of the kernel, as a multiple of its mean.
        diag_reg_absolute_scale: whether `diag_reg` is added as it is.
        trace_axes: axes of `y_train` over which the kernel is a multiple of the identity.

    Returns:
        `predict_fn(t=None, fx_train_0=0., fx_test_0=None, k_test_train=None)`. `t` is a number or
        an array of times of any shape, which leads the shape of the result; `None` is infinity.
        `fx_train_0`, `fx_test_0` are the outputs at t = 0 (numbers broadcast). The result is the
        training outputs; the pair (train, test) if `fx_test_0` is given, for which `k_test_train`
        (m, n) is needed; the test outputs alone if `fx_train_0` is None (then it counts as 0).
        It may be called under `jit`, `vmap` and `grad`, also where eigenvalues of the kernel
        coincide. The eigendecomposition is computed at the first finite time and kept, the Cholesky
        factor at the first call without a time.

    Raises:
        TypeError: if a `Kernel` is passed where a matrix is needed.
        ValueError: if shapes do not fit, or at infinite time if the kernel has an eigenvalue that
            is negative beyond rounding.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import predict
        >>> k = jnp.array([[2., 1.], [1., 2.]])
        >>> predict_fn = predict.gradient_descent_mse(k, jnp.array([[1.], [3.]]))
        >>> predict_fn(t=None).tolist()
        [[1.0], [3.0]]
        >>> predict_fn(jnp.array([0., 1., 2.])).shape
        (3, 2, 1)
    """
    caller = "gradient_descent_mse"
    k = as_matrix_argument(k_train_train, caller=caller, argument="k_train_train")
    y = as_targets(y_train, caller=caller)
    layout = Layout.of(y.shape, trace_axes, caller=caller)
    layout.check_train(k, caller=caller)
    dtype = floating(k, y)
    y = y.astype(dtype)
    factors = Factorisation(
        matrix(k).astype(dtype), diag_reg, diag_reg_absolute_scale, caller=caller
    )

    def predict_fn(
        t: Any = None, fx_train_0: Any = 0.0, fx_test_0: Any = None, k_test_train: Any = None
    ):
        """Outputs at time `t` (None: infinity); see `gradient_descent_mse`."""
        k_td = check_test_arguments(fx_train_0, fx_test_0, k_test_train, layout, caller)
        train_0 = as_start(fx_train_0, dtype, layout.shape, caller, "fx_train_0")
        test_0 = None
        if fx_test_0 is not None:
            shape = layout.output_shape(k_td.shape[0::2])
            test_0 = as_start(fx_test_0, dtype, shape, caller, "fx_test_0")
        if t is None:
            outputs = _at_infinity(factors, layout, y, train_0, test_0, k_td)
        else:
            times = as_times(t, dtype, caller), jnp.asarray(learning_rate, dtype)
            known = factors.variable(), factors.eigen()
            outputs = _at_times(layout, *known, y, *times, train_0, test_0, k_td)
        train, test = outputs
        return test if train is None else train if test is None else (train, test)

    return Predictor(predict_fn, factors.computed, factors.take_over)


@functools.partial(jax.jit, static_argnums=0)
def _at_times(
    layout: Layout,
    k: Array | None,
    eigen: tuple[Array, Array],
    y: Array,
    t: Array,
    rate: Array,
    train_0: Array | None,
    test_0: Array | None,
    k_td: Array | None,
) -> tuple[Array | None, Array | None]:
    """Training and test outputs at times `t` of any shape; None where no start is given."""
    flat = (t * rate).reshape(-1, 1)
    rhs = _residual(layout, y, train_0)
    train = test = None
    if train_0 is not None:
        change = function_product("risen", layout.size, k, eigen, flat, rhs)
        train = train_0 + layout.restore(change, layout.kept_shape, t.shape)
    if test_0 is not None:
        weights = function_product("integrated", layout.size, k, eigen, flat, rhs)
        test = outputs_of_weights(k_td, weights, test_0, layout, t.shape)
    return train, test


def _at_infinity(
    factors: Factorisation,
    layout: Layout,
    y: Array,
    train_0: Array | None,
    test_0: Array | None,
    k_td: Array | None,
) -> tuple[Array | None, Array | None]:
    rhs = _residual(layout, y, train_0)
    train = test = None
    if test_0 is not None:
        test = outputs_of_weights(k_td, factors.solve(rhs)[None], test_0, layout, ())
    if train_0 is not None:
        usable = factors.usable()
        if is_concrete(usable) and usable:
            # The limit is the targets themselves, not the targets to rounding.
            return y, test
        change = layout.restore(factors.project(rhs), layout.kept_shape, ())
        train = jnp.where(usable, y, train_0 + change)
    return train, test


@functools.partial(jax.jit, static_argnums=0)
def _residual(layout: Layout, y: Array, train_0: Array | None) -> Array:
    """What is to be learned, (rows, traced)."""
    return layout.targets(y if train_0 is None else y - train_0)


@functools.partial(jax.jit, static_argnums=(3, 4))
def outputs_of_weights(
    k_td: Array, weights: Array, test_0: Array, layout: Layout, leading: tuple[int, ...]
) -> Array:
    """f_test(0) + K_test,train · weights: `weights` (T, rows, traced)."""
    change = jnp.matmul(matrix(k_td).astype(weights.dtype), weights, precision=HIGHEST)
    return test_0 + layout.restore(change, k_td.shape[0::2], leading)


def as_targets(y_train: Any, *, caller: str) -> Array:
    """Targets as a floating-point array."""
    if hasattr(y_train, "nngp") or not hasattr(y_train, "shape"):
        raise TypeError(f"{caller}: y_train is a {type(y_train).__name__}; pass an array, (n, c).")
    y = jnp.asarray(y_train)
    return y if jnp.issubdtype(y.dtype, jnp.floating) else y.astype(jnp.result_type(float))


def as_times(t: Any, dtype: Any, caller: str) -> Array:
    """Times as an array; negative or undefined ones raise where they can be seen."""
    if is_concrete(t):
        values = np.asarray(t, np.float64)
        if not (values >= 0).all():
            raise ValueError(
                f"{caller}: t={t} has times that are negative or NaN; time starts at 0."
            )
    return jnp.asarray(t, dtype)


def as_start(
    values: Any, dtype: Any, shape: tuple[int, ...], caller: str, argument: str
) -> Array | None:
    """Initial outputs as an array that broadcasts to `shape`; None stays None."""
    if values is None:
        return None
    values = jnp.asarray(values, dtype)
    try:
        fits = np.broadcast_shapes(values.shape, shape) == shape
    except ValueError:
        fits = False
    return values if fits else broadcast_start(values, shape, caller, argument)


def broadcast_start(values: Array, shape: tuple[int, ...], caller: str, argument: str) -> Array:
    """Initial outputs broadcast to the shape of the outputs."""
    try:
        return jnp.broadcast_to(values, shape)
    except ValueError:
        raise ValueError(
            f"{caller}: {argument} has shape {values.shape}, but the outputs have shape {shape}: "
            "pass an array of that shape or a number."
        ) from None


def check_test_arguments(
    fx_train_0: Any, fx_test_0: Any, k_test_train: Any, layout: Layout, caller: str
) -> Any:
    """The kernel that the test outputs need, None without them; errors for what is missing."""
    if fx_train_0 is None and fx_test_0 is None:
        raise ValueError(
            f"{caller}: fx_train_0 and fx_test_0 are both None, so there is nothing to predict: "
            "pass the outputs at t=0 of at least one set (0. for a network centred at zero)."
        )
    if fx_test_0 is None:
        return None
    if k_test_train is None:
        raise ValueError(
            f"{caller}: fx_test_0 is given, so k_test_train is needed too, e.g. "
            "kernel_fn(x_test, x_train, 'ntk')."
        )
    k_td = as_matrix_argument(k_test_train, caller=caller, argument="k_test_train")
    layout.check_test(k_td, caller=caller)
    return k_td
