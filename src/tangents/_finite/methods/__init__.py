"""Ways to compute an empirical NTK: one file each, all with the signature of `Method`.

To add one: a file with a function of this signature, a line in `REGISTRY`, a row in the table of
`tests/finite/table.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeAlias

from tangents._core.axes import PairAxes
from tangents._core.typing import Array
from tangents._finite.implementation import NtkImplementation
from tangents._finite.methods import (
    auto,
    jacobian_contraction,
    ntk_vector_products,
    structured_derivatives,
)
from tangents._finite.problem import Problem

Method: TypeAlias = Callable[[Problem, list[PairAxes]], list[Array]]
"""Kernel of each output leaf, in the layout of its `PairAxes`, not yet symmetrised."""

REGISTRY: dict[NtkImplementation, Method] = {
    NtkImplementation.AUTO: auto.kernels,
    NtkImplementation.JACOBIAN_CONTRACTION: jacobian_contraction.kernels,
    NtkImplementation.NTK_VECTOR_PRODUCTS: ntk_vector_products.kernels,
    NtkImplementation.STRUCTURED_DERIVATIVES: structured_derivatives.kernels,
}


def get_method(
    implementation: NtkImplementation,
    *,
    caller: str,
    options: structured_derivatives.Options | None = None,
) -> Method:
    """The method of an implementation; `options` concern structured derivatives.

    Raises:
        ValueError: for a memory budget with a method that does not work in chunks.
    """
    for planned in (auto, structured_derivatives):
        if REGISTRY[implementation] is planned.kernels:
            return functools.partial(planned.kernels, options=options)
    if options is not None and options.memory is not None:
        raise ValueError(
            f"{caller}: memory={options.memory!r} needs implementation=AUTO (0) or "
            f"STRUCTURED_DERIVATIVES (3): {implementation.name} does not work in chunks."
        )
    return REGISTRY[implementation]
