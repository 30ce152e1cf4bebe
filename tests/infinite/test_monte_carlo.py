"""Kernels of wide finite networks, made by the layers' own init and apply, approach the infinite
ones, with an error that falls like 1 / sqrt(width)."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tangents import empirical_kernel_fn, stax

X = jax.random.normal(jax.random.key(3), (3, 4, 3)) * 0.8
# (width, number of networks). Over fresh keys the logarithm of the error's root mean square varied
# by 0.14 to 0.34 for 8 narrow networks (0.5 and 0.9 for attention and RMSNorm, to the side that
# does no harm) and by 0.05 to 0.16 for 8 wide ones; its ratio to narrow / 8 is 0.2 to 1.3 on
# average. With 64 and 16 networks the bound of 2 is four standard deviations off for the worst
# ("standard"), five and more for the others: a failure in 30,000 draws of keys at most.
NARROW, WIDE = (8, 64), (512, 16)


def residual(n):
    return stax.serial(
        stax.FanOut(2),
        stax.parallel(stax.serial(stax.Relu(), stax.Dense(n, 1.1)), stax.Identity()),
        stax.FanInSum(),
    )


# Each is a function of the width; inputs are (examples, positions, channels).
NETWORKS = {
    "dense": lambda n: (stax.Dense(n, 1.2, 0.3), stax.Relu(), stax.Flatten()),
    "standard": lambda n: (
        stax.Dense(1, 1.2, 0.3, parameterization="standard", s=(1, n)),
        stax.Erf(),
        stax.Flatten(),
    ),
    "conv": lambda n: (
        stax.Conv(n, (2,), W_std=1.3, b_std=0.2, padding="SAME"),
        stax.Erf(),
        stax.GlobalAvgPool(),
    ),
    "circular": lambda n: (
        stax.Conv(n, (3,), strides=(2,), padding="CIRCULAR"),
        stax.Relu(),
        stax.Flatten(),
    ),
    "transposed": lambda n: (
        stax.ConvTranspose(n, (3,), strides=(2,), padding="CIRCULAR"),
        stax.Relu(),
        stax.AvgPool((3,), padding="SAME"),
        stax.Flatten(),
    ),
    "local": lambda n: (
        stax.ConvLocal(n, (2,), W_std=1.3, b_std=0.2),
        stax.Relu(),
        stax.SumPool((2,)),
        stax.Flatten(),
    ),
    "norm": lambda n: (stax.Dense(n), stax.LayerNorm(), stax.Relu(), stax.Flatten()),
    "rms": lambda n: (stax.Dense(n), stax.Relu(), stax.RMSNorm(), stax.Flatten()),
    "residual": lambda n: (stax.Dense(n), residual(n), stax.Relu(), stax.Flatten()),
    "product": lambda n: (
        stax.FanOut(2),
        stax.parallel(stax.Dense(n), stax.serial(stax.Dense(n), stax.Erf())),
        stax.FanInProd(),
        stax.Flatten(),
    ),
    "attention": lambda n: (
        stax.Dense(n),
        stax.GlobalSelfAttention(n, n, n, 1, b_std=0.1, pos_emb_type="SUM", W_pos_emb_std=0.5),
        stax.Relu(),
        stax.Flatten(),
    ),
    "resize": lambda n: (
        stax.Dense(n),
        stax.ImageResize((-1, 7, -1), "cubic"),
        stax.Relu(),
        stax.Flatten(),
    ),
    "index": lambda n: (stax.Conv(n, (2,)), stax.Index(stax.Slice[:, ::2]), stax.Flatten()),
}
QUICK = ("standard", "transposed", "rms", "product")


def errors(layers, width, samples):
    """Relative distance of one network's kernels to the limit, root mean square over networks."""
    init_fn, apply_fn, kernel_fn = stax.serial(*layers(width), stax.Dense(1, 1.1, 0.1))
    limit = kernel_fn(X, None, ("nngp", "ntk"))
    empirical = empirical_kernel_fn(apply_fn, vmap_axes=0)

    @jax.jit
    @jax.vmap
    def sample(key):
        _, params = init_fn(key, X.shape)
        return empirical(X, None, ("ntk",), params).ntk

    ntks = sample(jax.random.split(jax.random.key(width), samples))
    return float(
        jnp.sqrt(jnp.mean((ntks - limit.ntk) ** 2)) / jnp.sqrt(jnp.mean(limit.ntk**2))
    ), float(jnp.linalg.norm(ntks.mean(0) - limit.ntk) / jnp.linalg.norm(limit.ntk))


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS]
)
def test_finite_networks_converge_to_the_limit(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        narrow, _ = errors(NETWORKS[name], *NARROW)
        wide, mean = errors(NETWORKS[name], *WIDE)
    # 64 times the width is an eighth of the error; twice that for the noise of the draws.
    assert wide < 2 * narrow / 8
    assert mean < 0.1


def test_dropout_second_moments(x64):
    """E[y y'] over draws of weights and drops: the diagonal is divided by the keep rate."""
    layers = stax.Dense(400, 1.3), stax.Relu(), stax.Dropout(0.6), stax.Dense(200)
    init_fn, apply_fn, kernel_fn = stax.serial(*layers)
    x = X[:, 0]

    @jax.jit
    @jax.vmap
    def sample(key):
        _, params = init_fn(key, x.shape)
        y = apply_fn(params, x, rng=key)
        return y @ y.T / y.shape[1]

    mean = sample(jax.random.split(jax.random.key(0), 40)).mean(0)
    np.testing.assert_allclose(mean, kernel_fn(x, None, "nngp"), rtol=0.08, atol=0.02)
