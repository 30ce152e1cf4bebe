"""tangents.solve on prescribed spectra, and what it says when it cannot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tangents import SolveError, solve

N = 120


def prescribed(condition, n=N, seed=0, smallest=None):
    """A symmetric matrix with eigenvalues from 1 down to 1/condition, in float64 on the host."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(n, n)))
    values = np.logspace(0, -np.log10(condition), n)
    if smallest is not None:
        values[-1] = smallest
    k = (basis * values) @ basis.T
    return (k + k.T) / 2, rng.normal(size=(n, 3))


def as_float(a):
    return jnp.asarray(a, jnp.result_type(float))


def true_residual(k, result, y, ridge=0.0):
    k, y = np.asarray(k, np.float64), np.asarray(y, np.float64)
    x = np.asarray(result.value, np.float64)
    if result.correction is not None:
        x = x + np.asarray(result.correction, np.float64)
    r = y - k @ x - ridge * x
    return np.max(np.linalg.norm(r, axis=0) / np.linalg.norm(y, axis=0))


class Operator:
    """Only shape, dtype and @; `products` counts what runs, or is traced."""

    def __init__(self, k):
        self.k, self.shape, self.dtype, self.products = k, k.shape, k.dtype, 0

    def __matmul__(self, v):
        self.products += 1
        return self.k @ v


@pytest.mark.parametrize("method", ["cholesky", "mixed", "float64"])
@pytest.mark.parametrize("condition", [1e2, 1e6, 1e12])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_direct_methods_to_the_rounding_of_the_data(method, condition, dtype, x64):
    if dtype == "float64" and not x64:
        pytest.skip("float64 needs x64")
    k, y = prescribed(condition)
    k, y = jnp.asarray(k, dtype), jnp.asarray(y, dtype)
    # Rounding a spectrum down to 1e-12 to float32 makes it indefinite: there the ridge is due.
    ridge = 1e-5 if dtype == "float32" and condition > 1e6 else 0.0
    result = solve(k, y, ridge, method=method)
    residual = true_residual(k, result, y, ridge)
    assert residual <= 1e-10 or residual <= 1e-14 * float(
        jnp.linalg.norm(result.value, axis=0).max()
    )
    np.testing.assert_allclose(float(result.residual), residual, rtol=0.5, atol=1e-7)
    assert float(result.condition) < 3 * N * condition
    assert float(result.condition) > 0.01 * min(condition, 1 / max(ridge, 1e-300))
    assert bool(result.success) and result.remedy is None


def test_float32_is_refined_beyond_float32():
    k, y = prescribed(1e4)
    k, y = jnp.asarray(k, jnp.float32), jnp.asarray(y, jnp.float32)
    result = solve(k, y)
    exact = np.linalg.solve(np.asarray(k, np.float64), np.asarray(y, np.float64))
    plain = np.asarray(jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(k), True), y))
    error = np.linalg.norm(np.asarray(result.value) - exact) / np.linalg.norm(exact)
    assert error < 1e-7 < 1e-5 < np.linalg.norm(plain - exact) / np.linalg.norm(exact)
    assert result.residual < 1e-9


def test_under_jit_float32_is_refined_too():
    k, y = prescribed(1e4)
    k, y = jnp.asarray(k, jnp.float32), jnp.asarray(y, jnp.float32)
    result = jax.jit(solve)(k, y, jnp.float32(1e-3))
    assert bool(result.success) and "refined in" in result.method
    assert true_residual(k, result, y, float(np.float32(1e-3))) < 1e-9
    assert float(result.residual) < 1e-9


def test_not_positive_definite_names_a_ridge_that_does():
    k, y = (as_float(a) for a in prescribed(1e2, smallest=-0.05))
    with pytest.raises(SolveError, match=r"smallest eigenvalue is about -0.05. Pass ridge=0.1"):
        solve(k, y)
    result = solve(k, y, throw=False)
    assert not result.success
    np.testing.assert_allclose(float(result.smallest_eigenvalue), -0.05, rtol=1e-3)
    assert solve(k, y, ridge=float(result.needed_ridge)).success
    traced = jax.jit(solve)(k, y)
    assert not traced.success
    np.testing.assert_allclose(float(traced.smallest_eigenvalue), -0.05, rtol=1e-3)
    for kernel in (k, Operator(k)):
        by_cg = solve(kernel, y, method="cg", throw=False)
        assert int(by_cg.status) == 1
        np.testing.assert_allclose(float(by_cg.smallest_eigenvalue), -0.05, rtol=0.2)
    path = solve(k, y, jnp.array([0.0, 0.2], k.dtype), throw=False)
    np.testing.assert_array_equal(path.success, [False, True])


@pytest.mark.parametrize("method", ["cholesky", "cg", "eigh"])
def test_not_finite(method):
    k, y = (as_float(a) for a in prescribed(1e2))
    with pytest.raises(SolveError, match="NaN or infinite"):
        solve(k, y.at[3, 1].set(jnp.nan), method=method)
    with pytest.raises(SolveError, match="NaN or infinite"):
        solve(k.at[3, 1].set(jnp.nan).at[1, 3].set(jnp.nan), y, 1e-2, method=method)


@pytest.mark.parametrize("traced", [False, True])
def test_an_operator_that_is_not_finite(traced):
    k, y = (as_float(a) for a in prescribed(1e2))
    run = lambda k: solve(Operator(k), y, 1e-2, method="cg", preconditioner=None, throw=False)
    result = (jax.jit(run) if traced else run)(k.at[3, 1].set(jnp.inf))
    assert "NaN or infinite" in str(result.remedy)


def test_preconditioner_of_a_kernel_of_low_rank():
    # Fewer directions than columns, no ridge: the Gram matrix of the columns is singular.
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(N, 20))
    k = as_float(factor @ factor.T)
    y = k @ as_float(rng.normal(size=(N, 2)))
    for wrap in (lambda k: k, Operator):
        result = solve(wrap(k), y, method="cg", rtol=1e-4, preconditioner=40)
        assert result.success and int(result.iterations) < 20


def test_regularisation_path_is_one_solve_per_ridge(x64):
    k, y = (as_float(a) for a in prescribed(1e4))
    ridges = as_float([1e-3, 1e-2, 1.0])
    path = solve(k, y, ridges)
    assert path.method == "eigh" and path.value.shape == (3, N, 3)
    for ridge, value in zip(ridges, path.value, strict=True):
        tol = 1e-9 if x64 else 1e-2
        np.testing.assert_allclose(value, solve(k, y, float(ridge)).value, rtol=tol, atol=tol)


@pytest.mark.parametrize("preconditioner", ["auto", None, 30])
@pytest.mark.parametrize("wrap", [lambda k: k, Operator], ids=["matrix", "operator"])
def test_conjugate_gradients(wrap, preconditioner, x64):
    k, y = (as_float(a) for a in prescribed(1e5))
    ridge = 1e-3
    seen, kernel = [], wrap(k)
    result = solve(
        kernel,
        y,
        ridge,
        method="cg",
        preconditioner=preconditioner,
        progress=lambda i, r: seen.append((i, r)),
    )
    # A float32 operator cannot tell its residual below its rounding times the condition number.
    assert true_residual(k, result, y, ridge) < (2e-6 if x64 or wrap is not Operator else 1e-4)
    assert [i for i, _ in seen] == list(range(1, int(result.iterations) + 1))
    assert seen[-1][1] < seen[0][1]
    if x64 or wrap is not Operator:
        # What is shown is the recurrence's own residual, which stays near the measured one.
        assert float(result.residual) / 30 < seen[-1][1] < 30 * float(result.residual)
    assert result.success
    if wrap is Operator:
        # Python drives the iteration: every product is a call, none is hidden in a traced loop.
        assert kernel.products >= int(result.iterations)


def test_cg_of_several_right_hand_sides_solves_each_of_them():
    # A matrix gets columns of zeros beside them; one column alone gets none.
    k, y = (as_float(a) for a in prescribed(1e4))
    together = solve(k, y, 1e-2, method="cg", rtol=1e-6)
    assert together.value.shape == y.shape and true_residual(k, together, y, 1e-2) <= 1.1e-6
    for i in range(y.shape[1]):
        alone = solve(k, y[:, i], 1e-2, method="cg", rtol=1e-6)
        error = jnp.linalg.norm(alone.value - together.value[:, i])
        # Condition 101, two residuals of 1e-6.
        assert error < 2.1e-4 * jnp.linalg.norm(alone.value)


def test_preconditioner_saves_iterations():
    k, y = (as_float(a) for a in prescribed(1e8))
    for wrap in (lambda k: k, Operator):
        plain, preconditioned = (
            int(solve(wrap(k), y, 1e-3, method="cg", rtol=1e-3, preconditioner=p).iterations)
            for p in (None, 60)
        )
        assert preconditioned < 0.7 * plain


@pytest.mark.parametrize("wrap", [lambda k: k, Operator], ids=["matrix", "operator"])
def test_conjugate_gradients_under_jit(wrap):
    k, y = (as_float(a) for a in prescribed(1e3))
    run = jax.jit(lambda k, y: solve(wrap(k), y, 1e-2, method="cg", rtol=1e-4))
    result = run(k, y)
    assert bool(result.success)
    assert true_residual(k, result, y, 1e-2) < 2e-4
    short = jax.jit(lambda k, y: solve(wrap(k), y, method="cg", max_iterations=2))(k, y)
    assert int(short.status) == 2 and "Pass a larger ridge" in short.remedy


def test_cg_that_does_not_get_there_says_how_far_it_got():
    k, y = (as_float(a) for a in prescribed(1e8))
    with pytest.raises(SolveError, match=r"relative residual is .* after 5 iterations"):
        solve(k, y, method="cg", preconditioner=None, max_iterations=5)


def test_shapes_of_y():
    k, y = (as_float(a) for a in prescribed(10.0, n=12))
    flat = solve(k, y[:, 0])
    assert flat.value.shape == (12,)
    outputs = solve(k, y[:, 0].reshape(4, 3))
    assert outputs.value.shape == (4, 3)
    np.testing.assert_array_equal(outputs.value.ravel(), flat.value)
    pairs = k.reshape(4, 3, 4, 3).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(solve(pairs, y[:, 0].reshape(4, 3)).value, outputs.value, rtol=1e-5)


def test_vmap():
    k, y = (as_float(a) for a in prescribed(10.0, n=12))
    mapped = jax.vmap(solve)(jnp.stack([k, 2 * k]), jnp.stack([y, y]))
    np.testing.assert_allclose(mapped.value[1], solve(2 * k, y).value, rtol=1e-4)


def test_errors():
    k, y = (as_float(a) for a in prescribed(10.0, n=12))
    with pytest.raises(
        ValueError, match=r"y has shape \(11, 3\), but a kernel of shape \(12, 12\)"
    ):
        solve(k, y[:11])
    with pytest.raises(ValueError, match="must be square"):
        solve(k[:5], y)
    with pytest.raises(ValueError, match="method='qr' is not one of"):
        solve(k, y, method="qr")
    with pytest.raises(TypeError, match="needs shape, dtype and @"):
        solve("k", y)
    with pytest.raises(ValueError, match="needs a matrix"):
        solve(Operator(k), y, method="cholesky")
    with pytest.raises(ValueError, match="several ridges need method='eigh'"):
        solve(k, y, as_float([1.0, 2.0]), method="cg")
