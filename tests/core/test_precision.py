"""The precision policy reaches every Gram contraction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import tangents as nt
from tangents._core import precision


def _precisions(fn, *args):
    """Precision of the last dot_general of a function: the contraction over parameters."""
    found = []

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                found.append(eqn.params["precision"])
            for value in eqn.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    walk(inner)

    walk(jax.make_jaxpr(fn)(*args).jaxpr)
    return found


@pytest.mark.parametrize(
    ("asked", "used"),
    [
        (None, "HIGHEST"),
        ("highest", "HIGHEST"),
        ("high", "HIGH"),
        (lax.Precision.DEFAULT, "DEFAULT"),
    ],
)
def test_contractions_follow_the_policy(asked, used):
    f = lambda p, x: jnp.sin(x * p.sum())  # no products of its own
    x, p = jnp.ones((4, 2)), jnp.ones(3)
    for kernel_fn in (
        nt.empirical_ntk_fn(f, precision=asked, implementation=1),
        nt.empirical_nngp_fn(f, precision=asked),
    ):
        last = _precisions(kernel_fn, x, None, p)[-1]
        pair = last if isinstance(last, tuple) else (last, last)
        assert pair == (lax.Precision[used],) * 2


def test_half_types_accumulate_in_float32():
    assert precision.accumulator(jnp.bfloat16) == np.float32
    assert precision.accumulator(np.dtype(np.float16)) == np.float32
    assert precision.accumulator(np.dtype(np.float64)) == np.float64
