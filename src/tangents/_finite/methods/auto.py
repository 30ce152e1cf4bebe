"""AUTO: the method of least work, by the shapes of the network and of the kernel that is asked for.

Work is in multiply-adds. With F those of a forward pass on one example, N₁ and N₂ examples, O
outputs, P parameters (Novak et al. 2022, table 1):

    structured derivatives    (N₁ + N₂) O F and the contraction of each weight (`cost`)
    Jacobian contraction      2 (N₁ + N₂) O F + N₁ N₂ O² P      (O P with the outputs traced)
    NTK-vector products       2 N₂ O F + 2 N₁ N₂ O F

Structured derivatives contain Jacobian contraction as one of their forms; products win where all
pairs of many outputs are wanted of a narrow network, for no product of theirs grows with O².
"""

from __future__ import annotations

from dataclasses import dataclass

import jax

from tangents._core.axes import PairAxes
from tangents._core.memory import format_bytes, resolve_budget
from tangents._core.typing import Array
from tangents._finite import cost
from tangents._finite.implementation import NtkImplementation
from tangents._finite.methods import (
    jacobian_contraction,
    ntk_vector_products,
    structured_derivatives,
)
from tangents._finite.methods.structured_derivatives import LeafKernel, Options
from tangents._finite.problem import Problem

NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)
"""A network that looks at its inputs' values cannot be traced in them."""

LOOPED_CONVOLUTION = 30.0
"""NTK-vector products loop over examples, and XLA's CPU convolutions are so much slower there."""
UNLIKE = 2.0
"""Another method must promise to be so much cheaper: the estimates are no better than that."""


@dataclass(frozen=True)
class Estimate:
    """What a method costs."""

    implementation: NtkImplementation
    work: float
    """Multiply-adds."""
    held: float
    """Bytes held at once."""


def kernels(problem: Problem, axes: list[PairAxes], options: Options | None = None) -> list[Array]:
    """Kernel of each output leaf."""
    options = options or Options()
    try:
        plans = structured_derivatives.plans(problem, axes, options)
    except NEEDS_VALUES:
        return jacobian_contraction.kernels(problem, axes)
    chosen = choose(problem, plans, options)
    if chosen is NtkImplementation.JACOBIAN_CONTRACTION:
        return jacobian_contraction.kernels(problem, axes)
    if chosen is NtkImplementation.NTK_VECTOR_PRODUCTS:
        return ntk_vector_products.kernels(problem, axes)
    return [plan.compute() for plan in plans]


def choose(problem: Problem, plans: list[LeafKernel], options: Options) -> NtkImplementation:
    """The method of least work among those whose memory fits."""
    structured, *others = estimates(problem, plans)
    budget = resolve_budget(options.memory)
    best = min((e for e in others if e.held <= budget), key=lambda e: e.work, default=structured)
    return (best if UNLIKE * best.work < structured.work else structured).implementation


def explain(problem: Problem, axes: list[PairAxes], options: Options | None = None) -> str:
    """The methods with their estimates, then the plan of structured derivatives."""
    options = options or Options()
    plans = structured_derivatives.plans(problem, axes, options)
    chosen = choose(problem, plans, options)
    lines = [
        f"{'→' if e.implementation is chosen else ' '} {e.implementation.name.ljust(22)}  "
        f"{e.work:.3g} multiply-adds, about {format_bytes(e.held)} held"
        for e in estimates(problem, plans)
    ]
    return "\n\n".join(["\n".join(lines), *(plan.explain() for plan in plans)])


def estimates(problem: Problem, plans: list[LeafKernel]) -> list[Estimate]:
    """Of structured derivatives, Jacobian contraction and NTK-vector products."""
    structured, contraction, products = (
        NtkImplementation.STRUCTURED_DERIVATIVES,
        NtkImplementation.JACOBIAN_CONTRACTION,
        NtkImplementation.NTK_VECTOR_PRODUCTS,
    )
    parameters = sum(leaf.size for leaf in problem.leaves)
    itemsize = max(leaf.dtype.itemsize for leaf in problem.leaves)
    work = dict.fromkeys((structured, contraction, products), 0.0)
    held = dict(work)
    for plan in plans:
        extent, full = plan.extent, plan.full_extent
        forwards = [cost.forward_work(side.analysis.plan) for side in (plan.side1, plan.side2)]
        both = lambda e, plan=plan, forwards=forwards: sum(
            f.total * examples * seeds
            for f, examples, seeds in (
                (forwards[0], e.examples1, e.seeds1),
                (forwards[1], 0 if plan.same else e.examples2, e.seeds2),
            )
        )
        work[structured] += both(extent) + plan.work
        held[structured] += plan.held
        pairs = full.examples1 * (1 if plan.layout.same_examples else full.examples2)
        outputs = full.traced * full.kept * full.output1 * full.output2
        work[contraction] += 2 * both(full) + cost.THICK * pairs * outputs * parameters
        rows1, rows2 = full.examples1 * full.seeds1, full.examples2 * full.seeds2
        held[contraction] += (rows1 + (0 if plan.same else rows2)) * parameters * itemsize
        looped = forwards[1].total + (LOOPED_CONVOLUTION - 1) * forwards[1].convolutions
        work[products] += 2 * rows2 * forwards[1].total + 2 * pairs * full.seeds2 * looped
        held[products] += rows2 * parameters * itemsize
    return [Estimate(k, work[k], held[k]) for k in work]
