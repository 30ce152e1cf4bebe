"""Cotangents that are the same at every position."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import tangents as nt
from finite.table import normal
from reference import finite as reference
from tangents._finite.functions import compute
from tangents._finite.methods import structured_derivatives
from tangents._finite.methods.structured_derivatives import Options
from tangents._finite.problem import make_problem
from tangents._finite.structure import contraction
from tangents._finite.structure.constancy import constant_axes

FUNCTIONS = {
    "broadcast": lambda a, b: lax.broadcast_in_dim(a, (3, 4, 5), (1, 2)) * 2,
    "one of size one": lambda a, b: jnp.broadcast_to(a[:, :1], (4, 5)) + 1,
    "two": lambda a, b: jnp.broadcast_to(a[:1], (4, 5)) * jnp.broadcast_to(b[0], (4, 5)),
    "one of two": lambda a, b: jnp.broadcast_to(a[:1], (4, 5)) * a,
    "transpose": lambda a, b: jnp.transpose(jnp.broadcast_to(a, (3, 4, 5)), (1, 0, 2)),
    "reshape": lambda a, b: jnp.broadcast_to(a[None, :, None], (2, 4, 3, 5)).reshape(8, 1, 3, 5),
    "squeeze": lambda a, b: jnp.squeeze(jnp.broadcast_to(a[:, None, None], (4, 1, 3, 5)), 1),
    "sum": lambda a, b: jnp.broadcast_to(a, (3, 4, 5)).sum(1),
    "product": lambda a, b: jnp.broadcast_to(a, (3, 4, 5)) @ b.T,
    "batch": lambda a, b: jnp.einsum(
        "tij,tkj->tik", jnp.broadcast_to(a, (3, 4, 5)), jnp.broadcast_to(b, (3, 2, 5))
    ),
    "not a batch": lambda a, b: jnp.einsum("tj,tj->t", jnp.broadcast_to(a[0], (4, 5)), a),
    "jit": lambda a, b: jax.jit(jnp.broadcast_to, static_argnums=1)(a[0], (4, 5)).sum(1),
    "entry by entry": lambda a, b: lax.mul(a[:1], a) * jnp.broadcast_to(b[:1], (4, 5)),
    "of size one": lambda a, b: (a[:1] + b[:1]).reshape(1, 1, 5) * jnp.ones((2, 1, 5)),
    "unknown": lambda a, b: jnp.cumsum(jnp.broadcast_to(a[0], (4, 5)), 0),
    "literal": lambda a, b: jnp.zeros((3, 2)),
}
CONSTANT = {
    "broadcast": {0}, "one of size one": {1}, "two": {0}, "one of two": set(), "transpose": {1},
    "reshape": {1, 2}, "squeeze": {1}, "sum": {0}, "product": {0}, "batch": {0},
    "not a batch": set(), "jit": {0}, "unknown": set(), "literal": {0, 1},
    "entry by entry": set(), "of size one": {0, 1},
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_axes(name):
    a, b = normal(1, 4, 5), normal(2, 2, 5)
    closed = jax.make_jaxpr(FUNCTIONS[name])(a, b)
    assert constant_axes(closed.jaxpr) == [CONSTANT[name]]
    value = np.asarray(FUNCTIONS[name](a, b))
    for axis in CONSTANT[name]:
        assert np.ptp(value, axis).max() == 0


def positions(p, x):
    """A weight at each position, a bias, a table of positions; then the mean of the positions."""
    h = jnp.tanh(x @ p["first"] + p["place"])
    return (h @ p["last"] + p["bias"]).mean(0) @ p["out"]


def images(p, x):
    """A convolution in front of a mean over the image."""
    convolve = lambda w, h: lax.conv_general_dilated(
        h[None], w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )[0]
    h = jnp.tanh(convolve(p["first"], x))
    return convolve(p["last"], h).mean((0, 1)) @ p["out"]


def tied(p, x):
    """The weight in front of the mean is used before, where its cotangents differ."""
    h = jnp.tanh(x @ p["last"] + p["place"])
    return (h @ p["last"]).mean(0) @ p["out"]


NETWORKS = {
    "positions": (
        positions,
        {"first": (3, 4), "place": (6, 4), "last": (4, 5), "bias": (5,), "out": (5, 2)},
        (3, 6, 3),
    ),
    "images": (images, {"first": (3, 3, 2, 3), "last": (3, 3, 3, 2), "out": (2, 2)}, (2, 4, 5, 2)),
    "tied": (tied, {"place": (6, 4), "last": (4, 4), "out": (4, 2)}, (3, 6, 4)),
}


def drawn(name):
    one, shapes, shape = NETWORKS[name]
    params = {k: normal(10 + n, *s) for n, (k, s) in enumerate(shapes.items())}
    return lambda p, x: jax.vmap(lambda each: one(p, each))(x), params, normal(3, *shape)


@pytest.mark.parametrize("form", ["outer", "pairs"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_that_end_in_a_mean(name, form, rtol):
    f, params, x = drawn(name)
    problem = make_problem(f, x, None, params, {}, vmap_axes=0, caller="test")
    method = functools.partial(structured_derivatives.kernels, options=Options(form=form))
    (got,) = compute(problem, method, problem.pair_axes((), ()))
    expected = reference.ntk(f, params, x, None, ())
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


def test_activations_are_summed_first(monkeypatch):
    """The product over positions is not made."""
    f, params, x = drawn("positions")
    seen = set()
    cotangent = contraction.Factors.cotangent.func

    def noted(self):
        found = cotangent(self)
        seen.add((self.use.primitive, found.shape[-2:]))
        return found

    monkeypatch.setattr(contraction.Factors, "cotangent", property(noted))
    nt.empirical_ntk_fn(f, (), (), 0, 3)(x, None, params)
    assert {("dot_general", (1, 5)), ("dot_general", (6, 4))} <= seen
