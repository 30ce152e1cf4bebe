"""`empirical_kernel_fn`, `empirical_nngp_fn` and the forms of `get`."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import tree_util

import tangents as nt
from finite.table import NETWORKS, normal
from reference import finite as reference

MLP = NETWORKS[0]


@pytest.mark.parametrize("network", [NETWORKS[0], NETWORKS[6]], ids=lambda n: n.name)
def test_nngp_against_reference(network, rtol):
    for trace, diagonal in (((-1,), ()), ((), ()), ((), (-1,)), (1, ())):
        for second in (network.x2, None):
            got = nt.empirical_nngp_fn(network.f, trace, diagonal)(
                network.x1, second, network.params
            )
            expected = reference.nngp(
                network.f, network.params, network.x1, second, trace, diagonal
            )
            assert got.shape == expected.shape
            np.testing.assert_allclose(got, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


def test_nngp_without_parameters(rtol):
    x = normal(0, 4, 3)
    for params in ((), [3, None]):
        got = nt.empirical_nngp_fn(lambda p, x: jnp.sin(x))(x, None, params)
        np.testing.assert_allclose(got, jnp.sin(x) @ jnp.sin(x).T / 3, rtol=rtol)


def test_forms_of_get(rtol):
    kernel_fn = nt.empirical_kernel_fn(MLP.f, vmap_axes=0)
    call = lambda get: kernel_fn(MLP.x1, MLP.x2, get, MLP.params)
    everything = call(None)
    assert type(everything).__name__ == "EmpiricalKernel"
    assert everything._fields == ("nngp", "ntk")
    np.testing.assert_allclose(
        everything.ntk, reference.ntk(MLP.f, MLP.params, MLP.x1, MLP.x2), rtol=rtol
    )
    np.testing.assert_allclose(
        everything.nngp, reference.nngp(MLP.f, MLP.params, MLP.x1, MLP.x2), rtol=rtol
    )
    np.testing.assert_array_equal(call("NTK"), everything.ntk)
    assert call(["ntk", "nngp"])._fields == ("ntk", "nngp")
    assert call(("nngp",))._fields == ("nngp",)
    assert type(call(("nngp", "ntk"))) is type(everything)
    with pytest.raises(ValueError, match='"get" must be non-empty'):
        call(())
    with pytest.raises(ValueError, match='entries in "get" must be unique'):
        call(("ntk", "NTK"))
    with pytest.raises(KeyError, match="get='cov1' is neither 'nngp' nor 'ntk'"):
        call("cov1")


def test_trees_of_results():
    f = lambda p, x: {"a": x @ p, "b": [jnp.sin(x @ p)]}
    kernels = nt.empirical_kernel_fn(f)(normal(0, 4, 3), None, None, normal(1, 3, 2))
    assert kernels["a"].nngp.shape == kernels["b"][0].ntk.shape == (4, 4)
    only = nt.empirical_kernel_fn(f)(normal(0, 4, 3), None, "ntk", normal(1, 3, 2))
    assert tree_util.tree_structure(only) == tree_util.tree_structure({"a": 0, "b": [0]})
