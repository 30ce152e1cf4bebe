"""The last layer: unit vectors for cotangents, and logits of fewer dimensions than entries."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tangents as nt
from finite.table import normal
from reference import finite as reference
from tangents._finite.methods import structured_derivatives
from tangents._finite.problem import make_problem

PARAMS = {"w": normal(0, 3, 2), "u": normal(1, 2, 5), "b": normal(2, 5), "t": normal(3, 4, 5)}


def hidden(p, x):
    return jnp.tanh(x @ p["w"])


HEADS = {
    "dense": (lambda p, x: hidden(p, x) @ p["u"] + p["b"], (3,), True),
    "lhs": (lambda p, x: jnp.einsum("vd,nd->nv", p["u"].T, hidden(p, x)) - p["b"], (3,), True),
    "tokens": (lambda p, x: hidden(p, x) @ p["u"] + p["t"], (4, 3), True),
    "channels first": (
        lambda p, x: jnp.einsum("dv,ntd->nvt", p["u"], hidden(p, x)), (4, 3), False,
    ),
    "scaled": (lambda p, x: hidden(p, x) @ (p["u"] / 3) + 2 * p["b"], (3,), True),
    "constant": (lambda p, x: hidden(p, x) @ normal(5, 2, 5), (3,), True),
    "twice": (lambda p, x: (hidden(p, x) * p["u"][:, 0]) @ p["u"], (3,), False),
    "softmax": (lambda p, x: jax.nn.log_softmax(hidden(p, x) @ p["u"]), (3,), False),
    "bias in two places": (lambda p, x: hidden(p, x + p["b"][:3]) @ p["u"] + p["b"], (3,), False),
    "linear": (lambda p, x: x @ p["w"] + p["b"][:2], (3,), False),
}  # fmt: skip


@functools.cache
def full(name, symmetric):
    f, shape, _ = HEADS[name]
    x1, x2 = normal(6, 2, *shape), normal(7, 3, *shape)
    j1 = reference.jacobian(f, PARAMS, x1)
    return np.tensordot(j1, j1 if symmetric else reference.jacobian(f, PARAMS, x2), (-1, -1))


@pytest.mark.parametrize("vmap_axes", [0, None])
@pytest.mark.parametrize("name", HEADS)
def test_kernels(name, vmap_axes, rtol):
    f, shape, compressed = HEADS[name]
    x1, x2 = normal(6, 2, *shape), normal(7, 3, *shape)
    choices = [((-1,), ()), ((), ()), ((1,), ()), ((), (-1,))][: 4 if len(shape) > 1 else 2]
    for axes, other in ((choices, x2), (choices[:2], None)):
        for trace, diagonal in axes:
            fn = nt.empirical_ntk_fn(f, trace, diagonal, vmap_axes, 3)
            expected = reference.reduce_pairs(full(name, other is None), trace, diagonal)
            scale = np.abs(expected).max()
            got = jax.jit(fn)(x1, other, PARAMS)
            np.testing.assert_allclose(got, expected, rtol=rtol, atol=rtol * scale)
    problem = make_problem(f, x1, None, PARAMS, {}, vmap_axes=vmap_axes, caller="t")
    logits = 1 if name == "channels first" else -1
    text = structured_derivatives.explain(problem, problem.pair_axes(logits, ()))
    assert ("the 5 logits come from 2 numbers" in text) == compressed


def test_head_that_starts_at_zero(rtol):
    """No basis belongs to a last layer of zeros: values and gradients are finite and right."""
    f = lambda p, x: jnp.tanh(x @ p["w"]) @ p["u"]
    params = {"w": PARAMS["w"], "u": jnp.zeros((2, 5))}
    x = normal(6, 3, 3)

    def total(params, implementation):
        fn = nt.empirical_ntk_fn(f, vmap_axes=0, implementation=implementation)
        return jnp.sum(jnp.sin(fn(x, None, params)))

    for at in (params, {"w": PARAMS["w"], "u": PARAMS["u"]}):
        got, expected = (jax.grad(total)(at, k) for k in (3, 1))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=10 * rtol, atol=10 * rtol),
            got,
            expected,
        )


def test_second_derivatives(rtol):
    f = lambda p, x: jnp.tanh(x @ p["w"]) @ p["u"]
    x = normal(6, 2, 3)
    move = {"w": normal(8, 3, 2), "u": normal(9, 2, 5)}
    params = {name: PARAMS[name] for name in move}

    def along(t, implementation):
        at = jax.tree.map(lambda p, d: p + t * d, params, move)
        return nt.empirical_ntk_fn(f, vmap_axes=0, implementation=implementation)(x, None, at)

    second = lambda k: jax.jacfwd(jax.jacfwd(lambda t: along(t, k)))(0.0)
    expected = second(1)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(second(3), expected, rtol=100 * rtol, atol=100 * rtol * scale)
