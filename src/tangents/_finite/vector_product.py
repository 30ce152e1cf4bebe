"""NTK-vector products without the NTK, in the memory of one vector-Jacobian product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import tree_util

from tangents._core.trees import describe, is_array
from tangents._core.typing import ApplyFn, PyTree
from tangents._finite.problem import Problem, make_problem


def empirical_ntk_vp_fn(
    f: ApplyFn, x1: PyTree, x2: PyTree | None, params: PyTree, **apply_fn_kwargs: Any
) -> Callable[[PyTree], PyTree]:
    r"""Products of the full NTK with vectors, without the NTK.

    .. math::
        v ↦ Θ(x_1, x_2)\, v = J(x_1)\, (J(x_2)^T v)

    A backward pass at x2 and a forward-mode pass at x1 (Novak et al. 2022, section 3.2): three
    forward passes' work on each input, and the memory of one vector-Jacobian product. There is no
    trace and no normalisation: outputs of different indices are coupled.
    For many products with the same parameters use `ntk_operator`, which linearises once.

    Args:
        f: `f(params, x, **kwargs)`, PyTrees in, PyTree of arrays out.
        x1: inputs on the left.
        x2: inputs on the right; None stands for x1.
        params: PyTree of parameters; leaves that are not floating point are carried.
        **apply_fn_kwargs: keyword arguments of `f`; tuples of length two are split between x1 and
            x2, a key `rng` is shared by equal inputs and folded for different ones.

    Returns:
        `ntk_vp_fn(cotangents)`: from arrays of the structure and shapes of `f(params, x2)` to
        those of `f(params, x1)`. It can be jitted.

    Raises:
        ValueError: if cotangents have other shapes or another structure than `f(params, x2)`.

    Example:
        >>> import jax.numpy as jnp, tangents
        >>> f = lambda params, x: x @ params
        >>> x1, x2, params = jnp.ones((5, 3)), jnp.ones((4, 3)), jnp.ones((3, 2))
        >>> tangents.empirical_ntk_vp_fn(f, x1, x2, params)(jnp.ones((4, 2))).shape
        (5, 2)
    """
    caller = "empirical_ntk_vp_fn"
    problem = make_problem(f, x1, x2, params, apply_fn_kwargs, caller=caller)

    def ntk_vp_fn(cotangents: PyTree) -> PyTree:
        """Θ(x1, x2) times cotangents: see `empirical_ntk_vp_fn`."""
        flat = check_cotangents(problem, cotangents, caller)
        _, pullback = jax.vjp(problem.run(problem.side2), problem.leaves)
        (tangents,) = pullback(flat)
        side1 = replace(problem.side1, x=_after(problem.side1.x, tangents))
        # Forward mode without residuals: at x1 nothing of the forward pass is kept.
        _, product = jax.jvp(problem.run(side1), (problem.leaves,), (tangents,))
        return problem.result(product)

    return ntk_vp_fn


def _after(x: PyTree, tangents: list[jax.Array]) -> PyTree:
    """`x`, unchanged, but not to be had before `tangents`.

    XLA's CPU scheduler runs independent work as early as it can: it would do the forward pass at
    x1 beside the backward pass at x2 and hold both (1.8 times the memory, measured with JAX 0.10,
    which also drops `optimization_barrier`). A comparison that it cannot decide beforehand makes
    the one wait for the other.
    """
    firsts = [jnp.ravel(t)[0] for t in tangents if t.size]
    ready = jnp.all(jnp.stack([t == t for t in firsts])) if firsts else jnp.bool_(True)
    wait = lambda leaf: jnp.where(ready, leaf, jnp.zeros_like(leaf))
    return tree_util.tree_map(lambda leaf: wait(leaf) if _plain(leaf) else leaf, x)


def _plain(leaf: Any) -> bool:
    return is_array(leaf) and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def check_cotangents(problem: Problem, cotangents: PyTree, caller: str) -> list[jax.Array]:
    """Output leaves of side 2 from a tree of cotangents, or an error with both shapes."""
    flat, tree = tree_util.tree_flatten(cotangents)
    expected = problem.side2.outputs
    if tree != problem.out_tree or any(
        jnp.shape(v) != y.shape for v, y in zip(flat, expected, strict=True)
    ):
        wanted = tree_util.tree_unflatten(problem.out_tree, expected)
        raise ValueError(
            f"{caller}: cotangents have shape {describe(cotangents)}, but must have that of "
            f"f(params, x2), {describe(wanted)}."
        )
    return [jnp.asarray(v).astype(y.dtype) for v, y in zip(flat, expected, strict=True)]
