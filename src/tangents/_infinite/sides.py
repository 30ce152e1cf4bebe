"""What the layers of a segment read of variances, laid out for a group of pairs (`segments.py`).

Either the variances of both sides, or, where all layers read sqrt(var1 var2) alone and no
derivatives are taken, these norms: one array instead of two.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tangents._infinite.planes import Axis, arrange, at_offset
from tangents._infinite.tape import Tape, join_sides, map_sides, one_sided
from tangents._infinite.tile import Picked


@dataclasses.dataclass(frozen=True)
class Pairs:
    """A group of pairs: numbers of the examples of both sides.

    same: boolean (size,), pairs of one example in one draw; or None.
    """

    first: Any
    second: Any
    size: int
    same: Any


class _Laid(NamedTuple):
    """Entries of a tape laid out for a group of pairs, all of one shape and scale in one array.

    stacks: `(entries, *spatial, Q)`. place: which stack and entries of it each leaf of the tape is.
    scales: of the stacks along the first axis. leading: axes of each leaf before that of examples.
    """

    stacks: list
    place: list[tuple[int, int, int]]
    scales: list[int]
    leading: list[tuple[int, ...]]
    tree: Any

    def entries(self, stacks: list) -> list:
        """The entries of the tape, of these stacks."""
        leaves = [
            stacks[k][start:end].reshape((*leading, *stacks[k].shape[1:]))
            for (k, start, end), leading in zip(self.place, self.leading, strict=True)
        ]
        return jax.tree.unflatten(self.tree, leaves)

    def cut(self, axis: Axis, offset: Any) -> list:
        """The stacks of side 2 at one offset of the looped axis."""
        return [
            at_offset(stack, offset, scale, axis.planes * scale, axis=1)
            for stack, scale in zip(self.stacks, self.scales, strict=True)
        ]


def _laid_out(tape: Tape, index: Any, axes: tuple[Axis, ...], side: int) -> _Laid:
    """A tape of all examples for a group of pairs; index: numbers of the examples of one side."""
    leaves, tree = jax.tree.flatten(tape.entries)
    of_examples = jax.tree.leaves(map_sides(lambda a, axis: axis, tape.entries))
    pairs = zip(tape.entries, tape.scales, strict=True)
    scales = [s for entry, s in pairs for _ in jax.tree.leaves(entry)]
    each = list(zip(leaves, of_examples, scales, strict=True))
    turned = {(leaf.shape[axis + 1 :], scale) for leaf, axis, scale in each if axis}
    alike: dict[Any, list] = {}
    place: list[Any] = []
    for n, (leaf, axis, scale) in enumerate(each):
        flat = leaf.reshape((-1, *leaf.shape[axis:]))
        kind = (leaf.shape[axis + 1 :], scale)
        # A few layers without a run are equal kernels if each reads an array of its own.
        kind = (*kind, None if kind in turned else n)
        stack = alike.setdefault(kind, [])
        start = sum(len(other) for other in stack)
        stack.append(flat)
        place.append((list(alike).index(kind), start, start + len(flat)))
    stacks = []
    for (_, scale, _), stack in alike.items():
        here = [dataclasses.replace(a, scale=s) for a, s in zip(axes, scale, strict=True)]
        some = jnp.take(jnp.concatenate(stack), index, axis=1, mode="clip")
        stacks.append(jax.vmap(lambda a, here=here: arrange(a, here, side))(some))
    leading = [leaf.shape[:axis] for leaf, axis in zip(leaves, of_examples, strict=True)]
    # Fused into the layers that read them, these gathers came out wrong on CPU (JAX 0.10.2).
    stacks = lax.optimization_barrier(stacks)
    return _Laid(stacks, place, [scale[0] if scale else 1 for _, scale, _ in alike], leading, tree)


def variances(tape1: Tape, tape2: Tape, pairs: Pairs, axes: tuple[Axis, ...]) -> Any:
    """`offset -> (entries to play, offset)`."""
    sides1 = _laid_out(tape1, pairs.first, axes, 1)
    sides2 = _laid_out(tape2, pairs.second, axes, 2)

    def at(offset):
        cut1, cut2 = sides1.stacks, sides2.stacks
        if offset is not None:
            # Nothing made of the sides is moved out of the loop: it is less to read them.
            cut1, offset = lax.optimization_barrier((cut1, offset))
            cut2 = sides2.cut(axes[0], offset)
        return join_sides(sides1.entries(cut1), sides2.entries(cut2)), offset

    return at


class _Stacked(NamedTuple):
    """Where the entries of a tape are in stacks of them.

    kinds: `(scale, numbers of leaves)` of each stack. leading: axes of each leaf before that of
    examples. tree: of the entries.
    """

    kinds: list[tuple[tuple[int, ...], list[int]]]
    leading: list[tuple[int, ...]]
    tree: Any


def stacked(tape: Tape) -> Tape:
    """A recording with the roots of its entries, all of one shape and scale in one array.

    entries: stacks `(examples, entries, *spatial)`.
    """
    leaves, tree = jax.tree.flatten(tape.entries)
    axes = jax.tree.leaves(map_sides(lambda a, axis: axis, tape.entries))
    pairs = zip(tape.entries, tape.scales, strict=True)
    scales = [s for entry, s in pairs for _ in jax.tree.leaves(entry)]
    alike: dict[Any, list[int]] = {}
    for n, (leaf, axis, scale) in enumerate(zip(leaves, axes, scales, strict=True)):
        alike.setdefault((leaf.shape[axis + 1 :], scale), []).append(n)

    def root(n):
        each, k = jnp.sqrt(leaves[n]), axes[n]
        if k == 0:
            return each[:, None]
        return jnp.moveaxis(each.reshape((-1, *each.shape[k:])), 1, 0)

    stacks = [jnp.concatenate([root(n) for n in of], axis=1) for of in alike.values()]
    leading = [leaf.shape[:axis] for leaf, axis in zip(leaves, axes, strict=True)]
    kinds = [(scale, of) for (_, scale), of in alike.items()]
    out = tape.holding(stacks)
    out.stacked = _Stacked(kinds, leading, tree)
    return out


def norms(tape1: Tape, tape2: Tape, pairs: Pairs, axes: tuple[Axis, ...]) -> Any:
    """`offset -> (entries to play, offset)` of stacks of roots."""
    kinds, leading, tree = tape1.stacked
    laid = []
    for one, two, (scale, _) in zip(tape1.entries, tape2.entries, kinds, strict=True):
        here = tuple(dataclasses.replace(a, scale=s) for a, s in zip(axes, scale, strict=True))
        first = jnp.take(one, pairs.first, axis=0, mode="clip")
        second = jnp.take(two, pairs.second, axis=0, mode="clip")
        laid.append((first, jax.vmap(lambda a, here=here: arrange(a, here, 2), 1)(second)))

    def at(offset):
        given = laid
        if offset is not None:
            # Nothing made of the sides is moved out of the loop: it is less to read them.
            given, offset = lax.optimization_barrier((laid, offset))
        out: list[Any] = [None] * len(leading)
        for (one, two), (scale, numbers) in zip(given, kinds, strict=True):
            if offset is not None:
                two = at_offset(two, offset, scale[0], axes[0].planes * scale[0], axis=1)
            each = two.reshape((*two.shape[:-1], -1, pairs.size))
            stack = (jnp.moveaxis(one, 0, -1)[..., None, :] * each).reshape(two.shape)
            stack, place = lax.optimization_barrier(stack), 0
            for n in numbers:
                count = math.prod(leading[n])
                if leading[n]:
                    out[n] = stack[place : place + count].reshape((*leading[n], *stack.shape[1:]))
                else:
                    # Cut out by the layer: a number that it is given, so equal layers are equal.
                    out[n] = Picked(stack, jnp.uint32(place))
                place += count
        return one_sided(jax.tree.unflatten(tree, out)), offset

    return at
