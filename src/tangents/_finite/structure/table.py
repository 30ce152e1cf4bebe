"""The plan of a kernel as a table of its weights."""

from __future__ import annotations

from tangents._core.memory import format_bytes
from tangents._finite.cost import Form
from tangents._finite.structure.analysis import Analysis

HEADINGS = ("weight", "shape", "uses", "form", "multiply-adds", "bytes", "whole because")


def rows(analysis: Analysis, forms: dict[int, Form], itemsize: int) -> list[str]:
    """A heading, then a line for each weight."""
    cells: list[tuple[str, ...]] = [HEADINGS]
    for weight, form in forms.items():
        uses = [use for _, use in analysis.uses_of(weight)]
        products = sorted({name for _, _, name in form.pairs})
        name = " and ".join(products) or form.name + " in slices" * bool(form.slices)
        cells.append(
            (
                analysis.roots[weight].name or "params",
                str(analysis.roots[weight].shape),
                ", ".join(use.primitive for use in uses),
                name,
                f"{form.work:.3g}",
                format_bytes(form.entries * itemsize),
                "; ".join(dict.fromkeys(_reasons(analysis, weight))),
            )
        )
    widths = [max(len(row[k]) for row in cells) for k in range(len(HEADINGS))]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells)
    return [line.rstrip() for line in lines]


def _reasons(analysis: Analysis, weight: int) -> list[str]:
    """Why gradients of a weight are made as a whole, where other forms are not even weighed."""
    reasons = []
    for _, use in analysis.uses_of(weight):
        root = analysis.roots[use.root]
        if use.reason:
            reasons.append(use.reason)
        if root.ref is not None:
            reasons.append(f"`{root.name}` of shape {root.shape} is computed from it")
    return reasons
