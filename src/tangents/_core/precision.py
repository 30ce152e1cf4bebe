"""Precision policy: one place says how precisely Gram matrices are contracted.

Kernels are differences of large numbers as soon as somebody inverts them: TF32 or bfloat16 products
(the default of accelerators) leave Gram matrices that are not positive semidefinite. So every
contraction that makes a kernel runs at the highest precision unless the caller says otherwise.
"""

from __future__ import annotations

from typing import TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import lax

PrecisionLike: TypeAlias = lax.Precision | str | None

DEFAULT = lax.Precision.HIGHEST


def resolve(precision: PrecisionLike) -> lax.Precision:
    """Turn `None` (the policy), a name ('highest', 'high', 'default') or an enum into the enum."""
    if precision is None:
        return DEFAULT
    if isinstance(precision, lax.Precision):
        return precision
    try:
        return lax.Precision(precision)
    except ValueError:
        names = "'highest', 'high' or 'default'"
        raise ValueError(
            f"precision={precision!r} is not known: pass None (highest), {names}."
        ) from None


def accumulator(dtype) -> np.dtype:
    """The dtype in which products of `dtype` are summed: at least float32."""
    return np.dtype(np.float32) if jnp.finfo(dtype).bits < 32 else np.dtype(dtype)
