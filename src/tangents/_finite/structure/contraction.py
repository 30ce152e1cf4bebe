"""Kernels from factors: the derivative of each use is kept as activation and cotangent.

A pair of uses of one weight adds

    Σ_w (Σ_p A₁[n,w,p] G₁[n,s,w,p]) (Σ_p′ A₂[m,w,p′] G₂[m,s′,w,p′])

with n, m examples and s, s′ seeds (outputs). Either the inner sums are taken first (*outer*: the
gradients of every example are made, and multiplied), or the sums over labels of the weight that
only one factor has (*gram*: products of activations and of cotangents, at each pair of positions).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tangents._core import precision
from tangents._core.typing import Array
from tangents._finite.structure.analysis import Root, Use
from tangents._finite.structure.views import contiguous, disjoint

# Labels beside those of the uses, which are shifted below them.
EXAMPLE1, EXAMPLE2, TRACED, KEPT, OUTPUT1, OUTPUT2 = range(6)
SEEDS1, SEEDS2 = (TRACED, KEPT, OUTPUT1), (TRACED, KEPT, OUTPUT2)
FIRST = 6

Term = tuple[Array, tuple[int, ...]]
"""An array and the labels of its axes."""


@dataclass(frozen=True)
class Layout:
    """How examples and seeds of both sides meet in a kernel."""

    mapped: bool
    """Whether arrays have an axis of examples in front."""
    same_examples: bool
    """Whether only pairs of one example are wanted."""
    sum_examples: bool
    """Whether these are summed."""
    precision: lax.Precision

    @property
    def examples1(self) -> tuple[int, ...]:
        return (EXAMPLE1,) if self.mapped else ()

    @property
    def examples2(self) -> tuple[int, ...]:
        return (EXAMPLE1 if self.same_examples else EXAMPLE2,) if self.mapped else ()

    @property
    def result(self) -> tuple[int, ...]:
        """Labels of a kernel: examples, kept seeds, then pairs of outputs."""
        if not self.mapped or self.sum_examples:
            examples = ()
        else:
            examples = (EXAMPLE1,) if self.same_examples else (EXAMPLE1, EXAMPLE2)
        return (*examples, KEPT, OUTPUT1, OUTPUT2)

    @property
    def working(self) -> tuple[int, ...]:
        """The same labels in the order in which matrix products leave them."""
        both = tuple(k for k in (EXAMPLE1, KEPT) if k in self.result and k in self._shared)
        rest = [k for k in (EXAMPLE1, OUTPUT1, EXAMPLE2, OUTPUT2) if k in self.result]
        return (*both, *(k for k in rest if k not in both))

    @property
    def _shared(self) -> tuple[int, ...]:
        """Labels of both sides."""
        return (EXAMPLE1, TRACED, KEPT) if self.same_examples else (TRACED, KEPT)


@dataclass(frozen=True)
class Factors:
    """The two factors of a use on one side."""

    use: Use
    kept: Array | None
    """What the forward pass kept: (examples, loops, ...)."""
    derivative: Array
    """The network's in the probe: (examples, traced, kept, output, loops, ...).

    Of size one along the examples where it is the same for all of them.
    """
    mapped: bool
    sizes: dict[int, int] = field(default_factory=dict)
    """Of labels of which this is a slice."""
    constant: frozenset[int] = frozenset()
    """Axes of the probe along which the derivative is constant."""

    def __post_init__(self):
        """An activation that is missing would count as one."""
        assert (self.kept is None) == (self.use.activation is None)

    @cached_property
    def activation(self) -> Array | None:
        """A: (examples, labels of the use's activation)."""
        expand = self.use.factored.expand
        if self.kept is None or expand is None:
            return self.kept
        return over_leading(expand, self.kept, self.mapped + self.use.loops)

    @cached_property
    def cotangent(self) -> Array:
        """G: (examples, traced, kept, output, labels of the use's cotangent).

        Of size one along positions where it is constant, and over which A is then summed.
        """
        prepare = self.use.factored.prepare
        if prepare is None:
            return self._one_of_equals(self.derivative)
        return over_leading(prepare, self.derivative, self.mapped + 3 + self.use.loops)

    def _one_of_equals(self, array: Array) -> Array:
        use, lead = self.use, self.mapped + 3
        read = () if use.activation is None or use.factored.rows else use.activation
        own = {label for label, _, _ in use.weight}
        for axis, label in enumerate(use.cotangent):
            size = array.shape[lead + axis]
            if axis not in self.constant or size == 1 or label not in read or label in own:
                continue
            assert self.activation is not None
            # One of size one would stand for all positions, and not be summed over them.
            if self.activation.shape[self.mapped + read.index(label)] == size:
                array = lax.slice_in_dim(array, 0, 1, axis=lead + axis)
        return array

    def part(self, cut: Callable[[Array], Array]) -> Factors:
        """Of some of the examples; what is expanded or prepared is so once, for all of them."""
        kept = None if self.kept is None else cut(self.kept)
        part = Factors(self.use, kept, cut(self.derivative), self.mapped)
        if not self.use.factored.rows and self.activation is not None:
            part.__dict__["activation"] = cut(self.activation)
        part.__dict__["cotangent"] = cut(self.cotangent)
        return part


def over_leading(function, array: Array, count: int) -> Array:
    """`function` applied to each entry of the first `count` axes."""
    for _ in range(count):
        function = jax.vmap(function)
    return function(array)


def contract(operands: Sequence[Term], result: Sequence[int], how: lax.Precision) -> Array:
    """A sum of products of one or two arrays over labels, accumulated in at least float32."""
    sizes = _sizes(operands)
    array, labels = _merged(operands, result, how)
    array = _ordered(array, labels, [k for k in result if sizes.get(k, 1) != 1])
    return array.reshape([sizes.get(k, 1) for k in result])


def _sizes(operands: Sequence[Term]) -> dict[int, int]:
    """Of each label; an axis of size one stands for any size (see `Factors.derivative`)."""
    sizes: dict[int, int] = {}
    for array, labels in operands:
        for k, n in zip(labels, array.shape, strict=True):
            sizes[k] = n if sizes.get(k, 1) == 1 else sizes[k]
    return sizes


def _merged(operands: Sequence[Term], result: Collection[int], how: lax.Precision) -> Term:
    """The same with labels in whatever order is cheapest, those of size one left out.

    As one matrix product (or a batch of them, for labels that both arrays and the result have) of
    arrays whose axes are merged: XLA's library products on a CPU want matrices, and axes of size
    one between the others cost a copy each.
    """
    dtype = operands[0][0].dtype
    for array, _ in operands[1:]:
        dtype = jnp.promote_types(dtype, array.dtype)
    dtype = precision.accumulator(dtype)
    terms = [_without_ones(array.astype(dtype), labels) for array, labels in operands]
    if len(terms) == 1:
        return _summed(*terms[0], result)
    in_both = {*terms[0][1]} & {*terms[1][1]}
    a, b = (_summed(*term, {*result, *in_both}) for term in terms)
    return _product(a, b, tuple(result), how)


def _without_ones(array: Array, labels: Sequence[int]) -> Term:
    """The same array without axes of size one."""
    kept = [(n, k) for n, k in zip(array.shape, labels, strict=True) if n != 1]
    return array.reshape([n for n, _ in kept]), tuple(k for _, k in kept)


def _summed(array: Array, labels: tuple[int, ...], keep: Collection[int]) -> Term:
    """Labels that nothing else has are summed over."""
    gone = tuple(axis for axis, k in enumerate(labels) if k not in keep)
    if not gone:
        return array, labels
    return jnp.sum(array, axis=gone), tuple(k for k in labels if k in keep)


def _ordered(array: Array, labels: tuple[int, ...], order: Sequence[int]) -> Array:
    """Axes in another order."""
    if labels == tuple(order):
        return array
    return jnp.transpose(array, [labels.index(k) for k in order])


def _product(a: Term, b: Term, wanted: tuple[int, ...], how: lax.Precision) -> Term:
    """A matrix product, or a product entry by entry where no label is summed over."""
    (left, left_labels), (right, right_labels) = a, b
    common = [k for k in left_labels if k in right_labels]
    summed = [k for k in common if k not in wanted]
    if not summed:
        # In the order of the larger array: only the smaller one is spread out.
        large, small = (a, b) if left.size >= right.size else (b, a)
        names = (*large[1], *(k for k in small[1] if k not in large[1]))
        if all(k in large[1] for k in small[1]):
            return large[0] * spread(small, names), names
        names = tuple(k for k in wanted if k in left_labels or k in right_labels)
        return spread(a, names) * spread(b, names), names
    batch = [k for k in common if k in wanted]
    large, small = (a, b) if len(left_labels) >= len(right_labels) else (b, a)
    if batch and all(k in large[1] for k in small[1]):
        # A product of vectors for each entry of the batch, such as the gradient of a scale: as a
        # product of matrices both would be transposed first.
        return _summed(large[0] * spread(small, large[1]), large[1], wanted)
    rows = [k for k in left_labels if k not in common]
    columns = [k for k in right_labels if k not in common]
    sizes = dict(zip(left_labels, left.shape)) | dict(zip(right_labels, right.shape))
    volume = lambda labels: math.prod(sizes[k] for k in labels)

    def matrices(array: Array, labels: tuple[int, ...], free: list[int]) -> tuple[Array, int]:
        """(batch, free, summed) or (batch, summed, free), whichever needs no transposition.

        Where both do, the last axis stays the last: whole rows are copied, not single numbers.
        """
        swapped = labels == (*batch, *summed, *free)
        if labels != (*batch, *free, *summed) and labels and labels[-1] in free:
            swapped = True
        order = (*batch, *summed, *free) if swapped else (*batch, *free, *summed)
        shape = [volume(summed), volume(free)] if swapped else [volume(free), volume(summed)]
        lead = [volume(batch)] if batch else []
        return _ordered(array, labels, order).reshape([*lead, *shape]), int(not swapped)

    first, axis1 = matrices(left, left_labels, rows)
    second, axis2 = matrices(right, right_labels, columns)
    if not axis1 and volume(rows) > volume(columns):
        # XLA's library product of transposed matrices takes up to twice as long the other way.
        first, axis1, rows, second, axis2, columns = second, axis2, columns, first, axis1, rows
    lead = 1 if batch else 0
    numbers = (((lead + axis1,), (lead + axis2,)), ((0,), (0,)) if batch else ((), ()))
    product = lax.dot_general(
        first, second, numbers, precision=how, preferred_element_type=first.dtype
    )
    labels = (*batch, *rows, *columns)
    return product.reshape([sizes[k] for k in labels]), labels


def gradient(f: Factors, layout: Layout) -> Array:
    """Per-example gradient in the use's weight labels: (examples, traced, kept, output, labels)."""
    examples = (EXAMPLE1,) if layout.mapped else ()
    use = f.use
    result = (*examples, *SEEDS1, *(FIRST + _code(use, label) for label, _, _ in use.weight))
    return contract(_operands(f, layout), result, layout.precision)


def _operands(f: Factors, layout: Layout) -> list[Term]:
    """What the gradient is the contraction of: A and G, or of a one-hot what it makes of G."""
    examples = (EXAMPLE1,) if layout.mapped else ()
    use = f.use
    if use.factored.rows:
        return [_scattered(f, layout)]
    operands = [(f.cotangent, (*examples, *SEEDS1, *_codes(use, use.cotangent)))]
    if f.activation is not None:
        assert use.activation is not None
        operands.insert(0, (f.activation, (*examples, *_codes(use, use.activation))))
    return operands


def _scattered(f: Factors, layout: Layout) -> Term:
    """The gradient of rows that data choose: rows of G added up where they were read.

    Labels beside those of the weight may remain; they are to be summed over.
    """
    use, chosen = f.use, f.use.factored.rows
    assert f.kept is not None and use.activation is not None
    examples = (EXAMPLE1,) if layout.mapped else ()
    own = {label for label, _, _ in use.weight}
    where = use.activation[: len(use.activation) - len(chosen)]
    # A stack that a loop goes through has the loop's axis itself.
    stacked = tuple(k for k in where if k in own)
    summed = tuple(k for k in where if k not in own)
    rest = tuple(k for k in use.cotangent if k not in where)
    sizes = use.sizes | f.sizes
    lead = [*f.kept.shape[: len(examples)], *(sizes[k] for k in stacked)]
    rows = math.prod(sizes[k] for k in chosen)

    labels = (*examples, *SEEDS1, *_codes(use, use.cotangent))
    order = (*examples, *_codes(use, (*stacked, *summed)), *SEEDS1, *_codes(use, rest))
    g = _ordered(f.cotangent, labels, order)
    g = g.astype(precision.accumulator(g.dtype))
    window = g.shape[len(examples) + len(where) :]
    g = jnp.broadcast_to(g, (*lead, *(sizes[k] for k in summed), *window))
    index = _ordered(f.kept, (*examples, *_codes(use, where)), order[: len(examples) + len(where)])
    total = math.prod(lead) * rows
    first = jnp.arange(math.prod(lead), dtype=index.dtype) * rows
    first = first.reshape(*lead, *[1] * len(summed))
    index = jnp.where(index < 0, total, index + first).reshape(-1)  # out of bounds: dropped
    zeros = jnp.zeros((total, math.prod(window)), g.dtype)
    added = zeros.at[index].add(g.reshape(-1, math.prod(window)), mode="drop")
    result = (*examples, *_codes(use, (*stacked, *chosen)), *SEEDS1, *_codes(use, rest))
    return added.reshape(*lead, *(sizes[k] for k in chosen), *window), result


def along(f: Factors, axis: tuple[int, int]) -> Callable[[Array | int, int], Factors]:
    """Factors of slices (start, width) of the weight along the axis of this (size, stride)."""
    use = f.use
    (label,) = (name for name, *where in use.weight if tuple(where) == axis)
    # Made here, not where a slice is cut: that may be inside a loop.
    whole: dict[str, tuple[Array | None, int | None]] = {}
    for name, labels, lead in (
        ("activation", use.activation, f.mapped),
        ("cotangent", use.cotangent, f.mapped + 3),
    ):
        if name == "activation" and use.factored.rows:
            continue  # not made
        place = lead + labels.index(label) if labels is not None and label in labels else None
        whole[name] = getattr(f, name), place

    def part(start: Array | int, width: int) -> Factors:
        if use.factored.rows:
            kept = _rows_within(f, label, start, width)
            result = Factors(use, kept, f.derivative, f.mapped, {label: width})
        else:
            result = Factors(use, f.kept, f.derivative, f.mapped)
        for name, (array, place) in whole.items():
            if array is not None and place is not None:
                array = lax.dynamic_slice_in_dim(array, start, width, place)
            result.__dict__[name] = array
        return result

    return part


def _rows_within(f: Factors, label: int, start: Array | int, width: int) -> Array:
    """The rows that were read, numbered in a slice of one of the axes they are chosen along."""
    use, chosen = f.use, f.use.factored.rows
    assert f.kept is not None and use.activation is not None
    if label not in chosen:
        where = use.activation[: len(use.activation) - len(chosen)]
        if label not in where:
            return f.kept
        return lax.dynamic_slice_in_dim(f.kept, start, width, f.mapped + where.index(label))
    count = use.sizes[label]
    below = math.prod(use.sizes[k] for k in chosen[chosen.index(label) + 1 :])
    at = f.kept // below % count - start
    row = (f.kept // (below * count) * width + at) * below + f.kept % below
    return jnp.where((f.kept >= 0) & (at >= 0) & (at < width), row, -1)


def gradient_in_order(f: Factors, layout: Layout) -> Array:
    """Per-example gradient in the entries of a use: (examples, traced, kept, output, entries).

    Uses of the same entries have them in the same order.
    """
    rows = gradient(f, layout)
    lead = rows.ndim - len(f.use.weight)
    order = sorted(range(len(f.use.weight)), key=lambda k: f.use.weight[k][1:])
    rows = jnp.transpose(rows, (*range(lead), *(lead + k for k in order)))
    return rows.reshape(*rows.shape[:lead], math.prod(rows.shape[lead:]))


def _code(use: Use, label: int) -> int:
    """Labels of a use as non-negative integers: loops (negative) come first."""
    return label + use.loops


def _codes(use: Use, labels: Sequence[int]) -> tuple[int, ...]:
    return tuple(FIRST + _code(use, label) for label in labels)


def to_root(gradient: Array, use: Use, root: Root) -> Array:
    """A gradient in a use's labels as one in all entries of its root, flattened."""
    lead = gradient.ndim - len(use.weight)
    order = sorted(range(len(use.weight)), key=lambda k: -use.weight[k][2])
    gradient = jnp.transpose(gradient, (*range(lead), *(lead + k for k in order)))
    sizes = [use.weight[k][1] for k in order]
    strides = [use.weight[k][2] for k in order]
    flat = gradient.reshape(*gradient.shape[:lead], math.prod(sizes))
    total = math.prod(root.shape)
    if math.prod(sizes) == total and use.offset == 0 and tuple(strides) == contiguous(sizes):
        return flat
    index = np.full(sizes, use.offset)
    for k, (size, stride) in enumerate(zip(sizes, strides, strict=True)):
        along = [1] * len(sizes)
        along[k] = size
        index = index + (np.arange(size) * stride).reshape(along)
    zeros = jnp.zeros((*flat.shape[:lead], total), flat.dtype)
    return zeros.at[..., index.reshape(-1)].add(flat)


def unordered_gradient(f: Factors, root: Root, layout: Layout) -> Term | None:
    """`gradient` with its axes as the product leaves them; None where it is not all of the root.

    Labels: of examples, in front, those of `SEEDS1`, and FIRST + 1 + k for the k-th axis of the
    weight by stride; labels of size one, but for the examples, are left out.
    """
    use = f.use
    order = sorted(range(len(use.weight)), key=lambda k: -use.weight[k][2])
    sizes = [use.weight[k][1] for k in order]
    strides = tuple(use.weight[k][2] for k in order)
    if use.offset or math.prod(sizes) != math.prod(root.shape) or strides != contiguous(sizes):
        return None
    examples = (EXAMPLE1,) if layout.mapped else ()
    names = {_code(use, use.weight[k][0]) + FIRST: FIRST + 1 + n for n, k in enumerate(order)}
    wanted = (*examples, *SEEDS1, *names)
    array, labels = _merged(_operands(f, layout), wanted, layout.precision)
    if layout.mapped:
        if EXAMPLE1 not in labels:
            array, labels = array[None], (EXAMPLE1, *labels)
        front = (EXAMPLE1, *(k for k in labels if k != EXAMPLE1))
        array, labels = _ordered(array, labels, front), front
    return array, tuple(names.get(k, k) for k in labels)


def multiply(first: Term, second: Term, layout: Layout) -> Array:
    """Σ_w J₁ J₂ of gradients, with one flat weight axis (labels of side 1) or unordered."""
    of_weight = [{k for k in labels if k >= FIRST} for _, labels in (first, second)]
    if of_weight[0] != of_weight[1]:
        first, second = _flat(first, layout), _flat(second, layout)
    other = dict(zip(SEEDS1, SEEDS2, strict=True)) | dict(
        zip(layout.examples1, layout.examples2, strict=True)
    )
    renamed = second[0], tuple(other.get(k, k) for k in second[1])
    return contract([first, renamed], layout.working, layout.precision)


def flat_labels(layout: Layout) -> tuple[int, ...]:
    """Labels of a gradient with one flat axis for the weight."""
    return (*layout.examples1, *SEEDS1, FIRST)


def _flat(term: Term, layout: Layout) -> Term:
    """A gradient with one flat axis for the weight."""
    labels = flat_labels(layout)
    weight = sorted(k for k in term[1] if k >= FIRST)
    array = contract([term], (*labels[:-1], *weight), layout.precision)
    return array.reshape(*array.shape[: len(labels) - 1], -1), labels


def matched(first: Use, second: Use) -> dict[int, int] | None:
    """Labels of `second` that are the same axis of the weight as labels of `first`.

    None if the two do not use the same entries along the same axes.
    """
    if first.offset != second.offset or len(first.weight) != len(second.weight):
        return None
    axes = {(size, stride): label for label, size, stride in first.weight}
    if len(axes) < len(first.weight):
        return None
    if set(axes) != {(size, stride) for _, size, stride in second.weight}:
        return None
    return {label: axes[size, stride] for label, size, stride in second.weight}


def same_rows(first: Use, second: Use, match: dict[int, int]) -> bool:
    """Whether both are rows that data choose, and equal numbers of rows are the same entries."""
    rows1, rows2 = ([k for k in u.factored.rows if u.sizes[k] > 1] for u in (first, second))
    both = bool(first.factored.rows) and bool(second.factored.rows)
    return both and [match.get(k) for k in rows2] == rows1


def apart(first: Use, second: Use, root: Root) -> bool:
    """Whether two uses surely touch different entries of their root."""
    return disjoint(root.shape, first.entries, second.entries)


@dataclass(frozen=True)
class PairLabels:
    """The four factors of a pair of uses, labelled: A₁, G₁, A₂, G₂."""

    activation1: tuple[int, ...]
    cotangent1: tuple[int, ...]
    activation2: tuple[int, ...]
    cotangent2: tuple[int, ...]
    sizes: dict[int, int]


def label_pair(first: Use, second: Use, match: dict[int, int], layout: Layout) -> PairLabels:
    """One label for each axis of the weight, two for each position."""
    fresh = itertools.count(FIRST)
    names1 = {label: next(fresh) for label in first.sizes}
    names2 = {
        label: names1[match[label]] if label in match else next(fresh) for label in second.sizes
    }
    sizes = {names1[k]: n for k, n in first.sizes.items()}
    sizes |= {names2[k]: n for k, n in second.sizes.items()}
    return PairLabels(
        (*layout.examples1, *(names1[k] for k in first.activation or ())),
        (*layout.examples1, *SEEDS1, *(names1[k] for k in first.cotangent)),
        (*layout.examples2, *(names2[k] for k in second.activation or ())),
        (*layout.examples2, *SEEDS2, *(names2[k] for k in second.cotangent)),
        sizes,
    )


class Products:
    """Terms of pairs of uses; what several of them have in common is computed once."""

    def __init__(self, layout: Layout):
        """For one block of a kernel."""
        self.layout = layout
        self._known: dict[Any, tuple[Term, Any]] = {}

    def gram(self, first: Factors, second: Factors, match: dict[int, int]) -> Array:
        """The term of a pair of uses by products of activations and of cotangents."""
        labels = label_pair(first.use, second.use, match, self.layout)
        cotangents: list[Term] = [
            (first.cotangent, labels.cotangent1),
            (second.cotangent, labels.cotangent2),
        ]
        if same_rows(first.use, second.use, match):
            a, b = _chosen(first, labels.activation1), _chosen(second, labels.activation2)
            names = (*a[1], *(k for k in b[1] if k not in a[1]))
            same = spread(a, names) == spread(b, names)
            present = spread(a, names) >= 0
            activations: list[Term] = [((same & present).astype(cotangents[0][0].dtype), names)]
        else:
            activations = [
                (array, names)
                for array, names in (
                    (first.activation, labels.activation1),
                    (second.activation, labels.activation2),
                )
                if array is not None
            ]
        return self._two_products(activations, cotangents)

    def crossed(self, first: Factors, second: Factors, match: dict[int, int]) -> Array:
        """The same by products of each activation with the other side's cotangent.

        For uses in different places: a table read by its rows and multiplied by as a matrix.
        """
        labels = label_pair(first.use, second.use, match, self.layout)
        one: list[Term] = [(second.cotangent, labels.cotangent2)]
        two: list[Term] = [(first.cotangent, labels.cotangent1)]
        if first.activation is not None:
            one.insert(0, (first.activation, labels.activation1))
        if second.activation is not None:
            two.insert(0, (second.activation, labels.activation2))
        return self._two_products(one, two)

    def _two_products(self, one: list[Term], two: list[Term]) -> Array:
        """Contract `one`, contract `two`, and the two results."""
        names = [{k for _, labels in group for k in labels} for group in (one, two)]
        wanted = self.layout.working
        results: list[Term] = []
        for group, others in ((one, names[1]), (two, names[0])):
            if group:
                keep = {k for _, labels in group for k in labels if k in others or k in wanted}
                results.append(self._once(group, keep))
        array, labels = _merged(results, wanted, self.layout.precision)
        sizes = _sizes([*one, *two])
        array = _ordered(array, labels, [k for k in wanted if sizes[k] != 1])
        return array.reshape([sizes[k] for k in wanted])

    def _once(self, group: list[Term], keep: set[int]) -> Term:
        """A product that is known is not computed again: a weight's and its bias's cotangents."""
        terms = [
            ([k for k, n in zip(labels, array.shape, strict=True) if n != 1], array)
            for array, labels in group
        ]
        order = {k: i for i, k in enumerate(dict.fromkeys(k for own, _ in terms for k in own))}
        key = (
            *(id(array) for _, array in terms),
            *(tuple(order[k] for k in own) for own, _ in terms),
            tuple(sorted(order[k] for k in keep if k in order)),
        )
        if key not in self._known:
            array, labels = _merged(group, sorted(keep), self.layout.precision)
            # The arrays of the key are kept alive with it: an id is theirs as long as they live.
            self._known[key] = (array, tuple(order[k] for k in labels)), group
        (array, places), _ = self._known[key]
        own = list(order)
        return array, tuple(own[i] for i in places)


def _chosen(factors: Factors, labels: tuple[int, ...]) -> Term:
    """The rows that a one-hot stands for, its labels gone."""
    assert factors.kept is not None
    return factors.kept, labels[: len(labels) - len(factors.use.factored.rows)]


def spread(term: Term, labels: tuple[int, ...]) -> Array:
    """An array with axes of size one for the labels it lacks."""
    array, own = term
    order = sorted(range(len(own)), key=lambda k: labels.index(own[k]))
    array = jnp.transpose(array, order)
    return jnp.expand_dims(array, [k for k, label in enumerate(labels) if label not in own])
