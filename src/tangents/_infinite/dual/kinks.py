"""Kinks of a function: which of their jumps are taken out of its series, and their closed forms.

Products of ramps (x - b)_+ and of steps come from `orthant.py`, for b = c = 0 from `arc_cosine.py`.
At 0 jumps of the second derivative are taken out as well, and of the third where the slope jumps:

    E[u_+ v_+^3] = 3 var2 (E[u_+ v_+] - s sin(theta)^3 / 6 pi),   s = sqrt(var1 var2),
    E[1(u > 0) v_+^2] = var2 (P(u, v > 0) + sin(theta) cos(theta) / 2 pi).

Where the second derivative jumps elsewhere, all its jumps and those of the first may be taken out
together, with all of their products (`Together`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tangents._core.typing import Array
from tangents._infinite.dual import arc_cosine
from tangents._infinite.dual.angle import norm, reciprocal, safe_sqrt, sine_squared
from tangents._infinite.dual.orthant import (
    density,
    moments,
    ramps_and_steps,
    upper_tail,
)


class Kink(NamedTuple):
    """Jumps of phi, phi', ... at a place; each may be a tracer, and a float 0 is no jump."""

    place: float
    jumps: tuple[Any, Any, Any, Any]


class Together(tuple[Kink, ...]):
    """Kinks whose jumps of the second derivative are taken out with those of the first.

    Ramps squared grow like variances, and cancel in the sum: of float32 little is left for
    deviations above four times the nearest place.
    """


def curved(kinks: Sequence[Kink]) -> bool:
    """Does the second derivative jump away from 0?"""
    return any(k.place != 0.0 and not is_none(k.jumps[2]) for k in kinks)


def is_none(jump: Any) -> bool:
    """Is it known beforehand that there is no jump?"""
    return isinstance(jump, float) and jump == 0.0


def third_at_zero(kinks: Sequence[Kink]) -> Any:
    """The jump of the third derivative at 0, where phi' jumps there and nowhere else; else None.

    Coefficients of the first and third jump are of one parity, so they meet in the series, and
    their products fall but by one power of n faster than those of the first jump alone.
    """
    bends = [k for k in kinks if not is_none(k.jumps[1])]
    if len(bends) != 1 or bends[0].place != 0.0 or is_none(bends[0].jumps[3]):
        return None
    if isinstance(kinks, Together):
        return None
    return bends[0].jumps[3]


def turn_of(kinks: Sequence[Kink], kink: Kink) -> int:
    """Is a ramp taken from its place upwards, or -1: downwards?

    Outwards there is little of it: of small deviations nothing that cancels. Squared in a series it
    cancels at large ones, and less so if all go upwards.
    """
    outwards = is_none(kink.jumps[2]) or isinstance(kinks, Together)
    return -1 if kink.place < 0 and outwards else 1


# ---- closed forms --------------------------------------------------------------------------------


def clip(rho: Array) -> Array:
    """Into [-1, 1] against rounding; the derivative stays."""
    return rho + jax.lax.stop_gradient(jnp.clip(rho, -1, 1) - rho)


def closed_part(kinks: Sequence[Kink], cov12, var1, var2, side1, side2, gap12) -> tuple[Any, Any]:
    """Expectations of the products of all ramps (for phi) and of all steps (for phi')."""
    value, slope = jnp.zeros_like(cov12), jnp.zeros_like(cov12)
    pair = (cov12, var1, var2) if gap12 is None else (cov12, var1, var2, gap12)
    s = norm(side1, side2)
    rho = clip(cov12 * reciprocal(s))
    sine = safe_sqrt(sine_squared(*pair))
    tiny = float(np.sqrt(jnp.finfo(cov12.dtype).tiny)) ** 0.5
    away1, away2 = (jnp.maximum(safe_sqrt(v), tiny) for v in (side1, side2))

    @functools.cache
    def products(turns: int, h: float, k: float) -> tuple[Array, Array]:
        """Of ramps of standard normal numbers from h and k on, and of their slopes."""
        ramps, steps = ramps_and_steps(turns * rho, sine, h / away1, k / away2)
        return ramps, turns * steps

    if isinstance(kinks, Together):
        return _arches(kinks, (rho, sine), (away1, away2), pair)
    bends = [(k.place, turn_of(kinks, k), k.jumps[1]) for k in kinks if not is_none(k.jumps[1])]
    for b, turn1, jump1 in bends:
        for c, turn2, jump2 in bends:
            if b == c == 0.0:
                ramps, steps = (arc_cosine._half_moment(m, pair) for m in (1, 0))
            else:
                ramps, steps = products(turn1 * turn2, turn1 * b, turn2 * c)
                ramps = away1 * away2 * ramps
            value, slope = value + jump1 * jump2 * ramps, slope + jump1 * jump2 * steps
    third = third_at_zero(kinks)
    if third is not None:
        both, own = bends[0][-1] * third / 2 * (var1 + var2), third * third
        ramps, steps = (arc_cosine._half_moment(m, pair) for m in (1, 0))
        value = value + both * (ramps - s * sine**3 / (6 * math.pi))
        value = value + own / 36 * arc_cosine._half_moment(3, pair)
        slope = slope + both * (steps + sine * rho / (2 * math.pi))
        slope = slope + own / 4 * arc_cosine._half_moment(2, pair)
    for place, (_, _, curve, _) in kinks:
        if place == 0.0 and not is_none(curve):
            square = curve * curve
            value = value + square / 4 * arc_cosine._half_moment(2, pair)
            slope = slope + square * arc_cosine._half_moment(1, pair)
    return value, slope


def _arches(kinks: Sequence[Kink], legs, sds, pair) -> tuple[Any, Any]:
    """As `closed_part`, of jumps of the first and of the second derivative together.

    legs: cosine and sine. sds: of both sides. pair: of arc-cosine kernels.
    """
    sd1, sd2 = sds
    value, slope = jnp.zeros_like(legs[0]), jnp.zeros_like(legs[0])
    both = [
        (k.place, turn_of(kinks, k), *k.jumps[1:3])
        for k in kinks
        if not (is_none(k.jumps[1]) and is_none(k.jumps[2]))
    ]
    for b, turn1, bend1, curve1 in both:
        for c, turn2, bend2, curve2 in both:
            here = turn1 * turn2 * legs[0], legs[1]
            h, k = (abs(p) / sd + 0 * legs[0] for p, sd in ((b, sd1), (c, sd2)))
            if b == c == 0.0:
                ramps, steps = (arc_cosine._half_moment(m, pair) for m in (1, 0))
                m = moments((ramps / (sd1 * sd2), steps), *here, h, k)
            else:
                m = moments(ramps_and_steps(*here, h, k), *here, h, k)
            # phi is bend ramp + turn curve ramp^2 / 2, phi' turn bend step + curve ramp.
            bends, arches = bend1 * bend2, curve1 * curve2 * (sd1 * sd2)
            one, two = turn1 * curve1 * bend2 * sd1, turn2 * bend1 * curve2 * sd2
            turns = turn1 * turn2
            of_value = bends * m.m11 + turns * arches / 4 * m.m22 + (one * m.m21 + two * m.m12) / 2
            value = value + sd1 * sd2 * of_value
            slope = slope + turns * (bends * m.m00 + one * m.m10 + two * m.m01) + arches * m.m11
    return value, slope


def line_part(line: tuple[float, float], kinks: Sequence[Kink], cov12, side1, side2):
    """What a line, constant + linear x, adds to the expectations: its squares, and with ramps."""
    constant, linear = line
    tiny = float(np.sqrt(jnp.finfo(cov12.dtype).tiny)) ** 0.5
    value, slope = constant**2 + linear**2 * cov12, jnp.full_like(cov12, linear**2)
    for kink in kinks:
        turn, bend = turn_of(kinks, kink), kink.jumps[1]
        away = turn * kink.place
        for side in (side1, side2):
            sd = jnp.maximum(safe_sqrt(side), tiny)
            tail = upper_tail(away / sd)
            ramp = sd * density(away / sd) - away * tail  # E[(turn x - away)_+]
            value = value + bend * (constant * ramp + turn * linear * cov12 * tail)
            slope = slope + turn * bend * linear * tail
    return value, slope
