"""JAX functions on TensorFlow tensors, inside and outside `tf.function`, with gradients.

The JAX function is traced at the tensors' shapes and becomes one operation of the TensorFlow graph
(`jax2tf`, by StableHLO); its gradient is another one, made when a tape asks for it. Tracing keeps
TensorFlow's element types: a float64 tensor stays one, whatever `jax_enable_x64` says.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import tree_util

from tangents._core import lapack
from tangents._core.typing import PyTree


def wrap(jax_function: Callable[..., PyTree], *, caller: str) -> Callable[..., PyTree]:
    """A `tf.function` of trees of tensors that computes a JAX function of trees of arrays."""

    def on_tensors(*trees: PyTree) -> PyTree:
        return call(jax_function, *trees, caller=caller)

    # For callers by keyword, and for what tf.function says of it.
    on_tensors.__signature__ = inspect.signature(jax_function)  # pyright: ignore
    return function(on_tensors)


def function(python_function: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """A `tf.function` without autograph, which would rewrite JAX's own source: 20 seconds."""
    import tensorflow as tf

    return _kernel_function()(tf.function(python_function, autograph=False))


@functools.cache
def _kernel_function() -> Any:
    import tensorflow as tf

    class KernelFunction(tf.types.experimental.PolymorphicFunction):
        """A `tf.function` that also takes the variables of Keras, and arrays of JAX.

        `tf.function` itself would read them as NumPy arrays, which fails inside another one.
        """

        def __init__(self, inner: Any):
            self._inner = inner

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self._inner(*_plain(args), **_plain(kwargs))

        def get_concrete_function(self, *args: Any, **kwargs: Any) -> Any:
            return self._inner.get_concrete_function(*_plain(args), **_plain(kwargs))

        def experimental_get_compiler_ir(self, *args: Any, **kwargs: Any) -> Any:
            return self._inner.experimental_get_compiler_ir(*_plain(args), **_plain(kwargs))

        @property
        def function_type(self) -> Any:
            return self._inner.function_type

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

    return KernelFunction


def as_tensors(tree: PyTree) -> PyTree:
    """A tree of JAX arrays as TensorFlow tensors."""
    import tensorflow as tf

    return tree_util.tree_map(lambda leaf: tf.constant(np.asarray(leaf)), tree)


def call(function: Callable[..., PyTree], *trees: PyTree, caller: str) -> PyTree:
    """The value of a JAX function on trees of tensors, variables or arrays."""
    leaves, tree = tree_util.tree_flatten(tuple(_plain(entry) for entry in trees))
    tensors = [_tensor(leaf, caller) for leaf in leaves]
    structure: dict[str, Any] = {}

    def flat(*arrays: Any) -> tuple[Any, ...]:
        outputs = function(*tree_util.tree_unflatten(tree, arrays))
        results, structure["tree"] = tree_util.tree_flatten(outputs)
        return tuple(jnp.asarray(result) for result in results)

    results = _differentiable(flat)(*tensors)
    return tree_util.tree_unflatten(structure["tree"], results)


def _differentiable(function: Callable[..., tuple]) -> Callable[..., tuple]:
    """A flat JAX function on tensors, with a gradient of which a tape can take the gradient."""
    import tensorflow as tf

    @tf.custom_gradient
    def run(*given: Any) -> tuple[tuple, Callable[..., Any]]:
        # The graph of a gradient captures the tensors of the one before it, and only that one's:
        # each graph needs names of its own for the gradient of the gradient.
        tensors = tuple(tf.identity(tensor) for tensor in given)
        outputs = _convert(function, tensors)

        def gradient(*cotangents: Any, variables: Any = None) -> Any:
            # Variables that a model read while it was being lowered are no inputs: parameters are.
            inexact = [i for i, tensor in enumerate(tensors) if _inexact(tensor)]
            kept = [i for i, output in enumerate(outputs) if _inexact(output)]

            def pullback(*arrays: Any) -> tuple:
                primals, given = arrays[: len(tensors)], arrays[len(tensors) :]

                def of_inexact(*moving: Any) -> tuple:
                    values = list(primals)
                    for i, value in zip(inexact, moving, strict=True):
                        values[i] = value
                    results = function(*values)
                    return tuple(results[i] for i in kept)

                _, transpose = jax.vjp(of_inexact, *(primals[i] for i in inexact))
                return transpose(given)

            found = _differentiable(pullback)(*tensors, *(cotangents[i] for i in kept))
            gradients: list[Any] = [None] * len(tensors)
            for i, value in zip(inexact, found, strict=True):
                gradients[i] = value
            return gradients if variables is None else (gradients, [None] * len(variables))

        return outputs, gradient

    return lambda *tensors: _as_tuple(run(*tensors))


def _convert(function: Callable[..., tuple], tensors: tuple) -> tuple:
    from jax.experimental import jax2tf

    with jax.enable_x64(True), lapack.absent():
        return tuple(jax2tf.convert(function, with_gradient=False)(*tensors))


def _as_tuple(results: Any) -> tuple:
    return tuple(results) if isinstance(results, list | tuple) else (results,)


def _inexact(tensor: Any) -> bool:
    return tensor.dtype.is_floating or tensor.dtype.is_complex


def _plain(tree: Any) -> Any:
    """Lists and dictionaries without TensorFlow's wrappers, with leaves that it knows."""
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_plain(value) for value in tree]
    if isinstance(tree, tuple) and not hasattr(tree, "_fields"):
        return tuple(_plain(value) for value in tree)
    if isinstance(tree, jax.Array):
        return np.asarray(tree)
    keras = sys.modules.get("keras")
    if keras is not None and isinstance(tree, keras.Variable):
        return getattr(tree, "value")  # noqa: B009  (the type is known at run time only)
    return tree


def _tensor(leaf: Any, caller: str) -> Any:
    import tensorflow as tf

    tensor = tf.convert_to_tensor(leaf)
    if not tensor.shape.is_fully_defined():
        raise ValueError(
            f"{caller}: a tensor has shape {tuple(tensor.shape)}, and the kernel is compiled for "
            "known sizes. Inside tf.function give it one with tf.ensure_shape(x, (8, ...)), or "
            "leave None out of the input_signature: each batch size is then traced once."
        )
    return tensor
