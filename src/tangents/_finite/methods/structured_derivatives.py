"""Structured derivatives: the Jacobian of every use of a weight stays factored.

The walk over the jaxpr (`structure`) finds the uses; one backward pass for each output gives their
cotangents, one forward pass their activations; the kernel is a sum over all pairs of uses of the
same weight (Novak, Sohl-Dickstein, Schoenholz 2022, section 3.3, generalised to any use).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import tree_util

from tangents._core.axes import PairAxes
from tangents._core.typing import Array
from tangents._finite.problem import Problem, Side
from tangents._finite.structure import contraction
from tangents._finite.structure.analysis import Analysis
from tangents._finite.structure.contraction import Factors, Layout
from tangents._finite.structure.execution import Execution


def kernels(problem: Problem, axes: list[PairAxes]) -> list[Array]:
    """Kernel of each output leaf."""
    side1 = Linearised(problem, problem.side1)
    side2 = side1 if problem.symmetric else Linearised(problem, problem.side2)
    return [_kernel(side1, side2, k, pair, problem) for k, pair in enumerate(axes)]


class Linearised:
    """One side: its analysis, activations, and the backward pass to its probes."""

    def __init__(self, problem: Problem, side: Side, *, factor: bool = True, follow: bool = True):
        """Run the forward pass of `side`."""
        self.problem, self.side = problem, side
        spec = side.vmap
        leaves, treedef = tree_util.tree_flatten(side.x)
        run: Callable[..., list[Array]]
        if spec is None:
            mapped_kwargs: dict[str, Any] = {}
            run = lambda weights, x, kw: problem.f(weights, unflatten(x), side.kwargs)
        else:
            mapped_kwargs = {name: side.kwargs[name] for name in spec.kwargs_axes}
            one = spec.per_example(problem.f)
            run = lambda weights, x, kw: one(weights, unflatten(x), {**side.kwargs, **kw})
        is_array = [hasattr(x, "dtype") or isinstance(x, float) for x in leaves]
        arrays = [jnp.asarray(x) for x, yes in zip(leaves, is_array, strict=True) if yes]

        def unflatten(x):
            given = iter(x)
            return treedef.unflatten(
                [next(given) if yes else leaf for leaf, yes in zip(leaves, is_array, strict=True)]
            )

        in_axes = [-1] * len(arrays)
        if spec is not None:
            all_axes = tree_util.tree_leaves(spec.in_axes)
            in_axes = [a for a, yes in zip(all_axes, is_array, strict=True) if yes]
        kwargs_axes = {} if spec is None else spec.kwargs_axes
        without = lambda axis, x: jax.ShapeDtypeStruct(
            tuple(n for k, n in enumerate(jnp.shape(x)) if k != axis), jnp.asarray(x).dtype
        )
        example = [without(a, x) for a, x in zip(in_axes, arrays, strict=True)]
        example_kwargs = tree_util.tree_map(without, kwargs_axes, mapped_kwargs)
        closed = jax.make_jaxpr(run)(problem.leaves, example, example_kwargs)
        self.analysis = Analysis(
            closed,
            problem.leaves,
            problem.leaf_names,
            caller=problem.caller,
            factor=factor,
            follow=follow,
        )
        execution = Execution(self.analysis)
        self.execution = execution

        def network(probes, x, kw):
            flat = [*problem.leaves, *x, *tree_util.tree_leaves(kw)]
            return execution.run(flat, probes)

        self.probes = dict(enumerate(self.analysis.probes))
        if spec is None:
            self.size = None
            passes = lambda probes: network(probes, arrays, mapped_kwargs)
        else:
            self.size = spec.size
            unmapped = lambda axis: None if axis < 0 else axis
            axes = (
                0,
                [unmapped(a) for a in in_axes],
                tree_util.tree_map(unmapped, kwargs_axes),
            )
            batched = jax.vmap(network, in_axes=axes)
            passes = lambda probes: batched(probes, arrays, mapped_kwargs)
        lead = () if self.size is None else (self.size,)
        zeros = {
            k: jnp.zeros((*lead, *probe.shape), probe.dtype) for k, probe in self.probes.items()
        }
        self.outputs, self._pull, self.kept = jax.vjp(passes, zeros, has_aux=True)

    @property
    def mapped(self) -> bool:
        """Whether arrays have an axis of examples in front."""
        return self.size is not None

    def cotangents(self, leaf: int, seeds: np.ndarray) -> dict[int, Array]:
        """For each probe the derivative of some entries of an output in it.

        `seeds` are flat indices into the output (of one example), shape (traced, kept, output);
        results have shape (examples if mapped, traced, kept, output, probe).
        """
        flat = seeds.reshape(-1)

        def row(index):
            filled = []
            for k, y in enumerate(self.outputs):
                if k != leaf:
                    filled.append(jnp.zeros_like(y))
                    continue
                shape = y.shape[1:] if self.mapped else y.shape
                one = jnp.arange(math.prod(shape)) == index
                filled.append(jnp.broadcast_to(one.reshape(shape).astype(y.dtype), y.shape))
            return self._pull(filled)[0]

        at = 1 if self.mapped else 0
        rows = jax.vmap(row, out_axes=at)(jnp.asarray(flat))
        return {
            k: r.reshape(*r.shape[:at], *seeds.shape, *r.shape[at + 1 :]) for k, r in rows.items()
        }

    def factors(self, cotangents: dict[int, Array]) -> list[Factors]:
        """Factors of each use."""
        return [
            contraction.factors(use, self.kept.get(k), cotangents[use.probe], self.mapped)
            for k, use in enumerate(self.analysis.uses)
        ]


@dataclass(frozen=True)
class Seeds:
    """Which entries of an output of one example are traced, kept once, and paired."""

    indices: np.ndarray
    """Flat indices, shape (traced, kept, paired)."""
    kept: tuple[int, ...]
    """Sizes of the kept axes."""
    paired: tuple[int, ...]

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
        flat = np.arange(math.prod(inner)).reshape(inner).transpose(order)
        return cls(flat.reshape([math.prod(s) for s in sizes]), sizes[1], sizes[2])


def _kernel(
    side1: Linearised, side2: Linearised, leaf: int, pair: PairAxes, problem: Problem
) -> Array:
    spec = side1.side.vmap
    batch = None if spec is None else spec.out_axes[leaf]
    shape1 = side1.side.outputs[leaf].shape
    shape2 = side2.side.outputs[leaf].shape
    seeds1, seeds2 = Seeds.of(shape1, pair, batch), Seeds.of(shape2, pair, batch)
    layout = Layout(
        mapped=batch is not None,
        same_examples=batch is not None and batch not in pair.pairs,
        sum_examples=batch is not None and batch in pair.trace,
        precision=problem.precision,
    )
    factors1 = side1.factors(side1.cotangents(leaf, seeds1.indices))
    same = side2 is side1
    factors2 = factors1 if same else side2.factors(side2.cotangents(leaf, seeds2.indices))
    total = _sum_over_weights(side1, side2, factors1, factors2, layout)
    if total is None:
        total = jnp.zeros(pair.kernel_shape(shape1, shape2), side1.side.outputs[leaf].dtype)
        return total
    return _arrange(total, pair, layout, seeds1, seeds2, batch, shape1)


def _arrange(
    kernel: Array,
    pair: PairAxes,
    layout: Layout,
    seeds1: Seeds,
    seeds2: Seeds,
    batch: int | None,
    shape1: Sequence[int],
) -> Array:
    """From (examples, kept, outputs, outputs′) to the layout of `pair`, averaged over traces."""
    count = len(layout.result) - 3
    kernel = kernel.reshape(*kernel.shape[:count], *seeds1.kept, *seeds1.paired, *seeds2.paired)
    kept = [a for a in pair.diagonal if a != batch]
    paired = [a for a in pair.pairs if a != batch]
    # Where the index (or the two indices) of each output axis stand now.
    where: dict[int, list[int]] = {a: [count + k] for k, a in enumerate(kept)}
    first = count + len(kept)
    where |= {a: [first + k, first + len(paired) + k] for k, a in enumerate(paired)}
    if batch is not None and batch not in pair.trace:
        where[batch] = list(range(count))
    order = [k for a in range(pair.ndim) if a not in pair.trace for k in where[a]]
    return jnp.transpose(kernel, order) / max(pair.trace_size(shape1), 1)


def _sum_over_weights(
    side1: Linearised,
    side2: Linearised,
    factors1: list[Factors],
    factors2: list[Factors],
    layout: Layout,
) -> Array | None:
    """The kernel's sum over weights, labels `layout.result`."""
    same = side1 is side2
    dense1 = _dense_weights(side1)
    dense2 = dense1 if same else _dense_weights(side2)
    terms: list[Array] = []
    weights = range(len(side1.problem.leaves))
    dense: set[int] = dense1 | dense2
    for weight in weights:
        if weight in dense:
            continue
        mine1 = [f for f in factors1 if f.use.root == weight]
        mine2 = [f for f in factors2 if f.use.root == weight]
        paired = _pairs(mine1, mine2, side1, layout, same)
        if paired is None:
            dense.add(weight)
        else:
            terms += paired
    if dense:
        gradients1 = _gradients(side1, factors1, dense, layout)
        gradients2 = gradients1 if same else _gradients(side2, factors2, dense, layout)
        for weight in sorted(dense & set(gradients1) & set(gradients2)):
            terms.append(contraction.multiply(gradients1[weight], gradients2[weight], layout))
    total = None
    for term in terms:
        total = term if total is None else total + term.astype(total.dtype)
    return total


def _dense_weights(side: Linearised) -> set[int]:
    """Weights that something is computed from before they are used."""
    roots = side.analysis.roots
    return {w for root in roots if root.ref is not None for w in root.weights}


def _pairs(
    mine1: list[Factors], mine2: list[Factors], side1: Linearised, layout: Layout, same: bool
) -> list[Array] | None:
    """Terms of all pairs of uses of one weight; None if some cannot be matched."""
    terms = []
    for i, f1 in enumerate(mine1):
        for j, f2 in enumerate(mine2):
            root = side1.analysis.roots[f1.use.root]
            if 0 in root.shape or contraction.apart(f1.use, f2.use, root):
                continue
            match = contraction.matched(f1.use, f2.use)
            if match is None:
                return None
            terms.append(contraction.gram(f1, f2, match, layout))
    return terms


def _gradients(
    side: Linearised, factors: list[Factors], wanted: set[int], layout: Layout
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


def _pull_prologue(side: Linearised, gradients: dict[int, Array]) -> dict[int, Array]:
    """Gradients in computed roots as gradients in the weights they are computed from."""
    roots = side.analysis.roots
    values, pullback = jax.vjp(side.execution.prologue, list(side.problem.leaves))
    lead = next(iter(gradients.values())).shape[:-1]

    def pull(rows):
        full = {
            k: rows[k].reshape(v.shape).astype(v.dtype) if k in rows else jnp.zeros_like(v)
            for k, v in values.items()
        }
        return pullback(full)[0]

    flat = {k: g.reshape(-1, g.shape[-1]) for k, g in gradients.items()}
    pulled = jax.vmap(pull)(flat)
    touched = {w for k in gradients for w in roots[k].weights}
    return {w: pulled[w].reshape(*lead, -1) for w in touched}
