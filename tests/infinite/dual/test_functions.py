"""Duals of functions the user gives: quadrature and formulas."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tangents._infinite.dual.error_function import ERF
from tangents._infinite.dual.exponential import SIN
from tangents._infinite.dual.quadrature import elementwise, elementwise_numerical

PAIRS = tuple(
    jnp.asarray(a, float)
    for a in zip(
        (0.6, 0.6, 0.6), (0.3, 0.5, 0.7), (0.0, 0.5, 0.7), (-0.5, 0.5, 0.5), (0.0, 0.0, 0.5),
        strict=True,
    )
)  # fmt: skip
PLAIN = {"a": 1.0, "b": 1.0, "c": 0.0}


def test_quadrature_of_a_polynomial_is_exact(rtol):
    kernel = elementwise_numerical(lambda x: x**2 + x, 4, None)
    c, v1, v2 = PAIRS
    got = kernel.dual({}, c, v1, v2)
    np.testing.assert_allclose(got.nngp, 2 * c**2 + v1 * v2 + c, rtol=rtol, atol=rtol / 100)
    np.testing.assert_allclose(got.d_nngp, 4 * c + 1, rtol=rtol, atol=rtol / 100)
    np.testing.assert_allclose(kernel.diagonal({}, v1), 3 * v1**2 + v1, rtol=rtol)


@pytest.mark.parametrize("df", [None, jnp.cos])
def test_quadrature_converges_to_the_closed_form(df, rtol):
    kernel = elementwise_numerical(jnp.sin, 24, df)
    got, exact = kernel.dual({}, *PAIRS), SIN.dual(PLAIN, *PAIRS)
    np.testing.assert_allclose(got.nngp, exact.nngp, rtol=rtol, atol=rtol / 100)
    np.testing.assert_allclose(got.d_nngp, exact.d_nngp, rtol=rtol, atol=rtol / 100)
    np.testing.assert_allclose(
        kernel.diagonal({}, PAIRS[1]), SIN.diagonal(PLAIN, PAIRS[1]), rtol=rtol, atol=rtol / 100
    )


def test_gradient_of_the_quadrature_is_that_of_the_closed_form(rtol):
    """Also at equal and opposite inputs, where the nodes of v have an infinite derivative."""
    kernel = elementwise_numerical(jnp.sin, 24, None)

    def gradients(dual, hyper):
        def value(c, v1, v2):
            d = dual(hyper, c, v1, v2)
            return jnp.sum(d.nngp) + 2 * jnp.sum(d.d_nngp)

        return jax.grad(value, (0, 1, 2))(*PAIRS)

    positive = np.asarray(PAIRS[1] > 0)  # at zero variance the quadrature's is 0 by convention
    for got, exact in zip(gradients(kernel.dual, {}), gradients(SIN.dual, PLAIN), strict=True):
        assert np.all(np.isfinite(got))
        np.testing.assert_allclose(got[positive], exact[positive], rtol=100 * rtol, atol=10 * rtol)


def test_formula_of_the_user_with_and_without_its_derivative(rtol):
    def nngp_fn(c, v1, v2):
        return 2 / jnp.pi * jnp.arcsin(2 * c / jnp.sqrt((1 + 2 * v1) * (1 + 2 * v2)))

    def d_nngp_fn(c, v1, v2):
        return 4 / jnp.pi / jnp.sqrt((1 + 2 * v1) * (1 + 2 * v2) - 4 * c**2)

    exact = ERF.dual(PLAIN, *PAIRS)
    for slope in (None, d_nngp_fn):
        got = elementwise(None, nngp_fn, slope).dual({}, *PAIRS)
        np.testing.assert_allclose(got.nngp, exact.nngp, rtol=rtol)
        np.testing.assert_allclose(got.d_nngp, exact.d_nngp, rtol=rtol)


def test_formula_of_the_user_broadcasts():
    kernel = elementwise(None, lambda c, v1, v2: c * v1 + v2, lambda c, v1, v2: v1)
    c, v1, v2 = jnp.ones((3, 4)), jnp.ones((3, 1)), 2 * jnp.ones((1, 4))
    got = kernel.dual({}, c, v1, v2)
    assert got.nngp.shape == got.d_nngp.shape == (3, 4)
    np.testing.assert_array_equal(got.nngp, 3 * np.ones((3, 4)))
