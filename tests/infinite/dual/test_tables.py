"""Tables of duals in single precision, against the expansion in double precision."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tangents import stax
from tangents._infinite.dual import tabulated


def pairs():
    """Angles from equal to opposite, deviations up to the longest table and beyond."""
    rng = np.random.default_rng(0)
    theta = np.r_[0.0, 1e-6, 1e-4, 1e-2, np.pi - 1e-3, rng.uniform(0, np.pi, 43)]
    sd1 = np.r_[1.0, 1.0, 1.0, 0.5, 1.0, 1e-3, 2.4, rng.uniform(0.05, 2.4, 41)]
    sd2 = np.r_[1.0, 1.0, 1.0, 0.5, 1.0, 0.5, 2.4, rng.uniform(0.05, 2.4, 41)]
    gap = sd1 * sd2 * (1 - np.abs(np.cos(theta)))
    folded = np.minimum(theta, np.pi - theta)
    gap = np.where(folded < 0.1, 2 * sd1 * sd2 * np.sin(folded / 2) ** 2, gap)
    return sd1 * sd2 * np.cos(theta), sd1**2, sd2**2, gap


@pytest.mark.parametrize("name", ["Tanh", "Mish", "Elu", "Selu"])
def test_single_precision_against_the_expansion(name):
    node = getattr(stax, name)().node
    dual = jax.jit(lambda *pair: node.kernel.dual(node.hyper, *pair))
    single = dual(*(jnp.asarray(a, jnp.float32) for a in pairs()))
    assert single.nngp.dtype == jnp.float32
    with jax.enable_x64(True):
        c, v1, v2, _ = (jnp.asarray(a) for a in pairs())
        double = dual(c, v1, v2)
        own1, own2 = dual(v1, v1, v1), dual(v2, v2, v2)
    single, double, own1, own2 = (
        type(d)(*(None if a is None else np.asarray(a, np.float64) for a in d))
        for d in (single, double, own1, own2)
    )
    for k, bound in ((0, 1e-6), (1, 2e-6)):
        scale = np.sqrt(own1[k] * own2[k])
        assert np.max(np.abs(single[k] - double[k]) / scale) < bound
    assert single.gap12 is not None
    exact = np.sqrt(own1.nngp * own2.nngp) - np.abs(double.nngp)
    clear = exact > 1e-8  # of smaller ones rounding in float64 leaves too little
    np.testing.assert_allclose(single.gap12[clear], exact[clear], rtol=1e-4, atol=1e-6)
    near = np.arange(1, 4)
    np.testing.assert_allclose(single.gap12[near], exact[near], rtol=1e-3, atol=1e-12)


def test_what_no_table_holds_is_left_out():
    assert tabulated.tables_of(lambda x: jnp.tanh(300 * x), False) == ()
    tables = tabulated.tables_of(jnp.tanh, False)
    assert [table.reach for table in tables] == [1.75, 3.0]


def test_longer_deviations_take_the_series():
    """Continuous where the tables end."""
    node = stax.Tanh().node
    v = jnp.asarray([8.99, 9.01], jnp.float32)
    dual = jax.jit(lambda *pair: node.kernel.dual(node.hyper, *pair))
    inside, outside = (dual(0.5 * v[i : i + 1], v[i : i + 1], v[i : i + 1]) for i in (0, 1))
    np.testing.assert_allclose(inside.nngp, outside.nngp, rtol=2e-3)
    np.testing.assert_allclose(inside.d_nngp, outside.d_nngp, rtol=5e-3)


@pytest.mark.parametrize("name", ["Tanh", "Elu"])
def test_derivatives_at_any_deviation(name):
    """By either length of the series and by sampled orders, against differences in float64."""
    node = getattr(stax, name)().node
    lines = np.array([[-0.6, 0.2, 0.9], [0.5, 0.8, 1.0]])  # cosines, ratios of the deviations

    def pair(lines, sd, shift):
        """Along a line, on which covariance and variances all change."""
        sd1, sd2 = sd * jnp.exp(shift), lines[1] * sd * jnp.exp(0.3 * shift)
        cosine = lines[0] + 0.3 * shift
        return node.kernel.dual({}, cosine * sd1 * sd2, sd1 * sd1, sd2 * sd2)[:2]

    @jax.jit
    def change(*at):
        zero = tuple(jnp.zeros_like(a) for a in at[:2])
        return jax.jvp(pair, at, (*zero, jnp.ones_like(at[2])))[1]

    exact, step = jax.jit(pair), 1e-4
    for sd in (0.8, 2.0, 3.5, 7.0, 30.0):
        got = change(*(jnp.asarray(a, jnp.float32) for a in (lines, sd, np.zeros(3))))
        with jax.enable_x64(True):
            after, before = (exact(lines, sd, x * np.ones(3)) for x in (step, -step))
        for k in (0, 1):
            want = np.asarray(after[k] - before[k]) / (2 * step)
            error = np.abs(np.asarray(got[k], np.float64) - want)
            np.testing.assert_array_less(error, 2e-5 * np.max(np.abs(want)))


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(make, id=name)
        for name, make in {
            "Tanh": stax.Tanh,
            "Elu": stax.Elu,
            "HardTanh": stax.HardTanh,
            "relu6": lambda: stax.Elementwise(jax.nn.relu6),
            "no table": lambda: stax.Elementwise(lambda x: jnp.tanh(40 * x)),
        }.items()
    ],
)
@pytest.mark.parametrize("largest", [2.0, 6.0, 50.0])
def test_variances_are_duals_of_equal_inputs(layer, largest):
    """By the short table, by the long one, and beyond both."""
    kernel = layer().node.kernel
    v = jnp.asarray(np.r_[0.0, 1e-6, np.geomspace(1e-3, largest, 9)], jnp.float32)

    def pairs(v):
        return kernel.dual({}, v, v, v, jnp.zeros_like(v)).nngp

    own, change = jax.jit(lambda v: jax.jvp(lambda v: kernel.diagonal({}, v), (v,), (v,)))(v)
    want, change_of_pairs = jax.jit(lambda v: jax.jvp(pairs, (v,), (v,)))(v)
    np.testing.assert_allclose(own, want, rtol=3e-7)
    np.testing.assert_allclose(change, change_of_pairs, rtol=2e-5, atol=1e-7)
