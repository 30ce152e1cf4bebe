"""`vmap_axes`: the promise that examples along an axis do not interact, and how it is used.

The function is called on one example at a time, with the example's axis kept at size one, and
mapped over that axis. A promise that does not fit the shapes is an error; one that fits the shapes
but is broken by the function (batch normalisation in training) is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import tree_util

from tangents._core.errors import describe_axes
from tangents._core.typing import Array, PyTree, VMapAxes


@dataclass(frozen=True)
class VMapSpec:
    """`vmap_axes` resolved against inputs and outputs: one non-negative axis or None a leaf."""

    in_axes: PyTree
    """Tree of the inputs' structure; -1 stands for 'not mapped' (None is no leaf)."""
    kwargs_axes: dict[str, PyTree]
    out_axes: tuple[int, ...]
    """One axis for each output leaf."""
    size: int

    def take(self, x: PyTree, kwargs: dict[str, Any], examples: Any) -> tuple[PyTree, dict]:
        """Inputs and keyword arguments of some examples (a slice or an array of indices)."""
        part = lambda axis, leaf: leaf if axis < 0 else _take(leaf, examples, axis)
        x = tree_util.tree_map(part, self.in_axes, x)
        mapped = {k: tree_util.tree_map(part, a, kwargs[k]) for k, a in self.kwargs_axes.items()}
        return x, {**kwargs, **mapped}

    def with_kwarg_axis(self, name: str, value: PyTree, axis: int = 0) -> VMapSpec:
        """The same promise with one more mapped keyword argument."""
        axes = {**self.kwargs_axes, name: tree_util.tree_map(lambda _: axis, value)}
        return replace(self, kwargs_axes=axes)

    def per_example(self, f: Callable[..., list[Array]]) -> Callable[..., list[Array]]:
        """`f(leaves, x, kwargs)` on one example: axes of size one go in and are taken out."""

        def one(leaves, x, kwargs):
            grow = lambda axis, leaf: leaf if axis < 0 else jnp.expand_dims(leaf, axis)
            x = tree_util.tree_map(grow, self.in_axes, x)
            grown = {k: tree_util.tree_map(grow, a, kwargs[k]) for k, a in self.kwargs_axes.items()}
            outputs = f(leaves, x, {**kwargs, **grown})
            return [jnp.squeeze(y, a) for y, a in zip(outputs, self.out_axes, strict=True)]

        return one

    def map_examples(
        self, one: Callable, x: PyTree, kwargs: dict[str, Any], out_axes: Any = 0
    ) -> Any:
        """`one(x_i, kwargs_i)` for every example, stacked on `out_axes`."""
        unmapped = lambda axis: None if axis < 0 else axis
        moves = {k for k, a in self.kwargs_axes.items() if max(tree_util.tree_leaves(a)) >= 0}
        static = {k: v for k, v in kwargs.items() if k not in moves}
        mapped = {k: v for k, v in kwargs.items() if k in moves}
        flat_x, treedef = tree_util.tree_flatten(x)
        axes = [unmapped(a) for a in tree_util.tree_leaves(self.in_axes)]
        kwargs_axes = {k: tree_util.tree_map(unmapped, self.kwargs_axes[k]) for k in mapped}
        call = lambda leaves, kw: one(tree_util.tree_unflatten(treedef, leaves), {**static, **kw})
        return jax.vmap(call, in_axes=(axes, kwargs_axes), out_axes=out_axes)(flat_x, mapped)


def _take(leaf: Array, examples: Any, axis: int) -> Array:
    if isinstance(examples, slice):
        return jax.lax.slice_in_dim(leaf, examples.start, examples.stop, axis=axis)
    return jnp.take(leaf, examples, axis=axis)


def resolve(
    vmap_axes: VMapAxes,
    x: PyTree,
    kwargs: dict[str, Any],
    outputs: Sequence[jax.ShapeDtypeStruct],
    out_tree: Any,
    *,
    caller: str,
    argument: str = "x1",
) -> VMapSpec:
    """Check `vmap_axes` against shapes and spell it out for every leaf."""
    triple = isinstance(vmap_axes, tuple | list) and len(vmap_axes) == 3
    if triple and isinstance(vmap_axes[2], dict):
        in_axes, out_axes, kwargs_axes = vmap_axes
    else:
        in_axes, out_axes, kwargs_axes = vmap_axes, vmap_axes, {}
    names = f"{caller}: vmap_axes={vmap_axes!r}"
    resolved_in = _broadcast(in_axes, x, f"{names}: its axes of {argument}", argument)
    resolved_kwargs = {}
    for key, axes in kwargs_axes.items():
        if key not in kwargs:
            raise ValueError(
                f"{names} maps the keyword argument {key!r}, which the call does not have "
                f"(it has {sorted(kwargs)})."
            )
        resolved_kwargs[key] = _broadcast(axes, kwargs[key], f"{names}: its axes of {key}", key)
    template = tree_util.tree_unflatten(out_tree, list(outputs))
    resolved_out = _broadcast(
        out_axes, template, f"{names}: its axes of the output", "f(params, x)"
    )
    out_list = tuple(tree_util.tree_leaves(resolved_out))
    if any(axis < 0 for axis in out_list):
        raise ValueError(f"{names}: every output needs a batch axis; None maps nothing.")

    sizes: dict[int, str] = {}
    for tree, value, name in [
        (resolved_in, x, argument),
        *((resolved_kwargs[k], kwargs[k], k) for k in resolved_kwargs),
    ]:
        for axis, leaf in zip(tree_util.tree_leaves(tree), tree_util.tree_leaves(value)):
            if axis >= 0:
                sizes.setdefault(
                    jnp.shape(leaf)[axis], f"axis {axis} of {name} {tuple(jnp.shape(leaf))}"
                )
    if not sizes:
        raise ValueError(f"{names} maps no axis of {argument}.")
    if len(sizes) > 1:
        found = " and ".join(f"{n} along {where}" for n, where in sizes.items())
        raise ValueError(f"{names}: the mapped axes must have one size; they have {found}.")
    (size,) = sizes
    for output, axis in zip(outputs, out_list):
        if output.shape[axis] != size:
            raise ValueError(
                f"{names}: {argument} has {size} examples along {sizes[size]}, but f(params, "
                f"{argument}) has shape {tuple(output.shape)}, which is {output.shape[axis]} along "
                f"its axis {axis}. Give the axis of the output along which the examples lie, "
                "vmap_axes=(in_axes, out_axes, {}), or vmap_axes=None."
            )
    return VMapSpec(resolved_in, resolved_kwargs, out_list, size)


def check_examples(
    spec: VMapSpec,
    one_example: Callable[[list[Array]], list[Array]],
    leaves: list[Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    *,
    caller: str,
    argument: str = "x1",
) -> None:
    """Hold the shapes of a batch of one example against those of the whole batch."""
    if spec.size == 0:
        return
    singles = jax.eval_shape(one_example, leaves)
    for single, output, axis in zip(singles, outputs, spec.out_axes, strict=True):
        expected = tuple(1 if a == axis else n for a, n in enumerate(output.shape))
        if tuple(single.shape) != expected:
            raise ValueError(
                f"{caller}: vmap_axes promises that examples do not interact, but f(params, "
                f"{argument}) has shape {tuple(output.shape)} on {spec.size} examples and "
                f"{tuple(single.shape)} on one, where {expected} was needed. Correct vmap_axes "
                "or pass vmap_axes=None."
            )


def _broadcast(axes: Any, tree: PyTree, where: str, name: str) -> PyTree:
    """A prefix tree of axes spelled out for every leaf, non-negative; -1 for None."""

    def one(axis: Any, leaf: Any) -> int:
        if axis is None:
            return -1
        if isinstance(axis, bool) or not isinstance(axis, int | np.integer):
            raise TypeError(f"{where} must be integers or None, not {axis!r}.")
        ndim = len(jnp.shape(leaf))
        if not -ndim <= axis < ndim:
            raise ValueError(
                f"{where}: axis {axis} is out of range: {name} has shape "
                f"{tuple(jnp.shape(leaf))}, so {describe_axes(ndim)}."
            )
        return int(axis) % ndim

    spread = lambda axis, subtree: tree_util.tree_map(lambda leaf: one(axis, leaf), subtree)
    try:
        return tree_util.tree_map(spread, axes, tree, is_leaf=lambda a: a is None)
    except ValueError as error:
        if "out of range" in str(error):
            raise
        raise ValueError(f"{where} do not match the structure of {name}: {axes!r}.") from error
