"""Piecewise linear functions in single precision, against their duals in double precision."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tangents import stax
from tangents._infinite.dual import corners
from tangents._infinite.layers.nonlinearity_expanded import HARD_TANH, expansion_of


def leaky_bend(x):  # one kink
    return jnp.where(x > 0.3, x, 0.1 * x + 0.27)


def unequal(x):  # both kinks, no parity, not an unscaled place
    return 0.5 + 0.2 * x + jnp.maximum(x - 3, 0) - 0.4 * jnp.maximum(-x - 3, 0)


FUNCTIONS = {
    "HardTanh": (1.0, lambda: HARD_TANH),
    "hard_sigmoid": (3.0, lambda: expansion_of(jax.nn.hard_sigmoid)),
    "leaky_bend": (0.3, lambda: expansion_of(leaky_bend)),
    "unequal": (3.0, lambda: expansion_of(unequal)),
}


def pairs(place: float) -> tuple[np.ndarray, ...]:
    """Correlations from equal to opposite, deviations up to those that are held, in float32."""
    rng = np.random.default_rng(0)
    n = 4000
    sd1 = np.where(rng.random(n) < 0.5, rng.uniform(0.01, 2.5, n), 10 ** rng.uniform(-2, 0.39, n))
    near = sd1 * (1 + 10 ** rng.uniform(-7, -1, n) * rng.choice([-1, 1], n))
    other = 10 ** rng.uniform(-2, 0.39, n)
    sd2 = np.choose(rng.integers(0, 3, n), [sd1, np.clip(near, 0.01, 2.5), other])
    sd1[:2], sd2[:2] = 0.0, (0.0, 1.0)
    apart = np.choose(
        rng.integers(0, 3, n),
        [10 ** rng.uniform(-12, -2, n), np.zeros(n), 1 - np.cos(rng.uniform(0, np.pi / 2, n))],
    )
    var1, var2 = (np.asarray((sd * place) ** 2, np.float32) for sd in (sd1, sd2))
    roots = np.sqrt(var1.astype(np.float64)) * np.sqrt(var2.astype(np.float64))
    return np.asarray(rng.choice([-1, 1], n) * (1 - apart) * roots, np.float32), var1, var2


@pytest.mark.parametrize("name", FUNCTIONS)
def test_single_precision_against_double(name):
    place, make = FUNCTIONS[name]
    dual = jax.jit(functools.partial(make().dual, {}))
    given = pairs(place)
    single = dual(*(jnp.asarray(a) for a in given))
    assert single.nngp.dtype == jnp.float32
    with jax.enable_x64(True):
        c, v1, v2 = (jnp.asarray(a, jnp.float64) for a in given)
        double, own1, own2 = (
            [np.asarray(a) for a in dual(*args)[:2]] for args in ((c, v1, v2), (v1,) * 3, (v2,) * 3)
        )
    for k, bound in ((0, 2.5e-6), (1, 1.5e-6)):
        scale = np.sqrt(own1[k] * own2[k])
        error = np.abs(np.asarray(single[k], np.float64) - double[k])
        assert np.all(error <= bound * scale + 1e-15)
        assert np.sqrt(np.mean((error[2:] / scale[2:]) ** 2)) < 3e-7


def test_beyond_the_polynomials():
    """Larger deviations are computed as in double precision, and meet where they begin."""
    v = np.asarray([6.24, 6.26], np.float32)
    dual = jax.jit(functools.partial(HARD_TANH.dual, {}))
    inside, outside = (dual(v[i] / 2, v[i], v[i]) for i in (0, 1))
    np.testing.assert_allclose(inside.nngp, outside.nngp, rtol=2e-3)
    np.testing.assert_allclose(inside.d_nngp, outside.d_nngp, rtol=5e-3)
    far = jnp.asarray([400.0], jnp.float32)
    given = (0.9 * far, far, far)
    with jax.enable_x64(True):
        exact = dual(*(jnp.asarray(np.asarray(a), jnp.float64) for a in given))
    np.testing.assert_allclose(dual(*given).nngp, exact.nngp, rtol=1e-4)


def test_derivatives_are_those_of_the_closed_form():
    given = tuple(a[:100] for a in pairs(1.0))

    def total(c, v1, v2):
        dual = HARD_TANH.dual({}, c, v1, v2)
        return jnp.sum(dual.nngp) + jnp.sum(dual.d_nngp)

    gradient = jax.grad(total, (0, 1, 2))
    single = jax.jit(gradient)(*(jnp.asarray(a) for a in given))
    each = jax.jit(jax.vmap(gradient))(*(jnp.asarray(a) for a in given))
    with jax.enable_x64(True):
        exact = jax.jit(gradient)(*(jnp.asarray(a, jnp.float64) for a in given))
    # The closed form in float32 is rough for small variances and near correlations of 1.
    near = given[0] ** 2 > 0.9 * given[1] * given[2]
    clear = ~near & (np.minimum(given[1], given[2]) > 0.01)
    assert np.sum(clear) >= 10
    for one, many, want in zip(single, each, exact, strict=True):
        assert np.all(np.isfinite(one)) and np.all(np.isfinite(many))
        for got in (one, many):
            np.testing.assert_allclose(got[clear], np.asarray(want)[clear], rtol=2e-4, atol=2e-4)


def test_equal_inputs_agree_with_the_diagonal():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 40)), jnp.float32)
    net = stax.serial(stax.Dense(1, 1.4, 0.1), stax.HardTanh())
    kernel = np.asarray(net[2](x, x + 0, "nngp"))
    np.testing.assert_allclose(kernel, kernel.T, rtol=2e-6)
    np.testing.assert_allclose(kernel, net[2](x, None, "nngp"), rtol=2e-6)


def test_which_functions():
    kinks = ((1.0, (0.0, 0.5, 0.0, 0.0)),)
    found = corners.line(lambda x: 2 - 3 * x + 0.5 * jnp.maximum(x - 1, 0), kinks)
    assert found is not None
    np.testing.assert_allclose(found, (2, -3), rtol=1e-12)
    assert corners.line(lambda x: jnp.tanh(x) + 0.5 * jnp.maximum(x - 1, 0), kinks) is None
    assert corners.line(jnp.tanh, ()) is None
    form = corners.bent(found, kinks)
    assert form is not None
    np.testing.assert_allclose(form, (2, -3, 1, 0.5, 0), rtol=1e-12)
    two = (*kinks, (2.0, (0.0, 1.0, 0.0, 0.0)))
    assert corners.bent((0.0, 0.0), two) is None
