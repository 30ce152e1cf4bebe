"""Which steps of a graph use which weight, and how: the plan that is then executed.

Values are of three kinds: constants, data (they depend on an input), and views of a *root* (a
weight, or a value computed from weights alone). A step that joins a view with data is a *use*;
where its rule has no factored form, the derivative in the whole operand is taken, which is always
right.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import jax.numpy as jnp

from tangents._finite.rules import RULES
from tangents._finite.rules.factored import Factored
from tangents._finite.rules.shape import VIEWS, scaling
from tangents._finite.structure.graph import (
    Atom,
    Constant,
    Graph,
    Numbering,
    Ref,
    Step,
    flatten,
    loop_counts,
)
from tangents._finite.structure.views import View


@dataclass(frozen=True)
class Data:
    """A value that depends on an input; `weighted` if on a weight too."""

    weighted: bool


Kind: TypeAlias = Data | View | None
"""None: a constant."""


@dataclass(frozen=True)
class Root:
    """A weight, or a value computed from weights alone by more than moving entries."""

    shape: tuple[int, ...]
    dtype: Any
    name: str
    weights: frozenset[int]
    """Indices of the weights it is computed from."""
    ref: Ref | None = None
    """The value, if it is computed."""


@dataclass(frozen=True)
class Probe:
    """A zero added to a value of the network: the derivative in it is the cotangent there."""

    shape: tuple[int, ...]
    """With the lengths of enclosing loops in front."""
    dtype: Any


@dataclass(frozen=True)
class Use:
    """One use of one root: Σ over positions of A times G (see `rules.factored`)."""

    root: int
    probe: int
    primitive: str
    factored: Factored
    offset: int
    weight: tuple[tuple[int, int, int], ...]
    """(label, size, stride in the flat root) of each label that is an axis of the weight."""
    cotangent: tuple[int, ...]
    """Labels of G, loops in front."""
    activation: tuple[int, ...] | None
    """Labels of A, loops in front."""
    sizes: dict[int, int]
    loops: int
    """Number of enclosing loops."""
    reason: str = ""
    """Why there is no factored form, where there is none."""

    @property
    def positions(self) -> int:
        """Number of places of one example, loops among them, at which the weight is used."""
        own = {label for label, _, _ in self.weight}
        return math.prod(self.sizes[label] for label in self.cotangent if label not in own)

    @property
    def entries(self) -> tuple[int, list[tuple[int, int]]]:
        """The entries of the flat root that are used: offset and (size, stride)s."""
        return self.offset, [(size, stride) for _, size, stride in self.weight]


@dataclass
class Injection:
    """Probes on a step's operands and output, and what to keep for its uses."""

    operands: dict[int, int] = field(default_factory=dict)
    """Operand to probe."""
    output: int | None = None
    kept: list[tuple[int, int]] = field(default_factory=list)
    """(use, operand): activations to keep."""
    whole: dict[int, int] = field(default_factory=dict)
    """Operand to use, of operands taken as a whole."""


@dataclass
class Loop:
    """A `scan` that uses weights in its body."""

    operands: dict[int, int]
    whole: dict[int, int]
    body: Plan
    constants: int
    carried: int


@dataclass
class Branches:
    """A `cond` that uses weights in its branches."""

    operands: dict[int, int]
    whole: dict[int, int]
    branches: list[Plan]


@dataclass
class Plan:
    """What to do at each step of a graph; steps not in `actions` are just evaluated."""

    graph: Graph
    actions: dict[int, Injection | Loop | Branches] = field(default_factory=dict)
    scales: dict[int, tuple[int, int | None, str]] = field(default_factory=dict)
    """Step: (operand viewed, operand that scales it or None, 'mul', 'div' or 'neg')."""
    outputs: dict[int, int] = field(default_factory=dict)
    """Outputs that are weights themselves, and their probes."""
    whole: dict[int, int] = field(default_factory=dict)
    """The same outputs, and their uses."""
    probes: range = range(0)
    """Probes inside."""
    uses: range = range(0)
    data: frozenset[int] = frozenset()
    """Values that depend on an input."""
    weighted: frozenset[int] = frozenset()
    """Those that depend on a weight too."""

    def is_data(self, atom: Atom) -> bool:
        """Whether a value depends on an input."""
        return not isinstance(atom, Constant) and atom.number in self.data

    def uses_at(self, index: int) -> list[int]:
        """Uses of a step."""
        action = self.actions.get(index)
        if action is None:
            return []
        kept = [use for use, _ in action.kept] if isinstance(action, Injection) else []
        return kept + list(action.whole.values())


class _NoFactors(Exception):
    """Inside a loop or branch a weight has no factored form: take it as a whole at the entry."""

    def __init__(self, entry: int, reason: str):
        super().__init__(reason)
        self.entry, self.reason = entry, reason


class Analysis:
    """Roots, probes and uses of a graph whose first inputs are the weights."""

    def __init__(
        self,
        closed: Any,
        weights: Sequence[Any],
        names: Sequence[str],
        *,
        caller: str,
        factor: bool = True,
        follow: bool = True,
    ):
        """Analyse a closed jaxpr.

        Args:
            closed: of a function of the weights, then of the inputs.
            weights: shape and dtype of each weight.
            names: of the weights.
            caller: the public function, for errors.
            factor: use rules for factored derivatives; otherwise every use is taken as a whole.
            follow: follow weights through their prologue; otherwise a prologue is pulled back.
        """
        self.caller, self.factor, self.follow = caller, factor, follow
        self.numbering = Numbering()
        self.roots = [
            Root(tuple(w.shape), w.dtype, name, frozenset({k}))
            for k, (w, name) in enumerate(zip(weights, names, strict=True))
        ]
        self.probes: list[Probe] = []
        self.uses: list[Use] = []
        graph = flatten(closed, self.numbering)
        kinds: list[Kind] = [View.whole(k, root.shape) for k, root in enumerate(self.roots)]
        kinds += [Data(False)] * (len(graph.inputs) - len(kinds))
        self.plan, _ = self._graph(graph, kinds, ())

    @property
    def live_probes(self) -> dict[int, Probe]:
        """Probes that some use reads; others were merged with these."""
        return {k: self.probes[k] for k in sorted({use.probe for use in self.uses})}

    def uses_of(self, weight: int) -> list[tuple[int, Use]]:
        """Uses of a weight, and of what is computed from it, with their numbers."""
        numbered = enumerate(self.uses)
        return [(k, use) for k, use in numbered if weight in self.roots[use.root].weights]

    def _graph(
        self, graph: Graph, inputs: Sequence[Kind], loops: tuple[int, ...]
    ) -> tuple[Plan, list[Kind]]:
        """The plan of a graph, and the kinds of its outputs (no views among them)."""
        plan = Plan(graph)
        first_probe, first_use = len(self.probes), len(self.uses)
        kinds: dict[int, Kind] = dict.fromkeys(graph.constants)
        kinds |= {ref.number: kind for ref, kind in zip(graph.inputs, inputs, strict=True)}
        read = lambda atom: None if isinstance(atom, Constant) else kinds[atom.number]
        for index, step in enumerate(graph.steps):
            given = [read(atom) for atom in step.inputs]
            if not any(isinstance(kind, View) for kind in given):
                results = self._data(step, given)
            elif any(isinstance(kind, Data) for kind in given):
                results = self._use(plan, index, step, given, loops)
            else:
                results = self._prologue(plan, index, step, given)
            for ref, kind in zip(step.outputs, results, strict=True):
                inexact = jnp.issubdtype(ref.dtype, jnp.inexact)
                kinds[ref.number] = kind if inexact else Data(False) if kind is not None else None
        outputs: list[Kind] = []
        for k, atom in enumerate(graph.outputs):
            kind = read(atom)
            if isinstance(kind, View):
                plan.outputs[k], plan.whole[k] = self._whole(
                    kind, atom, "output", "it is an output", loops
                )
                kind = Data(True)
            outputs.append(kind)
        data = {number: kind for number, kind in kinds.items() if isinstance(kind, Data)}
        plan.data = frozenset(data)
        plan.weighted = frozenset(number for number, kind in data.items() if kind.weighted)
        plan.probes = range(first_probe, len(self.probes))
        plan.uses = range(first_use, len(self.uses))
        self._share_probes(plan)
        return plan, outputs

    def _share_probes(self, plan: Plan) -> None:
        """A product and the bias added to it have one cotangent: one probe serves both."""
        readers = Counter(
            atom.number
            for atoms in (*(step.inputs for step in plan.graph.steps), plan.graph.outputs)
            for atom in atoms
            if not isinstance(atom, Constant)
        )
        by_output = {
            step.outputs[0].number: action
            for index, step in enumerate(plan.graph.steps)
            if isinstance(action := plan.actions.get(index), Injection)
        }
        for index in sorted(plan.actions, reverse=True):
            step, sum_ = plan.graph.steps[index], plan.actions[index]
            if step.name not in ("add", "add_any") or not isinstance(sum_, Injection):
                continue
            for atom in step.inputs:
                if isinstance(atom, Constant):
                    continue
                product = by_output.get(atom.number)
                if (
                    product is None
                    or product.output is None
                    or sum_.output is None
                    or readers[atom.number] != 1
                    or (atom.shape, atom.dtype) != (step.outputs[0].shape, step.outputs[0].dtype)
                ):
                    continue
                for use, _ in product.kept:
                    self.uses[use] = replace(self.uses[use], probe=sum_.output)
                product.output = None

    def _data(self, step: Step, given: list[Kind]) -> list[Kind]:
        weighted = any(isinstance(kind, Data) and kind.weighted for kind in given)
        if weighted and step.name == "while":
            self._refuse_while(step)
        if all(kind is None for kind in given):
            return [None] * len(step.outputs)
        return [Data(weighted)] * len(step.outputs)

    def _refuse_while(self, step: Step):
        body = getattr(step.params["body_jaxpr"], "jaxpr", step.params["body_jaxpr"])
        for equation in body.eqns:
            if equation.primitive.name == "forward_only":  # a frontend knows which loop it is
                raise NotImplementedError(f"{self.caller}: {equation.params['message']}")
        raise NotImplementedError(
            f"{self.caller}: f(params, x) has a `while` loop between its parameters and its output "
            "(lax.while_loop, or lax.fori_loop with bounds that are not Python integers), which "
            "has no reverse mode in JAX. Write it as lax.scan, or as lax.fori_loop with Python "
            "integers for bounds."
        )

    def _prologue(self, plan: Plan, index: int, step: Step, given: list[Kind]) -> list[Kind]:
        """A step on weights and constants alone."""
        if step.name == "stop_gradient" or not any(
            jnp.issubdtype(ref.dtype, jnp.inexact) for ref in step.outputs
        ):
            return [None] * len(step.outputs)
        viewed = {k: kind for k, kind in enumerate(given) if isinstance(kind, View)}
        if self.follow and len(viewed) == 1:
            ((operand, view),) = viewed.items()
            other = scaling(step, operand)
            if other is not None:
                plan.scales[index] = (operand, other, step.name)
                return [replace(view, scaled=True)]
            if operand == 0 and step.name in VIEWS:
                views = VIEWS[step.name](step, view)
                if views is not None:
                    plan.scales[index] = (operand, None, step.name)
                    return list(views)
        for view in viewed.values():
            if view.entry >= 0:
                raise _NoFactors(view.entry, f"`{step.name}` before it meets data, inside a loop")
        if step.name == "while":
            self._refuse_while(step)
        above = [self.roots[view.root] for view in viewed.values()]
        weights = frozenset().union(*(root.weights for root in above))
        results: list[Kind] = []
        for ref in step.outputs:
            name = f"{step.name}({', '.join(root.name for root in above)})"
            self.roots.append(Root(ref.shape, ref.dtype, name, weights, ref))
            results.append(View.whole(len(self.roots) - 1, ref.shape))
        return results

    def _use(
        self, plan: Plan, index: int, step: Step, given: list[Kind], loops: tuple[int, ...]
    ) -> list[Kind]:
        """A step that joins weights and data."""
        if step.name == "while":
            self._refuse_while(step)
        if step.name == "scan" and self.factor:
            return self._loop(plan, index, step, given, loops)
        if step.name == "cond" and self.factor:
            return self._branches(plan, index, step, given, loops)
        action = Injection()
        for operand, view in enumerate(given):
            if not isinstance(view, View):
                continue
            factored, reason = self._factors(step, operand, view)
            if factored is None:
                atom = step.inputs[operand]
                action.operands[operand], action.whole[operand] = self._whole(
                    view, atom, step.name, reason, loops
                )
                continue
            if action.output is None:
                action.output = self._probe(step.outputs[0], loops)
            action.kept.append((len(self.uses), operand))
            self._add(view, factored, action.output, step.name, loops)
        plan.actions[index] = action
        return [Data(True)] * len(step.outputs)

    def _factors(self, step: Step, operand: int, view: View) -> tuple[Factored | None, str]:
        if not self.factor:
            return None, "rules for factored derivatives are switched off"
        rule = RULES.get(step.name)
        if rule is None:
            return None, f"`{step.name}` has no rule"
        if len(step.outputs) != 1 or not all(
            jnp.issubdtype(x.dtype, jnp.floating) for x in (step.inputs[operand], step.outputs[0])
        ):
            return None, f"`{step.name}` is not of real arrays"
        factored = rule(step, operand)
        if factored is None or (factored.rows and view.scaled):
            return None, f"`{step.name}` has no factored form in operand {operand}"
        return factored, ""

    def _probe(self, atom: Atom, loops: tuple[int, ...]) -> int:
        self.probes.append(Probe((*loops, *atom.shape), atom.dtype))
        return len(self.probes) - 1

    def _whole(
        self, view: View, atom: Atom, primitive: str, reason: str, loops: tuple[int, ...]
    ) -> tuple[int, int]:
        """A probe on an operand itself: the derivative in all its entries; and its use."""
        if view.entry >= 0:
            raise _NoFactors(view.entry, reason)
        labels = tuple(range(len(atom.shape)))
        factored = Factored(dict(enumerate(atom.shape)), tuple((k,) for k in labels), labels)
        probe = self._probe(atom, loops)
        self._add(view, factored, probe, primitive, loops, reason)
        return probe, len(self.uses) - 1

    def _add(
        self,
        view: View,
        factored: Factored,
        probe: int,
        primitive: str,
        loops: tuple[int, ...],
        reason: str = "",
    ) -> None:
        sizes = dict(factored.sizes)
        weight: list[tuple[int, int, int]] = []
        for labels, (_, stride) in zip(factored.weight, view.axes, strict=True):
            for label in reversed(labels):
                # Entries that repeat (stride 0) are positions: their derivatives add up.
                if stride != 0 and sizes[label] > 1:
                    weight.append((label, sizes[label], stride))
                stride *= sizes[label]
        depths = tuple(-1 - depth for depth in range(len(loops)))
        sizes |= dict(zip(depths, loops, strict=True))
        weight += [(-1 - d, size, stride) for d, size, stride in view.loops if size > 1 and stride]
        activation = factored.activation
        if activation is None and view.scaled:
            activation = ()
        self.uses.append(
            Use(
                root=view.root,
                probe=probe,
                primitive=primitive,
                factored=factored,
                offset=view.offset,
                weight=tuple(weight),
                cotangent=(*depths, *factored.cotangent),
                activation=None if activation is None else (*depths, *activation),
                sizes=sizes,
                loops=len(loops),
                reason=reason,
            )
        )

    def _loop(
        self, plan: Plan, index: int, step: Step, given: list[Kind], loops: tuple[int, ...]
    ) -> list[Kind]:
        """A `scan`: uses in its body are stacked on an axis of time."""
        constants, carried = loop_counts(step)
        length = step.params["length"]
        taken: dict[int, str] = {
            k: "it is carried through a loop"
            for k in range(constants, constants + carried)
            if isinstance(given[k], View)
        }

        def inside(taken: dict[int, str]) -> list[Kind]:
            kinds: list[Kind] = []
            for k, kind in enumerate(given):
                if constants <= k < constants + carried or k in taken:
                    kinds.append(Data(True))
                elif isinstance(kind, View):
                    view = kind if k < constants else kind.step_through(len(loops))
                    kinds.append(replace(view, entry=k))
                elif k < constants:
                    kinds.append(kind)
                else:
                    kinds.append(kind or Data(False))
            return kinds

        def analyse(kinds: list[Kind]) -> Plan:
            body = flatten(step.params["jaxpr"], self.numbering)
            return self._graph(body, kinds, (*loops, length))[0]

        body = self._retry(taken, lambda: analyse(inside(taken)))
        operands, whole = self._entries(step, given, taken, loops)
        plan.actions[index] = Loop(operands, whole, body, constants, carried)
        return [Data(True)] * len(step.outputs)

    def _branches(
        self, plan: Plan, index: int, step: Step, given: list[Kind], loops: tuple[int, ...]
    ) -> list[Kind]:
        """A `cond`: in the branches not taken the activations are zero."""
        taken: dict[int, str] = {}

        def analyse() -> list[Plan]:
            kinds = [
                Data(True)
                if k in taken
                else replace(kind, entry=k)
                if isinstance(kind, View)
                else kind
                for k, kind in enumerate(given)
            ]
            return [
                self._graph(flatten(branch, self.numbering), kinds[1:], loops)[0]
                for branch in step.params["branches"]
            ]

        branches = self._retry(taken, analyse)
        operands, whole = self._entries(step, given, taken, loops)
        plan.actions[index] = Branches(operands, whole, branches)
        return [Data(True)] * len(step.outputs)

    def _retry(self, taken: dict[int, str], analyse: Any) -> Any:
        """Analyse a body until no weight in it lacks factors; `taken` collects those that do."""
        while True:
            probes, uses = len(self.probes), len(self.uses)
            try:
                return analyse()
            except _NoFactors as found:
                del self.probes[probes:], self.uses[uses:]
                if found.entry in taken:
                    raise AssertionError(f"{self.caller}: {found.reason}") from found
                taken[found.entry] = found.reason

    def _entries(
        self, step: Step, given: list[Kind], taken: dict[int, str], loops: tuple[int, ...]
    ) -> tuple[dict[int, int], dict[int, int]]:
        operands, whole = {}, {}
        for k, reason in taken.items():
            view = given[k]
            assert isinstance(view, View)
            operands[k], whole[k] = self._whole(view, step.inputs[k], step.name, reason, loops)
        return operands, whole
