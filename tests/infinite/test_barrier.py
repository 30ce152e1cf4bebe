"""Layers kept apart in a compiled program."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tangents._infinite.barrier import CALLS, computed_apart, keep_apart

X = jnp.linspace(-1.0, 1.0, 600).reshape(20, 30)

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="how XLA compiles for CPU")


def compiled(fn, *args):
    return jax.jit(fn).lower(*args).compile().as_text()


def step(a, b):
    return jnp.where(a > b, jnp.sin(a) * b, a), a - b


def steps(apart):
    def fn(a, b):
        for _ in range(3):
            a, b = apart(step, a, b)
        return a + b

    return fn


@on_cpu
def test_what_is_kept_apart_is_computed_once():
    def fn(apart):
        def read(x):
            y = apart(jnp.sin(x))
            return y + 1, y.T * 2, y[::-1] - 1

        return read

    assert compiled(fn(keep_apart), X).count(" sine(") == 1
    assert compiled(fn(lambda y: y), X).count(" sine(") == 3


@on_cpu
@pytest.mark.skipif(not CALLS, reason="barriers keep layers apart")
def test_equal_functions_are_equal_kernels_and_what_they_call_is_inlined():
    text = compiled(steps(computed_apart), X, X)
    calls = re.findall(r" call\(.*to_apply=%([\w.]+)", text)
    assert len(calls) == 3
    # Fusions of the three calls are the same but for names.
    bodies = re.findall(r"\n%fused_computation[^\n]*\n(.*?)\n}", text, re.DOTALL)
    names = re.compile(r"%[\w.]+|metadata={[^}]*}|frontend_attributes={[^}]*}")
    bodies = [names.sub("", b) for b in bodies]
    with_sine = [b for b in bodies if " sine(" in b]
    assert len(with_sine) == 3
    assert len(set(with_sine)) == 1


@pytest.mark.parametrize("compile_", [lambda f: f, jax.jit])
def test_values_and_derivatives_are_those_of_the_function(compile_, rtol):
    plain, apart = steps(lambda f, *args: f(*args)), steps(computed_apart)
    y = X * 0.7 + 0.1
    np.testing.assert_allclose(compile_(apart)(X, y), plain(X, y), rtol, rtol)
    for derivative in (jax.jacfwd, jax.jacrev):
        of = [derivative(lambda a, f=f: f(a, y[0]).sum(0)) for f in (plain, apart)]
        np.testing.assert_allclose(compile_(of[1])(X[0]), of[0](X[0]), rtol, rtol)
    mapped = compile_(jax.vmap(apart))(X, y)
    np.testing.assert_allclose(mapped, plain(X, y), rtol, rtol)


def test_trees_without_arrays_and_of_other_types():
    @jax.jit
    def fn(tree):
        return keep_apart(tree)

    tree = {"a": jnp.arange(3), "b": None, "c": (jnp.ones(2, bool), jnp.ones(1, jnp.complex64))}
    out = fn(tree)
    assert jax.tree.structure(out) == jax.tree.structure(tree)
    assert all((a == b).all() for a, b in zip(*map(jax.tree.leaves, (out, tree)), strict=True))
    assert jax.jit(lambda: keep_apart(()))() == ()
