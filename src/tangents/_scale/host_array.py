"""Arrays on the host that become JAX arrays where they lie."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array without values, at an address that JAX takes over without a copy."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


def taken_over(array: np.ndarray) -> jax.Array:
    """`array` as a JAX array in the memory of the host; nobody may write to it any more."""
    device = jax.local_devices(backend="cpu")[0]
    return jax.device_put(array, device, may_alias=True)
