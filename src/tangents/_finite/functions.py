"""Kernel functions of finite networks, under the names and with the results users know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import tree_util

from tangents import frontends
from tangents._core import get as getting
from tangents._core.axes import PairAxes
from tangents._core.memory import MemoryLike
from tangents._core.precision import PrecisionLike, accumulator
from tangents._core.typing import ApplyFn, Array, Axes, PyTree, VMapAxes
from tangents._finite.implementation import NtkImplementation
from tangents._finite.methods import Method, get_method
from tangents._finite.methods.structured_derivatives import Options
from tangents._finite.problem import Problem, make_problem

EmpiricalKernelFn = Callable[..., PyTree]


def empirical_ntk_fn(
    f: ApplyFn,
    trace_axes: Axes = (-1,),
    diagonal_axes: Axes = (),
    vmap_axes: VMapAxes = None,
    implementation: NtkImplementation | int | str = NtkImplementation.AUTO,
    _j_rules: bool = True,
    _s_rules: bool = True,
    _fwd: bool | None = None,
    *,
    precision: PrecisionLike = None,
    memory: MemoryLike = None,
) -> EmpiricalKernelFn:
    r"""The neural tangent kernel of a finite network as a function of its inputs.

    .. math::
        Θ(x_1, x_2) = J(x_1)\, J(x_2)^T, \qquad J(x) = ∂f(θ, x) / ∂θ

    (Jacot, Gabriel, Hongler 2018, eq. 5; computed as in Novak, Sohl-Dickstein, Schoenholz 2022).

    Args:
        f: `f(params, x, **kwargs)`, from a PyTree of parameters and a PyTree of inputs to an array
            or a PyTree of arrays. Each output array gets a kernel of its own.
        trace_axes: output axes over which the kernel is averaged: Σₖ Θ[.., k, k] / K. The default
            averages over the logits. Pass `()` for the full kernel.
        diagonal_axes: output axes of which only the diagonal pairs are kept.
        vmap_axes: axes along which examples do not interact, which makes the kernel cheaper: None
            (found out from `f` for the first axis; what is not sure counts as interacting), an int
            (that axis of every input and output), or a triple `(in_axes, out_axes, kwargs_axes)`
            of prefix trees for `x`, for the output and a dictionary for keyword arguments. `f`
            then sees one example at a time, its axis kept.
        implementation: the method, an `NtkImplementation`, its number or its name; AUTO takes the
            cheapest by the shapes of `f`.
        _j_rules: structured derivatives only: False takes every use of a weight as a whole.
        _s_rules: structured derivatives only: False pulls gradients back through transposes,
            slices and scalings of a weight instead of following them.
        _fwd: structured derivatives only: cotangents by forward mode (True) or reverse (False,
            None).
        precision: of the contraction: None (highest), or a `jax.lax.Precision` or its name.
        memory: budget, in bytes or as text such as "2GiB", for what is worked on beside inputs,
            parameters and the result; None takes half of what the device has free. The work is
            done in chunks of examples and outputs and in slices of weights that fit, by an
            estimate from shapes. For AUTO and structured derivatives only.

    Returns:
        `ntk_fn(x1, x2, params, **kwargs)`. For outputs of shape (n, k) on x1 and (m, k) on x2 its
        result has shape (n, m) with the default axes and (n, m, k, k) with `trace_axes=()`: each
        output axis gives a pair of axes, a trace axis none, a diagonal axis one. `x2=None` stands
        for x1: half the work, and a result that is symmetric to the last bit. A keyword argument
        that is a tuple of length two is split between x1 and x2; a key `rng` is shared by equal
        inputs and folded for different ones. Nothing is compiled here: wrap it in `jax.jit`.

    Raises:
        ValueError: for axes or `vmap_axes` that do not fit the output of `f`, or that `f` surely
            breaks; for a budget below the smallest chunk, with the bytes that are needed; for a
            kernel that the device cannot hold, with the sizes.
        NotImplementedError: for a `while` loop between parameters and output: it has no reverse
            mode.

    Examples:
        >>> import jax, jax.numpy as jnp, tangents
        >>> f = lambda params, x: jnp.tanh(x @ params["w"]) @ params["v"]
        >>> params = {"w": jnp.ones((3, 4)), "v": jnp.ones((4, 2))}
        >>> ntk_fn = jax.jit(tangents.empirical_ntk_fn(f, vmap_axes=0))
        >>> ntk_fn(jnp.ones((5, 3)), jnp.zeros((6, 3)), params).shape
        (5, 6)
    """
    caller = "empirical_ntk_fn"
    method = get_method(
        NtkImplementation.parse(implementation, caller=caller),
        caller=caller,
        options=Options(factor=_j_rules, follow=_s_rules, forward=bool(_fwd), memory=memory),
    )
    f = frontends.as_apply_fn(f)

    def ntk_fn(x1: PyTree, x2: PyTree | None, params: PyTree, **apply_fn_kwargs: Any) -> PyTree:
        """The NTK Θ(x1, x2): see `empirical_ntk_fn`."""
        problem = make_problem(
            f,
            x1,
            x2,
            params,
            apply_fn_kwargs,
            vmap_axes=vmap_axes,
            precision=precision,
            caller=caller,
            find_examples=True,
        )
        axes = problem.pair_axes(trace_axes, diagonal_axes)
        return problem.result(compute(problem, method, axes))

    return ntk_fn


def compute(problem: Problem, method: Method, axes: list[PairAxes]) -> list[Array]:
    """Kernels of each output leaf by a method; symmetric ones are made so to the last bit."""
    outputs = list(zip(problem.side1.outputs, problem.side2.outputs, axes, strict=True))
    if all(0 in a.shape + b.shape for a, b, _ in outputs):
        # An empty batch is no error: an empty kernel of the right shape.
        return [jnp.zeros(pair.kernel_shape(a.shape, b.shape), a.dtype) for a, b, pair in outputs]
    kernels = method(problem, axes)
    if problem.symmetric:
        kernels = [pair.symmetrise(k) for pair, k in zip(axes, kernels, strict=True)]
    return [
        k.astype(jnp.promote_types(a.dtype, b.dtype))
        for k, (a, b, _) in zip(kernels, outputs, strict=True)
    ]


def empirical_nngp_fn(
    f: ApplyFn,
    trace_axes: Axes = (-1,),
    diagonal_axes: Axes = (),
    *,
    precision: PrecisionLike = None,
) -> EmpiricalKernelFn:
    r"""The conjugate kernel of a finite network: the Gram matrix of its outputs.

    .. math::
        K(x_1, x_2) = f(θ, x_1)\, f(θ, x_2)^T

    averaged over `trace_axes`: for outputs of shape (n, k) the default is the mean over k of the
    products. Its expectation over random parameters is the NNGP kernel (Lee et al. 2018).

    Args:
        f: `f(params, x, **kwargs)`, PyTrees in, PyTree of arrays out.
        trace_axes: output axes to average over, as in `empirical_ntk_fn`.
        diagonal_axes: output axes of which only the diagonal pairs are kept.
        precision: of the contraction: None (highest), or a `jax.lax.Precision` or its name.

    Returns:
        `nngp_fn(x1, x2, params, **kwargs)`; shapes as for `empirical_ntk_fn`.

    Raises:
        ValueError: for axes that do not fit the output of `f`.

    Examples:
        >>> import jax.numpy as jnp, tangents
        >>> f = lambda params, x: x @ params
        >>> tangents.empirical_nngp_fn(f)(jnp.ones((5, 3)), None, jnp.ones((3, 2))).shape
        (5, 5)
    """
    f = frontends.as_apply_fn(f)

    def nngp_fn(x1: PyTree, x2: PyTree | None, params: PyTree, **apply_fn_kwargs: Any) -> PyTree:
        """The conjugate kernel K(x1, x2): see `empirical_nngp_fn`."""
        problem = make_problem(
            f,
            x1,
            x2,
            params,
            apply_fn_kwargs,
            precision=precision,
            caller="empirical_nngp_fn",
            differentiates=False,
        )
        outputs1 = problem.run(problem.side1)(problem.leaves)
        outputs2 = outputs1 if problem.symmetric else problem.run(problem.side2)(problem.leaves)
        axes = problem.pair_axes(trace_axes, diagonal_axes)
        return problem.result(
            [
                _gram(y1, y2, pair, problem)
                for y1, y2, pair in zip(outputs1, outputs2, axes, strict=True)
            ]
        )

    return nngp_fn


def _gram(y1: Array, y2: Array, pair: PairAxes, problem: Problem) -> Array:
    side1, side2, result = pair.einsum_axes()
    dtype = jnp.promote_types(y1.dtype, y2.dtype)
    kernel = jnp.einsum(
        y1,
        side1,
        y2,
        side2,
        result,
        precision=problem.precision,
        preferred_element_type=accumulator(dtype),
    ) / max(pair.trace_size(y1.shape), 1)
    return (pair.symmetrise(kernel) if problem.symmetric else kernel).astype(dtype)


def empirical_kernel_fn(
    f: ApplyFn,
    trace_axes: Axes = (-1,),
    diagonal_axes: Axes = (),
    vmap_axes: VMapAxes = None,
    implementation: NtkImplementation | int | str = NtkImplementation.AUTO,
    _j_rules: bool = True,
    _s_rules: bool = True,
    _fwd: bool | None = None,
    *,
    precision: PrecisionLike = None,
    memory: MemoryLike = None,
) -> EmpiricalKernelFn:
    """NNGP and NTK of a finite network in one function.

    Args:
        f: as in `empirical_ntk_fn`, like all other arguments; `vmap_axes`, `implementation` and
            the rules concern the NTK only.
        trace_axes: output axes to average over.
        diagonal_axes: output axes of which only the diagonal pairs are kept.
        vmap_axes: promise of independent examples.
        implementation: method of the NTK.
        _j_rules: structured derivatives only.
        _s_rules: structured derivatives only.
        _fwd: structured derivatives only.
        precision: of the contractions.
        memory: budget of the NTK.

    Returns:
        `kernel_fn(x1, x2, get, params, **kwargs)`, where `get` is 'nngp', 'ntk' (an array comes
        back), a tuple of these (a named tuple `EmpiricalKernel` with these fields) or None (both).
        For an output that is a tree, the tree's leaves are such results.

    Raises:
        ValueError: for an empty or repeated `get`, or axes that do not fit.
        KeyError: for a `get` that is neither 'nngp' nor 'ntk'.

    Examples:
        >>> import jax.numpy as jnp, tangents
        >>> kernel_fn = tangents.empirical_kernel_fn(lambda params, x: x @ params)
        >>> k = kernel_fn(jnp.ones((5, 3)), None, ("nngp", "ntk"), jnp.ones((3, 2)))
        >>> k.nngp.shape, k.ntk.shape
        ((5, 5), (5, 5))
    """
    f = frontends.as_apply_fn(f)
    functions = {
        "nngp": empirical_nngp_fn(f, trace_axes, diagonal_axes, precision=precision),
        "ntk": empirical_ntk_fn(
            f,
            trace_axes,
            diagonal_axes,
            vmap_axes,
            implementation,
            _j_rules,
            _s_rules,
            _fwd,
            precision=precision,
            memory=memory,
        ),
    }

    def kernel_fn(
        x1: PyTree, x2: PyTree | None, get: getting.Get, params: PyTree, **apply_fn_kwargs: Any
    ) -> Any:
        """The kernels named by `get`: see `empirical_kernel_fn`."""
        names = getting.canonical_get(get)
        wanted = (
            tuple(functions) if names is None else (names,) if isinstance(names, str) else names
        )
        for name in wanted:
            if name not in functions:
                raise KeyError(f"empirical_kernel_fn: get={name!r} is neither 'nngp' nor 'ntk'.")
        kernels = [functions[name](x1, x2, params, **apply_fn_kwargs) for name in wanted]
        return tree_util.tree_map(
            lambda *leaves: getting.select(
                "EmpiricalKernel", names, dict(zip(wanted, leaves, strict=True))
            ),
            *kernels,
        )

    return kernel_fn
