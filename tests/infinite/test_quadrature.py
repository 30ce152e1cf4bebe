"""Networks of several layers against the recursion evaluated by quadrature."""

import jax
import jax.numpy as jnp
import numpy as np

from reference import infinite as slow
from tangents import stax


def _tanh_like():
    return lambda x: np.vectorize(_erf)(x), lambda x: 2 / np.sqrt(np.pi) * np.exp(-(x**2))


def _erf(x):
    from math import erf

    return erf(x)


def test_fully_connected(rtol):
    x1 = np.array([[0.3, -0.8, 0.5]])
    x2 = np.array([[-0.4, 0.1, 0.9]])
    phi, dphi = _tanh_like()
    both = np.concatenate([x1, x2])
    K, T = both @ both.T / 3, np.zeros((2, 2))
    K, T = slow.dense(K, T, 1.2, 0.3)
    K, T = slow.pointwise(K, T, phi, dphi)
    K, T = slow.dense(K, T, 1.1, 0.1)
    K, T = slow.pointwise(K, T, phi, dphi)
    K, T = slow.dense(K, T, 0.9, 0.2)
    _, _, kernel_fn = stax.serial(
        stax.Dense(1, 1.2, 0.3),
        stax.Erf(),
        stax.Dense(1, 1.1, 0.1),
        stax.Erf(),
        stax.Dense(1, 0.9, 0.2),
    )
    got = kernel_fn(jnp.asarray(x1), jnp.asarray(x2))
    np.testing.assert_allclose(got.nngp[0, 0], K[0, 1], rtol=rtol)
    np.testing.assert_allclose(got.ntk[0, 0], T[0, 1], rtol=rtol)
    np.testing.assert_allclose([got.cov1[0], got.cov2[0]], np.diag(K), rtol=rtol)


def test_convolutional_with_pooling(rtol):
    x = np.asarray(jax.random.normal(jax.random.key(0), (2, 5, 2)), float) / 3
    phi, dphi = _tanh_like()
    flat = x.reshape(10, 2)
    K, T = flat @ flat.T / 2, np.zeros((10, 10))
    K, T = slow.affine(K, T, slow.window_taps(5, 2), 1.3, 0.2)
    K, T = slow.pointwise(K, T, phi, dphi)
    K, T = slow.affine(K, T, slow.window_taps(4, 2), 1.1, 0.1)
    K, T = slow.mean_over(3, K), slow.mean_over(3, T)
    K, T = slow.dense(K, T, 0.8, 0.0)
    _, _, kernel_fn = stax.serial(
        stax.Conv(1, (2,), W_std=1.3, b_std=0.2),
        stax.Erf(),
        stax.Conv(1, (2,), W_std=1.1, b_std=0.1),
        stax.GlobalAvgPool(),
        stax.Dense(1, 0.8),
    )
    got = kernel_fn(jnp.asarray(x), None, ("nngp", "ntk"))
    np.testing.assert_allclose(got.nngp, K, rtol=rtol)
    np.testing.assert_allclose(got.ntk, T, rtol=rtol)
