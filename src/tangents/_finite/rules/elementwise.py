"""Elementwise primitives of several operands: y = h(W, a), A = ∂h/∂W entry by entry."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tangents._finite.rules.factored import Factored
from tangents._finite.structure.graph import Step

LINEAR = {"add": (1, 1), "add_any": (1, 1), "sub": (1, -1)}
"""Derivative in each operand where it is a constant."""
PRIMITIVES = (
    *LINEAR, "mul", "div", "max", "min", "pow", "atan2", "rem", "select_n", "clamp",
)  # fmt: skip


def rule(step: Step, operand: int) -> Factored | None:
    """Factors; an operand is used at every entry along axes where its size is one."""
    (output,) = step.outputs
    shape = step.inputs[operand].shape
    if shape and len(shape) != len(output.shape):
        return None
    labels = tuple(range(len(output.shape)))
    sizes = dict(enumerate(output.shape))
    weight = tuple((k,) if n == output.shape[k] else () for k, n in enumerate(shape))
    if LINEAR.get(step.name, (0, 0))[min(operand, 1)] == 1:
        return Factored(sizes, weight, labels)
    if step.name == "sub":
        minus = lambda inputs, outputs: -jnp.ones((), output.dtype)
        return Factored(sizes, weight, labels, activation=(), save=minus)

    def save(inputs, outputs):
        if step.name == "mul":
            return jnp.broadcast_to(inputs[1 - operand], output.shape)
        one = lambda w: step.evaluate([*inputs[:operand], w, *inputs[operand + 1 :]])[0]
        w = inputs[operand]
        _, derivative = jax.jvp(one, (w,), (jnp.ones_like(w),))
        return jnp.broadcast_to(derivative, output.shape)

    return Factored(sizes, weight, labels, activation=labels, save=save)
