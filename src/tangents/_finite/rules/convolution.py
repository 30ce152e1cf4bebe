"""`conv_general_dilated`: a matrix product with patches of the input.

    y[n, p, (g, j)] = Σ_{k, i} patch[n, p, k, (g, i)] W[k, i, (g, j)]

for any strides, padding, dilation of either side (a transposed convolution dilates its input), and
groups of features or of the batch; p is a position of the output, k an offset in the window.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import lax

from tangents._core.typing import Array
from tangents._finite.rules.factored import Factored
from tangents._finite.structure.graph import Step

BATCH, GROUP, IN, OUT, FIRST = range(5)
"""Labels; positions and window offsets follow from FIRST on."""


def rule(step: Step, operand: int) -> Factored | None:
    """Factors of the kernel; a weight in the place of the image has no rule."""
    if operand != 1:
        return None
    params = step.params
    numbers = params["dimension_numbers"]
    image, kernel, output = step.inputs[0].shape, step.inputs[1].shape, step.outputs[0].shape
    if 0 in (*image, *kernel, *output):
        return None
    spatial = len(image) - 2
    features, batches = params["feature_group_count"], params["batch_group_count"]
    groups = features * batches
    positions = tuple(range(FIRST, FIRST + spatial))
    window = tuple(range(FIRST + spatial, FIRST + 2 * spatial))

    weight: list[tuple[int, ...]] = [()] * len(kernel)
    out_axis, in_axis, *window_axes = numbers.rhs_spec
    weight[out_axis] = (GROUP, OUT) if groups > 1 else (OUT,)
    weight[in_axis] = (IN,)
    for axis, label in zip(window_axes, window, strict=True):
        weight[axis] = (label,)

    batch_axis, feature_axis, *position_axes = numbers.out_spec
    cotangent: list[tuple[int, ...]] = [()] * len(output)
    cotangent[batch_axis] = (BATCH,)
    cotangent[feature_axis] = weight[out_axis]
    for axis, label in zip(position_axes, positions, strict=True):
        cotangent[axis] = (label,)
    split = [n for k, n in enumerate(output) if k < feature_axis]
    split += [groups, output[feature_axis] // groups, *output[feature_axis + 1 :]]

    sizes = {
        BATCH: output[batch_axis],
        GROUP: groups,
        IN: kernel[in_axis],
        OUT: kernel[out_axis] // groups,
        **{label: output[axis] for axis, label in zip(position_axes, positions, strict=True)},
        **{label: kernel[axis] for axis, label in zip(window_axes, window, strict=True)},
    }
    grouped = (GROUP,) if groups > 1 else ()
    return Factored(
        sizes=sizes,
        weight=tuple(weight),
        cotangent=tuple(label for axis in cotangent for label in axis),
        activation=(BATCH, *positions, *grouped, *window, IN),
        save=lambda inputs, outputs: inputs[0],
        expand=lambda x: patches(x, params, kernel, sizes, positions, window),
        prepare=(lambda g: g.reshape(split)) if groups > 1 else None,
    )


def patches(
    x: Array,
    params: dict,
    kernel: tuple[int, ...],
    sizes: dict[int, int],
    positions: tuple[int, ...],
    window: tuple[int, ...],
) -> Array:
    """Patches of an image, axes (batch, positions, groups if any, window, in)."""
    numbers = params["dimension_numbers"]
    batch_axis, feature_axis, *image_axes = numbers.lhs_spec
    x = jnp.transpose(x, (batch_axis, *image_axes, feature_axis))
    edges = [
        (low, high, dilation - 1)
        for (low, high), dilation in zip(params["padding"], params["lhs_dilation"], strict=True)
    ]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    counts = [sizes[label] for label in positions]
    strides, dilations = params["window_strides"], params["rhs_dilation"]
    # Axis by axis: a copy of each offset along one axis at a time costs two thirds of one copy of
    # each offset in the window, on a CPU.
    stacked = x
    for done, axis in enumerate(reversed(range(len(window)))):
        count, step, dilation = counts[axis], strides[axis], dilations[axis]
        starts = [o * dilation for o in range(sizes[window[axis]])]
        shifted = [
            lax.slice_in_dim(stacked, start, start + (count - 1) * step + 1, step, axis=1 + axis)
            for start in starts
        ]
        stacked = jnp.stack(shifted, axis=-2 - done)
    offsets = [sizes[label] for label in window]
    groups, inner = sizes[GROUP], sizes[IN]
    if params["batch_group_count"] > 1:
        # The batch is (groups, rest), and each group of it meets its own output features.
        stacked = stacked.reshape(groups, -1, *counts, *offsets, inner)
        return jnp.moveaxis(stacked, 0, 1 + len(counts))
    if groups > 1:
        stacked = stacked.reshape(-1, *counts, math.prod(offsets), groups, inner)
        stacked = jnp.moveaxis(stacked, -2, 1 + len(counts))
    own = (groups,) if groups > 1 else ()
    return stacked.reshape(-1, *counts, *own, *offsets, inner)
