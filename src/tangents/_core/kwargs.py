"""Keyword arguments of a function seen from both inputs of a kernel.

A tuple of length two is a pair, its first entry for x1 and its second for x2; anything else goes to
both. A random key `rng` that is not a pair is the same for both inputs only if they are equal by
value (one network draw sees one example twice); otherwise the second is `fold_in(rng, 1)`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import random, tree_util

from tangents._core.typing import Array, PyTree

EQUAL_TOLERANCE = 1e-12
"""Inputs closer than this in every entry count as one example."""


def split_kwargs(
    kwargs: dict[str, Any], x1: PyTree, x2: PyTree | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword arguments for x1 and for x2."""
    kwargs1, kwargs2 = {}, {}
    for name, value in kwargs.items():
        if is_pair(value):
            kwargs1[name], kwargs2[name] = value
        elif name == "rng" and value is not None:
            kwargs1[name], kwargs2[name] = value, _second_key(value, x1, x2)
        else:
            kwargs1[name] = kwargs2[name] = value
    return kwargs1, kwargs2


def is_pair(value: Any) -> bool:
    """Whether a keyword argument has one entry for each input."""
    return isinstance(value, tuple) and len(value) == 2


def merge_equal_pairs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Pairs whose entries are one object become that object: with x2 = None they break nothing."""

    def merge(value: Any) -> Any:
        if not is_pair(value) or is_pair(value[0]):
            return value
        first, tree1 = tree_util.tree_flatten(value[0])
        second, tree2 = tree_util.tree_flatten(value[1])
        same = tree1 == tree2 and all(a is b for a, b in zip(first, second, strict=True))
        return value[0] if same else value

    return {name: merge(value) for name, value in kwargs.items()}


def same_inputs(x1: PyTree, x2: PyTree | None) -> bool | Array:
    """Whether two inputs are equal by value: a Python bool where that is known without looking."""
    if x2 is None or x1 is x2:
        return True
    leaves1, treedef1 = tree_util.tree_flatten(x1)
    leaves2, treedef2 = tree_util.tree_flatten(x2)
    if treedef1 != treedef2:
        return False
    if any(jnp.shape(a) != jnp.shape(b) for a, b in zip(leaves1, leaves2, strict=True)):
        return False
    if all(a is b for a, b in zip(leaves1, leaves2, strict=True)):
        return True
    close = [_close(a, b) for a, b in zip(leaves1, leaves2, strict=True)]
    if any(isinstance(value, jax.core.Tracer) for value in leaves1 + leaves2):
        return jnp.all(jnp.stack([jnp.asarray(c) for c in close]))
    return all(bool(c) for c in close)


def _close(a: Any, b: Any) -> Any:
    if jnp.issubdtype(jnp.result_type(a), jnp.inexact):
        wide = jnp.promote_types(jnp.result_type(a), jnp.result_type(b))
        difference = jnp.asarray(a, wide) - jnp.asarray(b, wide)
        both_nan = jnp.isnan(a) & jnp.isnan(b)  # one marker of missing entries on both sides
        return jnp.all((jnp.abs(difference) < EQUAL_TOLERANCE) | both_nan)
    if isinstance(a, jax.Array | np.ndarray):
        return jnp.all(a == b)
    return a == b


def _second_key(key: Any, x1: PyTree, x2: PyTree | None) -> Any:
    same = same_inputs(x1, x2)
    if isinstance(same, bool):
        return key if same else random.fold_in(key, 1)
    other = random.fold_in(key, 1)
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        data = jnp.where(same, random.key_data(key), random.key_data(other))
        return random.wrap_key_data(data, impl=random.key_impl(key))
    return jnp.where(same, key, other)
