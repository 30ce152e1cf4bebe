"""Entries that data choose: embeddings, mixtures of experts, windows. A is a one-hot of indices.

    y[p, o, q] = W[i₁[p] + o₁, .., i_k[p] + o_k, q]

for places p, offsets o in a window, and axes q that are read whole. The indices along the axes that
are not read whole become one, the number of the row (i₁ + o₁) n₂ ⋯ n_k + .. + (i_k + o_k):

    dW[r, q] = Σ_{p, o} 1[row[p, o] = r] G[p, o, q]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from tangents._core.typing import Array
from tangents._finite.rules.factored import Factored
from tangents._finite.structure.graph import Step


@dataclass(frozen=True)
class Window:
    """What is read along one axis of the weight that is not read whole."""

    axis: int
    count: int
    """Entries of the axis."""
    size: int
    """Entries of the window."""
    label: int | None
    """Of the window's axis in the output; None if it has none."""


def rule(step: Step, operand: int) -> Factored | None:
    """Any gather from a weight: axes indexed together, batched, or read in windows."""
    if operand != 0:
        return None
    numbers, sizes = step.params["dimension_numbers"], step.params["slice_sizes"]
    table, output = step.inputs[0].shape, step.outputs[0].shape
    batching = tuple(numbers.operand_batching_dims)
    indexed = {*numbers.start_index_map, *batching}
    rows = [k for k, n in enumerate(table) if k in indexed or sizes[k] != n]
    # The output has the axes of a slice at `offset_dims`, those of the indices elsewhere.
    left_out = {*numbers.collapsed_slice_dims, *batching}
    stays = [k for k in range(len(table)) if k not in left_out]
    of_slice = dict(zip(numbers.offset_dims, stays, strict=True))
    # Label k is axis k of the weight, after these come those of the output.
    own = [len(table) + out for out in range(len(output))]
    cotangent = [
        own[out] if of_slice.get(out, rows and rows[0]) in rows else of_slice[out]
        for out in range(len(output))
    ]
    label_of = {axis: own[out] for out, axis in of_slice.items()}
    windows = [Window(k, table[k], sizes[k], label_of.get(k)) for k in rows]

    def starts(inputs: Sequence[Array]) -> list[Array]:
        given = inputs[1]
        found = []
        for axis in rows:
            if axis in batching:
                along = numbers.start_indices_batching_dims[batching.index(axis)]
                found.append(lax.broadcasted_iota(jnp.int32, given.shape[:-1], along))
            elif axis in numbers.start_index_map:
                found.append(given[..., numbers.start_index_map.index(axis)])
            else:
                found.append(jnp.zeros(given.shape[:-1], jnp.int32))
        return found

    return _one_hot(
        windows,
        sizes={**dict(enumerate(table)), **dict(zip(own, output, strict=True))},
        weight=len(table),
        cotangent=tuple(cotangent),
        places=tuple(own[out] for out in range(len(output)) if out not in of_slice),
        dtype=step.outputs[0].dtype,
        starts=starts,
        clip=step.params.get("mode") is lax.GatherScatterMode.CLIP,
    )


def dynamic_slice(step: Step, operand: int) -> Factored | None:
    """A window that data place; whole along all other axes."""
    if operand != 0:
        return None
    shape, sizes = step.inputs[0].shape, step.params["slice_sizes"]
    rows = [k for k, n in enumerate(shape) if sizes[k] != n]
    labels = range(len(shape))
    own = [len(shape) + k for k in labels]
    every = {**dict(enumerate(shape)), **dict(zip(own, sizes, strict=True))}
    return _one_hot(
        [Window(k, shape[k], sizes[k], own[k]) for k in rows],
        sizes=every,
        weight=len(shape),
        cotangent=tuple(own[k] if k in rows else k for k in labels),
        places=(),
        dtype=step.outputs[0].dtype,
        starts=lambda inputs: [inputs[1 + k] for k in rows],
        clip=True,  # the primitive moves a window that would reach over the end
    )


def _one_hot(
    windows: Sequence[Window],
    *,
    sizes: dict[int, int],
    weight: int,
    cotangent: tuple[int, ...],
    places: tuple[int, ...],
    dtype: Any,
    starts: Callable[[Sequence[Array]], list[Array]],
    clip: bool,
) -> Factored | None:
    """Factors of windows in a weight of so many axes, which are labels from 0 on.

    `starts`: from the inputs of a step to where each window starts, at each of the places; `clip`:
    windows that reach outside are moved inside; otherwise nothing is read of any of their axes.
    """
    counts = [window.count for window in windows]
    rows = math.prod(counts)
    if 0 in sizes.values() or rows >= 2**31:
        return None
    axes = tuple((k,) for k in range(weight))
    if not windows:  # all of it, at every place
        return Factored(sizes, axes, cotangent)
    offsets = tuple(window.label for window in windows if window.label is not None)

    def save(inputs: Sequence[Array], outputs: Sequence[Array]) -> Array:
        row, inside, seen = jnp.zeros((), jnp.int32), jnp.ones((), bool), 0
        for window, start in zip(windows, starts(inputs), strict=True):
            if start.dtype.itemsize < 4:
                start = start.astype(jnp.int32)  # which its own type may be too small to compare
            if clip:
                start = jnp.clip(start, 0, window.count - window.size)
            start = start.reshape(*start.shape, *[1] * len(offsets))
            inside = inside & (start >= 0) & (start <= window.count - window.size)
            entry = start.astype(jnp.int32)
            if window.label is not None:
                along = [1] * len(offsets)
                along[seen] = window.size
                entry = entry + jnp.arange(window.size, dtype=jnp.int32).reshape(along)
                seen += 1
            row = row * window.count + entry
        # Outside the table nothing is read and nothing has a derivative.
        return jnp.where(inside, row, -1)

    def expand(row: Array) -> Array:
        found = row[..., None] == jnp.arange(rows, dtype=row.dtype)
        return found.astype(dtype).reshape(*row.shape, *counts)

    chosen = tuple(window.axis for window in windows)
    return Factored(
        sizes=sizes,
        weight=axes,
        cotangent=cotangent,
        activation=(*places, *offsets, *chosen),
        save=save,
        expand=expand,
        rows=chosen,
    )
