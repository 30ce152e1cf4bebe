"""From a TensorFlow computation and its variables to `apply_fn(params, x)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import tree_util

from tangents._core.typing import ApplyFn, PyTree
from tangents.frontends.parameters import ParameterNames
from tangents.frontends.tensorflow.lowering import Kind, Lowered, lower


@dataclass(frozen=True)
class Variable:
    """A variable of a model."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    parameter: bool
    value: np.ndarray
    """Its value at conversion; what is no parameter keeps it."""
    handle: Any = None
    """The resource by which a traced function captures it; None if it is passed as an argument."""


def apply_function(
    call: Callable[[list[Any], PyTree], PyTree],
    variables: Sequence[Variable],
    *,
    caller: str,
) -> tuple[ApplyFn, ParameterNames]:
    """`apply_fn(params, x)` of `call(values, x)`, and the names of its parameters.

    `call` is TensorFlow; `values` are the variables without a handle. It is lowered once for each
    shape and element type of `x`.
    """
    parameters = [i for i, variable in enumerate(variables) if variable.parameter]
    names = ParameterNames(
        [variables[i].path for i in parameters], [variables[i].shape for i in parameters]
    )
    passed = [i for i, variable in enumerate(variables) if variable.handle is None]
    by_handle = {
        id(variable.handle): i
        for i, variable in enumerate(variables)
        if variable.handle is not None
    }
    lowered: dict[Any, Lowered] = {}

    def lowering(x: PyTree) -> Lowered:
        leaves, tree = tree_util.tree_flatten(x)
        kinds = tuple(_as_model(kind, variables) for kind in kinds_of(leaves))
        if (kinds, tree) not in lowered:
            lowered[kinds, tree] = lower(
                lambda *tensors: call(
                    list(tensors[: len(passed)]),
                    tree_util.tree_unflatten(tree, tensors[len(passed) :]),
                ),
                [*((variables[i].shape, variables[i].dtype) for i in passed), *kinds],
                caller=caller,
            )
            _known(lowered[kinds, tree], by_handle, caller)
        return lowered[kinds, tree]

    def apply_fn(params: PyTree, x: PyTree) -> PyTree:
        values: list[Any] = [variable.value for variable in variables]
        for i, value in zip(parameters, names.values(params, caller="apply_fn"), strict=True):
            values[i] = value
        program = lowering(x)
        captured = [
            values[by_handle[id(tensor)]] if id(tensor) in by_handle else _constant(tensor)
            for tensor in program.captured
        ]
        inputs = tree_util.tree_leaves(x)
        return program([*(values[i] for i in passed), *inputs], captured)

    return apply_fn, names


def kinds_of(tree: PyTree) -> list[Kind]:
    """Shapes and element types of arrays, tracers, tensors or specifications."""
    kinds = []
    for leaf in tree_util.tree_leaves(tree):
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
            dtype = getattr(leaf.dtype, "as_numpy_dtype", leaf.dtype)
            kinds.append((_static(leaf.shape), np.dtype(jnp.dtype(dtype))))
        else:
            array = jnp.asarray(leaf)
            kinds.append((array.shape, np.dtype(array.dtype)))
    return kinds


def _static(shape: Any) -> tuple[int, ...]:
    if any(size is None or not isinstance(size, int | np.integer) for size in shape):
        raise ValueError(
            f"the input has shape {tuple(shape)}: every size must be known. Inside tf.function, "
            "give the tensor its shape with tf.ensure_shape, or an input_signature without None."
        )
    return tuple(int(size) for size in shape)


def _as_model(kind: Kind, variables: Sequence[Variable]) -> Kind:
    """Without x64 JAX has no float64 to give to a model that computes in it."""
    shape, dtype = kind
    floating = {variable.dtype for variable in variables if variable.dtype.kind == "f"}
    if dtype == np.float32 and floating == {np.dtype(np.float64)} and not _has_float64():
        return shape, np.dtype(np.float64)
    return kind


def _has_float64() -> bool:
    return jax.dtypes.canonicalize_dtype(np.float64) == np.float64


def _known(program: Lowered, by_handle: dict[int, int], caller: str) -> None:
    """A trainable variable that is not among the parameters must not vanish silently."""
    for tensor in program.captured:
        if id(tensor) in by_handle or not _is_resource(tensor):
            continue
        raise ValueError(
            f"{caller}: it reads a variable (shape {_shape(tensor)}) that is not among the "
            "model's variables. Make it an attribute of the module, or pass example_input= so "
            "that it is found by calling the model."
        )


def _is_resource(tensor: Any) -> bool:
    return tensor.dtype.name == "resource"


def _shape(handle: Any) -> Any:
    data = getattr(handle, "_handle_data", None)
    return data.shape_and_type[0].shape if data is not None and data.is_set else "unknown"


def _constant(tensor: Any) -> np.ndarray:
    return np.asarray(tensor.numpy())
