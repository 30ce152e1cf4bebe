"""What a solver returns: the solution, what happened, how far it got, and what would help."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tangents._core.typing import Array
from tangents._inference.layout import is_concrete

CONVERGED, NOT_POSITIVE_DEFINITE, NOT_CONVERGED, NOT_FINITE = range(4)


class SolveError(RuntimeError):
    """A linear system was not solved; the message says why and what would help."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Solution:
    """The result of `tangents.solve`.

    Attributes:
        value: x in (K + ridge·I) x = y, in the shape of y; with a leading axis for several ridges.
        correction: what float32 cannot hold of the refined solution: `value + correction`, added in
            float64, has the `residual` below. None where there is nothing to add.
        residual: ‖y − (K + ridge·I) x‖ / ‖y‖, the worst right-hand side, measured in float64 where
            `method` says so; one for each ridge.
        condition: estimate (from below) of the condition number of K + ridge·I; for 'cg' of the
            preconditioned system.
        iterations: refinements, or iterations of conjugate gradients.
        status: 0 solved, 1 not positive definite, 2 not converged, 3 NaN or infinite entries.
        smallest_eigenvalue: of K + ridge·I where that was the trouble, otherwise NaN.
        needed_ridge: a ridge that would make the system solvable, otherwise NaN.
        method: which method ran.
    """

    value: Array
    correction: Array | None
    residual: Array
    condition: Array
    iterations: Array
    status: Array
    smallest_eigenvalue: Array
    needed_ridge: Array
    method: str = field(metadata={"static": True}, default="")

    @property
    def success(self) -> Array:
        """Whether the system was solved: a boolean array, also under `jit`."""
        return self.status == CONVERGED

    @property
    def remedy(self) -> str | None:
        """What to do about a failure; None if there was none. Needs concrete values."""
        status = int(np.max(np.asarray(self.status)))
        if status == CONVERGED:
            return None
        if status == NOT_FINITE:
            return "The kernel or y has entries that are NaN or infinite: see where they come from."
        if status == NOT_POSITIVE_DEFINITE:
            return (
                f"The matrix is not positive definite: its smallest eigenvalue is about "
                f"{float(np.min(np.asarray(self.smallest_eigenvalue))):.3g}. Pass "
                f"ridge={float(np.max(np.asarray(self.needed_ridge))):.2g} or more, or compute the "
                "kernel in float64."
            )
        return (
            f"The relative residual is {float(np.max(np.asarray(self.residual))):.2g} after "
            f"{int(np.max(np.asarray(self.iterations)))} iterations, at a condition number of "
            f"about "
            f"{float(np.max(np.asarray(self.condition))):.1g}. Pass a larger ridge, a larger rtol, "
            "more max_iterations, or for a dense kernel method='float64'."
        )

    def checked(self, caller: str = "solve") -> Solution:
        """Self if solved; raises `SolveError` with the remedy otherwise. No check under `jit`."""
        if is_concrete(self.status) and (message := self.remedy) is not None:
            raise SolveError(f"{caller}: method {self.method!r} failed. {message}")
        return self


def solution(
    method: str,
    value: Any,
    *,
    correction: Any = None,
    residual: Any = np.nan,
    condition: Any = np.nan,
    iterations: Any = 0,
    status: Any = CONVERGED,
    smallest_eigenvalue: Any = np.nan,
    needed_ridge: Any = np.nan,
) -> Solution:
    """A `Solution` of arrays."""
    real = lambda a: jnp.asarray(a, jnp.result_type(float))
    return Solution(
        value,
        correction,
        real(residual),
        real(condition),
        jnp.asarray(iterations, jnp.int32),
        jnp.asarray(status, jnp.int32),
        real(smallest_eigenvalue),
        real(needed_ridge),
        method,
    )
