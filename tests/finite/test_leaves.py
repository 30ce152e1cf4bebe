"""Leaves that are not differentiated, and complex ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tangents as nt
from finite.table import METHODS, normal
from reference import finite as reference


def test_carried_leaves(rtol):
    """Counters, keys, None, strings and callables reach the function unchanged."""

    def f(p, x):
        assert p["none"] is None and p["name"] == "net"
        jax.random.key_data(p["key"])
        return p["act"](x @ p["w"]) * p["count"].astype(x.dtype) * p["scale"]

    params = {
        "w": normal(0, 3, 2),
        "scale": 2.0,
        "count": jnp.array(3),
        "flag": True,
        "steps": 5,
        "key": jax.random.key(0),
        "none": None,
        "name": "net",
        "act": jnp.tanh,
        "table": np.arange(3),
    }
    x1, x2 = normal(1, 4, 3), normal(2, 2, 3)
    real = lambda p, x: jnp.tanh(x @ p["w"]) * 3 * p["scale"]
    moving = {"w": params["w"], "scale": jnp.asarray(2.0)}
    expected = reference.ntk(real, moving, x1, x2)
    for method in METHODS:
        got = nt.empirical_ntk_fn(f, implementation=method)(x1, x2, params)
        np.testing.assert_allclose(got, expected, rtol=rtol)
    op = nt.ntk_operator(f, params, x1, x2)
    np.testing.assert_allclose(
        (op @ jnp.ones((2, 2))).reshape(-1), op.materialise() @ jnp.ones(4), rtol=rtol
    )
    other = dict(params, scale=3.0)
    np.testing.assert_allclose(
        op.at(other).materialise(trace_axes=-1),
        reference.ntk(real, {"w": params["w"], "scale": jnp.asarray(3.0)}, x1, x2),
        rtol=rtol,
    )
    with pytest.raises(ValueError, match="leaves that are not arrays, must be equal"):
        op.at(dict(params, name="other"))
    v = jnp.ones((2, 2))
    np.testing.assert_allclose(nt.empirical_ntk_vp_fn(f, x1, x2, params)(v), op @ v, rtol=rtol)
    lin = nt.linearize(f, params)
    np.testing.assert_allclose(lin(params, x1), f(params, x1), rtol=rtol)


def test_complex_parameters_count_as_two_real_ones(rtol):
    """Θ = J_re J_reᵀ + J_im J_imᵀ, the convention that the documentation states."""
    w = jax.lax.complex(normal(0, 3, 2), normal(1, 3, 2))
    f = lambda p, x: jnp.abs(x.astype(p.dtype) @ p) ** 2
    x1, x2 = normal(2, 4, 3), normal(3, 2, 3)
    split = lambda p, x: f(jax.lax.complex(p[0], p[1]), x)
    expected = reference.ntk(split, [w.real, w.imag], x1, x2)
    for method in METHODS:
        got = nt.empirical_ntk_fn(f, vmap_axes=0, implementation=method)(x1, x2, w)
        np.testing.assert_allclose(got, expected, rtol=rtol)


def test_refusals_name_what_is_wrong():
    x = normal(0, 4, 3)
    with pytest.raises(TypeError, match=r"returns an array of dtype complex.*shape \(4, 2\)"):
        nt.empirical_ntk_fn(lambda p, x: jax.lax.complex(x @ p, x @ p))(x, None, normal(1, 3, 2))
    with pytest.raises(ValueError, match="params has no floating-point leaf"):
        nt.empirical_ntk_fn(lambda p, x: x * p[0])(x, None, [3, None])
    with pytest.raises(ValueError, match="x1 is None; only x2 may be"):
        nt.empirical_ntk_fn(lambda p, x: x @ p)(None, x, normal(1, 3, 2))
