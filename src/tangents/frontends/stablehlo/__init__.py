"""A reader of StableHLO: programs of static shape become JAX functions of standard primitives.

One file per family of operations; an operation without a rule is an error that names it.
"""

from tangents.frontends.stablehlo import (  # noqa: F401  (each registers its rules)
    calls,
    contraction,
    control_flow,
    elementwise,
    indexing,
    reduction,
    shapes,
)
from tangents.frontends.stablehlo.evaluation import (
    Machine,
    UnsupportedOperation,
    describe,
    supported,
)
from tangents.frontends.stablehlo.program import Operation, Region, parse, restricted, walk

__all__ = [
    "Machine",
    "Operation",
    "Region",
    "UnsupportedOperation",
    "describe",
    "parse",
    "restricted",
    "supported",
    "walk",
]
