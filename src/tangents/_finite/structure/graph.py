"""A jaxpr as a flat list of steps: calls that mean nothing (`jit`, rematerialisation) are opened.

Only public JAX is used, and nothing that changed its name from 0.10 to 0.12 is relied upon.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax.core
from jax.extend import core as jex

from tangents._core.typing import Array

OPENED = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}
"""Calls whose body is walked as if written out, and the parameter that holds it."""
REMAT = {"remat2", "remat", "checkpoint"}


@dataclass(frozen=True)
class Ref:
    """A value of the graph."""

    number: int
    aval: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.aval.shape)

    @property
    def dtype(self) -> Any:
        return self.aval.dtype


@dataclass(frozen=True)
class Constant:
    """A literal of the jaxpr."""

    value: Any
    aval: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.aval.shape)

    @property
    def dtype(self) -> Any:
        return self.aval.dtype


Atom = Ref | Constant


@dataclass(frozen=True)
class Step:
    """One equation, with its inputs and outputs as values of the graph."""

    equation: Any
    inputs: tuple[Atom, ...]
    outputs: tuple[Ref, ...]

    @property
    def name(self) -> str:
        """Name of the primitive."""
        return self.equation.primitive.name

    @property
    def params(self) -> dict[str, Any]:
        """Parameters of the primitive."""
        return self.equation.params

    def evaluate(self, inputs: Sequence[Array]) -> list[Array]:
        """The outputs for these inputs; derivative rules of the equation stay its own."""
        jaxpr, taken = self._alone
        return jax.core.eval_jaxpr(jaxpr, [], *(inputs[i] for i in taken))

    @cached_property
    def _alone(self) -> tuple[Any, list[int]]:
        # A jaxpr of one equation: `bind` itself takes other arguments from version to version.
        equation = self.equation
        variables: dict[Any, int] = {}
        for index, atom in enumerate(equation.invars):
            if not isinstance(atom, jex.Literal):
                variables.setdefault(atom, index)
        about = jex.DebugInfo(self.name, "one equation", None, None)
        outputs = list(equation.outvars)
        jaxpr = jex.Jaxpr([], list(variables), outputs, [equation], equation.effects, about)
        return jaxpr, list(variables.values())


@dataclass
class Graph:
    """Steps in order; `constants` are values closed over."""

    inputs: list[Ref]
    outputs: list[Atom]
    steps: list[Step] = field(default_factory=list)
    constants: dict[int, Array] = field(default_factory=dict)


class Numbering:
    """Hands out the numbers of values; one for all graphs of a problem's side."""

    def __init__(self):
        """Start at zero."""
        self._next = 0

    def ref(self, aval: Any) -> Ref:
        """A new value."""
        self._next += 1
        return Ref(self._next, aval)


def flatten(closed: Any, numbering: Numbering) -> Graph:
    """The graph of a closed jaxpr."""
    jaxpr = getattr(closed, "jaxpr", closed)
    graph = Graph(inputs=[numbering.ref(v.aval) for v in jaxpr.invars], outputs=[])
    environment: dict[Any, Atom] = dict(zip(jaxpr.invars, graph.inputs, strict=True))
    graph.outputs = _walk(closed, environment, graph, numbering)
    return graph


def _walk(closed: Any, environment: dict[Any, Atom], graph: Graph, numbering: Numbering) -> list:
    jaxpr = getattr(closed, "jaxpr", closed)
    for variable, value in zip(jaxpr.constvars, getattr(closed, "consts", ()), strict=True):
        ref = numbering.ref(variable.aval)
        graph.constants[ref.number] = value
        environment[variable] = ref

    def read(atom: Any) -> Atom:
        if isinstance(atom, jex.Literal):
            return Constant(atom.val, atom.aval)
        return environment[atom]

    for equation in jaxpr.eqns:
        name = equation.primitive.name
        inputs = tuple(read(atom) for atom in equation.invars)
        body = equation.params.get(OPENED.get(name, "jaxpr")) if _is_opened(name) else None
        if body is not None:
            inner = getattr(body, "jaxpr", body)
            below = dict(zip(inner.invars, inputs, strict=True))
            outputs = _walk(body, below, graph, numbering)
            environment.update(zip(equation.outvars, outputs, strict=True))
            continue
        refs = tuple(numbering.ref(v.aval) for v in equation.outvars)
        environment.update(zip(equation.outvars, refs, strict=True))
        graph.steps.append(Step(equation, inputs, refs))
    return [read(atom) for atom in jaxpr.outvars]


def _is_opened(name: str) -> bool:
    # Rematerialisation saves memory of a gradient through parameters that is never taken here.
    return name in OPENED or name in REMAT


def loop_counts(step: Step) -> tuple[int, int]:
    """Numbers of constants and of carried values of a `scan`."""
    return loop_sizes(step, len(step.inputs))


def loop_sizes(equation: Any, inputs: int) -> tuple[int, int]:
    """The same of an equation with so many inputs."""
    if "num_consts" in equation.params:
        return equation.params["num_consts"], equation.params["num_carry"]
    groups = equation.params["ft_in"].update(range(inputs)).unpack()
    constants, carried, _ = (len(list(group)) for group in groups)
    return constants, carried
