"""The sum over weights: what a kernel is made of once the factors of every use are there."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from tangents._core.typing import Array
from tangents._finite.cost import Form, Slices
from tangents._finite.structure import contraction
from tangents._finite.structure.contraction import Factors, Layout, Products, Term, flat_labels
from tangents._finite.structure.passes import Passes, Traced

BLOCKS = ((64, 4), (16, 2))
"""(examples, parts): from so many examples on a symmetric kernel is made in blocks of parts."""

SMALL = 1 / 16
"""Of the entries of all gradients: a weight with no more is joined with others."""


@dataclass(frozen=True)
class SideTerms:
    """What one side brings: factors of its uses, gradients of the weights that need them."""

    factors: dict[int, Factors]
    """Of the uses of the other weights."""
    gradients: dict[int, Term]
    """See `contraction.multiply`."""

    @classmethod
    def of(
        cls, side: Traced, factors: Sequence[Factors], dense: set[int], layout: Layout
    ) -> SideTerms:
        """Of some examples and seeds."""
        gradients = _gradients(side, factors, dense, layout) if dense else {}
        return cls({k: factors[k] for k in _others(side, dense)}, gradients)

    @classmethod
    def by_parts(
        cls,
        side: Traced,
        passes: Passes,
        size: int,
        factors_of: Callable[[Passes], list[Factors]],
        dense: set[int],
        layout: Layout,
        *,
        one_sided: bool,
    ) -> SideTerms:
        """The same, gradients made of so many examples at a time.

        What is held of all examples is their gradients, and cotangents of the other weights.
        Gradients that only meet themselves (`one_sided`) may have their entries in any order: those
        of small weights are one vector, and one product in place of one for each weight.
        """
        uses, rest = side.analysis.uses, _others(side, dense)
        summed = {contraction.EXAMPLE1, contraction.TRACED}
        labels: dict[int, tuple[int, ...]] = {}
        shapes: dict[int, tuple[int, ...]] = {}

        def one(part: Passes) -> tuple[dict[int, Array], dict[int, Array]]:
            factors = factors_of(part)
            found = _gradients(side, factors, dense, layout)
            if one_sided and all(
                k in summed or k >= contraction.FIRST for _, own in found.values() for k in own
            ):
                found = _joined(found, layout)
            labels.update({k: own for k, (_, own) in found.items()})
            cotangents = {uses[k].probe: factors[k].derivative for k in rest}
            arrays = {k: array for k, (array, _) in found.items()}
            shapes.update({k: array.shape for k, array in arrays.items()})
            return {k: a.reshape(a.shape[0], -1) for k, a in arrays.items()}, cotangents

        arrays, cotangents = passes.over_parts(size, one)

        def joined(stack: Array) -> Array:
            if stack.shape[1] < size:  # the same for all examples
                return stack[0]
            return stack.reshape(-1, *stack.shape[2:])

        def gradient(k: int) -> Term:
            array = joined(arrays[k])
            return array.reshape(array.shape[0], *shapes[k][1:]), labels[k]

        whole = {k: joined(c) for k, c in cotangents.items()}
        factors = {
            k: Factors(uses[k], passes.kept.get(k), whole[uses[k].probe], True) for k in rest
        }
        return cls(factors, {k: gradient(k) for k in arrays})

    def part(self, start: int, stop: int) -> SideTerms:
        """Of some of the examples."""
        known: dict[int, Array] = {}

        def cut(array: Array) -> Array:
            if array.shape[0] == 1:
                return array  # the same for all examples
            # Uses that share a cotangent share its part too.
            if id(array) not in known:
                known[id(array)] = array[start:stop]
            return known[id(array)]

        gradients = {k: (cut(g), labels) for k, (g, labels) in self.gradients.items()}
        return SideTerms({k: f.part(cut) for k, f in self.factors.items()}, gradients)


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
        for part in form.slices:
            total = _plus(total, _in_slices(side1, side2, part, layout))
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
    """A symmetric kernel in blocks up to the diagonal; what is above it stays zero.

    Each part of the examples is cut out once, for XLA copies what is cut out: rows of blocks at
    once, of a part with all before it, took 3 to 8 % longer and held 1.5 times as much.

    The caller copies the lower triangle onto the upper one.
    """
    count = next((blocks for least, blocks in BLOCKS if examples >= least), 1)
    if count == 1:
        return kernel(side, side, forms, layout, symmetric=True)
    axis1 = layout.working.index(contraction.EXAMPLE1)
    axis2 = layout.working.index(contraction.EXAMPLE2)
    edges = [examples * k // count for k in range(count + 1)]
    parts = [side.part(start, stop) for start, stop in itertools.pairwise(edges)]
    sizes = [stop - start for start, stop in itertools.pairwise(edges)]
    rows = []
    for k, mine in enumerate(parts):
        blocks = []
        for other, size in zip(parts[: k + 1], sizes[: k + 1], strict=True):
            block = kernel(mine, other, forms, layout, symmetric=True)
            blocks.append(spread(block, layout, sizes[k], size))
        row = jnp.concatenate(blocks, axis=axis2)
        widths = [(0, examples - row.shape[axis2] if a == axis2 else 0) for a in range(row.ndim)]
        rows.append(jnp.pad(row, widths))
    return jnp.concatenate(rows, axis=axis1)


def spread(kernel: Array, layout: Layout, examples1: int, examples2: int) -> Array:
    """A kernel that is the same for all examples of a side, repeated for each of them."""
    sizes = {contraction.EXAMPLE1: examples1, contraction.EXAMPLE2: examples2}
    shape = zip(layout.working, kernel.shape, strict=True)
    return jnp.broadcast_to(kernel, [sizes.get(label, n) for label, n in shape])


def _in_slices(side1: SideTerms, side2: SideTerms, cut: Slices, layout: Layout) -> Array:
    """The term of some uses of a weight: a sum over slices of the products of their gradients."""
    size = cut.axis[0]
    labels = flat_labels(layout)

    def gradients(side: SideTerms, uses: Sequence[int]):
        views = [contraction.along(side.factors[k], cut.axis) for k in uses]

        def of_slice(start: Array | int, width: int) -> Array:
            return sum(contraction.gradient_in_order(view(start, width), layout) for view in views)  # pyright: ignore

        return of_slice

    mine = gradients(side1, cut.uses1)
    other = mine if side1 is side2 else gradients(side2, cut.uses2)

    def product(start: Array | int, width: int) -> Array:
        first = mine(start, width)
        second = first if other is mine else other(start, width)
        return contraction.multiply((first, labels), (second, labels), layout)

    count, rest = divmod(size, cut.width)
    total = product(count * cut.width, rest) if rest else None
    if count == 1:
        return _plus(total, product(0, cut.width))
    if total is None:
        shape = jax.eval_shape(lambda: product(0, cut.width))
        total = jnp.zeros(shape.shape, shape.dtype)
    step = lambda total, start: (total + product(start, cut.width), None)
    starts = jnp.arange(count, dtype=jnp.int32) * cut.width
    return lax.scan(step, total, starts)[0]


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


def _others(side: Traced, dense: set[int]) -> list[int]:
    """Uses of weights whose gradients are not made as a whole."""
    roots = side.analysis.roots
    uses = enumerate(side.analysis.uses)
    return [k for k, use in uses if not roots[use.root].weights & dense]


def _gradients(
    side: Traced, factors: Sequence[Factors], wanted: set[int], layout: Layout
) -> dict[int, Term]:
    """Per-example gradients of whole weights, in the labels of side 1."""
    roots = side.analysis.roots
    by_root: dict[int, list[Factors]] = {}
    for f in factors:
        root = roots[f.use.root]
        if root.weights & wanted and 0 not in root.shape:
            by_root.setdefault(f.use.root, []).append(f)
    result: dict[int, Term] = {}
    flat: dict[int, Array] = {}
    pulled = {w for k in by_root if roots[k].ref is not None for w in roots[k].weights}
    for k, uses in by_root.items():
        term = None
        if len(uses) == 1 and roots[k].ref is None and k not in pulled:
            term = contraction.unordered_gradient(uses[0], roots[k], layout)
        if term is not None:
            result[k] = term
            continue
        for f in uses:
            rows = contraction.to_root(contraction.gradient(f, layout), f.use, roots[k])
            flat[k] = flat[k] + rows if k in flat else rows
    computed = {k: g for k, g in flat.items() if roots[k].ref is not None}
    whole = {k: g for k, g in flat.items() if roots[k].ref is None}
    if computed:
        for weight, more in _pull_prologue(side, computed).items():
            whole[weight] = whole[weight] + more if weight in whole else more
    labels = flat_labels(layout)
    return result | {k: (g, labels) for k, g in whole.items()}


def _joined(gradients: dict[int, Term], layout: Layout) -> dict[int, Term]:
    """The same, the small ones as one gradient whose entries are those of each in turn."""
    entries = {k: math.prod(array.shape[1:]) for k, (array, _) in gradients.items()}
    small = [k for k, n in entries.items() if n <= SMALL * sum(entries.values())]
    if len(small) < 2:
        return gradients
    arrays = [gradients[k][0] for k in small]
    examples = max(array.shape[0] for array in arrays)
    dtype = functools.reduce(jnp.promote_types, (array.dtype for array in arrays))
    rows = [
        jnp.broadcast_to(array, (examples, *array.shape[1:])).reshape(examples, -1).astype(dtype)
        for array in arrays
    ]
    one = jnp.concatenate(rows, axis=1), (*layout.examples1, contraction.FIRST)
    return {k: term for k, term in gradients.items() if k not in small} | {small[0]: one}


def _pull_prologue(side: Traced, gradients: dict[int, Array]) -> dict[int, Array]:
    """Gradients in computed roots as gradients in the weights they are computed from."""
    roots = side.analysis.roots
    values, pullback = jax.vjp(side.execution.prologue, list(side.problem.leaves))
    lead = jnp.broadcast_shapes(*(g.shape[:-1] for g in gradients.values()))
    gradients = {k: jnp.broadcast_to(g, (*lead, g.shape[-1])) for k, g in gradients.items()}

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
