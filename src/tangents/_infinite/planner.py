"""The planner: what is computed, in which layout, in how many pieces.

It reads the graph and the request. Layouts are decided edge by edge from the output backwards
(`Node.needs`): a network that flattens its images needs only equal positions anywhere before, one
that pools them needs all pairs. The plan is static: it is a key of the compiled program, while
hyperparameters are its arguments.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp

from tangents._core.memory import format_bytes
from tangents._infinite.dual.single_precision import is_single
from tangents._infinite.executors import Request, choose
from tangents._infinite.graph import Node, any_node, first_axes, join_needs
from tangents._infinite.inputs import TOKENS, PerInput, warn_batch_axis
from tangents._infinite.tile import Layout, Need, Signal


@dataclasses.dataclass(frozen=True)
class Plan:
    """One way to compute a request; hashable.

    need: at the output. input_need, axes: at each input (trees like the inputs').
    side_pairs: are all pairs within a side kept. want_ntk: is the tangent kernel computed.
    want_gap: is there a nonlinearity that carries the angular gap on.
    """

    need: Need
    input_need: Any
    axes: Any
    side_pairs: bool
    want_ntk: bool
    want_gap: bool = False


def _tree_like(x: Any, value: Any, join) -> Any:
    """Bring per-input values to the structure of the inputs."""
    if isinstance(x, (list, tuple)):
        each = value if isinstance(value, list) else [value] * len(x)
        if len(each) != len(x):
            raise ValueError(
                f"the network starts with {len(each)} parallel layers, and got {len(x)} inputs: "
                "give a list of one input for each, or put a FanOut before them"
            )
        return [_tree_like(u, v, join) for u, v in zip(x, each, strict=True)]
    return join(value) if isinstance(value, list) else value


def _join_axes(axes: Any) -> Any:
    leaves = [a for a in jax.tree.leaves(axes, is_leaf=lambda a: isinstance(a, tuple)) if a]
    if len(set(leaves)) > 1:
        warnings.warn(
            f"Parallel layers read their input by different (batch, channel) axes: {leaves}. "
            "The first are taken.",
            stacklevel=4,
        )
    return leaves[0] if leaves else None


def _default_axes(axes: Any) -> Any:
    if isinstance(axes, list):
        return [_default_axes(a) for a in axes]
    return (0, -1) if axes is None else axes


def make_plan(
    node: Node,
    x: Any,
    want_ntk: bool,
    want_sides: bool,
    diagonal_batch: bool | None,
    diagonal_spatial: bool | None,
) -> Plan:
    """The plan of a request; `x` gives the structure of the inputs (arrays or Kernels)."""
    layout = Layout.DIAGONAL if diagonal_spatial else Layout.FULL
    need = Need(layout, layout if want_sides else Layout.NONE)
    needs = _tree_like(x, node.needs(need), join_needs)
    if diagonal_spatial and join_needs(needs).tile == Layout.FULL:
        raise ValueError(
            "Asked to compute `diagonal_spatial=True`, but a layer of this network needs the "
            "covariance of all pairs of positions: pass diagonal_spatial=None or False."
        )
    side_pairs = any_node(node, lambda n: n.needs_side_pairs)
    if side_pairs and diagonal_batch:
        raise ValueError(
            "Asked to compute `diagonal_batch=True`, but a layer of this network mixes examples "
            "and needs the covariance of all pairs of them: pass diagonal_batch=None or False."
        )
    side_pairs = side_pairs or diagonal_batch is False
    axes = _default_axes(_tree_like(x, first_axes(node), _join_axes))
    want_gap = any_node(node, lambda n: getattr(getattr(n, "kernel", None), "carries_gap", False))
    return Plan(need, _freeze(needs), _freeze(axes), side_pairs, want_ntk, want_gap)


def _freeze(values: Any) -> Any:
    return PerInput(_freeze(v) for v in values) if isinstance(values, list) else values


def compute(
    node: Node, plan: Plan, x1, x2, mask1, mask2, x1_is_x2, index, patterns, kwargs: dict[str, Any]
) -> Any:
    """The state at the output of a network."""
    n1, n2 = batch_sizes(plan, x1, x1 if x2 is None else x2)
    request = Request(
        node,
        plan,
        x1,
        x2,
        mask1,
        mask2,
        x1_is_x2,
        index,
        patterns,
        kwargs,
        input_signals(plan, x1),
        n1,
        n2,
    )
    return choose(request).compute(request)


def describe(node: Node, plan: Plan, x1: Any, x2: Any) -> str:
    """Which executor computes it, and how; the inputs need shapes only."""
    n1, n2 = batch_sizes(plan, x1, x1 if x2 is None else x2)
    none = (None, None)
    signals = input_signals(plan, x1)
    request = Request(node, plan, x1, x2, None, None, True, none, none, {}, signals, n1, n2)
    executor = choose(request)
    return f"computed ({executor.name}): {executor.describe(request)}"


def batch_sizes(plan: Plan, x1: Any, x2: Any) -> tuple[int, int]:
    """Numbers of examples of both sides."""
    axes = plan.axes
    while isinstance(x1, list):
        x1, x2, axes = x1[0], x2[0], axes[0]
    return x1.shape[axes[0]], x2.shape[axes[0]]


def loses_digits(plan: Plan, signals: Any) -> bool:
    """Does single precision lose digits that no gap carries: are positions mixed (`near.py`)?"""
    if isinstance(signals, list):
        return any(loses_digits(plan, s) for s in signals)
    mixed = join_needs(plan.input_need).tile == Layout.FULL
    return mixed and bool(signals.spatial) and is_single(jnp.zeros(()))


def cast_hyperparameters(node: Node) -> Node:
    """Floating-point array hyperparameters in the canonical type (strict promotion is no error)."""
    dtype = jnp.zeros(()).dtype

    def cast(h):
        is_array = hasattr(h, "dtype") and jnp.issubdtype(h.dtype, jnp.floating)
        return jnp.asarray(h).astype(dtype) if is_array and h.dtype != dtype else h

    return jax.tree.map(cast, node)


def check_batch_axes(plan: Plan) -> None:
    """Warn where a batch axis is not in front."""

    def check(axes):
        if isinstance(axes, PerInput):
            for a in axes:
                check(a)
        else:
            warn_batch_axis(axes[0])

    check(plan.axes)


def input_signals(plan: Plan, x: Any) -> Any:
    """Descriptions of the inputs, a list where they are one; `x` needs shapes only."""

    def describe(x, axes):
        if isinstance(x, (list, tuple)):
            return [describe(u, a) for u, a in zip(x, axes, strict=True)]
        batch, channel = axes
        if channel == TOKENS:
            return Signal((*x.shape, 1), batch, -1)
        if channel is None:
            shape = (x.shape[batch], math.prod(x.shape) // max(x.shape[batch], 1))
            return Signal(shape, 0, 1)
        return Signal(tuple(x.shape), batch, channel)

    return describe(x, plan.axes)


_WORDS = {Layout.NONE: "none", Layout.DIAGONAL: "equal", Layout.FULL: "all"}


def explanation(stages: list, n1: int, n2: int, sizes: Any) -> str:
    """The table of `kernel_fn.explain`."""
    itemsize = jnp.zeros(()).dtype.itemsize
    rows = [("layer", "output", "pairs of positions", "sides", "one array")]
    for stage in stages:
        after = stage.after if isinstance(stage.after, list) else [stage.after]
        spatial = math.prod(after[0].spatial)
        power = 2 if stage.need_out.tile == Layout.FULL else 1
        size = n1 * n2 * spatial**power * itemsize
        shape = ", ".join(str(tuple(s.shape)) for s in after)
        need = stage.need_out
        pairs = _WORDS[need.tile] if after[0].spatial else "-"
        sides = _WORDS[need.side] if after[0].spatial or need.side == Layout.NONE else "-"
        rows.append((stage.place, shape, pairs, sides, format_bytes(size)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    if sizes is None:
        lines.append(f"examples: {n1} x {n2} pairs at once (layers mix examples)")
    elif tuple(sizes) == (n1, n2):
        lines.append(f"examples: {n1} x {n2} pairs in one tile")
    else:
        lines.append(f"examples: {n1} x {n2} pairs in tiles of {sizes[0]} x {sizes[1]}")
    return "\n".join(lines)
