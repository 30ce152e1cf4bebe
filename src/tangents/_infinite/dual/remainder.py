"""What a function is without its kinks: a polynomial of low degree, or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Kinks = Sequence[tuple[float, Sequence[float]]]  # (place, jumps of fn, fn', fn'' and fn''')

ROUNDING = 1e-12  # of the largest value of a function
_FAR = 1e5  # where lines are looked at, in units of where kinks are


def polynomial(
    fn: Callable[[Any], Any], kinks: Kinks, tolerance: float, degree: int
) -> tuple[float, ...] | None:
    """Its coefficients, lowest first; None: it is no polynomial of this degree.

    Ramps of kinks, and their squares, are taken outwards of 0.

    Args:
      kinks: some.
      tolerance: of the largest value.
    """
    near = 4 * max(1.0, *(abs(place) for place, _ in kinks))
    far = np.geomspace(near, _FAR * near, 64)
    x = np.concatenate([np.linspace(-near, near, 4097), far, -far])
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        y = np.asarray(jax.jit(fn)(jnp.asarray(x)), np.float64)
    if not np.all(np.isfinite(y)):
        return None
    ramps = [(_ramp(x, place), place, jumps) for place, jumps in kinks]
    parts = [jumps[1] * ramp for ramp, _, jumps in ramps]
    # A ramp inwards differs by a line, and with another sign its square by a polynomial.
    parts += [(-1 if place < 0 else 1) * jumps[2] / 2 * r**2 for r, place, jumps in ramps]
    rest = y - sum(parts)
    found = np.polynomial.polynomial.polyfit(x[:4097], rest[:4097], degree)
    error = np.abs(rest - np.polynomial.polynomial.polyval(x, found))
    size = float(np.max(np.abs(y[:4097])))
    sizes = np.max(np.abs(np.stack([y, *parts])), 0) if degree > 1 else np.abs(y)
    if np.any(error > tolerance * np.maximum(size, sizes)):
        return None
    return tuple(float(c) if abs(c) > ROUNDING * size else 0.0 for c in found)


def _ramp(x: np.ndarray, place: float) -> np.ndarray:
    """With a kink at `place`, outwards of 0."""
    return np.maximum(-x + place, 0) if place < 0 else np.maximum(x - place, 0)
