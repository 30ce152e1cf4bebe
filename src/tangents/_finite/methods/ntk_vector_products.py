"""NTK-vector products: Θ column by column, Θ e = J₁ (J₂ᵀ e) (Novak et al. 2022, section 3.2).

A column is one backward pass at x2 and one forward-mode pass at x1; no contraction over parameters
is ever done. With independent examples the tangents of one example of x2 meet all examples of x1.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from tangents._core.axes import PairAxes
from tangents._core.typing import Array
from tangents._finite.methods.jacobian_contraction import batch_jacobians, without_axis
from tangents._finite.problem import Problem

TANGENTS = " tangents"
"""Key of the tangents among keyword arguments: no identifier, so none of a user's."""


def kernels(problem: Problem, axes: list[PairAxes]) -> list[Array]:
    """Kernel of each output leaf."""
    if problem.side1.vmap is None or problem.side2.vmap is None:
        return _whole_batch(problem, axes)
    return [_leaf_by_examples(problem, k, pair) for k, pair in enumerate(axes)]


def _whole_batch(problem: Problem, axes: list[PairAxes]) -> list[Array]:
    """Columns over the outputs of all examples of x2 at once: nothing is assumed of the batch."""
    _, push = jax.linearize(problem.run(problem.side1), problem.leaves)
    rows = batch_jacobians(problem.run(problem.side2), problem.leaves, problem.side2.outputs)
    result = []
    for k, pair in enumerate(axes):
        full = _columns(lambda tangents, k=k: push(tangents)[k], rows[k], pair.ndim)
        result.append(pair.reduce_full(full))
    return result


def _leaf_by_examples(problem: Problem, k: int, pair: PairAxes) -> Array:
    """Kernel of one output leaf, example by example; the batch axis is put back at the end."""
    spec1, spec2 = problem.side1.vmap, problem.side2.vmap
    assert spec1 is not None and spec2 is not None
    batch = spec1.out_axes[k]
    inner = pair.without(batch)
    one1, one2 = spec1.per_example(problem.f), spec2.per_example(problem.f)
    output = problem.side2.outputs[k]
    shape = jax.ShapeDtypeStruct(without_axis(output.shape, batch), output.dtype)

    def rows(x, kwargs):
        only = lambda leaves: [one2(leaves, x, kwargs)[k]]
        return batch_jacobians(only, problem.leaves, [shape])[0]

    def block(x, kwargs, tangents):
        _, push = jax.linearize(lambda leaves: one1(leaves, x, kwargs)[k], problem.leaves)
        return inner.reduce_full(_columns(push, tangents, inner.ndim))

    side1, side2 = problem.side1, problem.side2
    tangents = spec2.map_examples(rows, side2.x, side2.kwargs, out_axes=0)
    if batch in pair.pairs:
        # One example of x2 after the other meets all of x1, linearised as a batch: all pairs at
        # once would hold the activations' tangents of all pairs.
        _, push = jax.linearize(lambda leaves: problem.run(side1)(leaves)[k], problem.leaves)
        reduce_examples = jax.vmap(inner.reduce_full, in_axes=batch)
        column = lambda t: reduce_examples(_columns(push, t, inner.ndim))
        kernel = lax.map(column, tangents) if problem.is_traced else jax.vmap(column)(tangents)
        position = pair.position(batch)
        return jnp.moveaxis(kernel, (1, 0), (position, position + 1))
    # Only pairs of the same example are wanted: both sides go through their batch together.
    own = {**side1.kwargs, TANGENTS: tangents}
    joint = spec1.with_kwarg_axis(TANGENTS, tangents)
    kernel = joint.map_examples(
        lambda x, kw: block(x, {n: v for n, v in kw.items() if n != TANGENTS}, kw[TANGENTS]),
        side1.x,
        own,
        out_axes=0,
    )
    if batch in pair.trace:
        return jnp.sum(kernel, axis=0) / max(spec1.size, 1)
    return jnp.moveaxis(kernel, 0, pair.position(batch))


def _columns(push, tangents: list[Array], ndim2: int) -> Array:
    """`push` applied to every tangent: layout (outputs of side 1, outputs of side 2).

    `tangents` has one array a parameter leaf, `ndim2` output axes of side 2 in front.
    """
    shape2 = tangents[0].shape[:ndim2]
    count = math.prod(shape2)
    flat = [t.reshape(count, *t.shape[ndim2:]) for t in tangents]
    columns = jax.vmap(push, out_axes=-1)(flat)
    return columns.reshape(*columns.shape[:-1], *shape2)
