"""Trace and diagonal axes: which pairs of output indices a kernel keeps.

A kernel of a function with outputs of shape (d_0, ..., d_k) has two indices per axis, one for each
input, laid out in pairs: (d_0, d_0', d_1, d_1', ...). A *trace* axis is averaged over its diagonal
and absent from the result, a *diagonal* axis is kept once, all others stay as pairs.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax

from tangents._core.errors import describe_axes
from tangents._core.typing import Array, Axes


def canonical(axes: Axes, shape: Sequence[int], *, caller: str, argument: str) -> tuple[int, ...]:
    """Sorted non-negative axes, each once, or an error that says which axes there are."""
    try:
        given = tuple(map(operator.index, axes if isinstance(axes, Iterable) else (axes,)))
    except TypeError:
        raise TypeError(
            f"{caller}: {argument}={axes!r} must be an integer or a sequence of integers."
        ) from None
    ndim = len(shape)
    for axis in given:
        if not -ndim <= axis < ndim:
            raise ValueError(
                f"{caller}: {argument}={given} is out of range: f(params, x1) has shape "
                f"{tuple(shape)}, so {describe_axes(ndim)}."
            )
    # A set: (0, -2) names the first of two axes twice, which programs rely on.
    return tuple(sorted({axis % ndim for axis in given}))


@dataclass(frozen=True)
class PairAxes:
    """Which axes of an output are traced, kept once, or kept as pairs; all axes non-negative."""

    ndim: int
    trace: tuple[int, ...]
    diagonal: tuple[int, ...]

    @classmethod
    def of(
        cls,
        shape1: Sequence[int],
        shape2: Sequence[int],
        trace_axes: Axes,
        diagonal_axes: Axes,
        *,
        caller: str,
    ) -> PairAxes:
        """Check axes against the output shapes on both sides."""
        trace = canonical(trace_axes, shape1, caller=caller, argument="trace_axes")
        diagonal = canonical(diagonal_axes, shape1, caller=caller, argument="diagonal_axes")
        if both := set(trace) & set(diagonal):
            raise ValueError(
                f"{caller}: axis {min(both)} is in both trace_axes={trace} and "
                f"diagonal_axes={diagonal}: it can be averaged over or kept once, not both."
            )
        if len(shape1) != len(shape2):
            raise ValueError(
                f"{caller}: f(params, x1) has shape {tuple(shape1)} and f(params, x2) has shape "
                f"{tuple(shape2)}: they need the same number of axes."
            )
        for argument, axes in (("trace_axes", trace), ("diagonal_axes", diagonal)):
            for axis in axes:
                if shape1[axis] != shape2[axis]:
                    raise ValueError(
                        f"{caller}: {argument} contains axis {axis}, along which f(params, x1) has "
                        f"size {shape1[axis]} and f(params, x2) has size {shape2[axis]}: these "
                        f"must agree. Leave axis {axis} out of {argument} (pass {argument}=() to "
                        "keep every pair)."
                    )
        return cls(len(shape1), trace, diagonal)

    @property
    def pairs(self) -> tuple[int, ...]:
        """Axes kept as pairs."""
        return tuple(a for a in range(self.ndim) if a not in self.trace + self.diagonal)

    def kernel_shape(self, shape1: Sequence[int], shape2: Sequence[int]) -> tuple[int, ...]:
        """Shape of the kernel for outputs of these shapes."""
        dims: list[int] = []
        for axis in range(self.ndim):
            if axis in self.trace:
                continue
            dims.append(shape1[axis])
            if axis not in self.diagonal:
                dims.append(shape2[axis])
        return tuple(dims)

    def position(self, axis: int) -> int:
        """Where the index, or the pair of indices, of an output axis starts in the kernel."""
        return sum(2 if a in self.pairs else 1 for a in range(axis) if a not in self.trace)

    def without(self, axis: int) -> PairAxes:
        """The same choice for outputs that lack an axis."""
        move = lambda axes: tuple(a - (a > axis) for a in axes if a != axis)
        return PairAxes(self.ndim - 1, move(self.trace), move(self.diagonal))

    def trace_size(self, shape: Sequence[int]) -> int:
        """Number of entries averaged over: the size of the trace axes."""
        return math.prod(shape[axis] for axis in self.trace)

    def einsum_axes(self) -> tuple[list[int], list[int], list[int]]:
        """Integer labels of (side 1, side 2, result) for `einsum`; labels 0 to 2·ndim − 1."""
        side1 = list(range(self.ndim))
        side2 = [a + self.ndim if a in self.pairs else a for a in range(self.ndim)]
        result: list[int] = []
        for axis in range(self.ndim):
            if axis in self.trace:
                continue
            result.append(side1[axis])
            if axis in self.pairs:
                result.append(side2[axis])
        return side1, side2, result

    def reduce_full(self, full: Array) -> Array:
        """From the kernel with every pair, in layout (d_0.., d_0'..): trace, diagonal, interleave.

        `full` has shape `shape1 + shape2`; the result has `kernel_shape`. Traces are averages.
        """
        side1, side2, result = self.einsum_axes()
        size = self.trace_size(full.shape[: self.ndim])
        return jnp.einsum(full, side1 + side2, result) / max(size, 1)

    def symmetrise(self, kernel: Array) -> Array:
        """Copy one triangle onto the other, so that a kernel of (x, x) is symmetric to the bit.

        The two indices of each pair axis are exchanged: entries above the diagonal of the matrix
        (first indices) × (second indices) are taken from below it.
        """
        if not self.pairs:
            return kernel
        swap: list[int] = []
        first: list[int] = []
        second: list[int] = []
        for axis in range(self.ndim):
            if axis in self.trace:
                continue
            position = len(swap)
            if axis in self.diagonal:
                swap.append(position)
            else:
                swap += [position + 1, position]
                first.append(position)
                second.append(position + 1)
        # Without a barrier XLA may fuse the sum that made the kernel into both branches below and
        # round it differently in each.
        kernel = lax.optimization_barrier(kernel)
        row = _flat_index(kernel.shape, first)
        column = _flat_index(kernel.shape, second)
        return jnp.where(row >= column, kernel, jnp.transpose(kernel, swap))


def _flat_index(shape: Sequence[int], axes: Sequence[int]) -> Array:
    """Row-major index over `axes`, broadcastable against an array of `shape`."""
    index = jnp.zeros((1,) * len(shape), jnp.int32)
    for axis in axes:
        along = [1] * len(shape)
        along[axis] = shape[axis]
        index = index * shape[axis] + jnp.arange(shape[axis], dtype=jnp.int32).reshape(along)
    return index
