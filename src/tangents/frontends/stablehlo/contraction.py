"""Matrix products and convolutions."""

from __future__ import annotations

import re

import numpy as np
from jax import lax

from tangents.frontends.stablehlo.evaluation import Machine, Value, rule
from tangents.frontends.stablehlo.program import Operation, canonical, integers


@rule("dot")
def dot(op: Operation, operands: list[Value], machine: Machine) -> list[Value]:
    """The last axis of the left operand with the first of the right."""
    lhs, rhs = operands
    return [_dot_general(op, lhs, rhs, (((lhs.ndim - 1,), (0,)), ((), ())))]


@rule("dot_general")
def dot_general(op: Operation, operands: list[Value], machine: Machine) -> list[Value]:
    """A contraction over any axes, with batch axes."""
    text = op.attributes["dot_dimension_numbers"]
    contracting = tuple(integers(text, f"{side}_contracting_dimensions") for side in ("lhs", "rhs"))
    batching = tuple(integers(text, f"{side}_batching_dimensions") for side in ("lhs", "rhs"))
    lhs, rhs = operands
    return [_dot_general(op, lhs, rhs, (contracting, batching))]


def _dot_general(op: Operation, lhs: Value, rhs: Value, dimension_numbers: tuple) -> Value:
    return lax.dot_general(
        lhs,
        rhs,
        dimension_numbers,
        precision=_precision(op),
        preferred_element_type=canonical(op.types[0].dtype),
    )


@rule("convolution")
def convolution(op: Operation, operands: list[Value], machine: Machine) -> list[Value]:
    """A convolution with strides, dilations and groups."""
    lhs, rhs = operands
    attributes = op.attributes
    numbers = convolution_axes(attributes["dimension_numbers"])
    spatial = len(numbers.lhs_spec) - 2
    ones = np.ones(spatial, int)

    def along(key: str, default: np.ndarray) -> tuple[int, ...]:
        return tuple(int(n) for n in attributes.get(key, default))

    flipped = [
        axis
        for axis, flip in zip(
            numbers.rhs_spec[2:], attributes.get("window_reversal", np.zeros(spatial)), strict=True
        )
        if flip
    ]
    padding = np.asarray(attributes.get("padding", np.zeros((spatial, 2), int)))
    return [
        lax.conv_general_dilated(
            lhs,
            lax.rev(rhs, flipped) if flipped else rhs,
            window_strides=along("window_strides", ones),
            padding=[(int(low), int(high)) for low, high in padding.reshape(spatial, 2)],
            lhs_dilation=along("lhs_dilation", ones),
            rhs_dilation=along("rhs_dilation", ones),
            dimension_numbers=numbers,
            feature_group_count=int(attributes["feature_group_count"]),
            batch_group_count=int(attributes["batch_group_count"]),
            precision=_precision(op),
            preferred_element_type=canonical(op.types[0].dtype),
        )
    ]


def convolution_axes(text: str) -> lax.ConvDimensionNumbers:
    """Axes of `[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]`."""
    lists = [part.split(", ") for part in re.findall(r"\[([^\]]*)\]", text)]

    def axes(names: list[str], first: str, second: str) -> tuple[int, ...]:
        spatial = [names.index(str(i)) for i in range(len(names) - 2)]
        return (names.index(first), names.index(second), *spatial)

    lhs, rhs, out = lists
    return lax.ConvDimensionNumbers(axes(lhs, "b", "f"), axes(rhs, "o", "i"), axes(out, "b", "f"))


def _precision(op: Operation) -> lax.Precision | None:
    names = re.findall(r"precision (\w+)", str(op.attributes.get("precision_config", "")))
    # DEFAULT leaves the choice to `jax.default_matmul_precision`, as plain JAX code does.
    return None if set(names) <= {"DEFAULT"} else lax.Precision[max(names)]
