"""Running a StableHLO program as JAX: each operation becomes the primitives that JAX would emit.

A rule is a function `rule(op, operands, machine) -> results` registered under an operation's name;
one file per family holds them. Constants stay NumPy arrays until an operation needs them in JAX,
and arithmetic among small ones is done at once in NumPy: loop counters, trip counts and slice
positions are numbers when a rule asks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tangents.frontends.stablehlo.program import Operation, Region, canonical

Value = Any
"""A JAX array (or tracer), or a NumPy array where the value is known."""
Rule = Callable[[Operation, list[Value], "Machine"], Sequence[Value]]
Fold = Callable[..., Any]

_RULES: dict[str, Rule] = {}
_FOLDS: dict[str, Fold] = {}
_FOLD_LIMIT = 4096  # elements; larger constants are left to XLA


class UnsupportedOperation(NotImplementedError):
    """A program has an operation that no rule reads."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule under operation names (without the dialect where it is `stablehlo`)."""

    def register(function: Rule) -> Rule:
        for name in names:
            _RULES[name if "." in name else f"stablehlo.{name}"] = function
        return function

    return register


def fold(name: str, function: Fold) -> None:
    """Register how NumPy computes an operation of known operands: `function(op, *operands)`."""
    _FOLDS[f"stablehlo.{name}"] = function


class Machine:
    """Evaluates regions on JAX values."""

    def run(
        self,
        region: Region,
        arguments: Sequence[Value],
        outer: Mapping[int, Value] | None = None,
        known: Mapping[int, Value] | None = None,
    ) -> list[Value]:
        """The returns of a region.

        `outer` holds the values around it, `known` results that need no computing.
        """
        values: dict[int, Value] = dict(outer or {})
        values.update(zip(region.arguments, arguments, strict=True))
        values.update(known or {})
        for op in region.operations:
            if all(result in values for result in op.results) and op.results:
                continue
            results = self.apply(op, [values[i] for i in op.operands], values)
            values.update(zip(op.results, results, strict=True))
        return [values[i] for i in region.returns]

    def apply(
        self, op: Operation, operands: list[Value], values: Mapping[int, Value]
    ) -> Sequence[Value]:
        """The results of one operation."""
        folded = _folded(op, operands)
        if folded is not None:
            return [folded]
        function = _RULES.get(op.name)
        if function is None:
            raise UnsupportedOperation(describe(op))
        if op.regions:
            self = _Inside(values)
        return function(op, operands, self)

    @property
    def outer(self) -> Mapping[int, Value]:
        """Values that a region of the current operation may read."""
        return {}


class _Inside(Machine):
    def __init__(self, values: Mapping[int, Value]):
        self._values = values

    @property
    def outer(self) -> Mapping[int, Value]:
        return self._values


def describe(op: Operation) -> str:
    """`stablehlo.rng at dropout/random_uniform`, for error messages."""
    name = op.attributes.get("call_target_name")
    called = f"{op.name} {name}" if name else op.name
    return f"{called} at {op.where}" if op.where else called


def can_fold(op: Operation) -> bool:
    """Whether an operation of known operands has a known result."""
    return op.name == "stablehlo.constant" or op.name in _FOLDS


def is_known(value: Value) -> bool:
    """Whether a value is a constant of the program."""
    return isinstance(value, np.ndarray)


def is_splat(value: Value, number: float) -> bool:
    """Whether a value is known to be `number` everywhere."""
    return is_known(value) and value.size > 0 and bool((value == number).all())


def _folded(op: Operation, operands: list[Value]) -> np.ndarray | None:
    function = _FOLDS.get(op.name)
    if function is None or not all(is_known(value) for value in operands):
        return None
    (kind,) = op.types
    if max([int(np.prod(kind.shape)), *(value.size for value in operands)]) > _FOLD_LIMIT:
        return None
    with np.errstate(all="ignore"):
        return np.asarray(function(op, *operands)).astype(canonical(kind.dtype))


def supported(name: str) -> bool:
    """Whether a rule reads operations of this name."""
    return name in _RULES
