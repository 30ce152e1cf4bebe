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

from tangents._infinite.graph import Node, Parallel, Repeat, Serial, any_node, at
from tangents._infinite.tile import (
    Context,
    Layout,
    Need,
    Signal,
    Tile,
    in_value,
    pair_positions,
    position_mask,
    spatial_diagonal,
)

_ARRAYS = ("tile", "side1", "side2", "mask1", "mask2", "index1", "index2", "x1_is_x2")
_STATIC = ("in1", "in2", "layout", "side_layout", "side_pairs", "shared")


@dataclasses.dataclass(frozen=True)
class State:
    """Everything on one edge of the graph. `shared`: side 2 is side 1 (its arrays are None)."""

    tile: Tile
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
    for have, want in ((state.layout, need.tile), (state.side_layout, need.side)):
        if have < want and (state.in1.spatial_axes or have == Layout.NONE):
            raise ValueError(
                "a layer needs the covariance of all pairs of positions, and its input has only "
                "that of equal positions: call with diagonal_spatial=None or False"
            )
    n_batch, n_side = 2, 2 if state.side_pairs else 1
    if state.layout > need.tile == Layout.DIAGONAL:
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
    tiles = [_pin(node, c["tile"], s.tile) for c, s in zip(contexts, states, strict=True)]
    tile = node.rule(pick([c["tile"] for c in contexts]), pick(tiles))
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
    )


def _pin(node: Node, context: Context, tile: Tile) -> Tile:
    """Make the covariance of an example with itself its variance, to the last bit.

    Side and tile are computed by different contractions, and an angle of zero off by rounding is
    off by its square root: nonlinearities with a kink would lose half of their digits there. In
    value alone: where one of two equal inputs moves, covariance and variance change differently.
    """
    same = context.same_entries
    if not node.gaussian_input or same is None or context.side1 is None:
        return tile
    var1, _ = context.variances
    gap12 = None
    if tile.gap12 is not None:
        gap12 = jnp.where(same, jnp.zeros((), tile.gap12.dtype), tile.gap12)
    return tile._replace(cov12=in_value(same, var1, tile.cov12), gap12=gap12)


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
    node: Node, state: Any, need: Any, patterns: tuple[Any, Any], kwargs: dict[str, Any]
) -> Any:
    """Walk a graph from a state to the state after it, reduced to `need`."""
    if is_cut(node):
        return fit(node.run_kernel(state, need, patterns, kwargs), need)  # pyright: ignore
    if isinstance(node, Serial):
        return _run_serial(node, state, need, patterns, kwargs)
    if isinstance(node, Parallel):
        node._check(state)
        needs = need if isinstance(need, list) else [need] * len(state)
        out = []
        for (place, child), s, n in zip(node.places(), state, needs, strict=True):
            with at(place):
                out.append(run(child, s, n, patterns, kwargs))
        return out
    if isinstance(node, Repeat):
        return _run_repeat(node, state, need, patterns, kwargs)
    if isinstance(need, list):  # FanOut: every copy has its own need
        return fit(step(node, state, node.needs(need), patterns), need)
    return _layer_program(node, fit(state, node.needs(need)), need, patterns)


@functools.partial(jax.jit, static_argnames=("need",))
def _layer_program(node: Node, state: Any, need: Need, patterns: tuple[Any, Any]) -> Any:
    """One layer, compiled by itself.

    Called eagerly, layers of equal structure and shapes share one program, whatever network they
    stand in, so compile time does not grow with depth, and what one layer hands to the next is the
    same number for everybody who reads it: fused across layers, XLA on CPU recomputes it in each
    reader with other roundings, which costs ReLU kernels half of their digits at equal inputs.
    """
    return _barrier(fit(step(node, state, need, patterns), need))


def _barrier(state: Any) -> Any:
    """Inside a program of many layers (under `jit`), keep the compiler from fusing across them.

    Without it XLA on CPU recomputes whole layers inside later loops: 2 to 4 times slower, and
    compile times that explode with depth.
    """
    if isinstance(state, (list, tuple)):
        return state
    tile, side1, side2 = jax.lax.optimization_barrier((state.tile, state.side1, state.side2))
    return state.replace(tile=Tile(*tile), side1=side1, side2=side2)


def _run_serial(node: Serial, state, need, patterns, kwargs):
    needs = [need]
    for child in reversed(node.nodes):
        needs.append(child.needs(needs[-1]))
    state = fit(state, needs[-1])
    for (place, child), n in zip(node.places(), needs[-2::-1], strict=True):
        with at(place):
            state = run(child, state, n, patterns, kwargs)
    return state


def _run_repeat(node: Repeat, state, need, patterns, kwargs):
    need = node.needs(need)
    state = fit(state, need)
    turns = node.n
    while turns > 0:
        before = jax.tree.structure(state), jax.tree.map(jnp.shape, state)
        with at(node.place):
            after = run(node.node, state, need, patterns, kwargs)
        turns -= 1
        same = (jax.tree.structure(after), jax.tree.map(jnp.shape, after)) == before
        state = after
        if same and turns > 1 and not any_node(node.node, is_cut):
            # From here on one turn looks like the next: a loop compiles once.
            def turn(carry, _):
                return run(node.node, carry, need, patterns, kwargs), None

            return jax.lax.scan(turn, state, None, length=turns)[0]
    return state
