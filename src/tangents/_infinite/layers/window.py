"""Windows over spatial axes: what convolutions and poolings read.

Along one axis, output position o reads the input positions o * stride + t - lo for t = 0 ... size-1
of the input after `dilation - 1` zeros were put between its entries (for transposed convolutions).
Outside the input it reads zeros, or wraps around (`CIRCULAR`).
"""

from __future__ import annotations

import enum
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tangents._infinite.barrier import keep_apart


class Padding(enum.Enum):
    """What a window reads beyond the edge: nothing there, zeros, or the other side (a torus)."""

    CIRCULAR = "CIRCULAR"
    SAME = "SAME"
    VALID = "VALID"


def as_padding(padding: Any) -> Padding:
    """A Padding of its upper-case name."""
    return Padding(padding)


class Window(NamedTuple):
    """The window along one axis; `wrap`: the input is a torus."""

    size: int
    stride: int
    lo: int
    hi: int
    wrap: bool = False
    dilation: int = 1

    def out_size(self, n: int) -> int:
        """Number of output positions for `n` input positions."""
        return max((self.extent(n) + self.lo + self.hi - self.size) // self.stride + 1, 0)

    def extent(self, n: int) -> int:
        """Number of positions after dilation; a torus has a gap after its last position too."""
        return n * self.dilation if self.wrap else max((n - 1) * self.dilation + 1, 0)


def windows(
    sizes: Sequence[int], filter_shape: Sequence[int], strides: Sequence[int], padding: Padding
) -> tuple[Window, ...]:
    """Windows of a convolution or pooling over axes of these sizes."""
    for k, n in zip(filter_shape, sizes, strict=True):
        if padding == Padding.VALID and 0 <= n < k:
            raise ValueError(
                f"a window of {tuple(filter_shape)} does not fit into {tuple(sizes)} positions "
                "with padding='VALID': take a smaller window, larger inputs or padding='SAME'"
            )
    kind = Padding.VALID if padding == Padding.VALID else Padding.SAME
    pads = lax.padtype_to_pads(tuple(sizes), tuple(filter_shape), tuple(strides), kind.name)
    wrap = padding == Padding.CIRCULAR
    return tuple(
        Window(k, s, lo, hi, wrap)
        for k, s, (lo, hi) in zip(filter_shape, strides, pads, strict=True)
    )


def transposed_windows(
    sizes: Sequence[int], filter_shape: Sequence[int], strides: Sequence[int], padding: Padding
) -> tuple[Window, ...]:
    """Windows of a transposed convolution (`jax.lax.conv_transpose`) on the dilated input."""
    out = []
    for k, s in zip(filter_shape, strides, strict=True):
        if padding == Padding.VALID:
            lo, total = k - 1, k + s - 2 + max(k - s, 0)
            out.append(Window(k, 1, lo, total - lo, False, s))
            continue
        total = k + s - 2
        lo = k - 1 if s > k - 1 else -(-total // 2)
        # On a torus nothing is lost at the far edge: n positions become n * stride.
        hi = k - 1 - lo if padding == Padding.CIRCULAR else total - lo
        out.append(Window(k, 1, lo, hi, padding == Padding.CIRCULAR, s))
    return tuple(out)


def _put(a: jax.Array, axis: int, lo: int, hi: int, interior: int, value: Any) -> jax.Array:
    config = [(0, 0, 0)] * a.ndim
    config[axis] = (lo, hi, interior)
    return lax.pad(a, jnp.asarray(value, a.dtype), config)


def extend(a: jax.Array, axis: int, w: Window, value: Any = 0) -> jax.Array:
    """Dilate and pad an axis so that the windows lie inside it."""
    if w.dilation > 1:
        high = w.dilation - 1 if w.wrap else 0
        a = _put(a, axis, 0, high, w.dilation - 1, value)
    if w.wrap:
        pads = [(0, 0)] * a.ndim
        pads[axis] = (max(w.lo, 0), max(w.hi, 0))
        return jnp.pad(a, pads, mode="wrap")
    return _put(a, axis, w.lo, w.hi, 0, value)


def extended(a: jax.Array, axis: int, w: Window) -> jax.Array:
    """`extend`, kept apart from what reads it.

    XLA on CPU (JAX 0.10.2) computes wrong numbers, by as much as a quarter, where a padding is
    fused into the slices of a window between two nonlinearities whose scale is an argument of the
    program (`test_windows_between_nonlinearities`).
    """
    return lax.optimization_barrier(extend(a, axis, w))


def extended_all(a: jax.Array, axes: Sequence[int], ws: Sequence[Window]) -> jax.Array:
    """`extend` along several axes, written once: a padding computed by its readers is slow."""
    before = a
    for axis, w in zip(axes, ws, strict=True):
        a = extend(a, axis, w)
    return a if a.shape == before.shape else keep_apart(a)


def taps(a: jax.Array, axis: int, w: Window) -> list[jax.Array]:
    """What each tap of the window reads at all output positions, from an extended axis."""
    n_out = (a.shape[axis] - w.size) // w.stride + 1
    last = (n_out - 1) * w.stride + 1
    return [
        lax.slice_in_dim(a, t, t + last, w.stride, axis) if n_out > 0 else a for t in range(w.size)
    ]


def window_sum(a: jax.Array, axes: Sequence[int], ws: Sequence[Window]) -> jax.Array:
    """Sum over the windows along the axes, one axis after another: shifts and adds."""
    for axis, w in zip(axes, ws, strict=True):
        a = sum(taps(extended(a, axis, w), axis, w))  # pyright: ignore[reportAssignmentType]
    return a


def window_sum_written(a: jax.Array, axes: Sequence[int], ws: Sequence[Window]) -> jax.Array:
    """`window_sum` of an array that is padded along all axes first: fewer kernels to compile."""
    a = extended_all(a, axes, ws)
    for axis, w in zip(axes, ws, strict=True):
        a = sum(taps(a, axis, w))  # pyright: ignore[reportAssignmentType]
    return a


def window_means(a: jax.Array, ws: Sequence[Window], weight: Any) -> jax.Array:
    """`weight` times means over the windows of `(n, *spatial)`, by the library.

    On CPU a library's convolution takes no time to compile, and a fusion some 30 ms.
    """
    sizes = tuple(w.size for w in ws)
    mean = jnp.full((*sizes, 1, 1), weight / math.prod(sizes), a.dtype)
    strides, padding = [w.stride for w in ws], [(w.lo, w.hi) for w in ws]
    letters = "HWD"[: len(ws)]
    means = lax.conv_general_dilated(
        a[..., None],
        mean,
        strides,
        padding,
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        precision=lax.Precision.HIGHEST,
    )
    return means[..., 0]


def window_sum_pairs(a: jax.Array, n_batch: int, ws: Sequence[Window]) -> jax.Array:
    """Sum along diagonals of `(pairs, H, H, W, W)`: both positions move through the window as one.

    sum_t K(o s + t, o' s + t), axis after axis.
    """
    for i, w in enumerate(ws):
        first, second = n_batch + 2 * i, n_batch + 2 * i + 1
        a = extended(extend(a, first, w), second, w)
        parts = zip(taps(a, first, w), range(w.size), strict=True)
        a = sum(taps(part, second, w)[t] for part, t in parts)  # pyright: ignore
    return a


def window_mask(mask: jax.Array, axes: Sequence[int], ws: Sequence[Window]) -> jax.Array:
    """Masks after a window: an output position is missing where the centre of its window is.

    So a mask stays what it is through layers that keep the shape, and missing positions are not
    filled in from their neighbours. In a dilated input most positions are not there: an output
    position is missing where all entries it reads are.
    """
    for axis, w in zip(axes, ws, strict=True):
        parts = taps(extend(mask, axis, w, value=True), axis, w)
        if w.dilation == 1:
            mask = parts[(w.size - 1) // 2]
            continue
        if w.wrap:
            # The gaps of a torus are not edges: they must count as missing, too.
            parts = taps(extend(~mask, axis, w, value=False), axis, w)
            parts = [~part for part in parts]
        mask = functools.reduce(operator.and_, parts)
    return mask


def along(axes: Sequence[int], fn: Callable[[int, int], int], shape: Sequence[int]) -> tuple:
    """`shape` with the sizes along `axes` changed by `fn(i, size)`; -1 stays."""
    out = list(shape)
    for i, axis in enumerate(axes):
        out[axis] = fn(i, out[axis])
    return tuple(out)
