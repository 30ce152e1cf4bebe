"""Tiles against the whole, and Monte Carlo kernels against exact ones."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tangents
from tangents import batch, monte_carlo_kernel_fn, stax

Pair = collections.namedtuple("Pair", "nngp ntk")


def inputs(n, seed=0, d=3):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, d)), jnp.result_type(float))


def kernel_fn(x1, x2, get=None, *, scale=1.0, pattern=None):
    x2 = x1 if x2 is None else x2
    left, right = (1.0, 1.0) if pattern is None else (pattern[0][:, None], pattern[1][None, :])
    gram = scale * jnp.exp(x1 @ x2.T) * left * right
    return gram if get == "ntk" else Pair(gram, gram**2)


@pytest.mark.parametrize("batch_size", [0, 1, 2, 3, 5, 8])
@pytest.mark.parametrize("second", [True, False])
def test_any_batch_size(batch_size, second, rtol):
    x1, x2 = inputs(5), inputs(4, 1) if second else None
    got = batch(kernel_fn, batch_size)(x1, x2)
    for a, b in zip(got, kernel_fn(x1, x2), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol)


@pytest.mark.parametrize("second", [True, False])
def test_kernels_of_parallel_layers_continue_in_tiles(second, rtol):
    net = lambda n: stax.parallel(stax.Dense(n), stax.parallel(stax.Dense(n), stax.Dense(n)))
    first, last = net(4)[2], net(1)[2]
    x1 = (inputs(5), (inputs(5, 1), inputs(5, 2)))
    x2 = (inputs(4, 3), (inputs(4, 4), inputs(4, 5))) if second else None
    tiled = batch(lambda k, x2: last(k, get="ntk"), 2)(batch(first, 2)(x1, x2))
    whole = last(first(x1, x2), get="ntk")
    assert jax.tree.structure(tiled) == jax.tree.structure(whole)
    for a, b in zip(jax.tree.leaves(tiled), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol)


def test_symmetric_tiles_are_computed_once():
    calls = []

    def counted(x1, x2, get):
        jax.debug.callback(lambda: calls.append(1))
        return kernel_fn(x1, x2, get)

    x = inputs(6)
    whole = batch(counted, 2)(x, None, "ntk")
    jax.effects_barrier()
    assert len(calls) == 6  # of 9
    np.testing.assert_array_equal(whole, whole.T)
    # Trailing axes might be pairs or not: nothing is mirrored, nothing is wrong.
    outer = lambda x1, x2: x1[:, None, :, None] * (x1 if x2 is None else x2)[None, :, None, :]
    np.testing.assert_allclose(batch(outer, 4)(x, None), outer(x, None))


def test_arguments(rtol):
    x1, x2 = inputs(5), inputs(4, 1)
    pattern = (inputs(5, 2, 1)[:, 0], inputs(4, 3, 1)[:, 0])
    got = batch(kernel_fn, 2)(x1, x2, "ntk", scale=2.0, pattern=pattern)
    np.testing.assert_allclose(got, kernel_fn(x1, x2, "ntk", scale=2.0, pattern=pattern), rtol=rtol)
    host = batch(kernel_fn, 2, store_on_device=False)(x1, x2, "ntk")
    np.testing.assert_allclose(host, kernel_fn(x1, x2, "ntk"), rtol=rtol)
    one = batch(kernel_fn, 2, device_count=1)
    assert one.device_count == 1
    np.testing.assert_allclose(one(x1, x2, "ntk"), kernel_fn(x1, x2, "ntk"), rtol=rtol)
    trees = lambda a, b: a[0] @ b[0].T + a[1] @ b[1].T
    np.testing.assert_allclose(
        batch(trees, 3)([x1, x1], [x2, x2]), trees([x1, x1], [x2, x2]), rtol=rtol
    )


def test_errors():
    with pytest.raises(ValueError, match="negative"):
        batch(kernel_fn, -1)
    with pytest.raises(NotImplementedError, match="no tiles"):
        batch(kernel_fn, 2)(inputs(3), None, diagonal_batch=False)
    with pytest.raises(ValueError, match="not a pair"):
        batch(lambda a, b, w: a @ b.T, 2)(inputs(3), inputs(3), w=jnp.ones(3))
    with pytest.raises(TypeError, match="tiles need arrays"):
        batch(lambda a, b: a.sum(), 2)(inputs(3), inputs(3))
    with pytest.raises(ValueError, match="device_count=99"):
        batch(kernel_fn, 2, device_count=99)


def test_kernels_of_layers(rtol):
    stax = pytest.importorskip("tangents.stax")
    _, _, infinite = stax.serial(
        stax.Conv(1, (2, 2), b_std=0.1), stax.Relu(), stax.Flatten(), stax.Dense(1)
    )
    x1, x2 = inputs(5, d=18).reshape(5, 3, 3, 2), inputs(3, 1, d=18).reshape(3, 3, 3, 2)
    for second in (None, x2):
        whole, tiled = infinite(x1, second), batch(infinite, 2)(x1, second)
        for a, b in zip(whole.astuple(), tiled.astuple(), strict=True):
            if isinstance(a, jax.Array) and a.ndim:
                np.testing.assert_allclose(a, b, rtol=100 * rtol)
            elif not isinstance(a, jax.Array):
                assert a == b
    hidden = stax.Conv(1, (2, 2))[2](x1, x2, diagonal_spatial=False)
    last = stax.serial(stax.Relu(), stax.GlobalAvgPool())[2]
    np.testing.assert_allclose(batch(last, 2)(hidden).nngp, last(hidden).nngp, rtol=100 * rtol)
    full = stax.Conv(1, (2, 2))[2]
    a = full(x1, None, diagonal_spatial=False).nngp
    b = batch(full, 2)(x1, None, diagonal_spatial=False).nngp
    np.testing.assert_allclose(a, b, rtol=100 * rtol)


WIDTH = 64


def init_fn(key, shape):
    k1, k2 = jax.random.split(key)
    return (-1, 2), (jax.random.normal(k1, (shape[-1], WIDTH)), jax.random.normal(k2, (WIDTH, 2)))


def apply_fn(params, x):
    w1, w2 = params
    return jnp.tanh(x @ w1 / np.sqrt(x.shape[-1])) @ w2 / np.sqrt(WIDTH)


def test_monte_carlo_is_the_mean_of_draws(rtol):
    x1, x2, key = inputs(3), inputs(2, 1), jax.random.key(1)
    one = tangents.empirical_kernel_fn(apply_fn)
    chain, draws = key, []
    for _ in range(4):
        chain, sample_key = jax.random.split(chain)
        _, params = init_fn(jax.random.split(sample_key)[0], x1.shape)
        draws.append(one(x1, x2, None, params))
    counts = [2, 4]
    make = lambda n, **kw: monte_carlo_kernel_fn(init_fn, apply_fn, key, n, vmap_axes=0, **kw)
    for n, got in zip(counts, make(counts, standard_error=True)(x1, x2), strict=True):
        assert type(got.mean).__name__ == "MonteCarloKernel"
        for field in ("nngp", "ntk"):
            stack = np.stack([getattr(d, field) for d in draws[:n]])
            np.testing.assert_allclose(getattr(got.mean, field), stack.mean(0), rtol=10 * rtol)
            error = stack.std(0, ddof=1) / np.sqrt(n)
            np.testing.assert_allclose(
                getattr(got.standard_error, field), error, rtol=1e3 * rtol, atol=rtol
            )
    single = make(4, batch_size=2)(x1, x2, "ntk")
    np.testing.assert_allclose(single, np.mean([d.ntk for d in draws], 0), rtol=10 * rtol)


def test_monte_carlo_arguments():
    make = lambda n: monte_carlo_kernel_fn(init_fn, apply_fn, jax.random.key(0), n)
    for bad in (0, -1, [2, 0], [1.5], []):
        with pytest.raises(ValueError, match="n_samples"):
            make(bad)
    with pytest.raises(TypeError, match="n_samples"):
        make(None)
    assert monte_carlo_kernel_fn(init_fn, apply_fn, jax.random.key(0), 1)(
        inputs(2), get=("ntk",)
    )._fields == ("ntk",)
    error = monte_carlo_kernel_fn(init_fn, apply_fn, jax.random.key(0), 1, standard_error=True)
    assert jnp.isnan(error(inputs(2), None, "ntk").standard_error).all()
