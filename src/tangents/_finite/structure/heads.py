"""The last layer: y = h U (+ b), whose uses have unit vectors for cotangents.

Two things follow for an output axis of V logits that comes from U (d × V):

* A use at the output has a known cotangent, ∂y_s/∂y = e_s: its terms need no backward pass, and no
  product of V × V unit vectors.
* Everything before has ∂y_v/∂θ = Σ_c U[c, v] ∂h_c/∂θ, of rank d in v. With Q (V × d) an orthonormal
  basis of the rows of U, the d outputs Qᵀy have J = Q (QᵀJ): backward passes of d cotangents (the
  columns of Q) instead of V, exactly; Σ_v over the logits is the sum over these d.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from tangents._core import precision
from tangents._core.typing import Array
from tangents._finite.structure.contraction import Factors, Layout, matched
from tangents._finite.structure.graph import Atom, Constant, Ref, Step

if TYPE_CHECKING:
    from tangents._finite.structure.analysis import Analysis, Use


@dataclass(frozen=True)
class Head:
    """The end of the network at one output leaf."""

    uses: frozenset[int]
    """Uses whose cotangent is a unit vector of the output."""
    axis: int | None = None
    """The output axis of the logits, if they are more than `rank`."""
    rank: int = 0
    weight: Atom | None = None
    """The value of U."""
    contracted: tuple[int, ...] = ()
    """Axes of U that meet h."""


def find(analysis: Analysis, leaf: int) -> Head:
    """The head at an output leaf; without uses and axis where there is none."""
    chain = _chain(analysis, leaf)
    uses = {use for index, _ in chain for use in analysis.plan.uses_at(index)}
    plain = {k for k in uses if _has_unit_cotangent(analysis.uses[k])}
    # A weight with another use needs the cotangents of both for their common terms.
    roots = analysis.roots
    others = [use for k, use in enumerate(analysis.uses) if k not in plain]
    elsewhere = {weight for use in others for weight in roots[use.root].weights}
    elsewhere |= {w for root in roots if root.ref is not None for w in root.weights}
    kept = frozenset(k for k in plain if not roots[analysis.uses[k].root].weights & elsewhere)
    if kept != uses or not chain or chain[-1][1].name != "dot_general":
        return Head(kept)
    return _compressed(analysis, leaf, chain[-1][1], kept)


def _chain(analysis: Analysis, leaf: int) -> list[tuple[int, Step]]:
    """The last steps, from the output back to a product, that move no entry."""
    graph = analysis.plan.graph
    readers = Counter(
        atom.number
        for atoms in (*(step.inputs for step in graph.steps), graph.outputs)
        for atom in atoms
        if not isinstance(atom, Constant)
    )
    makers = {r.number: (k, step) for k, step in enumerate(graph.steps) for r in step.outputs}
    atom, chain = graph.outputs[leaf], []
    while isinstance(atom, Ref) and readers[atom.number] == 1 and atom.number in makers:
        index, step = makers[atom.number]
        data = [k for k, a in enumerate(step.inputs) if analysis.plan.is_data(a)]
        if len(data) != 1:
            break
        given = step.inputs[data[0]]
        same = _without_ones(given.shape) == _without_ones(atom.shape)
        moves_nothing = step.name in ("squeeze", "reshape", "expand_dims") or (
            step.name in ("add", "add_any", "sub") and not (step.name == "sub" and data[0] == 1)
        )
        if step.name != "dot_general" and not (moves_nothing and same):
            break
        chain.append((index, step))
        if step.name == "dot_general":
            break
        atom = given
    return chain


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [n for n in shape if n != 1]


def _has_unit_cotangent(use: Use) -> bool:
    return not use.reason and use.factored.prepare is None and use.loops == 0


def _compressed(analysis: Analysis, leaf: int, product: Step, uses: frozenset[int]) -> Head:
    """With the axis of the logits, if they have fewer dimensions than entries."""
    contract, batch = product.params["dimension_numbers"]
    side = next(k for k, atom in enumerate(product.inputs) if not analysis.plan.is_data(atom))
    shape = product.inputs[side].shape
    free = [a for a in range(len(shape)) if a not in contract[side] and shape[a] != 1]
    rank = math.prod(shape[a] for a in contract[side])
    if batch[0] or len(free) != 1 or shape[free[0]] <= rank:
        return Head(uses)
    # Free axes of the left operand come first in a product.
    other = product.inputs[1 - side].shape
    before = 0
    if side == 1:
        before = sum(n != 1 for a, n in enumerate(other) if a not in contract[0])
    output = analysis.plan.graph.outputs[leaf].shape
    axis = [a for a, n in enumerate(output) if n != 1][before]
    return Head(uses, axis, rank, product.inputs[side], tuple(contract[side]))


def basis(head: Head, value: Array) -> Array:
    """Q (V × d): an orthonormal basis of the space that the rows of U span."""
    (free,) = (a for a in range(value.ndim) if a not in head.contracted and value.shape[a] != 1)
    order = [free, *(a for a in range(value.ndim) if a != free)]
    return _orthonormal(jnp.transpose(value, order).reshape(value.shape[free], -1))


@jax.custom_jvp
def _orthonormal(rows: Array) -> Array:
    """An orthonormal basis of the columns of a tall matrix."""
    q, _ = jnp.linalg.qr(rows.astype(precision.accumulator(rows.dtype)))
    return q.astype(rows.dtype)


@_orthonormal.defjvp
def _orthonormal_jvp(primals: Any, tangents: Any) -> Any:
    """DQ = (1 − Q Qᵀ) dA (QᵀA)⁺: the space moves as it does; its basis turns no further.

    The derivative of the factorisation itself is infinite where the columns are dependent (a last
    layer that starts at zero), though no kernel depends on the basis.
    """
    (rows,), (change,) = primals, tangents
    q = _orthonormal(rows)
    wide = lambda a: a.astype(precision.accumulator(rows.dtype))
    matmul = lambda a, b: jnp.matmul(wide(a), wide(b), precision=lax.Precision.HIGHEST)
    outside = wide(change) - matmul(q, matmul(q.T, change))
    return q, matmul(outside, jnp.linalg.pinv(matmul(q.T, rows))).astype(rows.dtype)


@dataclass(frozen=True)
class OutputAxes:
    """Output axes of one example, those of size one left out, and what becomes of each."""

    sizes: tuple[int, ...]
    kinds: tuple[str, ...]
    """'traced', 'kept' or 'paired'."""


@dataclass(frozen=True)
class _Names:
    """Names of the labels of one side: output axes, examples, and what is summed over."""

    labels: dict[int, Any]
    examples: list[Any]


def unit_term(
    first: Factors, second: Factors, layout: Layout, axes1: OutputAxes, axes2: OutputAxes
) -> Array:
    """The term of two uses at the output.

    G[s, y] = 1 where the label y is the output s: labels of cotangents are output axes, and an axis
    that is one of the weight too belongs to pairs of equal outputs only.

    Returns:
        Labels: examples (as in `layout.working`), kept axes, paired axes of side 1, of side 2.
    """
    match = matched(first.use, second.use)
    assert match is not None
    dtype = precision.accumulator(first.derivative.dtype)
    left = {label: (k, 1) for k, label in enumerate(_real(first.use))}
    right = {
        label: (k, 2 if axes1.kinds[k] == "paired" else 1)
        for k, label in enumerate(_real(second.use))
    }
    sizes: dict[Any, int] = {(k, 1): n for k, n in enumerate(axes1.sizes)}
    sizes |= {(k, 2): n for k, n in enumerate(axes2.sizes)}
    names1 = {label: ("first", label) for label in first.use.sizes} | left
    names2 = {label: ("second", label) for label in second.use.sizes} | right
    terms: list[tuple[Array, list[Any]]] = []
    for label2, label1 in match.items():
        if label1 not in left:
            names2[label2] = names1[label1]
        elif right[label2] != left[label1]:
            size = sizes[left[label1]]
            terms.append((jnp.eye(size, dtype=dtype), [left[label1], right[label2]]))
    sides = (
        (first, _Names(names1, [("example", k) for k in layout.examples1])),
        (second, _Names(names2, [("example", k) for k in layout.examples2])),
    )
    for factors, names in sides:
        sizes |= dict(zip(names.examples, factors.derivative.shape, strict=True))
        if factors.activation is not None:
            own = [*names.examples, *(names.labels[k] for k in factors.use.activation or ())]
            shape = factors.activation.shape
            kept = [k for k, n in enumerate(shape) if n != 1 or k < len(names.examples)]
            array = factors.activation.reshape([shape[k] for k in kept]).astype(dtype)
            terms.append((array, [own[k] for k in kept]))
    present = {name for _, own in terms for name in own}
    every = {name for _, names in sides for name in names.examples}
    wanted: list[Any] = [n for n in (("example", k) for k in layout.working) if n in every]
    kinds = list(enumerate(axes1.kinds))
    wanted += [(k, 1) for k, kind in kinds if kind == "kept"]
    wanted += [(k, side) for side in (1, 2) for k, kind in kinds if kind == "paired"]
    terms += [(jnp.ones(sizes[name], dtype), [name]) for name in wanted if name not in present]
    # Sums over what no factor depends on: traced outputs, and examples that are summed.
    summed = [(k, 1) for k, kind in kinds if kind == "traced"]
    summed += [name for name in every if name not in wanted]
    times = math.prod(sizes[name] for name in summed if name not in present)
    if not terms:
        return jnp.asarray(times, dtype)
    number = {name: k for k, name in enumerate(dict.fromkeys(n for _, own in terms for n in own))}
    operands = [part for array, own in terms for part in (array, [number[n] for n in own])]
    term = jnp.einsum(*operands, [number[n] for n in wanted], precision=layout.precision)
    return term * times if times != 1 else term


def _real(use: Use) -> list[int]:
    """Labels of the cotangent that are axes of the output, but for those of size one."""
    return [label for label in use.cotangent if use.sizes[label] != 1]


def is_unit_pair(first: Use, second: Use, axes: int) -> bool:
    """Whether `unit_term` applies to two uses at an output of so many axes (not of size one)."""
    match = matched(first, second)
    if match is None or first.factored.rows or second.factored.rows:
        return False
    left, right = _real(first), _real(second)
    for label2, label1 in match.items():
        if (label2 in right) != (label1 in left):
            return False
        if label2 in right and right.index(label2) != left.index(label1):
            return False
    return len(left) == len(right) == axes
