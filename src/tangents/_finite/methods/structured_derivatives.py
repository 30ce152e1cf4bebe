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

from tangents._core import lapack
from tangents._core.axes import PairAxes
from tangents._core.memory import MemoryLike, format_bytes, free_bytes, resolve_budget
from tangents._core.typing import Array
from tangents._finite import cost
from tangents._finite.cost import Extent, Footprint, Form
from tangents._finite.problem import Problem
from tangents._finite.structure import heads, table, terms
from tangents._finite.structure.contraction import Layout
from tangents._finite.structure.heads import Head, OutputAxes
from tangents._finite.structure.passes import Passes, Traced
from tangents._finite.structure.terms import SideTerms

CACHE = 2**24
"""Bytes: working memory beyond which outputs are taken in chunks (see `LeafKernel._in_cache`)."""
SLICE = 4096
"""Entries of a slice of a weight, no fewer while examples and outputs can be taken in chunks."""
THIN = 32
"""Rows (examples, outputs) of a chunk's matrix products: fewer only where the budget is small."""
ROWS = 256
"""Rows (examples, outputs, positions) of a chunk's matrix products: no fewer than half of it."""


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
    return [plan.compute() for plan in plans(problem, axes, options)]


def explain(problem: Problem, axes: list[PairAxes], options: Options | None = None) -> str:
    """The plan of each output leaf as a table: nothing is computed."""
    return "\n\n".join(plan.explain() for plan in plans(problem, axes, options))


def plans(
    problem: Problem, axes: list[PairAxes], options: Options | None = None
) -> list[LeafKernel]:
    """How the kernel of each output leaf is computed."""
    options = options or Options()
    trace = lambda side: Traced(problem, side, factor=options.factor, follow=options.follow)
    side1 = trace(problem.side1)
    side2 = side1 if problem.symmetric else trace(problem.side2)
    return [LeafKernel(side1, side2, leaf, pair, options) for leaf, pair in enumerate(axes)]


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
        self.head = self._find_head()
        self.seeds1 = Seeds.of(self._compressed(self.shape1), pair, self.batch)
        self.seeds2 = Seeds.of(self._compressed(self.shape2), pair, self.batch)
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
        self._basis: Array | None = None
        self.chunks, self.dense, self.forms = self._plan()

    def _find_head(self) -> Head:
        """The last layer, as far as its uses pair up and its logits are wanted in a known way."""
        head = heads.find(self.side1.analysis, self.leaf)
        other = head if self.same else heads.find(self.side2.analysis, self.leaf)
        if (head.uses, head.axis, head.rank) != (other.uses, other.axis, other.rank):
            return Head(frozenset())
        uses1, uses2 = self.side1.analysis.uses, self.side2.analysis.uses
        counts = {len(self._output_axes(shape).sizes) for shape in (self.shape1, self.shape2)}
        paired = len(counts) == 1 and all(
            heads.is_unit_pair(uses1[i], uses2[j], *counts)
            for i in head.uses
            for j in head.uses
            if uses1[i].root == uses2[j].root
        )
        if not paired or self.options.form is not None:
            return Head(frozenset())
        if head.axis is not None and (
            self.options.forward
            or self._logits(head.axis) in self.pair.diagonal
            or not lapack.available()  # the basis is a factorisation
        ):
            return Head(head.uses)
        return head

    def _logits(self, axis: int) -> int:
        """The axis of the output that is this axis of one example's output."""
        return axis + (self.batch is not None and axis >= self.batch)

    def _compressed(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the outputs that backward passes start from."""
        if self.head.axis is None:
            return tuple(shape)
        logits = self._logits(self.head.axis)
        return tuple(self.head.rank if a == logits else n for a, n in enumerate(shape))

    def _output_axes(self, shape: Sequence[int]) -> OutputAxes:
        """Axes of one example's output."""
        pair = self.pair
        axes = [a for a, n in enumerate(shape) if n != 1 and a != self.batch]
        kind = lambda a: "traced" if a in pair.trace else "kept" if a in pair.diagonal else "paired"
        return OutputAxes(tuple(shape[a] for a in axes), tuple(kind(a) for a in axes))

    def _plan(self) -> tuple[Extent, set[int], dict[int, Form]]:
        """The largest chunks that fit the budget, and the forms for these."""
        chunks = (self.options.chunks or self._in_cache)(self.extent)
        budget = None if self.options.chunks else resolve_budget(self.options.memory)
        while True:
            dense, forms = self._forms(chunks)
            needed = self._bytes(chunks, forms)
            smaller = self._smaller(chunks)
            if budget is not None and needed > budget:
                # Smaller slices than that are for the last resort: products would be thin.
                least = SLICE if smaller else 1
                dense, forms = self._forms(chunks, budget - self._bytes(chunks, {}), least)
                needed = self._bytes(chunks, forms)
            if budget is None or needed <= budget:
                return chunks, dense, forms
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

    def _in_cache(self, extent: Extent) -> Extent:
        """Outputs that are summed over in chunks, where what they hold would leave the cache.

        Chunks keep enough rows for matrix products. Convolutions are slower in a loop.
        """
        uses = self.side1.analysis.uses
        if (
            self.options.forward
            or not uses
            or cost.forward_work(self.side1.analysis.plan).convolutions
        ):
            return extent
        rows = extent.examples1 * max(use.positions for use in uses)
        chunks = extent
        while chunks.traced > 1 and rows * chunks.traced > ROWS:
            if self._worked_on(chunks, self._forms(chunks)[1]) <= CACHE:
                break
            chunks = replace(chunks, traced=-(-chunks.traced // 2))
        return chunks

    def _examples_in_cache(self, examples: int | None) -> int | None:
        """Examples whose gradients are made at once, where those of all would leave the cache.

        Of networks with convolutions, whose outputs are not taken in chunks: what is held of all
        examples is their gradients alone. (A quarter of the time of such a call went into pages of
        memory touched for the first time.) None for all at once.
        """
        outputs = lambda e: (e.traced, e.kept, e.output1, e.output2)
        if (
            examples is None
            or examples < 2
            or self.options.forward
            or self.options.chunks is not None
            or outputs(self.chunks) != outputs(self.extent)
            or jax.default_backend() != "cpu"
            or not cost.forward_work(self.side1.analysis.plan).convolutions
        ):
            return None
        part = lambda n: self._worked_on(replace(self.chunks, examples1=n, examples2=n), {})
        whole = part(examples)
        if whole <= CACHE or self._gradients(examples) + part(1) > whole:
            return None
        sizes = (n for n in range(examples // 2, 1, -1) if examples % n == 0)
        return next((n for n in sizes if part(n) <= CACHE), 1)

    def _gradients(self, examples: int) -> float:
        """Bytes of the gradients of all weights that are made as a whole."""
        roots = self.side1.analysis.roots
        entries = sum(math.prod(roots[weight].shape) for weight in self.dense)
        return examples * self.chunks.seeds1 * entries * self._itemsize

    @property
    def _itemsize(self) -> int:
        leaves = (*self.side1.side.outputs, *self.side1.problem.leaves)
        return max(x.dtype.itemsize for x in leaves)

    def _bytes(self, chunks: Extent, forms: dict[int, Form]) -> int:
        copied = cost.copied_bytes(
            *self.footprints, forms.values(), self._itemsize, self._is_shared(chunks)
        )
        return self._worked_on(chunks, forms) + copied

    def _worked_on(self, chunks: Extent, forms: dict[int, Form]) -> int:
        same = self._is_shared(chunks)
        return cost.working_bytes(*self.footprints, forms.values(), chunks, self._itemsize, same)

    def _is_shared(self, chunks: Extent) -> bool:
        # Blocks of a symmetric kernel are of two sides like those of any other.
        return self.same and chunks == self.extent

    @property
    def work(self) -> float:
        """Multiply-adds of the contractions, all chunks together."""
        names = ["examples1", "traced", "kept", "output1", "output2"]
        names += [] if self.layout.same_examples else ["examples2"]
        parts = math.prod(-(-getattr(self.extent, n) // getattr(self.chunks, n)) for n in names)
        return parts * sum(form.work for form in self.forms.values())

    @property
    def full_extent(self) -> Extent:
        """Examples and outputs, those of a compressed last layer counted in full."""
        seeds = [Seeds.of(s, self.pair, self.batch) for s in (self.shape1, self.shape2)]
        traced, kept, output1 = seeds[0].indices.shape
        output2 = seeds[1].indices.shape[2]
        return Extent(self.extent.examples1, self.extent.examples2, traced, kept, output1, output2)

    @property
    def held(self) -> int:
        """Bytes in use at once."""
        return self._bytes(self.chunks, self.forms)

    def _smaller(self, chunks: Extent) -> Extent | None:
        """The next smaller chunks: seeds first, for examples in chunks repeat forward passes."""
        halved = lambda name: replace(chunks, **{name: -(-getattr(chunks, name) // 2)})
        thick = max(4, -(-THIN // max(1, chunks.examples1)))
        for least, names in (
            (8, ("traced",)),
            (thick, ("kept", "output2", "output1")),
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

    def _blocks_of_side2(self, chunks: Extent) -> int:
        """Blocks of outputs of side 2 that meet one block of side 1 (see `_block`)."""
        if (chunks.traced, chunks.kept) != (self.extent.traced, self.extent.kept):
            return 1
        return -(-self.extent.output2 // chunks.output2)

    def _forms(
        self, worked: Extent, free: float = math.inf, least: int = 1
    ) -> tuple[set[int], dict[int, Form]]:
        """Weights whose gradients are made, and the form of each weight.

        Args:
            worked: examples and seeds that are worked on at once.
            free: bytes there are for the forms.
            least: entries in a slice of a weight, no fewer.
        """
        entries = max(free, 0) / self._itemsize / cost.AT_ONCE
        shared = self._is_shared(worked)
        blocks = self._blocks_of_side2(worked)
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
            if {k for k, _ in uses1} <= self.head.uses:
                forms[weight] = cost.at_output(uses1, uses2, root, worked, self.same)
                continue
            outer = cost.outer(
                [u for _, u in uses1], [u for _, u in uses2], root, worked, shared, blocks
            )
            ways, pairs = [outer], None
            if weight not in dense:
                if outer.entries > entries:
                    cut = cost.sliced(uses1, uses2, root, outer, entries, least)
                    ways = [cut or outer]
                if self.options.form != "outer":
                    pairs = cost.in_pairs(uses1, uses2, root, worked, self.layout, self.same)
            if pairs is not None:
                ways = [pairs] if self.options.form == "pairs" else [*ways, pairs]
            forms[weight] = cost.choose(ways, entries)
            if forms[weight].name == "outer" and not forms[weight].slices:
                dense.add(weight)
        return dense, forms

    def explain(self) -> str:
        """The plan as a table: weights, their uses, form, work in multiply-adds, bytes."""
        lines = table.rows(self.side1.analysis, self.forms, self._itemsize)
        chunks, examples = self.chunks, ""
        if self.layout.mapped:
            examples = f"{chunks.examples1} × {chunks.examples2} examples, "
        if self.head.axis is not None:
            size = self.shape1[self._logits(self.head.axis)]
            lines.append(f"the {size} logits come from {self.head.rank} numbers: passes for these")
        outputs = chunks.traced * chunks.kept * chunks.output1
        needed = format_bytes(self.held)
        lines.append(f"at once: {examples}{outputs} outputs; about {needed} of working memory")
        return "\n".join(lines)

    def _check_device(self) -> None:
        """Refuse a kernel that the device cannot hold together with its computation."""
        shape = self.pair.kernel_shape(self.shape1, self.shape2)
        result = math.prod(shape) * self.side1.side.outputs[self.leaf].dtype.itemsize
        free = free_bytes()
        if result + self.held > free:
            raise ValueError(
                f"{self.side1.problem.caller}: the kernel of shape {shape} takes "
                f"{format_bytes(result)}, its computation about {format_bytes(self.held)} more, "
                f"and the device has {format_bytes(free)} free. Average over outputs with "
                "trace_axes, compute it for fewer examples at a time (tangents.batch), or use "
                "ntk_operator, whose products need no kernel."
            )

    def compute(self) -> Array:
        """The kernel in the layout of its axes."""
        dtype = self.side1.side.outputs[self.leaf].dtype
        if not self.forms:
            return jnp.zeros(self.pair.kernel_shape(self.shape1, self.shape2), dtype)
        self._check_device()
        if self.head.weight is not None:
            traced = self.side1
            (value,) = traced.execution.values([self.head.weight], traced.problem.leaves)
            self._basis = heads.basis(self.head, value)
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
        chunks = self.chunks
        forms = [form for form in self.forms.values() if form.name != "unit"]
        basis = None
        if self._basis is not None and self.head.axis is not None:
            basis = self.head.axis, self._basis

        def terms_of(side: Traced, passes: Passes, seeds: Array) -> SideTerms:
            spread = not self.layout.mapped or self.layout.same_examples
            factors = lambda some: some.factors(self.leaf, seeds, basis, spread=spread)
            size = self._examples_in_cache(passes.size)
            if size is None:
                return SideTerms.of(side, factors(passes), self.dense, layout)
            return SideTerms.by_parts(
                side, passes, size, factors, self.dense, layout, one_sided=shared
            )

        def contracted(mine: SideTerms, other: SideTerms) -> Array:
            if mine is other and self._mirrored:
                block = terms.lower_triangle(mine, forms, layout, passes1.size or 1)
            else:
                block = terms.kernel(mine, other, forms, layout, symmetric=self.same)
                if layout.mapped:
                    block = terms.spread(block, layout, passes1.size or 1, passes2.size or 1)
            return jnp.transpose(block, [layout.working.index(k) for k in layout.result])

        def kernel(seeds1: Array, seeds2: Array, same: bool) -> Array:
            mine = terms_of(self.side1, passes1, seeds1)
            return contracted(mine, mine if same else terms_of(self.side2, passes2, seeds2))

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

            def row(a: Array) -> Array:
                if (chunks.traced, chunks.kept) != (self.extent.traced, self.extent.kept):
                    return lax.map(lambda b: over_kept(a, b, False), pieces2)
                mine = terms_of(self.side1, passes1, a)
                other = lambda b: terms_of(self.side2, passes2, b)
                return lax.map(lambda b: contracted(mine, other(b)), pieces2)

            rows = lax.map(row, pieces1)
            rows = jax.vmap(lambda r: _joined(r, r.ndim - 2, self.extent.output2))(rows)
            return _joined(rows, rows.ndim - 3, self.extent.output1)

        total = self._at_output(passes1, passes2, layout)
        if forms:
            seeds = jnp.asarray(self.seeds1.indices), jnp.asarray(self.seeds2.indices)
            block = self._expanded(over_outputs(*seeds))
            total = block if total is None else block + total.astype(block.dtype)
        assert total is not None
        return total

    def _expanded(self, block: Array) -> Array:
        """From the outputs Qᵀy to the outputs y, where pairs of logits are wanted."""
        if self._basis is None or self.head.axis is None:
            return block
        paired = [a for a in self.pair.pairs if a != self.batch]
        logits = self._logits(self.head.axis)
        if logits not in paired:
            return block
        lead = block.ndim - 2
        block = block.reshape(*block.shape[:lead], *self.seeds1.paired, *self.seeds2.paired)
        for first in (lead, lead + len(paired)):
            axis = first + paired.index(logits)
            q = self._basis.astype(block.dtype)
            how = self.layout.precision
            block = jnp.moveaxis(jnp.tensordot(block, q, ((axis,), (1,)), precision=how), -1, axis)
        sizes = [math.prod(shape[a] for a in paired) for shape in (self.shape1, self.shape2)]
        return block.reshape(*block.shape[:lead], *sizes)

    def _at_output(self, passes1: Passes, passes2: Passes, layout: Layout) -> Array | None:
        """Terms of the last layer, for all outputs."""
        total: Array | None = None
        axes1, axes2 = self._output_axes(self.shape1), self._output_axes(self.shape2)
        pairs = [p for form in self.forms.values() if form.name == "unit" for p in form.pairs]
        for i, j, _ in pairs:
            for k, other in {(i, j), (j, i)} if self.same else {(i, j)}:
                first, second = passes1.at_output(k), passes2.at_output(other)
                term = heads.unit_term(first, second, layout, axes1, axes2)
                total = term if total is None else total + term.astype(total.dtype)
        if total is None:
            return None
        examples = total.shape[: len(layout.result) - 3]
        groups = ((self.shape1, self.pair.diagonal), (self.shape1, self.pair.pairs),
                  (self.shape2, self.pair.pairs))  # fmt: skip
        sizes = [math.prod(shape[a] for a in axes if a != self.batch) for shape, axes in groups]
        return total.reshape(*examples, *sizes)

    def _arrange(self, kernel: Array) -> Array:
        """From (examples, kept, outputs, outputs′) to the layout of `pair`; traces averaged."""
        pair, batch = self.pair, self.batch
        count = len(self.layout.result) - 3
        kernel = kernel.reshape(
            *kernel.shape[:count],
            *self.seeds1.kept,
            *(shape[a] for shape in (self.shape1, self.shape2) for a in pair.pairs if a != batch),
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
