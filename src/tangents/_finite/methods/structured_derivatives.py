"""Structured derivatives: the Jacobian of every use of a weight stays factored.

The walk over the jaxpr (`structure`) finds the uses; one backward pass for each output gives their
cotangents, one forward pass their activations; the kernel is a sum over all pairs of uses of the
same weight (Novak, Sohl-Dickstein, Schoenholz 2022, section 3.3, generalised to any use).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tangents._core.axes import PairAxes
from tangents._core.memory import MemoryLike, format_bytes, resolve_budget
from tangents._core.typing import Array
from tangents._finite import cost
from tangents._finite.cost import Extent, Footprint, Form
from tangents._finite.problem import Problem
from tangents._finite.structure import terms
from tangents._finite.structure.contraction import Layout
from tangents._finite.structure.passes import Passes, Traced


@dataclass(frozen=True)
class Options:
    """How structured derivatives work; every setting gives the same numbers."""

    factor: bool = True
    """Use rules for factored derivatives (`_j_rules`)."""
    follow: bool = True
    """Follow weights through transposes, slices and scalings (`_s_rules`)."""
    forward: bool = False
    """Cotangents by forward mode (`_fwd`)."""
    form: str | None = None
    """'outer' or 'pairs' instead of the cheaper."""
    memory: MemoryLike = None
    """Budget for what is worked on beside inputs, parameters and the result."""
    chunks: Callable[[Extent], Extent] | None = None
    """How many examples and seeds to work on at once, instead of what fits the budget."""


def kernels(problem: Problem, axes: list[PairAxes], options: Options | None = None) -> list[Array]:
    """Kernel of each output leaf."""
    options = options or Options()
    trace = lambda side: Traced(problem, side, factor=options.factor, follow=options.follow)
    side1 = trace(problem.side1)
    side2 = side1 if problem.symmetric else trace(problem.side2)
    return [
        LeafKernel(side1, side2, leaf, pair, options).compute() for leaf, pair in enumerate(axes)
    ]


def explain(problem: Problem, axes: list[PairAxes], options: Options | None = None) -> str:
    """The plan of each output leaf as a table: nothing is computed."""
    options = options or Options()
    trace = lambda side: Traced(problem, side, factor=options.factor, follow=options.follow)
    side1 = trace(problem.side1)
    side2 = side1 if problem.symmetric else trace(problem.side2)
    return "\n\n".join(
        LeafKernel(side1, side2, leaf, pair, options).explain() for leaf, pair in enumerate(axes)
    )


@dataclass(frozen=True)
class Seeds:
    """Which entries of an output of one example are traced, kept once, and paired."""

    indices: np.ndarray
    """Flat indices, shape (traced, kept, paired)."""
    kept: tuple[int, ...]
    """Sizes of the kept axes."""
    paired: tuple[int, ...]
    """Sizes of the paired axes."""

    @classmethod
    def of(cls, shape: Sequence[int], pair: PairAxes, batch: int | None) -> Seeds:
        """For an output of `shape`, its axis `batch` (that of the examples) left out."""
        groups = [
            [a for a in group if a != batch] for group in (pair.trace, pair.diagonal, pair.pairs)
        ]
        position = {a: k for k, a in enumerate(a for a in range(len(shape)) if a != batch)}
        inner = tuple(shape[a] for a in position)
        sizes = [tuple(shape[a] for a in group) for group in groups]
        order = [position[a] for group in groups for a in group]
        flat = np.arange(math.prod(inner), dtype=np.int32).reshape(inner).transpose(order)
        return cls(flat.reshape([math.prod(s) for s in sizes]), sizes[1], sizes[2])


class LeafKernel:
    """The kernel of one output leaf."""

    def __init__(self, side1: Traced, side2: Traced, leaf: int, pair: PairAxes, options: Options):
        """Choose forms and chunks."""
        self.side1, self.side2, self.leaf, self.pair = side1, side2, leaf, pair
        self.same, self.options = side1 is side2, options
        spec = side1.side.vmap
        self.batch = None if spec is None else spec.out_axes[leaf]
        self.shape1 = side1.side.outputs[leaf].shape
        self.shape2 = side2.side.outputs[leaf].shape
        self.seeds1 = Seeds.of(self.shape1, pair, self.batch)
        self.seeds2 = Seeds.of(self.shape2, pair, self.batch)
        self.layout = Layout(
            mapped=self.batch is not None,
            same_examples=self.batch is not None and self.batch not in pair.pairs,
            sum_examples=self.batch is not None and self.batch in pair.trace,
            precision=side1.problem.precision,
        )
        traced, kept, output1 = self.seeds1.indices.shape
        size1, size2 = side1.size or 1, side2.size or 1
        self.extent = Extent(size1, size2, traced, kept, output1, self.seeds2.indices.shape[2])
        self.footprints = (Footprint.of(side1.analysis), Footprint.of(side2.analysis))
        self.chunks, self.dense, self.forms = self._plan()

    def _plan(self) -> tuple[Extent, set[int], dict[int, Form]]:
        """The largest chunks that fit the budget, and the forms for these."""
        chunks = (self.options.chunks or (lambda extent: extent))(self.extent)
        budget = None if self.options.chunks else resolve_budget(self.options.memory)
        while True:
            dense, forms = self._forms(chunks)
            needed = self._bytes(chunks, forms)
            if budget is None or needed <= budget:
                return chunks, dense, forms
            smaller = self._smaller(chunks)
            if smaller is None:
                raise ValueError(
                    f"{self.side1.problem.caller}: memory={self.options.memory!r} is "
                    f"{format_bytes(budget)}, but the smallest chunk, one example and one output "
                    f"at a time, needs about {format_bytes(needed)} beside inputs, parameters and "
                    f"the result. Pass memory={format_bytes(1.05 * needed).replace(' ', '')!r} or "
                    "more"
                    + ("." if self.layout.mapped else ", or vmap_axes if examples are independent.")
                )
            chunks = smaller

    def _bytes(self, chunks: Extent, forms: dict[int, Form]) -> int:
        itemsize = max(
            x.dtype.itemsize for x in (*self.side1.side.outputs, *self.side1.problem.leaves)
        )
        # Blocks of a symmetric kernel are of two sides like those of any other.
        same = self.same and chunks == self.extent
        return cost.working_bytes(*self.footprints, forms.values(), chunks, itemsize, same)

    def _smaller(self, chunks: Extent) -> Extent | None:
        """The next smaller chunks: seeds first, for examples in chunks repeat forward passes."""
        halved = lambda name: replace(chunks, **{name: -(-getattr(chunks, name) // 2)})
        for least, names in (
            (8, ("traced",)),
            (4, ("kept", "output2", "output1")),
            (8, ("examples",)),
            (1, ("traced", "kept", "output2", "output1")),
            (1, ("examples",)),
        ):
            for name in names:
                if name != "examples":
                    if getattr(chunks, name) > least:
                        return halved(name)
                elif self.layout.mapped and max(chunks.examples1, chunks.examples2) > least:
                    larger = "examples1" if chunks.examples1 > chunks.examples2 else "examples2"
                    if not self.layout.same_examples:
                        return halved(larger)
                    size = -(-chunks.examples1 // 2)
                    return replace(chunks, examples1=size, examples2=size)
        return None

    def _forms(self, worked: Extent) -> tuple[set[int], dict[int, Form]]:
        """Weights whose gradients are made, and the form of each weight."""
        dense = {
            weight
            for side in (self.side1, self.side2)
            for root in side.analysis.roots
            if root.ref is not None
            for weight in root.weights
        }
        forms: dict[int, Form] = {}
        for weight, root in enumerate(self.side1.analysis.roots[: len(self.side1.problem.leaves)]):
            if 0 in root.shape:
                continue
            uses1 = self.side1.analysis.uses_of(weight)
            uses2 = self.side2.analysis.uses_of(weight)
            if not uses1 or not uses2:
                continue
            outer = cost.outer(
                [u for _, u in uses1], [u for _, u in uses2], root, worked, self.same
            )
            pairs = None
            if weight not in dense and self.options.form != "outer":
                pairs = cost.in_pairs(uses1, uses2, root, worked, self.layout, self.same)
            if pairs is None:
                forms[weight] = outer
            elif self.options.form == "pairs":
                forms[weight] = pairs
            else:
                forms[weight] = cost.choose([outer, pairs])
            if forms[weight].name == "outer":
                dense.add(weight)
        return dense, forms

    def explain(self) -> str:
        """The plan as a table: weights, their uses, form, work in multiply-adds, bytes."""
        analysis, chunks = self.side1.analysis, self.chunks
        itemsize = self.side1.side.outputs[self.leaf].dtype.itemsize
        rows = [("weight", "shape", "uses", "form", "multiply-adds", "bytes", "whole because")]
        for weight, form in self.forms.items():
            uses = [use for _, use in analysis.uses_of(weight)]
            products = sorted({name for _, _, name in form.pairs})
            rows.append(
                (
                    analysis.roots[weight].name or "params",
                    str(analysis.roots[weight].shape),
                    ", ".join(use.primitive for use in uses),
                    " and ".join(products) if products else form.name,
                    f"{form.work:.3g}",
                    format_bytes(form.entries * itemsize),
                    "; ".join(dict.fromkeys(use.reason for use in uses if use.reason)),
                )
            )
        widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows
        ]
        examples = (
            f"{chunks.examples1} × {chunks.examples2} examples, " if self.layout.mapped else ""
        )
        at_once = f"{chunks.traced * chunks.kept * chunks.output1} outputs"
        needed = format_bytes(self._bytes(chunks, self.forms))
        lines.append(f"at once: {examples}{at_once}; about {needed} of working memory")
        return "\n".join(lines)

    def compute(self) -> Array:
        """The kernel in the layout of its axes."""
        dtype = self.side1.side.outputs[self.leaf].dtype
        if not self.forms:
            return jnp.zeros(self.pair.kernel_shape(self.shape1, self.shape2), dtype)
        return self._arrange(self._over_examples())

    # Loops over chunks: examples, then seeds.

    def _over_examples(self) -> Array:
        """The kernel, labels `layout.result`."""
        extent, chunks = self.extent, self.chunks
        if not self.layout.mapped or (chunks.examples1, chunks.examples2) == (
            extent.examples1,
            extent.examples2,
        ):
            return self._block(None, None)
        blocks1 = _blocks(extent.examples1, chunks.examples1)
        if self.layout.same_examples:
            return self._paired_examples(blocks1)
        blocks2 = _blocks(extent.examples2, chunks.examples2)
        rows = lax.map(lambda a: lax.map(lambda b: self._block(a, b), blocks2), blocks1)
        # (blocks1, blocks2, examples1, examples2, ...)
        rows = jnp.moveaxis(rows, 2, 1)
        rows = rows.reshape(blocks1.size, blocks2.size, *rows.shape[4:])
        return rows[: extent.examples1, : extent.examples2]

    def _paired_examples(self, blocks: Array) -> Array:
        layout = self.layout
        separate = replace(layout, sum_examples=False)
        rows = lax.map(lambda a: self._block(a, a, separate), blocks)
        rows = rows.reshape(blocks.size, *rows.shape[2:])[: self.extent.examples1]
        return jnp.sum(rows, axis=0) if layout.sum_examples else rows

    @property
    def _mirrored(self) -> bool:
        """Whether what is above the diagonal of examples will be copied from below it.

        `PairAxes.symmetrise` does: it compares indices in the order of the output's axes.
        """
        return self.same and self.batch == 0 and not self.layout.same_examples

    def _block(
        self, examples1: Array | None, examples2: Array | None, layout: Layout | None = None
    ) -> Array:
        """The kernel of some examples: loops over chunks of seeds."""
        layout = layout or self.layout
        passes1 = Passes(self.side1, examples1, self.options.forward)
        # A diagonal block of a symmetric kernel is not known to be one inside a loop.
        shared = self.same and examples1 is examples2
        passes2 = passes1 if shared else Passes(self.side2, examples2, self.options.forward)
        chunks, forms = self.chunks, list(self.forms.values())

        def kernel(seeds1: Array, seeds2: Array, same: bool) -> Array:
            mine = terms.SideTerms.of(
                self.side1, passes1.factors(self.leaf, seeds1), self.dense, layout
            )
            if same and self._mirrored:
                block = terms.lower_triangle(mine, forms, layout, passes1.size or 1)
            else:
                other = mine
                if not same:
                    factors2 = passes2.factors(self.leaf, seeds2)
                    other = terms.SideTerms.of(self.side2, factors2, self.dense, layout)
                block = terms.kernel(mine, other, forms, layout, symmetric=self.same)
            return jnp.transpose(block, [layout.working.index(k) for k in layout.result])

        def over_traced(seeds1: Array, seeds2: Array, same: bool) -> Array:
            if chunks.traced >= self.extent.traced:
                return kernel(seeds1, seeds2, same)
            pieces1, pieces2 = (_pieces(s, 0, chunks.traced) for s in (seeds1, seeds2))
            add = lambda total, piece: (total + kernel(piece[0], piece[1], same), None)
            shape = jax.eval_shape(lambda a, b: kernel(a, b, same), pieces1[0], pieces2[0])
            start = jnp.zeros(shape.shape, shape.dtype)
            return lax.scan(add, start, (pieces1, pieces2))[0]

        def over_kept(seeds1: Array, seeds2: Array, same: bool) -> Array:
            if chunks.kept >= self.extent.kept:
                return over_traced(seeds1, seeds2, same)
            pieces = tuple(_pieces(s, 1, chunks.kept) for s in (seeds1, seeds2))
            rows = lax.map(lambda piece: over_traced(piece[0], piece[1], same), pieces)
            return _joined(rows, rows.ndim - 4, self.extent.kept)

        def over_outputs(seeds1: Array, seeds2: Array) -> Array:
            whole1 = chunks.output1 >= self.extent.output1
            whole2 = chunks.output2 >= self.extent.output2
            if whole1 and whole2:
                return over_kept(seeds1, seeds2, shared)
            pieces1 = _pieces(seeds1, 2, chunks.output1)
            pieces2 = _pieces(seeds2, 2, chunks.output2)
            rows = lax.map(lambda a: lax.map(lambda b: over_kept(a, b, False), pieces2), pieces1)
            rows = jax.vmap(lambda r: _joined(r, r.ndim - 2, self.extent.output2))(rows)
            return _joined(rows, rows.ndim - 3, self.extent.output1)

        return over_outputs(jnp.asarray(self.seeds1.indices), jnp.asarray(self.seeds2.indices))

    def _arrange(self, kernel: Array) -> Array:
        """From (examples, kept, outputs, outputs′) to the layout of `pair`; traces averaged."""
        pair, batch = self.pair, self.batch
        count = len(self.layout.result) - 3
        kernel = kernel.reshape(
            *kernel.shape[:count], *self.seeds1.kept, *self.seeds1.paired, *self.seeds2.paired
        )
        kept = [a for a in pair.diagonal if a != batch]
        paired = [a for a in pair.pairs if a != batch]
        # Where the index (or the two indices) of each output axis stand now.
        where: dict[int, list[int]] = {a: [count + k] for k, a in enumerate(kept)}
        first = count + len(kept)
        where |= {a: [first + k, first + len(paired) + k] for k, a in enumerate(paired)}
        if batch is not None and batch not in pair.trace:
            where[batch] = list(range(count))
        order = [k for a in range(pair.ndim) if a not in pair.trace for k in where[a]]
        return jnp.transpose(kernel, order) / max(pair.trace_size(self.shape1), 1)


def _blocks(total: int, size: int) -> Array:
    """Indices of examples in blocks; the last block repeats the last example."""
    count = -(-total // size)
    return jnp.minimum(jnp.arange(count * size, dtype=jnp.int32), total - 1).reshape(count, size)


def _pieces(seeds: Array, axis: int, size: int) -> Array:
    """Seeds in pieces along an axis, stacked in front; −1 (no seed) fills the last one."""
    total = seeds.shape[axis]
    count = -(-total // size)
    edges = [(0, count * size - total) if k == axis else (0, 0) for k in range(seeds.ndim)]
    padded = jnp.pad(seeds, edges, constant_values=-1)
    split = padded.reshape(*seeds.shape[:axis], count, size, *seeds.shape[axis + 1 :])
    return jnp.moveaxis(split, axis, 0)


def _joined(rows: Array, axis: int, total: int) -> Array:
    """Pieces stacked in front joined along an axis (of one piece), the filling cut off."""
    rows = jnp.moveaxis(rows, 0, axis)
    shape = (*rows.shape[:axis], rows.shape[axis] * rows.shape[axis + 1], *rows.shape[axis + 2 :])
    return lax.slice_in_dim(rows.reshape(shape), 0, total, axis=axis)
