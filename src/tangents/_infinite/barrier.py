"""Keeping layers apart in a compiled program.

Without a barrier XLA on CPU fuses a layer into everything that reads it, and computes it again in
each: work and compile time grow with the square of the depth. `lax.optimization_barrier` alone
does not help there before JAX 0.12 (it is gone before fusion starts: 5 layers of 2500 x 2500 pairs
take 0.33 s with it and 0.31 s without). Operands and results of a call that is not inlined are
written (0.15 s), and functions that are called more than once have the same kernels, of which each
takes 15 to 25 ms to compile. Calls are inlined but for those with XLA's attribute `inlineable`.

JAX 0.12 compiles a loop of calls, however long, as one kernel (its XLA takes it for a small one).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.experimental.xla_metadata import set_xla_metadata

_T = TypeVar("_T")

CALLS = jax.__version_info__ < (0, 12)
"""Are layers kept apart by calls, on CPU; else by barriers."""


def made_once(trees: _T, shapes: Sequence[tuple[int, ...]], pairs: jax.Array) -> _T:
    """Arrays of one side, computed and written before those of `pairs` that broadcast them.

    Fused into what reads them, sums and products of a side would be computed again for each pair.

    Args:
      trees: one for each side; its arrays have the shape of the side, or one more axis in front.
      shapes: of both sides.
    """
    if not all(math.prod(shape) < pairs.size for shape in shapes):
        return trees
    packed, unpack = [], []
    for tree, shape in zip(trees, shapes, strict=True):  # pyright: ignore[reportArgumentType]
        leaves, treedef = jax.tree.flatten(tree)
        ends = np.cumsum([1 if a.shape == shape else a.shape[0] for a in leaves])
        # One array is copied faster than many.
        packed.append(jnp.concatenate([a.reshape((-1, *shape)) for a in leaves]))
        unpack.append((treedef, [a.shape for a in leaves], ends))
    out = []
    for array, (treedef, kept, ends) in zip(keep_apart(packed), unpack, strict=True):
        parts = [
            array[end - n : end] for end, n in zip(ends, np.diff(ends, prepend=0), strict=True)
        ]
        leaves = [a.reshape(s) for a, s in zip(parts, kept, strict=True)]
        out.append(jax.tree.unflatten(treedef, leaves))
    return tuple(out)  # pyright: ignore[reportReturnType]


def keep_apart(tree: _T) -> _T:
    """The same arrays, computed once and written."""
    return computed_apart(lambda a: a, tree)


def computed_apart(fn: Callable[..., _T], *operands: Any) -> _T:
    """`fn(*operands)`, compiled as if alone: equal functions of equal shapes share kernels."""
    if not any(isinstance(a, Tracer) for a in jax.tree.leaves(operands)):
        return fn(*operands)
    # Numbers that the compiler can see would be put into the function, and make it another one.
    operands = lax.optimization_barrier(operands)
    if not CALLS or jax.default_backend() != "cpu":
        return lax.optimization_barrier(fn(*operands))

    def inside(*operands):
        with set_xla_metadata(inlineable=None):
            return fn(*operands)

    with set_xla_metadata(inlineable="false"):
        return jax.jit(inside)(*operands)


def made_together(one: jax.Array, two: jax.Array) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Two arrays in one, so that what both are made of is computed once.

    XLA on CPU makes each result of a program by a fusion of its own, with all that it reads.
    """
    if one.dtype != two.dtype or one.dtype not in (jnp.float32, jnp.float64):
        return one, two
    return lax.complex(one, two) if jax.default_backend() == "cpu" else (one, two)


def taken_apart(pair: jax.Array | tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The arrays of `made_together`, to be called where they are results: after a conditional."""
    return pair if isinstance(pair, tuple) else (lax.real(pair), lax.imag(pair))
