"""One finite-width kernel to compute, with everything checked: what a method is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax import lax, tree_util

from tangents import frontends
from tangents._core import precision as precision_policy
from tangents._core import vmap_axes as vmapping
from tangents._core.axes import PairAxes
from tangents._core.kwargs import is_pair, merge_equal_pairs, split_kwargs
from tangents._core.trees import Partition
from tangents._core.typing import ApplyFn, Array, Axes, PyTree, VMapAxes
from tangents._finite import examples
from tangents._finite.side import Side


@dataclass(frozen=True)
class Problem:
    """A function of its differentiable leaves, and the two inputs it is compared on.

    `f(leaves, x, kwargs)` returns the list of output leaves.
    """

    f: Callable[[list[Array], PyTree, dict[str, Any]], list[Array]]
    leaves: list[Array]
    leaf_names: list[str]
    side1: Side
    side2: Side
    symmetric: bool
    """x2 was not given: both sides are one."""
    out_tree: Any
    precision: lax.Precision
    caller: str

    @property
    def is_traced(self) -> bool:
        """Whether the kernel is being compiled, not computed step by step."""
        arrays = tree_util.tree_leaves((self.leaves, self.side1.x, self.side2.x))
        return any(isinstance(leaf, jax.core.Tracer) for leaf in arrays)

    def pair_axes(self, trace_axes: Axes, diagonal_axes: Axes) -> list[PairAxes]:
        """Trace and diagonal axes of each output leaf, checked."""
        return [
            PairAxes.of(a.shape, b.shape, trace_axes, diagonal_axes, caller=self.caller)
            for a, b in zip(self.side1.outputs, self.side2.outputs, strict=True)
        ]

    def run(self, side: Side) -> Callable[[list[Array]], list[Array]]:
        """The outputs on one side as a function of the differentiable leaves."""
        return lambda leaves: self.f(leaves, side.x, side.kwargs)

    def result(self, kernels: list[Array]) -> PyTree:
        """Kernels of the output leaves, in the structure of the output."""
        return tree_util.tree_unflatten(self.out_tree, kernels)


def make_problem(
    f: ApplyFn,
    x1: PyTree,
    x2: PyTree | None,
    params: PyTree,
    kwargs: dict[str, Any],
    *,
    vmap_axes: VMapAxes = None,
    precision: precision_policy.PrecisionLike = None,
    caller: str,
    differentiates: bool = True,
    find_examples: bool = False,
) -> Problem:
    """Check a kernel's inputs and bring them into the form that methods take.

    `find_examples`: where no `vmap_axes` are given, find out whether examples along the first axis
    are independent; if they surely are, go on as if `vmap_axes=0` had been given.
    """
    if x1 is None:
        raise ValueError(f"{caller}: x1 is None; only x2 may be, and then it stands for x1.")
    # A model in place of a function, and tensors of its framework in place of arrays.
    f = frontends.as_apply_fn(f)
    x1, x2, params = frontends.as_jax((x1, x2, params))
    if x2 is None:
        kwargs = merge_equal_pairs(kwargs)
    kwargs1, kwargs2 = split_kwargs(kwargs, x1, x2)
    # Pairs make the two sides different functions of the same x: a Jacobian each.
    symmetric = x2 is None and not any(is_pair(value) for value in kwargs.values())
    partition = Partition(params)
    if differentiates and not partition.leaves:
        raise ValueError(
            f"{caller}: params has no floating-point leaf, so there is nothing to differentiate "
            f"in: its leaves are {[type(leaf).__name__ for leaf in tree_util.tree_leaves(params)]}."
        )
    structure: dict[str, Any] = {}

    def flat(leaves: list[Array], x: PyTree, kw: dict[str, Any]) -> list[Array]:
        outputs, structure["tree"] = tree_util.tree_flatten(f(partition.merge(leaves), x, **kw))
        return [jnp.asarray(y) for y in outputs]

    def side(x: PyTree, kw: dict[str, Any], argument: str) -> Side:
        # Shapes come from a closure, so that keyword arguments may be any object.
        outputs = jax.eval_shape(lambda leaves: flat(leaves, x, kw), partition.leaves)
        for y in outputs:
            if not jnp.issubdtype(y.dtype, jnp.floating):
                raise TypeError(
                    f"{caller}: f(params, {argument}) returns an array of dtype {y.dtype}, shape "
                    f"{y.shape}; kernels are defined for real floating-point outputs. Return real "
                    "and imaginary parts as separate outputs, or cast."
                )
        known = Side(x, kw, outputs, None)
        if vmap_axes is None:
            return known
        spec = vmapping.resolve(
            vmap_axes, x, kw, outputs, structure["tree"], caller=caller, argument=argument
        )
        one_example = lambda leaves: flat(leaves, *spec.take(x, kw, slice(0, 1)))
        vmapping.check_examples(
            spec, one_example, partition.leaves, outputs, caller=caller, argument=argument
        )
        finding = examples.examine_promise(flat, partition.leaves, known, spec)
        if finding.mixes:
            raise ValueError(
                f"{caller}: vmap_axes={vmap_axes!r} promises that examples do not interact, but in "
                f"f(params, {argument}) they do: {finding.reason}. Pass vmap_axes=None: whether "
                "they are independent is then found out."
            )
        return replace(known, vmap=spec)

    side1 = side(x1, kwargs1, "x1")
    tree1 = structure["tree"]
    side2 = side1 if symmetric else side(x1 if x2 is None else x2, kwargs2, "x2")
    if structure["tree"] != tree1:
        raise ValueError(
            f"{caller}: f(params, x1) and f(params, x2) have different structures: {tree1} and "
            f"{structure['tree']}."
        )
    if vmap_axes is None and find_examples:
        specs = [
            examples.find(flat, partition.leaves, known, tree1)
            for known in ((side1,) if symmetric else (side1, side2))
        ]
        if None not in specs:
            side1, side2 = replace(side1, vmap=specs[0]), replace(side2, vmap=specs[-1])
            side2 = side1 if symmetric else side2
    return Problem(
        f=flat,
        leaves=partition.leaves,
        leaf_names=partition.names,
        side1=side1,
        side2=side2,
        symmetric=symmetric,
        out_tree=tree1,
        precision=precision_policy.resolve(precision),
        caller=caller,
    )
