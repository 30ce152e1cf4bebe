"""Forward and backward passes of one side of a kernel, from the analysis of its function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax, tree_util

from tangents._core.typing import Array
from tangents._finite.problem import Problem
from tangents._finite.side import Side
from tangents._finite.structure.analysis import Analysis
from tangents._finite.structure.contraction import Factors
from tangents._finite.structure.execution import Execution

HIGHEST = lax.Precision.HIGHEST


class Traced:
    """A side's function of one example (or of the batch, if nothing is promised), analysed."""

    def __init__(self, problem: Problem, side: Side, *, factor: bool = True, follow: bool = True):
        """Trace and analyse; nothing is computed."""
        self.problem, self.side = problem, side
        spec = side.vmap
        leaves, treedef = tree_util.tree_flatten(side.x)
        is_array = [hasattr(x, "dtype") or isinstance(x, float) for x in leaves]
        self.arrays = [jnp.asarray(x) for x, yes in zip(leaves, is_array, strict=True) if yes]

        def unflatten(x: Sequence[Array]) -> Any:
            given = iter(x)
            return treedef.unflatten(
                [next(given) if yes else leaf for leaf, yes in zip(leaves, is_array, strict=True)]
            )

        axes = [-1] * len(leaves) if spec is None else tree_util.tree_leaves(spec.in_axes)
        self.axes: list[int] = [a for a, yes in zip(axes, is_array, strict=True) if yes]
        self.kwargs_axes = {} if spec is None else spec.kwargs_axes
        self.kwargs = {name: side.kwargs[name] for name in self.kwargs_axes}
        self.size = None if spec is None else spec.size
        f = problem.f if spec is None else spec.per_example(problem.f)
        run = lambda weights, x, kw: f(weights, unflatten(x), {**side.kwargs, **kw})
        without = lambda axis, x: jax.ShapeDtypeStruct(
            tuple(n for k, n in enumerate(jnp.shape(x)) if k != axis), jnp.asarray(x).dtype
        )
        example = [without(a, x) for a, x in zip(self.axes, self.arrays, strict=True)]
        example_kwargs = tree_util.tree_map(without, self.kwargs_axes, self.kwargs)
        closed = jax.make_jaxpr(run)(problem.leaves, example, example_kwargs)
        self.analysis = Analysis(
            closed,
            problem.leaves,
            problem.leaf_names,
            caller=problem.caller,
            factor=factor,
            follow=follow,
        )
        self.execution = Execution(self.analysis)

    @property
    def mapped(self) -> bool:
        """Whether examples are independent, so that arrays have an axis of them in front."""
        return self.size is not None

    def take(self, examples: Array | None) -> tuple[list[Array], dict[str, Any]]:
        """Inputs of some examples; None for all."""
        if examples is None:
            return self.arrays, self.kwargs
        part = lambda axis, x: x if axis < 0 else jnp.take(x, examples, axis=axis)
        arrays = [part(a, x) for a, x in zip(self.axes, self.arrays, strict=True)]
        return arrays, tree_util.tree_map(part, self.kwargs_axes, self.kwargs)


class Passes:
    """Activations of some examples, and the backward pass to the probes."""

    def __init__(self, traced: Traced, examples: Array | None = None, forward: bool = False):
        """Run the forward pass.

        Args:
            traced: the side.
            examples: indices of the examples; None for all.
            forward: derivatives by forward mode, a pass for each entry of a probe.
        """
        self.traced, self.forward = traced, forward
        arrays, kwargs = traced.take(examples)
        self.size = traced.size if examples is None else examples.shape[0]

        def network(probes, x, kw):
            traced.execution.reverse = not forward
            flat = [*traced.problem.leaves, *x, *tree_util.tree_leaves(kw)]
            return traced.execution.run(flat, probes)

        if traced.mapped:
            unmapped = lambda axis: None if axis < 0 else axis
            in_axes = (
                0,
                [unmapped(a) for a in traced.axes],
                tree_util.tree_map(unmapped, traced.kwargs_axes),
            )
            batched = jax.vmap(network, in_axes=in_axes, axis_size=self.size)
        else:
            batched = network
        lead = (self.size,) if traced.mapped else ()
        zeros = {
            k: jnp.zeros((*lead, *probe.shape), probe.dtype)
            for k, probe in traced.analysis.live_probes.items()
        }
        passes = lambda probes: batched(probes, arrays, kwargs)
        if forward:
            self.outputs, self._push, self.kept = jax.linearize(passes, zeros, has_aux=True)
            self._zeros = zeros
        else:
            self.outputs, pull, self.kept = jax.vjp(passes, zeros, has_aux=True)
            # What the forward pass keeps is computed once: without a barrier XLA would compute
            # derivatives of nonlinearities anew inside the pass of every seed.
            self._pull = lax.optimization_barrier(pull)

    def at_output(self, use: int) -> Factors:
        """Factors of a use at the output: its cotangents are unit vectors, and not made."""
        analysis = self.traced.analysis
        lead = (self.size,) if self.traced.mapped else ()
        nothing = jnp.zeros(lead, analysis.probes[analysis.uses[use].probe].dtype)
        return Factors(analysis.uses[use], self.kept.get(use), nothing, self.traced.mapped)

    def factors(
        self, leaf: int, seeds: Array, basis: tuple[int, Array] | None = None
    ) -> list[Factors]:
        """Factors of each use for some entries of an output.

        Args:
            leaf: the output.
            seeds: flat indices into the output (of one example), shape (traced, kept, output);
                negative ones stand for nothing.
            basis: an axis of the output and vectors (size, count): the indices are then those of an
                output whose entries along that axis are the products with these vectors.
        """
        cotangents = (
            self._by_pushing(leaf, seeds) if self.forward else self._by_pulling(leaf, seeds, basis)
        )
        return [
            Factors(use, self.kept.get(k), cotangents[use.probe], self.traced.mapped)
            for k, use in enumerate(self.traced.analysis.uses)
        ]

    def _by_pulling(
        self, leaf: int, seeds: Array, basis: tuple[int, Array] | None
    ) -> dict[int, Array]:
        mapped = self.traced.mapped

        def cotangent(index: Array, y: Array) -> Array:
            shape = list(y.shape[1:] if mapped else y.shape)
            if basis is not None:
                shape[basis[0]] = basis[1].shape[1]
            one = (jnp.arange(math.prod(shape), dtype=index.dtype) == index).astype(y.dtype)
            one = one.reshape(shape)
            if basis is not None:
                axis, vectors = basis
                wide = jnp.tensordot(
                    one, vectors.astype(y.dtype), ((axis,), (1,)), precision=HIGHEST
                )
                one = jnp.moveaxis(wide, -1, axis)
            return jnp.broadcast_to(one, y.shape)

        def row(index):
            filled = []
            for k, y in enumerate(self.outputs):
                if k != leaf:
                    filled.append(jnp.zeros_like(y))
                    continue
                filled.append(cotangent(index, y))
            return self._pull(filled)[0]

        at = 1 if mapped else 0
        rows = jax.vmap(row, out_axes=at)(seeds.reshape(-1))
        return {
            k: r.reshape(*r.shape[:at], *seeds.shape, *r.shape[at + 1 :]) for k, r in rows.items()
        }

    def _by_pushing(self, leaf: int, seeds: Array) -> dict[int, Array]:
        mapped = self.traced.mapped
        at = 1 if mapped else 0
        result = {}
        for k, zero in self._zeros.items():
            shape = zero.shape[at:]

            def column(index, k=k, zero=zero, shape=shape):
                one = (
                    (jnp.arange(math.prod(shape), dtype=index.dtype) == index)
                    .reshape(shape)
                    .astype(zero.dtype)
                )
                return self._push({**self._zeros, k: jnp.broadcast_to(one, zero.shape)})[leaf]

            columns = jax.vmap(column, out_axes=-1)(jnp.arange(math.prod(shape), dtype=seeds.dtype))
            flat = columns.reshape(*columns.shape[:at], -1, columns.shape[-1])
            inside = (seeds >= 0)[..., None]
            rows = jnp.where(inside, jnp.take(flat, jnp.maximum(seeds, 0), axis=at), 0)
            result[k] = rows.reshape(*rows.shape[:at], *seeds.shape, *shape).astype(zero.dtype)
        return result
