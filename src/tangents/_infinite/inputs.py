"""From inputs to the first state of the walk: second moments of the inputs over channels.

    K(x1, x2) = <x1, x2> / channels,  Theta = 0,

for every pair of positions (or equal positions only). Tokens of an `Embedding` are one-hot
vectors: K(t1, t2) = 1 if t1 = t2, else 0.
"""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from tangents._core import precision
from tangents._infinite.execute import State
from tangents._infinite.input_gap import with_gap
from tangents._infinite.masking import MaskedArray, zero_fill
from tangents._infinite.tile import Layout, Need, Signal, Tile

TOKENS = "tokens"
"""Channel axis of an integer input whose entries are one-hot vectors (see `Embedding`)."""


def check_inputs(x: Any, name: str) -> Any:
    """Arrays of at least two axes, in canonical floating point; integers stay for tokens."""
    if isinstance(x, (list, tuple)):
        return [check_inputs(u, name) for u in x]
    if isinstance(x, MaskedArray):
        return x.replace(masked_value=check_inputs(x.masked_value, name))
    if not isinstance(x, (jax.Array, np.ndarray)):
        raise TypeError(
            f"kernel_fn: {name} must be an array, a MaskedArray, a (nested) list of them or a "
            f"Kernel, and is of type {type(x).__name__}"
        )
    if x.ndim < 2:
        raise ValueError(
            f"kernel_fn: {name} must have a batch and a channel axis, and has shape {x.shape}: "
            "add the missing axis"
        )
    return jnp.asarray(x)


def canonical(x: jax.Array) -> jax.Array:
    """The input in the canonical floating-point type (float64 under x64, else float32)."""
    return x.astype(jnp.zeros(()).dtype)


def collapse_mask(mask: Any, channel_axis: int) -> Any:
    """A mask that is the same in all channels, with one; one that is not stays (if it is known)."""
    if mask is None or isinstance(mask, Tracer):
        return mask
    some = jnp.any(mask, axis=channel_axis, keepdims=True)
    every = jnp.all(mask, axis=channel_axis, keepdims=True)
    return every if bool(jnp.array_equal(some, every)) else mask


def flat(x: Any, batch_axis: int) -> Any:
    """An input or mask whose channels mean nothing, as (batch, features)."""
    if x is None:
        return None
    x = jnp.moveaxis(x, batch_axis, 0)
    return x.reshape((x.shape[0], -1))


def warn_batch_axis(batch_axis: int) -> None:
    """The kernel has its batch axes in front wherever they were in the input."""
    if batch_axis != 0:
        warnings.warn(
            f"The batch axis of the input is {batch_axis}, not 0: kernels have their batch axes "
            "in front wherever they are in the input.",
            stacklevel=3,
        )


def _moment(x1, x2, layout: Layout, all_pairs: bool, width) -> jax.Array:
    """Second moments of inputs with axes (batch, *spatial, channel)."""
    n = x1.ndim - 2
    if layout == Layout.DIAGONAL or n == 0:
        # Equal positions: spatial axes are batch axes of the contraction.
        s = "abcdefgh"[:n]
        spec = f"x{s}z,y{s}z->xy{s}" if all_pairs else f"x{s}z,x{s}z->x{s}"
    else:
        s, t = "abcdefgh"[:n], "ABCDEFGH"[:n]
        both = "".join(u + v for u, v in zip(s, t, strict=True))
        spec = f"x{s}z,y{t}z->xy{both}" if all_pairs else f"x{s}z,x{t}z->x{both}"
    return jnp.einsum(spec, x1, x2, precision=precision.DEFAULT) / width


def _token_moment(t1, t2, layout: Layout, all_pairs: bool) -> jax.Array:
    one = canonical(jnp.ones(()))
    n = t1.ndim - 1
    if layout == Layout.FULL:
        t1 = jnp.expand_dims(t1, tuple(2 + 2 * i for i in range(n)))
        t2 = jnp.expand_dims(t2, tuple(1 + 2 * i for i in range(n)))
    if all_pairs:
        t1, t2 = t1[:, None], t2[None]
    return jnp.where(t1 == t2, one, 0 * one)


def input_state(
    x1: Any,
    x2: Any,
    mask1: Any,
    mask2: Any,
    axes: tuple[int, Any],
    need: Need,
    x1_is_x2: Any,
    want_ntk: bool,
    side_pairs: bool,
    index: tuple[Any, Any],
    want_gap: bool = False,
) -> State:
    """The state at an input. `x2=None` means x1; `need` says in which layouts.

    want_gap: start the angular gap, where the layouts that are needed can carry it.
    """
    batch_axis, channel_axis = axes
    if channel_axis is None:
        x1, mask1 = flat(x1, batch_axis), flat(mask1, batch_axis)
        x2, mask2 = None if x2 is None else flat(x2, batch_axis), flat(mask2, batch_axis)
        batch_axis, channel_axis = 0, -1
    tokens = channel_axis == TOKENS
    shared = x2 is None
    xs, masks, signals = [], [], []
    for x, mask in ((x1, mask1), (x1 if shared else x2, mask1 if shared else mask2)):
        if tokens:
            signal = Signal((*x.shape, 1), batch_axis, -1)
        else:
            signal = Signal(x.shape, batch_axis, channel_axis)
            x = zero_fill(canonical(x), mask)
            order = (signal.batch_axis, *signal.spatial_axes, signal.channel_axis)
            x = jnp.transpose(x, order)
        xs.append(x)
        masks.append(mask)
        signals.append(signal)

    def moment(a, b, layout, all_pairs):
        if tokens:
            return _token_moment(a, b, layout, all_pairs)
        return _moment(a, b, layout, all_pairs, signals[0].width)

    side1 = side2 = None
    if need.side > Layout.NONE:
        side1 = moment(xs[0], xs[0], need.side, side_pairs)
        side2 = None if shared else moment(xs[1], xs[1], need.side, side_pairs)
    cov12 = moment(xs[0], xs[1], need.tile, True)
    gap12 = None
    equal_positions = need.tile == Layout.DIAGONAL or not signals[0].spatial_axes
    if want_gap and not side_pairs and not tokens and equal_positions and side1 is not None:
        known = None if index[0] is None else x1_is_x2 & (index[0][:, None] == index[1][None])
        var1, var2 = side1[:, None], (side1 if side2 is None else side2)[None]
        cov12, gap12 = with_gap(xs[0], xs[1], cov12, var1, var2, known)
    return State(
        tile=Tile(cov12, jnp.zeros((), cov12.dtype) if want_ntk else None, gap12),
        side1=side1,
        side2=side2,
        mask1=masks[0],
        mask2=None if shared else masks[1],
        index1=index[0],
        index2=index[1],
        x1_is_x2=x1_is_x2,
        in1=signals[0],
        in2=signals[1],
        layout=need.tile,
        side_layout=need.side,
        side_pairs=side_pairs,
        shared=shared,
    )


class PerInput(tuple):
    """Values for several inputs, hashable (their own values may be tuples)."""


def input_states(plan: Any, x1, x2, mask1, mask2, x1_is_x2, index) -> Any:
    """States at the inputs, a list where the inputs are one."""

    def build(x1, x2, m1, m2, axes, need):
        if isinstance(x1, list):
            n = len(x1)
            x2 = [None] * n if x2 is None else x2
            m1 = [None] * n if m1 is None else m1
            m2 = [None] * n if m2 is None else m2
            need = need if isinstance(need, PerInput) else [need] * n
            return [build(*args) for args in zip(x1, x2, m1, m2, axes, need, strict=True)]
        return input_state(
            x1,
            x2,
            m1,
            m2,
            axes,
            need,
            x1_is_x2,
            plan.want_ntk,
            plan.side_pairs,
            index,
            plan.want_gap,
        )

    return build(x1, x2, mask1, mask2, plan.axes, plan.input_need)
