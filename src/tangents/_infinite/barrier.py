"""Keeping layers apart in a compiled program.

Without a barrier XLA on CPU fuses a layer into everything that reads it, and computes it again in
each: work and compile time grow with the square of the depth. `lax.optimization_barrier` alone
does not help there before JAX 0.12 (it is gone before fusion starts: 5 layers of 2500 x 2500 pairs
take 0.33 s with it and 0.31 s without); results that pass a conditional are written (0.15 s).
"""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

_T = TypeVar("_T")

_FUSES = jax.__version_info__ < (0, 12)


def made_once(tree: _T, pairs: jax.Array) -> _T:
    """Arrays of one side, computed and written before those of `pairs` that broadcast them.

    Fused into what reads them, sums and products of a side would be computed again for each pair.
    """
    small = all(a.size < pairs.size for a in jax.tree.leaves(tree))
    return keep_apart(tree) if small else tree


def keep_apart(tree: _T) -> _T:
    """The same arrays, computed once and written."""
    tree = lax.optimization_barrier(tree)
    if not _FUSES or jax.default_backend() != "cpu":
        return tree
    # Always true, which the compiler cannot know.
    go = lax.optimization_barrier(jnp.zeros((), jnp.int32)) == 0
    # The branches must differ, or there is no condition left.
    return lax.cond(go, lambda a: a, lax.optimization_barrier, tree)


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
