"""A plan carried out: the network with its probes, and the activations its uses keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tangents._core.typing import Array
from tangents._finite.structure.analysis import Analysis, Branches, Injection, Loop, Plan, Use
from tangents._finite.structure.graph import Atom, Constant, Step

Kept = dict[int, Array]
"""Use to what its forward pass keeps."""


class Execution:
    """Runs the plan of an analysis."""

    def __init__(self, analysis: Analysis):
        """Of one analysis."""
        self.analysis = analysis

    def run(self, inputs: Sequence[Array], probes: dict[int, Array]) -> tuple[list[Array], Kept]:
        """Outputs of the network with `probes` added, and activations.

        `inputs` are the weights and the arguments of the analysed function.
        """
        kept: Kept = {}
        outputs = self._run(self.analysis.plan, inputs, {}, probes, kept)
        return outputs, kept

    def _run(
        self,
        plan: Plan,
        inputs: Sequence[Array],
        scales: dict[int, Array],
        probes: dict[int, Array],
        kept: Kept,
    ) -> list[Array]:
        values: dict[int, Array] = dict(plan.graph.constants)
        values |= {ref.number: x for ref, x in zip(plan.graph.inputs, inputs, strict=True)}
        for index, step in enumerate(plan.graph.steps):
            given = [_read(values, atom) for atom in step.inputs]
            action = plan.actions.get(index)
            if action is None:
                outputs = step.evaluate(given)
                if index in plan.scales:
                    _scale(plan.scales[index], step, given, scales)
            else:
                for operand, probe in action.operands.items():
                    given[operand] = given[operand] + probes[probe]
                    self._keep_scale(action.whole[operand], step.inputs[operand], scales, kept)
                if isinstance(action, Injection):
                    outputs = self._inject(action, step, given, scales, probes, kept)
                elif isinstance(action, Loop):
                    outputs = self._loop(action, step, given, scales, probes, kept)
                else:
                    outputs = self._branches(action, step, given, scales, probes, kept)
            for ref, value in zip(step.outputs, outputs, strict=True):
                values[ref.number] = value
        outputs = [_read(values, atom) for atom in plan.graph.outputs]
        for k, probe in plan.outputs.items():
            outputs[k] = outputs[k] + probes[probe]
            self._keep_scale(plan.whole[k], plan.graph.outputs[k], scales, kept)
        return outputs

    def _keep_scale(self, use: int, atom: Atom, scales: dict[int, Array], kept: Kept) -> None:
        """Of an operand taken as a whole there is nothing to keep but what multiplies it."""
        if self.analysis.uses[use].activation is not None:
            assert not isinstance(atom, Constant)
            kept[use] = scales[atom.number]

    def _inject(
        self,
        action: Injection,
        step: Step,
        given: list[Array],
        scales: dict[int, Array],
        probes: dict[int, Array],
        kept: Kept,
    ) -> list[Array]:
        outputs = step.evaluate(given)
        for number, operand in action.kept:
            use = self.analysis.uses[number]
            if use.activation is None:
                continue
            atom = step.inputs[operand]
            scale = None if isinstance(atom, Constant) else scales.get(atom.number)
            kept[number] = _activation(use, given, outputs, scale)
        if action.output is not None:
            outputs = [outputs[0] + probes[action.output]]
        return outputs

    def _loop(
        self,
        action: Loop,
        step: Step,
        given: list[Array],
        scales: dict[int, Array],
        probes: dict[int, Array],
        kept: Kept,
    ) -> list[Array]:
        body, carried = action.body, action.carried
        constants = given[: action.constants]
        start = given[action.constants : action.constants + carried]
        stacked = given[action.constants + carried :]
        below = _scales_below(step.inputs, body, scales)

        def at_one_time(carry, slices):
            xs, own = slices
            own_kept: Kept = {}
            outputs = self._run(body, [*constants, *carry, *xs], dict(below), own, own_kept)
            # The types of what is carried are those that the original loop had.
            carry = [
                jnp.asarray(y).astype(x.dtype)
                for y, x in zip(outputs[:carried], start, strict=True)
            ]
            return carry, (outputs[carried:], own_kept)

        own = {probe: probes[probe] for probe in body.probes if probe in probes}
        carry, (ys, own_kept) = lax.scan(
            at_one_time,
            start,
            (stacked, own),
            length=step.params["length"],
            reverse=step.params["reverse"],
        )
        kept.update(own_kept)
        return [*carry, *ys]

    def _branches(
        self,
        action: Branches,
        step: Step,
        given: list[Array],
        scales: dict[int, Array],
        probes: dict[int, Array],
        kept: Kept,
    ) -> list[Array]:
        index, *operands = given

        def run(branch: Plan, own: dict[int, Array], values: list[Array]):
            below = _scales_below(step.inputs[1:], branch, scales)
            own_kept: Kept = {}
            return self._run(branch, values, below, own, own_kept), own_kept

        owns = [{k: probes[k] for k in branch.probes if k in probes} for branch in action.branches]
        shapes: dict[int, Any] = {}
        for branch, own in zip(action.branches, owns, strict=True):
            shapes |= jax.eval_shape(lambda o, v, b=branch: run(b, o, v), own, operands)[1]

        def complete(branch: Plan, own: dict[int, Array]):
            def taken(values):
                outputs, own_kept = run(branch, own, values)
                # Activations of the other branches: those were not used.
                absent = {k: jnp.zeros(s.shape, s.dtype) for k, s in shapes.items()}
                return outputs, absent | own_kept

            return taken

        branches = [complete(b, own) for b, own in zip(action.branches, owns, strict=True)]
        outputs, all_kept = lax.switch(index, branches, operands)
        kept.update(all_kept)
        return outputs

    def prologue(self, weights: Sequence[Array]) -> dict[int, Array]:
        """Values of the computed roots as a function of the weights."""
        plan, roots = self.analysis.plan, self.analysis.roots
        wanted = {k: root.ref for k, root in enumerate(roots) if root.ref is not None}
        needed = {ref.number for ref in wanted.values()}
        steps: list[Step] = []
        for step in reversed(plan.graph.steps):
            if any(ref.number in needed for ref in step.outputs):
                steps.append(step)
                needed |= {a.number for a in step.inputs if not isinstance(a, Constant)}
        values: dict[int, Array] = dict(plan.graph.constants)
        refs = plan.graph.inputs[: len(weights)]
        values |= {ref.number: w for ref, w in zip(refs, weights, strict=True)}
        for step in reversed(steps):
            outputs = step.evaluate([_read(values, atom) for atom in step.inputs])
            values |= {r.number: y for r, y in zip(step.outputs, outputs, strict=True)}
        return {k: values[ref.number] for k, ref in wanted.items()}


def _read(values: dict[int, Array], atom: Atom) -> Array:
    if isinstance(atom, Constant):
        return jnp.asarray(atom.value, atom.dtype)
    return values[atom.number]


def _scale(
    rule: tuple[int, int | None, str], step: Step, given: list[Array], scales: dict[int, Array]
) -> None:
    """The scalar that multiplies the view which this step makes."""
    operand, other, name = rule
    atom = step.inputs[operand]
    scale = None if isinstance(atom, Constant) else scales.get(atom.number)
    if name == "neg":
        factor = -jnp.ones((), step.inputs[operand].dtype)
    elif other is None:
        factor = None
    else:
        factor = 1 / given[other] if name == "div" else given[other]
    if factor is not None:
        scale = factor if scale is None else scale * factor.astype(scale.dtype)
    if scale is not None:
        for ref in step.outputs:
            scales[ref.number] = scale


def _activation(use: Use, inputs: list[Array], outputs: list[Array], scale: Any) -> Array:
    save = use.factored.save
    if save is None:
        assert scale is not None
        return scale
    value = save(inputs, outputs)
    return value if scale is None else value * scale.astype(value.dtype)


def _scales_below(
    operands: Sequence[Atom], plan: Plan, scales: dict[int, Array]
) -> dict[int, Array]:
    """Scales of a step's operands, for the inputs of its body."""
    return {
        ref.number: scales[atom.number]
        for atom, ref in zip(operands, plan.graph.inputs, strict=True)
        if not isinstance(atom, Constant) and atom.number in scales
    }
