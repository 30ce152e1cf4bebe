"""The axis of the examples followed through a jaxpr, from the inputs to the outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.extend import core as jex

from tangents._finite.independence import rules
from tangents._finite.independence.state import (
    Along,
    Lost,
    Shared,
    State,
    mixed,
    unknown,
    worst,
)
from tangents._finite.structure.graph import loop_sizes

BODIES = ("jaxpr", "call_jaxpr", "fun_jaxpr")
CALLS = {
    "jit", "pjit", "closed_call", "core_call", "remat2", "remat", "checkpoint", "custom_jvp_call",
    "custom_vjp_call", "custom_vjp_call_jaxpr",
}  # fmt: skip
"""Primitives whose body has their own inputs and outputs."""


@dataclass(frozen=True)
class Finding:
    """What a walk found out."""

    independent: bool
    reason: str = ""
    """Why not, or why that is not known."""
    mixes: bool = False
    """Examples surely interact."""


def examine(
    closed: Any,
    axes: Sequence[int],
    out_axes: Sequence[int],
    resized: tuple[Any, int, int] | None = None,
    single: Any = None,
) -> Finding:
    """Whether output entry i depends on example i alone.

    Args:
        closed: jaxpr of the network on a batch.
        axes: of each input the axis of the examples, −1 for inputs that all examples share.
        out_axes: of each output the axis of the examples.
        resized: jaxpr of the network on a batch of another size, the size of the batch, and the
            other size. If it is given, it must be the same program: a network that divides by the
            size of its batch gives other numbers on a batch of one.
        single: jaxpr on a batch of one, likewise; what only shapes arrays may be left out of it.
    """
    states: list[State] = [Shared() if a < 0 else Along(a) for a in axes]
    outputs = _walk(closed, states)
    jaxpr = getattr(closed, "jaxpr", closed)
    for atom, state, axis in zip(jaxpr.outvars, outputs, out_axes, strict=True):
        if isinstance(state, Lost):
            return Finding(False, state.reason, state.mixes)
        if isinstance(state, Along) and state.axis != axis:
            reason = f"the examples lie along axis {state.axis} of the output, not along {axis}"
            return Finding(False, reason, True)
        shape: tuple[int, ...] = getattr(atom.aval, "shape", ())
        if isinstance(state, Shared) and not state.is_uniform(axis) and shape[axis] > 1:
            return Finding(False, "an output does not depend on the examples", False)
    if resized is not None and not _same_program(closed, resized[0], _Sizes(*resized[1:])):
        return Finding(False, "on a batch of another size the network is another program", False)
    if resized is not None and single is not None:
        sizes = _Sizes(resized[1], 1, every_step=False)
        if not _same_program(closed, single, sizes):
            return Finding(False, "on a batch of one the network is another program", False)
    return Finding(True)


def _walk(closed: Any, inputs: Sequence[State]) -> list[State]:
    jaxpr = getattr(closed, "jaxpr", closed)
    known: dict[Any, State] = dict(zip(jaxpr.invars, inputs, strict=True))
    known |= dict.fromkeys(jaxpr.constvars, Shared())

    def read(atom: Any) -> State:
        if isinstance(atom, jex.Literal):
            return Shared() if np.ndim(atom.val) else Shared(None)
        return known[atom]

    for eqn in jaxpr.eqns:
        states = [read(atom) for atom in eqn.invars]
        known.update(zip(eqn.outvars, _step(eqn, states), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _step(eqn: Any, states: list[State]) -> list[State]:
    name, count = eqn.primitive.name, len(eqn.outvars)
    if lost := worst(states):
        return [lost] * count
    if name == "scan":
        return _scan(eqn, states)
    if name == "while":
        return _while(eqn, states)
    if name == "cond":
        return _cond(eqn, states)
    body = next((eqn.params[k] for k in BODIES if k in eqn.params), None)
    if name in CALLS and body is not None:
        inner = getattr(body, "jaxpr", body)
        if len(inner.invars) == len(states):
            return _walk(body, states)
    if not any(isinstance(s, Along) for s in states):
        return [_shared(eqn, states)] * count
    rule = rules.RULES.get(name)
    return [unknown(name)] * count if rule is None else rule(eqn, states)


def _shared(eqn: Any, states: Sequence[State]) -> Shared:
    """Along which axes something that depends on no example is constant."""
    name, shape = eqn.primitive.name, tuple(eqn.outvars[0].aval.shape)
    if name == "broadcast_in_dim":
        (operand, *_), dimensions = eqn.invars, eqn.params["broadcast_dimensions"]
        fixed = {d for k, d in enumerate(dimensions) if operand.aval.shape[k] != 1}
        return Shared(frozenset(range(len(shape))) - fixed)
    if name == "iota":
        return Shared(frozenset(range(len(shape))) - {eqn.params["dimension"]})
    if name in rules.ELEMENTWISE:
        uniform = frozenset(range(len(shape)))
        for atom, state in zip(eqn.invars, states, strict=True):
            assert isinstance(state, Shared)
            if atom.aval.shape and state.uniform is not None:
                uniform &= state.uniform
        return Shared(uniform)
    rule = rules.RULES.get(name)
    return Shared() if rule is None else Shared(_still_uniform(eqn, states, rule))


def _still_uniform(eqn: Any, states: Sequence[State], rule: rules.Rule) -> frozenset[int]:
    """Axes of the outputs along which all entries are equal, since they are in an input.

    The rule of a step says of examples along an axis where each of them goes, and goes alone: if
    all are equal, so is what they become.
    """
    found: list[set[int]] = [set() for _ in eqn.outvars]
    for k, (atom, state) in enumerate(zip(eqn.invars, states, strict=True)):
        assert isinstance(state, Shared)
        for axis in range(len(atom.aval.shape)) if state.uniform is None else state.uniform:
            after = rule(eqn, [*states[:k], Along(axis), *states[k + 1 :]])
            for axes, one in zip(found, after, strict=True):
                if isinstance(one, Along):
                    axes.add(one.axis)
    return frozenset(set.intersection(*found))


def _joined(one: State, other: State) -> State:
    """What holds of a value that may be either; `one` and `other` have one shape."""
    if lost := worst([one, other]):
        return lost
    if one == other:
        return one
    if isinstance(one, Shared) and isinstance(other, Shared):
        if one.uniform is None or other.uniform is None:
            return other if one.uniform is None else one
        return Shared(one.uniform & other.uniform)
    if isinstance(one, Along) and isinstance(other, Along):
        return unknown("a loop or branch", "moves the axis of the examples")
    along, shared = (one, other) if isinstance(one, Along) else (other, one)
    assert isinstance(along, Along) and isinstance(shared, Shared)
    if shared.is_uniform(along.axis):
        return along
    return unknown("a loop or branch", "starts from an array that differs from example to example")


def _scan(eqn: Any, states: list[State]) -> list[State]:
    constants, carried = loop_sizes(eqn, len(states))
    fixed, carry = states[:constants], states[constants : constants + carried]
    slices: list[State] = []
    for state in states[constants + carried :]:
        if isinstance(state, Along):
            if state.axis == 0:
                return [mixed("scan", 0)] * len(eqn.outvars)
            slices.append(Along(state.axis - 1))
        else:
            assert isinstance(state, Shared)
            inner = state.uniform and frozenset(a - 1 for a in state.uniform if a > 0)
            slices.append(Shared(inner))
    outputs: list[State] = []
    for _ in range(len(carry) + 2):
        outputs = _walk(eqn.params["jaxpr"], [*fixed, *carry, *slices])
        after = [_joined(a, b) for a, b in zip(carry, outputs[:carried], strict=True)]
        if after == carry:
            break
        carry = after
    stacked: list[State] = []
    for state in outputs[carried:]:
        if isinstance(state, Along):
            state = Along(state.axis + 1)
        elif isinstance(state, Shared):
            state = Shared(frozenset(a + 1 for a in state.uniform or ()))
        stacked.append(state)
    return [*carry, *stacked]


def _while(eqn: Any, states: list[State]) -> list[State]:
    first, second = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    tests, fixed, carry = states[:first], states[first : first + second], states[first + second :]
    for _ in range(len(carry) + 2):
        (test,) = _walk(eqn.params["cond_jaxpr"], [*tests, *carry])
        if not isinstance(test, Shared):
            lost = test if isinstance(test, Lost) else unknown("while")
            return [lost] * len(carry)
        outputs = _walk(eqn.params["body_jaxpr"], [*fixed, *carry])
        after = [_joined(a, b) for a, b in zip(carry, outputs, strict=True)]
        if after == carry:
            break
        carry = after
    return carry


def _cond(eqn: Any, states: list[State]) -> list[State]:
    index, *operands = states
    if not isinstance(index, Shared):
        return [unknown("cond", "is decided by the examples")] * len(eqn.outvars)
    first, *others = (_walk(branch, operands) for branch in eqn.params["branches"])
    for other in others:
        first = [_joined(a, b) for a, b in zip(first, other, strict=True)]
    return first


# The program on a batch of another size.

SIZES = {"new_sizes", "shape", "limit_indices", "slice_sizes", "sizes"}
"""Parameters of equations that may hold the number of examples."""
SHAPING = {"broadcast_in_dim", "reshape", "squeeze", "expand_dims"}
"""Steps that give an array another shape."""


@dataclass(frozen=True)
class _Sizes:
    """The number of examples in one trace and in the other."""

    one: int
    other: int
    every_step: bool = True
    """Whether steps that only shape arrays count: those of size one need fewer of them."""

    def counts(self, equation: Any) -> bool:
        """Whether an equation has to be in both."""
        constant = any(isinstance(atom, jex.Literal) for atom in equation.invars)
        return self.every_step or constant or equation.primitive.name not in SHAPING

    def agree(self, a: Any, b: Any) -> bool:
        """Whether sizes differ in nothing but the number of examples."""
        if isinstance(a, tuple | list):
            return len(a) == len(b) and all(self.agree(x, y) for x, y in zip(a, b, strict=True))
        return a == b or (a == self.one and b == self.other)


def _same_program(batch: Any, resized: Any, sizes: _Sizes) -> bool:
    one, other = getattr(batch, "jaxpr", batch), getattr(resized, "jaxpr", resized)
    consts = [getattr(closed, "consts", ()) for closed in (batch, resized)]
    steps = [[eqn for eqn in jaxpr.eqns if sizes.counts(eqn)] for jaxpr in (one, other)]
    if len(steps[0]) != len(steps[1]) or len(consts[0]) != len(consts[1]):
        return False
    return all(_same_value(a, b) for a, b in zip(*consts, strict=True)) and all(
        _same_equation(a, b, sizes) for a, b in zip(*steps, strict=True)
    )


def _same_equation(one: Any, other: Any, sizes: _Sizes) -> bool:
    if one.primitive is not other.primitive or len(one.invars) != len(other.invars):
        return False
    for a, b in zip((*one.invars, *one.outvars), (*other.invars, *other.outvars), strict=True):
        if isinstance(a, jex.Literal) != isinstance(b, jex.Literal):
            return False
        if isinstance(a, jex.Literal) and not _same_value(a.val, b.val):
            return False
        if not sizes.agree(getattr(a.aval, "shape", ()), getattr(b.aval, "shape", ())):
            return False
    bodies = [list(jex.jaxprs_in_params(e.params)) for e in (one, other)]
    if len(bodies[0]) != len(bodies[1]):
        return False
    if not all(_same_program(a, b, sizes) for a, b in zip(*bodies, strict=True)):
        return False
    for key, value in one.params.items():
        if _is_plain(value):
            agree = sizes.agree if key in SIZES else lambda a, b: a == b
            if not agree(value, other.params.get(key)):
                return False
    return True


def _is_plain(value: Any) -> bool:
    """Numbers, names and what is made of them: these say the same in every trace."""
    if isinstance(value, tuple | list):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, bool | int | float | complex | str)


def _same_value(one: Any, other: Any) -> bool:
    if one is other:
        return True
    try:
        a, b = np.asarray(one), np.asarray(other)
        return a.shape == b.shape and a.dtype == b.dtype and bool(np.all((a == b) | (a != a)))
    except Exception:  # keys, tracers: not comparable
        return False
