"""The NTK operator: products, transpose, dense results and views, against the dense matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import tree_util

import tangents as nt
from finite.table import NETWORKS, normal
from reference import finite as reference

MLP = NETWORKS[0]


def _matrix(f, p, x1, x2=None):
    flat = lambda q, x: jnp.concatenate([y.reshape(-1) for y in tree_util.tree_leaves(f(q, x))])
    j1 = reference.jacobian(flat, p, x1)
    return np.asarray(j1 @ (j1 if x2 is None else reference.jacobian(flat, p, x2)).T)


def _close(got, expected, rtol):
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.name)
def test_products_and_dense_results(network, rtol):
    f, p, x1, x2 = network.f, network.params, network.x1, network.x2
    op = nt.ntk_operator(f, p, x1, x2, vmap_axes=network.vmap)
    theta = _matrix(f, p, x1, x2)
    assert op.shape == theta.shape and op.T.shape == theta.T.shape
    assert op.dtype == x1.dtype
    assert not op.is_symmetric
    v, block = normal(8, *f(p, x2).shape), normal(9, op.shape[1], 3)
    _close((op @ v).reshape(-1), theta @ v.reshape(-1), rtol)
    assert (op @ v).shape == f(p, x1).shape
    _close(op @ v.reshape(-1), theta @ v.reshape(-1), rtol)
    _close(op @ block, theta @ block, rtol)
    left = normal(10, op.shape[0])
    _close(op.T @ left, theta.T @ left, rtol)
    _close(left @ op, left @ theta, rtol)
    _close(op.materialise(), theta, rtol)


def test_kernel_layouts_and_the_transpose(rtol):
    f, p, x1, x2 = MLP.f, MLP.params, MLP.x1, MLP.x2
    op = nt.ntk_operator(f, p, x1, x2, vmap_axes=0)
    _close(op.T.materialise(), _matrix(f, p, x1, x2).T, rtol)
    _close(op.materialise(trace_axes=-1), reference.ntk(f, p, x1, x2), rtol)
    _close(op.materialise(trace_axes=()), reference.ntk(f, p, x1, x2, ()), rtol)
    _close(op.T.materialise(diagonal_axes=1), reference.ntk(f, p, x2, x1, (), 1), rtol)


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.name)
def test_symmetric(network, rtol):
    f, p, x = network.f, network.params, network.x1
    op = nt.ntk_operator(f, p, x, vmap_axes=network.vmap)
    assert op.is_symmetric and op.T is op and "symmetric" in repr(op)
    dense = np.asarray(op.materialise())
    np.testing.assert_array_equal(dense, dense.T)
    _close(op.diagonal(), np.diag(dense), rtol)
    _close(op.trace(), np.trace(dense), rtol)


def test_several_outputs_keep_their_cross_terms(rtol):
    f = lambda p, x: {"a": x @ p["w"], "b": jnp.sin(x @ p["w"]).sum(-1)}
    p, x1, x2 = {"w": normal(0, 3, 2)}, normal(1, 4, 3), normal(2, 5, 3)
    op = nt.ntk_operator(f, p, x1, x2)
    theta = _matrix(f, p, x1, x2)
    _close(op.materialise(), theta, rtol)
    v = {"a": normal(3, 5, 2), "b": normal(4, 5)}
    flat = jnp.concatenate([v["a"].reshape(-1), v["b"]])
    _close(op @ flat, theta @ flat, rtol)
    _close((op @ v)["b"], (theta @ flat)[8:], rtol)
    own = nt.ntk_operator(f, p, x1)
    dense = np.asarray(own.materialise())
    np.testing.assert_array_equal(dense, dense.T)
    _close(own.diagonal(), np.diag(dense), rtol)


def test_linearises_once(rtol):
    """Python runs the network when the operator is made and linearised, never for a product."""
    calls = []

    def f(p, x):
        calls.append(1)
        return jnp.tanh(x @ p["w"] / 2 + p["b"]) @ p["v"]

    op = nt.ntk_operator(f, MLP.params, MLP.x1, MLP.x2)
    op @ jnp.ones(op.shape[1])
    before = len(calls)
    for seed in range(3):
        op @ normal(seed, op.shape[1])
        op.T @ normal(seed, op.shape[0])
    assert len(calls) == before
    # The compiled product holds no copy of the residuals: they are its arguments.
    right = op._linearised()[1]
    text = right.program.pull.lower(
        right.residuals, right.leaves, [jnp.ones(y.shape, y.dtype) for y in op._outputs(2)]
    ).as_text()
    assert text.count("tensor<3x5x") >= 1
    assert 'dense<"0x' not in text


@pytest.mark.parametrize("first", ["T", "left", "rmatvec"])
def test_transpose_shares_what_was_linearised(first):
    runs = []

    def f(p, x):
        jax.debug.callback(lambda: runs.append(1))
        return jnp.tanh(x @ p["w"] / 2 + p["b"]) @ p["v"]

    op = nt.ntk_operator(f, MLP.params, MLP.x1, MLP.x2)
    u = np.ones(op.shape[0], op.dtype)
    product = {
        "T": lambda: op.T @ u,
        "left": lambda: u @ op,
        "rmatvec": lambda: op.linear_operator().rmatvec(u),
    }[first]
    for _ in range(3):
        product()
    jax.effects_barrier()
    assert len(runs) == 2  # one forward pass for each side


def test_identical_pairs_keep_the_symmetry(rtol):
    f = lambda p, x, mask: (x * mask) @ p
    p, x, mask = normal(0, 3, 2), normal(1, 4, 3), normal(2, 4, 3)
    op = nt.ntk_operator(f, p, x, mask=(mask, mask))
    assert op.is_symmetric
    assert not nt.ntk_operator(f, p, x, mask=(mask, mask + 1)).is_symmetric
    alone = nt.ntk_operator(lambda q, z: f(q, z, mask), p, x)
    _close(op.materialise(), alone.materialise(), rtol)


def test_transformations(rtol):
    """The operator under vmap over parameters and grad through a product."""
    v = normal(1, 6)
    moved = lambda s: tree_util.tree_map(lambda a: a * s, MLP.params)
    product = lambda s: nt.ntk_operator(MLP.f, moved(s), MLP.x1, MLP.x2) @ v
    scales = jnp.array([1.0, 1.5])
    got = jax.vmap(product)(scales)
    dense = lambda s: nt.empirical_ntk_fn(MLP.f, ())(MLP.x1, MLP.x2, moved(s))
    theta = lambda s: dense(s).transpose(0, 2, 1, 3).reshape(8, 6)
    _close(got, jax.vmap(lambda s: theta(s) @ v)(scales), rtol)
    slope = jax.grad(lambda s: product(s).sum())(1.5)
    _close(slope, jax.grad(lambda s: (theta(s) @ v).sum())(1.5), rtol)
    vp = lambda s: nt.empirical_ntk_vp_fn(MLP.f, MLP.x1, MLP.x2, moved(s))(v.reshape(3, 2))
    _close(jax.grad(lambda s: vp(s).sum())(1.5), slope, rtol)
    _close(jax.vmap(vp)(scales).reshape(2, 8), got, rtol)


def test_complex_vectors_are_refused():
    op = nt.ntk_operator(MLP.f, MLP.params, MLP.x1, MLP.x2)
    with pytest.raises(TypeError, match="right operand of @ is of dtype complex"):
        op @ jnp.ones(6, complex)


def test_at_other_parameters_compiles_nothing(rtol):
    op = nt.ntk_operator(MLP.f, MLP.params, MLP.x1, MLP.x2)
    v = normal(1, op.shape[1])
    op @ v
    other = tree_util.tree_map(lambda a: a + 1, MLP.params)
    with jax.log_compiles(False):
        moved = op.at(other)
        programs = [moved._programs._sides[i].push for i in (0, 1)]
        sizes = [program._cache_size() for program in programs]
        product = moved @ v
        assert [program._cache_size() for program in programs] == sizes
    _close(product, _matrix(MLP.f, other, MLP.x1, MLP.x2) @ v, rtol)
    with pytest.raises(ValueError, match=r"NTKOperator.at: params has shapes \{'w': \(2, 2\)\}"):
        op.at({"w": jnp.ones((2, 2))})


def test_through_jit_as_argument_and_inside(rtol):
    op = nt.ntk_operator(MLP.f, MLP.params, MLP.x1, MLP.x2)
    v = normal(1, op.shape[1])
    _close(jax.jit(lambda o, u: o @ u)(op, v), op @ v, rtol)
    inside = jax.jit(lambda p, u: nt.ntk_operator(MLP.f, p, MLP.x1, MLP.x2) @ u)
    _close(inside(MLP.params, v), op @ v, rtol)
    _close(jax.jit(lambda o: o)(op).T.materialise(), op.materialise().T, rtol)


def test_scipy_view(rtol):
    linalg = pytest.importorskip("scipy.sparse.linalg")
    op = nt.ntk_operator(MLP.f, MLP.params, MLP.x1, MLP.x2)
    theta, view = np.asarray(op.materialise()), op.linear_operator()
    block = np.random.default_rng(0).normal(size=(op.shape[1], 2)).astype(op.dtype)
    _close(view @ block, theta @ block, rtol)
    _close(view @ block[:, 0], theta @ block[:, 0], rtol)
    _close(view.rmatvec(theta[:, 0]), theta.T @ theta[:, 0], rtol)
    own = nt.ntk_operator(MLP.f, MLP.params, MLP.x1)
    top = linalg.eigsh(own.linear_operator(), k=1, return_eigenvectors=False)
    _close(top[0], np.linalg.eigvalsh(own.materialise())[-1], 1e-4)


def test_lineax_view(rtol):
    lineax = pytest.importorskip("lineax")
    op = nt.ntk_operator(MLP.f, MLP.params, MLP.x1)
    view = op.linear_operator("lineax")
    assert lineax.is_symmetric(view) and lineax.is_positive_semidefinite(view)
    v = normal(1, op.shape[1])
    _close(view.mv(v), op.materialise() @ v, rtol)
    with pytest.raises(ValueError, match="kind='numpy' is not known: pass 'scipy' or 'lineax'"):
        op.linear_operator("numpy")


def test_empty_batches():
    op = nt.ntk_operator(MLP.f, MLP.params, MLP.x1[:0], MLP.x2)
    assert op.shape == (0, 6) and op.materialise().shape == (0, 6)
    assert (op @ jnp.ones(6)).shape == (0,)
    assert (op @ jnp.ones((6, 0))).shape == (0, 0)


def test_errors_say_shapes():
    op = nt.ntk_operator(MLP.f, MLP.params, MLP.x1, MLP.x2)
    text = r"right operand of @ has shape \(5,\), but must have that of f\(params, x2\), \(3, 2\)"
    with pytest.raises(ValueError, match=text):
        op @ jnp.ones(5)
    with pytest.raises(ValueError, match="a diagonal needs equal shapes"):
        op.diagonal()
    with pytest.raises(ValueError, match="trace_axes=\\(3,\\) is out of range"):
        op.materialise(trace_axes=3)
