"""Preconditioned conjugate gradients with a block of right-hand sides.

Every column has its own step sizes; one product with the operator serves all columns. Eagerly the
iteration is driven from Python, because a convolution's weight gradient inside a `lax` loop is some
thirty times slower on CPUs than outside; under `jit` it is a `lax.while_loop`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tangents._core.typing import Array

Apply = Callable[[Array], Array]


class State(NamedTuple):
    """Iterates (n, c) and sizes (c,) of conjugate gradients."""

    x: Array
    residual: Array
    direction: Array
    gamma: Array
    curvature: Array
    sizes: Array


def begin(y: Array, inverse: Apply) -> State:
    """The state at x = 0."""
    z = inverse(y)
    gamma = jnp.sum(y * z, axis=0)
    return State(jnp.zeros_like(y), y, z, gamma, jnp.ones_like(gamma), jnp.linalg.norm(y, axis=0))


@jax.jit
def descend(state: State, image: Array) -> tuple[State, Array]:
    """Half a step: along the direction, given its image; the step sizes come out beside it."""
    curvature = jnp.sum(state.direction * image, axis=0)
    # A column that has converged to zero has no direction left: it stays where it is.
    step = jnp.where(curvature > 0, state.gamma / jnp.where(curvature > 0, curvature, 1), 0)
    norm = jnp.sum(state.direction**2, axis=0)
    rayleigh = curvature / jnp.where(norm > 0, norm, 1)
    rayleigh = jnp.where(norm > 0, rayleigh, 1)
    x = state.x + step * state.direction
    residual = state.residual - step * image
    sizes = jnp.linalg.norm(residual, axis=0)
    return State(x, residual, state.direction, state.gamma, rayleigh, sizes), step


@jax.jit
def turn(state: State, z: Array) -> tuple[State, Array]:
    """The other half: the next direction, conjugate to the last."""
    gamma = jnp.sum(state.residual * z, axis=0)
    ratio = jnp.where(state.gamma > 0, gamma / jnp.where(state.gamma > 0, state.gamma, 1), 0)
    direction = z + ratio * state.direction
    return state._replace(direction=direction, gamma=gamma), ratio


class Outcome(NamedTuple):
    """Result of a run of conjugate gradients."""

    x: Array
    iterations: Any
    indefinite: Any
    rayleigh: Any
    condition: Any


def run_eagerly(
    apply: Apply,
    y: Array,
    inverse: Apply,
    target: np.ndarray,
    max_iterations: int,
    progress: Callable[[int, float], None] | None,
    scale: np.ndarray,
    before: int = 0,
) -> Outcome:
    """Iterate until every column's residual is below `target` (c,)."""
    state = begin(y, inverse)
    steps, ratios = [], []
    iteration, indefinite = 0, False
    while iteration < max_iterations:
        state, step = descend(state, apply(state.direction))
        iteration += 1
        curvature = np.asarray(state.curvature)
        sizes = np.asarray(state.sizes)
        if (curvature <= 0).any() and (sizes > target)[curvature <= 0].any():
            indefinite = True
            break
        if progress is not None:
            progress(before + iteration, float(np.max(sizes / scale)))
        steps.append(float(step[0]))
        if (sizes <= target).all() or not np.isfinite(sizes).all():
            break
        state, ratio = turn(state, inverse(state.residual))
        ratios.append(float(ratio[0]))
    rayleigh = float(np.min(np.asarray(state.curvature)))
    return Outcome(state.x, iteration, indefinite, rayleigh, _lanczos_condition(steps, ratios))


def run_traced(
    apply: Apply, y: Array, inverse: Apply, target: Array, max_iterations: int
) -> Outcome:
    """The same iteration under `jit`."""

    def unfinished(carry) -> Array:
        state, iteration = carry
        running = state.sizes > target
        healthy = jnp.all((state.curvature > 0) | ~running) & jnp.all(jnp.isfinite(state.sizes))
        return jnp.any(running) & healthy & (iteration < max_iterations)

    def body(carry):
        state, iteration = carry
        state, _ = descend(state, apply(state.direction))
        state, _ = turn(state, inverse(state.residual))
        return state, iteration + 1

    state, iterations = lax.while_loop(
        unfinished, body, (begin(y, inverse), jnp.zeros((), jnp.int32))
    )
    indefinite = jnp.any((state.curvature <= 0) & (state.sizes > target))
    return Outcome(state.x, iterations, indefinite, jnp.min(state.curvature), jnp.nan)


def _lanczos_condition(steps: list[float], ratios: list[float]) -> float:
    """Condition number of the preconditioned system, from the tridiagonal matrix CG builds."""
    steps = [s for s in steps if s > 0]
    if not steps:
        return float("nan")
    ratios = ratios[: len(steps) - 1]
    diagonal = np.array([1 / s for s in steps])
    for i, ratio in enumerate(ratios):
        diagonal[i + 1] += ratio / steps[i]
    beside = np.sqrt(np.maximum(ratios, 0)) / np.array(steps[: len(ratios)])
    import scipy.linalg

    values = scipy.linalg.eigvalsh_tridiagonal(diagonal, beside)
    return float(values[-1] / values[0]) if values[0] > 0 else float("inf")
