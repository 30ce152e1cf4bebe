"""Whether the examples of a batch interact, found out from the jaxpr of the network."""

from tangents._finite.independence.walk import Finding, examine

__all__ = ["Finding", "examine"]
