"""Large standard deviations: series whose high terms are sampled, against quadrature."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erfcx, ndtr

from tangents import stax
from tangents._infinite.dual import hermite_functions, sampled, sampling
from tangents._infinite.layers import nonlinearity_expanded as expanded

_G0 = 1 / np.sqrt(2 * np.pi)
_ELU, _SELU = (1.0, 1.0), (1.0507009873554805, 1.6732632423543772)
FUNCTIONS = {"Elu": (_ELU, lambda: expanded.elu_of(1.0)), "Selu": (_SELU, lambda: expanded.SELU)}


def graded(reach: float, finest: float) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on [-reach, reach], panels growing from 0."""
    edges = np.concatenate([[0], np.geomspace(finest, reach, 1 + int(3 * np.log(reach / finest)))])
    t, w = np.polynomial.legendre.leggauss(16)
    half = np.diff(edges)[:, None] / 2
    x, w = (edges[:-1, None] + half * (1 + t)).ravel(), (half * w).ravel()
    return np.concatenate([-x[::-1], x]), np.concatenate([w[::-1], w])


def pair(form: tuple[float, float], sd1: float, sd2: float, theta: float) -> np.ndarray:
    """E[phi phi], E[phi' phi'] of scale Elu(alpha): u by quadrature, v given u in closed form."""
    scale, alpha = form
    finest = 1e-3 * sd1 * max(min(1 / sd1, np.sin(theta)), 1e-8 / sd1)
    u, w = graded(9.5 * sd1, finest)
    w = w * np.exp(-u * u / 2 / sd1**2) / sd1 * _G0
    mean, width = np.cos(theta) * sd2 / sd1 * u, sd2 * np.sin(theta)
    phi, slope = np.where(u > 0, u, alpha * np.expm1(np.minimum(u, 0))), _elu_slope(alpha, u)
    if theta == 0:
        other = np.where(mean > 0, mean, alpha * np.expm1(np.minimum(mean, 0)))
        other_slope = _elu_slope(alpha, mean)
    else:
        z = mean / width
        shifted = z + width
        with np.errstate(over="ignore"):
            near = erfcx(np.maximum(shifted, -20) / np.sqrt(2)) * np.exp(-z * z / 2) / 2
            growth = np.where(shifted > -20, near, np.exp(mean + width**2 / 2))
        line = mean * ndtr(z) + width * _G0 * np.exp(-z * z / 2)
        other = line + alpha * (growth - ndtr(-z))
        other_slope = ndtr(z) + alpha * growth
    return scale**2 * np.array([np.sum(w * phi * other), np.sum(w * slope * other_slope)])


def _elu_slope(alpha, x):
    return np.where(x > 0, 1.0, alpha * np.exp(np.minimum(x, 0)))


DEVIATIONS = [(9, 9), (30, 30), (30, 41), (1e3, 1e3), (1e4, 50), (1e4, 1e4), (1e6, 1e6), (0.3, 20)]
ANGLES = [0.0, 1e-6, 1e-3, 0.03, 0.5, np.pi / 2, 2.5, np.pi - 1e-3]


def exact(form: tuple[float, float], args, with_gap: bool) -> tuple[np.ndarray, np.ndarray]:
    """Expectations of all pairs, as they are given, (pairs, 2), and what they are relative to."""
    cov, var1, var2, gap = (np.asarray(a, np.longdouble) for a in args)
    near = gap / np.sqrt(var1 * var2) if with_gap else 1 - np.abs(cov) / np.sqrt(var1 * var2)
    theta = 2 * np.arcsin(np.sqrt(np.maximum(near, 0) / 2))
    theta = np.where(cov < 0, np.pi - theta, theta).astype(float)
    sd1, sd2 = (np.sqrt(v).astype(float) for v in (var1, var2))
    own = {sd: pair(form, sd, sd, 0.0) for sd in {*sd1, *sd2}}
    values = [pair(form, *each) for each in zip(sd1, sd2, theta, strict=True)]
    return np.stack(values), np.stack(
        [np.sqrt(own[a] * own[b]) for a, b in zip(sd1, sd2, strict=True)]
    )


def given(dtype) -> tuple[jax.Array, ...]:
    """Covariance, variances and gap of all pairs."""
    sd1, sd2 = (np.repeat([both[i] for both in DEVIATIONS], len(ANGLES)) for i in (0, 1))
    theta = np.tile(ANGLES, len(DEVIATIONS))
    gap = 2 * np.sin(np.minimum(theta, np.pi - theta) / 2) ** 2
    arrays = sd1 * sd2 * np.cos(theta), sd1**2, sd2**2, gap * sd1 * sd2
    return tuple(jnp.asarray(a, dtype) for a in arrays)


@pytest.mark.parametrize("bound", [2e-6, 1e-12], ids=["single", "double"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_against_quadrature(name, bound):
    form, make = FUNCTIONS[name]
    with jax.enable_x64(bound < 1e-7):
        args = given(jnp.float32 if bound > 1e-7 else jnp.float64)
        got = jax.jit(functools.partial(make().dual, {}))(*args)
    assert got.nngp.dtype == args[0].dtype
    # Where no gap is carried the correlation counts, to its last digit.
    values, scales = exact(form, args, got.gap12 is not None)
    for k in (0, 1):
        error = np.abs(np.asarray(got[k], np.float64) - values[:, k])
        np.testing.assert_array_less(error, bound * scales[:, k])


def test_gap_does_not_cancel():
    """After Selu the gap is right to its own digits where the covariance has none left."""
    form, make = FUNCTIONS["Selu"]
    sd = jnp.full((3,), 1e3, jnp.float32)
    theta = np.array([1e-5, 1e-4, 1e-3])
    gap = jnp.asarray(2 * np.sin(theta / 2) ** 2 * 1e6, jnp.float32)
    one = sd * sd
    got = jax.jit(functools.partial(make().dual, {}))(one - gap, one, one, gap)
    # The gap is gap12 times the mean slope in between.
    slopes = [np.mean([pair(form, 1e3, 1e3, t * x)[1] for x in (0.2, 0.8)]) for t in theta]
    np.testing.assert_allclose(got.gap12, np.asarray(gap) * np.float32(slopes), rtol=2e-3)


def test_derivatives_are_those_of_double_precision():
    jumps = tuple(_SELU[0] * j for j in (1 - _SELU[1], -_SELU[1], -_SELU[1]))
    found = sampling.sampled(lambda x: _SELU[0] * jax.nn.elu(x, _SELU[1]), jumps)
    assert found is not None

    def total(c, v1, v2, gap):
        near, slope, scales = sampled.sums(found, c, v1, v2, gap, carried=False)
        nngp = scales[0] * scales[1] - near
        return jnp.sum(nngp / jnp.sqrt(v1 * v2)) + jnp.sum(slope)

    # At right angles the gap is clipped; at equal inputs that of d_nngp is a cusp.
    number = np.arange(len(ANGLES) * len(DEVIATIONS)) % len(ANGLES)
    cusp = (number == 0)[number != 5]
    args = tuple(a[number != 5] for a in given(jnp.float32))
    gradient = jax.grad(total, (0, 1, 2, 3))
    got = jax.jit(gradient)(*args)
    with jax.enable_x64(True):
        want = jax.jit(gradient)(*(jnp.asarray(a, jnp.float64) for a in args))
    for one, two in zip(got, want, strict=True):
        assert np.all(np.isfinite(one))
        error = np.abs(np.asarray(one, np.float64) - np.asarray(two))
        small = 1e-4 / np.sqrt(np.asarray(args[1]) * np.asarray(args[2]))
        bound = 2e-3 * np.abs(np.asarray(two)) + small
        np.testing.assert_array_less(error[~cusp], bound[~cusp])


@pytest.mark.slow  # the derivative of the expansion takes long to compile
def test_large_inputs_of_a_network():
    """Zero, equal, opposite inputs, of any size: kernels and gradients are finite."""
    x = np.random.default_rng(0).normal(size=(4, 5))
    x[1], x[2], x[3] = x[0], -x[0], 0
    _, _, kernel_fn = stax.serial(stax.Dense(1), stax.Selu(), stax.Dense(1))
    with jax.enable_x64(False):
        both = jax.jit(jax.value_and_grad(lambda x: jnp.sum(kernel_fn(x, None, "ntk"))))
        for size in (1e2, 1e6):
            value, slope = both(jnp.asarray(size * x, jnp.float32))
            assert np.isfinite(value) and np.all(np.isfinite(slope))


@pytest.mark.parametrize("precision", [sampling.SINGLE, sampling.DOUBLE])
def test_which_functions(precision):
    none = (0.0, 0.0, 0.0)
    for fn in (jnp.tanh, jax.nn.softplus, jax.nn.silu, jax.nn.mish, jnp.arctan):
        assert sampling.sampled(fn, none, precision) is not None
    for fn in (jnp.cos, jnp.exp, lambda x: x * x, lambda x: jnp.tanh(x - 9)):
        assert sampling.sampled(fn, none, precision) is None


def test_hermite_functions_of_any_order():
    """Phase and amplitude against the recurrence, at integers."""
    z = np.linspace(0, 12, 99)
    want = hermite_functions.first(z, 402)
    for n in (64, 100, 256, 400):
        sign = (-1) ** (n // 2)
        got = [
            hermite_functions.later(np.array([n + odd]), z[None], bool(odd))[0] for odd in (0, 1)
        ]
        np.testing.assert_allclose(got, sign * want[n : n + 2], rtol=0, atol=4e-15)


@pytest.mark.parametrize("precision", [sampling.SINGLE, sampling.DOUBLE])
def test_sums_of_sampled_orders(precision):
    """A sum over all n against that of what is sampled."""
    order, weight, _ = sampling.constants(precision)
    bound = 1e-12 if precision == sampling.DOUBLE else 1e-6
    for decay in (1e-5, 1e-2, 0.3):
        n = np.arange(0, int(40 / decay))
        for sign in (1, -1):
            terms = (n + 3.0) ** -1.5 * np.exp(-decay * n)
            turned = np.where(np.arange(len(order)) % 2, sign, 1.0)
            sampled_even = len(order) - 2 * sampling.orders(precision)[0].size
            turned[sampled_even:] = 1
            turned[sampled_even + sampling.orders(precision)[0].size :] = sign
            got = np.sum(weight * turned * (order + 3.0) ** -1.5 * np.exp(-decay * order))
            want = np.sum(np.where(n % 2, sign, 1.0) * terms)
            np.testing.assert_allclose(got, want, rtol=bound)
