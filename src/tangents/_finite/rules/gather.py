"""Rows that data choose: embeddings, mixtures of experts, windows. A is a one-hot of indices."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from tangents._core.typing import Array
from tangents._finite.rules.factored import Factored
from tangents._finite.structure.graph import Step


def rule(step: Step, operand: int) -> Factored | None:
    """y[p, q] = W[index[p], q]: entries of W along one axis, all of the others.

    dW[v, q] = Σ_p 1[index[p] = v] G[p, q]. Other gathers have no factored form here.
    """
    if operand != 0:
        return None
    numbers, sizes = step.params["dimension_numbers"], step.params["slice_sizes"]
    table, indices = step.inputs
    (output,) = step.outputs
    batching = tuple(getattr(numbers, "operand_batching_dims", ()))
    if batching or len(numbers.start_index_map) != 1 or indices.shape[-1] != 1:
        return None
    (axis,) = numbers.start_index_map
    if tuple(numbers.collapsed_slice_dims) != (axis,) or sizes[axis] != 1:
        return None
    kept = [k for k in range(len(table.shape)) if k != axis]
    if any(sizes[k] != table.shape[k] for k in kept):
        return None
    count = table.shape[axis]
    # Labels: 0 for the row, then the table's other axes, then the positions.
    weight = [0] * len(table.shape)
    cotangent = [-1] * len(output.shape)
    label_sizes = {0: count}
    for label, (k, out) in enumerate(zip(kept, numbers.offset_dims, strict=True), start=1):
        weight[k], cotangent[out], label_sizes[label] = label, label, table.shape[k]
    positions = []
    for out in range(len(output.shape)):
        if cotangent[out] == -1:
            cotangent[out] = label = len(kept) + 1 + len(positions)
            label_sizes[label] = output.shape[out]
            positions.append(label)
    clip = step.params.get("mode") in (lax.GatherScatterMode.CLIP,)

    def save(inputs, outputs):
        index = inputs[1][..., 0]
        if clip:
            index = jnp.clip(index, 0, count - 1)
        # Outside the table nothing is read and nothing has a derivative.
        return jnp.where((index >= 0) & (index < count), index, -1).astype(jnp.int32)

    return Factored(
        sizes=label_sizes,
        weight=tuple((label,) for label in weight),
        cotangent=tuple(cotangent),
        activation=(*positions, 0),
        save=save,
        expand=lambda index: _one_hot(index, count, output.dtype),
        equality=True,
        copies=count,
    )


def dynamic_slice(step: Step, operand: int) -> Factored | None:
    """y[p, q] = W[start + p, q]: a window along one axis, whole along all others."""
    if operand != 0:
        return None
    table = step.inputs[0]
    sizes = step.params["slice_sizes"]
    moving = [k for k, n in enumerate(table.shape) if sizes[k] != n]
    labels = tuple(range(len(table.shape)))
    if not moving:  # all of it, wherever it is said to start
        return Factored(dict(enumerate(table.shape)), tuple((k,) for k in labels), labels)
    if len(moving) != 1:
        return None
    (axis,) = moving
    count, window, position = table.shape[axis], sizes[axis], len(table.shape)

    def save(inputs, outputs):
        # The primitive moves a window that would reach over the end.
        start = jnp.clip(inputs[1 + axis], 0, count - window).astype(jnp.int32)
        return start + jnp.arange(window, dtype=jnp.int32)

    return Factored(
        sizes={**dict(enumerate(table.shape)), position: window},
        weight=tuple((label,) for label in labels),
        cotangent=tuple(position if k == axis else k for k in labels),
        activation=(position, axis),
        save=save,
        expand=lambda index: _one_hot(index, count, step.outputs[0].dtype),
        equality=True,
        copies=count,
    )


def _one_hot(index: Array, count: int, dtype) -> Array:
    return (index[..., None] == jnp.arange(count, dtype=index.dtype)).astype(dtype)
