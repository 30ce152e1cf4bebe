"""A StableHLO module as plain data: operations that name the values they read and write.

The text or bytecode is parsed by the MLIR bindings that JAX ships (`jax.interpreters.mlir`) and
copied into dataclasses at once, so that nothing here depends on an MLIR context staying alive, and
an analysis of a loop is a walk over lists.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import mlir

ir: Any = mlir.ir

_DTYPES = {
    "i1": np.dtype(bool),
    "f8E4M3FN": jnp.dtype(jnp.float8_e4m3fn),
    "f8E5M2": jnp.dtype(jnp.float8_e5m2),
    "f16": np.dtype(np.float16),
    "bf16": jnp.dtype(jnp.bfloat16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "complex<f32>": np.dtype(np.complex64),
    "complex<f64>": np.dtype(np.complex128),
    **{f"i{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"ui{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
}


@dataclass(frozen=True)
class TensorType:
    """Shape and element type of a value, as the module has it."""

    shape: tuple[int, ...]
    dtype: np.dtype


@dataclass(frozen=True)
class Operation:
    """One operation; values are numbers, each written once in the module."""

    name: str
    operands: tuple[int, ...]
    results: tuple[int, ...]
    types: tuple[TensorType, ...]
    """Of the results."""
    attributes: dict[str, Any]
    regions: tuple[Region, ...]
    where: str
    """The layer or node the operation came from, or the empty string."""


@dataclass(frozen=True)
class Region:
    """A block: the body of a function, a loop or a reduction."""

    arguments: tuple[int, ...]
    types: tuple[TensorType, ...]
    """Of the arguments."""
    operations: tuple[Operation, ...]
    returns: tuple[int, ...]


def parse(module: str | bytes) -> Region:
    """The body of `main` of a StableHLO module (text or bytecode), its calls inlined.

    Operations that do nothing (a reshape to the same shape, a copy) leave no trace: whoever reads
    their result reads their operand, so that a loop's invariants are seen as such.
    """
    with mlir.make_ir_context():
        parsed = ir.Module.parse(module)
        functions = {
            function.operation.attributes["sym_name"].value: function.operation.regions[0]
            for function in parsed.body.operations
            if function.operation.name == "func.func"
        }
        return _Reader(functions).region(functions["main"], {})


def walk(region: Region) -> Iterator[Operation]:
    """Every operation of a region and of the regions inside it."""
    for operation in region.operations:
        yield operation
        for inner in operation.regions:
            yield from walk(inner)


def restricted(
    region: Region, targets: tuple[int, ...], known: Collection[int] = ()
) -> tuple[Region, set[int]]:
    """The part of a region that computes some values, and the values it reads from outside.

    `known` values need no computing.
    """
    needed = set(targets)
    operations = []
    for op in reversed(region.operations):
        if needed.intersection(op.results).difference(known):
            operations.append(op)
            needed.difference_update(op.results)
            needed.update(op.operands)
            for inner in op.regions:
                needed.update(free(inner))
    return Region(region.arguments, region.types, tuple(operations[::-1]), targets), needed


def free(region: Region) -> set[int]:
    """The values that a region reads from outside, its arguments apart."""
    _, needed = restricted(region, region.returns)
    return needed - set(region.arguments)


def canonical(dtype: np.dtype) -> np.dtype:
    """A module's element type as JAX holds it (64 bits become 32 while x64 is off)."""
    return jax.dtypes.canonicalize_dtype(dtype)


def integers(text: str, key: str) -> tuple[int, ...]:
    """`(1, 2)` of `key = [1, 2]` in the text of a structured attribute; empty when absent."""
    found = re.search(rf"\b{key} = \[([^\]]*)\]", text)
    return tuple(int(n) for n in found[1].split(",") if n.strip()) if found else ()


def integer(text: str, key: str) -> int:
    """`3` of `key = 3` in the text of a structured attribute."""
    found = re.search(rf"\b{key} = (-?\d+)", text)
    if found is None:
        raise ValueError(f"no {key} in {text}")
    return int(found[1])


class _Reader:
    """Copies MLIR blocks into regions; every value gets a number of its own, also when inlined."""

    def __init__(self, functions: dict[str, Any]):
        self.functions = functions
        self.count = itertools.count()

    def region(self, region: Any, outer: dict[Any, int]) -> Region:
        """A block with its arguments."""
        (block,) = region.blocks
        numbers = dict(outer)
        arguments = tuple(self.define(value, numbers) for value in block.arguments)
        operations: list[Operation] = []
        returns = self.body(block, numbers, operations)
        types = tuple(_type(value.type) for value in block.arguments)
        return Region(arguments, types, tuple(operations), returns)

    def body(
        self, block: Any, numbers: dict[Any, int], operations: list[Operation]
    ) -> tuple[int, ...]:
        """Append the operations of a block; returns what its terminator returns."""
        *inner, terminator = [view.operation for view in block.operations]
        for op in inner:
            if op.name == "func.call":
                (callee,) = self.functions[op.attributes["callee"].value].blocks
                local = {
                    argument: numbers[value]
                    for argument, value in zip(callee.arguments, op.operands, strict=True)
                }
                results = self.body(callee, local, operations)
                numbers.update(zip(op.results, results, strict=True))
            elif op.name in _COPIES or _does_nothing(op):
                numbers.update(
                    (result, numbers[value])
                    for result, value in zip(op.results, op.operands, strict=True)
                )
            else:
                operations.append(self.operation(op, numbers))
        return tuple(numbers[value] for value in terminator.operands)

    def operation(self, op: Any, numbers: dict[Any, int]) -> Operation:
        """One operation with its regions."""
        return Operation(
            name=op.name,
            operands=tuple(numbers[value] for value in op.operands),
            regions=tuple(self.region(region, numbers) for region in op.regions),
            results=tuple(self.define(value, numbers) for value in op.results),
            types=tuple(_type(value.type) for value in op.results),
            attributes=_attributes(op),
            where=_where(str(op.location)),
        )

    def define(self, value: Any, numbers: dict[Any, int]) -> int:
        """A new number for a value."""
        numbers[value] = next(self.count)
        return numbers[value]


_COPIES = {"mhlo.copy", "stablehlo.optimization_barrier"}


def _does_nothing(op: Any) -> bool:
    if op.name in ("stablehlo.reshape", "stablehlo.convert"):
        return op.operands[0].type == op.results[0].type
    if op.name == "stablehlo.transpose":
        permutation = np.array(op.attributes["permutation"])
        return bool((permutation == np.arange(permutation.size)).all())
    return False


def _attributes(op: Any) -> dict[str, Any]:
    attributes = op.attributes
    names = [name if isinstance(name, str) else name.name for name in attributes]
    if op.name == "stablehlo.constant":
        return {"value": _constant(attributes["value"], _type(op.results[0].type))}
    return {name: _attribute(attributes[name]) for name in names}


def _attribute(attribute: Any) -> Any:
    """Booleans, numbers, strings and arrays as such; structured attributes as their text."""
    if type(attribute).__name__.startswith("Dense"):
        array = np.array(attribute)
        return array.astype(np.int64) if array.size == 0 else array
    return getattr(attribute, "value", None) if hasattr(attribute, "value") else str(attribute)


def _constant(attribute: Any, kind: TensorType) -> np.ndarray:
    try:
        return np.array(attribute).astype(kind.dtype).reshape(kind.shape)
    except Exception:  # element types the buffer protocol has no letter for (bfloat16)
        pass
    if attribute.is_splat:
        return np.full(kind.shape, attribute.get_splat_value().value, kind.dtype)
    return np.array([float(entry) for entry in attribute]).astype(kind.dtype).reshape(kind.shape)


def _type(kind: Any) -> TensorType:
    text = str(kind)
    found = re.fullmatch(r"tensor<((?:\d+x)*)([\w<>]+)(?:, .*)?>", text)
    if found is None or found[2] not in _DTYPES:
        if text == "!stablehlo.token":
            return TensorType((), np.dtype(bool))
        raise NotImplementedError(f"the StableHLO type {text} has no static shape")
    shape = tuple(int(size) for size in found[1].split("x")[:-1])
    return TensorType(shape, _DTYPES[found[2]])


def _where(location: str) -> str:
    """`dense_1/MatMul` of an MLIR location; instruction names like `reshape.10` say nothing."""
    for name in re.findall(r'"([^"]+)"', location):
        if ("/" in name and not name.startswith("/")) or not re.search(r"[./]|^XLA_", name):
            return name
    return ""
