"""What duals read of one side, made once for all tiles: against tiles that make their own."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tangents import stax
from tangents._infinite import executors, tape
from tangents._infinite.dual import prepared


def dense(phi, depth: int):
    layers = [layer for _ in range(depth) for layer in (stax.Dense(1, 1.375, 0.125), phi())]
    return stax.serial(*layers, stax.Dense(1))


def shrink(x):
    return jnp.clip(x, -1.5, 2)


def positions():
    conv = stax.Conv(1, (3,), padding="SAME", W_std=1.375)
    return stax.serial(conv, stax.Tanh(), conv, stax.Selu(), stax.GlobalAvgPool(), stax.Dense(1))


NETWORKS = {
    "Tanh": (lambda: dense(stax.Tanh, 1), (7, 5)),
    "Selu, turns": (lambda: dense(stax.Selu, 3), (7, 5)),
    "HardTanh, turns": (lambda: dense(stax.HardTanh, 3), (7, 5)),
    "clip": (lambda: dense(lambda: stax.Elementwise(shrink), 2), (7, 5)),
    "positions": (positions, (5, 6, 2)),
}


@contextlib.contextmanager
def single():
    with jax.enable_x64(False):
        yield


def inputs(shape):
    rng = np.random.default_rng(3)
    return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in (shape, (3, *shape[1:]))]


def computed(network, x1, x2, fn=lambda kernel, x1, x2: kernel(x1, x2)):
    """In blocks of a few pairs, under `jit`."""
    executor = executors.Blocked(least=1, most=6)
    executors.register(executor)
    try:
        kernel_fn = network()[2]

        def both(x1, x2):
            return tuple(kernel_fn(x1, x2, ("nngp", "ntk")))

        return jax.tree.map(np.asarray, jax.jit(lambda a, b: fn(both, a, b))(x1, x2))
    finally:
        executors.unregister(executor)


@pytest.fixture
def calls(monkeypatch):
    """Number of layers whose sides were prepared."""
    found = []

    def counted(forms, level, sides):
        found.append(len(sides))
        return prepared.prepare(forms, level, sides)

    for module in ("by_tables", "by_corners"):
        monkeypatch.setattr(f"tangents._infinite.dual.{module}.prepare", counted)
    return found


QUICK = {("Selu, turns", True), ("HardTanh, turns", False)}


@pytest.mark.parametrize(
    ("name", "two"),
    [
        pytest.param(n, two, marks=() if (n, two) in QUICK else pytest.mark.slow)
        for n in NETWORKS
        for two in (False, True)
    ],
)
def test_prepared_sides_give_what_tiles_make(name, two, calls, monkeypatch):
    network, shape = NETWORKS[name]
    with single():
        x1, x2 = inputs(shape)
        x2 = x2 if two else None
        monkeypatch.setattr("tangents._infinite.blocks._SHARE", 1000)
        kept = computed(network, x1, x2)
        assert set(calls) == {2 if two else 1}
        calls.clear()
        monkeypatch.setattr("tangents._infinite.blocks._SHARE", 0)
        own = computed(network, x1, x2)
    for a, b in zip(kept, own, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6 * np.max(np.abs(b)))


@pytest.mark.slow
def test_gradients_do_not_go_through_them(monkeypatch):
    def slope(kernel, x1, x2):
        return jax.grad(lambda a: kernel(a, x2)[1].sum())(x1)

    with single():
        x1, x2 = inputs((7, 5))
        monkeypatch.setattr("tangents._infinite.blocks._SHARE", 1000)
        kept = computed(lambda: dense(stax.Tanh, 2), x1, x2, slope)
    with jax.enable_x64(True):
        exact = computed(
            lambda: dense(stax.Tanh, 2), *(jnp.asarray(x, float) for x in (x1, x2)), slope
        )
    np.testing.assert_allclose(kept, exact, atol=2e-5 * np.max(np.abs(exact)))


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.3, 1.5, 4.0, 20.0])
def test_one_input_far_out(scale, monkeypatch):
    """The largest deviation chooses the form for all: each table, and what lies beyond them."""
    results = []
    with single():
        x1, x2 = inputs((7, 5))
        x1 = (x1 / jnp.linalg.norm(x1, axis=1, keepdims=True)).at[2].multiply(scale)
        for share in (1000, 0):
            monkeypatch.setattr("tangents._infinite.blocks._SHARE", share)
            results.append(computed(lambda: dense(stax.Selu, 2), x1, x2))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6 * np.max(np.abs(b)))


def test_no_more_is_kept_than_asked_for():
    """Numbers of sides are counted (and the level), not variances."""
    recorded = tape.Sides((jnp.ones(4),), maker=jax.tree_util.Partial(_made))
    for most, kept in ((16, False), (17, True)):
        (one,), (two,) = tape.prepared([recorded], [recorded], most)
        assert (one.numbers1 is not None) == kept == (two.numbers1 is not None)


def _made(*sides):
    with_two = tuple(jnp.stack([s, 2 * s]) for s in sides)
    return prepared.Prepared(jnp.int32(0), with_two)
