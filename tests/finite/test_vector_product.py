"""NTK-vector products: against the dense kernel, linear, jit-able, in little memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import tree_util

import tangents as nt
from finite.table import NETWORKS, normal
from reference import finite as reference


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.name)
def test_is_the_dense_product(network, rtol):
    f, p, x1, x2 = network.f, network.params, network.x1, network.x2
    for second in (x2, None):
        other = x1 if second is None else second
        v = normal(7, *f(p, other).shape)
        product = jax.jit(nt.empirical_ntk_vp_fn(f, x1, second, p))(v)
        j1, j2 = reference.jacobian(f, p, x1), reference.jacobian(f, p, other)
        expected = j1 @ jnp.tensordot(v, j2, v.ndim)
        np.testing.assert_allclose(product, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


def test_linear_in_the_vector(rtol):
    network = NETWORKS[0]
    product = nt.empirical_ntk_vp_fn(network.f, network.x1, network.x2, network.params)
    u, v = normal(0, 3, 2), normal(1, 3, 2)
    np.testing.assert_allclose(
        product(2 * u - 3 * v), 2 * product(u) - 3 * product(v), rtol=rtol, atol=100 * rtol
    )


def test_trees(rtol):
    f = lambda p, x: {"a": x @ p["w"], "b": jnp.sin(x @ p["w"]).sum(-1)}
    p, x1, x2 = {"w": normal(0, 3, 2)}, normal(1, 4, 3), normal(2, 5, 3)
    v = {"a": normal(3, 5, 2), "b": normal(4, 5)}
    product = nt.empirical_ntk_vp_fn(f, x1, x2, p)(v)
    flat = lambda params, x: jnp.concatenate(
        [leaf.reshape(-1) for leaf in tree_util.tree_leaves(f(params, x))]
    )
    theta = reference.jacobian(flat, p, x1) @ reference.jacobian(flat, p, x2).T
    expected = theta @ jnp.concatenate([v["a"].reshape(-1), v["b"]])
    got = jnp.concatenate([product["a"].reshape(-1), product["b"]])
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=rtol)


def test_memory_is_that_of_a_vector_jacobian_product():
    """XLA's own count of temporaries: a product needs hardly more than one backward pass."""
    for depth, width, batch in ((8, 64, 128), (12, 128, 128), (12, 32, 512)):
        p = [normal(i, width, width) for i in range(depth)]
        x, v = normal(9, batch, width), normal(10, batch, width)
        of_vjp = _temporaries(lambda q, a, u: jax.vjp(lambda r: _deep(r, a), q)[1](u), p, x, v)
        of_vjp += sum(w.nbytes for w in p)
        product = lambda q, a, b, u: nt.empirical_ntk_vp_fn(_deep, a, b, q)(u)
        assert _temporaries(product, p, x, x + 1, v) <= 1.2 * of_vjp


def _deep(params, x):
    for w in params:
        x = jnp.tanh(x @ w)
    return x


def _temporaries(fn, *args):
    return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("compiled", [False, True])
def test_nan_goes_where_it_goes(compiled):
    """Waiting for the backward pass adds no NaN and hides none."""
    f = lambda p, x: jax.nn.relu(x @ p["a"]) + jnp.linalg.norm(p["b"])
    p = {"a": normal(0, 3, 4), "b": jnp.zeros(2)}
    x, v = normal(1, 5, 3), normal(2, 5, 4)
    for cotangents in (v, v.at[0, 0].set(jnp.nan)):
        product = nt.empirical_ntk_vp_fn(f, x, x + 1, p)
        pulled = jax.vjp(lambda q: f(q, x + 1), p)[1](cotangents)[0]
        expected = jax.jvp(lambda q: f(q, x), (p,), (pulled,))[1]
        got = (jax.jit(product) if compiled else product)(cotangents)
        np.testing.assert_allclose(got, expected, rtol=1e-5)
    with pytest.raises(TypeError, match="cotangents of dtype complex"):
        nt.empirical_ntk_vp_fn(f, x, x, p)(jax.lax.complex(v, v))


def test_mismatched_cotangents_say_both_shapes():
    network = NETWORKS[0]
    product = nt.empirical_ntk_vp_fn(network.f, network.x1, network.x2, network.params)
    text = r"cotangents have shape \(4, 2\), but must have that of f\(params, x2\), \(3, 2\)"
    with pytest.raises(ValueError, match=text):
        product(jnp.ones((4, 2)))
    with pytest.raises(ValueError, match=r"cotangents have shape \{'a': \(3, 2\)\}"):
        product({"a": jnp.ones((3, 2))})
