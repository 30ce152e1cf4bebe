"""Kernels and targets as matrices: which axes of y a kernel keeps, and how results go back.

Targets y of shape (n, c, ...) index a function space of `y.size` numbers. A kernel over it has the
axes of y in pairs, (n, n', c, c', ...), except for the *trace axes*, over which it is a multiple of
the identity: Θ ⊗ I. So a kernel is a matrix over the kept axes, and y a matrix (kept, traced).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from tangents._core.axes import canonical
from tangents._core.typing import Array, Axes


def is_concrete(*trees: Any) -> bool:
    """Whether no leaf is a tracer, so that values can be looked at, cached and raised about."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


def as_matrix_argument(kernel: Any, *, caller: str, argument: str) -> Array:
    """An array given as a kernel matrix, or an error that says which part of a `Kernel` to pass."""
    if hasattr(kernel, "nngp") or hasattr(kernel, "ntk"):
        fields = " or ".join(
            f"{argument}.{name}"
            for name in ("ntk", "nngp")
            if getattr(kernel, name, None) is not None
        )
        raise TypeError(
            f"{caller}: {argument} is a {type(kernel).__name__} object, but one matrix is needed: "
            f"pass {fields}."
        )
    if hasattr(kernel, "materialise"):
        raise TypeError(
            f"{caller}: {argument} is a linear operator of shape {kernel.shape}, but a dense "
            f"matrix "
            "is needed: pass the kernel function's result, or use `tangents.solve` on the operator."
        )
    if not isinstance(kernel, jax.Array | np.ndarray):
        raise TypeError(
            f"{caller}: {argument} is a {type(kernel).__name__}; pass an array such as "
            "kernel_fn(x_train, None, 'ntk')."
        )
    return jnp.asarray(kernel)


def floating(*arrays: Any) -> jnp.dtype:
    """The floating-point dtype that all of these promote to."""
    dtypes = [jnp.result_type(a) for a in arrays if a is not None and not isinstance(a, float)]
    wide = dtypes[0]
    for dtype in dtypes[1:]:
        wide = jnp.promote_types(wide, dtype)
    return wide if jnp.issubdtype(wide, jnp.floating) else jnp.promote_types(wide, jnp.float32)


@dataclass(frozen=True)
class Layout:
    """Targets of `shape` whose axes `trace` (sorted, non-negative) are missing from the kernel."""

    shape: tuple[int, ...]
    trace: tuple[int, ...]

    @classmethod
    def of(cls, y_shape: tuple[int, ...], trace_axes: Axes, *, caller: str) -> Layout:
        """Check `trace_axes` against the targets."""
        if not y_shape:
            raise ValueError(
                f"{caller}: y_train has shape (); targets need an example axis, e.g. shape (n, 1)."
            )
        try:
            trace = canonical(trace_axes, y_shape, caller=caller, argument="trace_axes")
        except ValueError as error:
            raise ValueError(str(error).replace("f(params, x1) has", "y_train has")) from None
        return cls(tuple(y_shape), trace)

    @property
    def kept(self) -> tuple[int, ...]:
        """Axes of y that the kernel has."""
        return tuple(a for a in range(len(self.shape)) if a not in self.trace)

    @property
    def size(self) -> int:
        """Number of targets: the normalisation of time."""
        return math.prod(self.shape)

    @property
    def kept_shape(self) -> tuple[int, ...]:
        """Shape of y without its trace axes."""
        return tuple(self.shape[a] for a in self.kept)

    @property
    def trace_shape(self) -> tuple[int, ...]:
        """Sizes of the trace axes."""
        return tuple(self.shape[a] for a in self.trace)

    @property
    def rows(self) -> int:
        """Rows of the kernel as a matrix."""
        return math.prod(self.kept_shape)

    def check_train(self, kernel: Array, *, caller: str, argument: str = "k_train_train") -> None:
        """Raise unless `kernel` has the pairs of the kept axes."""
        needed = tuple(d for size in self.kept_shape for d in (size, size))
        if kernel.shape == needed:
            return
        message = (
            f"{caller}: {argument} has shape {kernel.shape}, but y_train of shape {self.shape} "
            f"with "
            f"trace_axes={self.trace} needs {needed}"
        )
        if len(self.shape) == 1 and self.trace:
            n = self.shape[0]
            message += (
                f": the only axis of a 1-D y_train is the example axis, which cannot be traced. "
                f"Pass trace_axes=(), or y_train[:, None] of shape ({n}, 1)."
            )
        elif len(kernel.shape) == 2 * len(self.shape):
            message += ". A kernel with all axes of y_train in pairs goes with trace_axes=()."
        else:
            message += (
                " (axes of y_train in pairs, without the trace axes). Choose trace_axes so that "
                "they name the axes of y_train that the kernel does not have."
            )
        raise ValueError(message)

    def check_test(self, kernel: Array, *, caller: str, argument: str = "k_test_train") -> None:
        """Raise unless the second index of each pair of `kernel` runs over the training outputs."""
        if kernel.ndim == 2 * len(self.kept) and kernel.shape[1::2] == self.kept_shape:
            return
        needed = ", ".join(f"test_{i}, {size}" for i, size in enumerate(self.kept_shape))
        message = (
            f"{caller}: {argument} has shape {kernel.shape}, but y_train of shape {self.shape} "
            f"with "
            f"trace_axes={self.trace} needs ({needed}): test first, training second in each pair."
        )
        if kernel.ndim == 2 and kernel.shape[0] == self.kept_shape[0] != kernel.shape[1]:
            message += f" Is it transposed? Pass {argument}.T."
        raise ValueError(message)

    def targets(self, y: Array) -> Array:
        """From the shape of y to (rows, traced)."""
        y = jnp.broadcast_to(y, self.shape)
        last = tuple(range(-len(self.trace), 0))
        return jnp.moveaxis(y, self.trace, last).reshape(self.rows, -1)

    def restore(
        self, values: Array, kept_shape: tuple[int, ...], leading: tuple[int, ...]
    ) -> Array:
        """From (..., prod(kept_shape), traced) to leading + the axes in the order of y."""
        values = values.reshape(leading + kept_shape + self.trace_shape)
        axes = tuple(len(leading) + a for a in self.trace)
        last = tuple(range(-len(self.trace), 0))
        return jnp.moveaxis(values, last, axes)

    def output_shape(self, kept_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of outputs whose kept axes have `kept_shape`."""
        sizes = iter(kept_shape)
        return tuple(
            self.shape[a] if a in self.trace else next(sizes) for a in range(len(self.shape))
        )


def matrix(kernel: Array) -> Array:
    """A kernel with its axes in pairs, (a, a', b, b', ...), as the matrix (a·b·..., a'·b'·...)."""
    if kernel.ndim == 2:
        return kernel
    first, second = tuple(range(0, kernel.ndim, 2)), tuple(range(1, kernel.ndim, 2))
    rows = math.prod(kernel.shape[a] for a in first)
    return kernel.transpose(first + second).reshape(rows, -1)


def from_matrix(
    values: Array, first: tuple[int, ...], second: tuple[int, ...], leading: tuple[int, ...] = ()
) -> Array:
    """The inverse of `matrix`, with leading axes."""
    values = values.reshape(leading + first + second)
    n, m = len(leading), len(first)
    order = tuple(range(n)) + tuple(n + i for pair in zip(range(m), range(m, 2 * m)) for i in pair)
    return values.transpose(order)


def regularise(k: Array, diag_reg: Any, absolute: bool) -> Array:
    """K + r I, where r is `diag_reg`, or `diag_reg` times the mean of the diagonal."""
    if isinstance(diag_reg, int | float) and diag_reg == 0:
        return k
    return _shifted(k, jnp.asarray(diag_reg, k.dtype), absolute)


@functools.partial(jax.jit, static_argnums=2)
def _shifted(k: Array, diag_reg: Array, absolute: bool) -> Array:
    scale = diag_reg if absolute else diag_reg * jnp.mean(jnp.diagonal(k))
    return jnp.where(jnp.eye(k.shape[0], dtype=bool), k + scale, k)
