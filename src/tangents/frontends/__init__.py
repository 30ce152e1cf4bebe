"""From a model of any framework to `apply_fn(params, x)` and `params`.

These are the only rooms that may import a framework. A frontend is found by the object's type
through `sys.modules`: nothing is imported that the user did not import. A new framework is a file
with a function `convert`, and a line in `_FRONTENDS`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import tree_util

from tangents._core.typing import ApplyFn, PyTree
from tangents.frontends.parameters import Trainable


@dataclass(frozen=True)
class Frontend:
    """Where the models of a framework are turned into JAX."""

    package: str
    """The framework, as `sys.modules` knows it."""
    types: tuple[str, ...]
    """Its classes of models, as attributes of the package."""
    module: str
    """The module here that converts them: `convert(model, example_input, trainable)`."""


# Keras before TensorFlow: a layer of an older Keras is a `tf.Module` too.
_FRONTENDS = (
    Frontend("keras", ("Model", "Layer"), "tangents.frontends.keras"),
    Frontend(
        "tensorflow",
        (
            "Module",
            "types.experimental.PolymorphicFunction",
            "types.experimental.ConcreteFunction",
        ),
        "tangents.frontends.tensorflow.modules",
    ),
)
_ARRAYS = {"tensorflow", "keras"}  # packages whose tensors and variables stand for arrays


def from_model(
    model: Any, example_input: PyTree | None = None, *, trainable: Trainable = None
) -> tuple[ApplyFn, PyTree]:
    """A model of any framework as a function of its parameters.

    Args:
        model: a Keras model or layer (backend TensorFlow or JAX), a `tf.Module`, a `tf.function`,
            or a plain JAX function `f(params, x)`.
        example_input: an input (arrays, or anything with `shape` and `dtype`) for models that do
            not exist before they see one: Keras models without an input shape.
        trainable: which variables are parameters: None for those that the model calls trainable; a
            predicate on paths like `dense/kernel`; or a collection of paths or their beginnings.

    Returns:
        `(apply_fn, params)`: `apply_fn(params, x)` is a JAX function in evaluation mode, and
        `params` a tree of JAX arrays that holds the parameters, each once also where it is used
        several times. All other state is closed over with the values it has now. A plain function,
        or a `tf.function` of `(params, x)`, has no parameters of its own: `params` is None then.

    Raises:
        ValueError: for a model that is not built and no example input.
        NotImplementedError: for a layer or operation that cannot be converted; the message names
            it.
        TypeError: for an object that is no model.

    Examples:
        >>> import jax.numpy as jnp, tangents
        >>> apply_fn, params = tangents.from_model(lambda params, x: x @ params)
        >>> apply_fn(jnp.ones((3, 2)), jnp.ones((5, 3))).shape, params
        ((5, 2), None)
    """
    frontend = find(model)
    if frontend is not None:
        return _convert(frontend, model, example_input, trainable)
    if not callable(model):
        raise TypeError(
            f"from_model: {type(model).__name__} is not a model of a framework that is supported "
            f"({', '.join(entry.package for entry in _FRONTENDS)}), nor a function f(params, x)."
        )
    return model, None


def find(model: Any) -> Frontend | None:
    """The frontend of an object, or None for plain functions."""
    for frontend in _FRONTENDS:
        package = sys.modules.get(frontend.package)
        for path in frontend.types if package is not None else ():
            kind: Any = package
            for name in path.split("."):
                kind = getattr(kind, name, None)
            if isinstance(kind, type) and isinstance(model, kind):
                return frontend
    return None


def as_apply_fn(f: Any) -> ApplyFn:
    """`f` itself if it is a plain function, the `apply_fn` of a model otherwise."""
    frontend = find(f)
    return f if frontend is None else _convert(frontend, f, None, None)[0]


def as_jax(tree: PyTree) -> PyTree:
    """A tree whose leaves may be tensors or variables of a framework, as JAX arrays."""
    if not _ARRAYS.intersection(sys.modules):
        return tree
    return tree_util.tree_map(_as_jax, tree)


def _as_jax(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex):
        return leaf
    roots = {kind.__module__.partition(".")[0] for kind in type(leaf).__mro__}
    if not roots & _ARRAYS:
        return leaf
    if not hasattr(leaf, "numpy"):
        raise TypeError(
            f"{type(leaf).__name__} {getattr(leaf, 'name', '')!r} has no value: inside a "
            "tf.function use the functions of tangents.experimental, which take and return "
            "TensorFlow tensors."
        )
    return jnp.asarray(leaf.numpy())


def _convert(
    frontend: Frontend, model: Any, example_input: PyTree | None, trainable: Trainable
) -> tuple[ApplyFn, PyTree]:
    convert: Callable[..., tuple[ApplyFn, PyTree]]
    convert = importlib.import_module(frontend.module).convert
    of_arrays, params = convert(model, example_input, trainable)

    def apply_fn(params: PyTree, x: PyTree) -> PyTree:
        """The model in evaluation mode: see `tangents.from_model`."""
        return of_arrays(as_jax(params), as_jax(x))

    return apply_fn, params
