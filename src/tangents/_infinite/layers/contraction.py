"""DotGeneral: products with constants.

y = dot_general(lhs, x) or dot_general(x, rhs): linear and the same in every channel, so
K' = L1 K L2^T (see `linear.py`).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from tangents._infinite.graph import Node, hyper, node
from tangents._infinite.layer import Layer
from tangents._infinite.layers.axes import check_axes
from tangents._infinite.layers.linear import linear_rule
from tangents._infinite.layers.pool import needs_all_pairs


def _canonical(dimension_numbers: Any) -> tuple:
    (lc, rc), (lb, rb) = dimension_numbers
    return (tuple(lc), tuple(rc)), (tuple(lb), tuple(rb))


@node
class DotGeneralNode(Node):
    """lax.dot_general with a constant."""

    other: Any = hyper()
    is_lhs: bool = False
    dimension_numbers: Any = (((), ()), ((), ()))
    precision: Any = None
    batch_axis: int = 0
    channel_axis: int = -1
    name = "DotGeneral"

    def input_axes(self):
        return self.batch_axis, self.channel_axis

    def _own(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Contracted and batched axes of the input."""
        contract, batch = self.dimension_numbers
        i = 1 if self.is_lhs else 0
        return contract[i], batch[i]

    @property
    def mixes_examples(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        # Products batched over examples are tied to their places in the batch.
        contract, batch = self._own()
        return bool(contract or batch)

    def _origin(self, ndim: int) -> list[Any]:
        """For each axis of the output the axis of the input it comes from, or None."""
        if self.other is None or np.ndim(self.other) == 0:
            return list(range(ndim))
        contract, batch = self._own()
        contract, batch = [a % ndim for a in contract], [a % ndim for a in batch]
        i = 0 if self.is_lhs else 1
        other_ndim = np.ndim(self.other)
        used = len(self.dimension_numbers[0][i]) + len(self.dimension_numbers[1][i])
        own = [a for a in range(ndim) if a not in contract and a not in batch]
        new = [None] * (other_ndim - used)
        return [*batch, *new, *own] if self.is_lhs else [*batch, *own, *new]

    def _product(self, x):
        other = self.other
        if other is None:
            return x
        other = jnp.asarray(other, x.dtype)
        if other.ndim == 0:
            return x * other
        args = (other, x) if self.is_lhs else (x, other)
        return lax.dot_general(*args, self.dimension_numbers, precision=self.precision)

    def out_shape(self, shape):
        if self.other is None:
            return tuple(shape)
        origin = self._origin(len(shape))
        new = self._new_sizes()
        return tuple(new.pop(0) if o is None else shape[o] for o in origin)

    def _new_sizes(self) -> list[int]:
        i = 0 if self.is_lhs else 1
        used = (*self.dimension_numbers[0][i], *self.dimension_numbers[1][i])
        shape = np.shape(self.other)
        used = [u % max(len(shape), 1) for u in used]
        return [s for a, s in enumerate(shape) if a not in used]

    def signal(self, signal):
        check_axes(self, signal)
        origin = self._origin(len(signal.shape))
        for kind, axis in (("channel", signal.channel_axis), ("batch", signal.batch_axis)):
            if axis not in origin:
                raise ValueError(
                    f"DotGeneral: the {kind} axis ({axis}) of the input cannot be contracted: "
                    "the infinite-width limit needs it"
                )
        _, batch = self._own()
        if signal.channel_axis in [a % len(signal.shape) for a in batch]:
            raise ValueError("DotGeneral: the channel axis of the input cannot be a batch axis")
        return signal.replace(
            shape=self.out_shape(signal.shape),
            batch_axis=origin.index(signal.batch_axis),
            channel_axis=origin.index(signal.channel_axis),
        )

    def apply(self, params, x, *, mask=None, **kwargs):
        return self._product(x)

    def mask_out(self, mask, shape):
        if self.other is None or np.ndim(self.other) == 0:
            return mask
        # Missing where everything that is summed is.
        there = jnp.broadcast_to(~mask, shape).astype(jnp.float32)
        ones = jnp.ones(np.shape(self.other), jnp.float32)
        node = DotGeneralNode(
            ones, self.is_lhs, self.dimension_numbers, None, self.batch_axis, self.channel_axis
        )
        return node._product(there) == 0

    def needs(self, need):
        contract, _ = self._own()
        mixes = bool(contract) or bool(self.other is not None and self._new_sizes())
        return needs_all_pairs(need) if mixes else need

    def rule(self, context, tile):
        return linear_rule(context, tile, self._product, self._product)


def DotGeneral(
    *,
    lhs: Any = None,
    rhs: Any = None,
    dimension_numbers: Any = (((), ()), ((), ())),
    precision: Any = None,
    batch_axis: int = 0,
    channel_axis: int = -1,
) -> Layer:
    """Product with a constant, `jax.lax.dot_general(lhs, x)` or `jax.lax.dot_general(x, rhs)`.

    Args:
      lhs: constant on the left, or None.
      rhs: constant on the right, or None; without either the layer is the identity.
      dimension_numbers: as in `jax.lax.dot_general`, of left and right in this order.
      precision: precision of the product.
      batch_axis: batch axis of the input.
      channel_axis: channel axis of the input; it can be neither contracted nor batched.

    Raises:
      ValueError: if both constants are given.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import stax
        >>> halve = jnp.full((4,), 0.25)
        >>> layer = stax.DotGeneral(rhs=halve, dimension_numbers=(((1,), (0,)), ((), ())))
        >>> layer[1]((), jnp.ones((2, 4, 3))).shape
        (2, 3)
    """
    if lhs is not None and rhs is not None:
        raise ValueError("DotGeneral: give lhs or rhs, not both: the other one is the input")
    other = rhs if lhs is None else lhs
    node = DotGeneralNode(
        None if other is None else jnp.asarray(other),
        lhs is not None,
        _canonical(dimension_numbers),
        precision,
        batch_axis,
        channel_axis,
    )
    return Layer(node)


def kernel_dot_general(kernel, other1, other2, is_lhs, dimension_numbers):
    """`Kernel.dot_general`: constants that may differ between x1 and x2."""
    axes = (kernel.batch_axis, kernel.channel_axis)
    node = TwoConstantsNode(
        None if other1 is None else jnp.asarray(other1),
        None if other2 is None else jnp.asarray(other2),
        is_lhs,
        _canonical(dimension_numbers),
        *axes,
    )
    return kernel.through(node)


@node
class TwoConstantsNode(Node):
    """dot_general with one constant for x1 and another for x2."""

    other1: Any = hyper()
    other2: Any = hyper()
    is_lhs: bool = False
    dimension_numbers: Any = (((), ()), ((), ()))
    batch_axis: int = 0
    channel_axis: int = -1
    name = "Kernel.dot_general"

    def _nodes(self):
        rest = (self.is_lhs, self.dimension_numbers, None, self.batch_axis, self.channel_axis)
        return DotGeneralNode(self.other1, *rest), DotGeneralNode(self.other2, *rest)

    def signal(self, signal):
        first, second = self._nodes()
        return (second if first.other is None else first).signal(signal)

    def needs(self, need):
        first, second = self._nodes()
        return first.needs(need).join(second.needs(need))

    def rule(self, context, tile):
        first, second = self._nodes()
        return linear_rule(context, tile, first._product, second._product)
