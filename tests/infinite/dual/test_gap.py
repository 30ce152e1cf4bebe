"""The gap-carrying form: equal to the plain one in float64, and what float32 needs it for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from infinite.dual.table import ROWS, WITHOUT_PHI
from tangents._infinite.dual.angle import poles
from tangents._infinite.dual.error_function import ERF
from tangents._infinite.dual.form import Dual

CARRIERS = [row for row in (*ROWS, WITHOUT_PHI) if row.carries_gap]
row_of = pytest.mark.parametrize("row", CARRIERS, ids=[row.name for row in CARRIERS])


def gap_of(x1, x2):
    """sqrt(v1 v2) - |c| = sqrt(v1 v2) |x1/|x1| -+ x2/|x2||^2 / 2, without cancellation."""
    n1, n2 = np.linalg.norm(x1), np.linalg.norm(x2)
    sign = -1 if x1 @ x2 < 0 else 1
    return n1 * n2 * np.sum((x1 / n1 - sign * x2 / n2) ** 2) / 2


def pairs(x64):
    """(cov12, var1, var2, gap12) over near, parallel, orthogonal and opposite inputs."""
    rng = np.random.default_rng(0)
    x, e = rng.normal(size=(2, 8))
    e -= (e @ x) / (x @ x) * x
    e *= np.linalg.norm(x) / np.linalg.norm(e)
    distances = [0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 1, 2]
    seconds = [r * (x + d * e) for d in distances for r in (1, 1.37)]
    seconds += [e, -x, -1.5 * (x + 1e-3 * e)]
    columns = [(x @ y / 8, x @ x / 8, y @ y / 8, gap_of(x, y) / 8) for y in seconds]
    return [jnp.asarray(c, jnp.float64 if x64 else jnp.float32) for c in zip(*columns, strict=True)]


@row_of
def test_gap_form_is_the_plain_form(row, x64):
    c, v1, v2, gap = pairs(x64)
    plain, got = row.kernel.dual(row.hyper, c, v1, v2), row.kernel.dual(row.hyper, c, v1, v2, gap)
    eps = float(jnp.finfo(c.dtype).eps)
    size = np.sqrt(row.kernel.diagonal(row.hyper, v1) * row.kernel.diagonal(row.hyper, v2))
    assert np.all(np.abs(got.nngp - plain.nngp) <= 100 * np.sqrt(eps) * size)
    assert np.all(np.abs(got.gap12 - (size - np.abs(got.nngp))) <= 20 * eps * size)
    far = gap > 1e-2 * np.sqrt(v1 * v2)  # elsewhere the given c does not determine the angle
    np.testing.assert_allclose(got.d_nngp[far], plain.d_nngp[far], rtol=1e4 * eps, atol=100 * eps)


@pytest.mark.parametrize("deviations", [(0.02, 0.38), (0.1, 0.2), (3e-3, 0.07), (40.0, 300.0)])
@pytest.mark.parametrize("share", [0.0, 1e-5, 0.3])
def test_gap_of_erf_between_different_norms(deviations, share, x64):
    """Where both terms of the gap nearly cancel, and where arcsines are near pi/2."""
    dtype = jnp.float64 if x64 else jnp.float32
    v1, v2 = (np.asarray(sd * sd, dtype) for sd in deviations)
    gap = np.asarray(share * np.sqrt(v1 * v2), dtype)
    cov = np.asarray(np.sqrt(v1 * v2) - gap, dtype)
    hyper = {"a": jnp.ones((), dtype), "b": jnp.ones((), dtype), "c": jnp.zeros((), dtype)}
    got = float(ERF.dual(hyper, *map(jnp.asarray, (cov, v1, v2, gap))).gap12)
    with mpmath.workdps(50):
        a, b, c = (mpmath.mpf(float(v)) for v in (v1, v2, gap))
        asin = lambda p, q, s: mpmath.asin(2 * s / mpmath.sqrt((1 + 2 * p) * (1 + 2 * q)))
        size = mpmath.sqrt(asin(a, a, a) * asin(b, b, b))
        exact = (size - asin(a, b, mpmath.sqrt(a * b) - c)) * 2 / mpmath.pi
        error = abs(got - exact)
        assert error <= 8 * float(jnp.finfo(dtype).eps) * size
        assert error <= (1e-9 if x64 else 1e-4) * exact


@row_of
def test_float32_is_right_to_its_own_digits(row, x64):
    """Also the gap itself, relative to itself, at every distance."""
    if not x64:
        pytest.skip("needs float64 to compare with")
    wide = pairs(True)
    exact = row.kernel.dual(row.hyper, *wide)
    got = row.kernel.dual(row.hyper, *(a.astype(jnp.float32) for a in wide))
    assert got.nngp.dtype == got.gap12.dtype == jnp.float32
    size = np.sqrt(np.prod([row.kernel.diagonal(row.hyper, v) for v in wide[1:3]], axis=0))
    got, exact = (Dual(*map(np.asarray, dual)) for dual in (got, exact))
    assert np.all(np.abs(got.nngp - exact.nngp) <= 2e-6 * size)
    np.testing.assert_allclose(got.gap12, exact.gap12, rtol=4e-6)
    top = np.max(np.abs(exact.d_nngp))
    np.testing.assert_allclose(got.d_nngp, exact.d_nngp, rtol=1e-6, atol=1e-6 * top)


@row_of
def test_gradients_agree_and_are_finite(row, x64, rtol):
    c, v1, v2, gap = pairs(x64)

    def value(c, v1, v2, gap):
        d = row.kernel.dual(row.hyper, c, v1, v2, gap)
        return jnp.sum(d.nngp) + jnp.sum(d.d_nngp) + jnp.sum(d.gap12)

    for g in jax.jit(jax.grad(value, (0, 1, 2, 3)))(c, v1, v2, gap):
        assert np.all(np.isfinite(g))

    # Along a change of the inputs, gap included, both forms change alike.
    far = np.flatnonzero(np.asarray(gap > 0.1 * jnp.sqrt(v1 * v2)) & np.asarray(c > 1e-3))
    c, v1, v2 = (a[far] for a in (c, v1, v2))
    change = (0.3 * v1, 0.2 * v1, -0.1 * v2)

    def both(c, v1, v2):
        gap = jnp.sqrt(v1 * v2) - jnp.abs(c)
        plain, carried = (
            row.kernel.dual(row.hyper, c, v1, v2, *extra)[:2] for extra in ((), (gap,))
        )
        return plain, carried

    plain, carried = jax.jvp(both, (c, v1, v2), change)[1]
    for a, b in zip(plain, carried, strict=True):
        np.testing.assert_allclose(a, b, rtol=100 * rtol, atol=10 * rtol)


# ---- a deep network, layer by layer --------------------------------------------------------------

W2, B2 = 2.0, 0.01


def dense(c, v1, v2, gap):
    """Covariances and gap after a dense layer of variances W2, B2."""
    w1, w2 = W2 * v1 + B2, W2 * v2 + B2
    after = W2 * c + B2
    if gap is not None:
        s, new = jnp.sqrt(v1) * jnp.sqrt(v2), jnp.sqrt(w1) * jnp.sqrt(w2)
        near, far = poles(c, s, gap)
        difference = (v1 - v2) / (jnp.sqrt(v1) + jnp.sqrt(v2))
        widened = W2 * B2 * difference**2 / (new + W2 * s + B2)  # sqrt(w1 w2) - W2 s - B2
        gap = widened + jnp.where(after < 0, W2 * far + 2 * B2, W2 * near)
    return after, w1, w2, gap


def fully_connected_ntk(row, c, v1, v2, gap, depth):
    """NTK of a network of `depth` dense layers, nonlinearities between them."""
    c, v1, v2, gap = dense(c, v1, v2, gap)
    ntk = c
    for _ in range(depth - 1):
        dual = row.kernel.dual(row.hyper, c, v1, v2, gap)
        v1, v2 = (row.kernel.diagonal(row.hyper, v) for v in (v1, v2))
        c, v1, v2, gap = dense(dual.nngp, v1, v2, dual.gap12)
        ntk = c + W2 * dual.d_nngp * ntk
    return np.asarray(ntk)


@pytest.mark.parametrize("depth", [5, 20])
@pytest.mark.parametrize("name", ["Relu", "LeakyRelu", "Abs"])
def test_float32_ntk_of_deep_networks(name, depth, x64):
    """|dT_ab| <= 2e-6 sqrt(T_aa T_bb), with the gap; at equal and near inputs not without it."""
    if not x64:
        pytest.skip("needs float64 to compare with")
    row = next(r for r in CARRIERS if r.name == name)
    wide = pairs(True)
    c, v1, v2, gap = (a.astype(jnp.float32) for a in wide)
    exact, t1, t2 = (
        fully_connected_ntk(row, *p, depth)
        for p in (wide, (wide[1], wide[1], wide[1], 0 * wide[3]), (wide[2],) * 3 + (0 * wide[3],))
    )
    size = np.sqrt(t1 * t2)
    carried = np.abs(fully_connected_ntk(row, c, v1, v2, gap, depth) - exact) / size
    assert np.max(carried) <= 2e-6
    textbook = np.abs(fully_connected_ntk(row, c, v1, v2, None, depth) - exact) / size
    assert np.max(textbook) >= 100 * np.max(carried)  # the test does see what it is about
