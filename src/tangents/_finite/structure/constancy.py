"""Along which axes the results of a jaxpr are surely constant.

The cotangent of a layer in front of a mean over positions is the same at each of them: then
activations are summed before gradients are made of them. What is not known to be constant counts as
varying.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend import core as jex

from tangents._finite.independence.rules import ELEMENTWISE
from tangents._finite.independence.walk import CALLS

Axes = frozenset[int]
_ELEMENTWISE = frozenset(ELEMENTWISE)


def constant_axes(jaxpr: Any, inputs: Sequence[Axes] | None = None) -> list[Axes]:
    """Of each output; `inputs`: of each input (none, if not given)."""
    given = [frozenset()] * len(jaxpr.invars) if inputs is None else inputs
    known: dict[Any, Axes] = dict(zip(jaxpr.invars, given, strict=True))

    def of(atom: Any) -> Axes:
        return frozenset() if isinstance(atom, jex.Literal) else known.get(atom, frozenset())

    for eqn in jaxpr.eqns:
        found = _step(eqn, [of(atom) for atom in eqn.invars])
        known.update(zip(eqn.outvars, found, strict=True))
    return [of(atom) for atom in jaxpr.outvars]


def _step(eqn: Any, states: list[Axes]) -> list[Axes]:
    name = eqn.primitive.name
    shapes = [atom.aval.shape for atom in eqn.invars]
    if name in _ELEMENTWISE:
        ndim = len(eqn.outvars[0].aval.shape)
        each = [_spread(state, shape, ndim) for state, shape in zip(states, shapes, strict=True)]
        return [frozenset(range(ndim)).intersection(*each)]
    if name == "optimization_barrier":
        return states
    if name in _RULES:
        return [_RULES[name](eqn, states[0], shapes[0])]
    body = eqn.params.get("jaxpr")
    if name in CALLS and isinstance(body, jex.ClosedJaxpr):
        return constant_axes(body.jaxpr, states)
    if name == "dot_general":
        return [_dot_general(eqn, states, shapes)]
    return [frozenset()] * len(eqn.outvars)


def _spread(state: Axes, shape: tuple[int, ...], ndim: int) -> Axes:
    """Of an operand of a step entry by entry: scalars and axes of size one are repeated."""
    if not shape:
        return frozenset(range(ndim))
    return state | {k for k, n in enumerate(shape) if n == 1}


def _broadcast(eqn: Any, state: Axes, shape: tuple[int, ...]) -> Axes:
    places = eqn.params["broadcast_dimensions"]
    out = eqn.params["shape"]
    varies = {p for k, p in enumerate(places) if k not in state and shape[k] == out[p] != 1}
    return frozenset(range(len(out))) - varies


def _transpose(eqn: Any, state: Axes, shape: tuple[int, ...]) -> Axes:
    return frozenset(k for k, p in enumerate(eqn.params["permutation"]) if p in state)


def _reshape(eqn: Any, state: Axes, shape: tuple[int, ...]) -> Axes:
    """Axes of size one come and go; others are kept where the sizes before them say so."""
    if eqn.params.get("dimensions") is not None:
        return frozenset()
    out = eqn.outvars[0].aval.shape
    before = np.cumprod((1, *shape))[:-1].tolist()
    place = {(before[k], n): k for k, n in enumerate(shape) if n != 1}
    after = np.cumprod((1, *out))[:-1].tolist()
    same = {k for k, n in enumerate(out) if place.get((after[k], n)) in state}
    return frozenset(same | {k for k, n in enumerate(out) if n == 1})


def _squeeze(eqn: Any, state: Axes, shape: tuple[int, ...]) -> Axes:
    left = [k for k in range(len(shape)) if k not in eqn.params["dimensions"]]
    return frozenset(place for place, k in enumerate(left) if k in state)


def _reduce(eqn: Any, state: Axes, shape: tuple[int, ...]) -> Axes:
    left = [k for k in range(len(shape)) if k not in eqn.params["axes"]]
    return frozenset(place for place, k in enumerate(left) if k in state)


def _dot_general(eqn: Any, states: list[Axes], shapes: list[tuple[int, ...]]) -> Axes:
    contracted, batched = eqn.params["dimension_numbers"]
    axes = [one in states[0] and two in states[1] for one, two in zip(*batched, strict=True)]
    for state, shape, gone, batch in zip(states, shapes, contracted, batched, strict=True):
        axes += [k in state for k in range(len(shape)) if k not in gone and k not in batch]
    return frozenset(k for k, yes in enumerate(axes) if yes)


_RULES = {
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "reduce_sum": _reduce,
}
