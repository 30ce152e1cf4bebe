"""Masked inputs: entries that are not there.

A mask is boolean, `True` where an entry is missing, of a shape that broadcasts to the activation's
(channel sizes of one are common: a position is missing in all channels). Every layer reads missing
entries as zeros and says which entries of its output are missing; averages divide by the number of
entries that are there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_pytree_node_class
class MaskedArray:
    """An array with a mask.

    Args:
      masked_value: the array; its masked entries mean nothing.
      mask: boolean, `True` = masked, of a shape that broadcasts to the array's, or `None`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import stax
        >>> x = stax.MaskedArray(jnp.ones((2, 3)), jnp.array([[True], [False]]))
        >>> x.shape
        (2, 3)
    """

    def __init__(self, masked_value: Any, mask: Any = None):
        self.masked_value = masked_value
        self.mask = mask

    @property
    def shape(self) -> tuple[int, ...]:
        return jnp.shape(self.masked_value)

    def replace(self, **changes: Any) -> MaskedArray:
        """A copy with some fields changed."""
        return MaskedArray(
            changes.get("masked_value", self.masked_value), changes.get("mask", self.mask)
        )

    def astuple(self) -> tuple[Any, Any]:
        """`(masked_value, mask)`."""
        return self.masked_value, self.mask

    def tree_flatten(self):
        return (self.masked_value, self.mask), None

    @classmethod
    def tree_unflatten(cls, aux, children):
        self = object.__new__(cls)
        self.masked_value, self.mask = children
        return self

    def __repr__(self):
        return f"MaskedArray(masked_value={self.masked_value!r}, mask={self.mask!r})"


def is_masked_array(x: Any) -> bool:
    """Is this leaf a MaskedArray?"""
    return isinstance(x, MaskedArray)


def read_mask(x: Any, mask_constant: float | None) -> Any:
    """Entries of `x` that equal the mask constant (which may be nan), boolean; or None."""
    if isinstance(x, MaskedArray):
        return x.mask
    if mask_constant is None:
        return None
    constant = jnp.asarray(mask_constant, x.dtype)
    return jnp.where(jnp.isnan(constant), jnp.isnan(x), x == constant)


def split_masks(x: Any, mask_constant: float | None) -> tuple[Any, Any]:
    """`(values, masks)` of a tree of arrays or MaskedArrays; masks are lists like the tree's."""
    if isinstance(x, (list, tuple)) and not is_masked_array(x):
        pairs = [split_masks(u, mask_constant) for u in x]
        return type(x)(v for v, _ in pairs), [m for _, m in pairs]
    mask = read_mask(x, mask_constant)
    return (x.masked_value if isinstance(x, MaskedArray) else x), mask


def join_masks(x: Any, mask: Any) -> Any:
    """The tree `x` with MaskedArrays where there is a mask."""
    if isinstance(x, (list, tuple)):
        masks = mask if mask is not None else [None] * len(x)
        return type(x)(join_masks(u, m) for u, m in zip(x, masks, strict=True))
    return x if mask is None else MaskedArray(x, mask)


def zero_fill(x: Any, mask: Any) -> Any:
    """Zeros in place of masked entries."""
    if isinstance(x, (list, tuple)):
        masks = mask if mask is not None else [None] * len(x)
        return type(x)(zero_fill(u, m) for u, m in zip(x, masks, strict=True))
    return x if mask is None else jnp.where(mask, jnp.zeros((), x.dtype), x)


def unmask_fn(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function return plain arrays: zeros where it returned masked entries.

    Args:
      fn: any function, for example an `apply_fn` called with `mask_constant`.

    Returns:
      A function of the same arguments, without `MaskedArray` in its results.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from tangents import stax
        >>> init_fn, apply_fn, _ = stax.Dense(2)
        >>> _, params = init_fn(jax.random.key(0), (-1, 3))
        >>> x = jnp.array([[1.0, 2.0, 3.0], [9.0, 9.0, 9.0]])
        >>> y = stax.unmask_fn(apply_fn)(params, x, mask_constant=9.0)
        >>> bool((y[1] == 0).all())
        True
    """

    def to_array(x):
        return zero_fill(x.masked_value, x.mask) if is_masked_array(x) else x

    @functools.wraps(fn)
    def unmasked(*args, **kwargs):
        return jax.tree.map(to_array, fn(*args, **kwargs), is_leaf=is_masked_array)

    return unmasked
