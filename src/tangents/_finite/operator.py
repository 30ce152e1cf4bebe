"""The NTK as a linear operator: products without the matrix, the matrix when it is wanted."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import tree_util

from tangents import frontends
from tangents._core.axes import PairAxes
from tangents._core.kwargs import merge_equal_pairs
from tangents._core.memory import MemoryLike, chunk_size, chunks, resolve_budget
from tangents._core.precision import PrecisionLike
from tangents._core.trees import describe
from tangents._core.typing import ApplyFn, Array, Axes, PyTree, VMapAxes
from tangents._finite.functions import compute
from tangents._finite.implementation import NtkImplementation
from tangents._finite.linearised import Linearised, Program, Rebuild, split_dynamic
from tangents._finite.methods import Method, auto, get_method, structured_derivatives
from tangents._finite.problem import Problem, make_problem
from tangents._finite.vector_product import as_real


def ntk_operator(
    f: ApplyFn,
    params: PyTree,
    x1: PyTree,
    x2: PyTree | None = None,
    *,
    vmap_axes: VMapAxes = None,
    implementation: NtkImplementation | int | str = NtkImplementation.AUTO,
    precision: PrecisionLike = None,
    memory: MemoryLike = None,
    **apply_fn_kwargs: Any,
) -> NTKOperator:
    r"""The neural tangent kernel of a finite network as a linear operator.

    .. math::
        Θ = J(x_1)\, J(x_2)^T ∈ R^{n_1 × n_2}

    where nᵢ counts all outputs on xᵢ: examples times outputs each. The network is linearised once,
    compiled; a product then costs a transpose pass on x2 and a tangent pass on x1 (two forward
    passes' work each, instead of three with `empirical_ntk_vp_fn`).

    Args:
        f: `f(params, x, **kwargs)`, PyTrees in, PyTree of arrays out.
        params: PyTree of parameters; leaves that are not floating point are carried.
        x1: inputs on the left.
        x2: inputs on the right; None stands for x1 and makes the operator symmetric, unless a
            keyword argument is a pair of different values.
        vmap_axes: axes of independent examples, for the dense results (`empirical_ntk_fn`).
        implementation: method of the dense results.
        precision: of Gram contractions: None (highest), or a `jax.lax.Precision` or its name.
        memory: budget of the dense results, as in `empirical_ntk_fn`.
        **apply_fn_kwargs: keyword arguments of `f`, split between x1 and x2 as in
            `empirical_ntk_fn`.

    Returns:
        An `NTKOperator`.

    Raises:
        ValueError: for `vmap_axes` that do not fit, or parameters without a floating-point leaf.

    Examples:
        >>> import jax.numpy as jnp, tangents
        >>> f = lambda params, x: jnp.tanh(x @ params)
        >>> op = tangents.ntk_operator(f, jnp.ones((3, 2)), jnp.ones((5, 3)))
        >>> op
        NTKOperator(shape=(10, 10), dtype=float32, symmetric, f(params, x1): (5, 2))
        >>> (op @ jnp.ones((5, 2))).shape, (op @ jnp.ones(10)).shape, op.materialise().shape
        ((5, 2), (10,), (10, 10))
    """
    caller = "ntk_operator"
    f = frontends.as_apply_fn(f)
    params, x1, x2 = frontends.as_jax((params, x1, x2))
    options = _Options(
        f, vmap_axes, NtkImplementation.parse(implementation, caller=caller), precision, memory
    )
    options.method(caller)
    kwargs = merge_equal_pairs(apply_fn_kwargs) if x2 is None else apply_fn_kwargs
    # NumPy scalars among them say how to compute (train=np.bool_(True)), they are no data.
    kwargs = tree_util.tree_map(lambda v: v.item() if isinstance(v, np.generic) else v, kwargs)
    dynamic, rebuild = split_dynamic((_with_arrays(params), x1, x2, kwargs))
    return NTKOperator(dynamic, _Programs(options, rebuild, dynamic))


@dataclass
class _Shared:
    """What an operator and its transpose linearise once for both."""

    value: tuple[Linearised, Linearised] | None = None


class NTKOperator:
    """Θ = J(x1) J(x2)ᵀ as a matrix of `shape` that is not there until it is asked for.

    Made by `ntk_operator`. It is a PyTree: it can be an argument or result of a jitted function.
    """

    __array_priority__ = 1000  # so that NumPy arrays on the left do not take over

    def __init__(
        self, dynamic: list[Array], programs: _Programs, flip: bool = False, linear: Any = None
    ):
        """Use `ntk_operator`."""
        self._dynamic = dynamic
        self._programs = programs
        self._flip = flip
        self._linear: _Shared = _Shared() if linear is None else linear

    # What it is.

    @property
    def shape(self) -> tuple[int, int]:
        """Number of outputs on x1 and on x2."""
        return _size(self._outputs(1)), _size(self._outputs(2))

    @property
    def dtype(self) -> np.dtype:
        """Dtype of products."""
        return jnp.result_type(*self._outputs(1), *self._outputs(2))

    @property
    def is_symmetric(self) -> bool:
        """Whether x2 was not given: the operator is then symmetric positive semidefinite."""
        return self._programs.symmetric

    @property
    def T(self) -> NTKOperator:
        """The transpose: x1 and x2 exchanged; nothing is linearised again."""
        if self.is_symmetric:
            return self
        return NTKOperator(self._dynamic, self._programs, not self._flip, self._linear)

    def __repr__(self) -> str:
        kind = ", symmetric" if self.is_symmetric else ""
        shapes = describe(self._programs.tree(self._outputs(1)))
        return f"NTKOperator(shape={self.shape}, dtype={self.dtype}{kind}, f(params, x1): {shapes})"

    # Products.

    def __matmul__(self, v: PyTree) -> PyTree:
        """Θ v.

        Args:
            v: arrays of the structure and shapes of `f(params, x2)`; or one array of shape
                `(shape[1],)`, or a block of vectors `(shape[1], k)`.

        Returns:
            Arrays of the structure and shapes of `f(params, x1)`, or one array of shape
            `(shape[0],)` or `(shape[0], k)`.
        """
        tree, leaves = tree_util.tree_structure(v), tree_util.tree_leaves(v)
        outputs = self._outputs(2)
        if tree == self._programs.tree_structure and all(
            jnp.shape(a) == b.shape for a, b in zip(leaves, outputs, strict=True)
        ):
            return self._programs.tree(self._product([jnp.asarray(a) for a in leaves]))
        shape = jnp.shape(v) if len(leaves) == 1 and tree_util.treedef_is_leaf(tree) else None
        if shape is None or len(shape) not in (1, 2) or shape[0] != self.shape[1]:
            wanted = describe(self._programs.tree(outputs))
            raise ValueError(
                f"NTKOperator: the right operand of @ has shape {describe(v)}, but must have that "
                f"of f(params, x2), {wanted}, or be flat: ({self.shape[1]},) or "
                f"({self.shape[1]}, k)."
            )
        block = jnp.asarray(v)
        if len(shape) == 1:
            return _ravel(self._product(_unravel(block, outputs)))
        product = lambda column: _ravel(self._product(_unravel(column, outputs)))
        if shape[1] == 0:
            return jnp.zeros((self.shape[0], 0), self.dtype)
        return jax.vmap(product, in_axes=1, out_axes=1)(block)

    def __rmatmul__(self, v: Any) -> Array:
        """Products from the left, v Θ, for one array of shape `(shape[0],)` or `(k, shape[0])`."""
        return (self.T @ jnp.asarray(v).T).T

    def _product(self, cotangents: list[Array]) -> list[Array]:
        linear = self._linearised()
        left, right = linear[self._flip], linear[not self._flip]
        name = "NTKOperator: the right operand of @ is"
        outputs = self._outputs(2)
        cast = [as_real(v, y.dtype, name) for v, y in zip(cotangents, outputs, strict=True)]
        return left.push(right.pull(cast))

    # Dense results.

    def materialise(
        self, trace_axes: Axes | None = None, diagonal_axes: Axes | None = None
    ) -> PyTree:
        """The dense kernel.

        Args:
            trace_axes: output axes to average over.
            diagonal_axes: output axes of which only the diagonal pairs are kept.

        Returns:
            Without arguments the matrix of `shape`, such that `op.materialise() @ v` is `op @ v`
            for a flat `v`. With either argument the kernel of each output in the layout of
            `empirical_ntk_fn`, for instance (n1, n2, k, k) with `trace_axes=()`.
        """
        if trace_axes is not None or diagonal_axes is not None:
            wanted = (
                () if trace_axes is None else trace_axes,
                () if diagonal_axes is None else diagonal_axes,
            )
            kernels = self._kernels(self._problem().pair_axes(*wanted))
            return self._programs.tree(kernels)
        outputs1 = self._outputs(1)
        if len(outputs1) == 1:
            (kernel,) = self._kernels(self._problem().pair_axes((), ()))
            ndim = len(outputs1[0].shape)
            order = [*range(0, 2 * ndim, 2), *range(1, 2 * ndim, 2)]
            return kernel.transpose(order).reshape(self.shape)
        # Outputs of several arrays have cross terms, which only products see.
        columns = self.shape[1]
        per_column = sum(leaf.nbytes for leaf in self._problem().leaves)
        size = chunk_size(columns, per_column, resolve_budget(self._programs.options.memory))
        identity = jnp.eye(columns, dtype=self.dtype)
        blocks = [self @ identity[:, part] for part in chunks(columns, size)]
        full = jnp.concatenate(blocks, axis=1) if blocks else jnp.zeros(self.shape, self.dtype)
        lower = jnp.tril(full)
        return lower + jnp.tril(full, -1).T if self.is_symmetric else full

    def explain(self, trace_axes: Axes = (-1,), diagonal_axes: Axes = ()) -> str:
        """How the dense kernel would be computed: nothing is computed.

        Args:
            trace_axes: output axes to average over.
            diagonal_axes: output axes of which only the diagonal pairs are kept.

        Returns:
            For AUTO the methods with their estimates, an arrow at the one that is taken. Then, of
            structured derivatives, a table for each output: for each weight its uses, how they are
            contracted, the work in multiply-adds and the bytes of intermediate results at once,
            and, where a use has no factored form, why the derivative in the whole weight is taken.
            The last line says how many examples and outputs are worked on at once.
        """
        problem = self._programs.problem(self._dynamic, self._flip, dense=True)
        axes = problem.pair_axes(trace_axes, diagonal_axes)
        return self._programs.options.explain(problem, axes)

    def diagonal(self) -> Array:
        """The diagonal ∂fᵢ(x1)/∂θ · ∂fᵢ(x2)/∂θ, shape `(shape[0],)`, without the matrix."""
        if [y.shape for y in self._outputs(1)] != [y.shape for y in self._outputs(2)]:
            raise ValueError(
                f"NTKOperator.diagonal: f(params, x1) has shape "
                f"{describe(self._programs.tree(self._outputs(1)))} and f(params, x2) "
                f"{describe(self._programs.tree(self._outputs(2)))}; a diagonal needs equal shapes."
            )
        everything = [tuple(range(len(y.shape))) for y in self._outputs(1)]
        return _ravel(self._kernels([PairAxes(len(axes), (), axes) for axes in everything]))

    def trace(self) -> Array:
        """The sum of `diagonal()`; not normalised."""
        return jnp.sum(self.diagonal())

    def _kernels(self, axes: list[PairAxes]) -> list[Array]:
        return self._programs.dense(self._flip, tuple(axes))(self._dynamic)

    # At other parameters, and for other libraries.

    def at(self, params: PyTree) -> NTKOperator:
        """The same kernel at other parameters of the same shapes: nothing is compiled again."""
        old, x1, x2, kwargs = self._programs.rebuild(self._dynamic)
        params = frontends.as_jax(params)
        dynamic, rebuild = split_dynamic((_with_arrays(params), x1, x2, kwargs))
        if not self._programs.fits(dynamic, rebuild):
            raise ValueError(
                f"NTKOperator.at: params has shapes {describe(params)}, but the operator was made "
                f"with {describe(old)} (dtypes, and leaves that are not arrays, must be equal "
                "too): make a new one with ntk_operator."
            )
        return NTKOperator(dynamic, self._programs, self._flip)

    def linear_operator(self, kind: str = "scipy") -> Any:
        """A view of the operator for another library's solvers.

        Args:
            kind: 'scipy' for a `scipy.sparse.linalg.LinearOperator` on flat NumPy vectors, or
                'lineax' for a `lineax.FunctionLinearOperator` on flat vectors, tagged symmetric
                and positive semidefinite where x2 was not given.

        Raises:
            ImportError: if the library is not installed; the message names the extra.
            ValueError: for any other kind.
        """
        from tangents._finite import operator_views

        return operator_views.view(self, kind)

    # Pieces.

    def _outputs(self, side: int) -> list[jax.ShapeDtypeStruct]:
        return self._programs.outputs[(side - 1) ^ self._flip]

    def _problem(self) -> Problem:
        return self._programs.problem(self._dynamic, self._flip)

    def _linearised(self) -> tuple[Linearised, Linearised]:
        if self._linear.value is None:
            linear = self._programs.linearise(self._dynamic)
            if any(isinstance(r, jax.core.Tracer) for r in tree_util.tree_leaves(linear)):
                return linear  # belongs to a trace: keeping it would leak it
            self._linear.value = linear
        return self._linear.value


tree_util.register_pytree_node(
    NTKOperator,
    lambda op: ((op._dynamic, op._linear.value), (op._programs, op._flip)),
    lambda aux, children: NTKOperator(children[0], *aux, linear=_Shared(children[1])),
)


@dataclass(frozen=True)
class _Options:
    """What an operator was asked for, beside its inputs."""

    f: ApplyFn
    vmap_axes: VMapAxes
    implementation: NtkImplementation
    precision: PrecisionLike
    memory: MemoryLike

    @property
    def structured(self) -> structured_derivatives.Options:
        """Options of the methods that take any."""
        return structured_derivatives.Options(memory=self.memory)

    def method(self, caller: str) -> Method:
        """The method of the dense results."""
        return get_method(self.implementation, caller=caller, options=self.structured)

    def explain(self, problem: Problem, axes: list[PairAxes]) -> str:
        """Its plan."""
        method = structured_derivatives
        if self.implementation is NtkImplementation.AUTO:
            method = auto
        return method.explain(problem, axes, self.structured)


class _Programs:
    """Everything about an operator that is not an array: shapes and compiled functions."""

    def __init__(self, options: _Options, rebuild: Rebuild, dynamic: list[Array]):
        self.options, self.rebuild = options, rebuild
        self._avals = _avals(dynamic)
        problem = self.problem(dynamic)
        self.symmetric = problem.symmetric
        self.outputs = problem.side1.outputs, problem.side2.outputs
        self.tree_structure = problem.out_tree
        self._dense: dict[Any, Any] = {}
        self._sides = [Program(lambda d, n=n: self._run(d, n)) for n in (1, 2)]

    def tree(self, leaves: list[Any]) -> PyTree:
        """Output leaves in the structure of the output."""
        return tree_util.tree_unflatten(self.tree_structure, leaves)

    def fits(self, dynamic: list[Array], rebuild: Rebuild) -> bool:
        """Whether inputs differ from these only in the values of their arrays."""
        return _avals(dynamic) == self._avals and rebuild.same_static(self.rebuild)

    def problem(self, dynamic: list[Array], flip: bool = False, dense: bool = False) -> Problem:
        """The checked problem of these inputs; `flip` exchanges x1 and x2.

        `dense`: for the dense kernel, to which it matters whether examples are independent.
        """
        params, x1, x2, kwargs = self.rebuild(dynamic)
        options = self.options
        problem = make_problem(
            options.f,
            x1,
            x2,
            params,
            kwargs,
            vmap_axes=options.vmap_axes,
            precision=options.precision,
            caller="ntk_operator",
            find_examples=dense,
        )
        return replace(problem, side1=problem.side2, side2=problem.side1) if flip else problem

    def linearise(self, dynamic: list[Array]) -> tuple[Linearised, Linearised]:
        """J(x1) and J(x2); one object where they are one."""
        leaves = self.problem(dynamic).leaves
        left = self._sides[0].linearise(leaves, dynamic)
        return left, left if self.symmetric else self._sides[1].linearise(leaves, dynamic)

    def dense(self, flip: bool, axes: tuple[PairAxes, ...]) -> Any:
        """Compiled function from the inputs to the kernels of each output."""
        if (flip, axes) not in self._dense:
            method = self.options.method("NTKOperator.materialise")
            self._dense[flip, axes] = jax.jit(
                lambda dynamic: compute(self.problem(dynamic, flip, dense=True), method, list(axes))
            )
        return self._dense[flip, axes]

    def _run(self, dynamic: list[Array], side: int) -> Any:
        problem = self.problem(dynamic)
        return problem.run(problem.side1 if side == 1 else problem.side2)


def _avals(dynamic: list[Array]) -> list[Any]:
    return [(a.shape, a.dtype) for a in dynamic]


def _with_arrays(params: PyTree) -> PyTree:
    """Python floats become arrays, so that `at` can give them other values."""
    grow = lambda leaf: jnp.asarray(leaf) if isinstance(leaf, float | complex) else leaf
    return tree_util.tree_map(grow, params)


def _size(outputs: list[jax.ShapeDtypeStruct]) -> int:
    return sum(math.prod(y.shape) for y in outputs)


def _ravel(leaves: list[Array]) -> Array:
    return jnp.concatenate([leaf.reshape(-1) for leaf in leaves])


def _unravel(vector: Array, outputs: list[jax.ShapeDtypeStruct]) -> list[Array]:
    leaves, start = [], 0
    for y in outputs:
        size = math.prod(y.shape)
        leaves.append(vector[start : start + size].reshape(y.shape))
        start += size
    return leaves
