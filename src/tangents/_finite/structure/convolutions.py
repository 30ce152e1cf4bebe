"""Convolutions of the network whose backward pass is a convolution with a kernel flipped before.

JAX's transpose of a convolution flips the kernel where it stands. Inside a `lax` loop, where chunks
of outputs are worked on, XLA on CPU then finds no fast convolution (1001 ms instead of 30 for a
CNN's pass): the flip is taken out of the loop.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from tangents._core.typing import Array
from tangents._finite.structure.graph import Step


def is_plain(step: Step) -> bool:
    """Whether `evaluate` applies: no groups, a real image."""
    return (
        step.name == "conv_general_dilated"
        and step.params["feature_group_count"] == step.params["batch_group_count"] == 1
        and 0 not in (*step.inputs[0].shape, *step.inputs[1].shape, *step.outputs[0].shape)
        and jnp.issubdtype(step.inputs[0].dtype, jnp.floating)
    )


def evaluate(step: Step, inputs: Sequence[Array]) -> list[Array]:
    """The step, for reverse mode in the image alone."""
    numbers = step.params["dimension_numbers"]
    sizes = [(step.inputs[0].shape[a], step.inputs[1].shape[k], step.outputs[0].shape[o])
             for a, k, o in zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:],
                                strict=True)]  # fmt: skip

    @jax.custom_vjp
    def convolution(image: Array, kernel: Array) -> Array:
        return step.evaluate([image, kernel])[0]

    def forward(image: Array, kernel: Array):
        # Input and output features change places: the kernel keeps its layout.
        swapped = jnp.swapaxes(kernel, numbers.rhs_spec[0], numbers.rhs_spec[1])
        return convolution(image, kernel), lax.rev(swapped, numbers.rhs_spec[2:])

    def backward(flipped: Array, g: Array):
        return _transposed(step, g, flipped, sizes), None

    convolution.defvjp(forward, backward)
    return [convolution(*inputs)]


def _transposed(
    step: Step, g: Array, flipped: Array, sizes: Sequence[tuple[int, int, int]]
) -> Array:
    """The cotangent of the image: `g` spread by the strides, convolved with the flipped kernel."""
    params = step.params
    numbers = params["dimension_numbers"]
    padding = []
    per_axis = zip(
        sizes,
        params["padding"],
        params["window_strides"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        strict=True,
    )
    for (image, window, output), (low, _), stride, spread, dilation in per_axis:
        reach = (window - 1) * dilation
        before = reach - low
        spread_image = (image - 1) * spread + 1
        spread_output = (output - 1) * stride + 1
        padding.append((before, spread_image + reach - spread_output - before))
    return lax.conv_general_dilated(
        g,
        flipped,
        window_strides=params["lhs_dilation"],
        padding=padding,
        lhs_dilation=params["window_strides"],
        rhs_dilation=params["rhs_dilation"],
        dimension_numbers=lax.ConvDimensionNumbers(
            numbers.out_spec, numbers.rhs_spec, numbers.lhs_spec
        ),
        precision=params["precision"],
        preferred_element_type=step.inputs[0].dtype,
    )
