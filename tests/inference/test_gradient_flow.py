"""Gradient flow in closed form and as an ODE: identities and limits."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from tangents import predict

N, M, C = 6, 3, 2


def problem(seed=0, n=N, m=M, c=C, rank=None):
    """A joint kernel of train and test, targets and initial outputs."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n + m, rank or 3 * (n + m)))
    joint = features @ features.T / features.shape[1]
    array = lambda a: jnp.asarray(a, jnp.result_type(float))
    return (
        array(joint[:n, :n]),
        array(joint[n:, :n]),
        array(joint[n:, n:]),
        array(rng.normal(size=(n, c))),
        array(rng.normal(size=(n, c))),
        array(rng.normal(size=(m, c))),
    )


@pytest.fixture
def close(x64):
    def check(a, b, factor=1.0):
        tol = (1e-9 if x64 else 3e-4) * factor
        np.testing.assert_allclose(a, b, rtol=tol, atol=tol)

    return check


def by_matrix_exponential(k, k_td, y, f, ft, t):
    """The flow of (train, test) as one linear system: the slow and obvious reference."""
    k, k_td, y, f, ft = (np.asarray(a, np.float64) for a in (k, k_td, y, f, ft))
    n, m = k.shape[0], k_td.shape[0]
    system = np.zeros((n + m, n + m))
    system[:n, :n], system[n:, :n] = -k / y.size, -k_td / y.size
    flow = scipy.linalg.expm(system * t) @ np.concatenate([f - y, ft])
    return flow[:n] + y, flow[n:]


@pytest.mark.parametrize("t", [0.0, 0.3, 25.0])
def test_closed_form_is_the_matrix_exponential(t, close):
    k, k_td, _, y, f, ft = problem()
    got = predict.gradient_descent_mse(k, y)(t, f, ft, k_td)
    for a, b in zip(got, by_matrix_exponential(k, k_td, y, f, ft, t), strict=True):
        close(a, b)


def test_start_and_limit(close):
    k, k_td, _, y, f, ft = problem()
    predict_fn = predict.gradient_descent_mse(k, y)
    start = predict_fn(0.0, f, ft, k_td)
    np.testing.assert_array_equal(start[0], f)
    np.testing.assert_array_equal(start[1], ft)
    train, test = predict_fn(None, f, ft, k_td)
    np.testing.assert_array_equal(train, y)
    close(test, ft + k_td @ jnp.linalg.solve(k, y - f), 10)
    for t in (jnp.inf, 1e9):
        close(predict_fn(t, f, ft, k_td)[1], test, 100)


def test_small_eigenvalues_count_at_infinity():
    # In float32 below n ε λ_max, the bound of rounding for the worst case, and above what it is.
    n = 200
    rng = np.random.default_rng(2)
    basis, _ = np.linalg.qr(np.concatenate([np.ones((n, 1)), rng.normal(size=(n, n - 1))], axis=1))
    values = np.full(n, 6e-4)
    values[0] = 100
    k = jnp.asarray((basis * values) @ basis.T)
    y = jnp.asarray(basis[:, 1:2])
    predict_fn = predict.gradient_descent_mse(k, y)
    np.testing.assert_allclose(predict_fn(jnp.inf, None, 0.0, k), y, atol=0.02)
    np.testing.assert_allclose(predict_fn(None, None, 0.0, k), y, atol=0.02)


def test_learning_rate_is_a_unit_of_time(close):
    k, _, _, y, f, _ = problem()
    close(
        predict.gradient_descent_mse(k, y, 0.25)(8.0, f), predict.gradient_descent_mse(k, y)(2.0, f)
    )


def test_ridge_to_zero(close):
    k, k_td, _, y, _, _ = problem()
    limit = predict.gradient_descent_mse(k, y)(None, 0.0, 0.0, k_td)[1]
    sizes = [1e-2, 1e-3, 1e-4]
    errors = [
        float(
            jnp.abs(
                predict.gradient_descent_mse(k, y, diag_reg=r)(None, 0.0, 0.0, k_td)[1] - limit
            ).max()
        )
        for r in sizes
    ]
    assert errors[0] > 5 * errors[1] > 25 * errors[2]


def test_relative_and_absolute_ridge(close):
    k, k_td, _, y, _, _ = problem()
    mean = float(jnp.mean(jnp.diagonal(k)))
    a = predict.gradient_descent_mse(k, y, diag_reg=0.1)(3.0, None, 0.0, k_td)
    b = predict.gradient_descent_mse(k, y, diag_reg=0.1 * mean, diag_reg_absolute_scale=True)
    close(a, b(3.0, None, 0.0, k_td))


def test_times_of_any_shape(close):
    k, k_td, _, y, f, ft = problem()
    predict_fn = predict.gradient_descent_mse(k, y)
    times = np.array([[0.0, 1.0], [2.0, np.inf]])
    train, test = predict_fn(times, f, ft, k_td)
    assert train.shape == (2, 2, N, C) and test.shape == (2, 2, M, C)
    for i in np.ndindex(2, 2):
        a, b = predict_fn(times[i], f, ft, k_td)
        close(train[i], a)
        close(test[i], b)


def test_trace_axes_are_a_kronecker_factor(close):
    k, k_td, _, y, f, ft = problem()
    eye = jnp.eye(C)
    full = jnp.einsum("ij,ab->ijab", k, eye)
    full_td = jnp.einsum("ij,ab->ijab", k_td, eye)
    for t in (None, 2.0):
        traced = predict.gradient_descent_mse(k, y)(t, f, ft, k_td)
        untraced = predict.gradient_descent_mse(full, y, trace_axes=())(t, f, ft, full_td)
        first = predict.gradient_descent_mse(k, y.T, trace_axes=0)(t, f.T, ft.T, k_td)
        for a, b, c in zip(traced, untraced, first, strict=True):
            close(a, b)
            close(a, c.T)


def test_singular_kernel_has_its_limits(close):
    k, k_td, _, y, f, ft = problem(rank=3)
    predict_fn = predict.gradient_descent_mse(k, y)
    for t in (0.7, 40.0):
        got = predict_fn(t, f, ft, k_td)
        for a, b in zip(got, by_matrix_exponential(k, k_td, y, f, ft, t), strict=True):
            close(a, b, 10)
    # At infinity: what the kernel cannot reach stays, and the test outputs have a finite limit.
    eager = predict_fn(None, f, ft, k_td)
    k64, y64, f64 = (np.asarray(a, np.float64) for a in (k, y, f))
    inverse = np.linalg.pinv(k64, rcond=1e-6, hermitian=True)
    close(eager[0], f64 + k64 @ inverse @ (y64 - f64), 10)
    close(eager[1], ft + np.asarray(k_td, np.float64) @ inverse @ (y64 - f64), 100)
    traced = jax.jit(predict_fn)(None, f, ft, k_td)
    for a, b in zip(eager, traced, strict=True):
        close(a, b, 100)


def test_zero_eigenvalue_contributes_time():
    k = jnp.diag(jnp.array([1.0, 0.0]))
    predict_fn = predict.gradient_descent_mse(k, jnp.array([[0.0], [1.0]]))
    test = predict_fn(3.0, None, 0.0, jnp.array([[0.0, 1.0]]))
    np.testing.assert_allclose(test, [[1.5]], rtol=1e-6)  # t / s


def test_indefinite_kernel_is_an_error_with_a_remedy():
    k = jnp.array([[1.0, 2.0], [2.0, 1.0]])
    predict_fn = predict.gradient_descent_mse(k, jnp.ones((2, 1)))
    with pytest.raises(ValueError, match=r"smallest eigenvalue is -1, .* Pass diag_reg=2"):
        predict_fn(None, 0.0, 0.0, k)


def test_jit_vmap_and_no_leaks(close):
    k, k_td, _, y, f, ft = problem()
    predict_fn = predict.gradient_descent_mse(k, y)
    times = jnp.array([0.5, 2.0, 9.0])
    # Called under transformations first: what these leave behind must serve the eager call.
    with jax.checking_leaks():
        traced = jax.jit(predict_fn)(times, f, ft, k_td)
        mapped = jax.vmap(lambda t: predict_fn(t, f, ft, k_td))(times)
        infinite = jax.jit(lambda f: predict_fn(None, f, ft, k_td))(f)
    for a, b, c in zip(predict_fn(times, f, ft, k_td), traced, mapped, strict=True):
        close(a, b)
        close(a, c)
    close(infinite[1], predict_fn(None, f, ft, k_td)[1], 10)

    def made_inside(k, y):
        inner = predict.gradient_descent_mse(k, y)
        return inner(1.0, f, ft, k_td)[1], inner(None, f, ft, k_td)[1]

    both = jax.vmap(made_inside)(jnp.stack([k, 2 * k]), jnp.stack([y, y]))
    close(both[0][1], predict.gradient_descent_mse(2 * k, y)(1.0, f, ft, k_td)[1], 10)
    close(both[1][0], predict_fn(None, f, ft, k_td)[1], 100)


def test_errors_say_what_to_pass():
    k, k_td, _, y, _f, ft = problem()
    kernel = collections.namedtuple("Kernel", "nngp ntk")(k, k)
    with pytest.raises(TypeError, match=r"k_train_train is a Kernel object.*k_train_train.ntk"):
        predict.gradient_descent_mse(kernel, y)
    with pytest.raises(ValueError, match=r"1-D y_train.*trace_axes=\(\)"):
        predict.gradient_descent_mse(k, y[:, 0])
    with pytest.raises(ValueError, match=r"has shape \(6, 6\).*needs \(6, 6, 2, 2\)"):
        predict.gradient_descent_mse(k, y, trace_axes=())
    with pytest.raises(ValueError, match=r"trace_axes=\(2,\) is out of range: y_train has shape"):
        predict.gradient_descent_mse(k, y, trace_axes=2)
    predict_fn = predict.gradient_descent_mse(k, y)
    with pytest.raises(ValueError, match="both None"):
        predict_fn(1.0, None, None)
    with pytest.raises(ValueError, match="k_test_train is needed"):
        predict_fn(1.0, 0.0, ft)
    with pytest.raises(ValueError, match=r"transposed\? Pass k_test_train.T"):
        predict_fn(1.0, 0.0, ft, k_td.T)
    with pytest.raises(ValueError, match="negative"):
        predict_fn(-1.0)
    with pytest.raises(ValueError, match=r"fx_test_0 has shape \(6, 2\)"):
        predict_fn(1.0, 0.0, y, k_td)


def mse(fx, y):
    return 0.5 * jnp.mean((fx - y) ** 2)


@pytest.mark.parametrize("solver", ["diffrax", "odeint"])
def test_ode_is_the_closed_form_for_mse(solver, x64):
    k, k_td, _, y, f, ft = problem()
    times = jnp.array([0.0, 1.0, 30.0])
    exact = predict.gradient_descent_mse(k, y, 0.5)(times, f, ft, k_td)
    flow = predict.gradient_descent(mse, k, y, 0.5, solver=solver)
    tol = 1e-6 if x64 else 1e-4
    for a, b in zip(flow(times, f, ft, k_td), exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=tol, atol=tol)


def test_ode_at_times_of_any_shape():
    k, k_td, _, y, f, ft = problem()
    flow = predict.gradient_descent(mse, k, y, solver="odeint")
    times = jnp.array([[[0.0, 1.0, 2.0]], [[3.0, 5.0, 8.0]]])
    shaped, flat = flow(times, f, ft, k_td), flow(times.ravel(), f, ft, k_td)
    for a, b in zip(shaped, flat, strict=True):
        np.testing.assert_array_equal(a, b.reshape(times.shape + b.shape[1:]))


@pytest.mark.parametrize("solver", ["diffrax", "odeint"])
def test_ode_comes_to_rest(solver, x64):
    k, k_td, _, y, f, ft = problem(n=3, m=2)
    flow = predict.gradient_descent(mse, k + jnp.eye(3), y, solver=solver)
    limit = predict.gradient_descent_mse(k + jnp.eye(3), y)(None, f, ft, k_td)
    tol = 1e-5 if x64 else 1e-3
    for a, b in zip(flow(None, f, ft, k_td), limit, strict=True):
        np.testing.assert_allclose(a, b, rtol=tol, atol=tol)
    train, _ = jax.jit(lambda f: flow(np.array([1.0, np.inf]), f, ft, k_td))(f)
    np.testing.assert_allclose(train[1], y, rtol=tol, atol=tol)


def test_ode_under_vmap(x64):
    k, k_td, _, y, f, ft = problem(n=3, m=2)

    def outputs(k, y):
        return predict.gradient_descent(mse, k, y)(3.0, f, ft, k_td)

    mapped = jax.vmap(outputs)(jnp.stack([k, 2 * k]), jnp.stack([y, -y]))
    exact = predict.gradient_descent_mse(2 * k, -y)(3.0, f, ft, k_td)
    tol = 1e-6 if x64 else 1e-4
    for a, b in zip(mapped, exact, strict=True):
        np.testing.assert_allclose(a[1], b, rtol=tol, atol=tol)


def test_ode_follows_gradient_descent_with_momentum():
    """Discrete heavy-ball steps with a small rate, in function space."""
    k, _, _, y, _, _ = problem()
    loss = lambda fx, y: jnp.mean(jnp.logaddexp(0.0, -fx * y))
    rate, momentum, steps = 1e-3, 0.9, 500
    slope = jax.grad(loss)

    def step(carry, _):
        f, v = carry
        v = momentum * v - rate * k @ slope(f, y)
        return (f + v, v), None

    (discrete, _), _ = jax.lax.scan(step, (0 * y, 0 * y), None, length=steps)
    flow = predict.gradient_descent(loss, k, y, rate, momentum=momentum)
    np.testing.assert_allclose(flow(float(steps)), discrete, rtol=0.05)


def test_ode_state_continues(x64):
    k, k_td, _, y, f, ft = problem()
    flow = predict.gradient_descent(mse, k, y, momentum=0.5)
    whole = flow(5.0, predict.ODEState(f, ft), k_test_train=k_td)
    half = flow(2.0, predict.ODEState(f, ft), k_test_train=k_td)
    rest = flow(3.0, half, k_test_train=k_td)
    tol = 1e-6 if x64 else 1e-3
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(rest), strict=True):
        np.testing.assert_allclose(a, b, rtol=tol, atol=tol)


def test_ode_errors():
    k, k_td, _, y, f, ft = problem()
    flow = predict.gradient_descent(mse, k, y)
    with pytest.raises(ValueError, match="strictly increase"):
        flow(jnp.array([2.0, 1.0]))
    with pytest.raises(ValueError, match="velocities"):
        flow(1.0, predict.ODEState(f, qx_train=f))
    with pytest.raises(ValueError, match="put it into the state"):
        flow(1.0, predict.ODEState(f), ft, k_td)
    with pytest.raises(ValueError, match=r"row-major order, got (.|\n)* of shape \(2, 2\)"):
        flow(jnp.ones((2, 2)))
    with pytest.raises(ValueError, match="pass a diffrax solver"):
        predict.gradient_descent(mse, k, y, solver="euler")(1.0)


def test_largest_learning_rate_separates_convergence(close):
    """Gradient descent on ½ mean((f − y)²): stable just below, unstable just above."""
    k, _, _, y, f, _ = problem()
    rate = predict.max_learning_rate(k, y.size)

    def error_after(rate, steps=400):
        step = lambda _, e: e - rate * k @ e / y.size
        return float(jnp.linalg.norm(jax.lax.fori_loop(0, steps, step, f - y)))

    start = float(jnp.linalg.norm(f - y))
    assert error_after(0.97 * rate) < start < error_after(1.03 * rate)
    close(jax.jit(predict.max_learning_rate)(k), predict.max_learning_rate(k))
    close(jax.vmap(predict.max_learning_rate)(jnp.stack([k, 4 * k]))[1], rate * N / y.size / 4)
    full = jnp.einsum("ij,ab->ijab", k, jnp.eye(C))
    close(predict.max_learning_rate(full), rate)
    with pytest.raises(ValueError, match="pairs of equal axes"):
        predict.max_learning_rate(k[:3])
