"""Functions of one side to the last digit of single precision: polynomials by pieces.

A long polynomial of a number that was rounded itself is off by several roundings, the same ones in
every layer whose variance has settled, where they add up. A piece is short: what is added to its
first coefficient is small, and the distance from its middle is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from tangents._core.typing import Array

_DEGREE = 5


class Pieces(NamedTuple):
    """Of functions of x in [0, reach], by pieces of equal length in x / (1 + x).

    middles: (pieces,). coefficients: (pieces, functions, powers + 1); the first is split in two
    numbers of single precision.
    """

    reach: float
    middles: np.ndarray
    coefficients: np.ndarray


def pieces(functions: Callable[[np.ndarray], np.ndarray], reach: float, number: int) -> Pieces:
    """Interpolate on the host. functions: `x -> (functions, *x.shape)`."""
    edges = np.arange(number + 1) / number * reach / (1 + reach)
    edges = edges / (1 - edges)
    middles = ((edges[:-1] + edges[1:]) / 2).astype(np.float32).astype(np.float64)
    nodes = np.cos(np.pi * (np.arange(_DEGREE + 1) + 0.5) / (_DEGREE + 1))
    half = np.diff(edges)[:, None] / 2
    values = np.moveaxis(functions(middles[:, None] + half * nodes), 0, 1)
    powers = np.linalg.solve(np.vander(nodes, increasing=True), values[..., None])[..., 0]
    powers = powers / half[..., None] ** np.arange(_DEGREE + 1)
    first = powers[..., :1].astype(np.float32).astype(np.float64)
    rest = powers[..., :1] - first
    return Pieces(reach, middles, np.concatenate([first, rest, powers[..., 1:]], -1))


def evaluate(found: Pieces, x: Array) -> Array:
    """All functions at x in [0, reach], (functions, *x.shape)."""
    number, scale = len(found.middles), (1 + found.reach) / found.reach
    place = (number * scale * (x / (1 + x))).astype(jnp.int32).reshape(-1)
    place = jnp.clip(place, 0, number - 1)
    middles = jnp.asarray(found.middles, x.dtype)
    table = jnp.asarray(found.coefficients, x.dtype).reshape(number, -1)
    distance = (x.reshape(-1) - middles.at[place].get(mode="promise_in_bounds"))[:, None]
    taken = table.at[place].get(mode="promise_in_bounds")
    first, *rest = jnp.moveaxis(taken.reshape(len(place), *found.coefficients.shape[1:]), -1, 0)
    total = rest[-1]
    for c in rest[-2::-1]:
        total = total * distance + c
    return (first + total).T.reshape((-1, *x.shape))
