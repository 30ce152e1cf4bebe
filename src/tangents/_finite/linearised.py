"""A function linearised once: its tangent and transpose passes without its forward pass.

The linear map is kept as a jaxpr (static) and its residuals (arrays). The residuals leave the
compiled function that computes them as results and enter the compiled products as arguments: a
compiled closure would hold them as constants, compiled anew for every set of parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax import tree_util

from tangents._core.trees import is_array
from tangents._core.typing import Array

LeafFn = Callable[[list[Array]], list[Array]]


class Program:
    """Compiled linearisation and products of one function at one set of shapes.

    Args:
        f: from dynamic inputs to a function of the differentiable leaves: `f(dynamic)(leaves)`.
    """

    def __init__(self, f: Callable[[list[Array]], LeafFn]):
        """Nothing is traced before the first use."""
        self._f = f
        self._jaxpr: Any = None
        self._linearise = jax.jit(self._trace)
        self.push = jax.jit(self._push)
        self.pull = jax.jit(self._pull)

    def linearise(self, leaves: list[Array], dynamic: list[Array]) -> Linearised:
        """The linear map at `leaves`."""
        residuals = self._linearise(leaves, dynamic)
        return Linearised(residuals, leaves, self)

    def _trace(self, leaves: list[Array], dynamic: list[Array]) -> list[Array]:
        _, push = jax.linearize(self._f(dynamic), leaves)
        closed = jax.make_jaxpr(push)(leaves)
        # Shapes are fixed by the owner, so every trace gives this jaxpr; the first one is kept.
        if self._jaxpr is None:
            self._jaxpr = getattr(closed, "jaxpr", closed)
        return list(closed.consts)

    def _push(self, residuals: list[Array], tangents: list[Array]) -> list[Array]:
        return jax.core.eval_jaxpr(self._jaxpr, residuals, *tangents)

    def _pull(
        self, residuals: list[Array], leaves: list[Any], cotangents: list[Array]
    ) -> list[Array]:
        shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
        transpose = jax.linear_transpose(lambda *t: self._push(residuals, list(t)), *shapes)
        return list(transpose(cotangents))


@dataclass(frozen=True)
class Linearised:
    """J(x) at given parameters, as `push` (J t) and `pull` (Jᵀ v); a PyTree."""

    residuals: list[Array]
    leaves: list[Array]
    """The point of linearisation, for its shapes."""
    program: Program

    def push(self, tangents: list[Array]) -> list[Array]:
        """J times tangents: output leaves."""
        return self.program.push(self.residuals, tangents)

    def pull(self, cotangents: list[Array]) -> list[Array]:
        """Jᵀ times cotangents: parameter leaves."""
        return self.program.pull(self.residuals, self.leaves, cotangents)


tree_util.register_dataclass(
    Linearised, data_fields=["residuals", "leaves"], meta_fields=["program"]
)


class Rebuild:
    """Puts arrays (or tracers) back among the static leaves of a tree."""

    def __init__(self, treedef: Any, static: dict[int, Any]):
        """A structure and its static leaves by position."""
        self._treedef, self._static = treedef, static

    def __call__(self, arrays: list[Array]) -> Any:
        remaining = iter(arrays)
        count = self._treedef.num_leaves
        leaves = [self._static[i] if i in self._static else next(remaining) for i in range(count)]
        return tree_util.tree_unflatten(self._treedef, leaves)

    def same_static(self, other: Rebuild) -> bool:
        """Whether structure and static leaves are equal."""
        return (
            self._treedef == other._treedef
            and self._static.keys() == other._static.keys()
            and all(a is other._static[i] or a == other._static[i] for i, a in self._static.items())
        )


def split_dynamic(tree: Any) -> tuple[list[Array], Rebuild]:
    """The arrays of a tree, and what puts arrays back in their places."""
    flat, treedef = tree_util.tree_flatten(tree)
    static = {i: leaf for i, leaf in enumerate(flat) if not is_array(leaf)}
    arrays = [jnp.asarray(leaf) for i, leaf in enumerate(flat) if i not in static]
    return arrays, Rebuild(treedef, static)
