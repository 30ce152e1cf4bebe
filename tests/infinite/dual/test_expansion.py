"""Duals by expansion: named functions and any other, against quadrature and against themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from mpmath import mpf

from infinite.dual.panels import panel_pair
from infinite.dual.quadrature import kinked_pair, smooth_pair
from tangents import stax
from tangents._infinite.dual.breakpoints import breakpoints
from tangents._infinite.layers import nonlinearity_expanded as expanded


def _elu(alpha):
    alpha = mpf(alpha)
    return (
        lambda x: x if x > 0 else alpha * mpmath.expm1(x),
        lambda x: mpf(1) if x > 0 else alpha * mpmath.exp(x),
    )


def _selu():
    scale, alpha = (
        mpf("1.0507009873554804934193349852946"),
        mpf("1.6732632423543772848170429916717"),
    )
    f, df = _elu(alpha)
    return lambda x: scale * f(x), lambda x: scale * df(x)


def _mish_slope(x):
    e = mpmath.exp(x)
    t = mpmath.tanh(mpmath.log1p(e))
    return t + x * (1 - t**2) * e / (1 + e)


def _sigmoid(x):
    return 1 / (1 + mpmath.exp(-x))


@dataclasses.dataclass(frozen=True)
class Named:
    layer: Callable[[], Any]
    phi: tuple[Callable, Callable]
    integrate: Callable
    bound: float  # in float64, relative to sqrt(K11 K22)


def smooth(functions, cov12, var1, var2):
    """Along a line the poles of tanh, which are near, are met by higher powers."""
    on_a_line = cov12**2 >= var1 * var2
    return smooth_pair(functions, cov12, var1, var2, step=0.125 if on_a_line else 0.25)


NAMED = {
    "Tanh": Named(stax.Tanh, (mpmath.tanh, lambda x: mpmath.sech(x) ** 2), smooth, 1e-12),
    "Softplus": Named(
        stax.Softplus, (lambda x: mpmath.log1p(mpmath.exp(x)), _sigmoid), smooth, 1e-12
    ),
    "SiLU": Named(
        stax.SiLU,
        (lambda x: x * _sigmoid(x), lambda x: _sigmoid(x) * (1 + x * (1 - _sigmoid(x)))),
        smooth,
        1e-12,
    ),
    "Mish": Named(
        stax.Mish,
        (lambda x: x * mpmath.tanh(mpmath.log1p(mpmath.exp(x))), _mish_slope),
        smooth,
        1e-12,
    ),
    "Elu": Named(stax.Elu, _elu(1), kinked_pair, 1e-12),
    "Elu(0.3)": Named(lambda: stax.Elu(0.3), _elu(0.3), kinked_pair, 1e-12),
    "Selu": Named(stax.Selu, _selu(), kinked_pair, 1e-12),
}
PAIRS = {
    "equal": (1.25, 1.25, 1.25),
    "parallel": (0.75, 0.375, 1.5),
    "orthogonal": (0.0, 0.75, 1.25),
    "opposite": (-0.75, 0.75, 0.75),
    "obtuse": (-0.625, 0.875, 1.25),
    "near": (0.9375, 0.875, 1.03125),
}
FLOAT32 = 5e-6


def quick(names, chosen):
    """Rows; all but the chosen ones are slow."""
    return [n if n in chosen else pytest.param(n, marks=pytest.mark.slow) for n in names]


def dual(layer, cov12, var1, var2):
    """The dual of a layer at many pairs, compiled as in a network."""
    node = layer.node
    arrays = (jnp.asarray(a, float) for a in (cov12, var1, var2))
    return jax.jit(lambda *pair: node.kernel.dual(node.hyper, *pair))(*arrays)


@pytest.mark.parametrize("name", quick(NAMED, ("Tanh", "Selu")))
def test_named_functions_against_quadrature(name, x64):
    row = NAMED[name]
    got = dual(row.layer(), *zip(*PAIRS.values(), strict=True))
    bound = row.bound if x64 else FLOAT32
    for i, (c, v1, v2) in enumerate(PAIRS.values()):
        nngp, d_nngp = row.integrate(row.phi, c, v1, v2)
        sides = [row.integrate(row.phi, v, v, v) for v in (v1, v2)]
        scale, d_scale = (mpmath.sqrt(a * b) for a, b in zip(*sides, strict=True))
        assert abs(mpf(float(got.nngp[i])) - nngp) <= bound * scale, (c, v1, v2)
        more = 1 if x64 else 10
        assert abs(mpf(float(got.d_nngp[i])) - d_nngp) <= more * bound * d_scale, (c, v1, v2)


# name: function, the same for NumPy, its slope, kinks
KINKED = {
    "HardTanh": (
        None,
        lambda x: np.clip(x, -1, 1),
        lambda x: (np.abs(x) < 1) * 1.0,
        (-1.0, 1.0),
    ),
    "relu6": (
        jax.nn.relu6,
        lambda x: np.clip(x, 0, 6),
        lambda x: ((x > 0) & (x < 6)) * 1.0,
        (0.0, 6.0),
    ),
    "soft shrink": (
        lambda x: jnp.sign(x) * jnp.maximum(jnp.abs(x) - 0.5, 0),
        lambda x: np.sign(x) * np.maximum(np.abs(x) - 0.5, 0),
        lambda x: (np.abs(x) > 0.5) * 1.0,
        (-0.5, 0.5),
    ),
    "tilted": (
        lambda x: jnp.abs(x - 0.7) + jnp.sin(x),
        lambda x: np.abs(x - 0.7) + np.sin(x),
        lambda x: np.sign(x - 0.7) + np.cos(x),
        (0.7,),
    ),
    "hard swish": (
        jax.nn.hard_swish,
        lambda x: x * np.clip(x + 3, 0, 6) / 6,
        lambda x: np.where(np.abs(x) < 3, (2 * x + 3) / 6, (x > 0) * 1.0),
        (-3.0, 3.0),
    ),
    "Huber": (
        lambda x: jnp.where(jnp.abs(x) < 1, x * x / 2, jnp.abs(x) - 0.5),
        lambda x: np.where(np.abs(x) < 1, x * x / 2, np.abs(x) - 0.5),
        lambda x: np.clip(x, -1, 1),
        (-1.0, 1.0),
    ),
    "kinks of both kinds": (
        lambda x: jnp.maximum(x - 1, 0) ** 2 / 2 + jnp.maximum(x, 0) * (1 + x) + jnp.sin(x),
        lambda x: np.maximum(x - 1, 0) ** 2 / 2 + np.maximum(x, 0) * (1 + x) + np.sin(x),
        lambda x: np.maximum(x - 1, 0) + (x > 0) * (1 + 2 * x) + np.cos(x),
        (0.0, 1.0),
    ),
}


@pytest.mark.parametrize("name", quick(KINKED, ("HardTanh", "Huber")))
def test_functions_with_kinks_against_quadrature(name, x64):
    fn, f, df, kinks = KINKED[name]
    layer = stax.HardTanh() if fn is None else stax.Elementwise(fn)
    if fn is not None:
        assert [b.place for b in breakpoints(fn)] == list(kinks)
    got = dual(layer, *zip(*PAIRS.values(), strict=True))
    bound = 1e-12 if x64 else 2e-6
    for i, (c, v1, v2) in enumerate(PAIRS.values()):
        for g, value in ((f, got.nngp[i]), (df, got.d_nngp[i])):
            exact = panel_pair(g, c, v1, v2, kinks)
            scale = np.sqrt(panel_pair(g, v1, v1, v1, kinks) * panel_pair(g, v2, v2, v2, kinks))
            # At equal inputs rounding of the covariance moves a step by its root.
            root = 300 if not x64 and g is df else 1
            assert abs(float(value) - exact) <= root * bound * scale, (c, v1, v2)


@pytest.mark.parametrize("name", quick(["Huber", "hard swish"], ("Huber",)))
def test_functions_with_arches_at_any_deviation(name):
    """float32 against float64: ramps squared, which grow like variances, must not cancel."""
    rho = np.array([0.5, -0.3, 0.9, 1.0])
    node = stax.Elementwise(KINKED[name][0]).node
    compiled = [jax.jit(lambda *pair: node.kernel.dual(node.hyper, *pair)[:2]) for _ in range(2)]
    for sd in (0.1, 1.0, 3.0, 3.9, 4.5, 12.5, 30.0, 100.0):
        found = []
        for x64, of in zip((False, True), compiled, strict=True):
            with jax.enable_x64(x64):
                args = rho * sd**2, sd**2 * np.ones(4), sd**2 * np.ones(4)
                found.append(np.asarray(of(*(jnp.asarray(a, float) for a in args)), np.float64))
        (nngp, slope), (exact, exact_slope) = found
        np.testing.assert_array_less(np.abs(nngp - exact), 1e-5 * exact[-1])
        # At equal inputs rounding of the covariance moves a step by its root.
        np.testing.assert_array_less(np.abs(slope - exact_slope)[:-1], 5e-5 * exact_slope[-1])


def test_smooth_functions_have_no_breakpoints():
    for fn in (jnp.tanh, jax.nn.softplus, jax.nn.gelu, jnp.sin, lambda x: jnp.tanh(30 * x)):
        assert breakpoints(fn) == ()
    ((place, jumps),) = breakpoints(lambda x: jnp.where(x > 0.25, x, 3 * x) ** 2)
    assert place == 0.25
    np.testing.assert_allclose(jumps, (-0.5, -4.0, -16.0, 0.0), rtol=1e-4)


def test_breakpoints_are_found_under_jit():
    layers = stax.Dense(1), stax.Elementwise(jax.nn.relu6), stax.Dense(1)
    x = jax.random.normal(jax.random.key(0), (3, 4))
    kernel_fn = stax.serial(*layers)[2]
    np.testing.assert_allclose(
        jax.jit(lambda x: kernel_fn(x, None, "ntk"))(x), kernel_fn(x, None, "ntk"), rtol=1e-5
    )


@pytest.mark.parametrize("closed", quick(["Erf", "Gelu", "Relu", "Abs", "Sin"], ()))
def test_expansions_of_functions_with_closed_forms(closed, x64):
    layer = getattr(stax, closed)()
    node = layer.node

    def fn(x):
        return node.kernel.phi(node.hyper, x)

    rng = np.random.default_rng(0)
    v1, v2 = rng.uniform(0.0, 3.0, (2, 20))
    c = np.sqrt(v1 * v2) * rng.uniform(-1, 1, 20)
    got, expected = dual(stax.Elementwise(fn), c, v1, v2), dual(layer, c, v1, v2)
    for a, b in zip(got[:2], expected[:2], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12 if x64 else 1e-5)


@pytest.mark.parametrize("name", quick(["Tanh", "HardTanh"], ("Tanh",)))
def test_zero_variance_and_no_nan(name):
    v1, v2 = jnp.asarray([0.0, 0.0, 1e-30, 1e4] * 2), jnp.asarray([0.0, 1.0, 2.0, 1e4] * 2)
    c = jnp.sqrt(v1 * v2) * jnp.repeat(jnp.asarray([0.0, 1.0]), 4)
    node = getattr(stax, name)().node

    def total(c, v1, v2):
        out = node.kernel.dual(node.hyper, c, v1, v2)
        return jnp.sum(out.nngp + out.d_nngp)

    value, slopes = jax.jit(jax.value_and_grad(total, (0, 1, 2)))(c, v1, v2)
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(s)) for s in slopes)


def test_no_variance_at_all():
    out = dual(stax.Softplus(), [0.0], [0.0], [0.0])
    np.testing.assert_allclose(out.nngp, np.log(2) ** 2, rtol=1e-6)
    np.testing.assert_allclose(out.d_nngp, 0.25, rtol=1e-6)


def test_what_the_series_leaves_out(x64):
    small, large = jnp.asarray([1.0]), jnp.asarray([1e8])
    truncation = expanded.TANH.truncation
    assert float(truncation({}, small)[0]) < (1e-20 if x64 else 1e-12)
    assert float(truncation({}, large)[0]) > 1e-3


def test_large_variances(x64):
    """Tanh of 1e4 times a unit normal is a sign but for its slope: the square lacks 2 g(0) / sd."""
    large = jnp.asarray([1e8])
    variance = dual(stax.Tanh(), large, large, large).nngp
    exact = 1 - 2e-4 / np.sqrt(2 * np.pi)
    np.testing.assert_allclose(variance, exact, rtol=1e-11 if x64 else 1e-6)


X = np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5], [-1.0, 0.0, -0.5], [1.0, 1e-3, 0.5]])


def network(layer):
    return stax.serial(stax.Dense(1, 1.3, 0.1), layer, stax.Dense(1, 1.1), layer, stax.Dense(1))


@pytest.mark.parametrize("name", quick(["Tanh", "Selu", "HardTanh"], ("Tanh",)))
def test_gradients_in_the_inputs(name, x64):
    kernel_fn = network(getattr(stax, name)())[2]
    x = jnp.asarray(X, float)
    weights = jax.random.normal(jax.random.key(0), (4, 4))

    def total(x):
        return jnp.sum(weights * kernel_fn(x, x[::-1] + 0.3, "ntk"))

    direction = jax.random.normal(jax.random.key(1), x.shape)
    slope = jnp.vdot(jax.jit(jax.grad(total))(x), direction)
    t = 1e-5 if x64 else 3e-2
    difference = (total(x + t * direction) - total(x - t * direction)) / (2 * t)
    np.testing.assert_allclose(slope, difference, rtol=1e-6 if x64 else 2e-2)


def test_gradient_in_hyperparameters(x64):
    x = jnp.asarray(X, float)

    def total(h):
        layers = stax.Dense(1, h[0]), stax.Elu(h[1]), stax.Dense(1)
        return stax.serial(*layers)[2](x, None, "ntk").sum()

    h = jnp.array([1.2, 0.6])
    slope = jax.grad(total)(h)
    t = 1e-5 if x64 else 1e-2
    for i in range(2):
        e = jnp.zeros_like(h).at[i].set(t)
        difference = (total(h + e) - total(h - e)) / (2 * t)
        np.testing.assert_allclose(slope[i], difference, rtol=1e-6 if x64 else 1e-2)


def test_kernels_are_symmetric_and_positive_semidefinite(x64):
    x = jax.random.normal(jax.random.key(2), (12, 5))
    for K in network(stax.Tanh())[2](x, None, ("nngp", "ntk")):
        # Each is a difference of numbers up to twice the largest variance, rounded on either side.
        np.testing.assert_allclose(K, K.T, rtol=0, atol=(1e-13 if x64 else 3e-7) * np.abs(K).max())
        assert np.linalg.eigvalsh(K).min() > -(1e-13 if x64 else 1e-6) * np.linalg.norm(K, 2)


@pytest.mark.slow  # mapped over, every number of terms is compiled and computed
def test_kernels_map_over_rows(x64):
    x = jax.random.normal(jax.random.key(2), (4, 5))
    kernel_fn = stax.serial(stax.Dense(1), stax.Tanh(), stax.Dense(1))[2]
    rows = jax.vmap(lambda a: kernel_fn(a[None], x, "ntk")[0])(x)
    np.testing.assert_allclose(rows, kernel_fn(x, None, "ntk"), rtol=1e-10 if x64 else 1e-4)


def test_positions_of_images(rtol):
    """All layouts of a tile give the same numbers."""
    x = jax.random.normal(jax.random.key(3), (2, 4, 3, 2))
    kernel_fn = stax.serial(stax.Conv(1, (2, 2), b_std=0.1), stax.SiLU(), stax.Conv(1, (2, 2)))[2]
    full = kernel_fn(x, None, ("nngp", "ntk"))
    diagonal = kernel_fn(x, None, ("nngp", "ntk"), diagonal_spatial=True)
    for K, D in zip(full, diagonal, strict=True):
        np.testing.assert_allclose(jnp.einsum("nmaabb->nmab", K), D, rtol=rtol)
