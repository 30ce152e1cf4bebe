"""`tf.Module` and `tf.function`.

A module's variables are captured by the function that calls it; XLA's program takes them as
arguments behind the inputs, and there the parameters go in.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import tree_util

from tangents._core.typing import ApplyFn, PyTree
from tangents.frontends.parameters import ParameterNames, Trainable, chosen
from tangents.frontends.tensorflow.conversion import Variable, apply_function, kinds_of
from tangents.frontends.tensorflow.lowering import lower

_CALLER = "from_model"


def convert(model: Any, example_input: PyTree | None, trainable: Trainable) -> tuple[ApplyFn, Any]:
    """`(apply_fn, params)` of a `tf.Module` or `tf.function`; see `tangents.from_model`."""
    apply_fn, names, variables = convert_with_variables(model, example_input, trainable)
    if names is None:
        return apply_fn, None
    return apply_fn, names.tree(jnp.asarray(variable.numpy()) for variable in variables)


def convert_with_variables(
    model: Any, example_input: PyTree | None, trainable: Trainable
) -> tuple[ApplyFn, ParameterNames | None, list[Any]]:
    """The function, the names of its parameters, and the variables that hold them.

    The names are None for a `tf.function` of `(params, x)`.
    """
    import tensorflow as tf

    if not isinstance(model, tf.Module):
        if _arguments(model) > 1:
            return _of_params(model), None, []
        name, call, attributes = getattr(model, "__name__", "tf.function"), _python(model), {}
    else:
        name, call, attributes = type(model).__name__, _evaluation(model), _attributes(model)
    kinds = _input_kinds(model, example_input)
    found = list(attributes.values())
    if kinds is not None:
        found += _captured(call, kinds, example_input, found)
    if not found:
        raise ValueError(
            f"{_CALLER}: {name} has no variables, and its input's shape is not known (no "
            "input_shape attribute, no input_signature). Pass example_input=, an input with a "
            "batch axis."
        )
    names = [*attributes, *(v.name.partition(":")[0] for v in found[len(attributes) :])]
    variables = [
        Variable(
            path=path,
            shape=tuple(variable.shape),
            dtype=np.dtype(jnp.dtype(variable.dtype.as_numpy_dtype)),
            parameter=chosen(path, variable.trainable, trainable),
            value=np.asarray(variable.numpy()),
            handle=variable.handle,
        )
        for path, variable in zip(names, found, strict=True)
    ]
    apply_fn, parameter_names = apply_function(
        lambda values, x: call(x), variables, caller=f"{_CALLER}: {name}"
    )
    kept = [v for v, entry in zip(found, variables, strict=True) if entry.parameter]
    return apply_fn, parameter_names, kept


def _arguments(function: Any) -> int:
    """How many positional arguments a `tf.function` takes."""
    signature = getattr(function, "input_signature", None)
    if signature is not None:
        return len(signature)
    structured = getattr(function, "structured_input_signature", None)
    if structured is not None:
        return len(structured[0])
    parameters = inspect.signature(function.python_function).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters)


def _of_params(function: Any) -> ApplyFn:
    """A `tf.function` of `(params, x)`: both are arguments."""
    programs: dict[Any, Any] = {}

    def apply_fn(params: PyTree, x: PyTree) -> PyTree:
        leaves, tree = tree_util.tree_flatten((params, x))
        leaves = [jnp.asarray(leaf) for leaf in leaves]
        kinds = tuple(kinds_of(leaves))
        if (kinds, tree) not in programs:
            programs[kinds, tree] = lower(
                lambda *tensors: _python(function)(*tree_util.tree_unflatten(tree, tensors)),
                kinds,
                caller=getattr(function, "__name__", "tf.function"),
            )
        program = programs[kinds, tree]
        captured = [_value(tensor, function) for tensor in program.captured]
        return program(leaves, captured)

    return apply_fn


def _value(tensor: Any, function: Any) -> np.ndarray:
    """What a function of `(params, x)` reads besides them: constants, and variables as they are."""
    if tensor.dtype.name != "resource":
        return np.asarray(tensor.numpy())
    for variable in _variables_of(function):
        if variable.handle is tensor:
            return np.asarray(variable.numpy())
    raise ValueError(
        f"{_CALLER}: {getattr(function, '__name__', 'tf.function')} reads a variable that cannot "
        "be found; pass it in params."
    )


def _variables_of(function: Any) -> list[Any]:
    concrete = getattr(function, "_list_all_concrete_functions", None)
    functions = concrete() if concrete is not None else [function]
    return [variable for entry in functions for variable in entry.graph.variables]


def _python(function: Any) -> Callable[..., Any]:
    """What a `tf.function` was made of: its signature may leave sizes open that are known here."""
    return getattr(function, "python_function", function)


def _attributes(module: Any) -> dict[str, Any]:
    """Variables by the path of attributes that leads to them, each once."""
    paths = module._flatten(
        predicate=_is_variable, with_path=True, expand_composites=False
    )  # tf.Module documents this for its subclasses
    found: dict[int, tuple[str, Any]] = {}
    for path, variable in paths:
        found.setdefault(id(variable), ("/".join(str(name) for name in path), variable))
    return dict(found.values())


def _is_variable(candidate: Any) -> bool:
    import tensorflow as tf

    return isinstance(candidate, tf.Variable)


def _evaluation(module: Any) -> Callable[[PyTree], PyTree]:
    """The module's call, in evaluation mode where it knows the difference."""
    if not callable(module):
        raise TypeError(
            f"{_CALLER}: {type(module).__name__} is a tf.Module without a __call__ method; pass "
            "the method that computes its output, wrapped in a module that has one."
        )
    signature = inspect.signature(getattr(module.__call__, "python_function", module.__call__))
    if "training" in signature.parameters:
        return lambda x: module(x, training=False)
    if "is_training" in signature.parameters:
        return lambda x: module(x, is_training=False)
    return lambda x: module(x)


def _input_kinds(model: Any, example_input: PyTree | None) -> list[Any] | None:
    """Shapes to call the model with once, unknown sizes taken as one; None where not known."""
    if example_input is not None:
        return kinds_of(example_input)
    call = vars(type(model)).get("__call__")
    signature = getattr(model, "input_signature", None) or getattr(call, "input_signature", None)
    if signature is None and getattr(model, "structured_input_signature", None) is not None:
        signature = model.structured_input_signature[0]
    if signature:
        specs = tree_util.tree_leaves(signature[-1])
        return [(_ones(s.shape), np.dtype(s.dtype.as_numpy_dtype)) for s in specs]
    shape = getattr(model, "input_shape", None)
    if shape is None:
        return None
    dtypes = {v.dtype.as_numpy_dtype for v in getattr(model, "variables", ())}
    floating = [dtype for dtype in dtypes if np.dtype(dtype).kind == "f"]
    return [(_ones(shape), np.dtype(floating[0] if len(floating) == 1 else np.float32))]


def _ones(shape: Any) -> tuple[int, ...]:
    return tuple(1 if size is None else int(size) for size in shape)


def _captured(
    call: Callable[[PyTree], PyTree], kinds: list[Any], example: PyTree | None, known: list[Any]
) -> list[Any]:
    """Variables that a call reads and that are not known yet."""
    import tensorflow as tf

    tree = tree_util.tree_structure(example if example is not None else kinds[0][1])
    with tf.init_scope():
        concrete = tf.function(
            lambda *tensors: call(tree_util.tree_unflatten(tree, tensors)), autograph=False
        ).get_concrete_function(*(tf.TensorSpec(shape, dtype) for shape, dtype in kinds))
    handles = {id(variable.handle) for variable in known}
    return [v for v in concrete.graph.variables if id(v.handle) not in handles]
