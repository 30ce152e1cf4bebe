"""Operations that travel through StableHLO under a name of their own.

XLA expands some functions before a program is handed over: erfc into rational approximations with
a division by zero at zero, softplus and elu into branches that overflow where they are not taken,
relu into a maximum with another derivative at zero; `stop_gradient` vanishes. A frontend that can
mark them (`tangents.frontends.tensorflow.marks`) sends them as custom calls with `TARGET` before
their name, and here they become the functions of JAX with the derivatives people mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy import special

from tangents.frontends.stablehlo.evaluation import (
    Machine,
    UnsupportedOperation,
    Value,
    describe,
    rule,
)
from tangents.frontends.stablehlo.program import Operation

TARGET = "tangents."

_SELU_SCALE, _SELU_ALPHA = 1.0507009873554805, 1.6732632423543772


def _selu(x: Any) -> Any:
    # With the derivative of the right side at zero; `jax.nn.selu` has that of the left one.
    below = lax.expm1(jnp.minimum(x, jnp.zeros_like(x)))
    return _SELU_SCALE * jnp.where(x >= 0, x, _SELU_ALPHA * below)


# Named as TensorFlow names its operations; the number is their attribute, where they have one.
UNARY: dict[str, Callable[[Any, float], Any]] = {
    "Digamma": lambda x, _: lax.digamma(x),
    "Elu": lambda x, _: jax.nn.elu(x),
    "Erf": lambda x, _: lax.erf(x),
    "Erfc": lambda x, _: lax.erfc(x),
    "Erfinv": lambda x, _: lax.erf_inv(x),
    "LeakyRelu": lambda x, slope: jax.nn.leaky_relu(x, slope),
    "Lgamma": lambda x, _: lax.lgamma(x),
    "LogSoftmax": lambda x, _: jax.nn.log_softmax(x, axis=-1),
    "Ndtri": lambda x, _: special.ndtri(x),
    "PreventGradient": lambda x, _: lax.stop_gradient(x),
    "Relu": lambda x, _: jax.nn.relu(x),
    "Relu6": lambda x, _: jax.nn.relu6(x),
    "Selu": lambda x, _: _selu(x),
    "Softmax": lambda x, _: jax.nn.softmax(x, axis=-1),
    "Softplus": lambda x, _: jax.nn.softplus(x),
    "StopGradient": lambda x, _: lax.stop_gradient(x),
}

# What other converters to StableHLO leave as calls.
_FOREIGN: dict[str, Callable[[Any], Any]] = {
    "mhlo.acos": lax.acos,
    "mhlo.acosh": lax.acosh,
    "mhlo.asin": lax.asin,
    "mhlo.asinh": lax.asinh,
    "mhlo.atanh": lax.atanh,
    "mhlo.cosh": lax.cosh,
    "mhlo.erf": lax.erf,
    "mhlo.erf_inv": lax.erf_inv,
    "mhlo.sinh": lax.sinh,
    "mhlo.tan": lax.tan,
}


@rule("custom_call")
def custom_call(op: Operation, operands: list[Value], machine: Machine) -> list[Value]:
    """A function known by its name."""
    name = str(op.attributes["call_target_name"])
    if name.startswith(TARGET):
        kind, _, number = name.removeprefix(TARGET).partition(":")
        if kind in UNARY:
            return [UNARY[kind](jnp.asarray(operands[0]), float(number or 0))]
    elif name in _FOREIGN:
        return [_FOREIGN[name](operands[0])]
    raise UnsupportedOperation(describe(op))
