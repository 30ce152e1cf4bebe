"""Views of the NTK operator for the solvers of other libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

if TYPE_CHECKING:
    from tangents._finite.operator import NTKOperator


def view(op: NTKOperator, kind: str) -> Any:
    """The view named `kind`; see `NTKOperator.linear_operator`."""
    if kind not in VIEWS:
        known = " or ".join(repr(name) for name in VIEWS)
        raise ValueError(f"NTKOperator.linear_operator: kind={kind!r} is not known: pass {known}.")
    try:
        return VIEWS[kind](op)
    except ImportError as error:
        raise ImportError(
            f"NTKOperator.linear_operator: {kind} is not installed: pip install 'tangents[{kind}]'."
        ) from error


def _scipy(op: NTKOperator) -> Any:
    from scipy.sparse.linalg import LinearOperator

    product = lambda v: np.asarray(op @ np.asarray(v, op.dtype))
    adjoint = lambda v: np.asarray(op.T @ np.asarray(v, op.dtype))
    functions: dict[str, Any] = {
        "matvec": lambda v: product(np.ravel(v)),
        "rmatvec": lambda v: adjoint(np.ravel(v)),
        "matmat": product,
        "rmatmat": adjoint,
    }
    return LinearOperator(dtype=op.dtype, shape=op.shape, **functions)


def _lineax(op: NTKOperator) -> Any:
    import lineax

    structure = jax.ShapeDtypeStruct((op.shape[1],), op.dtype)
    tags = (lineax.symmetric_tag, lineax.positive_semidefinite_tag) if op.is_symmetric else ()
    return lineax.FunctionLinearOperator(lambda v: op @ v, structure, tags)


VIEWS: dict[str, Callable[[NTKOperator], Any]] = {"scipy": _scipy, "lineax": _lineax}
