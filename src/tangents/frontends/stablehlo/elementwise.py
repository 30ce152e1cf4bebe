"""Elementwise operations.

Ties of maximum and minimum have the derivative that TensorFlow gives them, all to the first
operand; `jax.lax.max` would give half to each.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tangents.frontends.stablehlo.evaluation import Machine, Value, fold, is_splat, rule
from tangents.frontends.stablehlo.program import Operation, canonical

_UNARY: dict[str, Callable[[Any], Any]] = {
    "abs": lax.abs,
    "cbrt": lax.cbrt,
    "ceil": lax.ceil,
    "cosine": lax.cos,
    "count_leading_zeros": lax.clz,
    "exponential": lax.exp,
    "exponential_minus_one": lax.expm1,
    "floor": lax.floor,
    "imag": lax.imag,
    "is_finite": lax.is_finite,
    "log": lax.log,
    "log_plus_one": lax.log1p,
    "logistic": lax.logistic,
    "negate": lax.neg,
    "not": lax.bitwise_not,
    "popcnt": lax.population_count,
    "real": lax.real,
    "round_nearest_afz": lambda x: lax.round(x, lax.RoundingMethod.AWAY_FROM_ZERO),
    "round_nearest_even": lambda x: lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN),
    "rsqrt": lax.rsqrt,
    "sign": lax.sign,
    "sine": lax.sin,
    "sqrt": lax.sqrt,
    "tan": lax.tan,
    "tanh": lax.tanh,
    "chlo.acos": lax.acos,
    "chlo.acosh": lax.acosh,
    "chlo.asin": lax.asin,
    "chlo.asinh": lax.asinh,
    "chlo.atan": lax.atan,
    "chlo.atanh": lax.atanh,
    "chlo.cosh": lax.cosh,
    "chlo.digamma": lax.digamma,
    "chlo.erf": lax.erf,
    "chlo.erf_inv": lax.erf_inv,
    "chlo.erfc": lax.erfc,
    "chlo.lgamma": lax.lgamma,
    "chlo.sinh": lax.sinh,
    "chlo.square": lax.square,
    "chlo.tan": lax.tan,
}
# Some of them are left under the older dialect.
_UNARY |= {
    name.replace("chlo", "mhlo"): function
    for name, function in _UNARY.items()
    if name.startswith("chlo")
}


def _maximum(x: Value, y: Value) -> Value:
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return lax.max(x, y)
    return lax.select(lax.bitwise_or(lax.ge(x, y), lax.ne(x, x)), x, y)


def _minimum(x: Value, y: Value) -> Value:
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return lax.min(x, y)
    return lax.select(lax.bitwise_or(lax.le(x, y), lax.ne(x, x)), x, y)


def _for_booleans(boolean: Callable, other: Callable) -> Callable[[Value, Value], Value]:
    return lambda x, y: boolean(x, y) if x.dtype == bool else other(x, y)


_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": _for_booleans(lax.bitwise_or, lax.add),
    "and": lax.bitwise_and,
    "atan2": lax.atan2,
    "complex": lax.complex,
    "divide": lax.div,
    "minimum": _minimum,
    "multiply": _for_booleans(lax.bitwise_and, lax.mul),
    "or": lax.bitwise_or,
    "power": lax.pow,
    "remainder": lax.rem,
    "shift_left": lax.shift_left,
    "shift_right_arithmetic": lax.shift_right_arithmetic,
    "shift_right_logical": lax.shift_right_logical,
    "subtract": lax.sub,
    "xor": lax.bitwise_xor,
}
_COMPARISONS = {
    "EQ": (lax.eq, np.equal),
    "NE": (lax.ne, np.not_equal),
    "LT": (lax.lt, np.less),
    "LE": (lax.le, np.less_equal),
    "GT": (lax.gt, np.greater),
    "GE": (lax.ge, np.greater_equal),
}


_RELU = re.compile(r"(^|/)Relu(_\d+)?$")


def _register_unary(name: str, function: Callable[[Any], Any]) -> None:
    @rule(name)
    def unary(op: Operation, operands: list[Value], machine: Machine) -> list[Value]:
        return [function(operands[0])]


def _register_binary(name: str, function: Callable[[Any, Any], Any]) -> None:
    @rule(name)
    def binary(op: Operation, operands: list[Value], machine: Machine) -> list[Value]:
        return [function(*operands)]


for _name, _function in _UNARY.items():
    _register_unary(_name, _function)
for _name, _function in _BINARY.items():
    _register_binary(_name, _function)


def direction(op: Operation) -> str:
    """`LT` of the comparison direction of an operation."""
    return str(op.attributes["comparison_direction"]).rstrip(">").split()[-1]


@rule("maximum")
def maximum(op: Operation, operands: list[Value], machine: Machine) -> list[Value]:
    """The larger of two; TensorFlow's Relu, which XLA makes one of these, is zero at a tie."""
    x, y = operands
    if _RELU.search(op.where) and is_splat(y, 0.0):
        return [jax.nn.relu(x)]
    return [_maximum(x, y)]


@rule("compare")
def compare(op: Operation, operands: list[Value], machine: Machine) -> list[Value]:
    """An elementwise comparison."""
    return [_COMPARISONS[direction(op)][0](*operands)]


@rule("select")
def select(op: Operation, operands: list[Value], machine: Machine) -> list[Value]:
    """`select(predicate, on_true, on_false)`; the predicate may be a scalar."""
    return [lax.select(*operands)]


@rule("clamp")
def clamp(op: Operation, operands: list[Value], machine: Machine) -> list[Value]:
    """`clamp(low, x, high)`, with derivative zero at both ends as in TensorFlow's Relu6."""
    return [lax.clamp(*operands)]


@rule("convert")
def convert(op: Operation, operands: list[Value], machine: Machine) -> list[Value]:
    """A change of element type."""
    return [lax.convert_element_type(operands[0], canonical(op.types[0].dtype))]


@rule("bitcast_convert")
def bitcast_convert(op: Operation, operands: list[Value], machine: Machine) -> list[Value]:
    """The same bits as another element type."""
    return [lax.bitcast_convert_type(operands[0], canonical(op.types[0].dtype))]


# What loop counters and positions are made of, on known operands.
_NUMPY: dict[str, Callable[..., Any]] = {
    "abs": np.abs,
    "add": np.add,
    "and": np.bitwise_and,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "multiply": np.multiply,
    "negate": np.negative,
    "not": np.invert,
    "or": np.bitwise_or,
    "remainder": np.fmod,
    "select": np.where,
    "sign": np.sign,
    "subtract": np.subtract,
    "xor": np.bitwise_xor,
}
for _name, _function in _NUMPY.items():
    fold(_name, lambda op, *operands, _f=_function: _f(*operands))
fold("compare", lambda op, x, y: _COMPARISONS[direction(op)][1](x, y))
fold("convert", lambda op, x: np.trunc(x) if op.types[0].dtype.kind in "iu" else x)
fold("clamp", lambda op, low, x, high: np.minimum(np.maximum(x, low), high))


def _divide(op: Operation, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # HLO rounds a quotient of integers towards zero.
    return np.trunc(x / np.where(y == 0, 1, y)) if x.dtype.kind in "iu" else x / y


fold("divide", _divide)
