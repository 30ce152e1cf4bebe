"""Sides computed once, tiles after them: what a side pass leaves for the walk over tiles."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from tangents._infinite.dual.prepared import Prepared
from tangents._infinite.graph import Node, join_needs
from tangents._infinite.tile import Layout, Need, spatial_diagonal


class Turns(NamedTuple):
    """Tape entries of the turns of a `Repeat`, stacked on a new first axis."""

    entries: tuple[Any, ...]

    def at(self, turn: int) -> tuple[Any, ...]:
        """The entries of one turn."""
        return jax.tree.map(lambda a: a[turn], self.entries)

    def after(self, turn: int) -> tuple[Any, ...]:
        """The entries of the turns from one on."""
        return jax.tree.map(lambda a: a[turn:], self.entries)


class Sides(NamedTuple):
    """What one node needs of the pairs (a, a), an entry for each of its inputs.

    side1, side2: tuples of arrays or None; side2 is None in what a recording of one side leaves.
    maker: `Partial(var1, var2) -> Prepared` of a node that reads more of one side than variances.
    level, numbers1, numbers2: what it made (`prepared`), arrays with the axes of a side behind one.
    """

    side1: tuple[Any, ...]
    side2: Any = None
    maker: Any = None
    level: Any = None
    numbers1: Any = None
    numbers2: Any = None


def join_sides(entries1: Any, entries2: Any) -> list:
    """Entries to play from the recordings of both sides."""
    out = []
    for one, two in zip(entries1, entries2, strict=True):
        if isinstance(one, Turns):
            out.append(Turns(tuple(join_sides(one.entries, two.entries))))
        else:
            out.append(one._replace(side2=two.side1, numbers2=two.numbers1))
    return out


def one_sided(entries: Any) -> list:
    """Entries to play whose first side is all there is to read."""
    out = []
    for one in entries:
        if isinstance(one, Turns):
            out.append(Turns(tuple(one_sided(one.entries))))
        else:
            out.append(one._replace(side2=(None,) * len(one.side1)))
    return out


def map_sides(fn: Any, entries: Any, axis: int = 0) -> list:
    """`fn(array, axis of examples)` on all arrays of a recording."""
    out = []
    for entry in entries:
        if isinstance(entry, Turns):
            out.append(Turns(tuple(map_sides(fn, entry.entries, axis + 1))))
        else:
            side1, side2 = jax.tree.map(lambda a: fn(a, axis), (entry.side1, entry.side2))
            both = (entry.numbers1, entry.numbers2)
            numbers1, numbers2 = jax.tree.map(lambda a: fn(a, axis + 1), both)
            out.append(Sides(side1, side2, entry.maker, entry.level, numbers1, numbers2))
    return out


def prepared(entries1: Any, entries2: Any, most: int) -> tuple[list, list]:
    """Both recordings (or twice one) with what nodes read of one side, made once for all tiles.

    most: numbers that may be kept; of more, tiles make their own.
    """
    made = jax.eval_shape(lambda: _prepared(entries1, entries2))
    count = sum(a.size for a in jax.tree.leaves(made))
    sides = sum(a.size for a in jax.tree.leaves((entries1, entries2)))
    return _prepared(entries1, entries2) if count - sides <= most else (entries1, entries2)


def _prepared(entries1: Any, entries2: Any) -> tuple[list, list]:
    same, out1, out2 = entries2 is entries1, [], []
    for one, two in zip(entries1, entries2, strict=True):
        if isinstance(one, Turns):

            def turn(both):
                first, second = both
                return _prepared(first, first if second is None else second)

            first, second = jax.lax.map(turn, (one.entries, None if same else two.entries))
            one, two = Turns(tuple(first)), Turns(tuple(second))
        elif one.maker is not None:
            found = one.maker(one.side1[0], *(() if same else two.side1))
            if found is not None:
                one = one._replace(level=found.level, numbers1=found.sides[0])
                two = two._replace(numbers1=found.sides[-1])
        out1.append(one)
        out2.append(two)
    return out1, out2


class Tape:
    """Results of a side pass in the order the walk visits the nodes.

    keep: must variances be kept for nodes that carry the gap. entries: of a recording to play; None
    starts a recording. roots: do the nodes read square roots of the entries.
    """

    def __init__(self, keep: bool, entries: Any = None, roots: bool = False):
        self.keep = keep
        self.roots = roots
        self.playing = entries is not None
        self.entries = list(entries) if self.playing else []
        self.scales: list[tuple[int, ...]] = []  # of the planes at each entry of a recording
        self.stacked: Any = None  # how entries are stacked (`sides.stacked`), if they are
        self.place = 0

    def holding(self, entries: Any) -> Tape:
        """A recording like this with other entries: of more examples, or of fewer."""
        tape = Tape(self.keep, entries, self.roots)
        tape.playing, tape.scales, tape.stacked = False, self.scales, self.stacked
        return tape

    def map(self, fn: Any, entries: Any) -> list:
        """`fn(array, axis of examples)` on all arrays of entries like those of this recording."""
        if self.stacked is None:
            return map_sides(fn, entries)
        return jax.tree.map(lambda a: fn(a, 0), entries)

    def next(self) -> Any:
        """The entry of the node that is visited."""
        self.place += 1
        return self.entries[self.place - 1]

    def record(self, node: Node, state: Any, need: Need) -> Any:
        """Keep what the rule of the node will read beside its tile."""
        alone = join_needs(node.needs(Need(join_needs(need).tile, Layout.NONE))).side
        states = state if node.many_inputs else [state]
        kept = []
        for s in states:
            layout = max(alone, Layout.DIAGONAL if self.keep else Layout.NONE)
            layout = min(layout, s.side_layout)
            kept.append(None if layout == Layout.NONE else _in_layout(s, layout))
        self.append(Sides(tuple(kept), maker=node.side_maker), state)
        return state

    def play(self, state: Any) -> Any:
        """The state with the sides that were recorded for its node."""
        sides = self.next()
        if isinstance(state, (list, tuple)):
            pairs = zip(state, sides.side1, sides.side2, strict=True)
            return [_with_sides(s, a, b) for s, a, b in pairs]
        state = _with_sides(state, sides.side1[0], sides.side2[0])
        if sides.level is None:
            return state
        return state.replace(prepared=Prepared(sides.level, (sides.numbers1, sides.numbers2)))

    def append(self, entry: Any, state: Any) -> None:
        """One more entry, of a node before which the state is this."""
        planes = (state[0] if isinstance(state, (list, tuple)) else state).planes
        self.entries.append(entry)
        self.scales.append(() if planes is None else tuple(a.scale for a in planes.axes))


def _in_layout(state: Any, layout: Layout) -> Any:
    reduce = layout == Layout.DIAGONAL and state.side_layout == Layout.FULL
    return spatial_diagonal(state.side1, 1) if reduce else state.side1


def _with_sides(state: Any, side1: Any, side2: Any) -> Any:
    if side1 is None:
        return state
    layout = Layout.PLANES
    if state.layout != Layout.PLANES:
        full = side1.ndim - 1 > len(state.in1.spatial_axes)
        layout = Layout.FULL if full else Layout.DIAGONAL
    return state.replace(side1=side1, side2=side2, side_layout=layout)
