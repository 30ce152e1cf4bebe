"""Operations that move data: reshape, broadcast, transpose, slice, pad, concatenate, iota."""

from __future__ import annotations

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
from tangents.frontends.stablehlo.program import Operation, canonical


@rule("constant")
def constant(op: Operation, operands: list[Value], machine: Machine) -> list[Value]:
    """A constant, kept in NumPy."""
    value = op.attributes["value"]
    return [value.astype(canonical(value.dtype))]


@rule("iota")
def iota(op: Operation, operands: list[Value], machine: Machine) -> list[Value]:
    """Positions along one axis."""
    (kind,) = op.types
    axis = int(op.attributes["iota_dimension"])
    return [lax.broadcasted_iota(canonical(kind.dtype), kind.shape, axis)]


@rule("reshape")
def reshape(op: Operation, operands: list[Value], machine: Machine) -> list[Value]:
    """The same elements in row-major order."""
    return [lax.reshape(operands[0], op.types[0].shape)]


@rule("broadcast_in_dim")
def broadcast_in_dim(op: Operation, operands: list[Value], machine: Machine) -> list[Value]:
    """Axes of the operand go to the axes named, the others are repeated."""
    return [lax.broadcast_in_dim(operands[0], op.types[0].shape, _axes(op))]


@rule("transpose")
def transpose(op: Operation, operands: list[Value], machine: Machine) -> list[Value]:
    """A permutation of axes."""
    return [lax.transpose(operands[0], _ints(op, "permutation"))]


@rule("slice")
def slice_(op: Operation, operands: list[Value], machine: Machine) -> list[Value]:
    """A strided slice with static bounds."""
    start, limit, strides = (_ints(op, k) for k in ("start_indices", "limit_indices", "strides"))
    return [lax.slice(operands[0], start, limit, strides)]


@rule("reverse")
def reverse(op: Operation, operands: list[Value], machine: Machine) -> list[Value]:
    """Axes in reversed order."""
    return [lax.rev(operands[0], _ints(op, "dimensions"))]


@rule("concatenate")
def concatenate(op: Operation, operands: list[Value], machine: Machine) -> list[Value]:
    """Arrays one after another along an axis."""
    return [lax.concatenate(operands, int(op.attributes["dimension"]))]


@rule("pad")
def pad(op: Operation, operands: list[Value], machine: Machine) -> list[Value]:
    """Edge and interior padding; negative padding cuts."""
    keys = ("edge_padding_low", "edge_padding_high", "interior_padding")
    array, value = operands
    return [lax.pad(array, value, list(zip(*(_ints(op, k) for k in keys), strict=True)))]


@rule("set_dimension_size")
def set_dimension_size(op: Operation, operands: list[Value], machine: Machine) -> list[Value]:
    """Nothing, where the size that is set is the one the array has."""
    array, size = operands
    if not is_known(size) or int(size) != array.shape[int(op.attributes["dimension"])]:
        raise UnsupportedOperation(f"{describe(op)}: a size that depends on data")
    return [array]


@rule("get_dimension_size")
def get_dimension_size(op: Operation, operands: list[Value], machine: Machine) -> list[Value]:
    """The size of an axis."""
    size = operands[0].shape[int(op.attributes["dimension"])]
    return [np.asarray(size, canonical(op.types[0].dtype))]


def _ints(op: Operation, key: str) -> tuple[int, ...]:
    return tuple(int(n) for n in op.attributes[key])


def _axes(op: Operation) -> tuple[int, ...]:
    return _ints(op, "broadcast_dimensions")


def _broadcast(op: Operation, x: np.ndarray) -> np.ndarray:
    shape = [1] * len(op.types[0].shape)
    for axis, size in zip(_axes(op), x.shape, strict=True):
        shape[axis] = size
    return np.broadcast_to(x.reshape(shape), op.types[0].shape)


fold("reshape", lambda op, x: x.reshape(op.types[0].shape))
fold("transpose", lambda op, x: x.transpose(_ints(op, "permutation")))
fold("broadcast_in_dim", _broadcast)
fold("concatenate", lambda op, *xs: np.concatenate(xs, int(op.attributes["dimension"])))
fold(
    "slice",
    lambda op, x: x[
        tuple(
            slice(*bounds)
            for bounds in zip(
                *(_ints(op, k) for k in ("start_indices", "limit_indices", "strides")), strict=True
            )
        )
    ],
)
