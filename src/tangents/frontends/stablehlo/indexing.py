"""Slices at computed positions, gather and scatter."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax

from tangents.frontends.stablehlo.evaluation import (
    Machine,
    UnsupportedOperation,
    Value,
    describe,
    fold,
    is_known,
    rule,
)
from tangents.frontends.stablehlo.program import Operation, integer, integers
from tangents.frontends.stablehlo.reduction import monoid


@rule("dynamic_slice")
def dynamic_slice(op: Operation, operands: list[Value], machine: Machine) -> list[Value]:
    """A slice of static size; positions out of bounds are moved inside, as in JAX."""
    array, *starts = operands
    sizes = tuple(int(n) for n in op.attributes["slice_sizes"])
    if all(is_known(start) for start in starts):
        begin = _inside(array.shape, starts, sizes)
        return [lax.slice(array, begin, [b + s for b, s in zip(begin, sizes, strict=True)])]
    return [lax.dynamic_slice(array, starts, sizes)]


@rule("dynamic_update_slice")
def dynamic_update_slice(op: Operation, operands: list[Value], machine: Machine) -> list[Value]:
    """A slice replaced."""
    array, update, *starts = operands
    return [lax.dynamic_update_slice(array, update, starts)]


def _inside(shape: tuple[int, ...], starts: list[Value], sizes: tuple[int, ...]) -> list[int]:
    return [
        min(max(int(start), 0), full - size)
        for start, full, size in zip(starts, shape, sizes, strict=True)
    ]


def _fold_dynamic_slice(op: Operation, array: np.ndarray, *starts: np.ndarray) -> np.ndarray:
    sizes = tuple(int(n) for n in op.attributes["slice_sizes"])
    begin = _inside(array.shape, list(starts), sizes)
    return array[tuple(slice(b, b + s) for b, s in zip(begin, sizes, strict=True))]


fold("dynamic_slice", _fold_dynamic_slice)


def _index_vectors_last(indices: Value, text: str) -> Value:
    """JAX wants the axis of index vectors last; StableHLO names it, and may leave it out."""
    axis = integer(text, "index_vector_dim") if "index_vector_dim" in text else 0
    if axis == indices.ndim:
        return lax.expand_dims(indices, (axis,))
    return jnp.moveaxis(indices, axis, -1)


@rule("gather")
def gather(op: Operation, operands: list[Value], machine: Machine) -> list[Value]:
    """Slices at index vectors; indices out of bounds are moved inside, as HLO says."""
    array, indices = operands
    text = op.attributes["dimension_numbers"]
    return [
        lax.gather(
            array,
            _index_vectors_last(indices, text),
            lax.GatherDimensionNumbers(
                offset_dims=integers(text, "offset_dims"),
                collapsed_slice_dims=integers(text, "collapsed_slice_dims"),
                start_index_map=integers(text, "start_index_map"),
                operand_batching_dims=integers(text, "operand_batching_dims"),
                start_indices_batching_dims=integers(text, "start_indices_batching_dims"),
            ),
            slice_sizes=tuple(int(n) for n in op.attributes["slice_sizes"]),
            indices_are_sorted=bool(op.attributes.get("indices_are_sorted", False)),
            mode=lax.GatherScatterMode.CLIP,
        )
    ]


_SCATTERS = {
    "stablehlo.add": lax.scatter_add,
    "stablehlo.multiply": lax.scatter_mul,
    "stablehlo.maximum": lax.scatter_max,
    "stablehlo.minimum": lax.scatter_min,
}


@rule("scatter")
def scatter(op: Operation, operands: list[Value], machine: Machine) -> list[Value]:
    """Updates written or added at index vectors; those out of bounds are dropped, as HLO says."""
    if len(operands) != 3:
        raise UnsupportedOperation(f"{describe(op)} of several arrays at once")
    (region,) = op.regions
    replaces = not region.operations and region.returns == region.arguments[1:]
    function = lax.scatter if replaces else _SCATTERS.get(monoid(region) or "")
    if function is None:
        raise UnsupportedOperation(f"{describe(op)} with an update of its own")
    array, indices, updates = operands
    text = op.attributes["scatter_dimension_numbers"]
    return [
        function(
            array,
            _index_vectors_last(indices, text),
            updates,
            lax.ScatterDimensionNumbers(
                update_window_dims=integers(text, "update_window_dims"),
                inserted_window_dims=integers(text, "inserted_window_dims"),
                scatter_dims_to_operand_dims=integers(text, "scatter_dims_to_operand_dims"),
                operand_batching_dims=integers(text, "input_batching_dims"),
                scatter_indices_batching_dims=integers(text, "scatter_indices_batching_dims"),
            ),
            indices_are_sorted=bool(op.attributes.get("indices_are_sorted", False)),
            unique_indices=bool(op.attributes.get("unique_indices", False)),
            mode=lax.GatherScatterMode.FILL_OR_DROP,
        )
    ]
