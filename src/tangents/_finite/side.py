"""One of the two inputs of a kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from tangents._core.typing import PyTree
from tangents._core.vmap_axes import VMapSpec


@dataclass(frozen=True)
class Side:
    """One of the two inputs of a kernel."""

    x: PyTree
    kwargs: dict[str, Any]
    outputs: list[jax.ShapeDtypeStruct]
    """Shape and dtype of each output leaf."""
    vmap: VMapSpec | None
    """How examples are told apart, where they are independent."""
