"""Nearly parallel pairs of networks that mix positions: computed again, in double precision.

Poolings and attention mix covariances of many positions, and what they cancel between nearly equal
inputs is lost in single precision whatever is carried beside them: there angles come out wrong by
the root of a rounding. Pairs of equal examples are exact; nearly equal ones, and nearly parallel or
opposite ones, are few, so they are computed again in float64.

Found by the cosine of whole inputs. Pairs hang together in groups (copies of one example, say), and
each group is computed as a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tangents._core import precision
from tangents._infinite.blocks import transpose_pairs
from tangents._infinite.dual.angle import reciprocal, safe_sqrt
from tangents._infinite.tile import add_up

NEAR = 0.02
"""1 - |cos| below which single precision is off by more than its rounding (11 degrees)."""


def near_pairs(x1: Any, x2: Any, axes: Any, same: bool) -> np.ndarray:
    """`(N1, N2)`: are two inputs parallel, opposite or nearly so.

    x2: None is x1. same: are they equal, example by example; an example near to no other one is not
    counted as near to itself, which is exact.
    """
    if any(not jnp.issubdtype(x.dtype, jnp.inexact) for x in jax.tree.leaves((x1, x2))):
        return np.zeros((0, 0), bool)  # tokens
    near = np.array(jnp.abs(_cosine(x1, x1 if x2 is None else x2, axes)) > 1 - NEAR)
    if same:
        np.fill_diagonal(near, False)
        np.fill_diagonal(near, near.any(1))
    return near


def _cosine(x1: Any, x2: Any, axes: Any) -> jax.Array:
    """Of all inputs of a network together."""
    product, squares1, squares2 = _moments(x1, x2, axes)
    scale1, scale2 = (reciprocal(safe_sqrt(a)) for a in (squares1, squares2))
    return product * scale1[:, None] * scale2


def _moments(x1: Any, x2: Any, axes: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    if isinstance(x1, list):
        parts = [_moments(*each) for each in zip(x1, x2, axes, strict=True)]
        product, squares1, squares2 = (add_up(p) for p in zip(*parts, strict=True))
        return product, squares1, squares2
    a, b = (jnp.moveaxis(x, axes[0], 0).reshape(x.shape[axes[0]], -1) for x in (x1, x2))
    a, b = (x.astype(jnp.result_type(x, jnp.zeros(()))) for x in (a, b))
    product = jnp.matmul(a, b.T, precision=precision.DEFAULT)
    return product, jnp.sum(a * a, -1), jnp.sum(b * b, -1)


def refined(
    kernel: Any,
    near: np.ndarray,
    symmetric: bool,
    most: int,
    block: Callable[[Any, Any, bool], Any],
) -> Any:
    """A Kernel (or list of them) with the pairs that are near from `block`, in float64.

    block: `(examples of x1, of x2, are they one block) -> Kernel`. most: examples of a block.
    """
    for rows, columns in _groups(near, symmetric):
        for i, left in enumerate(_pieces(rows, most)):
            for j, right in enumerate(_pieces(columns, most)):
                if symmetric and j < i:
                    continue
                with jax.enable_x64(True):
                    part = block(left, right, symmetric and i == j)
                kernel = _patched(kernel, part, left, right, near, False)
                if symmetric and j > i:
                    kernel = _patched(kernel, part, left, right, near, True)
    return kernel


def _groups(near: np.ndarray, symmetric: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows and columns of the blocks that cover all pairs that are near, each pair in one."""
    todo = near.any(1)
    while todo.any():
        rows = np.zeros(len(near), bool)
        rows[np.argmax(todo)] = True
        while True:
            columns = near[rows].any(0)
            more = near[:, columns].any(1)
            if symmetric:
                more |= columns
            if (more <= rows).all():
                break
            rows |= more
        todo &= ~rows
        yield np.flatnonzero(rows), np.flatnonzero(rows if symmetric else columns)


def _pieces(index: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """Pieces of at most `most`, filled up to a power of two: few programs are compiled."""
    for start in range(0, len(index), most):
        piece = index[start : start + most]
        size = min(1 << (len(piece) - 1).bit_length(), most)
        yield np.concatenate([piece, np.repeat(piece[-1:], size - len(piece))])


def _patched(kernel: Any, part: Any, rows: Any, columns: Any, near: Any, transposed: bool) -> Any:
    """The pairs that are near replaced by those of a block, or by those of its transpose."""
    if isinstance(kernel, list):
        pairs = zip(kernel, part, strict=True)
        return [_patched(k, p, rows, columns, near, transposed) for k, p in pairs]
    full = not kernel.diagonal_spatial

    def put(whole, values):
        if values is None or values.ndim == 0:
            return whole
        with jax.enable_x64(True):
            values = np.asarray(transpose_pairs(values, full) if transposed else values)
        left, right = (columns, rows) if transposed else (rows, columns)
        i, j = np.nonzero(near[np.ix_(left, right)])
        return whole.at[left[i], right[j]].set(values[i, j].astype(whole.dtype))

    return kernel.replace(nngp=put(kernel.nngp, part.nngp), ntk=put(kernel.ntk, part.ntk))
