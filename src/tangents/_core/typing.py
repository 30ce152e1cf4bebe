"""Names for the types that flow through every room."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any
Axes: TypeAlias = int | Sequence[int]
ApplyFn: TypeAlias = Callable[..., PyTree]
"""`apply_fn(params, x, **kwargs)` -> PyTree of arrays."""

VMapAxes: TypeAlias = Any
"""None, an int, or the triple (in_axes, out_axes, kwargs_axes)."""
