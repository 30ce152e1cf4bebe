"""TensorFlow computations as JAX functions, by way of XLA's own program of them.

TensorFlow traces the computation at the static shapes asked for and hands over the program it
would compile (HLO, whose serial form is stable between versions); JAX translates that to StableHLO,
and `tangents.frontends.stablehlo` reads it back as JAX primitives. Each shape is lowered once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import tree_util
from jax.extend import mlir as jax_mlir

from tangents._core.typing import Array, PyTree
from tangents.frontends import stablehlo
from tangents.frontends.tensorflow.marks import custom_gradients, marked

Kind = tuple[tuple[int, ...], np.dtype]
"""Shape and element type of a tensor, as TensorFlow sees it."""


@dataclass(frozen=True)
class Lowered:
    """A TensorFlow computation of static shapes: run it with `__call__` on flat lists."""

    main: stablehlo.Region
    captured: list[Any]
    """What the function reads besides its arguments: tensors and variable handles, in order."""
    tree: Any
    """Structure of the output."""

    def __call__(self, arguments: Sequence[Any], captured: Sequence[Any]) -> PyTree:
        """The output as JAX arrays; `captured` has a value for each of `self.captured`."""
        given = [*arguments, *captured]
        values = [
            _adjusted(value, kind.dtype) for value, kind in zip(given, self.main.types, strict=True)
        ]
        results = stablehlo.Machine().run(self.main, values)
        return tree_util.tree_unflatten(self.tree, [jnp.asarray(result) for result in results])


def lower(function: Callable[..., PyTree], kinds: Sequence[Kind], *, caller: str) -> Lowered:
    """Lower `function(*tensors) -> PyTree of tensors` at static shapes."""
    import tensorflow as tf

    structure: dict[str, Any] = {}

    def flat(*tensors: Any) -> list[Any]:
        leaves, structure["tree"] = tree_util.tree_flatten(function(*tensors))
        return [tf.convert_to_tensor(leaf) for leaf in leaves]

    specs = [tf.TensorSpec(shape, dtype) for shape, dtype in kinds]
    # A kernel may be asked for inside a tf.function that is being traced; lowering stands outside.
    with tf.init_scope():
        traced, concrete = _trace(tf, flat, specs)
        for name in custom_gradients(concrete):
            warnings.warn(
                f"{caller}: the gradient at {name} is written by hand (tf.custom_gradient); "
                "kernels use the derivative of its forward computation instead.",
                stacklevel=2,
            )
        renamed = marked(concrete, caller=caller)
        if renamed is not None:
            traced = tf.function(renamed, autograph=False, jit_compile=True)
            concrete = traced.get_concrete_function(*specs)
        try:
            hlo = traced.experimental_get_compiler_ir(*specs)(
                stage="hlo_serialized", platform_name="CPU"
            )
        except Exception as error:
            raise NotImplementedError(_unsupported(str(error), caller)) from error
        captured = list(concrete.captured_inputs)
    main = stablehlo.parse(jax_mlir.hlo_to_stablehlo(hlo))
    # Updates of variables follow the outputs: evaluation drops them, and what nobody reads.
    main, _ = stablehlo.restricted(main, main.returns[: structure["tree"].num_leaves])
    _check(main, caller)
    return Lowered(main, captured, structure["tree"])


def _trace(tf: Any, flat: Callable[..., Any], specs: list[Any]) -> tuple[Any, Any]:
    """Trace without autograph, which is slow, and with it where Python branches on a tensor."""
    traced = tf.function(flat, autograph=False, jit_compile=True)
    try:
        return traced, traced.get_concrete_function(*specs)
    except tf.errors.OperatorNotAllowedInGraphError:
        traced = tf.function(flat, autograph=True, jit_compile=True)
        return traced, traced.get_concrete_function(*specs)


def _check(main: stablehlo.Region, caller: str) -> None:
    missing = {
        stablehlo.describe(op) for op in stablehlo.walk(main) if not stablehlo.supported(op.name)
    }
    if missing:
        raise NotImplementedError(
            f"{caller}: the model has operations that are not supported: "
            f"{', '.join(sorted(missing)[:5])}. Leave them out of the model (in evaluation mode, "
            "or before its input), or write this part in JAX."
        )


def _unsupported(message: str, caller: str) -> str:
    first = message.strip().splitlines()[0]
    return (
        f"{caller}: TensorFlow cannot compile this model with XLA, which the conversion needs: "
        f"{first}. Leave the operation named there out of the model, for example by computing it "
        "on the input beforehand."
    )


def _adjusted(value: Any, dtype: np.dtype) -> Array:
    value = jnp.asarray(value)
    wanted = jax.dtypes.canonicalize_dtype(dtype)
    return value if value.dtype == wanted else value.astype(wanted)
