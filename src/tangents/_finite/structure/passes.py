"""Forward and backward passes of one side of a kernel, from the analysis of its function."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax, tree_util

from tangents._core.typing import Array
from tangents._finite.problem import Problem
from tangents._finite.side import Side
from tangents._finite.structure.analysis import Analysis
from tangents._finite.structure.constancy import Axes, constant_axes
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

        unmapped = lambda axis: None if axis < 0 else axis
        data_axes = (
            [unmapped(a) for a in traced.axes],
            tree_util.tree_map(unmapped, traced.kwargs_axes),
        )
        if traced.mapped and not forward:
            self._by_example(network, (arrays, kwargs), data_axes)
            return
        batched = network
        if traced.mapped:
            batched = jax.vmap(network, in_axes=(0, *data_axes), axis_size=self.size)
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

    def _by_example(self, network: Callable[..., Any], data: Any, axes: Any) -> None:
        """The forward pass and the pullback of one example, mapped over all.

        What a backward pass makes of the last linear layers is the same for every example, and is
        then made once: so each pullback keeps which of its values differ between examples.
        """
        probes = self.traced.analysis.live_probes
        zeros = {k: jnp.zeros(probe.shape, probe.dtype) for k, probe in probes.items()}

        def one(x, kw):
            return jax.vjp(lambda probes: network(probes, x, kw), zeros, has_aux=True)

        size = self.size = self.size or 1
        (outputs, pull, kept), own, _ = map_what_differs(one, data, axes, size)
        spread = lambda array, differs: array if differs else _broadcast(array[None], size)
        self.outputs = jax.tree.map(spread, outputs, own[0])
        self.kept = jax.tree.map(spread, kept, own[2])
        # As below.
        self._pull, self._own = lax.optimization_barrier(pull), own[1]

    def at_output(self, use: int) -> Factors:
        """Factors of a use at the output: its cotangents are unit vectors, and not made."""
        analysis = self.traced.analysis
        lead = (self.size,) if self.traced.mapped else ()
        nothing = jnp.zeros(lead, analysis.probes[analysis.uses[use].probe].dtype)
        return Factors(analysis.uses[use], self.kept.get(use), nothing, self.traced.mapped)

    def part(self, pull: Any, kept: dict[int, Array], size: int) -> Passes:
        """Of some of the examples, from `stacked`."""
        part = copy.copy(self)
        part._pull, part.kept, part.size = pull, kept, size
        shape = lambda y: jax.ShapeDtypeStruct((size, *y.shape[1:]), y.dtype)
        part.outputs = [shape(y) for y in self.outputs]
        return part

    def over_parts(self, size: int, function: Callable[[Passes], Any]) -> Any:
        """`function` of so many examples at a time, its results stacked; of all, if that is one.

        A pullback keeps what differs between examples with an axis of them.
        """
        assert self.size is not None and self.size % size == 0
        pull, tree = tree_util.tree_flatten(self._pull)
        differs = tree_util.tree_leaves(self._own)
        # As matrices: of axes of size one XLA chooses orders, and copies to bring them in line.
        cut = lambda a: a.reshape(a.shape[0] // size, -1)
        own = [a for a, yes in zip(pull, differs, strict=True) if yes]
        back = lambda row, a: row.reshape(size, *a.shape[1:])

        def one(given: tuple[list[Array], dict[int, Array]]) -> Any:
            mine = iter([back(row, a) for row, a in zip(given[0], own, strict=True)])
            leaves = [next(mine) if yes else a for a, yes in zip(pull, differs, strict=True)]
            kept = {k: back(row, self.kept[k]) for k, row in given[1].items()}
            return function(self.part(tree.unflatten(leaves), kept, size))

        return lax.map(one, ([cut(a) for a in own], {k: cut(a) for k, a in self.kept.items()}))

    def factors(
        self,
        leaf: int,
        seeds: Array,
        basis: tuple[int, Array] | None = None,
        *,
        spread: bool = True,
    ) -> list[Factors]:
        """Factors of each use for some entries of an output.

        Args:
            leaf: the output.
            seeds: flat indices into the output (of one example), shape (traced, kept, output);
                negative ones stand for nothing.
            basis: an axis of the output and vectors (size, count): the indices are then those of an
                output whose entries along that axis are the products with these vectors.
            spread: cotangents that are the same for all examples are repeated for each; otherwise
                their axis of examples is of size one.
        """
        cotangents, constant = (
            (self._by_pushing(leaf, seeds), {})
            if self.forward
            else self._by_pulling(leaf, seeds, basis)
        )
        if spread and self.size is not None:
            cotangents = {k: _broadcast(c, self.size) for k, c in cotangents.items()}
        return [
            Factors(
                use,
                self.kept.get(k),
                cotangents[use.probe],
                self.traced.mapped,
                constant=constant.get(use.probe, frozenset()),
            )
            for k, use in enumerate(self.traced.analysis.uses)
        ]

    def _by_pulling(
        self, leaf: int, seeds: Array, basis: tuple[int, Array] | None
    ) -> tuple[dict[int, Array], dict[int, Axes]]:
        """Cotangents of the probes, and the axes of each along which it is constant."""
        mapped = self.traced.mapped

        def cotangent(index: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            start = list(shape)
            if basis is not None:
                start[basis[0]] = basis[1].shape[1]
            one = (jnp.arange(math.prod(start), dtype=index.dtype) == index).astype(dtype)
            one = one.reshape(start)
            if basis is not None:
                axis, vectors = basis
                wide = jnp.tensordot(one, vectors.astype(dtype), ((axis,), (1,)), precision=HIGHEST)
                one = jnp.moveaxis(wide, -1, axis)
            return one

        def rows(pull: Any) -> dict[int, Array]:
            def row(index):
                filled = []
                for k, y in enumerate(self.outputs):
                    shape = y.shape[1:] if mapped else y.shape
                    if k == leaf:
                        filled.append(cotangent(index, shape, y.dtype))
                    else:
                        filled.append(jnp.zeros(shape, y.dtype))
                return pull(filled)[0]

            return jax.vmap(row)(seeds.reshape(-1))

        if mapped:
            assert self.size is not None
            axes = jax.tree.map(lambda differs: 0 if differs else None, self._own)
            found, own, constant = map_what_differs(rows, (self._pull,), (axes,), self.size)
            found = {k: r if own[k] else r[None] for k, r in found.items()}
            constant = {k: frozenset(a - 1 for a in axes if a) for k, axes in constant.items()}
        else:
            found, constant = rows(self._pull), {}
        at = 1 if mapped else 0
        cotangents = {
            k: r.reshape(*r.shape[:at], *seeds.shape, *r.shape[at + 1 :]) for k, r in found.items()
        }
        return cotangents, constant

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


def _broadcast(array: Array, size: int) -> Array:
    """An array with an axis of examples in front, which may be of size one."""
    return jnp.broadcast_to(array, (size, *array.shape[1:]))


def map_what_differs(
    function: Callable[..., Any], arguments: Sequence[Any], axes: Sequence[Any], size: int
) -> tuple[Any, Any, Any]:
    """`jax.vmap`, but outputs that depend on no mapped argument get no axis in front.

    Args:
        function: of trees of arrays.
        arguments: its arguments.
        axes: trees of the same structure: the axis of each array that is mapped, or None.
        size: number of entries along these axes.

    Returns:
        The outputs, a tree of whether each has the axis, and one of the axes of `function`'s
        outputs along which they are constant.
    """
    flat, tree = tree_util.tree_flatten(tuple(arguments))
    along = tree_util.tree_leaves(tuple(axes), is_leaf=lambda a: a is None)
    without = lambda a, axis: jax.ShapeDtypeStruct(
        tuple(n for k, n in enumerate(a.shape) if k != axis), a.dtype
    )
    one = [without(a, axis) for a, axis in zip(flat, along, strict=True)]
    closed, shapes = jax.make_jaxpr(
        lambda *leaves: function(*tree.unflatten(leaves)), return_shape=True
    )(*one)
    own = _depends(closed.jaxpr, [axis is not None for axis in along])
    structure = tree_util.tree_structure(shapes)
    mapped = jax.vmap(
        jex.jaxpr_as_fun(closed),
        in_axes=tuple(along),
        out_axes=[0 if differs else None for differs in own],
        axis_size=size,
    )
    constant = constant_axes(closed.jaxpr)
    return tuple(map(structure.unflatten, (mapped(*flat), own, constant)))


def _depends(jaxpr: Any, inputs: Sequence[bool]) -> list[bool]:
    """Whether each output depends on any of the inputs that are marked."""
    marked = {v for v, yes in zip(jaxpr.invars, inputs, strict=True) if yes}
    is_marked = lambda atom: not isinstance(atom, jex.Literal) and atom in marked
    for equation in jaxpr.eqns:
        if any(is_marked(atom) for atom in equation.invars):
            marked.update(equation.outvars)
    return [is_marked(atom) for atom in jaxpr.outvars]
