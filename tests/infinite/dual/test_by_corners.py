"""Functions linear or quadratic between kinks in single precision, against double precision."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tangents import stax
from tangents._infinite.dual import piecewise_linear, piecewise_quadratic
from tangents._infinite.dual.breakpoints import breakpoints
from tangents._infinite.dual.corners import FITS, fits
from tangents._infinite.layers.nonlinearity_expanded import HARD_TANH, expansion_of


def clip(x):
    return jnp.clip(x, -0.5, 2)


def unequal(x):  # both kinks, no parity, not an unscaled place
    return 0.5 + 0.2 * x + jnp.maximum(x - 3, 0) - 0.4 * jnp.maximum(-x - 3, 0)


def bent_at_zero(x):
    return jnp.where(x > 0, x, 0.1 * x) + 0.5


def several(x):  # a bend at 0, and beyond it one on either side
    bent = jnp.where(x > 0, x, 0.2 * x) + 0.3
    return bent - 0.5 * jnp.maximum(x - 1, 0) + 0.3 * jnp.maximum(-x - 2.5, 0)


def soft_shrink(x):  # nothing around 0
    return jnp.sign(x) * jnp.maximum(jnp.abs(x) - 0.5, 0)


def huber(x):
    return jnp.where(jnp.abs(x) < 1, x * x / 2, jnp.abs(x) - 0.5)


def uneven(x):  # of the second and of the first derivative, on both sides, and no parity
    arches = jnp.maximum(x - 1, 0) ** 2 / 2 - 0.7 * jnp.maximum(x - 2, 0) ** 2
    return 0.3 * x + 0.2 + arches + jnp.maximum(-x - 1.5, 0)


FUNCTIONS = {  # the least place of a kink, and the dual
    "HardTanh": (1.0, lambda: HARD_TANH),
    "unequal": (3.0, lambda: expansion_of(unequal)),
    "relu6": (6.0, lambda: expansion_of(jax.nn.relu6)),
    "clip": (0.5, lambda: expansion_of(clip)),
    "bent_at_zero": (1.0, lambda: expansion_of(bent_at_zero)),
    "several": (1.0, lambda: expansion_of(several)),
    "soft_shrink": (0.5, lambda: expansion_of(soft_shrink)),
    "hard_swish": (3.0, lambda: expansion_of(jax.nn.hard_swish)),
    "sparse_plus": (1.0, lambda: expansion_of(jax.nn.sparse_plus)),
    "huber": (1.0, lambda: expansion_of(huber)),
    "uneven": (1.0, lambda: expansion_of(uneven)),
}
QUADRATIC = "hard_swish", "sparse_plus", "huber", "uneven"
SLOW = {"sparse_plus", "huber"}


class Pairs(NamedTuple):
    """In float64; all but cov12 are numbers of float32."""

    cov12: np.ndarray
    var1: np.ndarray
    var2: np.ndarray
    gap12: np.ndarray


def pairs(place: float, reach: float) -> Pairs:
    """From equal to opposite, of equal, nearly equal and other deviations up to `reach`."""
    rng = np.random.default_rng(0)
    n, most = 4000, np.log10(reach)
    sd1 = np.where(rng.random(n) < 0.5, rng.uniform(0.01, reach, n), 10 ** rng.uniform(-2, most, n))
    near = sd1 * (1 + 10 ** rng.uniform(-7, -1, n) * rng.choice([-1, 1], n))
    other = 10 ** rng.uniform(-2, most, n)
    sd2 = np.choose(rng.integers(0, 3, n), [sd1, np.clip(near, 0.01, reach), other])
    sd1[:2], sd2[:2] = 0.0, (0.0, 1.0)
    apart = np.choose(
        rng.integers(0, 3, n),
        [10 ** rng.uniform(-12, -2, n), np.zeros(n), 1 - np.cos(rng.uniform(0, np.pi / 2, n))],
    )
    var1, var2 = (np.float32((sd * place) ** 2).astype(np.float64) for sd in (sd1, sd2))
    product = np.sqrt(var1) * np.sqrt(var2)
    gap = np.float32(apart * product).astype(np.float64)
    return Pairs(rng.choice([-1, 1], n) * (product - gap), var1, var2, gap)


def in_both(dual, given: Pairs):
    """Of single precision; of double precision, and the roots of its diagonals."""
    single = dual(*(jnp.asarray(a, jnp.float32) for a in given))
    with jax.enable_x64(True):
        exact = dual(*(jnp.asarray(a) for a in given))
        none = jnp.zeros(len(given.gap12))
        own = [dual(*(jnp.asarray(v),) * 3, none) for v in (given.var1, given.var2)]
    scales = [np.sqrt(np.abs(np.asarray(own[0][k]) * np.asarray(own[1][k]))) for k in (0, 1)]
    return single, [np.asarray(a) for a in exact], scales


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in FUNCTIONS]
)
def test_single_precision_against_double(name):
    place, make = FUNCTIONS[name]
    dual = jax.jit(functools.partial(make().dual, {}))
    # Of saturated functions less and less is left of what ramps are subtracted from.
    bounds = ((2.5e-6, 1.5e-6), 3e-7), ((1.2e-5, 4e-6), 8e-7)
    if name in QUADRATIC:  # sums of squares of ramps
        bounds = ((4e-6, 3e-6), 4e-7), ((3e-5, 3e-5), 2e-6)
    short, long = fits(place)
    for fit, (worst, mean) in zip((short, long), bounds, strict=True):
        given = pairs(place, 0.99 * fit.reach)
        single, exact, scales = in_both(dual, given)
        assert all(a.dtype == jnp.float32 for a in single)
        for k in (0, 1):
            # Where all is flat around 0, fractions of that as deviation leave nothing to compare.
            scale = scales[k] + (5e-2 * np.max(scales[k]) if name == "soft_shrink" else 0)
            error = np.abs(np.asarray(single[k], np.float64) - exact[k])
            assert np.all(error <= worst[k] * scale + 1e-15), (fit, k)
            assert np.sqrt(np.mean((error[2:] / scale[2:]) ** 2)) < mean
        if fit is short:
            check_gap(single[2], exact[0], scales[0], 3e-4 if name in QUADRATIC else 2e-4)


def check_gap(gap, nngp, scale, bound):
    """The angle after the layer, of which a kernel behind it is a smooth function."""
    held = scale > 2e-2 * np.max(scale)
    want = np.maximum(scale - np.abs(nngp), 0)[held] / scale[held]
    got = np.asarray(gap, np.float64)[held] / scale[held]
    resolved = want > 1e-10  # below, double precision has no digits of the difference
    error = np.abs(np.sqrt(2 * got) - np.sqrt(2 * want))[resolved]
    assert np.all(got >= 0)
    assert np.max(error) < bound  # from the covariance alone: 7e-4
    assert np.sqrt(np.mean(error**2)) < 1e-5


def test_beyond_the_polynomials():
    """Larger deviations are computed as in double precision."""
    last = FITS[-1].reach
    dual = jax.jit(functools.partial(HARD_TANH.dual, {}))
    for sd in (0.999 * FITS[0].reach, 1.001 * FITS[0].reach, 0.999 * last, 1.001 * last, 20.0):
        var = np.full(3, float(np.float32(sd) ** 2))
        cov = var * np.array([-0.5, 0.3, 0.9])
        given = Pairs(cov, var, var, np.float32(var - np.abs(cov)).astype(np.float64))
        single, exact, scales = in_both(dual, given)
        # Beyond, sums of ramps of size sd^2 leave a number of size 1.
        bound = 2e-5 if sd < last else 3e-7 * sd**2
        for k in (0, 1):
            assert np.all(np.abs(np.asarray(single[k]) - exact[k]) < bound * scales[k])


@pytest.mark.parametrize("name", ["HardTanh", "clip"])
def test_deviations_far_below_the_kinks(name):
    """In double precision: nothing of the size of a kink cancels."""
    dual_of = jax.jit(functools.partial(FUNCTIONS[name][1]().dual, {}))
    with jax.enable_x64(True):
        var = jnp.asarray([1e-14, 1e-10, 1e-6, 1e-4])
        for rho in (-1.0, -0.3, 0.9, 1.0):
            cov, gap = 2 * rho * var, 2 * (1 - abs(rho)) * var
            dual = dual_of(cov, var, 4 * var, gap)
            np.testing.assert_allclose(dual.nngp, cov, rtol=1e-13)
            np.testing.assert_allclose(dual.d_nngp, 1, rtol=1e-13)


@pytest.mark.parametrize("name", ["HardTanh", pytest.param("sparse_plus", marks=pytest.mark.slow)])
def test_derivatives_are_those_of_the_closed_form(name):
    given = tuple(a[:100] for a in pairs(1.0, 2.5))[:3]
    of = FUNCTIONS[name][1]()

    def total(c, v1, v2):
        dual = of.dual({}, c, v1, v2)
        return jnp.sum(dual.nngp) + jnp.sum(dual.d_nngp)

    gradient = jax.grad(total, (0, 1, 2))
    single = jax.jit(gradient)(*(jnp.asarray(a, jnp.float32) for a in given))
    each = jax.jit(jax.vmap(gradient))(*(jnp.asarray(a, jnp.float32) for a in given))
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
    form_of = functools.partial(piecewise_linear.form_of, tolerance=1e-10)
    form = form_of(lambda x: 2 - 3 * x + 0.5 * jnp.maximum(x - 1, 0), kinks)
    assert form is not None
    np.testing.assert_allclose(form[:3], (2, -3, -3), rtol=1e-12)
    assert form[3:] == ((1.0,), (0.5,), (0.0,))
    assert form_of(lambda x: jnp.tanh(x) + 0.5 * jnp.maximum(x - 1, 0), kinks) is None
    assert form_of(jnp.tanh, ()) is None
    # A kink far out that was not found.
    assert form_of(lambda x: 0.5 * jnp.maximum(x - 1, 0) - jnp.maximum(x - 20, 0), kinks) is None
    assert form_of(lambda x: 0.5 * jnp.maximum(x - 1, 0) + jnp.exp(x), kinks) is None


def test_which_quadratic_functions():
    form_of = functools.partial(piecewise_quadratic.form_of, tolerance=1e-10)
    kinks = [(b.place, b.jumps) for b in breakpoints(uneven)]
    form = form_of(uneven, kinks)
    assert form is not None
    np.testing.assert_allclose(form[:3], (0.2, 0.3, 0), atol=1e-12)
    assert form.places == (1.0, 1.5, 2.0)
    np.testing.assert_allclose(form.upper, ((0, 1), (0, 0), (0, -1.4)), atol=1e-12)
    np.testing.assert_allclose(form.lower, ((0, 0), (1, 0), (0, 0)), atol=1e-12)
    x = jnp.linspace(-4, 4, 33)
    np.testing.assert_allclose(form.of_scale(4.0)(x), 4 * uneven(x / 4), atol=1e-5)
    assert form_of(lambda x: uneven(x) + jnp.sin(x), kinks) is None
    at_zero = [(0.0, (0.0, 0.0, 2.0, 0.0))]
    assert form_of(lambda x: jnp.maximum(x, 0) ** 2, at_zero) is None


@pytest.mark.parametrize(
    "fn", [lambda x: 0 * x + 2, lambda x: 0 * x, lambda x: 2 * x + 1, lambda x: x * x]
)
def test_functions_of_few_terms(fn, rtol):
    """Constants, lines and squares."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8)))
    layers = stax.Dense(1, 1.3, 0.1), stax.Elementwise(fn), stax.Dense(1)
    kernel = stax.serial(*layers)[2](x, None, ("nngp", "ntk"))
    cov = np.asarray(stax.Dense(1, 1.3, 0.1)[2](x, None, "nngp"))
    var = np.diag(cov)
    table = {
        2.0: (np.full_like(cov, 4.0), 0.0),
        0.0: (np.zeros_like(cov), 0.0),
        3.0: (4 * cov + 1, 4.0),
        1.0: (2 * cov**2 + np.outer(var, var), 4 * cov),
    }
    nngp, slope = table[float(fn(jnp.ones(())))]
    bound = 1e-5 if rtol > 1e-9 else 1e-10
    np.testing.assert_allclose(kernel.nngp, nngp, bound, bound)
    np.testing.assert_allclose(kernel.ntk, nngp + slope * cov, bound, bound)
