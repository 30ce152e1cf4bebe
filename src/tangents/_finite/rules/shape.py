"""Primitives that only move a weight's entries about, or scale them: steps of its prologue."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import jax.numpy as jnp

from tangents._finite.structure.graph import Constant, Step
from tangents._finite.structure.views import View

Views: TypeAlias = list[View] | None


def _same(step: Step, view: View) -> Views:
    return [view]


def _convert(step: Step, view: View) -> Views:
    real = all(jnp.issubdtype(x.dtype, jnp.floating) for x in (*step.inputs, *step.outputs))
    return [view] if real else None


def _transpose(step: Step, view: View) -> Views:
    return [view.transpose(step.params["permutation"])]


def _reshape(step: Step, view: View) -> Views:
    reshaped = view.reshape(step.outputs[0].shape)
    return None if reshaped is None else [reshaped]


def _broadcast(step: Step, view: View) -> Views:
    return [view.broadcast(step.params["shape"], step.params["broadcast_dimensions"])]


def _slice(step: Step, view: View) -> Views:
    starts, limits = step.params["start_indices"], step.params["limit_indices"]
    strides = step.params["strides"] or (1,) * len(starts)
    return [view.slice(starts, limits, strides)]


def _dynamic_slice(step: Step, view: View) -> Views:
    starts = [start.value for start in step.inputs[1:] if isinstance(start, Constant)]
    if len(starts) < len(step.inputs) - 1:
        return None
    shape, sizes = step.inputs[0].shape, step.params["slice_sizes"]
    # The primitive clamps starts, so that the slice fits.
    first = [min(max(int(s), 0), n - k) for s, n, k in zip(starts, shape, sizes, strict=True)]
    return [view.slice(first, [s + k for s, k in zip(first, sizes, strict=True)], [1] * len(first))]


def _split(step: Step, view: View) -> Views:
    axis, views, start = step.params["axis"], [], 0
    shape = list(view.shape)
    for size in step.params["sizes"]:
        starts, limits = [0] * len(shape), list(shape)
        starts[axis], limits[axis] = start, start + size
        views.append(view.slice(starts, limits, [1] * len(shape)))
        start += size
    return views


def _rev(step: Step, view: View) -> Views:
    return [view.reverse(step.params["dimensions"])]


def _negative(step: Step, view: View) -> Views:
    return [replace(view, scaled=True)]


VIEWS: dict[str, Callable[[Step, View], Views]] = {
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "split": _split,
    "rev": _rev,
    "convert_element_type": _convert,
    "copy": _same,
    "name": _same,
    "sharding_constraint": _same,
    "neg": _negative,
}
"""From a step and the view of its first operand to the views of its outputs."""


def scaling(step: Step, operand: int) -> int | None:
    """The other operand's index if the step multiplies or divides `operand` by a scalar."""
    if step.name == "mul" or (step.name == "div" and operand == 0):
        other = 1 - operand
        if step.inputs[other].shape == () and jnp.issubdtype(
            step.inputs[other].dtype, jnp.floating
        ):
            return other
    return None
