"""Keras 3 models on the TensorFlow and JAX backends.

`stateless_call` gives the split into trainable and other variables by argument position, exact
also where layers are shared or frozen. On the TensorFlow backend it is lowered by
`tangents.frontends.tensorflow.lowering`; on JAX it is a JAX function already.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import tree_util

from tangents._core.typing import ApplyFn, PyTree
from tangents.frontends.parameters import ParameterNames, Trainable, as_dtype, chosen
from tangents.frontends.tensorflow.conversion import Variable, apply_function, kinds_of

_CALLER = "from_model"


def convert(model: Any, example_input: PyTree | None, trainable: Trainable) -> tuple[ApplyFn, Any]:
    """`(apply_fn, params)` of a Keras model or layer; see `tangents.from_model`."""
    apply_fn, names, values = convert_with_variables(model, example_input, trainable)
    return apply_fn, names.tree(jnp.asarray(np.asarray(value.numpy())) for value in values)


def convert_with_variables(
    model: Any, example_input: PyTree | None, trainable: Trainable
) -> tuple[ApplyFn, ParameterNames, list[Any]]:
    """The function, the names of its parameters, and the variables that hold them."""
    import keras

    backend = keras.config.backend()
    if backend not in ("tensorflow", "jax"):
        raise NotImplementedError(
            f"{_CALLER}: {model.name!r} is a Keras model on the {backend} backend, which is not "
            "supported; set KERAS_BACKEND to 'tensorflow' or 'jax' before importing Keras (models "
            "saved on one backend load on another)."
        )
    _build(model, example_input)
    own = [*model.trainable_variables, *model.non_trainable_variables]
    split = len(model.trainable_variables)
    variables = [
        Variable(
            path=variable.path,
            shape=tuple(variable.shape),
            dtype=np.dtype(jnp.dtype(variable.dtype)),
            parameter=chosen(variable.path, i < split, trainable),
            value=np.asarray(keras.ops.convert_to_numpy(variable)),
        )
        for i, variable in enumerate(own)
    ]

    mode = {"training": False} if _knows_training(model) else {}

    def call(values: list[Any], x: PyTree) -> PyTree:
        outputs, _ = model.stateless_call(values[:split], values[split:], x, **mode)
        return outputs

    if backend == "jax":
        apply_fn, names = _on_jax(call, variables)
    else:
        apply_fn, names = apply_function(call, variables, caller=f"Keras model {model.name!r}")
    kept = [variable for variable, entry in zip(own, variables, strict=True) if entry.parameter]
    return apply_fn, names, kept


def _knows_training(model: Any) -> bool:
    """Whether the model's call can be told the mode; without, its layers are in evaluation mode."""
    parameters = inspect.signature(model.call).parameters.values()
    return any(p.name == "training" or p.kind is p.VAR_KEYWORD for p in parameters)


def _build(model: Any, example_input: PyTree | None) -> None:
    """Let a model that has not seen an input make its variables."""
    import keras

    if example_input is not None and not model.built:
        shapes = kinds_of(example_input)
        tree = tree_util.tree_structure(example_input)
        zeros = [np.zeros(shape, dtype) for shape, dtype in shapes]
        model(tree_util.tree_unflatten(tree, [keras.ops.convert_to_tensor(x) for x in zeros]))
    if not model.built:
        raise ValueError(
            f"{_CALLER}: the Keras model {model.name!r} is not built, so its variables do not "
            "exist and its input shape is not known. Pass example_input=, an input with a batch "
            "axis, or call the model on one first."
        )


def _on_jax(
    call: Callable[[list[Any], PyTree], PyTree], variables: list[Variable]
) -> tuple[ApplyFn, ParameterNames]:
    parameters = [i for i, variable in enumerate(variables) if variable.parameter]
    names = ParameterNames(
        [variables[i].path for i in parameters], [variables[i].shape for i in parameters]
    )

    def apply_fn(params: PyTree, x: PyTree) -> PyTree:
        values: list[Any] = [jnp.asarray(variable.value) for variable in variables]
        given = names.values(params, caller="apply_fn")
        for i, value in zip(parameters, given, strict=True):
            values[i] = as_dtype(value, variables[i].dtype)
        return call(values, x)

    return apply_fn, names
