"""Where each primitive takes the axis of the examples: one line a primitive in `RULES`.

A rule gets the equation and the states of its inputs, none of them lost and one at least `Along`,
and returns the states of its outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from tangents._finite.independence.state import Along, Lost, Shared, State, mixed, unknown

Rule: TypeAlias = Callable[[Any, Sequence[State]], list[State]]


def _shape(atom: Any) -> tuple[int, ...]:
    return tuple(atom.aval.shape)


def _name(eqn: Any) -> str:
    return eqn.primitive.name


def _same(eqn: Any, state: State) -> list[State]:
    return [state] * len(eqn.outvars)


def common_axis(eqn: Any, states: Sequence[State]) -> int | Lost:
    """The axis that all inputs of one shape have their examples along; scalars go with any."""
    axes = {s.axis for s in states if isinstance(s, Along)}
    if len(axes) > 1:
        return Lost(f"`{_name(eqn)}` joins axes {sorted(axes)} of two inputs", True)
    (axis,) = axes
    for atom, state in zip(eqn.invars, states, strict=True):
        shape = _shape(atom)
        if isinstance(state, Shared) and shape and not state.is_uniform(axis):
            # A constant that has an entry for each example: a batch of one would have another.
            return unknown(_name(eqn), "joins examples with an array that differs from one to next")
    return axis


def elementwise(eqn: Any, states: Sequence[State]) -> list[State]:
    """Entry by entry."""
    axis = common_axis(eqn, states)
    return _same(eqn, axis if isinstance(axis, Lost) else Along(axis))


def _each(eqn: Any, states: Sequence[State]) -> list[State]:
    return list(states)


def _transpose(eqn: Any, states: Sequence[State]) -> list[State]:
    return [Along(eqn.params["permutation"].index(states[0].axis))]  # type: ignore[union-attr]


def _reshape(eqn: Any, states: Sequence[State]) -> list[State]:
    (state, *_), old, new = states, _shape(eqn.invars[0]), _shape(eqn.outvars[0])
    assert isinstance(state, Along)
    before, size = math.prod(old[: state.axis]), old[state.axis]
    for axis, n in enumerate(new):
        if n == size and math.prod(new[:axis]) == before:
            return [Along(axis)]
    return [unknown(_name(eqn), "merges the axis of the examples with another, or splits it")]


def _broadcast(eqn: Any, states: Sequence[State]) -> list[State]:
    (state, *_) = states
    assert isinstance(state, Along)
    return [Along(eqn.params["broadcast_dimensions"][state.axis])]


def _without(axis: int, gone: Sequence[int]) -> int:
    return axis - sum(a < axis for a in gone)


def _reduce(eqn: Any, states: Sequence[State]) -> list[State]:
    axis = common_axis(eqn, states)
    if isinstance(axis, Lost):
        return _same(eqn, axis)
    axes = eqn.params.get("axes", eqn.params.get("dimensions"))
    if axis in axes:
        return _same(eqn, mixed(_name(eqn), axis))
    return _same(eqn, Along(_without(axis, axes)))


def _squeeze(eqn: Any, states: Sequence[State]) -> list[State]:
    (state,) = states
    assert isinstance(state, Along)
    return [Along(_without(state.axis, eqn.params["dimensions"]))]


def _not_along(parameter: str) -> Rule:
    """Steps that work along one axis, or several, named by a parameter."""

    def rule(eqn: Any, states: Sequence[State]) -> list[State]:
        axis, along = common_axis(eqn, states), eqn.params[parameter]
        if not isinstance(axis, Lost):
            hit = axis in along if isinstance(along, tuple) else axis == along
            return _same(eqn, mixed(_name(eqn), axis) if hit else Along(axis))
        return _same(eqn, axis)

    return rule


def _dot_general(eqn: Any, states: Sequence[State]) -> list[State]:
    (contract, batch) = eqn.params["dimension_numbers"]
    sides = list(zip(eqn.invars, states, contract, batch, strict=True))
    places: list[int | Lost] = []
    start = len(batch[0])
    for k, (atom, state, summed, batched) in enumerate(sides):
        free = [a for a in range(len(_shape(atom))) if a not in (*summed, *batched)]
        other = states[1 - k]
        if isinstance(state, Along):
            if state.axis in summed:
                places.append(mixed(_name(eqn), state.axis))
            elif state.axis in batched:
                at = batched.index(state.axis)
                partner = batch[1 - k][at]
                if isinstance(other, Shared) and not other.is_uniform(partner):
                    return [unknown(_name(eqn), "multiplies each example by another array")]
                places.append(at)
            else:
                places.append(start + free.index(state.axis))
        start += len(free)
    lost = next((p for p in places if isinstance(p, Lost)), None)
    if lost is not None:
        return [lost]
    if len(set(places)) > 1:
        return [Lost("`dot_general` multiplies every example by every other", True)]
    (place, *_) = places
    assert isinstance(place, int)
    return [Along(place)]


def _convolution(eqn: Any, states: Sequence[State]) -> list[State]:
    numbers = eqn.params["dimension_numbers"]
    image, kernel = states
    plain = eqn.params["batch_group_count"] == 1 and isinstance(kernel, Shared)
    if plain and isinstance(image, Along) and image.axis == numbers.lhs_spec[0]:
        return [Along(numbers.out_spec[0])]
    return [unknown(_name(eqn), "has its examples elsewhere than in the batch of images")]


def _pad(eqn: Any, states: Sequence[State]) -> list[State]:
    axis = common_axis(eqn, states)
    if isinstance(axis, Lost):
        return [axis]
    if tuple(eqn.params["padding_config"][axis]) != (0, 0, 0):
        return [unknown(_name(eqn), "pads the axis of the examples")]
    return [Along(axis)]


def _slice(eqn: Any, states: Sequence[State]) -> list[State]:
    (state, *_), old, new = states, _shape(eqn.invars[0]), _shape(eqn.outvars[0])
    if any(isinstance(s, Along) for s in states[1:]):
        return [unknown(_name(eqn), "starts where the examples say")]
    assert isinstance(state, Along)
    if old[state.axis] != new[state.axis] or len(old) != len(new):
        return [unknown(_name(eqn), "takes some of the examples")]
    return [state]


def _dynamic_update_slice(eqn: Any, states: Sequence[State]) -> list[State]:
    operand, update, *starts = states
    if any(isinstance(s, Along) for s in starts):
        return [unknown(_name(eqn), "starts where the examples say")]
    axes = {s.axis for s in (operand, update) if isinstance(s, Along)}
    if len(axes) > 1:
        return [unknown(_name(eqn))]
    (axis,) = axes
    if _shape(eqn.invars[0])[axis] != _shape(eqn.invars[1])[axis] or any(
        isinstance(s, Shared) and not s.is_uniform(axis) for s in (operand, update)
    ):
        return [unknown(_name(eqn), "writes to some of the examples")]
    return [Along(axis)]


def _gather(eqn: Any, states: Sequence[State]) -> list[State]:
    operand, indices = states
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    out_rank = len(_shape(eqn.outvars[0]))
    positions = [a for a in range(out_rank) if a not in numbers.offset_dims]
    batching = tuple(getattr(numbers, "operand_batching_dims", ()))
    if isinstance(operand, Shared) and isinstance(indices, Along):
        return [Along(positions[indices.axis])]  # rows of a table, chosen by each example
    assert isinstance(operand, Along) or isinstance(indices, Along)
    if isinstance(operand, Along) and operand.axis in batching:
        partner = numbers.start_indices_batching_dims[batching.index(operand.axis)]
        if isinstance(indices, Along) and indices.axis == partner:
            return [Along(positions[partner])]
        if isinstance(indices, Shared) and indices.is_uniform(partner):
            return [Along(positions[partner])]
    elif isinstance(operand, Along) and isinstance(indices, Shared):
        axis, shape = operand.axis, _shape(eqn.invars[0])
        gone = (*numbers.collapsed_slice_dims, *batching)
        if sizes[axis] == shape[axis] and axis not in (*gone, *numbers.start_index_map):
            kept = [a for a in range(len(shape)) if a not in gone]
            return [Along(numbers.offset_dims[kept.index(axis)])]
    return [unknown(_name(eqn), "reads examples by number")]


def _windows(eqn: Any, states: Sequence[State]) -> list[State]:
    axis = common_axis(eqn, states)
    if isinstance(axis, Lost):
        return _same(eqn, axis)
    params = eqn.params
    ones = [params[k][axis] for k in ("window_dimensions", "window_strides") if k in params]
    if any(n != 1 for n in ones) or tuple(params["padding"][axis]) != (0, 0):
        return _same(eqn, mixed(_name(eqn), axis))
    return _same(eqn, Along(axis))


def _matrices(count: Callable[[Any], int]) -> Rule:
    """Steps on the last axes of an array, the same for every entry of those before."""

    def rule(eqn: Any, states: Sequence[State]) -> list[State]:
        axis = common_axis(eqn, states)
        if isinstance(axis, Lost):
            return _same(eqn, axis)
        if axis >= len(_shape(eqn.invars[0])) - count(eqn):
            return _same(eqn, mixed(_name(eqn), axis))
        return _same(eqn, Along(axis))

    return rule


def _top_k(eqn: Any, states: Sequence[State]) -> list[State]:
    (state,) = states
    assert isinstance(state, Along)
    along = eqn.params.get("axis", -1) % len(_shape(eqn.invars[0]))
    return _same(eqn, mixed(_name(eqn), along) if state.axis == along else state)


def _names(text: str) -> list[str]:
    return text.split()


ELEMENTWISE = _names("""
abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e
cbrt ceil clamp clz complex conj convert_element_type copy copy_p cos cosh digamma div eq eq_to erf
erf_inv erfc exp exp2 expm1 floor ge gt igamma igammac imag integer_pow is_finite le lgamma log
log1p logistic lt max min mul name ne neg nextafter not or population_count pow real
reduce_precision regularized_incomplete_beta rem round rsqrt select_n sharding_constraint
shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub
tan tanh xor zeta polygamma layout_constraint
""")

RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(_names("reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or "
                     "reduce_xor argmax argmin"), _reduce),
    **dict.fromkeys(_names("cumsum cumprod cummax cummin cumlogsumexp"), _not_along("axis")),
    **dict.fromkeys(_names("reduce_window_sum reduce_window_max reduce_window_min"), _windows),
    **dict.fromkeys(_names("cholesky lu qr eigh svd geqrf householder_product triangular_solve"),
                    _matrices(lambda eqn: 2)),
    "fft": _matrices(lambda eqn: len(eqn.params["fft_lengths"])),
    "optimization_barrier": _each,
    "transpose": _transpose,
    "reshape": _reshape,
    "expand_dims": _reshape,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "concatenate": _not_along("dimension"),
    "split": _not_along("axis"),
    "rev": _not_along("dimensions"),
    "sort": _not_along("dimension"),
    "top_k": _top_k,
    "pad": _pad,
    "slice": _slice,
    "dynamic_slice": _slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
}  # fmt: skip
"""Primitives without a body; those with one are walked in `walk`."""
