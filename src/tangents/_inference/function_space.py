"""Gradient flow of any loss in function space, with or without momentum, as an ODE.

Without momentum (Lee et al. 2019, eq. 5 and 6), with the gradient taken with respect to outputs:

    d f_train / dt = −η Θ_train,train ∇L(f_train),     d f_test / dt = −η Θ_test,train ∇L(f_train).

With momentum m, heavy-ball steps x ← x + v, v ← m v − η ∇L become, at a step size of √η,

    d f / dt = q,     d q / dt = −Θ ∇L(f_train) + (m − 1) / √η · q,      t counted in units of √η.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tangents._core.precision import DEFAULT as HIGHEST
from tangents._core.typing import Array, Axes
from tangents._inference.gradient_flow import (
    as_targets,
    as_times,
    broadcast_start,
    check_test_arguments,
)
from tangents._inference.layout import (
    Layout,
    as_matrix_argument,
    floating,
    is_concrete,
    matrix,
)
from tangents._inference.predictor import Predictor, remembered


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ODEState:
    """Outputs, and with momentum their velocities, of `predict.gradient_descent` at some time.

    Attributes:
        fx_train: training outputs, the shape of the targets.
        fx_test: test outputs, or None.
        qx_train: velocity of the training outputs; only with momentum (None counts as 0).
        qx_test: velocity of the test outputs; only with momentum.
    """

    fx_train: Array | None = None
    fx_test: Array | None = None
    qx_train: Array | None = None
    qx_test: Array | None = None


Loss = Callable[[Array, Array], Array]


@remembered
def gradient_descent(
    loss: Loss,
    k_train_train: Array,
    y_train: Array,
    learning_rate: float = 1.0,
    momentum: float | None = None,
    trace_axes: Axes = (-1,),
    *,
    solver: Any = None,
    rtol: float | None = None,
    atol: float | None = None,
    max_steps: int = 100_000,
) -> Predictor:
    r"""Outputs during gradient flow on any differentiable loss, with a constant kernel.

    d f / dt = −η Θ ∇L(f_train): the loss's own normalisation counts (`jnp.mean` and `jnp.sum`
    differ by a factor in time). `t = k` stands for k steps of gradient descent; with momentum, for
    k steps of `v ← m v − η ∇L, w ← w + v`.

    Args:
        loss: `loss(fx, y_train) -> scalar`, differentiable in `fx`.
        k_train_train: kernel of the training set, (n, n) for targets (n, c), or with the axes of
            `y_train` in pairs where they are not in `trace_axes`.
        y_train: whatever `loss` takes as its second argument, in the shape of the outputs.
        learning_rate: η.
        momentum: m in [0, 1), or None for plain gradient flow.
        trace_axes: axes of `y_train` over which the kernel is a multiple of the identity.
        solver: a diffrax solver; 'odeint' for `jax.experimental.ode.odeint`; None takes diffrax's
            `Tsit5` where diffrax is installed and 'odeint' otherwise. Stiff problems (large
            t·λ_max) are served by an implicit one such as `diffrax.Kvaerno5()`.
        rtol: relative error of a step that is tolerated; the step size follows from it (diffrax: a
            PID controller). Default: 1.4e-8 in float64, 1e-6 in float32.
        atol: absolute error of a step that is tolerated; the same default.
        max_steps: steps after which diffrax gives up.

    Returns:
        `predict_fn(t=None, fx_train_or_state_0=0., fx_test_0=None, k_test_train=None)`. `t`: a time
        or an array of times of any shape, strictly increasing in row-major order, whose axes lead
        in the results; `None` or infinity runs until the outputs no longer move, that is until a
        doubling of the time changes them by less than 100 tolerances; a loss without a minimum at
        finite outputs (cross-entropy) never gets there. Results as in `gradient_descent_mse`; if
        the second argument is an `ODEState`, one is returned, whose `fx_test` replaces `fx_test_0`.
        It may be called under `jit` and `vmap`.

    Raises:
        ValueError: if shapes do not fit, if times do not increase, or if velocities are given
            without momentum.
        ImportError: if a diffrax solver is asked for and diffrax is missing: `tangents[ode]`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import predict
        >>> k = jnp.array([[2., 1.], [1., 2.]])
        >>> loss = lambda fx, y: 0.5 * jnp.mean((fx - y) ** 2)
        >>> flow = predict.gradient_descent(loss, k, jnp.array([[1.], [3.]]))
        >>> flow(jnp.array([1., 2.])).shape
        (2, 2, 1)
    """
    caller = "gradient_descent"
    k = as_matrix_argument(k_train_train, caller=caller, argument="k_train_train")
    y = as_targets(y_train, caller=caller)
    layout = Layout.of(y.shape, trace_axes, caller=caller)
    layout.check_train(k, caller=caller)
    dtype = floating(k, y)
    y, k = y.astype(dtype), matrix(k).astype(dtype)
    slope = jax.grad(lambda fx: loss(fx, y))
    rate = jnp.asarray(learning_rate, dtype)
    if momentum is not None:
        rate = jnp.sqrt(rate)
    friction = None if momentum is None else (jnp.asarray(momentum, dtype) - 1) / rate
    tolerance = 1.4e-8 if dtype == jnp.float64 else 1e-6
    rtol, atol = rtol or tolerance, atol or tolerance

    def derivative(state: ODEState, k_td: Array | None) -> ODEState:
        force = layout.targets(-slope(state.fx_train))
        train = layout.restore(jnp.matmul(k, force, precision=HIGHEST), layout.kept_shape, ())
        test = None
        if state.fx_test is not None and k_td is not None:
            pushed = jnp.matmul(matrix(k_td), force, precision=HIGHEST)
            test = layout.restore(pushed, k_td.shape[0::2], ())
        if friction is None:
            return ODEState(train, test)
        train = train + friction * state.qx_train  # pyright: ignore[reportOperatorIssue]
        if test is not None:
            test = test + friction * state.qx_test  # pyright: ignore[reportOperatorIssue]
        return ODEState(state.qx_train, state.qx_test, train, test)

    def predict_fn(
        t: Any = None,
        fx_train_or_state_0: Any = 0.0,
        fx_test_0: Any = None,
        k_test_train: Any = None,
    ):
        """Outputs or state at time `t` (None: infinity); see `gradient_descent`."""
        state, k_td = _start(
            fx_train_or_state_0,
            fx_test_0,
            k_test_train,
            layout,
            dtype,
            momentum is not None,
            caller,
        )
        times = as_times(jnp.inf if t is None else t, dtype, caller)
        _check_increasing(t, times, caller)
        flat = times.reshape(-1) * rate
        field = lambda s: derivative(s, k_td)
        last_infinite = t is None or (is_concrete(t) and bool(np.isinf(np.asarray(t)).any()))
        out = _integrate(field, state, flat, solver, rtol, atol, max_steps, last_infinite, caller)
        out = jax.tree.map(lambda a: a.reshape(times.shape + a.shape[1:]), out)
        if isinstance(fx_train_or_state_0, ODEState):
            return out
        if fx_train_or_state_0 is None:
            return out.fx_test
        return out.fx_train if out.fx_test is None else (out.fx_train, out.fx_test)

    return Predictor(predict_fn)


def _start(
    fx: Any,
    fx_test_0: Any,
    k_test_train: Any,
    layout: Layout,
    dtype: Any,
    moving: bool,
    caller: str,
) -> tuple[ODEState, Array | None]:
    """The state at t = 0 and the kernel of the test outputs."""
    given = fx if isinstance(fx, ODEState) else ODEState(fx_train=fx, fx_test=fx_test_0)
    if isinstance(fx, ODEState) and fx_test_0 is not None:
        raise ValueError(
            f"{caller}: fx_test_0 is given beside an ODEState: put it into the state, "
            "ODEState(fx_train, fx_test)."
        )
    if not moving and (given.qx_train is not None or given.qx_test is not None):
        raise ValueError(
            f"{caller}: the state has velocities (qx_train, qx_test) but momentum=None: pass "
            "momentum, or an ODEState without them."
        )
    k_td = check_test_arguments(given.fx_train, given.fx_test, k_test_train, layout, caller)

    def filled(value: Any, shape: tuple[int, ...], argument: str) -> Array:
        start = jnp.asarray(0.0 if value is None else value, dtype)
        return broadcast_start(start, shape, caller, argument)

    train_shape = layout.shape
    fx_train = filled(given.fx_train, train_shape, "fx_train_0")
    qx_train = filled(given.qx_train, train_shape, "qx_train") if moving else None
    if given.fx_test is None:
        return ODEState(fx_train, None, qx_train, None), None
    test_shape = layout.output_shape(k_td.shape[0::2])
    fx_test = filled(given.fx_test, test_shape, "fx_test_0")
    qx_test = filled(given.qx_test, test_shape, "qx_test") if moving else None
    return ODEState(fx_train, fx_test, qx_train, qx_test), k_td.astype(dtype)


def _check_increasing(t: Any, times: Array, caller: str) -> None:
    if times.ndim and is_concrete(t) and not (np.diff(np.ravel(t).astype(np.float64)) > 0).all():
        raise ValueError(
            f"{caller}: times must strictly increase in row-major order, got t={t} of shape "
            f"{times.shape}."
        )


def _integrate(
    field: Callable[[ODEState], ODEState],
    state: ODEState,
    times: Array,
    solver: Any,
    rtol: float,
    atol: float,
    max_steps: int,
    last_infinite: bool,
    caller: str,
) -> ODEState:
    """States at `times`, with a leading axis; the last time may be infinite."""
    finite = times[:-1] if last_infinite else times
    parts = []
    if solver is None:
        solver = "diffrax" if _has_diffrax() else "odeint"
    if isinstance(solver, str) and solver not in ("odeint", "diffrax"):
        raise ValueError(f"{caller}: solver={solver!r}: pass a diffrax solver, 'odeint' or None.")
    run = _odeint if solver == "odeint" else _diffrax(solver, max_steps, caller)
    if finite.shape[0]:
        parts.append(run(field, state, finite, rtol, atol))
    if last_infinite:
        if parts:
            state = jax.tree.map(lambda a: a[-1], parts[0])
        parts.append(_to_rest(run, field, state, rtol, atol))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def _has_diffrax() -> bool:
    from importlib.util import find_spec

    return find_spec("diffrax") is not None


def _odeint(field, state, times, rtol, atol):
    from jax.experimental.ode import odeint

    # odeint wants strictly increasing times that begin at the start, which may be asked for itself:
    # start a hair earlier, where that changes nothing.
    hair = jnp.where(times[0] == 0, -1e-24, 0).astype(times.dtype)
    out = odeint(
        lambda s, _: field(s), state, jnp.concatenate([hair[None], times]), rtol=rtol, atol=atol
    )
    return jax.tree.map(lambda a: a[1:], out)


def _diffrax(solver: Any, max_steps: int, caller: str):
    try:
        import diffrax
    except ImportError:
        raise ImportError(
            f"{caller}: this solver needs diffrax: pip install 'tangents[ode]', or pass "
            "solver='odeint'."
        ) from None
    chosen = diffrax.Tsit5() if isinstance(solver, str) else solver

    def run(field, state, times, rtol, atol):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, s, _: field(s)),
            chosen,
            t0=jnp.zeros((), times.dtype),
            t1=times[-1],
            dt0=None,
            y0=state,
            saveat=diffrax.SaveAt(ts=times),
            stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
            max_steps=max_steps,
        )
        return solution.ys

    return run


def _to_rest(
    run, field, state: ODEState, rtol: float, atol: float, doublings: int = 40
) -> ODEState:
    """The state where it no longer moves: until a doubling of the time changes nothing.

    Speed is no criterion: slow modes cannot be told from the solver's own error by it.
    """

    def largest(tree: ODEState) -> Array:
        return jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(tree)]).max()

    def moving(carry) -> Array:
        _, _, change, doubling = carry
        return (change > 100 * (rtol + atol)) & (doubling < doublings)

    def further(carry):
        current, horizon, _, doubling = carry
        later = jax.tree.map(lambda a: a[-1], run(field, current, horizon[None], rtol, atol))
        change = largest(jax.tree.map(lambda a, b: (a - b) / (1 + jnp.abs(b)), later, current))
        return later, 2 * horizon, change, doubling + 1

    # The first horizon is the time in which the outputs would move by their own size.
    speed = largest(field(state))
    first = (1 + largest(state)) / jnp.where(speed > 0, speed, 1)
    carry = (state, first, speed * first, jnp.zeros((), jnp.int32))
    carry = jax.lax.while_loop(moving, further, carry)
    return jax.tree.map(lambda a: a[None], carry[0])
