"""A plan carried out: the network with its probes, and the activations its uses keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tangents._core.typing import Array
from tangents._finite.structure import convolutions
from tangents._finite.structure.analysis import Analysis, Branches, Injection, Loop, Plan, Use
from tangents._finite.structure.graph import Atom, Constant, Step

Kept = dict[int, Array]
"""Use to what its forward pass keeps."""


@dataclass(frozen=True)
class Frame:
    """What goes with one run of a plan, beside the values of its graph."""

    probes: dict[int, Array]
    scales: dict[int, Array] = field(default_factory=dict)
    """Scalars that multiply views."""
    kept: Kept = field(default_factory=dict)


class Execution:
    """Runs the plan of an analysis."""

    def __init__(self, analysis: Analysis):
        """Of one analysis."""
        self.analysis = analysis
        self.reverse = False
        """Whether derivatives will be taken by reverse mode."""

    def run(self, inputs: Sequence[Array], probes: dict[int, Array]) -> tuple[list[Array], Kept]:
        """Outputs of the network with `probes` added, and activations.

        `inputs` are the weights and the arguments of the analysed function.
        """
        frame = Frame(probes)
        return self._run(self.analysis.plan, inputs, frame), frame.kept

    def _run(self, plan: Plan, inputs: Sequence[Array], frame: Frame) -> list[Array]:
        values: dict[int, Array] = dict(plan.graph.constants)
        values |= {ref.number: x for ref, x in zip(plan.graph.inputs, inputs, strict=True)}
        for index, step in enumerate(plan.graph.steps):
            given = [_read(values, atom) for atom in step.inputs]
            action = plan.actions.get(index)
            if action is None:
                outputs = self._evaluate(plan, step, given)
                if index in plan.scales:
                    _scale(plan.scales[index], step, given, frame.scales)
            else:
                for operand, probe in action.operands.items():
                    given[operand] = given[operand] + frame.probes[probe]
                    self._keep_scale(action.whole[operand], step.inputs[operand], frame)
                if isinstance(action, Injection):
                    outputs = self._inject(action, plan, step, given, frame)
                elif isinstance(action, Loop):
                    outputs = self._loop(action, step, given, frame)
                else:
                    outputs = self._branches(action, step, given, frame)
            for ref, value in zip(step.outputs, outputs, strict=True):
                values[ref.number] = value
        outputs = [_read(values, atom) for atom in plan.graph.outputs]
        for k, probe in plan.outputs.items():
            outputs[k] = outputs[k] + frame.probes[probe]
            self._keep_scale(plan.whole[k], plan.graph.outputs[k], frame)
        return outputs

    def _keep_scale(self, use: int, atom: Atom, frame: Frame) -> None:
        """Of an operand taken as a whole there is nothing to keep but what multiplies it."""
        if self.analysis.uses[use].activation is not None:
            assert not isinstance(atom, Constant)
            frame.kept[use] = frame.scales[atom.number]

    def _evaluate(self, plan: Plan, step: Step, given: list[Array]) -> list[Array]:
        """The outputs of a step."""
        if self.reverse and convolutions.is_plain(step):
            image, kernel = step.inputs
            weighted = not isinstance(image, Constant) and image.number in plan.weighted
            if weighted and not plan.is_data(kernel):
                return convolutions.evaluate(step, given)
        return step.evaluate(given)

    def _inject(
        self, action: Injection, plan: Plan, step: Step, given: list[Array], frame: Frame
    ) -> list[Array]:
        outputs = self._evaluate(plan, step, given)
        for number, operand in action.kept:
            use = self.analysis.uses[number]
            if use.activation is None:
                continue
            atom = step.inputs[operand]
            scale = None if isinstance(atom, Constant) else frame.scales.get(atom.number)
            frame.kept[number] = _activation(use, given, outputs, scale)
        if action.output is not None:
            outputs = [outputs[0] + frame.probes[action.output]]
        return outputs

    def _loop(self, action: Loop, step: Step, given: list[Array], frame: Frame) -> list[Array]:
        body, carried = action.body, action.carried
        constants = given[: action.constants]
        start = given[action.constants : action.constants + carried]
        stacked = given[action.constants + carried :]
        below = _scales_below(step.inputs, body, frame.scales)

        def at_one_time(carry, slices):
            xs, own = slices
            inner = Frame(own, dict(below))
            outputs = self._run(body, [*constants, *carry, *xs], inner)
            # The types of what is carried are those that the original loop had.
            carry = [
                jnp.asarray(y).astype(x.dtype)
                for y, x in zip(outputs[:carried], start, strict=True)
            ]
            return carry, (outputs[carried:], inner.kept)

        own = {k: frame.probes[k] for k in body.probes if k in frame.probes}
        carry, (ys, own_kept) = lax.scan(
            at_one_time,
            start,
            (stacked, own),
            length=step.params["length"],
            reverse=step.params["reverse"],
        )
        frame.kept.update(own_kept)
        return [*carry, *ys]

    def _branches(
        self, action: Branches, step: Step, given: list[Array], frame: Frame
    ) -> list[Array]:
        index, *operands = given

        def run(branch: Plan, own: dict[int, Array], values: list[Array]):
            inner = Frame(own, _scales_below(step.inputs[1:], branch, frame.scales))
            return self._run(branch, values, inner), inner.kept

        probes = frame.probes
        owns = [{k: probes[k] for k in b.probes if k in probes} for b in action.branches]
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
        frame.kept.update(all_kept)
        return outputs

    def prologue(self, weights: Sequence[Array]) -> dict[int, Array]:
        """Values of the computed roots as a function of the weights."""
        wanted = {k: r.ref for k, r in enumerate(self.analysis.roots) if r.ref is not None}
        values = self.values(list(wanted.values()), weights)
        return dict(zip(wanted, values, strict=True))

    def values(self, wanted: Sequence[Atom], weights: Sequence[Array]) -> list[Array]:
        """Values that depend on the weights alone."""
        plan = self.analysis.plan
        needed = {atom.number for atom in wanted if not isinstance(atom, Constant)}
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
        return [_read(values, atom) for atom in wanted]


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
