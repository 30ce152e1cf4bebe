"""NTK-vector products without the NTK, in the memory of one vector-Jacobian product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax import lax, tree_util

from tangents._core.trees import describe
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

    Examples:
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
        # Forward mode without residuals: at x1 nothing of the forward pass is kept.
        forward = lambda: jax.jvp(problem.run(problem.side1), (problem.leaves,), (tangents,))[1]
        product = _after(tangents, forward)
        return problem.result(product)

    return ntk_vp_fn


def _after(tangents: list[jax.Array], forward: Callable[[], list[jax.Array]]) -> list[jax.Array]:
    """`forward()`, begun when `tangents` are there.

    XLA's CPU scheduler runs independent work as early as it can: it would do the forward pass at
    x1 beside the backward pass at x2 and hold both (2.2 times the memory on a transformer, with
    JAX 0.10, where `optimization_barrier` does not order them). It cannot begin the branch of a
    condition before the condition is known, and this one it cannot decide beforehand.
    """
    firsts = [jnp.ravel(t)[0] for t in tangents if t.size]
    if not any(isinstance(t, jax.core.Tracer) for t in firsts):
        return forward()  # run step by step, it begins when it is its turn
    # True for every number, NaN too, which XLA does not know.
    ready = jnp.all(jnp.stack([(t <= 0) | (t > 0) | (t != t) for t in firsts]))
    undefined = lambda: [jnp.full(y.shape, jnp.nan, y.dtype) for y in jax.eval_shape(forward)]
    waiting = lambda: lax.cond(ready, forward, undefined)
    return lax.platform_dependent(cpu=waiting, default=forward)


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
    return [
        as_real(v, y.dtype, f"{caller}: cotangents") for v, y in zip(flat, expected, strict=True)
    ]


def as_real(value: Any, dtype: Any, name: str) -> jax.Array:
    """An array cast to a real dtype; complex ones are refused, for half of them would be lost."""
    array = jnp.asarray(value)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(
            f"{name} of dtype {array.dtype}, but kernels are real ({dtype}): multiply real and "
            "imaginary part apart."
        )
    return array.astype(dtype)
