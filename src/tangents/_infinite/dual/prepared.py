"""What a dual reads of one side each, computed once for all tiles of pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from tangents._core.typing import Array

_T = TypeVar("_T")


class Prepared(NamedTuple):
    """Of one layer.

    level: which of several forms serves the largest variance. sides: for side 1 and, if it is
    another, side 2 an array `(numbers, *shape of the side)`.
    """

    level: Array
    sides: tuple[Array, ...]


def prepare(
    forms: Sequence[Callable[[Array], Array]], level: Array, sides: tuple[Array, ...]
) -> Prepared:
    """By the form of a level, `var -> (numbers, *var.shape)`; zeros where there is none."""
    sides = jax.lax.stop_gradient(sides)
    most = max(jax.eval_shape(form, sides[0]).shape[0] for form in forms)

    def padded(form, sides):
        found = [form(side) for side in sides]
        return [jnp.pad(f, [(0, most - len(f))] + [(0, 0)] * (f.ndim - 1)) for f in found]

    def none(sides):
        return [jnp.zeros((most, *side.shape), side.dtype) for side in sides]

    branches = [*(lambda sides, form=form: padded(form, sides) for form in forms), none]
    return Prepared(level, tuple(jax.lax.switch(level, branches, sides)))


def pack(tree: Any, shape: tuple[int, ...]) -> Array:
    """Arrays of one shape, or with one more axis in front, as one: copied faster than many."""
    return jnp.concatenate([a.reshape((-1, *shape)) for a in jax.tree.leaves(tree)])


def unpack(array: Array, like: _T) -> _T:
    """The arrays of `pack`, with shapes like those but for the axes of the side."""
    leaves, treedef = jax.tree.flatten(like)
    out, start, shape = [], 0, array.shape[1:]
    for leaf in leaves:
        axes = leaf.shape[: leaf.ndim - len(shape)]
        number = math.prod(axes)
        out.append(array[start : start + number].reshape((*axes, *shape)))
        start += number
    return jax.tree.unflatten(treedef, out)
