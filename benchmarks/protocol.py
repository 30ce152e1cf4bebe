"""What a workload file is made of. Standard library only: every environment imports this."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import Any

# What a target can be set on, and whether a good figure is a large or a small one.
METRICS: Mapping[str, str] = {
    "speedup": "at least",  # CPU time of the peer / of this package
    "memory_ratio": "at least",  # peak memory of the peer / of this package, steady call
    "compile_ratio": "at least",  # compile time of the peer / of this package
    "over_forward": "at most",  # CPU time of this package / of the workload's forward pass
    "peak_over_baseline": "at most",  # peak memory of this package / of `Case.memory_baseline`
    "seconds": "at most",  # CPU seconds of one call of this package
    "wall_seconds": "at most",  # wall seconds of one call of this package
    "peak_mib": "at most",  # peak memory of this package, steady call
}


@dataclass(frozen=True)
class Target:
    metric: str
    bound: float

    def __post_init__(self):
        if self.metric not in METRICS:
            raise ValueError(f"Target: no metric {self.metric!r}; there are {', '.join(METRICS)}.")

    def met(self, value: float) -> bool:
        return value >= self.bound if METRICS[self.metric] == "at least" else value <= self.bound


@dataclass(frozen=True)
class Side:
    """One of the two programs in a comparison, as a workload's `build` sees it."""

    package: str  # "tangents", or the peer's import name
    quick: bool = False  # shapes small enough for a test

    @property
    def ours(self) -> bool:
        return self.package == "tangents"

    @cached_property
    def nt(self) -> ModuleType:
        return importlib.import_module(self.package)

    @cached_property
    def stax(self) -> ModuleType:
        return importlib.import_module(self.package + ".stax")

    def size(self, full: Any, quick: Any) -> Any:
        """`full`, or `quick` in a quick run."""
        return quick if self.quick else full


@dataclass
class Case:
    """What `build` returns: inputs made, functions jitted, nothing computed yet.

    Args:
      run: one call of what is measured; returns arrays (any tree of them), which are compared with
        the other side's.
      forward: the bare jitted forward pass the row is held against.
      memory_baseline: its peak memory is the unit of the metric `peak_over_baseline`.
      measure: in place of timing `run`: returns (wall seconds, CPU seconds) of one call. For what
        cannot be repeated in one process, such as an import.
      compile: traces and compiles `run`, once in each of as many processes as there are pairs.
        Where compiling is a metric and calls take so long that their noise hides it.
    """

    run: Callable[[], Any]
    forward: Callable[[], Any] | None = None
    memory_baseline: Callable[[], Any] | None = None
    measure: Callable[[], tuple[float, float]] | None = None
    compile: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Workload:
    """One row of the table.

    Args:
      name: `subject/variant/network`, what `--only` searches.
      build: makes the `Case` of one side; the same function for both sides unless `peer_build`.
      peer: the environment to compare with, a `benchmarks/peer/NAME.txt`; None for this package
        alone.
      peer_build: for a peer whose interface differs.
      targets: bounds; a row that misses one says so.
      rtol: greatest ||ours - peer|| / ||peer|| of any array of the result.
      x64: run in double precision.
      requires: modules this package's side needs; without them the row is skipped.
      memory: measure peak memory (a fresh process for each figure).
    """

    name: str
    build: Callable[[Side], Case]
    peer: str | None = "neural-tangents"
    peer_build: Callable[[Side], Case] | None = None
    targets: tuple[Target, ...] = ()
    rtol: float = 1e-4
    x64: bool = False
    requires: tuple[str, ...] = ()
    memory: bool = True
    module: str = field(default="", compare=False)  # filled in by workloads.find

    def case(self, side: Side) -> Case:
        build = self.build if side.ours or self.peer_build is None else self.peer_build
        return build(side)
