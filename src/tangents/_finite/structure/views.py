"""Views: which entries of a weight an operand consists of, as offset and strides.

What happens to a weight before it meets data is its prologue. Transposes, reshapes, slices,
reversals and broadcasts only move entries about; they are followed here as strides into the flat
weight, so that two uses of one weight can be matched entry by entry even if one is transposed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class View:
    """Entry (i, j, ...) of an operand is entry `offset + Σ iₖ strideₖ` of the flat root."""

    root: int
    """Index of the weight (or of a value computed from weights only) that is viewed."""
    offset: int
    axes: tuple[tuple[int, int], ...]
    """(size, stride) of each axis; stride 0 where entries repeat."""
    loops: tuple[tuple[int, int, int], ...] = ()
    """(depth, size, stride) of enclosing loops that step through the root."""
    scaled: bool = False
    """Whether a scalar known only at run time multiplies it."""
    entry: int = -1
    """Inside a loop or branch: the operand through which the root came in."""

    @classmethod
    def whole(cls, root: int, shape: Sequence[int]) -> View:
        """All of a root, in its own layout."""
        return cls(root, 0, tuple(zip(shape, contiguous(shape), strict=True)))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the operand."""
        return tuple(size for size, _ in self.axes)

    def transpose(self, permutation: Sequence[int]) -> View:
        """Axes in another order."""
        return replace(self, axes=tuple(self.axes[p] for p in permutation))

    def broadcast(self, shape: Sequence[int], dimensions: Sequence[int]) -> View:
        """Axis k goes to axis `dimensions[k]` of `shape`; along the others entries repeat."""
        axes = [(size, 0) for size in shape]
        for (size, stride), to in zip(self.axes, dimensions, strict=True):
            axes[to] = (shape[to], 0 if size == 1 else stride)
        return replace(self, axes=tuple(axes))

    def slice(self, starts: Sequence[int], limits: Sequence[int], steps: Sequence[int]) -> View:
        """Every `step`-th entry from `start` to `limit`, along each axis."""
        offset, axes = self.offset, []
        for (_, stride), start, limit, step in zip(self.axes, starts, limits, steps, strict=True):
            offset += start * stride
            axes.append((max(0, -(-(limit - start) // step)), stride * step))
        return replace(self, offset=offset, axes=tuple(axes))

    def reverse(self, dimensions: Sequence[int]) -> View:
        """Some axes read backwards."""
        offset, axes = self.offset, list(self.axes)
        for axis in dimensions:
            size, stride = axes[axis]
            offset += (size - 1) * stride
            axes[axis] = (size, -stride)
        return replace(self, offset=offset, axes=tuple(axes))

    def reshape(self, shape: Sequence[int]) -> View | None:
        """The same entries under another shape; None if strides cannot express it."""
        old = [axis for axis in self.axes if axis[0] != 1]
        new = [size for size in shape if size != 1]
        if 0 in shape:
            return None
        result: list[tuple[int, int]] = []
        while new:
            # The smallest groups of old and new axes with one number of entries.
            taken, wanted = [old.pop(0)], [new.pop(0)]
            while math.prod(a for a, _ in taken) != math.prod(wanted):
                if math.prod(a for a, _ in taken) < math.prod(wanted):
                    taken.append(old.pop(0))
                else:
                    wanted.append(new.pop(0))
            for (_, outer), (size, inner) in itertools.pairwise(taken):
                if outer != size * inner:
                    return None
            stride = taken[-1][1]
            group = []
            for size in reversed(wanted):
                group.append((size, stride))
                stride *= size
            result += reversed(group)
        entries = iter(result)
        return replace(self, axes=tuple(next(entries) if size != 1 else (1, 0) for size in shape))

    def step_through(self, depth: int) -> View:
        """What a loop at `depth` sees of it at one step: the first axis becomes the loop's."""
        (size, stride), *rest = self.axes
        return replace(self, axes=tuple(rest), loops=(*self.loops, (depth, size, stride)))


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides of a shape."""
    strides, stride = [], 1
    for size in reversed(shape):
        strides.append(stride)
        stride *= size
    return tuple(reversed(strides))


def disjoint(
    shape: Sequence[int],
    first: tuple[int, Sequence[tuple[int, int]]],
    second: tuple[int, Sequence[tuple[int, int]]],
) -> bool:
    """Whether two sets of entries, each (offset, (size, stride)s), surely have none in common.

    Each is enclosed in a box of the root's index space; the sets are disjoint if the boxes are.
    """
    boxes = [_box(shape, *entries) for entries in (first, second)]
    if boxes[0] is None or boxes[1] is None:
        return False
    return any(
        a_high < b_low or b_high < a_low
        for (a_low, a_high), (b_low, b_high) in zip(boxes[0], boxes[1], strict=True)
    )


def _box(
    shape: Sequence[int], offset: int, axes: Sequence[tuple[int, int]]
) -> list[tuple[int, int]] | None:
    offset += sum((size - 1) * stride for size, stride in axes if stride < 0)
    low, strides = [], contiguous(shape)
    for size, stride in zip(shape, strides, strict=True):
        low.append((offset // stride) % size)
    high = list(low)
    for size, stride in axes:
        reach = (size - 1) * abs(stride)
        if reach == 0:
            continue
        for axis, unit in enumerate(strides):
            if shape[axis] > 1 and abs(stride) % unit == 0:
                high[axis] += reach // unit
                break
    if any(top >= size for top, size in zip(high, shape, strict=True)):
        return None  # an axis of the view runs over several of the root
    return list(zip(low, high, strict=True))
