"""Whether what is traced now may call LAPACK: JAX registers it with its own runtime only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_available: ContextVar[bool] = ContextVar("lapack", default=True)


@contextlib.contextmanager
def absent() -> Iterator[None]:
    """Trace for a runtime that has no LAPACK, such as TensorFlow's."""
    token = _available.set(False)
    try:
        yield
    finally:
        _available.reset(token)


def available() -> bool:
    """Whether `jnp.linalg` may be used."""
    return _available.get()
