"""The table every method is tested over: methods × networks × axes. New ones join by one row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax, random

from tangents import NtkImplementation

METHODS = [
    NtkImplementation.JACOBIAN_CONTRACTION,
    NtkImplementation.NTK_VECTOR_PRODUCTS,
    NtkImplementation.STRUCTURED_DERIVATIVES,
]


@dataclass(frozen=True)
class Network:
    """A function, its parameters and two inputs; examples independent along axis 0 if `vmap`."""

    name: str
    f: Callable[..., Any]
    params: Any
    x1: Any
    x2: Any
    vmap: Any = 0
    every_axes: bool = False
    """Test all choices of axes, not only the first two: once for each number of output axes."""


def normal(seed: int, *shape: int) -> jax.Array:
    """Standard normal numbers in the default float of the run."""
    return random.normal(random.key(seed), shape)


def _mlp(p, x):
    return jnp.tanh(x @ p["w"] / 2 + p["b"]) @ p["v"]


def _tied(w, x):
    """One weight used twice: cross terms between its uses."""
    return jnp.tanh(x @ w) @ w


def _sequence(p, x):
    """A weight shared over a sequence, pooled."""
    return jnp.mean(jnp.tanh(x @ p["w"]), axis=1) @ p["v"]


def _recurrent(p, x):
    """A weight shared over time steps of a scan."""

    def step(h, x_t):
        h = jnp.tanh(x_t @ p["w"] + h @ p["u"])
        return h, None

    h0 = jnp.zeros((x.shape[0], p["u"].shape[0]), x.dtype)
    return lax.scan(step, h0, jnp.swapaxes(x, 0, 1))[0] @ p["v"]


def _convolution(p, x):
    dims = ("NHWC", "HWIO", "NHWC")
    x = lax.conv_general_dilated(x, p["k"], (1, 1), "SAME", dimension_numbers=dims)
    x = jax.nn.relu(x)
    x = lax.conv_general_dilated(x, p["l"], (2, 1), "VALID", dimension_numbers=dims)
    return x.mean((1, 2))


def _normalised(p, x):
    """Examples interact: batch statistics."""
    h = x @ p["w"]
    return jnp.tanh((h - h.mean(0)) / (1 + h.var(0))) @ p["v"]


def _spatial(p, x):
    """An output with two axes beside the batch."""
    return jnp.einsum("nsi,ik->nsk", jnp.sin(x), p["w"]) * p["scale"]


def _batch_last(p, x):
    return p["v"] @ jnp.tanh(p["w"] @ x)


NETWORKS = [
    Network(
        "mlp",
        _mlp,
        {"w": normal(0, 3, 5), "b": normal(1, 5), "v": normal(2, 5, 2)},
        normal(3, 4, 3),
        normal(4, 3, 3),
        every_axes=True,
    ),
    Network("tied", _tied, normal(0, 3, 3), normal(1, 2, 3), normal(2, 3, 3)),
    Network(
        "sequence",
        lambda p, x: _sequence({"w": p[0], "v": p[1]}, x),
        [normal(0, 3, 4), normal(1, 4, 2)],
        normal(2, 2, 5, 3),
        normal(3, 3, 5, 3),
    ),
    Network(
        "recurrent",
        _recurrent,
        {"w": normal(0, 2, 3), "u": normal(1, 3, 3), "v": normal(2, 3, 2)},
        normal(3, 2, 4, 2),
        normal(4, 3, 4, 2),
    ),
    Network(
        "convolution",
        _convolution,
        {"k": normal(0, 2, 3, 2, 3), "l": normal(1, 2, 2, 3, 2)},
        normal(2, 2, 4, 5, 2),
        normal(3, 3, 4, 5, 2),
    ),
    Network(
        "normalised",
        _normalised,
        {"w": normal(0, 3, 4), "v": normal(1, 4, 2)},
        normal(2, 3, 3),
        normal(3, 4, 3),
        vmap=None,
    ),
    Network(
        "spatial",
        _spatial,
        {"w": normal(0, 3, 2), "scale": normal(1)},
        normal(2, 2, 4, 3),
        normal(3, 3, 4, 3),
        every_axes=True,
    ),
    Network(
        "batch_last",
        _batch_last,
        {"w": normal(0, 4, 3), "v": normal(1, 2, 4)},
        normal(2, 3, 5),
        normal(3, 3, 4),
        vmap=-1,
    ),
]
AXES = [
    ((-1,), ()),
    ((), ()),
    ((), (-1,)),
    ((-1, 0), ()),
    (-1, 0),
    ((0,), (1,)),
    ((), (0, 1)),
    (1, ()),
]
"""(trace_axes, diagonal_axes); those that pair examples need as many in x2 as in x1."""
