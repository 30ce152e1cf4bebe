"""What is known of a value's batch axis: four kinds of value, ordered by how much is lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Along:
    """Entry i along `axis` depends on example i alone."""

    axis: int


@dataclass(frozen=True)
class Shared:
    """Depends on no example; constant along the axes `uniform` (None: along all)."""

    uniform: frozenset[int] | None = frozenset()

    def is_uniform(self, axis: int) -> bool:
        """Whether all entries along an axis are equal."""
        return self.uniform is None or axis in self.uniform


@dataclass(frozen=True)
class Lost:
    """What became of the batch axis is not known, or examples were mixed."""

    reason: str
    mixes: bool
    """Examples surely interact: entries of several of them were summed, compared or moved."""


State: TypeAlias = Along | Shared | Lost


def mixed(name: str, axis: int) -> Lost:
    """A step that joins entries of different examples."""
    return Lost(f"`{name}` runs over axis {axis}, along which the examples lie", True)


def unknown(name: str, why: str = "has no rule for the axis of the examples") -> Lost:
    """A step that may be harmless, but nobody has shown it."""
    return Lost(f"`{name}` {why}", False)


def worst(states: list[State]) -> Lost | None:
    """A state that is lost, if there is one; mixing before not knowing."""
    lost = [s for s in states if isinstance(s, Lost)]
    return max(lost, key=lambda s: s.mixes) if lost else None
