"""Jacobian contraction: Θ = J₁ J₂ᵀ from both Jacobians (Novak et al. 2022, section 3.1).

Reverse mode gives the Jacobian of N examples and O outputs at the cost of N·O backward passes (O
over the batch if examples are independent); the contraction then costs N₁ N₂ O² P multiply-adds, or
N₁ N₂ O P with all outputs traced, and O·P numbers an example are held.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from tangents._core import precision
from tangents._core.axes import PairAxes
from tangents._core.typing import Array
from tangents._finite.problem import Problem, Side


def kernels(problem: Problem, axes: list[PairAxes]) -> list[Array]:
    """Kernel of each output leaf."""
    jacobians1 = jacobians(problem, problem.side1)
    jacobians2 = jacobians1 if problem.symmetric else jacobians(problem, problem.side2)
    return [
        contract(j1, j2, pair, output.shape, problem.precision)
        for j1, j2, pair, output in zip(
            jacobians1, jacobians2, axes, problem.side1.outputs, strict=True
        )
    ]


def jacobians(problem: Problem, side: Side) -> list[list[Array]]:
    """For each output leaf, its derivative in each parameter leaf: shape `output + parameter`."""
    if side.vmap is None:
        return batch_jacobians(problem.run(side), problem.leaves, side.outputs)
    spec = side.vmap
    one = spec.per_example(problem.f)

    def example(x, kwargs):
        f = lambda leaves: one(leaves, x, kwargs)
        shapes = [
            jax.ShapeDtypeStruct(without_axis(y.shape, axis), y.dtype)
            for y, axis in zip(side.outputs, spec.out_axes, strict=True)
        ]
        return batch_jacobians(f, problem.leaves, shapes)

    out_axes = [[axis] * len(problem.leaves) for axis in spec.out_axes]
    return spec.map_examples(example, side.x, side.kwargs, out_axes=out_axes)


def batch_jacobians(f, leaves: list[Array], outputs) -> list[list[Array]]:
    """Jacobian of each output leaf of `f(leaves)`, by one backward pass for each output."""
    _, pullback = jax.vjp(f, leaves)
    result = []
    for k, output in enumerate(outputs):
        basis = jnp.eye(math.prod(output.shape), dtype=output.dtype)

        def row(cotangent, k=k):
            filled = [
                cotangent.reshape(o.shape) if i == k else jnp.zeros(o.shape, o.dtype)
                for i, o in enumerate(outputs)
            ]
            return pullback(filled)[0]

        rows = jax.vmap(row)(basis)
        result.append([r.reshape(output.shape + r.shape[1:]) for r in rows])
    return result


def contract(
    jacobian1: list[Array],
    jacobian2: list[Array],
    axes: PairAxes,
    shape: tuple[int, ...],
    how: lax.Precision,
) -> Array:
    """Sum over parameters of J₁ J₂ᵀ, averaged over trace axes, in kernel layout."""
    side1, side2, result = axes.einsum_axes()
    parameter = 2 * axes.ndim
    total = None
    for j1, j2 in zip(jacobian1, jacobian2, strict=True):
        dtype = precision.accumulator(jnp.promote_types(j1.dtype, j2.dtype))
        # One axis for all of a leaf's entries lets one matrix product do the contraction.
        flat1 = j1.reshape(*j1.shape[: axes.ndim], -1)
        flat2 = j2.reshape(*j2.shape[: axes.ndim], -1)
        term = jnp.einsum(
            flat1,
            [*side1, parameter],
            flat2,
            [*side2, parameter],
            result,
            precision=how,
            preferred_element_type=dtype,
        )
        total = term if total is None else total + term.astype(total.dtype)
    assert total is not None
    return total / max(axes.trace_size(shape), 1)


def without_axis(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """A shape with one axis taken out."""
    return shape[:axis] + shape[axis + 1 :]
