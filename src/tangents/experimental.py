"""Kernels of TensorFlow and Keras models, on TensorFlow tensors.

`empirical_ntk_fn_tf` and its siblings take a Keras 3 model, a `tf.Module` or a `tf.function` of
`(params, x)` and return a `tf.function`: it can be called eagerly or inside another `tf.function`,
and a `tf.GradientTape` differentiates through it. `get_apply_fn_and_params` gives the parameters
that these functions take, and the way out to JAX.

TensorFlow is imported only where it is used; install `tangents[tensorflow]`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import jax

from tangents import frontends
from tangents._core.typing import ApplyFn, Axes, PyTree, VMapAxes
from tangents._finite.functions import (
    empirical_kernel_fn,
    empirical_nngp_fn,
    empirical_ntk_fn,
)
from tangents._finite.implementation import NtkImplementation
from tangents._finite.linearization import taylor_expand
from tangents._finite.vector_product import empirical_ntk_vp_fn

__all__ = [
    "empirical_kernel_fn_tf",
    "empirical_nngp_fn_tf",
    "empirical_ntk_fn_tf",
    "empirical_ntk_vp_fn_tf",
    "get_apply_fn_and_params",
    "linearize_tf",
    "taylor_expand_tf",
]


# As in JAX, so that a change of framework changes nothing else.
_IMPLEMENTATION = inspect.signature(empirical_ntk_fn).parameters["implementation"].default


def get_apply_fn_and_params(
    f: Any, *, trainable_only: bool = True, example_input: PyTree | None = None
) -> tuple[ApplyFn, PyTree]:
    """A TensorFlow model as a JAX function, and its parameters as TensorFlow tensors.

    Args:
        f: a Keras model or layer, or a `tf.Module`.
        trainable_only: True for the trainable variables; False for all variables, those of
            normalisation statistics and seeds too.
        example_input: an input for models that are not built, or whose input's shape is not known.

    Returns:
        `(apply_fn, params)`. `apply_fn(params, x)` is a JAX function in evaluation mode: it takes
        arrays of JAX, NumPy or TensorFlow, and JAX can transform it. `params` holds TensorFlow
        tensors in nested dictionaries, with the variables' names as paths
        (`params["dense"]["kernel"]`, as in Keras's `variable.path`); variables that are not in it
        keep the value they have now.

    Raises:
        ValueError: if the model is not built and there is no example input.
        NotImplementedError: if an operation or the backend is not supported.

    Examples:
        >>> import keras, numpy as np  # doctest: +SKIP
        >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)])  # doctest: +SKIP
        >>> apply_fn, params = get_apply_fn_and_params(model)  # doctest: +SKIP
        >>> apply_fn(params, np.ones((5, 8), "float32")).shape  # doctest: +SKIP
        (5, 3)
    """
    tensors = _on_tensors("get_apply_fn_and_params")
    with jax.enable_x64(True):  # TensorFlow's element types, whatever JAX's setting
        apply_fn, params = frontends.from_model(
            f, example_input, trainable=None if trainable_only else _every
        )
    return apply_fn, tensors.as_tensors(params)


def empirical_ntk_fn_tf(
    f: Any,
    trace_axes: Axes = (-1,),
    diagonal_axes: Axes = (),
    vmap_axes: VMapAxes = None,
    implementation: NtkImplementation | int | str = _IMPLEMENTATION,
    _j_rules: bool = True,
    _s_rules: bool = True,
    _fwd: bool | None = None,
    *,
    example_input: PyTree | None = None,
    **options: Any,
) -> Callable[..., PyTree]:
    """The neural tangent kernel of a TensorFlow model, as a `tf.function`.

        Θ(x1, x2) = J(x1) J(x2)ᵀ,  J(x) = ∂f(θ, x) / ∂θ

    Args:
        f: a Keras model or layer, a `tf.Module`, or a `tf.function` of `(params, x)`.
        trace_axes: output axes over which the kernel is averaged, as in
            `tangents.empirical_ntk_fn`, like all other arguments.
        diagonal_axes: output axes of which only the diagonal pairs are kept.
        vmap_axes: a promise that examples along this axis do not interact, usually 0: cheaper.
        implementation: the method, an `NtkImplementation`, its number or its name.
        _j_rules: structured derivatives only: use rules for Jacobians of primitives.
        _s_rules: structured derivatives only: use rules for the structure of primitives.
        _fwd: structured derivatives only: forward mode (True), reverse (False), or choose (None).
        example_input: an input for models that are not built, or whose input's shape is not known.
        **options: further ones of the JAX function, such as `precision`.

    Returns:
        `kernel_fn(x1, x2, params)`, a `tf.function` of tensors: `x2` may be None and stands for x1
        then; `params` as `get_apply_fn_and_params` gives them, or a list of the model's trainable
        variables in their order, or the same as arrays. Each new shape is compiled once; inside
        another `tf.function` the sizes must be known when it is traced.

    Raises:
        ValueError: if the model is not built and there is no example input; for axes that do not
            fit; for tensors of unknown size.
        NotImplementedError: if an operation or the backend is not supported.

    Source: Novak, Sohl-Dickstein, Schoenholz 2022.

    Examples:
        >>> import keras, tensorflow as tf  # doctest: +SKIP
        >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)])  # doctest: +SKIP
        >>> kernel_fn = empirical_ntk_fn_tf(model, vmap_axes=0)  # doctest: +SKIP
        >>> kernel_fn(tf.ones((5, 8)), None, model.trainable_variables).shape  # doctest: +SKIP
        TensorShape([5, 5])
    """
    caller = "empirical_ntk_fn_tf"
    tensors = _on_tensors(caller)
    kernel_fn = empirical_ntk_fn(
        _apply_fn(f, example_input),
        trace_axes,
        diagonal_axes,
        vmap_axes,
        implementation,
        _j_rules,
        _s_rules,
        _fwd,
        **options,
    )
    return tensors.wrap(lambda x1, x2, params: kernel_fn(x1, x2, params), caller=caller)


def empirical_nngp_fn_tf(
    f: Any,
    trace_axes: Axes = (-1,),
    diagonal_axes: Axes = (),
    *,
    example_input: PyTree | None = None,
    **options: Any,
) -> Callable[..., PyTree]:
    """The conjugate kernel of a TensorFlow model, as a `tf.function`: f(θ, x1) f(θ, x2)ᵀ.

    Args:
        f: a Keras model or layer, a `tf.Module`, or a `tf.function` of `(params, x)`.
        trace_axes: output axes to average over, as in `tangents.empirical_nngp_fn`.
        diagonal_axes: output axes of which only the diagonal pairs are kept.
        example_input: an input for models that are not built.
        **options: further ones of the JAX function, such as `precision`.

    Returns:
        `nngp_fn(x1, x2, params)`, called as the result of `empirical_ntk_fn_tf`.

    Raises:
        ValueError: as `empirical_ntk_fn_tf`.
        NotImplementedError: as `empirical_ntk_fn_tf`.
    """
    caller = "empirical_nngp_fn_tf"
    tensors = _on_tensors(caller)
    nngp_fn = empirical_nngp_fn(_apply_fn(f, example_input), trace_axes, diagonal_axes, **options)
    return tensors.wrap(lambda x1, x2, params: nngp_fn(x1, x2, params), caller=caller)


def empirical_kernel_fn_tf(
    f: Any,
    trace_axes: Axes = (-1,),
    diagonal_axes: Axes = (),
    vmap_axes: VMapAxes = None,
    implementation: NtkImplementation | int | str = _IMPLEMENTATION,
    _j_rules: bool = True,
    _s_rules: bool = True,
    _fwd: bool | None = None,
    *,
    example_input: PyTree | None = None,
    **options: Any,
) -> Callable[..., PyTree]:
    """NNGP and NTK of a TensorFlow model in one `tf.function`.

    Args:
        f: as in `empirical_ntk_fn_tf`, like all other arguments.
        trace_axes: output axes to average over.
        diagonal_axes: output axes of which only the diagonal pairs are kept.
        vmap_axes: promise of independent examples.
        implementation: method of the NTK.
        _j_rules: structured derivatives only.
        _s_rules: structured derivatives only.
        _fwd: structured derivatives only.
        example_input: an input for models that are not built.
        **options: further ones of the JAX function, such as `precision`.

    Returns:
        `kernel_fn(x1, x2, get, params)` with `get` 'nngp', 'ntk', a tuple of these or None (both),
        as in `tangents.empirical_kernel_fn`.

    Raises:
        ValueError: as `empirical_ntk_fn_tf`, and for an empty or repeated `get`.
        KeyError: for a `get` that is neither 'nngp' nor 'ntk'.
        NotImplementedError: as `empirical_ntk_fn_tf`.
    """
    caller = "empirical_kernel_fn_tf"
    tensors = _on_tensors(caller)
    kernel_fn = empirical_kernel_fn(
        _apply_fn(f, example_input),
        trace_axes,
        diagonal_axes,
        vmap_axes,
        implementation,
        _j_rules,
        _s_rules,
        _fwd,
        **options,
    )

    def of_tensors(x1: PyTree, x2: PyTree | None, get: Any, params: PyTree) -> PyTree:
        function = lambda x1, x2, params: kernel_fn(x1, x2, get, params)
        return tensors.call(function, x1, x2, params, caller=caller)

    return tensors.function(of_tensors)


def empirical_ntk_vp_fn_tf(
    f: Any,
    x1: PyTree,
    x2: PyTree | None,
    params: PyTree,
    *,
    example_input: PyTree | None = None,
) -> Callable[[PyTree], PyTree]:
    """Products of the NTK of a TensorFlow model with vectors, without the NTK: v ↦ J(x1) J(x2)ᵀ v.

    Args:
        f: a Keras model or layer, a `tf.Module`, or a `tf.function` of `(params, x)`.
        x1: inputs on the left, tensors.
        x2: inputs on the right; None stands for x1.
        params: as in `empirical_ntk_fn_tf`.
        example_input: an input for models that are not built.

    Returns:
        `ntk_vp_fn(cotangents)`, a `tf.function`: from tensors shaped like the output on x2 to
        tensors shaped like the output on x1.

    Raises:
        ValueError: if cotangents have other shapes than the output on x2.
        NotImplementedError: as `empirical_ntk_fn_tf`.
    """
    caller = "empirical_ntk_vp_fn_tf"
    tensors = _on_tensors(caller)
    apply_fn = _apply_fn(f, example_input)

    def product(cotangents: PyTree, x1: PyTree, x2: PyTree | None, params: PyTree) -> PyTree:
        return empirical_ntk_vp_fn(apply_fn, x1, x2, params)(cotangents)

    def ntk_vp_fn(cotangents: PyTree) -> PyTree:
        return tensors.call(product, cotangents, x1, x2, params, caller=caller)

    return tensors.function(ntk_vp_fn)


def linearize_tf(
    f: Any, params: PyTree, *, example_input: PyTree | None = None
) -> Callable[..., PyTree]:
    """The first-order Taylor expansion of a TensorFlow model in its parameters.

    Args:
        f: a Keras model or layer, a `tf.Module`, or a `tf.function` of `(params, x)`.
        params: θ, the parameters to expand about, as in `empirical_ntk_fn_tf`.
        example_input: an input for models that are not built.

    Returns:
        `f_lin(p, x)`, a `tf.function`: f(θ, x) + J(x) (p − θ), with `p` shaped like `params`.

    Raises:
        ValueError: if `p` and `params` differ in structure or shapes.
        NotImplementedError: as `empirical_ntk_fn_tf`.
    """
    return taylor_expand_tf(f, params, 1, example_input=example_input)


def taylor_expand_tf(
    f: Any, params: PyTree, degree: int, *, example_input: PyTree | None = None
) -> Callable[..., PyTree]:
    """The Taylor expansion of a TensorFlow model in its parameters, up to a degree.

    Args:
        f: a Keras model or layer, a `tf.Module`, or a `tf.function` of `(params, x)`.
        params: θ, the parameters to expand about, as in `empirical_ntk_fn_tf`.
        degree: the highest order kept, as in `tangents.taylor_expand`.
        example_input: an input for models that are not built.

    Returns:
        `f_deg(p, x)`, a `tf.function`.

    Raises:
        ValueError: if `p` and `params` differ in structure or shapes.
        NotImplementedError: as `empirical_ntk_fn_tf`.
    """
    caller = "taylor_expand_tf"
    tensors = _on_tensors(caller)
    apply_fn = _apply_fn(f, example_input)

    def expansion(p: PyTree, x: PyTree, origin: PyTree) -> PyTree:
        return taylor_expand(apply_fn, origin, degree)(p, x)

    return tensors.function(lambda p, x: tensors.call(expansion, p, x, params, caller=caller))


def _apply_fn(f: Any, example_input: PyTree | None) -> ApplyFn:
    with jax.enable_x64(True):
        return frontends.from_model(f, example_input)[0]


def _every(path: str) -> bool:
    return True


def _on_tensors(caller: str) -> Any:
    """The room that puts JAX functions on tensors; an error that names the extra without it."""
    if importlib.util.find_spec("tensorflow") is None:
        raise ImportError(
            f"{caller}: TensorFlow is not installed; pip install 'tangents[tensorflow]'."
        )
    return importlib.import_module("tangents.frontends.tensorflow.tensors")
