"""Gradients of a few examples at a time: the same kernels, in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import tangents as nt
from finite.table import normal
from reference import finite as reference
from tangents._finite.methods import structured_derivatives
from tangents._finite.structure import terms

NUMBERS = ("NHWC", "HWIO", "NHWC")


def network(p, x):
    """A kernel used twice, groups, scales, and a table that the input chooses from."""
    for _ in range(2):
        x = jnp.tanh(lax.conv_general_dilated(x, p["twice"], (1, 1), "SAME", None, None, NUMBERS))
    x = x * p["scale"] + p["shift"]
    rows = p["table"][jnp.argmax(x.mean((1, 2)), -1)]
    groups = {"feature_group_count": 2, "dimension_numbers": NUMBERS}
    x = jnp.tanh(lax.conv_general_dilated(x, p["groups"], (2, 2), "SAME", **groups))
    return (x.mean((1, 2)) + rows) @ p["head"]


SHAPES = {
    "twice": (3, 3, 2, 2), "scale": (2,), "shift": (2,), "table": (2, 4), "groups": (3, 3, 1, 4),
    "head": (4, 3),
}  # fmt: skip


@pytest.mark.parametrize("axes", [((), ()), ((-1,), ()), ((), (0,)), ((0,), (1,))], ids=str)
@pytest.mark.parametrize(("count", "small"), [(4, terms.SMALL), (5, 1)])
def test_gradients_in_parts(axes, count, small, rtol, monkeypatch):
    p = {name: normal(k, *shape) for k, (name, shape) in enumerate(SHAPES.items())}
    x1, x2 = normal(10, count, 4, 4, 2), normal(11, count, 4, 4, 2)
    parts = []
    by_parts = structured_derivatives.SideTerms.by_parts
    monkeypatch.setattr(
        structured_derivatives.SideTerms,
        "by_parts",
        lambda side, passes, size, *more, **options: (
            parts.append(size) or by_parts(side, passes, size, *more, **options)
        ),
    )
    monkeypatch.setattr(structured_derivatives, "CACHE", 6000 * x1.dtype.itemsize)
    monkeypatch.setattr(terms, "SMALL", small)  # of 1: all gradients are one
    for x in (None, x2):
        got = nt.empirical_ntk_fn(network, *axes, 0, 3)(x1, x, p)
        expected = reference.ntk(network, p, x1, x, *axes)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(got, expected, rtol=rtol, atol=10 * rtol * scale)
    if jax.default_backend() == "cpu":
        assert parts and set(parts) <= {1, 2}


def linear(p, x):
    """The passes of all examples are one, and so is the term of a bias."""
    return (x.mean((1, 2)) @ p["table"] + p["head"][:, 0]) @ p["head"]


@pytest.mark.parametrize("f", [network, linear], ids=lambda f: f.__name__)
@pytest.mark.parametrize("axes", [((), ()), ((-1,), ()), ((), (-1,))], ids=str)
def test_symmetric_kernels_in_blocks(f, axes, rtol, monkeypatch):
    """Blocks of parts of the examples, of different sizes, up to the diagonal."""
    p = {name: normal(k, *shape) for k, (name, shape) in enumerate(SHAPES.items())}
    x = normal(10, 5, 4, 4, 2)
    monkeypatch.setattr(terms, "BLOCKS", ((5, 3),))
    got = nt.empirical_ntk_fn(f, *axes, 0, 3)(x, None, p)
    expected = reference.ntk(f, p, x, None, *axes)
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=10 * rtol * np.abs(expected).max())
