"""Every method, network and choice of axes against full Jacobians and one einsum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import tree_util

import tangents as nt
from finite.table import AXES, METHODS, NETWORKS, normal
from reference import finite as reference


def _match_batch(network):
    """x2 with as many examples as x1, for axes that pair examples."""
    batch = -1 if network.vmap == -1 else 0
    size = min(network.x1.shape[batch], network.x2.shape[batch])
    cut = lambda x: jnp.take(x, jnp.arange(size), axis=batch)
    return cut(network.x1), cut(network.x2)


@pytest.mark.parametrize("promise", ["vmap", "none"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.name)
def test_kernels_against_reference(network, method, promise, rtol):
    if promise == "vmap" and network.vmap is None:
        promise = "none"
    vmap_axes = network.vmap if promise == "vmap" else None
    x1, x2 = _match_batch(network)
    axes = AXES if network.every_axes else AXES[:2]

    def all_axes(params, a, b):
        fns = [nt.empirical_ntk_fn(network.f, t, d, vmap_axes, method) for t, d in axes]
        return [fn(a, b, params) for fn in fns]

    full = {True: _full_reference(network.name, True), False: _full_reference(network.name, False)}
    got = jax.jit(lambda p, a, b: (all_axes(p, a, b), all_axes(p, a, None)))
    for symmetric, kernels in enumerate(got(network.params, x1, x2)):
        for (trace, diagonal), result in zip(axes, kernels, strict=True):
            expected = reference.reduce_pairs(full[bool(symmetric)], trace, diagonal)
            assert result.shape == expected.shape
            assert result.dtype == x1.dtype
            scale = np.abs(expected).max()
            np.testing.assert_allclose(
                result, expected, rtol=rtol, atol=rtol * scale, err_msg=f"{trace} {diagonal}"
            )


@functools.cache
def _full_reference(name, symmetric):
    """The kernel of every pair, once for each network."""
    network = next(n for n in NETWORKS if n.name == name)
    x1, x2 = _match_batch(network)
    j1 = reference.jacobian(network.f, network.params, x1)
    j2 = j1 if symmetric else reference.jacobian(network.f, network.params, x2)
    return np.tensordot(j1, j2, (-1, -1))


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_run_step_by_step(method, rtol):
    """Not compiled, with a keyword of any name, and the batch axis traced or kept once."""
    f = lambda p, x, tangents: jnp.tanh(x @ p) * tangents
    p, x1, x2, scale = normal(0, 3, 2), normal(1, 4, 3), normal(2, 4, 3), jnp.asarray(2.0)
    for trace, diagonal in (((-1,), ()), ((0, 1), ()), ((1,), (0,))):
        fn = nt.empirical_ntk_fn(f, trace, diagonal, 0, method)
        expected = reference.ntk(lambda q, x: f(q, x, scale), p, x1, x2, trace, diagonal)
        got = fn(x1, x2, p, tangents=scale)
        np.testing.assert_allclose(got, expected, rtol=rtol, atol=10 * rtol)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_different_batch_sizes(method, rtol):
    network = NETWORKS[0]
    for trace, vmap_axes in (((-1,), 0), ((), None)):
        fn = jax.jit(nt.empirical_ntk_fn(network.f, trace, (), vmap_axes, method))
        expected = reference.ntk(network.f, network.params, network.x1, network.x2, trace)
        np.testing.assert_allclose(
            fn(network.x1, network.x2, network.params), expected, rtol=rtol, atol=rtol
        )


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.name)
def test_symmetric_to_the_last_bit(network, method):
    fns = [nt.empirical_ntk_fn(network.f, t, (), network.vmap, method) for t in ((-1,), ())]
    kernels = jax.jit(lambda x, p: [fn(x, None, p) for fn in fns])(network.x1, network.params)
    for kernel in map(np.asarray, kernels):
        swap = [axis ^ 1 for axis in range(kernel.ndim)]
        np.testing.assert_array_equal(kernel, kernel.transpose(swap))


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("vmap_axes", [0, None])
def test_empty_and_single_batches(method, vmap_axes, rtol):
    network = NETWORKS[0]
    fn = jax.jit(nt.empirical_ntk_fn(network.f, (-1,), (), vmap_axes, method))
    empty = network.x1[:0]
    assert fn(empty, network.x2, network.params).shape == (0, 3)
    assert fn(network.x1, empty, network.params).shape == (4, 0)
    assert fn(empty, None, network.params).shape == (0, 0)
    one = network.x1[:1]
    expected = reference.ntk(network.f, network.params, one, network.x2)
    np.testing.assert_allclose(fn(one, network.x2, network.params), expected, rtol=rtol)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_outputs_without_axes(method, rtol):
    f = lambda p, x: jnp.sum(jnp.sin(x @ p))
    p, x1, x2 = normal(0, 3, 2), normal(1, 2, 3), normal(2, 5, 3)
    fn = nt.empirical_ntk_fn(f, (), (), None, method)
    expected = reference.ntk(f, p, x1, x2, ())
    assert expected.shape == ()
    np.testing.assert_allclose(fn(x1, x2, p), expected, rtol=rtol)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("vmap_axes", [0, None])
def test_trees_in_and_out(method, vmap_axes, rtol):
    """Inputs, outputs and parameters are trees; each output array has a kernel of its own."""

    def f(p, x):
        h = jnp.tanh(x["a"] @ p["w"][0]) + x["b"][0] @ p["w"][1]
        return {"out": (h @ p["v"], h), "sum": h.sum(-1, keepdims=True)}

    p = {"w": (normal(0, 3, 4), normal(1, 2, 4)), "v": normal(2, 4, 2)}
    inputs = lambda s, n: {"a": normal(s, n, 3), "b": [normal(s + 1, n, 2)]}
    x1, x2 = inputs(3, 3), inputs(5, 2)
    got = jax.jit(nt.empirical_ntk_fn(f, (), (), vmap_axes, method))(x1, x2, p)
    assert tree_util.tree_structure(got) == tree_util.tree_structure(f(p, x1))
    pick = [lambda y: y["out"][0], lambda y: y["out"][1], lambda y: y["sum"]]
    for choose in pick:
        expected = reference.ntk(lambda q, x, c=choose: c(f(q, x)), p, x1, x2, ())
        np.testing.assert_allclose(choose(got), expected, rtol=rtol, atol=10 * rtol)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_vmap_triple_with_keyword_axes(method, rtol):
    """Inputs with different batch axes, a shared input, and a mapped keyword argument."""

    def f(p, x, gate):
        return jnp.einsum("in,ik->kn", x["cols"], p) * gate[None, :] + x["shared"].sum()

    p = normal(0, 3, 2)
    x = lambda s, n: {"cols": normal(s, 3, n), "shared": normal(9, 4)}
    x1, x2 = x(1, 4), x(2, 5)
    gates = normal(3, 4), normal(4, 5)
    vmap_axes = ({"cols": -1, "shared": None}, 1, {"gate": 0})
    fn = jax.jit(nt.empirical_ntk_fn(f, (0,), (), vmap_axes, method))
    got = fn(x1, x2, p, gate=gates)
    plain = jax.jit(nt.empirical_ntk_fn(f, (0,), (), None, method))(x1, x2, p, gate=gates)
    j1 = reference.jacobian(lambda q, z: f(q, z, gates[0]), p, x1)
    j2 = reference.jacobian(lambda q, z: f(q, z, gates[1]), p, x2)
    expected = jnp.einsum("knp,kmp->nm", j1, j2) / 2
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(plain, expected, rtol=rtol, atol=rtol)


def test_methods_agree_in_half_precision():
    """bfloat16 parameters: accumulated in float32, returned in the dtype of the output."""
    network = NETWORKS[0]
    low = tree_util.tree_map(lambda a: a.astype(jnp.bfloat16), network.params)
    x = network.x1.astype(jnp.bfloat16)
    expected = reference.ntk(network.f, network.params, network.x1)
    for method in METHODS:
        kernel = nt.empirical_ntk_fn(network.f, implementation=method)(x, None, low)
        assert kernel.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            np.asarray(kernel, np.float32), expected, rtol=0.1, atol=0.05 * np.abs(expected).max()
        )


@settings(max_examples=5)
@given(
    seed=st.integers(0, 2**16),
    sizes=st.sampled_from([(1, 1, 2, 1), (3, 2, 4, 2), (2, 4, 1, 3)]),
    method=st.sampled_from(METHODS),
    vmap_axes=st.sampled_from([0, None]),
)
def test_properties(seed, sizes, method, vmap_axes):
    """NTK = J Jᵀ; permuted batches; block structure; traces and diagonals of the full kernel."""
    n1, n2, width, k = sizes
    keys = jax.random.split(jax.random.key(seed), 4)
    p = {"w": jax.random.normal(keys[0], (2, width)), "v": jax.random.normal(keys[1], (width, k))}
    f = lambda p, x: jnp.sin(x @ p["w"]) @ p["v"]
    x1, x2 = jax.random.normal(keys[2], (n1, 2)), jax.random.normal(keys[3], (n2, 2))
    order = np.random.default_rng(seed).permutation(n1)

    @jax.jit
    def kernels(p, x1, x2):
        fn = lambda *axes: nt.empirical_ntk_fn(f, *axes, vmap_axes, method)
        full, both = fn((), ()), jnp.concatenate([x1, x2])
        return {
            "full": full(x1, x2, p),
            "permuted": full(x1[order], x2, p),
            "own": full(x1, None, p),
            "both": full(both, None, p),
            "trace": fn((-1,), ())(x1, x2, p),
            "diagonal": fn((), (-1,))(x1, x2, p),
            "batch": fn((-1,), (0,))(x1, None, p),
        }

    got = {name: np.asarray(kernel) for name, kernel in kernels(p, x1, x2).items()}
    tol = 1e-10 if x1.dtype == jnp.float64 else 1e-4
    close = lambda a, b: np.testing.assert_allclose(
        a, b, rtol=tol, atol=tol * (1 + np.abs(b).max())
    )
    full, own = got["full"], got["own"]
    j1, j2 = reference.jacobian(f, p, x1), reference.jacobian(f, p, x2)
    close(full, np.einsum("nkp,mlp->nmkl", j1, j2))
    close(got["permuted"], full[order])
    close(got["both"][:n1, n1:], full)
    close(got["trace"], np.einsum("nmkk->nm", full) / k)
    close(got["diagonal"], np.einsum("nmkk->nmk", full))
    close(got["batch"], np.einsum("nnkk->n", own) / k)
    matrix = own.transpose(0, 2, 1, 3).reshape(n1 * k, n1 * k)
    assert np.linalg.eigvalsh(matrix).min() >= -tol * (1 + np.abs(matrix).max())


def test_float32_against_float64(x64):
    """The stated bound of float32: 1e-5 of the largest entry, on networks of this size."""
    if not x64:
        pytest.skip("needs both precisions in one process")
    for network in (NETWORKS[0], NETWORKS[4]):
        low = tree_util.tree_map(lambda a: a.astype(jnp.float32), (network.params, network.x1))
        for method in METHODS:
            fn = nt.empirical_ntk_fn(network.f, (-1,), (), network.vmap, method)
            kernel = jax.jit(fn)(low[1], None, low[0])
            assert kernel.dtype == jnp.float32
            expected = np.asarray(jax.jit(fn)(network.x1, None, network.params))
            assert np.abs(np.asarray(kernel) - expected).max() <= 1e-5 * np.abs(expected).max()
