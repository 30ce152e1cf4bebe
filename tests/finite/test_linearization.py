"""Taylor expansions in the parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import tree_util

import tangents as nt
from finite.table import NETWORKS, normal

MLP = NETWORKS[0]


def _moved(size):
    return tree_util.tree_map(lambda a: a + size * jnp.cos(a), MLP.params)


def test_linearize_is_the_first_order_expansion(rtol):
    moved = _moved(0.3)
    step = tree_util.tree_map(jnp.subtract, moved, MLP.params)
    value, slope = jax.jvp(lambda p: MLP.f(p, MLP.x1), (MLP.params,), (step,))
    got = jax.jit(nt.linearize(MLP.f, MLP.params))(moved, MLP.x1)
    np.testing.assert_allclose(got, value + slope, rtol=rtol, atol=rtol)
    first = nt.taylor_expand(MLP.f, MLP.params, 1)(moved, MLP.x1)
    np.testing.assert_allclose(got, first, rtol=rtol, atol=rtol)


def test_polynomials_are_their_own_expansions(rtol):
    f = lambda p, x: p["a"] ** 3 * x + p["b"] * p["a"]
    p0, p1 = {"a": jnp.array(1.5), "b": jnp.array(-1.0)}, {"a": jnp.array(2.0), "b": jnp.array(0.5)}
    x = normal(0, 4)
    for degree, exact in ((3, True), (4, True), (2, False)):
        value = nt.taylor_expand(f, p0, degree)(p1, x)
        assert np.allclose(value, f(p1, x), rtol=10 * rtol) == exact
    np.testing.assert_allclose(nt.taylor_expand(f, p0, 0)(p1, x), f(p0, x))


def test_error_falls_as_the_order_says(x64):
    errors = {}
    for degree in (1, 2):
        expansion = jax.jit(nt.taylor_expand(MLP.f, MLP.params, degree))
        errors[degree] = [
            float(jnp.abs(expansion(_moved(h), MLP.x1) - MLP.f(_moved(h), MLP.x1)).max())
            for h in (0.4, 0.2)
        ]
        assert errors[degree][0] > 1.5**degree * errors[degree][1]
    assert errors[2][1] < errors[1][1]


def test_linearised_kernel_does_not_move(rtol):
    lin = nt.linearize(MLP.f, MLP.params)
    here = nt.empirical_ntk_fn(MLP.f)(MLP.x1, MLP.x2, MLP.params)
    there = nt.empirical_ntk_fn(lin)(MLP.x1, MLP.x2, _moved(2.0))
    np.testing.assert_allclose(there, here, rtol=rtol, atol=rtol)


def test_keyword_arguments_and_trees_pass_through():
    f = lambda p, x, shift: {"y": x["u"] @ p + shift}
    got = nt.linearize(f, jnp.ones((3, 2)))(jnp.ones((3, 2)), {"u": jnp.ones((4, 3))}, shift=1.0)
    np.testing.assert_allclose(got["y"], 4.0)


def test_errors():
    with pytest.raises(ValueError, match=r"expanded about params with leaves .*\(3, 2\).*\(2, 2\)"):
        nt.linearize(lambda p, x: x @ p, jnp.ones((3, 2)))(jnp.ones((2, 2)), jnp.ones((4, 3)))
    with pytest.raises(ValueError, match="expanded about params with leaves"):
        nt.linearize(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 2)), "n": 3})(
            {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))
        )
    with pytest.raises(
        TypeError, match=r"output\['class'\] of f has dtype int32 and no derivative"
    ):
        nt.linearize(lambda p, x: {"class": jnp.argmax(x @ p, -1).astype("int32")}, jnp.eye(3))(
            jnp.eye(3), jnp.ones((4, 3))
        )
    with pytest.raises(ValueError, match="degree=-1 must be 0 or more"):
        nt.taylor_expand(MLP.f, MLP.params, -1)
    with pytest.raises(TypeError, match=r"degree=1\.0 must be an integer"):
        nt.taylor_expand(MLP.f, MLP.params, 1.0)
