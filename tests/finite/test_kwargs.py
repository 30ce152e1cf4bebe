"""Keyword arguments split between x1 and x2, random keys among them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tangents as nt
from finite.table import METHODS, normal
from reference import finite as reference

P, X1, X2 = normal(0, 3, 2), normal(1, 4, 3), normal(2, 4, 3)


def _noisy(p, x, rng, scale=1.0):
    mask = jax.random.bernoulli(rng, 0.5, x.shape).astype(x.dtype)
    return (x * mask * scale) @ p


def _expected(x1, x2, key1, key2):
    j1 = reference.jacobian(lambda p, x: _noisy(p, x, key1), P, x1)
    j2 = reference.jacobian(lambda p, x: _noisy(p, x, key2), P, x2)
    return np.einsum("nkp,mkp->nm", j1, j2) / 2


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey], ids=["typed", "raw"])
@pytest.mark.parametrize("compiled", [False, True])
def test_keys_equal_for_equal_inputs_only(make, compiled, rtol):
    key = make(5)
    fn = nt.empirical_ntk_fn(_noisy)
    fn = jax.jit(fn) if compiled else fn
    folded = jax.random.fold_in(key, 1)
    same = jnp.array(X1)
    for second, key2 in ((None, key), (same, key), (X2, folded), (X1[:3], folded)):
        got = fn(X1, second, P, rng=key)
        expected = _expected(X1, X1 if second is None else second, key, key2)
        np.testing.assert_allclose(got, expected, rtol=rtol, atol=rtol)
    nngp = nt.empirical_nngp_fn(_noisy)(X1, X2, P, rng=key)
    np.testing.assert_allclose(
        nngp, _noisy(P, X1, key) @ _noisy(P, X2, folded).T / 2, rtol=rtol, atol=rtol
    )


def test_pairs_are_used_as_given(rtol):
    keys = jax.random.key(1), jax.random.key(2)
    for method in METHODS:
        got = nt.empirical_ntk_fn(_noisy, implementation=method)(X1, None, P, rng=keys)
        np.testing.assert_allclose(got, _expected(X1, X1, *keys), rtol=rtol, atol=rtol)
    v = normal(3, 4, 2)
    product = nt.empirical_ntk_vp_fn(_noisy, X1, X2, P, rng=keys)(v)
    op = nt.ntk_operator(_noisy, P, X1, X2, rng=keys)
    np.testing.assert_allclose(op @ v, product, rtol=rtol, atol=rtol)
    assert not nt.ntk_operator(_noisy, P, X1, rng=keys).is_symmetric


def test_others_are_copied_or_split(rtol):
    f = lambda p, x, a, mode: (x * a) @ p if mode == "train" else x @ p
    got = nt.empirical_ntk_fn(f)(X1, X2, P, a=(2.0, 3.0), mode="train")
    np.testing.assert_allclose(got, 6 * X1 @ X2.T, rtol=rtol, atol=rtol)
    got = nt.empirical_ntk_fn(f)(X1, X2, P, a=2.0, mode=("train", "test"))
    np.testing.assert_allclose(got, 2 * X1 @ X2.T, rtol=rtol, atol=rtol)
