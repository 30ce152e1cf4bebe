"""How each primitive factors in a weight: one file a family, one line a primitive in `RULES`."""

from __future__ import annotations

from tangents._finite.rules import convolution, dot_general, elementwise, gather, joining
from tangents._finite.rules.factored import Rule

RULES: dict[str, Rule] = {
    "dot_general": dot_general.rule,
    "conv_general_dilated": convolution.rule,
    "gather": gather.rule,
    "dynamic_slice": gather.dynamic_slice,
    **dict.fromkeys(elementwise.PRIMITIVES, elementwise.rule),
    **joining.RULES,
}
