"""Primitives that put a weight beside or into other arrays: its entries reappear in the output."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from tangents._finite.rules.factored import Factored, Rule
from tangents._finite.structure.graph import Step


def concatenate(step: Step, operand: int) -> Factored:
    """A class token before a sequence: G is a slice of the output's derivative."""
    axis = step.params["dimension"]
    shape = step.inputs[operand].shape
    start = sum(x.shape[axis] for x in step.inputs[:operand])
    labels = tuple(range(len(shape)))
    return Factored(
        sizes=dict(enumerate(shape)),
        weight=tuple((label,) for label in labels),
        cotangent=labels,
        prepare=lambda g: lax.slice_in_dim(g, start, start + shape[axis], axis=axis),
    )


def pad(step: Step, operand: int) -> Factored | None:
    """A padded weight is read back from where it went; a padding value has no rule."""
    if operand != 0:
        return None
    low, high, interior = zip(*step.params["padding_config"], strict=True)
    shape, out_shape = step.inputs[0].shape, step.outputs[0].shape
    if min(*low, *high, 0) < 0 or 0 in shape:
        return None
    labels = tuple(range(len(shape)))
    limits = [n - h for n, h in zip(out_shape, high, strict=True)]
    strides = [i + 1 for i in interior]
    return Factored(
        sizes=dict(enumerate(shape)),
        weight=tuple((label,) for label in labels),
        cotangent=labels,
        prepare=lambda g: lax.slice(g, low, limits, strides),
    )


def scatter_add(step: Step, operand: int) -> Factored | None:
    """Data added into a weight leaves the weight's own derivative at one."""
    if operand != 0:
        return None
    shape = step.inputs[0].shape
    labels = tuple(range(len(shape)))
    return Factored(dict(enumerate(shape)), tuple((label,) for label in labels), labels)


def dynamic_update_slice(step: Step, operand: int) -> Factored | None:
    """Where data overwrote the weight the derivative is zero, elsewhere one."""
    if operand != 0:
        return None
    shape, update = step.inputs[0].shape, step.inputs[1]
    labels = tuple(range(len(shape)))

    def save(inputs, outputs):
        kept = jnp.ones(shape, update.dtype)
        return lax.dynamic_update_slice(kept, jnp.zeros(update.shape, update.dtype), inputs[2:])

    return Factored(
        dict(enumerate(shape)), tuple((label,) for label in labels), labels, labels, save
    )


RULES: dict[str, Rule] = {
    "concatenate": concatenate,
    "pad": pad,
    "scatter-add": scatter_add,
    "dynamic_update_slice": dynamic_update_slice,
}
