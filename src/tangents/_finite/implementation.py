"""The ways to compute a finite-width NTK, under the names users know."""

from __future__ import annotations

import enum


class NtkImplementation(enum.IntEnum):
    """How an empirical NTK is computed; every way gives the same numbers.

    See Novak, Sohl-Dickstein, Schoenholz (2022), "Fast Finite Width Neural Tangent Kernel", for
    the cost of each.

    Attributes:
        AUTO: the cheapest by a cost model from shapes, weight by weight.
        JACOBIAN_CONTRACTION: Jacobians of both inputs by reverse mode, then one contraction. Good
            for few outputs.
        NTK_VECTOR_PRODUCTS: one NTK-vector product for each output. Good when parameters are many
            and shared over few positions.
        STRUCTURED_DERIVATIVES: keeps the Jacobian of each use of a weight factored.
    """

    AUTO = 0
    JACOBIAN_CONTRACTION = 1
    NTK_VECTOR_PRODUCTS = 2
    STRUCTURED_DERIVATIVES = 3

    @classmethod
    def parse(cls, value: NtkImplementation | int | str, *, caller: str) -> NtkImplementation:
        """An enum member from itself, its number or its name.

        Raises:
            ValueError: for anything else; the error lists what there is.
        """
        try:
            if isinstance(value, str):
                return cls[value.upper()]
            if isinstance(value, bool):
                raise ValueError
            return cls(value)
        except (KeyError, ValueError):
            known = ", ".join(f"{member.name} ({member.value})" for member in cls)
            raise ValueError(
                f"{caller}: implementation={value!r} is not an NtkImplementation: pass one of "
                f"{known}."
            ) from None
