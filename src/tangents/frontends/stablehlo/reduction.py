"""Reductions over axes and windows, sorting."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tangents.frontends.stablehlo.evaluation import (
    Machine,
    UnsupportedOperation,
    Value,
    describe,
    is_known,
    rule,
)
from tangents.frontends.stablehlo.program import Operation, Region


def _lowest(dtype: np.dtype) -> Any:
    return -np.inf if jnp.issubdtype(dtype, jnp.inexact) else _limit(dtype, "min")


def _highest(dtype: np.dtype) -> Any:
    return np.inf if jnp.issubdtype(dtype, jnp.inexact) else _limit(dtype, "max")


def _limit(dtype: np.dtype, end: str) -> Any:
    return end == "max" if dtype.kind == "b" else getattr(jnp.iinfo(dtype), end)


# By the one operation of the region: how JAX combines, and what it starts from.
_MONOIDS: dict[str, tuple[Callable[[Any, Any], Any], Callable[[np.dtype], Any]]] = {
    "stablehlo.add": (lax.add, lambda dtype: 0),
    "stablehlo.multiply": (lax.mul, lambda dtype: 1),
    "stablehlo.maximum": (lax.max, _lowest),
    "stablehlo.minimum": (lax.min, _highest),
    "stablehlo.and": (lax.bitwise_and, lambda dtype: True if dtype.kind == "b" else -1),
    "stablehlo.or": (lax.bitwise_or, lambda dtype: 0),
}


def monoid(region: Region) -> str | None:
    """Name of the one operation that a region applies to its two arguments, if that is all."""
    if len(region.operations) != 1 or len(region.arguments) != 2:
        return None
    (op,) = region.operations
    if op.name not in _MONOIDS or sorted(op.operands) != sorted(region.arguments):
        return None
    return op.name if region.returns == op.results else None


def _start(name: str, init: Value, dtype: np.dtype) -> tuple[Callable, Any, Value | None]:
    """How to combine, the identity to start from, and what to combine the result with after.

    JAX recognises a reduction it can differentiate only from the identity as its start.
    """
    combine, identity = _MONOIDS[name]
    if dtype.kind == "b":
        combine = {lax.add: lax.bitwise_or, lax.mul: lax.bitwise_and}.get(combine, combine)
    start = np.asarray(identity(dtype)).astype(dtype)
    if is_known(init):
        lowest = name.endswith(("maximum", "minimum")) and abs(float(init)) >= _largest(dtype)
        if lowest or init == start:
            return combine, start, None
    return combine, start, init


def _largest(dtype: np.dtype) -> float:
    return float(jnp.finfo(dtype).max if jnp.issubdtype(dtype, jnp.inexact) else np.inf)


@rule("reduce")
def reduce(op: Operation, operands: list[Value], machine: Machine) -> list[Value]:
    """Reduction of one or several arrays over axes."""
    count = len(operands) // 2
    arrays, inits = operands[:count], operands[count:]
    axes = tuple(int(axis) for axis in op.attributes["dimensions"])
    (region,) = op.regions
    name = monoid(region)
    if name is not None and count == 1:
        combine, start, after = _start(name, inits[0], arrays[0].dtype)
        result = lax.reduce(jnp.asarray(arrays[0]), start, combine, axes)
        return [result if after is None else combine(result, jnp.full_like(result, after))]

    def computation(left: Any, right: Any) -> Any:
        left, right = (side if isinstance(side, tuple) else (side,) for side in (left, right))
        results = machine.run(region, [*left, *right], machine.outer)
        return tuple(results) if count > 1 else results[0]

    if count == 1:
        return [lax.reduce(jnp.asarray(arrays[0]), inits[0], computation, axes)]
    arrays = [jnp.asarray(array) for array in arrays]
    still = tuple(lax.stop_gradient(array) for array in arrays)
    results = list(lax.reduce(still, tuple(inits), computation, axes))
    if count == 2 and jnp.issubdtype(arrays[1].dtype, jnp.integer):
        # An arg-max: the value again, as the entry at the position found, which has a derivative.
        there = arrays[1] == jnp.expand_dims(results[1], axes)
        results[0] = jnp.sum(jnp.where(there, arrays[0], jnp.zeros_like(arrays[0])), axes)
    return results


@rule("reduce_window")
def reduce_window(op: Operation, operands: list[Value], machine: Machine) -> list[Value]:
    """Pooling: a reduction over a window at every position."""
    if len(operands) != 2:
        raise UnsupportedOperation(f"{describe(op)} of several arrays")
    name = monoid(op.regions[0])
    array, init = operands
    rank = array.ndim
    ones = np.ones(rank, int)

    def along(key: str) -> tuple[int, ...]:
        return tuple(int(n) for n in op.attributes.get(key, ones))

    padding = np.asarray(op.attributes.get("padding", np.zeros((rank, 2), int))).reshape(rank, 2)
    window = along("window_dimensions")
    steps = [along(key) for key in ("window_strides", "base_dilations", "window_dilations")]
    axis = _cumulative_axis(array.shape, window, steps, padding)
    if name is None:
        if axis is None:
            raise UnsupportedOperation(f"{describe(op)} with a reduction of its own")
        scan = functools.partial(lax.associative_scan, _elementwise(op.regions[0], machine))
        return [_cumulative(scan, jnp.asarray(array), init, axis, padding[axis])]
    combine, start, after = _start(name, init, array.dtype)
    if axis is not None and name in _CUMULATIVE:
        result = _cumulative(_CUMULATIVE[name], jnp.asarray(array), start, axis, padding[axis])
    else:
        strides, *dilations = steps
        pairs = [(int(low), int(high)) for low, high in padding]
        result = lax.reduce_window(
            jnp.asarray(array), start, combine, window, strides, pairs, *dilations
        )
    return [result if after is None else combine(result, jnp.full_like(result, after))]


# A product over windows has no derivative in JAX, a cumulative product has one.
_CUMULATIVE = {
    "stablehlo.add": lax.cumsum,
    "stablehlo.multiply": lax.cumprod,
    "stablehlo.maximum": lax.cummax,
    "stablehlo.minimum": lax.cummin,
}


def _elementwise(region: Region, machine: Machine) -> Callable[[Any, Any], Any]:
    """A region of two scalars, on arrays."""
    outer = machine.outer
    scalars = lambda left, right: jnp.asarray(machine.run(region, [left, right], outer)[0])

    def on_arrays(left: Any, right: Any) -> Any:
        return jax.vmap(scalars)(left.ravel(), right.ravel()).reshape(left.shape)

    return on_arrays


def _cumulative_axis(
    shape: tuple[int, ...], window: tuple[int, ...], steps: list[tuple], padding: np.ndarray
) -> int | None:
    """The axis along which windows reach from one end of the array, if they do nothing else."""
    if any(step != 1 for along in steps for step in along):
        return None
    axes = [i for i in range(len(shape)) if window[i] != 1 or padding[i].any()]
    if len(axes) != 1:
        return None
    (axis,) = axes
    ends = sorted(int(width) for width in padding[axis])
    return (
        axis if window[axis] == shape[axis] and ends[0] == 0 <= shape[axis] - 1 <= ends[1] else None
    )


def _cumulative(
    function: Callable[..., Any], array: Any, start: Any, axis: int, padding: np.ndarray
) -> Any:
    low, high = (int(width) for width in padding)
    more = max(low, high) - array.shape[axis] + 1  # results before any element: exclusive ones
    edges = [(0, 0, 0)] * array.ndim
    edges[axis] = (more, 0, 0) if low >= high else (0, more, 0)
    return function(lax.pad(array, start, edges), axis=axis, reverse=high > low)


@rule("sort")
def sort(op: Operation, operands: list[Value], machine: Machine) -> list[Value]:
    """Sorting along an axis by the first array, ascending or descending."""
    axis = int(op.attributes["dimension"])
    arrays = [jnp.asarray(array) for array in operands]
    if _ascending(op, arrays, machine):
        return list(lax.sort(tuple(arrays), dimension=axis, is_stable=True, num_keys=1))
    # Descending and stable: a stable ascending sort of the reversed array, reversed.
    flipped = tuple(lax.rev(array, (axis,)) for array in arrays)
    results = lax.sort(flipped, dimension=axis, is_stable=True, num_keys=1)
    return [lax.rev(array, (axis,)) for array in results]


def _ascending(op: Operation, arrays: list[Any], machine: Machine) -> bool:
    """Whether the comparison puts smaller first values first; it is asked about 0 and 1."""

    def before(first: int, second: int) -> bool:
        pairs = [(np.zeros((), array.dtype),) * 2 for array in arrays[1:]]
        asked = [np.asarray(n, arrays[0].dtype) for n in (first, second)]
        with jax.ensure_compile_time_eval():
            arguments = asked + [value for pair in pairs for value in pair]
            return bool(machine.run(op.regions[0], arguments, machine.outer)[0])

    answers = before(0, 1), before(1, 0)
    if answers not in ((True, False), (False, True)):
        raise UnsupportedOperation(f"{describe(op)} with a comparison of its own")
    return answers == (True, False)
