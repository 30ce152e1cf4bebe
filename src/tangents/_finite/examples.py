"""Independent examples: found out where nothing is promised, a promise held against the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import tree_util

from tangents._core import vmap_axes as vmapping
from tangents._core.trees import is_array
from tangents._core.typing import Array, PyTree
from tangents._core.vmap_axes import VMapSpec
from tangents._finite.independence import Finding, examine
from tangents._finite.side import Side

Network = Callable[[list[Array], PyTree, dict[str, Any]], list[Array]]


def find(f: Network, leaves: list[Array], side: Side, out_tree: Any) -> VMapSpec | None:
    """The axes of independent examples, if all inputs and outputs surely have them first."""
    try:
        spec = vmapping.resolve(0, side.x, side.kwargs, side.outputs, out_tree, caller="")
    except (TypeError, ValueError):
        return None  # no common first axis
    if spec.size == 0:
        return None
    # A batch of one says little: its axis is like any other of size one.
    size = max(spec.size, 2)
    # One example at a time is what will be computed: a network that does something else with a
    # batch of one (`if x.shape[0] == 1`) is not what the batch is.
    batch, resized, single = (_trace(f, leaves, side, spec, n) for n in (size, size + 1, 1))
    if batch is None or resized is None or single is None:
        return None
    axes = _axes(leaves, side, spec)
    finding = examine(batch, axes, spec.out_axes, (resized, size, size + 1), single)
    if not finding.independent:
        return None
    one_example = lambda p: f(p, *spec.take(side.x, side.kwargs, slice(0, 1)))
    try:
        vmapping.check_examples(spec, one_example, leaves, side.outputs, caller="")
    except Exception:  # on a single example the network has other shapes, or fails
        return None
    return spec


def examine_promise(f: Network, leaves: list[Array], side: Side, spec: VMapSpec) -> Finding:
    """What the network says of a promise; where it cannot be traced, nothing."""
    if spec.size < 2:
        return Finding(False)
    closed = _trace(f, leaves, side, spec, spec.size)
    if closed is None:
        return Finding(False)
    return examine(closed, _axes(leaves, side, spec), spec.out_axes)


def _split(side: Side, spec: VMapSpec) -> tuple[list[Any], list[int], Any]:
    """Leaves of the inputs and of mapped keyword arguments, their axes, and their tree."""
    mapped = {k: side.kwargs[k] for k in spec.kwargs_axes}
    flat, tree = tree_util.tree_flatten((side.x, mapped))
    axes = tree_util.tree_leaves((spec.in_axes, spec.kwargs_axes))
    return flat, axes, tree


def _axes(leaves: Sequence[Array], side: Side, spec: VMapSpec) -> list[int]:
    flat, axes, _ = _split(side, spec)
    return [-1] * len(leaves) + [
        a for a, x in zip(axes, flat, strict=True) if is_array(x) or isinstance(x, float)
    ]


def _trace(f: Network, leaves: list[Array], side: Side, spec: VMapSpec, size: int) -> Any:
    """The jaxpr of the network on a batch of some size; None if it cannot be traced."""
    flat, axes, tree = _split(side, spec)
    arrays = [is_array(x) or isinstance(x, float) for x in flat]

    def resized(x: Any, axis: int) -> jax.ShapeDtypeStruct:
        shape = tuple(size if k == axis else n for k, n in enumerate(jnp.shape(x)))
        return jax.ShapeDtypeStruct(shape, jnp.asarray(x).dtype)

    def run(leaves: list[Array], given: list[Array]) -> list[Array]:
        values = iter(given)
        x, mapped = tree_util.tree_unflatten(
            tree, [next(values) if yes else x for x, yes in zip(flat, arrays, strict=True)]
        )
        return f(leaves, x, {**side.kwargs, **mapped})

    example = [resized(x, a) for x, a, yes in zip(flat, axes, arrays, strict=True) if yes]
    try:
        return jax.make_jaxpr(run)(leaves, example)
    except Exception:  # a function that needs the values, or this size of batch
        return None
