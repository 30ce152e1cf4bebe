"""Every dual kernel against quadrature, its own derivative, known values; at the edges too."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mpmath import mpf

from infinite.dual.quadrature import kinked_pair, smooth_pair
from infinite.dual.table import ROWS, WITHOUT_PHI

# Pairs of inputs as (cov12, var1, var2) of multiples of 1/8, exact in any float, so that equal,
# parallel and opposite inputs are exactly that.
EDGES = {
    "equal": (1.25, 1.25, 1.25),
    "parallel": (0.75, 0.375, 1.5),
    "orthogonal": (0.0, 0.75, 1.25),
    "opposite": (-0.75, 0.75, 0.75),
    "antiparallel": (-0.75, 1.5, 0.375),
    "one zero": (0.0, 0.0, 1.25),
    "both zero": (0.0, 0.0, 0.0),
}


def near(distance: float, ratio: float = 1.0) -> tuple[float, float, float]:
    """Covariances of two inputs of that distance, the second `ratio` times as long."""
    x1 = np.array([0.75, -0.5, 0.625, 0.0])
    x2 = ratio * (x1 + distance * np.array([0.5, 0.5, 0.5, -0.5]))
    return float(x1 @ x2), float(x1 @ x1), float(x2 @ x2)


INSIDE = {
    "1e-6 apart": near(1e-6),
    "1e-2 apart, norms differ": near(1e-2, 1.37),
    "obtuse": (-0.625, 0.875, 1.25),
}
FINE = {f"{d:g} apart, ratio {r}": near(d, r) for d in (1e-5, 1e-3, 0.1, 1.0) for r in (1, 1.2)}
row_of = pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
any_row_of = pytest.mark.parametrize(
    "row", [*ROWS, WITHOUT_PHI], ids=[row.name for row in (*ROWS, WITHOUT_PHI)]
)


@pytest.fixture
def bound(x64) -> float:
    """Error relative to sqrt(K11 K22); the float32 bound is 40 roundings."""
    return 1e-12 if x64 else 5e-6


def scalars(*pair):
    return tuple(jnp.asarray(p, float) for p in pair)


def check_against_quadrature(row, pairs, bound):
    points = [scalars(*p) for p in pairs]
    got = jax.jit(jax.vmap(lambda c, v1, v2: row.kernel.dual(row.hyper, c, v1, v2)))(
        *(jnp.stack(p) for p in zip(*points, strict=True))
    )
    for i, pair in enumerate(points):
        exact = tuple(float(p) for p in pair)
        integrate = kinked_pair if row.kink else smooth_pair
        nngp, d_nngp = integrate((row.phi, row.d_phi), *exact)
        sides = [row.kernel.dual(row.hyper, v, v, v) for v in pair[1:]]
        scale = math.sqrt(sides[0].nngp * sides[1].nngp)
        d_scale = math.sqrt(sides[0].d_nngp * sides[1].d_nngp)
        if exact[1] * exact[2] == 0:  # where phi'(0) may be 0: its size at variance 1
            d_scale = row.kernel.dual(row.hyper, *scalars(1, 1, 1)).d_nngp
        scale, d_scale = float(scale), float(d_scale)
        assert abs(mpf(float(got.nngp[i])) - nngp) <= bound * scale, exact
        assert abs(mpf(float(got.d_nngp[i])) - d_nngp) <= bound * d_scale, exact


@row_of
def test_against_quadrature_at_the_edges(row, bound):
    check_against_quadrature(row, EDGES.values(), bound)


@row_of
def test_against_quadrature_inside(row, bound):
    check_against_quadrature(row, INSIDE.values(), bound)


@pytest.mark.slow
@row_of
def test_against_quadrature_on_a_fine_grid(row, bound):
    check_against_quadrature(row, FINE.values(), bound)


# ---- identities ----------------------------------------------------------------------------------

PAIRS = {**EDGES, **INSIDE, "far larger": (40.0, 64.0, 128.0), "tiny": (1e-9, 2e-9, 3e-9)}


def stacked(pairs):
    return tuple(jnp.asarray(side, float) for side in zip(*pairs, strict=True))


@any_row_of
def test_diagonal_is_the_dual_at_equal_inputs(row, rtol):
    var = jnp.asarray([0.0, 1e-9, 0.75, 1.0, 3.0], float)
    at_equal = row.kernel.dual(row.hyper, var, var, var).nngp
    np.testing.assert_allclose(row.kernel.diagonal(row.hyper, var), at_equal, rtol=rtol / 100)


@pytest.mark.parametrize(
    "row", [pytest.param(r, id=r.name) for r in ROWS if r.kernel.of_norm is not None]
)
def test_of_norm_is_the_dual(row, x64):
    """With the polynomials of single precision, whatever the type."""
    c, v1, v2 = stacked({**PAIRS, **FINE}.values())
    s = jnp.sqrt(v1) * jnp.sqrt(v2)
    gap12 = jnp.maximum(s - jnp.abs(c), 0)
    of_norm = row.kernel.of_norm(row.hyper, c, s, gap12)
    dual = row.kernel.dual(row.hyper, c, v1, v2, gap12)
    atol = 1e-7 if x64 else 1e-6
    np.testing.assert_array_less(jnp.abs(of_norm.nngp - dual.nngp), atol * s + 1e-30)
    np.testing.assert_allclose(of_norm.d_nngp, dual.d_nngp, rtol=0, atol=atol)


@any_row_of
def test_symmetric_in_the_pair(row, rtol):
    c, v1, v2 = stacked(PAIRS.values())
    got, swapped = row.kernel.dual(row.hyper, c, v1, v2), row.kernel.dual(row.hyper, c, v2, v1)
    np.testing.assert_allclose(got.nngp, swapped.nngp, rtol=rtol, atol=1e-30)
    np.testing.assert_allclose(got.d_nngp, swapped.d_nngp, rtol=rtol, atol=rtol / 100)


@any_row_of
def test_d_nngp_is_the_derivative_of_nngp(row, rtol):
    """Price's theorem, by automatic differentiation, where nngp has no cusp."""
    if row.discontinuous:
        pytest.skip("phi' misses the jump, so d_nngp is 0 by convention")
    pairs = PAIRS.values()
    if row.phi is None:  # with a zero input its correlation is set, not derived
        pairs = [pair for pair in pairs if pair[1] > 0]
    c, v1, v2 = stacked(pairs)
    one, zero = jnp.ones_like(c), jnp.zeros_like(c)

    def nngp(c, v1, v2):
        return row.kernel.dual(row.hyper, c, v1, v2).nngp

    _, slope = jax.jit(lambda *p: jax.jvp(nngp, p, (one, zero, zero)))(c, v1, v2)
    got = row.kernel.dual(row.hyper, c, v1, v2).d_nngp
    v1, v2 = (jnp.where(v == 0, 1, v) for v in (v1, v2))  # phi'(0) may be 0
    size1, size2 = (row.kernel.dual(row.hyper, v, v, v).d_nngp for v in (v1, v2))
    assert np.all(np.abs(got - slope) <= rtol * (np.abs(got) + np.sqrt(size1 * size2)))


@any_row_of
def test_scaling_the_inputs_is_scaling_the_function(row, rtol):
    """Euler: sum of the partial derivatives against a finite change of the norm of one input."""
    c, v1, v2 = stacked([INSIDE["obtuse"], (0.375, 0.75, 1.5)])
    step = 1e-5 if rtol < 1e-6 else 1e-2

    def value(t):
        d = row.kernel.dual(row.hyper, (1 + t) * c, (1 + t) ** 2 * v1, v2)
        return d.nngp, d.d_nngp

    zero = jnp.asarray(0.0, float)
    derivatives = jax.jvp(value, (zero,), (zero + 1,))[1]
    for high, low, slope in zip(value(zero + step), value(zero - step), derivatives, strict=True):
        difference = (high - low) / (2 * step)
        tolerance = 1e-8 if rtol < 1e-6 else 2e-3
        np.testing.assert_allclose(slope, difference, rtol=tolerance, atol=tolerance)


# ---- no NaN, no infinity -------------------------------------------------------------------------


@any_row_of
def test_values_and_gradients_are_finite(row):
    """Also with rounding that makes a correlation exceed 1, and for hyperparameters."""
    c, v1, v2 = stacked(PAIRS.values())
    rounding = 1 + 4 * jnp.finfo(c.dtype).eps
    c, v1, v2 = jnp.r_[c, c * rounding], jnp.r_[v1, v1], jnp.r_[v2, v2]
    hyper = jax.tree.map(lambda h: jnp.asarray(h, c.dtype), dict(row.hyper))

    @jax.jit
    def all_of(hyper, c, v1, v2):
        def value(hyper, c, v1, v2):
            d = row.kernel.dual(hyper, c, v1, v2)
            return jnp.sum(d.nngp) + jnp.sum(d.d_nngp) + jnp.sum(row.kernel.diagonal(hyper, v1))

        return row.kernel.dual(hyper, c, v1, v2), jax.grad(value, (0, 1, 2, 3))(hyper, c, v1, v2)

    for leaf in jax.tree.leaves(all_of(hyper, c, v1, v2)):
        assert np.all(np.isfinite(leaf))


@any_row_of
def test_gradient_in_an_input_is_finite_at_equal_inputs(row):
    """Through the covariances of x1 and x2 themselves."""
    x2 = jnp.asarray([0.7, -0.4, 1.1], float)

    def value(x1):
        d = row.kernel.dual(row.hyper, x1 @ x2 / 3, x1 @ x1 / 3, x2 @ x2 / 3)
        return jnp.stack([d.nngp, d.d_nngp])

    for x1 in (x2, -x2, 2 * x2, 0 * x2):
        assert np.all(np.isfinite(jax.jacrev(value)(x1)))
        assert np.all(np.isfinite(jax.jacfwd(value)(x1)))


@pytest.mark.parametrize("name", ["Relu", "Sign", "Abs", "RectifiedMonomial(1)"])
def test_gradient_at_the_cusp_is_the_symmetric_subgradient(name, rtol):
    """Mean of the one-sided derivatives along every direction orthogonal to x: zero."""
    row = next(r for r in ROWS if r.name == name)
    x2 = jnp.asarray([0.75, -0.5, 0.25], float)
    direction = jnp.asarray([0.5, 0.5, -0.5], float)

    def value(x1):
        d = row.kernel.dual(row.hyper, x1 @ x2, x1 @ x1, x2 @ x2)
        return d.nngp if name == "Sign" else d.d_nngp

    h = 1e-3
    one_sided = [(value(x2 + s * h * direction) - value(x2)) / (s * h) for s in (1, -1)]
    assert one_sided[0] < -0.05 < 0.05 < one_sided[1]  # a cusp indeed
    slope = jax.jvp(value, (x2,), (direction,))[1]
    np.testing.assert_allclose(slope, 0, atol=rtol)


# ---- known values --------------------------------------------------------------------------------


def at(name, *pair):
    row = next(r for r in ROWS if r.name == name)
    return row.kernel.dual(row.hyper, *scalars(*pair))


def test_relu_at_known_angles(rtol):
    # Cho & Saul 2009, eq. 6, at 0, 60, 90 and 180 degrees; k_n = 2 E of their definition.
    for cosine, j1 in ((1, math.pi), (0.5, 3**0.5 / 2 + math.pi / 3), (0, 1.0), (-1, 0.0)):
        np.testing.assert_allclose(
            at("Relu", cosine, 1, 1).nngp, j1 / (2 * math.pi), rtol=rtol, atol=rtol
        )
    assert at("Relu", 1.25, 1.25, 1.25).d_nngp == 0.5
    assert at("Relu", 1.25, 1.25, 1.25).nngp == 0.625
    assert at("Abs", 1.25, 1.25, 1.25).d_nngp == 1


def test_rectified_monomials_of_cho_and_saul(rtol):
    # eq. 5 and 7: J_0 = pi - theta, J_2 = 3 sin cos + (pi - theta)(1 + 2 cos^2), at 60 degrees
    sine, cosine, rest = 3**0.5 / 2, 0.5, 2 * math.pi / 3
    j2 = 3 * sine * cosine + rest * (1 + 2 * cosine**2)
    j3 = 4 * sine + 11 * sine * cosine**2 + rest * (9 * cosine + 6 * cosine**3)
    for n, j in ((0, rest), (2, j2), (3, j3)):
        got = at(f"RectifiedMonomial({n})", cosine * 2 * 3, 4, 9).nngp
        np.testing.assert_allclose(got, 6**n * j / (2 * math.pi), rtol=rtol)


def test_erf_of_williams(rtol):
    # Williams 1996, eq. 11, as a neural network with one input and no bias: 2/pi arcsin(2/3)
    np.testing.assert_allclose(at("Erf", 1, 1, 1).nngp, 2 / math.pi * math.asin(2 / 3), rtol=rtol)


def test_gelu_at_orthogonal_inputs_of_unit_variance(rtol):
    # E[u Phi(u)] = 1 / (2 sqrt(pi)) at unit variance, squared
    np.testing.assert_allclose(at("Gelu", 0, 1, 1).nngp, 1 / (4 * math.pi), rtol=rtol)


def test_second_moment_of_leaky_relu(rtol):
    # Tsuchida et al. 2018 (and He et al. 2015): (1 + alpha^2) / 2
    np.testing.assert_allclose(at("LeakyRelu", 2, 2, 2).nngp, 1 + 0.1**2, rtol=rtol)


def test_trigonometric_kernels_of_louart_et_al(rtol):
    # Louart et al. 2018, table 1: cos: exp(-(v1 + v2)/2) cosh(c), sin: ... sinh(c)
    from tangents._infinite.dual.exponential import COS, SIN

    plain = {"a": 1.0, "b": 1.0, "c": 0.0}
    pair = scalars(0.5, 0.75, 1.25)
    np.testing.assert_allclose(
        COS.dual(plain, *pair).nngp, math.exp(-1) * math.cosh(0.5), rtol=rtol
    )
    np.testing.assert_allclose(
        SIN.dual(plain, *pair).nngp, math.exp(-1) * math.sinh(0.5), rtol=rtol
    )


@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_hermite_at_unit_variance_is_a_power(n, rtol):
    # Daniely et al. 2016, lemma 11
    rho = jnp.linspace(-1, 1, 9, dtype=float)
    one = jnp.ones_like(rho)
    row = next(r for r in ROWS if r.name == f"Hermite({n})")
    np.testing.assert_allclose(row.kernel.dual({}, rho, one, one).nngp, rho**n, rtol=rtol)
