"""Running a graph: states on the edges, rules at the nodes, side passes beside them.

The side pass is the same walk on the pairs (a, a): each node's rule is called for the covariances
of each side first (if anybody downstream needs them) and then for the tile.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from tangents._infinite.barrier import CALLS, computed_apart, keep_apart
from tangents._infinite.dual.angle import norm
from tangents._infinite.dual.single_precision import is_single
from tangents._infinite.graph import Node, Parallel, Repeat, Serial, any_node, at
from tangents._infinite.tape import Tape, Turns
from tangents._infinite.tile import (
    Context,
    Layout,
    Need,
    Picked,
    Signal,
    Tile,
    in_value,
    pair_positions,
    position_mask,
    spatial_diagonal,
)

_ARRAYS = (
    *("tile", "side1", "side2", "prepared", "mask1", "mask2"),
    *("index1", "index2", "x1_is_x2", "planes"),
)
_STATIC = ("in1", "in2", "layout", "side_layout", "side_pairs", "shared")


@dataclasses.dataclass(frozen=True)
class State:
    """Everything on one edge of the graph. `shared`: side 2 is side 1 (its arrays are None).

    planes: which offsets the tile holds, in the layout PLANES. prepared: `dual.prepared.Prepared`,
    for the node that comes next.
    """

    tile: Any
    side1: Any
    side2: Any
    mask1: Any
    mask2: Any
    index1: Any
    index2: Any
    x1_is_x2: Any
    in1: Signal
    in2: Signal
    layout: Layout
    side_layout: Layout
    side_pairs: bool
    shared: bool
    planes: Any = None
    prepared: Any = None

    def replace(self, **changes: Any) -> State:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


jax.tree_util.register_pytree_node(
    State,
    lambda s: (tuple(getattr(s, n) for n in _ARRAYS), tuple(getattr(s, n) for n in _STATIC)),
    lambda aux, children: _unflatten(aux, children),
)


def _unflatten(aux, children):
    self = object.__new__(State)
    for names, values in ((_ARRAYS, children), (_STATIC, aux)):
        for n, v in zip(names, values, strict=True):
            object.__setattr__(self, n, v)
    return self


def fit(state: Any, need: Any) -> Any:
    """Reduce a state to what is needed of it: full covariances to their diagonals."""
    if isinstance(state, (list, tuple)):
        needs = need if isinstance(need, list) else [need] * len(state)
        return type(state)(fit(s, n) for s, n in zip(state, needs, strict=True))
    if state.layout == Layout.PLANES:  # a tile alone, and the layers keep to it
        return state.replace(side1=None, side2=None, side_layout=Layout.NONE)
    for have, want in ((state.layout, need.tile), (state.side_layout, need.side)):
        if have < want and (state.in1.spatial_axes or have == Layout.NONE):
            raise ValueError(
                "a layer needs the covariance of all pairs of positions, and its input has only "
                "that of equal positions: call with diagonal_spatial=None or False"
            )
    n_batch, n_side = 2, 2 if state.side_pairs else 1
    if state.tile is None:
        if state.layout > need.tile == Layout.DIAGONAL:
            state = state.replace(layout=Layout.DIAGONAL)
    elif state.layout > need.tile == Layout.DIAGONAL:
        tile = state.tile.linear(lambda a: spatial_diagonal(a, n_batch), gap=True)
        state = state.replace(tile=tile, layout=Layout.DIAGONAL)
    if need.side == Layout.NONE:
        return state.replace(side1=None, side2=None, side_layout=Layout.NONE)
    if state.side_layout > need.side:
        side1 = spatial_diagonal(state.side1, n_side)
        side2 = None if state.side2 is None else spatial_diagonal(state.side2, n_side)
        state = state.replace(side1=side1, side2=side2, side_layout=Layout.DIAGONAL)
    return state


def _same(state: State) -> Any:
    if state.index1 is None:
        return None
    return state.x1_is_x2 & (state.index1[:, None] == state.index2[None])


def _contexts(node: Node, s: State, out1, out2, need: Need, patterns) -> dict[str, Context]:
    """The contexts of the two side passes and of the tile."""
    m1, m2 = position_mask(s.mask1, s.in1), position_mask(s.mask2, s.in2)
    side2 = s.side1 if s.shared else s.side2
    m2 = m1 if s.shared else m2
    channel_masks = any(
        m is not None and m.shape[x.channel_axis] > 1
        for m, x in ((s.mask1, s.in1), (s.mask2, s.in2))
    )
    common: dict[str, Any] = {
        "side_layout": s.side_layout,
        "side_pairs": s.side_pairs,
        "channel_masks": channel_masks,
    }
    contexts = {}
    for k, (signal, out, side, mask, pattern, index) in enumerate(
        (
            (s.in1, out1, s.side1, m1, patterns[0], s.index1),
            (s.in2, out2, side2, m2, patterns[1], s.index2),
        ),
        1,
    ):
        n = signal.batch
        # A side pass pairs the examples of one draw.
        same = jnp.ones((n,), bool)
        if s.side_pairs:
            same = jnp.eye(n, dtype=bool) if index is None else index[:, None] == index[None]
        contexts[f"side{k}"] = Context(
            in1=signal,
            in2=signal,
            out1=out,
            out2=out,
            layout=s.side_layout,
            all_pairs=s.side_pairs,
            side1=side,
            side2=side,
            mask1=mask,
            mask2=mask,
            pattern1=pattern,
            pattern2=pattern,
            same=same,
            need=Need(need.side, need.side),
            planes=s.planes,
            **common,
        )
    contexts["tile"] = Context(
        in1=s.in1,
        in2=s.in2,
        out1=out1,
        out2=out2,
        layout=s.layout,
        all_pairs=True,
        side1=s.side1,
        side2=side2,
        mask1=m1,
        mask2=m2,
        pattern1=patterns[0],
        pattern2=patterns[1],
        same=_same(s),
        need=need,
        planes=s.planes,
        prepared=s.prepared,
        **common,
    )
    return contexts


def _remask(a: Any, m1: Any, m2: Any, layout: Layout, all_pairs: bool) -> Any:
    if a is None or a.ndim == 0 or (m1 is None and m2 is None):
        return a
    if m1 is None:
        m1 = jnp.zeros((1,) * m2.ndim, bool)
    if m2 is None:
        m2 = jnp.zeros((1,) * m1.ndim, bool)
    m1, m2 = pair_positions(m1, m2, layout, all_pairs)
    return jnp.where(m1 | m2, jnp.zeros((), a.dtype), a)


def step(node: Node, state: Any, need: Need, patterns: tuple[Any, Any]) -> Any:
    """One node: its rule on both sides and on the tile."""
    many = node.many_inputs
    states: list[State] = list(state) if many else [state]
    pick = (lambda values: values) if many else (lambda values: values[0])
    signals1, signals2 = [s.in1 for s in states], [s.in2 for s in states]
    out1, out2 = node.signal(pick(signals1)), node.signal(pick(signals2))
    if isinstance(out1, list):  # FanOut: one input, copies of it
        return [state] * len(out1)
    first = states[0]
    shared = all(s.shared for s in states)
    contexts = [_contexts(node, s, out1, out2, need, patterns) for s in states]

    mask1 = _mask_out(node, [s.mask1 for s in states], signals1, many)
    mask2 = mask1 if shared else _mask_out(node, [s.mask2 for s in states], signals2, many)
    position1, position2 = position_mask(mask1, out1), position_mask(mask2, out2)

    sides: list[Any] = [None, None]
    side_layout = Layout.NONE
    if need.side > Layout.NONE:
        side_layout = node.out_layout(first.side_layout, need.side)
        for k, position in ((1, position1), (2, position2)):
            if k == 2 and shared:
                continue
            tiles = [_pin(node, c[f"side{k}"], Tile(c[f"side{k}"].side1)) for c in contexts]
            out = node.rule(pick([c[f"side{k}"] for c in contexts]), pick(tiles)).cov12
            sides[k - 1] = _remask(out, position, position, side_layout, first.side_pairs)

    layout = node.out_layout(first.layout, need.tile)
    tile: Any = None
    if first.tile is not None:
        tile = _tile_rule(node, contexts, states, need, pick)
        tile = Tile(*(_remask(a, position1, position2, layout, True) for a in tile))
    index1 = index2 = None
    if first.index1 is not None:
        index1 = node.out_examples(pick([s.index1 for s in states]), out1)
        index2 = node.out_examples(pick([s.index2 for s in states]), out2)
    return State(
        tile=tile,
        side1=sides[0],
        side2=sides[1],
        mask1=mask1,
        mask2=None if shared else mask2,
        index1=index1,
        index2=index2,
        x1_is_x2=first.x1_is_x2,
        in1=out1,
        in2=out2,
        layout=layout,
        side_layout=side_layout,
        side_pairs=first.side_pairs,
        shared=shared,
        planes=first.planes and first.planes.strided(node.plane_strides(first.in1)),
    )


def _tile_rule(node: Node, contexts, states: list[State], need: Need, pick) -> Tile:
    """The rule on the tile of pairs, with the gap where it is carried."""
    carried = all(s.tile.gap12 is not None for s in states)
    if carried or _makes_gap(node, states[0].tile):
        for each in contexts:
            each["tile"] = dataclasses.replace(each["tile"], has_gap=True)
    tiles = [_pin(node, c["tile"], s.tile) for c, s in zip(contexts, states, strict=True)]
    if not node.takes_rest:
        tiles = [t.whole() for t in tiles]
    tile = node.rule(pick([c["tile"] for c in contexts]), pick(tiles))
    return tile if carried else tile._replace(gap12=None)


def _pin(node: Node, context: Context, tile: Tile) -> Tile:
    """Make the covariance of an example with itself its variance, to the last bit.

    Side and tile are computed by different contractions, and an angle of zero off by rounding is
    off by its square root: nonlinearities with a kink would lose half of their digits there. In
    value alone: where one of two equal inputs moves, covariance and variance change differently.
    """
    if not node.gaussian_input or context.side1 is None:
        return tile
    same = context.same_entries
    var1, var2 = context.variances
    cov12, gap12 = tile.cov12, tile.gap12
    if gap12 is None and _makes_gap(node, tile):
        s = norm(var1, var2) if context.norm is None else context.norm
        gap12 = jnp.maximum(s - jnp.abs(cov12), 0)
    if same is not None:
        cov12 = in_value(same, var1, cov12)
        gap12 = None if gap12 is None else jnp.where(same, jnp.zeros((), gap12.dtype), gap12)
    return tile._replace(cov12=cov12, gap12=gap12)


def _makes_gap(node: Node, tile: Tile) -> bool:
    """In single precision duals read the angle from the gap, which is made for them.

    Computed from the covariance it has no digits that the covariance has not; but the polynomials
    that take it are many times faster than those for a determinant, and pinned to zero it makes
    equal examples exact.
    """
    return node.gaussian_input and is_single(tile.cov12)


def _mask_out(node: Node, masks: list, signals: list[Signal], many: bool) -> Any:
    if all(m is None for m in masks):
        return None
    if many:
        return node.mask_out(masks, [s.shape for s in signals])
    return node.mask_out(masks[0], signals[0].shape)


def is_cut(node: Node) -> bool:
    """Does the node cut the graph into segments (a function `Kernel -> Kernel`)?"""
    return hasattr(node, "run_kernel")


def run(
    node: Node,
    state: Any,
    need: Any,
    patterns: tuple[Any, Any],
    kwargs: dict[str, Any],
    tape: Tape | None = None,
) -> Any:
    """Walk a graph from a state to the state after it, reduced to `need`.

    With a recording tape the sides alone are computed, and what the tile will need of them is kept;
    with a playing one the tile alone, the sides coming from the tape.
    """
    if is_cut(node):
        return fit(node.run_kernel(state, need, patterns, kwargs), need)  # pyright: ignore
    if isinstance(node, Serial):
        return _run_serial(node, state, need, patterns, kwargs, tape)
    if isinstance(node, Parallel):
        node._check(state)
        needs = need if isinstance(need, list) else [need] * len(state)
        out = []
        for (place, child), s, n in zip(node.places(), state, needs, strict=True):
            with at(place):
                out.append(run(child, s, n, patterns, kwargs, tape))
        return out
    if isinstance(node, Repeat):
        return _run_repeat(node, state, need, patterns, kwargs, tape)
    if isinstance(need, list):  # FanOut: every copy has its own need
        state = step(node, state, _without_sides(node.needs(need), tape), patterns)
        return fit(state, _without_sides(need, tape))
    state = fit(state, _without_sides(node.needs(need), tape))
    if tape is not None:
        state = tape.play(state) if tape.playing else tape.record(node, state, need)
    return _layer_program(node, state, _without_sides(need, tape), patterns)


@functools.partial(jax.jit, static_argnames=("need",))
def _layer_program(node: Node, state: Any, need: Need, patterns: tuple[Any, Any]) -> Any:
    """One layer, compiled by itself.

    Called eagerly, layers of equal structure and shapes share one program, whatever network they
    stand in, so compile time does not grow with depth, and what one layer hands to the next is the
    same number for everybody who reads it: fused across layers, XLA on CPU recomputes it in each
    reader with other roundings, which costs ReLU kernels half of their digits at equal inputs.
    """
    many = isinstance(state, (list, tuple))
    first = state[0] if many else state
    if first.planes is not None and first.planes.apart:
        parts_apart = first.tile is not None and node.parts_apart(state)
        # Nothing is fused with a call of a library.
        if parts_apart or node.by_library(first):
            return _layer(need, node, state, patterns)
        return computed_apart(functools.partial(_layer, need), node, state, patterns)
    after = fit(step(node, state, need, patterns), need)
    # Variances that a layer multiplies by a number may as well be multiplied by their readers.
    return after if node.reads_norm and not many and state.tile is None else _barrier(after)


def _layer(need, node, state, patterns):
    if isinstance(state, State) and isinstance(state.side1, Picked):
        state = state.replace(side1=state.side1.array())
    return fit(step(node, state, need, patterns), need)


def _barrier(state: Any) -> Any:
    """Inside a program of many layers (under `jit`), keep the compiler from fusing across them."""
    if isinstance(state, (list, tuple)):
        return state
    tile, side1, side2 = keep_apart((state.tile, state.side1, state.side2))
    tile = None if tile is None else Tile(*tile)
    return state.replace(tile=tile, side1=side1, side2=side2)


def _run_serial(node: Serial, state, need, patterns, kwargs, tape):
    needs = [need]
    for child in reversed(node.nodes):
        needs.append(child.needs(needs[-1]))
    state = fit(state, _without_sides(needs[-1], tape))
    children = list(zip(node.places(), needs[-2::-1], strict=True))

    def walk(state, children, tape):
        for (place, child), n in children:
            with at(place):
                state = run(child, state, n, patterns, kwargs, tape)
        return state

    start = 0
    for first, period, turns in _runs(node.nodes, state):
        state = walk(state, children[start:first], tape)
        part, end = children[first : first + period], first + period * turns
        wanted = _joined(needs[::-1], first, period, end)
        names = [place for (place, _), _ in part]

        def one(state, hypers, tape, names=names, wanted=wanted):
            layers = zip(names, hypers, strict=True)
            return walk(state, list(zip(layers, wanted, strict=True)), tape)

        groups = [node.nodes[k : k + period] for k in range(first, end, period)]
        hypers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *groups)
        state = _run_turns(one, turns, hypers, state, tape)
        start = end
    return fit(walk(state, children[start:], tape), _without_sides(need, tape))


def _joined(needs: list, first: int, period: int, end: int) -> list:
    """What is needed behind each layer of a turn, in any of the turns."""

    def join(a, b):
        if isinstance(a, list):
            return [join(u, v) for u, v in zip(a, b, strict=True)]
        return a.join(b)

    return [functools.reduce(join, needs[first + k + 1 : end + 1 : period]) for k in range(period)]


def _runs(nodes: tuple[Node, ...], state: Any) -> list[tuple[int, int, int]]:
    """`(start, period, turns)` of runs of equal layers with equal signals; none outside of a trace.

    There each layer is a program of its own, and is compiled once anyway.
    """
    traced = any(isinstance(a, Tracer) for a in jax.tree.leaves(state))
    if not traced or any(any_node(n, is_cut) for n in nodes):
        return []
    layers = [(jax.tree.structure(n), tuple(map(jnp.shape, jax.tree.leaves(n)))) for n in nodes]
    if len(set(layers)) == len(layers):
        return []
    kinds, single = [], []
    signal = state.in1 if isinstance(state, State) else [s.in1 for s in state]
    for place, (layer, child) in enumerate(zip(layers, nodes, strict=True)):
        # Of a single position nobody sees whether strides move it.
        fixed = isinstance(signal, Signal) and all(n > 1 for n in signal.spatial)
        single.append(fixed)
        kinds.append((layer, tuple(signal) if isinstance(signal, list) else signal))
        if place + 1 < len(nodes):
            signal = child.signal(signal)
    first = state if isinstance(state, State) else state[0]
    least = _WRITTEN_OUT if first.planes is not None and first.planes.apart else 1
    out, start = [], 0
    while start < len(kinds):
        periods = range(1, (len(kinds) - start) // 2 + 1) if single[start] else ()
        turns, period = max(
            ((_turns(kinds, start, p), p) for p in periods),
            key=lambda found: ((found[0] > 1) * found[0] * found[1], -found[1]),
            default=(1, 1),
        )
        if turns > least:
            out.append((start, period, turns))
        start += period * turns if turns > 1 else 1
    return out


_WRITTEN_OUT = 8 if CALLS else 1
"""Turns that are written out where layers are compiled as if alone: their kernels are the same, and
a loop would have more to compile than they have, which stacks and cuts what each turn reads."""


def _turns(kinds: list, start: int, period: int) -> int:
    """How often the first `period` entries from `start` on come in a row."""
    turns = 1
    while kinds[start : start + period] == kinds[start + turns * period :][:period]:
        turns += 1
    return turns


def _run_repeat(node: Repeat, state, need, patterns, kwargs, tape):
    need = node.needs(need)
    state = fit(state, _without_sides(need, tape))

    def one(state, _, tape):
        with at(node.place):
            return run(node.node, state, need, patterns, kwargs, tape)

    if any_node(node.node, is_cut):
        for _ in range(node.n):
            state = one(state, None, tape)
        return state
    return _run_turns(one, node.n, None, state, tape)


def _run_turns(one: Any, turns: int, hypers: Any, state: Any, tape: Tape | None) -> Any:
    """`one(state, hyperparameters, tape) -> state` again and again.

    Once a turn leaves the kind of state it found, the rest are a loop, which is compiled once.
    hypers: of all turns, stacked; or None.
    """
    played = tape.next() if tape is not None and tape.playing else None
    recorded = []

    def turn(state, given):
        hypers, entries = given
        part = None if tape is None else Tape(tape.keep, entries)
        after = one(state, hypers, part)
        if part is None or part.playing:
            return after, None
        return after, tuple(part.entries)

    def kind(state):
        return jax.tree.structure(state), jax.tree.map(jnp.shape, jax.tree.leaves(state))

    for k in range(turns):
        rest = (
            jax.tree.map(lambda a, k=k: a[k:], hypers),
            None if played is None else played.after(k),
        )
        first = jax.tree.map(lambda a: a[0], rest)
        if k < turns - 1 and kind(jax.eval_shape(turn, state, first)[0]) == kind(state):
            state, kept = jax.lax.scan(turn, state, rest, length=turns - k)
            recorded.append(kept)
            break
        state, kept = turn(state, first)
        recorded.append(jax.tree.map(lambda a: jnp.asarray(a)[None], kept))
    if tape is not None and not tape.playing:
        tape.append(Turns(jax.tree.map(lambda *a: jnp.concatenate(a), *recorded)), state)
    return state


def _without_sides(need: Any, tape: Tape | None) -> Any:
    """What is needed of a tile alone, while a tape plays."""
    if tape is None or not tape.playing:
        return need
    if isinstance(need, Need):
        return Need(need.tile, Layout.NONE)
    return [_without_sides(n, tape) for n in need]
