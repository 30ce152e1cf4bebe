"""`dot_general`: y[b, p, j] = Σ_i a[b, p, i] W[b, i, j], in any order of axes, on either side."""

from __future__ import annotations

from tangents._finite.rules.factored import Factored
from tangents._finite.structure.graph import Step


def rule(step: Step, operand: int) -> Factored:
    """Factors (Novak et al. 2022, table 2, 'matrix multiplication'): A is the other operand."""
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = step.params["dimension_numbers"]
    lhs, rhs = step.inputs
    left = list(range(len(lhs.shape)))
    right = [len(lhs.shape) + k for k in range(len(rhs.shape))]
    for a, b in zip((*lhs_contract, *lhs_batch), (*rhs_contract, *rhs_batch), strict=True):
        right[b] = left[a]
    sizes = dict(zip(right, rhs.shape, strict=True)) | dict(zip(left, lhs.shape, strict=True))
    output = (
        [left[a] for a in lhs_batch]
        + [label for k, label in enumerate(left) if k not in (*lhs_contract, *lhs_batch)]
        + [label for k, label in enumerate(right) if k not in (*rhs_contract, *rhs_batch)]
    )
    weight, other = (left, right) if operand == 0 else (right, left)
    return Factored(
        sizes=sizes,
        weight=tuple((label,) for label in weight),
        cotangent=tuple(output),
        activation=tuple(other),
        save=lambda inputs, outputs: inputs[1 - operand],
    )
