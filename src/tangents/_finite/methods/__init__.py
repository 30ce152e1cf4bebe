"""Ways to compute an empirical NTK: one file each, all with the signature of `Method`.

To add one: a file with a function of this signature, a line in `REGISTRY`, a row in the table of
`tests/finite/table.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from tangents._core.axes import PairAxes
from tangents._core.typing import Array
from tangents._finite.implementation import NtkImplementation
from tangents._finite.methods import (
    jacobian_contraction,
    ntk_vector_products,
    structured_derivatives,
)
from tangents._finite.problem import Problem

Method: TypeAlias = Callable[[Problem, list[PairAxes]], list[Array]]
"""Kernel of each output leaf, in the layout of its `PairAxes`, not yet symmetrised."""

REGISTRY: dict[NtkImplementation, Method] = {
    NtkImplementation.JACOBIAN_CONTRACTION: jacobian_contraction.kernels,
    NtkImplementation.NTK_VECTOR_PRODUCTS: ntk_vector_products.kernels,
    NtkImplementation.STRUCTURED_DERIVATIVES: structured_derivatives.kernels,
}


def get_method(implementation: NtkImplementation, *, caller: str) -> Method:
    """The method of an implementation.

    Raises:
        NotImplementedError: for one that does not stand yet.
    """
    if implementation not in REGISTRY:
        standing = " or ".join(f"{i.name} ({i.value})" for i in REGISTRY)
        raise NotImplementedError(
            f"{caller}: implementation={implementation.name} does not stand yet: pass {standing}. "
            "All of them give the same numbers."
        )
    return REGISTRY[implementation]
