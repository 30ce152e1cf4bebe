"""Executors: ways to compute what a plan asks for. The planner asks them in turn.

`Trivial` is the plain path, one tile in full. `Blocked` computes many small blocks of pairs in one
program. Compiled code for a family of networks (the floor is one matrix product and one pass of
arithmetic: 6 to 79 times below neural-tangents on CPU) is one more class and a call of `register`;
it takes the requests it knows and leaves the others to the next.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from tangents._infinite.blocks import Batch, Blocks, block_sizes, compute_blocks, resize
from tangents._infinite.convolutional import (
    Network,
    block_size,
    compute_segments,
    group_size,
)
from tangents._infinite.execute import State, run
from tangents._infinite.graph import Node
from tangents._infinite.inputs import canonical, input_states
from tangents._infinite.segments import Unplanned, fits, moduli, segments
from tangents._infinite.tile import Layout, Need
from tangents._infinite.tiling import can_tile, stages


@dataclasses.dataclass(frozen=True)
class Request:
    """A network on inputs; arrays may be traced.

    plan: what is asked for (`planner.Plan`). x1, x2 (None: x1), mask1, mask2: trees of arrays.
    x1_is_x2: are they equal. index: numbers of the examples of both sides, or Nones. patterns:
    those of `Aggregate`. kwargs: for layers of the user's own. signals: descriptions of the inputs.
    n1, n2: numbers of examples.
    """

    node: Node
    plan: Any
    x1: Any
    x2: Any
    mask1: Any
    mask2: Any
    x1_is_x2: Any
    index: tuple[Any, Any]
    patterns: tuple[Any, Any]
    kwargs: dict[str, Any]
    signals: Any
    n1: int
    n2: int

    @property
    def entries(self) -> int:
        """Covariance entries of one pair of examples, at the widest layer."""
        listed, _ = stages(self.node, self.signals, self.plan.need)
        return max([s.entries for s in listed], default=1)


class Executor:
    """One way to compute a request."""

    name: str = ""

    def takes(self, request: Request) -> bool:
        """Can and should it compute this?"""
        raise NotImplementedError

    def compute(self, request: Request) -> Any:
        """The state (or list of states) at the output of the network."""
        raise NotImplementedError

    def describe(self, request: Request) -> str:
        """A line for `explain`."""
        raise NotImplementedError


_registered: list[Executor] = []


def register(executor: Executor) -> Executor:
    """Ask this executor before those that are there."""
    _registered.insert(0, executor)
    return executor


def unregister(executor: Executor) -> None:
    """Take back `register`."""
    _registered.remove(executor)


def choose(request: Request) -> Executor:
    """The first executor that takes the request."""
    return next(e for e in _registered if e.takes(request))


@functools.partial(jax.jit, static_argnames=("plan",))
def _inputs_program(plan, x1, x2, mask1, mask2, x1_is_x2, index):
    return input_states(plan, x1, x2, mask1, mask2, x1_is_x2, index)


class Trivial(Executor):
    """All pairs at once, layer by layer."""

    name = "trivial"

    def takes(self, request):
        return True

    def compute(self, request):
        r = request
        states = _inputs_program(r.plan, r.x1, r.x2, r.mask1, r.mask2, r.x1_is_x2, r.index)
        return run(r.node, states, r.plan.need, r.patterns, r.kwargs)

    def describe(self, request):
        return "all pairs at once"


def _needs(need: Any, change: Any) -> Any:
    return (
        need
        if need is None
        else change(need)
        if isinstance(need, Need)
        else type(need)(_needs(n, change) for n in need)
    )


@functools.partial(jax.jit, static_argnames=("plan", "blocks", "axes", "sizes"))
def _blocks_program(node, plan, blocks, axes, sizes, arrays):
    x1, x2, mask1, mask2, x1_is_x2, index, patterns = arrays
    axes = _listed(axes)
    batch1 = Batch(x1, mask1, patterns[0], index[0], axes, sizes[0])
    batch2 = None if x2 is None else Batch(x2, mask2, patterns[1], index[1], axes, sizes[1])
    side_plan = dataclasses.replace(plan, want_gap=False)
    # Tiles read variances at the input for the gap alone.
    limit = Layout.DIAGONAL if plan.want_gap else Layout.NONE
    alone = _needs(plan.input_need, lambda n: Need(n.tile, min(n.side, limit)))
    tile_plan = dataclasses.replace(plan, input_need=alone)

    def inputs(a, b, sides):
        if sides:
            return input_states(side_plan, a.x, None, a.mask, None, x1_is_x2, (a.index, a.index))
        return input_states(tile_plan, a.x, b.x, a.mask, b.mask, x1_is_x2, (a.index, b.index))

    return compute_blocks(node, plan, batch1, batch2, blocks, {}, inputs)


def _listed(axes: Any) -> Any:
    """Axes of several inputs as lists, like the inputs."""
    return [_listed(a) for a in axes] if isinstance(axes[0], tuple) else axes


class Blocked(Executor):
    """Blocks of pairs that stay in cache, in one program (`blocks.py`).

    least: entries of the whole covariance from which it takes over. most: those of a block.
    """

    name = "blocked"

    def __init__(self, least: int = 2**18, most: int | None = None):
        self.least = least
        self.most = most

    def takes(self, request):
        if not can_tile(request.node, request.plan.side_pairs) or not request.n1 * request.n2:
            return False
        return request.n1 * request.n2 * request.entries >= self.least

    def blocks(self, request: Request) -> Blocks:
        """Sizes of the blocks."""
        most = self.most
        if most is None:  # an accelerator wants few large steps, a cache many small ones
            most = 2**14 if jax.default_backend() == "cpu" else 2**22
        return block_sizes(request.n1, request.n2, request.entries, most)

    def compute(self, request):
        r = request
        arrays = (r.x1, r.x2, r.mask1, r.mask2, r.x1_is_x2, r.index, r.patterns)
        sizes = (r.n1, r.n2)
        return _blocks_program(r.node, r.plan, self.blocks(r), r.plan.axes, sizes, arrays)

    def describe(self, request):
        b = self.blocks(request)
        half = ", on and above the diagonal" if request.x2 is None else ""
        return f"blocks of {b.rows} x {b.columns} pairs in one program{half}"


class ByPlanes(Executor):
    """Convolutional networks, one offset of positions at a time (`segments.py`)."""

    name = "planes"

    def __init__(self, least: int = 2**18, group: int | None = None):
        self.least = least
        self.group = group

    def _cut(self, request: Request) -> Any:
        r = request
        masked = jax.tree.leaves((r.mask1, r.mask2, r.patterns))
        if isinstance(r.x1, (list, tuple)) or masked or not r.n1 * r.n2 or r.plan.side_pairs:
            return None
        if not isinstance(r.plan.axes[1], int) or not r.signals.spatial:
            return None
        try:
            cut = segments(r.node, r.signals)
        except Unplanned:
            return None
        many = r.signals.width > _MANY_CHANNELS and not cut[0].only_equal()
        return None if many or not fits(cut) else cut

    def takes(self, request):
        if request.n1 * request.n2 * request.entries < self.least:
            return False
        return can_tile(request.node, request.plan.side_pairs) and self._cut(request) is not None

    def compute(self, request):
        r = request
        arrays = (r.x1, r.x2, r.x1_is_x2, r.index)
        return _planes_program(r.node, r.plan, r.signals, self.group, arrays)

    def describe(self, request):
        cut = self._cut(request)
        kinds = ["equal positions" if c.only_equal() else "planes" for c in cut]
        half = " on and above the diagonal" if request.x2 is None else ""
        return f"pairs{half} in groups, by segments: " + ", ".join(
            f"{len(c.nodes)} layers ({kind})" for c, kind in zip(cut, kinds, strict=True)
        )


_MANY_CHANNELS = 8
"""Inputs of more channels are cheaper as one product of matrices than plane by plane."""


@functools.partial(jax.jit, static_argnames=("plan", "signal", "group"))
def _planes_program(node, plan, signal, group, arrays):
    x1, x2, x1_is_x2, index = arrays
    order = (signal.batch_axis, *signal.spatial_axes, signal.channel_axis)
    x1 = jnp.transpose(canonical(x1), order)
    x2 = None if x2 is None else jnp.transpose(canonical(x2), order)
    cut = segments(node, signal)
    all_moduli = moduli(cut)
    carries = plan.want_gap and cut[0].only_equal()
    size = group_size(cut, all_moduli[0], carries) if group is None else group
    block = block_size(cut) if group is None else (group, 2 * group)
    network = Network(cut, all_moduli, plan.want_ntk, plan.want_gap, x1, x2, size, block)
    same = None if index[0] is None else (*index, x1_is_x2)
    want_sides = plan.need.side > Layout.NONE
    tile, side1, side2 = compute_segments(network, same, want_sides)
    n1, n2 = x1.shape[0], (x1 if x2 is None else x2).shape[0]
    return State(
        tile=tile,
        side1=side1 if want_sides else None,
        side2=side2 if want_sides else None,
        mask1=None,
        mask2=None,
        index1=None,
        index2=None,
        x1_is_x2=x1_is_x2,
        in1=resize(cut[-1].after, n1),
        in2=resize(cut[-1].after, n2),
        layout=plan.need.tile,
        side_layout=plan.need.side,
        side_pairs=False,
        shared=x2 is None,
    )


register(Trivial())
register(Blocked())
register(ByPlanes())
