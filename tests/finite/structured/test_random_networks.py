"""Random small networks put together from every primitive that has a rule."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import tangents as nt
from finite.table import normal
from reference import finite as reference

D = 3
"""Channels; the state of a network is an array (examples, D, D)."""


def dense(p, h):
    return h @ p["w"]


def left(p, h):
    return jnp.einsum("ij,njk->nik", p["w"], h)


def transposed(p, h):
    return h @ p["w"].T * p["s"]


def batched(p, h):
    return jnp.einsum("tij,ntj->nti", p["t"], h)


def convolved(p, h):
    kernel = p["t"][:2]
    return lax.conv_general_dilated(
        h, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )


def shared_bias(p, h):
    return h + p["b"] - p["s"]


def positions(p, h):
    return h * p["w"] + p["t"][0] / 2


def divided(p, h):
    return h / (2 + p["b"] ** 2)


def larger(p, h):
    return jnp.where(h > 0, p["w"], jnp.maximum(h, p["b"]))


def rows(p, h):
    chosen = jnp.clip(jnp.floor(jnp.abs(lax.stop_gradient(h[..., 0])) * 2), 0, 2).astype(jnp.int32)
    return p["w"][chosen] + h


def window(p, h):
    def one(h):
        return lax.dynamic_slice_in_dim(p["t"], (h.sum() > 0).astype(jnp.int32), 1)[0]

    return h + jax.vmap(one)(lax.stop_gradient(h))


def joined(p, h):
    token = jnp.broadcast_to(p["b"], (h.shape[0], 1, D))
    return jnp.concatenate([token, h], 1)[:, 1:] + jnp.pad(p["w"][:2], ((0, 1), (0, 0)))


def repeated(p, h):
    step = lambda h, w: (jnp.tanh(h @ w + p["b"]), None)
    return lax.scan(step, h, p["t"])[0]


def over_time(p, h):
    step = lambda c, x: (jnp.tanh(x @ p["w"] + c * p["s"]), c)
    last, states = lax.scan(step, h[:, 0], jnp.swapaxes(h, 0, 1))
    return jnp.swapaxes(states, 0, 1) + last[:, None]


def branch(p, h):
    return lax.cond(p["s"] > 0, lambda h: h @ p["w"], lambda h: h * p["b"], h)


def normalised(p, h):
    w = p["w"] / jnp.sqrt(1 + jnp.sum(p["w"] ** 2, 0))
    return h @ (w + jnp.outer(p["b"], p["b"])) * p["s"]


def rematerialised(p, h):
    return jax.checkpoint(lambda w, h: jnp.tanh(h @ w) @ w)(p["w"], h)


LAYERS = [
    dense, left, transposed, batched, convolved, shared_bias, positions, divided, larger, rows,
    window, joined, repeated, over_time, branch, normalised, rematerialised,
]  # fmt: skip
SHAPES = {"w": (D, D), "t": (D, D, D), "b": (D,), "s": ()}


@st.composite
def networks(draw):
    layers = draw(st.lists(st.sampled_from(LAYERS), min_size=1, max_size=4))
    head = draw(st.sampled_from(["pooled", "all", "wide"]))
    return layers, head, draw(st.integers(0, 3)), draw(st.booleans())


def check(case, rtol):
    layers, head, seed, traced = case
    params = {k: normal(seed + n, *shape) / 2 for n, (k, shape) in enumerate(SHAPES.items())} | {
        "head": normal(seed + 9, D, 5)
    }

    def f(p, x):
        h = x
        for layer in layers:
            h = layer(p, h)
            h = h - jnp.sin(h) / 2
        if head == "wide":
            return h.mean(1) @ p["head"]
        return h.mean(1) if head == "pooled" else h @ p["w"]

    x1, x2 = normal(20, 2, D, D), normal(21, 3, D, D)
    axes = (-1,) if traced else ()
    expected = reference.ntk(f, params, x1, x2, axes)
    scale = np.abs(expected).max()
    for options in ({"vmap_axes": 0}, {"memory": "30KiB"}):
        fn = jax.jit(nt.empirical_ntk_fn(f, axes, implementation=3, **options))
        np.testing.assert_allclose(fn(x1, x2, params), expected, rtol=rtol, atol=rtol * scale)


@settings(max_examples=3)
@given(networks())
def test_random_networks(case):
    check(case, 1e-9 if jax.config.jax_enable_x64 else 5e-4)


@pytest.mark.slow
@settings(max_examples=int(os.environ.get("TANGENTS_TEST_EXAMPLES", "60")))
@given(networks())
def test_many_random_networks(case):
    check(case, 1e-9 if jax.config.jax_enable_x64 else 5e-4)


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS, ids=lambda f: f.__name__)
def test_each_layer(layer):
    check(([layer, dense], "wide", 0, True), 1e-9 if jax.config.jax_enable_x64 else 5e-4)


def test_under_vmap(rtol):
    """Kernels at many parameters at once."""
    params = {k: normal(n, 2, *shape) / 2 for n, (k, shape) in enumerate(SHAPES.items())}
    f = lambda p, x: over_time(p, jnp.tanh(transposed(p, convolved(p, x)))).mean(1)
    x = normal(20, 2, D, D)
    fn = nt.empirical_ntk_fn(f, implementation=3, vmap_axes=0)
    got = jax.jit(jax.vmap(fn, (None, None, 0)))(x, None, params)
    for k in range(2):
        expected = reference.ntk(f, jax.tree.map(lambda p, k=k: p[k], params), x)
        np.testing.assert_allclose(got[k], expected, rtol=rtol, atol=rtol * np.abs(expected).max())
