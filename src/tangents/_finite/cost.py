"""What each way to compute a kernel costs, from shapes alone, and which is taken.

Nothing is compiled or run to find out. Work is in multiply-adds; the constants that tell thin
matrix products from thick ones were fitted on CPU (`SKINNY`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp

from tangents._finite.structure import contraction
from tangents._finite.structure.analysis import Analysis, Branches, Loop, Plan, Root, Use
from tangents._finite.structure.contraction import Layout, PairLabels

SKINNY = ((8, 6.0), (16, 3.0))
"""(rows, factor): a product G Gᵀ of so few rows runs so many times slower than a thick one."""
THICK = 1.5
SCATTERED = 32.0
"""Multiply-adds in the time of adding one number of a row where data say."""
MASKED = 16.0
"""The same of comparing the rows of a pair of places, and of adding what they have in common."""
PULLED = 3
"""Copies of a gradient while it is pulled back through what a weight goes through before use."""
AT_ONCE = 2
"""Weights that may be worked on at once; the sum over them is taken as they come."""


@dataclass(frozen=True)
class Extent:
    """How many examples and seeds meet at once."""

    examples1: int
    examples2: int
    traced: int
    kept: int
    output1: int
    output2: int

    @property
    def seeds1(self) -> int:
        """Backward passes on side 1."""
        return self.traced * self.kept * self.output1

    @property
    def seeds2(self) -> int:
        """Backward passes on side 2."""
        return self.traced * self.kept * self.output2

    def sizes(self) -> dict[int, int]:
        """Sizes of the labels of `contraction`."""
        return {
            contraction.EXAMPLE1: self.examples1,
            contraction.EXAMPLE2: self.examples2,
            contraction.TRACED: self.traced,
            contraction.KEPT: self.kept,
            contraction.OUTPUT1: self.output1,
            contraction.OUTPUT2: self.output2,
        }


@dataclass(frozen=True)
class Slices:
    """Uses of the same entries of one weight, whose gradients are made slice by slice."""

    uses1: tuple[int, ...]
    uses2: tuple[int, ...]
    axis: tuple[int, int]
    """(size, stride) of the axis of the weight that is cut."""
    width: int
    """Of a slice."""


@dataclass(frozen=True)
class Form:
    """A way to contract the uses of one weight."""

    name: str
    """'outer' (gradients of each example), or for each pair of uses 'gram', 'crossed'."""
    work: float
    """Multiply-adds, weighted by how fast they run."""
    entries: float
    """Numbers held at once beside activations and cotangents."""
    lasting: float = 0.0
    """Of these the ones that are held as long as other weights are worked on."""
    pairs: tuple[tuple[int, int, str], ...] = ()
    """(use of side 1, use of side 2, 'gram' or 'crossed')."""
    slices: tuple[Slices, ...] = ()
    """Of 'outer', where no gradient is to be held as a whole."""


def outer(
    uses1: Sequence[Use],
    uses2: Sequence[Use],
    root: Root,
    extent: Extent,
    same: bool,
    blocks: int = 1,
) -> Form:
    """Per-example gradients of the whole weight, then one product.

    Args:
        uses1: of side 1.
        uses2: of side 2.
        root: the weight.
        extent: what is worked on at once.
        same: both sides are one.
        blocks: of side 2, for which side 1 is kept.
    """
    size = math.prod(root.shape)
    making = [
        sum(examples * seeds * _labels(use) for use in uses)
        for uses, examples, seeds in (
            (uses1, extent.examples1, extent.seeds1),
            (uses2, extent.examples2, extent.seeds2),
        )
    ]
    rows = min(extent.examples1 * extent.output1, extent.examples2 * extent.output2)
    skinny = next((factor for limit, factor in SKINNY if rows <= limit), THICK)
    both = extent.traced * extent.kept * extent.output1 * extent.output2
    work = making[0] / blocks + (0 if same else making[1])
    work += skinny * extent.examples1 * extent.examples2 * both * size
    mine = extent.examples1 * extent.seeds1 * size
    held = mine + (0 if same else extent.examples2 * extent.seeds2 * size)
    return Form("outer", work, held, mine if blocks > 1 else 0)


def sliced(
    uses1: Sequence[tuple[int, Use]],
    uses2: Sequence[tuple[int, Use]],
    root: Root,
    whole: Form,
    entries: float,
    least: int,
) -> Form | None:
    """`outer` with gradients in slices of the weight, so that `entries` numbers are held at once.

    Uses that read the same entries along the same axes are cut together; None where some overlap
    in another way, for no slice of one is then a slice of the other.

    Args:
        uses1: of side 1, with their numbers.
        uses2: of side 2.
        root: the weight.
        whole: the form that is cut.
        entries: to hold at once; what `least` allows is taken if that is more.
        least: entries of the weight in a slice, no fewer.
    """
    groups: dict[tuple, tuple[list[tuple[int, Use]], list[tuple[int, Use]]]] = {}
    for side, uses in enumerate((uses1, uses2)):
        for number, use in uses:
            axes = frozenset((size, stride) for _, size, stride in use.weight)
            if len(axes) < len(use.weight):
                return None
            groups.setdefault((use.offset, axes), ([], []))[side].append((number, use))
    first = [(group[0] or group[1])[0][1] for group in groups.values()]
    if any(not contraction.apart(a, b, root) for a, b in itertools.combinations(first, 2)):
        return None
    parts, held = [], 0.0
    for (_, axes), (mine, other) in groups.items():
        size = math.prod(n for n, _ in axes)
        if not mine or not other or size == 0:
            continue
        both = whole.entries * size / math.prod(root.shape)
        axis = max(axes, default=(1, 1))
        across = size // axis[0]
        wanted = max(entries / both * size, least, across)
        width = min(axis[0], int(wanted) // across)
        held = max(held, both * width * across / size)
        parts.append(Slices(tuple(k for k, _ in mine), tuple(k for k, _ in other), axis, width))
    # What is kept of side 1 for several blocks of side 2 cannot be slices.
    return replace(whole, entries=held, lasting=0.0, slices=tuple(parts)) if parts else None


def _labels(use: Use) -> float:
    """Multiply-adds of a gradient of one example and seed."""
    if use.factored.rows:
        written = math.prod(size for _, size, _ in use.weight)
        return SCATTERED * math.prod(use.sizes[label] for label in use.cotangent) + written
    names = {*use.cotangent, *(use.activation or ())}
    return math.prod(use.sizes[label] for label in names)


def _meeting(
    uses1: Sequence[tuple[int, Use]], uses2: Sequence[tuple[int, Use]], root: Root, same: bool
) -> Iterator[tuple[tuple[int, Use], tuple[int, Use]]]:
    """The pairs of uses whose product is not zero; of one set, no pair and its transpose."""
    for i, first in uses1:
        for j, second in uses2:
            if not (same and j < i) and not contraction.apart(first, second, root):
                yield (i, first), (j, second)


def in_pairs(
    uses1: Sequence[tuple[int, Use]],
    uses2: Sequence[tuple[int, Use]],
    root: Root,
    extent: Extent,
    layout: Layout,
    same: bool,
) -> Form | None:
    """Every pair of uses by the cheaper of its products; None if some pair has none."""
    work, entries, pairs = 0.0, 0.0, []
    for (i, first), (j, second) in _meeting(uses1, uses2, root, same):
        match = contraction.matched(first, second)
        if match is None:
            return None
        labels = contraction.label_pair(first, second, match, layout)
        sizes = extent.sizes() | labels.sizes
        both = contraction.same_rows(first, second, match)
        ways = [("gram", _gram(labels, sizes, layout, (first, second) if both else None))]
        if not both:
            ways.append(("crossed", _crossed(labels, sizes, layout)))
        name, (cost, held) = min(ways, key=lambda way: way[1][0])
        work, entries = work + cost, max(entries, held)
        pairs.append((i, j, name))
    return Form("pairs", work, entries, pairs=tuple(pairs))


def at_output(
    uses1: Sequence[tuple[int, Use]],
    uses2: Sequence[tuple[int, Use]],
    root: Root,
    extent: Extent,
    same: bool,
) -> Form:
    """Uses whose cotangents are unit vectors: a product of activations alone."""
    pairs = tuple((i, j, "unit") for (i, _), (j, _) in _meeting(uses1, uses2, root, same))
    examples = extent.examples1 * extent.examples2
    entries = float(examples * extent.kept * extent.output1 * extent.output2)
    summed = max(math.prod(use.sizes[k] for k in use.activation or ()) for _, use in uses1)
    return Form("unit", len(pairs) * (entries + examples * summed), entries, pairs=pairs)


def _gram(
    labels: PairLabels, sizes: dict[int, int], layout: Layout, rows: tuple[Use, Use] | None
) -> tuple[float, float]:
    """`rows`: the uses, if their activations are compared, not multiplied."""
    a1, a2 = labels.activation1, labels.activation2
    if rows is None:
        return _products((a1, a2), (labels.cotangent1, labels.cotangent2), sizes, layout)
    a1, a2 = (a[: len(a) - len(use.factored.rows)] for a, use in zip((a1, a2), rows, strict=True))
    work, held = _products((a1, a2), (labels.cotangent1, labels.cotangent2), sizes, layout)
    return work + MASKED * math.prod(sizes[k] for k in {*a1, *a2}), held


def _crossed(labels: PairLabels, sizes: dict[int, int], layout: Layout) -> tuple[float, float]:
    one = (labels.activation1, labels.cotangent2)
    return _products(one, (labels.activation2, labels.cotangent1), sizes, layout)


def _products(
    one: tuple[Sequence[int], Sequence[int]],
    two: tuple[Sequence[int], Sequence[int]],
    sizes: dict[int, int],
    layout: Layout,
) -> tuple[float, float]:
    """Work and largest results of contracting `one`, `two`, and both."""
    names = [{*group[0], *group[1]} for group in (one, two)]
    keep = [
        {k for k in mine if k in other or k in layout.result}
        for mine, other in ((names[0], names[1]), (names[1], names[0]))
    ]
    volume = lambda labels: float(math.prod(sizes[k] for k in labels))
    work = volume(names[0]) + volume(names[1]) + volume(keep[0] | keep[1])
    return work, volume(keep[0]) + volume(keep[1])


def choose(forms: Sequence[Form], entries: float) -> Form:
    """The form of least work among those that hold so many numbers; else that of least numbers."""
    fitting = [form for form in forms if form.entries <= entries]
    if fitting:
        return min(fitting, key=lambda form: form.work)
    return min(forms, key=lambda form: form.entries)


@dataclass(frozen=True)
class Footprint:
    """Numbers one example holds, from shapes."""

    forward: int
    """Activations, expanded, and what the backward pass keeps of the network's own values."""
    cotangent: int
    """Probes, for each seed."""
    transient: int
    """The largest values of the backward pass, for each seed."""
    computed: int = 0
    """Entries of values that are computed from weights, for each seed: gradients in them are made
    whole, all together, and pulled back to the weights."""
    kernels: int = 0
    """Kernels of convolutions: the backward pass keeps each of them flipped, its axes exchanged,
    and one more is held in the order that the library wants. Once, not for each example."""

    @classmethod
    def of(cls, analysis: Analysis) -> Footprint:
        """Of a side's function of one example (of the batch, if nothing is promised)."""
        activations = sum(_activation(use, analysis) for use in analysis.uses)
        total, largest = _values(analysis.plan)
        probes = sum(math.prod(p.shape) for p in analysis.live_probes.values())
        kernels = _kernels(analysis.plan)
        copies = sum(kernels) + max(kernels, default=0)
        used = {use.root for use in analysis.uses}
        roots = [r for k, r in enumerate(analysis.roots) if k in used and r.ref is not None]
        computed = sum(math.prod(root.shape) for root in roots)
        return cls(activations + total, probes, 3 * largest, PULLED * computed, copies)


def _activation(use: Use, analysis: Analysis) -> int:
    """Entries of A as it is held: a one-hot is so only where it meets what is none."""
    if use.activation is None:
        return 0
    labels = use.activation
    rows = use.factored.rows
    others = [other for other in analysis.uses if other.root == use.root]
    if rows and all(o.factored.rows == rows and o.weight == use.weight for o in others):
        labels = labels[: len(labels) - len(rows)]
    return math.prod(use.sizes[label] for label in labels)


def _kernels(plan: Plan) -> list[int]:
    """Sizes of the kernels of all convolutions of a plan."""
    found: list[int] = []
    for index, step in enumerate(plan.graph.steps):
        action = plan.actions.get(index)
        if isinstance(action, Loop):
            found += _kernels(action.body) * step.params["length"]
        elif isinstance(action, Branches):
            found += [size for branch in action.branches for size in _kernels(branch)]
        elif step.name == "conv_general_dilated":
            found.append(math.prod(step.inputs[1].shape))
    return found


def _values(plan: Plan) -> tuple[int, int]:
    """Sum and largest of the numbers that the steps of a plan make."""
    total = largest = 0
    for index, step in enumerate(plan.graph.steps):
        sizes = [
            math.prod(ref.shape) for ref in step.outputs if jnp.issubdtype(ref.dtype, jnp.inexact)
        ]
        action = plan.actions.get(index)
        inner: list[Plan] = []
        times = 1
        if isinstance(action, Loop):
            inner, times = [action.body], step.params["length"]
        elif isinstance(action, Branches):
            inner = action.branches
        elif step.name == "scan":
            times = step.params["length"]
            body = getattr(step.params["jaxpr"], "jaxpr", step.params["jaxpr"])
            sizes += [
                times * math.prod(getattr(v.aval, "shape", ()))
                for equation in body.eqns
                for v in equation.outvars
            ]
        for body in inner:
            below, widest = _values(body)
            total, largest = total + times * below, max(largest, widest)
        total, largest = total + sum(sizes), max(largest, *sizes, 0)
    return total, largest


@dataclass(frozen=True)
class Forward:
    """Multiply-adds of a forward pass on one example (on the batch, if nothing is promised)."""

    total: float
    convolutions: float


def forward_work(plan: Plan) -> Forward:
    """Of the steps of a plan; matrix products and convolutions by what they sum, others by size."""
    total = convolutions = 0.0
    for index, step in enumerate(plan.graph.steps):
        action, times = plan.actions.get(index), 1
        inner: list[Plan] = []
        if isinstance(action, Loop):
            inner, times = [action.body], step.params["length"]
        elif isinstance(action, Branches):
            inner = action.branches[:1]
        for body in inner:
            below = forward_work(body)
            total += times * below.total
            convolutions += times * below.convolutions
        size = sum(math.prod(ref.shape) for ref in step.outputs)
        if step.name == "dot_general":
            (summed, _), _ = step.params["dimension_numbers"]
            size *= math.prod(step.inputs[0].shape[a] for a in summed)
        elif step.name == "conv_general_dilated":
            out_axis = step.params["dimension_numbers"].rhs_spec[0]
            kernel = step.inputs[1].shape
            size *= math.prod(n for k, n in enumerate(kernel) if k != out_axis)
            convolutions += size
        total += size
    return Forward(total, convolutions)


def working_bytes(
    side1: Footprint,
    side2: Footprint,
    forms: Iterable[Form],
    worked: Extent,
    itemsize: int,
    same: bool,
) -> int:
    """Bytes in use at once when `worked` examples and seeds are: an upper estimate."""
    sides = [(side1, worked.examples1, worked.seeds1)]
    if not same:
        sides.append((side2, worked.examples2, worked.seeds2))
    entries = 0.0
    for footprint, examples, seeds in sides:
        entries += examples * (footprint.forward + seeds * footprint.cotangent)
        entries += examples * seeds * max(footprint.transient, footprint.cotangent)
        entries += examples * seeds * footprint.computed
    forms = list(forms)
    held = sorted((form.entries - form.lasting for form in forms), reverse=True)
    entries += sum(held[:AT_ONCE]) + sum(form.lasting for form in forms)
    return int(entries * itemsize)


def copied_bytes(
    side1: Footprint, side2: Footprint, forms: Iterable[Form], itemsize: int, same: bool
) -> int:
    """Bytes of copies in another order, beside `working_bytes`.

    Of the kernels of convolutions; and of the larger product of a pair of uses, whose positions are
    brought next to each other before they are summed over.
    """
    entries = side1.kernels + (0 if same else side2.kernels)
    entries += max((form.entries for form in forms if form.name == "pairs"), default=0)
    return int(entries * itemsize)
