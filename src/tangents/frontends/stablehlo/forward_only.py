"""An identity without a reverse mode, behind loops that have none: its error can say which one."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_forward_only = Primitive("forward_only")


def forward_only(value: Any, message: str) -> Any:
    """`value`; pulling a cotangent back through it raises `NotImplementedError(message)`."""
    if not jnp.issubdtype(value.dtype, jnp.inexact):
        return value
    return _forward_only.bind(value, message=message)


def _refuse(cotangent: Any, value: Any, *, message: str) -> Any:
    raise NotImplementedError(message)


_forward_only.def_impl(lambda value, *, message: value)
_forward_only.def_abstract_eval(lambda value, *, message: value)
ad.deflinear2(_forward_only, _refuse)
batching.defvectorized(_forward_only)
mlir.register_lowering(_forward_only, lambda context, value, *, message: [value])
