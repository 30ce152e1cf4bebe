"""The sum over weights: what a kernel is made of once the factors of every use are there."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from tangents._core.typing import Array
from tangents._finite.cost import Form
from tangents._finite.structure import contraction
from tangents._finite.structure.contraction import Factors, Layout, Products
from tangents._finite.structure.passes import Traced

BLOCKS = ((64, 4), (8, 2))
"""(examples, blocks): from so many examples on a symmetric kernel is made in so many block rows."""


@dataclass(frozen=True)
class SideTerms:
    """What one side brings: factors of its uses, gradients of the weights that need them."""

    factors: Sequence[Factors]
    gradients: dict[int, Array]

    @classmethod
    def of(
        cls, side: Traced, factors: Sequence[Factors], dense: set[int], layout: Layout
    ) -> SideTerms:
        """Of some examples and seeds."""
        return cls(factors, _gradients(side, factors, dense, layout) if dense else {})

    def part(self, start: int, stop: int) -> SideTerms:
        """Of some of the examples."""
        known: dict[int, Array] = {}

        def cut(array: Array) -> Array:
            # Uses that share a cotangent share its part too.
            if id(array) not in known:
                known[id(array)] = array[start:stop]
            return known[id(array)]

        gradients = {k: cut(g) for k, g in self.gradients.items()}
        return SideTerms([f.part(cut) for f in self.factors], gradients)


def kernel(
    side1: SideTerms,
    side2: SideTerms,
    forms: Sequence[Form],
    layout: Layout,
    *,
    symmetric: bool,
) -> Array:
    """The kernel in the order `layout.working`.

    Args:
        side1: factors and gradients of side 1.
        side2: the same object if both sides are one.
        forms: of each weight.
        layout: how examples meet.
        symmetric: both sides come from one function: a pair of uses (i, j) stands for (j, i) too.
    """
    products = Products(layout)
    total: Array | None = None
    for weight in sorted(set(side1.gradients) & set(side2.gradients)):
        term = contraction.multiply(side1.gradients[weight], side2.gradients[weight], layout)
        total = _plus(total, term)
    for form in forms:
        for i, j, name in form.pairs:
            product = products.gram if name == "gram" else products.crossed
            term = _term(product, side1.factors[i], side2.factors[j])
            total = _plus(total, term)
            if symmetric and i != j:
                if side1 is side2:
                    total = _plus(total, _transposed(term, layout))
                else:
                    total = _plus(total, _term(product, side1.factors[j], side2.factors[i]))
    if total is None:
        raise AssertionError("a kernel without a term")
    return total


def lower_triangle(side: SideTerms, forms: Sequence[Form], layout: Layout, examples: int) -> Array:
    """A symmetric kernel in block rows up to the diagonal; what is above it stays zero.

    The caller copies the lower triangle onto the upper one.
    """
    count = next((blocks for least, blocks in BLOCKS if examples >= least), 1)
    if count == 1:
        return kernel(side, side, forms, layout, symmetric=True)
    axis1 = layout.working.index(contraction.EXAMPLE1)
    axis2 = layout.working.index(contraction.EXAMPLE2)
    rows, edges = [], [examples * k // count for k in range(count + 1)]
    for start, stop in itertools.pairwise(edges):
        mine, before = side.part(start, stop), side.part(0, stop)
        row = kernel(mine, before, forms, layout, symmetric=True)
        widths = [(0, examples - stop if k == axis2 else 0) for k in range(row.ndim)]
        rows.append(jnp.pad(row, widths))
    return jnp.concatenate(rows, axis=axis1)


def _term(product, first: Factors, second: Factors) -> Array:
    match = contraction.matched(first.use, second.use)
    assert match is not None
    return product(first, second, match)


def _plus(total: Array | None, term: Array) -> Array:
    return term if total is None else total + term.astype(total.dtype)


def _transposed(kernel: Array, layout: Layout) -> Array:
    """The same kernel with its sides exchanged."""
    names = list(layout.working)
    other = {
        contraction.OUTPUT1: contraction.OUTPUT2,
        contraction.OUTPUT2: contraction.OUTPUT1,
    }
    if contraction.EXAMPLE2 in names:
        other |= {
            contraction.EXAMPLE1: contraction.EXAMPLE2,
            contraction.EXAMPLE2: contraction.EXAMPLE1,
        }
    return jnp.transpose(kernel, [names.index(other.get(k, k)) for k in names])


def _gradients(
    side: Traced, factors: Sequence[Factors], wanted: set[int], layout: Layout
) -> dict[int, Array]:
    """Per-example gradients of whole weights: (examples, traced, kept, output, entries)."""
    roots = side.analysis.roots
    by_root: dict[int, Array] = {}
    for f in factors:
        root = roots[f.use.root]
        if not root.weights & wanted or 0 in root.shape:
            continue
        flat = contraction.to_root(contraction.gradient(f, layout), f.use, root)
        known = by_root.get(f.use.root)
        by_root[f.use.root] = flat if known is None else known + flat
    computed = {k: g for k, g in by_root.items() if roots[k].ref is not None}
    result = {k: g for k, g in by_root.items() if roots[k].ref is None}
    if computed:
        for weight, pulled in _pull_prologue(side, computed).items():
            result[weight] = result[weight] + pulled if weight in result else pulled
    return result


def _pull_prologue(side: Traced, gradients: dict[int, Array]) -> dict[int, Array]:
    """Gradients in computed roots as gradients in the weights they are computed from."""
    roots = side.analysis.roots
    values, pullback = jax.vjp(side.execution.prologue, list(side.problem.leaves))
    lead = next(iter(gradients.values())).shape[:-1]

    def pull(rows: dict[int, Array]) -> list[Array]:
        full = {
            k: rows[k].reshape(v.shape).astype(v.dtype) if k in rows else jnp.zeros_like(v)
            for k, v in values.items()
        }
        return pullback(full)[0]

    flat = {k: g.reshape(-1, g.shape[-1]) for k, g in gradients.items()}
    pulled = jax.vmap(pull)(flat)
    touched = {w for k in gradients for w in roots[k].weights}
    return {w: pulled[w].reshape(*lead, -1) for w in touched}
