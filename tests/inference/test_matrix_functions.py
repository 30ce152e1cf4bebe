"""Functions of a kernel and their derivatives in it, also where eigenvalues coincide."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from tangents import predict
from tangents._inference.matrix_functions import (
    function_product,
    integrated,
    integrated_quotients,
    risen,
    risen_quotients,
)

SIZE = 5
VALUES = [0.0, 1e-8, 1e-3, 1e-3 * (1 + 1e-6), 0.3, 0.3, 0.31, 2.0]
TIMES = [0.0, 1e-2, 1.0, 30.0, 1e4]


def exact(kind, a, tau):
    return 1 - mpmath.exp(-a * tau) if kind == "risen" else (1 - mpmath.exp(-a * tau)) / a


def exact_quotient(kind, a, b, tau):
    """From 150 digits; a hair beside a coincidence stands for the derivative."""
    a, b, tau = mpmath.mpf(a), mpmath.mpf(b), mpmath.mpf(tau)
    a += mpmath.mpf(10) ** -30
    b += 2 * mpmath.mpf(10) ** -30
    return (exact(kind, a, tau) - exact(kind, b, tau)) / (a - b)


@pytest.mark.parametrize("kind", ["risen", "integrated"])
def test_quotients_keep_their_digits(kind, x64):
    values = jnp.asarray(VALUES, jnp.result_type(float))
    times = jnp.asarray(TIMES, values.dtype)[:, None]
    quotients = risen_quotients if kind == "risen" else integrated_quotients
    got = np.asarray(quotients(values, times, SIZE), np.float64)
    with mpmath.workdps(150):
        for i, t in enumerate(np.asarray(times, np.float64)[:, 0]):
            for j, a in enumerate(np.asarray(values, np.float64)):
                for k, b in enumerate(np.asarray(values, np.float64)):
                    wanted = float(exact_quotient(kind, a, b, mpmath.mpf(t) / SIZE))
                    # exp(−x) of a rounded x is right to x roundings.
                    size = 1 + min(a, b) * t / SIZE
                    rtol = (2e-14 if x64 else 4e-6) * size
                    np.testing.assert_allclose(got[i, j, k], wanted, rtol=rtol, atol=1e-30)


def kernel(values, seed=0):
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))
    return jnp.asarray((basis * np.asarray(values)) @ basis.T, jnp.result_type(float))


SPECTRA = {
    "identity": [2.0, 2.0, 2.0, 2.0],
    "pairs": [1.5, 1.5, 0.2, 0.2],
    "apart": [1.5, 0.8, 0.3, 0.1],
}


@pytest.fixture
def data():
    rng = np.random.default_rng(1)
    array = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.result_type(float))
    return array(4, 2), array(3, 4), array(3, 2)


def flow_of(k, y, k_td, t):
    """Test outputs at t by the exponential of one matrix, symmetric in K as a kernel is."""
    k = (k + k.T) / 2
    n, m = len(k), len(k_td)
    system = jnp.zeros((n + m, n + m), k.dtype).at[:n, :n].set(-k).at[n:, :n].set(-k_td)
    return jax.scipy.linalg.expm(system * (t / y.size))[n:, :n] @ -y


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("t", [0.1, 20.0])
def test_gradient_of_gradient_flow(spectrum, t, data, x64):
    y, k_td, weights = data
    k = kernel(SPECTRA[spectrum])

    def loss(k):
        return jnp.sum(weights * predict.gradient_descent_mse(k, y)(t, None, 0.0, k_td))

    wanted = jax.grad(lambda k: jnp.sum(weights * flow_of(k, y, k_td, t)))(k)
    tol = 1e-10 if x64 else 1e-4
    got = jax.grad(loss)(k)
    np.testing.assert_allclose(got, wanted, rtol=tol, atol=tol)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(k), wanted, rtol=tol, atol=tol)
    mapped = jax.vmap(jax.grad(loss))(jnp.stack([k, 2 * k]))
    np.testing.assert_allclose(mapped[0], wanted, rtol=tol, atol=tol)
    # The training outputs and the time, in one direction.
    direction = kernel([1.0, -1.0, 0.5, 0.0], seed=2)

    def train(s, t):
        return predict.gradient_descent_mse(k + s * direction, y)(t, 0.0)

    change = jax.jvp(train, (0.0, t), (1.0, 1.0))[1]
    by_exponential = lambda s, t: y - jax.scipy.linalg.expm(-(k + s * direction) * (t / y.size)) @ y
    wanted = jax.jvp(by_exponential, (0.0, t), (1.0, 1.0))[1]
    np.testing.assert_allclose(change, wanted, rtol=10 * tol, atol=10 * tol)


@pytest.mark.parametrize("t", [None, np.inf])
def test_gradient_at_infinity(t, data, x64):
    y, k_td, weights = data
    k = kernel(SPECTRA["pairs"])
    loss = lambda k: jnp.sum(weights * predict.gradient_descent_mse(k, y)(t, None, 0.0, k_td))
    exact = lambda k: jnp.sum(weights * (k_td @ jnp.linalg.solve((k + k.T) / 2, y)))
    tol = 1e-9 if x64 else 2e-3
    for gradient in (jax.grad(loss), jax.jit(jax.grad(loss))):
        np.testing.assert_allclose(gradient(k), jax.grad(exact)(k), rtol=tol, atol=tol)
    # A singular kernel, as long as its rank stays: the derivative of the pseudo-inverse.
    scaled = lambda s: loss(s * kernel([1.5, 1.5, 0.2, 0.0]))
    np.testing.assert_allclose(jax.grad(scaled)(1.0), -scaled(1.0), rtol=tol)


def test_gradients_of_distributions(data, x64):
    y, k_td, _ = data
    k, k_tt = kernel(SPECTRA["pairs"]), 3 * jnp.eye(3)
    direction = kernel([1.0, -1.0, 0.5, 0.0], seed=2)

    def moments(s, t):
        def kernel_fn(x1, x2, get):
            both = {(4, None): k + s * direction, (3, 4): k_td, (3, None): k_tt}
            found = both[len(x1), None if x2 is None else len(x2)]
            pair = {"nngp": found, "ntk": 1.5 * found}
            return pair[get] if isinstance(get, str) else predict_pair(**pair)

        ensemble = predict.gradient_descent_mse_ensemble(kernel_fn, jnp.ones((4, 1)), y)
        test = ensemble(t, jnp.ones((3, 1)), compute_cov=True)
        return jax.tree.leaves((test, ensemble(t, None, compute_cov=True)))

    step = 1e-5 if x64 else 3e-2
    for t in (2.0, None):
        # A float array, so that the kernel may be a tracer.
        got = jax.jvp(lambda s, t=t: moments(s, t), (jnp.zeros(()),), (jnp.ones(()),))[1]
        ahead, behind = moments(jnp.asarray(step), t), moments(jnp.asarray(-step), t)
        for a, b, c in zip(got, ahead, behind, strict=True):
            tol = 1e-7 if x64 else 3e-2
            np.testing.assert_allclose(a, (b - c) / (2 * step), rtol=tol, atol=tol)


def predict_pair(**kernels):
    import collections

    return collections.namedtuple("Pair", kernels)(**kernels)


def test_second_derivatives_where_eigenvalues_differ(data, x64):
    y, k_td, weights = data
    k = kernel(SPECTRA["apart"])
    loss = lambda k: jnp.sum(weights * predict.gradient_descent_mse(k, y)(3.0, None, 0.0, k_td))
    exact = lambda k: jnp.sum(weights * flow_of(k, y, k_td, 3.0))
    direction = kernel([1.0, -1.0, 0.5, 0.0], seed=2)

    def along(f):
        return jax.jvp(jax.grad(f), (k,), (direction,))[1]

    tol = 1e-9 if x64 else 2e-3
    np.testing.assert_allclose(along(loss), along(exact), rtol=tol, atol=tol)


def test_left_factor_and_constants(data, rtol):
    y, k_td, _ = data
    k = kernel(SPECTRA["pairs"])
    values, vectors = jnp.linalg.eigh(k)
    times = jnp.array([[0.5], [2.0]])
    for kind, function in (("risen", risen), ("integrated", integrated)):
        weights = function(values, times, SIZE)
        dense = jnp.einsum("ij,tj,kj->tik", vectors, weights, vectors)
        apply = lambda rhs, left=None, kind=kind: function_product(
            kind, SIZE, None, (values, vectors.T), times, rhs, left
        )
        np.testing.assert_allclose(apply(y), dense @ y, rtol=10 * rtol, atol=rtol)
        wanted = k_td @ dense @ y
        np.testing.assert_allclose(apply(y, k_td.T), wanted, rtol=10 * rtol, atol=rtol)
        # Linear in both factors; a constant matrix has no derivative.
        change = jax.jvp(lambda a, b, apply=apply: apply(a, b.T), (y, k_td), (2 * y, k_td))[1]
        np.testing.assert_allclose(change, 3 * wanted, rtol=10 * rtol, atol=rtol)
