"""Aggregate: sums over the predecessors of each node of a graph.

y_j = sum_i A_ij x_i for each example's own graph A, so K' = A1^T K A2 (Du et al. 2019, sec. 3.1,
graph neural tangent kernel; Walker & Glocker 2019).
"""

from __future__ import annotations

import enum
import math
import string
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tangents._core import precision
from tangents._infinite.graph import Node, node
from tangents._infinite.layer import Layer
from tangents._infinite.layers.axes import check_axes, check_spatial
from tangents._infinite.layers.linear import linear_rule
from tangents._infinite.layers.pool import needs_all_pairs


class AggregateImplementation(enum.Enum):
    """How a pattern is given: adjacency matrices, or lists of edges."""

    DENSE = "DENSE"
    SPARSE = "SPARSE"


def keep_pattern(pattern: Any) -> Any:
    """The default `to_dense`: the pattern holds adjacency matrices already."""
    return pattern


@node
class AggregateNode(Node):
    """Sum over predecessors."""

    aggregate_axis: tuple[int, ...] | None = None
    batch_axis: int = 0
    channel_axis: int = -1
    to_dense: Callable[[Any], Any] = keep_pattern
    implementation: AggregateImplementation = AggregateImplementation.DENSE
    name = "Aggregate"

    def input_axes(self):
        return self.batch_axis, self.channel_axis

    def _axes(self, ndim: int) -> tuple[int, ...]:
        batch, channel = self.batch_axis % ndim, self.channel_axis % ndim
        if self.aggregate_axis is None:
            return tuple(i for i in range(ndim) if i not in (batch, channel))
        axes = tuple(a % ndim for a in self.aggregate_axis)
        if batch in axes or channel in axes:
            raise ValueError(
                f"Aggregate: aggregate_axis={self.aggregate_axis} must be among the spatial axes, "
                f"not the batch axis ({batch}) or the channel axis ({channel})"
            )
        return axes

    def signal(self, signal):
        check_axes(self, signal)
        check_spatial(self, signal)
        self._axes(len(signal.shape))
        return super().signal(signal)

    def _dense(self, x, pattern, axes):
        A = jnp.asarray(self.to_dense(pattern), x.dtype)
        sizes = tuple(x.shape[a] for a in axes)
        if A.ndim != 1 + 2 * len(axes) or A.shape[1:] != sizes + sizes:
            raise ValueError(
                f"Aggregate: pattern has shape {A.shape}, and must have shape "
                f"{(x.shape[self.batch_axis], *sizes, *sizes)}: batch, the axes as sources, then "
                "again as targets"
            )
        letters = string.ascii_lowercase[: x.ndim]
        batch = letters[self.batch_axis % x.ndim]
        source = "".join(letters[a] for a in axes)
        target = source.upper()
        out = "".join(c.upper() if c in source else c for c in letters)
        spec = f"{letters},{batch}{source}{target}->{out}"
        return jnp.einsum(spec, x, A, precision=precision.DEFAULT)

    def _sparse(self, x, pattern, axes):
        edges = pattern[..., None, :] if pattern.ndim == 3 else pattern
        if edges.ndim != 4 or edges.shape[-2:] != (len(axes), 2):
            raise ValueError(
                f"Aggregate: pattern has shape {pattern.shape}, and must be (batch, edges, "
                f"{len(axes)}, 2) for {len(axes)} aggregated axes (tails, then heads)"
            )
        sizes = [x.shape[a] for a in axes]
        batch = self.batch_axis % x.ndim
        rest = [i for i in range(x.ndim) if i != batch and i not in axes]
        order = (batch, *axes, *rest)
        moved = jnp.transpose(x, order)
        flat = moved.reshape((moved.shape[0], math.prod(sizes), -1))
        # A negative head goes nowhere: padding. A negative tail beside a proper head is the last
        # node, whichever of its entries is negative: so it is in neural-tangents.
        tail_there, there = jnp.all(edges[..., 0] >= 0, axis=-1), jnp.all(edges[..., 1] >= 0, -1)
        place = jnp.zeros((*edges.shape[:2], 2), edges.dtype)
        for k, size in enumerate(sizes):
            place = place * size + edges[:, :, k, :] % size
        tail = jnp.where(tail_there, place[..., 0], math.prod(sizes) - 1)

        def one(example, tails, heads, is_edge):
            read = jnp.where(is_edge[:, None], example[tails], jnp.zeros((), x.dtype))
            return jnp.zeros_like(example).at[heads].add(read)

        y = jax.vmap(one)(flat, tail, place[..., 1], there).reshape(moved.shape)
        return jnp.transpose(y, [order.index(i) for i in range(x.ndim)])

    def apply(self, params, x, *, mask=None, pattern=None, **kwargs):
        if pattern is None:
            return x
        axes = self._axes(x.ndim)
        if self.implementation == AggregateImplementation.SPARSE:
            return self._sparse(x, pattern, axes)
        return self._dense(x, pattern, axes)

    def needs(self, need):
        return needs_all_pairs(need)

    def rule(self, context, tile):
        p1, p2 = context.pattern1, context.pattern2
        if (p1 is None) != (p2 is None):
            raise NotImplementedError(
                "Aggregate: one pattern of the pair is None and the other is not: give both or none"
            )
        if p1 is None:
            return tile
        return linear_rule(
            context,
            tile,
            lambda x: self.apply((), x, pattern=p1),
            lambda x: self.apply((), x, pattern=p2),
        )


def Aggregate(
    aggregate_axis: int | Sequence[int] | None = None,
    batch_axis: int = 0,
    channel_axis: int = -1,
    to_dense: Callable[[Any], Any] = keep_pattern,
    implementation: Any = "DENSE",
) -> Layer:
    """Sum over the predecessors of each node of a graph: y_j = Σ_i A_ij x_i.

    The graphs come with the inputs: `apply_fn(params, x, pattern=A)`, and
    `kernel_fn(x1, x2, pattern=(A1, A2))`, also with x2=None. Without a pattern the identity.

    Args:
      aggregate_axis: axes of the graph's nodes; None: all spatial axes.
      batch_axis: batch axis of the input.
      channel_axis: channel axis of the input.
      to_dense: function from a pattern to adjacency matrices.
      implementation: 'DENSE': A is (batch, *axes, *axes), sources before targets. 'SPARSE': integer
        edges (batch, edges, number of axes, 2), or (batch, edges, 2) for one axis, each a tail and
        a head; edges with a negative entry in the head are padding. (A tail with a negative entry
        beside a proper head is the last node, as in neural-tangents: pad both with -1.)

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import stax
        >>> _, aggregate, _ = stax.Aggregate()
        >>> chain = jnp.array([[[0.0, 1.0], [0.0, 0.0]]])  # one edge, from node 0 to node 1
        >>> aggregate((), jnp.array([[[5.0], [7.0]]]), pattern=chain).ravel().tolist()
        [0.0, 5.0]
    """
    implementation = AggregateImplementation(implementation)
    if implementation == AggregateImplementation.SPARSE:
        warnings.warn(
            "Aggregate with implementation='SPARSE' saves memory in apply_fn; kernels are dense in "
            "the nodes all the same.",
            stacklevel=2,
        )
    if isinstance(aggregate_axis, int):
        aggregate_axis = (aggregate_axis,)
    axes = None if aggregate_axis is None else tuple(aggregate_axis)
    return Layer(AggregateNode(axes, batch_axis, channel_axis, to_dense, implementation))
