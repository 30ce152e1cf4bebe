"""Jacobian contraction: Θ = J₁ J₂ᵀ from both Jacobians (Novak et al. 2022, section 3.1).

Reverse mode gives the Jacobian of N examples and O outputs at the cost of N·O backward passes (O
over the batch if examples are independent); the contraction then costs N₁ N₂ O² P multiply-adds, or
N₁ N₂ O P with all outputs traced, and O·P numbers an example are held.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax, tree_util
from jax.extend.core import primitives

from tangents._core import precision
from tangents._core.axes import PairAxes
from tangents._core.typing import Array
from tangents._core.vmap_axes import VMapSpec
from tangents._finite.problem import Problem
from tangents._finite.side import Side

BLOCK = 4096
"""Parameters contracted at a time."""


def kernels(problem: Problem, axes: list[PairAxes]) -> list[Array]:
    """Kernel of each output leaf."""
    one_by_one = [_sums_outputs(problem, k, pair) for k, pair in enumerate(axes)]
    if all(one_by_one):
        return [_output_by_output(problem, k, pair) for k, pair in enumerate(axes)]
    jacobians1 = jacobians(problem, problem.side1)
    jacobians2 = jacobians1 if problem.symmetric else jacobians(problem, problem.side2)
    return [
        contract(j1, j2, pair, output.shape, problem.precision)
        for j1, j2, pair, output in zip(
            jacobians1, jacobians2, axes, problem.side1.outputs, strict=True
        )
    ]


def _sums_outputs(problem: Problem, k: int, pair: PairAxes) -> bool:
    """Whether a leaf's traced outputs can be taken one after the other.

    It saves their memory, and time too (a quarter of it on a network of dense layers). Weight
    gradients of convolutions are far slower inside a loop than outside on a CPU.
    """
    spec1, spec2 = problem.side1.vmap, problem.side2.vmap
    if spec1 is None or spec2 is None or spec1.out_axes[k] not in pair.pairs or not pair.trace:
        return False
    if not problem.is_traced:
        return False  # step by step a loop would be compiled anew at every call
    example = lambda leaves: spec1.per_example(problem.f)(
        leaves, *_first_example(problem.side1, spec1)
    )
    return not has_convolution(jax.make_jaxpr(example)(problem.leaves))


def _first_example(side: Side, spec: VMapSpec) -> tuple[Any, dict[str, Any]]:
    drop = lambda axis, leaf: leaf if axis < 0 else jnp.take(leaf, 0, axis=axis)
    x, kwargs = side.x, dict(side.kwargs)
    kwargs.update({k: tree_util.tree_map(drop, a, kwargs[k]) for k, a in spec.kwargs_axes.items()})
    return tree_util.tree_map(drop, spec.in_axes, x), kwargs


def has_convolution(jaxpr: Any) -> bool:
    """Whether a convolution is anywhere in a jaxpr."""
    for eqn in jaxpr.eqns:
        if eqn.primitive is primitives.conv_general_dilated_p:
            return True
        if any(has_convolution(inner) for inner in jex.jaxprs_in_params(eqn.params)):
            return True
    return False


def _output_by_output(problem: Problem, k: int, pair: PairAxes) -> Array:
    """Kernel of one leaf as a sum over its traced outputs, in a loop."""
    shape, batch = problem.side1.outputs[k].shape, problem.side1.vmap.out_axes[k]  # pyright: ignore
    count = pair.trace_size(shape)
    # The batch comes first, then the axes that are not traced, in their order.
    kept = [a for a in range(pair.ndim) if a != batch and a not in pair.trace]
    diagonal = tuple(1 + i for i, a in enumerate(kept) if a in pair.diagonal)
    inner = PairAxes(1 + len(kept), (), diagonal)

    def gradients(side: Side, o: Array) -> list[Array]:
        spec = side.vmap
        assert spec is not None
        one = spec.per_example(problem.f)
        below = lambda a: a - (a > batch)

        def example(x, kwargs):
            def chosen(leaves):
                y = jnp.moveaxis(
                    one(leaves, x, kwargs)[k],
                    [below(a) for a in pair.trace],
                    list(range(len(pair.trace))),
                )
                y = y.reshape(count, *y.shape[len(pair.trace) :])
                return [lax.dynamic_index_in_dim(y, o, keepdims=False)]

            output = side.outputs[k]
            rest = jax.ShapeDtypeStruct(tuple(output.shape[a] for a in kept), output.dtype)
            return batch_jacobians(chosen, problem.leaves, [rest])[0]

        return spec.map_examples(example, side.x, side.kwargs, out_axes=0)

    def term(o: Array) -> Array:
        mine = gradients(problem.side1, o)
        other = mine if problem.symmetric else gradients(problem.side2, o)
        return contract(mine, other, inner, (), problem.precision)

    outputs = jnp.arange(count, dtype=jnp.int32)
    result = jax.eval_shape(term, outputs[0])
    start = jnp.zeros(result.shape, result.dtype)
    total, _ = lax.scan(lambda total, o: (total + term(o), None), start, outputs)
    position = pair.position(batch)
    return jnp.moveaxis(total / count, (0, 1), (position, position + 1))


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

        def product(a: Array, b: Array, dtype: Any = dtype) -> Array:
            operands = (a, [*side1, parameter], b, [*side2, parameter], result)
            return jnp.einsum(*operands, precision=how, preferred_element_type=dtype)

        term = _in_blocks(product, flat1, flat2)
        total = term if total is None else total + term.astype(total.dtype)
    assert total is not None
    return total / max(axes.trace_size(shape), 1)


def _in_blocks(product: Callable[[Array, Array], Array], a: Array, b: Array) -> Array:
    """A contraction over the last axes; in blocks on a CPU, where it is long and narrow.

    XLA's CPU product of two (64, 2²¹) matrices copies one of them and reaches half the rate of the
    same product in blocks of 4096 (measured with JAX 0.10).
    """
    length, rows = a.shape[-1], math.prod(a.shape[:-1])
    if length < 2 * BLOCK or rows > 256 or not isinstance(a, jax.core.Tracer):
        return product(a, b)

    def blocks(a: Array, b: Array) -> Array:
        part = lambda i, m: lax.dynamic_slice_in_dim(m, i * BLOCK, BLOCK, axis=-1)
        whole = length // BLOCK
        first = product(a[..., whole * BLOCK :], b[..., whole * BLOCK :])
        step = lambda i, total: total + product(part(i, a), part(i, b))
        return lax.fori_loop(0, whole, step, first)

    return lax.platform_dependent(a, b, cpu=blocks, default=product)


def without_axis(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """A shape with one axis taken out."""
    return shape[:axis] + shape[axis + 1 :]
