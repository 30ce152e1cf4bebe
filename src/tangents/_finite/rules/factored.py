"""What a rule returns: the derivative of a use of a weight, kept in factors.

For a step y = h(W, a), linearised in W, the derivative of an output o in W is

    ∂o/∂W[w] = Σ_p A[w, p] G[w, p],        G = ∂o/∂y

where A (the *activation*) depends on the inputs of the step alone, G (the *cotangent*) is the
derivative of the network in y, and each axis of A and G is an axis w of the weight or a position p
that is summed over. Axes are named by small integers, *labels*, of the rule's own choosing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from tangents._core.typing import Array
from tangents._finite.structure.graph import Step

Labels: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Factored:
    """The factors of one use of one weight."""

    sizes: dict[int, int]
    """Size of each label."""
    weight: tuple[Labels, ...]
    """For each axis of the operand, the labels it is composed of, the slowest first."""
    cotangent: Labels
    activation: Labels | None = None
    """None: A is one everywhere."""
    save: Callable[[Sequence[Array], Sequence[Array]], Array] | None = None
    """From inputs and outputs of the step to what the forward pass keeps."""
    expand: Callable[[Array], Array] | None = None
    """From what was kept to A with its labelled axes; None if that is A already."""
    prepare: Callable[[Array], Array] | None = None
    """From the derivative in y to G with its labelled axes; None if that is G already."""
    rows: Labels = ()
    """The last labels of A, if it is a one-hot: what is kept is the (one, row-major) index along
    them, or −1 for none."""


Rule: TypeAlias = Callable[[Step, int], Factored | None]
"""`rule(step, operand)`: the factors, or None if this use has no factored form."""
