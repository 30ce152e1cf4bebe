"""Taylor expansions of a network in its parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import tree_util

from tangents import frontends
from tangents._core.trees import Partition
from tangents._core.typing import ApplyFn, Array, PyTree


def linearize(f: ApplyFn, params: PyTree) -> ApplyFn:
    """The first-order Taylor expansion of a network in its parameters.

        f_lin(p, x) = f(θ, x) + J(x) (p − θ)

    (Lee et al. 2019, eq. 3). Its NTK is that of `f` at θ, wherever `p` is.

    Args:
        f: `f(params, *args, **kwargs)`, PyTrees in and out.
        params: θ, the parameters to expand about. Leaves that are not floating point are carried.

    Returns:
        `f_lin(p, *args, **kwargs)` with `p` of the structure of `params` and results of the
        structure of `f`'s.

    Raises:
        ValueError: if `p` and `params` differ in structure or shapes.

    Examples:
        >>> import jax.numpy as jnp, tangents
        >>> f_lin = tangents.linearize(lambda p, x: p**2 * x, jnp.array(3.0))
        >>> float(f_lin(jnp.array(3.5), 2.0))  # 2 · (9 + 6 · 0.5)
        24.0
    """
    return _expansion(f, params, 1, "linearize")


def taylor_expand(f: ApplyFn, params: PyTree, degree: int) -> ApplyFn:
    """The Taylor expansion of a network in its parameters, up to a degree.

        f_deg(p, x) = Σ_{k ≤ degree} (1/k!) ∂ᵏ/∂tᵏ f(θ + t (p − θ), x) at t = 0

    by nested forward mode; the cost doubles with each degree.

    Args:
        f: `f(params, *args, **kwargs)`, PyTrees in and out.
        params: θ, the parameters to expand about. Leaves that are not floating point are carried.
        degree: the highest order kept, an integer ≥ 0; 0 is `f(θ, x)`, 1 is `linearize`.

    Returns:
        `f_deg(p, *args, **kwargs)`.

    Raises:
        ValueError: if `degree` is negative, or `p` and `params` differ in structure or shapes.
        TypeError: if `degree` is not an integer.

    Examples:
        >>> import jax.numpy as jnp, tangents
        >>> f_two = tangents.taylor_expand(lambda p, x: p**3 * x, jnp.array(1.0), 2)
        >>> float(f_two(jnp.array(2.0), 1.0))  # 1 + 3 + 3
        7.0
    """
    if isinstance(degree, bool) or not isinstance(degree, int):
        raise TypeError(f"taylor_expand: degree={degree!r} must be an integer.")
    if degree < 0:
        raise ValueError(f"taylor_expand: degree={degree} must be 0 or more.")
    return _expansion(f, params, degree, "taylor_expand")


def _expansion(f: ApplyFn, params: PyTree, degree: int, caller: str) -> ApplyFn:
    f = frontends.as_apply_fn(f)
    origin = Partition(frontends.as_jax(params))

    def expanded(p: PyTree, *args: Any, **kwargs: Any) -> PyTree:
        step = _difference(Partition(frontends.as_jax(p)), origin, caller)
        along = lambda leaves: f(origin.merge(leaves), *args, **kwargs)
        for path, y in tree_util.tree_leaves_with_path(jax.eval_shape(along, origin.leaves)):
            if not jnp.issubdtype(y.dtype, jnp.inexact):
                raise TypeError(
                    f"{caller}: the output{tree_util.keystr(path)} of f has dtype {y.dtype} and no "
                    "derivative: leave it out or cast it."
                )
        value, *terms = _derivatives(along, origin.leaves, step, degree)
        for order, term in enumerate(terms, start=1):
            value = tree_util.tree_map(
                lambda a, b, order=order: a + b / math.factorial(order), value, term
            )
        return value

    return expanded


def _difference(point: Partition, origin: Partition, caller: str) -> list[Array]:
    here, there = point.leaves, origin.leaves
    if point.paths != origin.paths or [a.shape for a in here] != [b.shape for b in there]:
        shapes = lambda part: {n: x.shape for n, x in zip(part.names, part.leaves, strict=True)}
        raise ValueError(
            f"{caller}: the function is expanded about params with leaves {shapes(origin)}, but "
            f"was called with {shapes(point)}: both need the same structure and shapes."
        )
    return [a - b.astype(a.dtype) for a, b in zip(here, there, strict=True)]


def _derivatives(
    f: Callable[[list[Array]], PyTree], origin: list[Array], step: list[Array], degree: int
) -> list[PyTree]:
    """F and its directional derivatives along `step` at `origin`, orders 0 to `degree`."""
    step = [s.astype(o.dtype) for s, o in zip(step, origin, strict=True)]

    def orders(leaves: list[Array], up_to: int) -> list[PyTree]:
        if up_to == 0:
            return [f(leaves)]
        lower, raised = jax.jvp(lambda p: orders(p, up_to - 1), (leaves,), (step,))
        # The highest of the raised orders is new; the others were there already.
        return [*lower, raised[-1]]

    return [tree_util.tree_map(jnp.asarray, term) for term in orders(origin, degree)]
