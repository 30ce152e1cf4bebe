"""Where a function of one number is not smooth, found by looking at it.

A kink is where the slope jumps: on a fine grid the change of the slope over one cell falls with the
width of the cell where the function is smooth, and does not where it has a kink. Cells in which it
changes noticeably are halved until they are a rounding wide.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tangents._core.typing import Array

_REACH = 16.0
_CELLS = 4096  # of width 1/128
_NOTICEABLE = 1e-3


class Breakpoint(NamedTuple):
    """jumps[m]: jump of the m-th derivative at `place`, for m = 0 to 3."""

    place: float
    jumps: tuple[float, float, float, float]


def _derivatives(fn: Callable[[Array], Array]) -> Callable[[Any], tuple[Array, ...]]:
    """The function and its first three derivatives."""

    def with_next(fns: Callable[[Array], tuple[Array, ...]]) -> Callable[[Array], Any]:
        def more(x):
            values, slopes = jax.jvp(fns, (x,), (jnp.ones_like(x),))
            return (*values, slopes[-1])

        return more

    return jax.jit(with_next(with_next(with_next(lambda x: (fn(x),)))))


def _narrow(look, low: np.ndarray, high: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Halve cells, keeping the half in which the derivative of that order changes more."""
    for _ in range(80):
        middle = (low + high) / 2
        if np.all((middle == low) | (middle == high)):
            break
        values = [np.asarray(look(x)[order], np.float64) for x in (low, middle, high)]
        left = np.abs(values[1] - values[0]) > np.abs(values[2] - values[1])
        low, high = np.where(left, low, middle), np.where(left, middle, high)
    return low, high


def _nice(low: float, high: float) -> float:
    """The number with the fewest digits in the cell or within its width: kinks are at such."""
    width = 4 * max(high - low, np.finfo(np.float64).eps * max(abs(low), abs(high)))
    for digits in range(8):
        candidate = round(low, digits)
        if low - width <= candidate <= high + width:
            return candidate + 0.0
    return high


def breakpoints(fn: Callable[[Array], Array]) -> tuple[Breakpoint, ...]:
    """Jumps of fn, fn' and fn'' between -16 and 16.

    Found are jumps of more than a thousandth of the largest value on the grid; a function with
    more than 16 of them has none listed (it is treated as rough).
    """
    # In double precision whatever the first kernel is computed in; it may be found for others.
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        dtype = jax.eval_shape(fn, jax.ShapeDtypeStruct((), jnp.float64)).dtype
        look = _derivatives(fn)
        grid = np.linspace(-_REACH, _REACH, _CELLS + 1).astype(dtype)
        # Off the round numbers, so that a kink is inside a cell and not at its end.
        grid = grid + np.asarray((grid[1] - grid[0]) * 0.381966, dtype)
        values = [np.asarray(v, np.float64) for v in look(grid)]
        near = np.abs(grid) < 4
        places: list[float] = []
        for order in (0, 1, 2):
            value = values[order]
            scale = np.max(np.abs(value[near])) + np.finfo(np.float64).tiny
            change = np.abs(np.diff(value))
            cells = np.flatnonzero(change > _NOTICEABLE * scale)
            if not len(cells) or not np.all(np.isfinite(value)):
                continue
            low, high = _narrow(look, grid[cells], grid[cells + 1], order)
            ends = [np.asarray(look(x)[order], np.float64) for x in (low, high)]
            # A quarter: at the kink itself JAX may give the mean of both slopes.
            jump = np.abs(ends[1] - ends[0]) > np.maximum(change[cells], _NOTICEABLE * scale) / 4
            places += [
                _nice(float(a), float(b)) for a, b in zip(low[jump], high[jump], strict=True)
            ]
        found = sorted(set(places))
        if len(found) > 16:
            return ()
        return tuple(Breakpoint(b, _jumps(look, b, dtype)) for b in found)


def _jumps(look, place: float, dtype) -> tuple[float, float, float, float]:
    """Differences of one-sided derivatives; those of smooth ones are rounding, and count as 0."""
    step = float(np.finfo(dtype).eps) * 8 * max(1.0, abs(place))
    left, right = (
        [float(v[0]) for v in look(np.asarray([place + side * step], dtype))] for side in (-1, 1)
    )
    out = []
    for a, b in zip(left, right, strict=True):
        small = 1e-3 if dtype == np.float32 else 1e-6
        out.append(_rounded(b - a) if abs(b - a) > small * max(1.0, abs(a), abs(b)) else 0.0)
    return out[0], out[1], out[2], out[3]


def _rounded(jump: float) -> float:
    """Without the rounding of the step to either side, where the jump is a short number."""
    short = round(jump, 6)
    return short if abs(short - jump) < 1e-9 * max(1.0, abs(jump)) else jump
