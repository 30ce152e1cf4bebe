"""Branches: FanOut, and FanIn by sum, product and concatenation.

For independent branches b (they end in random weights of their own):

    FanInSum:     K' = sum_b K_b,  T' = sum_b T_b
    FanInProd:    K' = prod_b K_b,  T' = sum_b T_b prod_(c != b) K_c
    FanInConcat:  over channels, the average weighted by widths; over positions or examples, blocks.

(Yang 2019, sec. 2; Novak et al. 2020.)
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import jax.numpy as jnp

from tangents._infinite.graph import Node, join_needs, node
from tangents._infinite.layer import Layer
from tangents._infinite.layers.gap import gap_of_sum
from tangents._infinite.tile import Layout, Rest, Tile, add_up


@node
class FanOutNode(Node):
    """[x, x, ...]."""

    num: int
    name = "FanOut"
    plane_wise = True

    def out_shape(self, shape):
        return [shape] * self.num

    def signal(self, signal):
        return [signal.replace(drawn=False)] * self.num

    def forward(self, params, x, mask, **kwargs):
        return [x] * self.num, None if mask is None else [mask] * self.num

    def needs(self, need):
        return join_needs(need)


def FanOut(num: int) -> Layer:
    """Copies of the input, for `parallel`.

    Args:
      num: number of copies.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import stax
        >>> _, copies, _ = stax.FanOut(2)
        >>> [c.tolist() for c in copies((), jnp.ones(1))]
        [[1.0], [1.0]]
    """
    return Layer(FanOutNode(num))


def _same_axes(name: str, signals: list) -> None:
    for kind in ("batch_axis", "channel_axis"):
        if len({getattr(s, kind) for s in signals}) > 1:
            raise ValueError(
                f"{name}: its inputs have different {kind}: {[getattr(s, kind) for s in signals]}"
            )


def _check_list(name: str, inputs) -> None:
    if not isinstance(inputs, (list, tuple)):
        raise ValueError(
            f"{name} needs a list of inputs, and gets one: put FanOut and parallel before it"
        )


def _check_independent(name: str, signals: list) -> None:
    if len(signals) > 1 and not all(s.is_gaussian for s in signals):
        raise NotImplementedError(
            f"{name}: all its inputs must be Gaussian, and input "
            f"{[s.is_gaussian for s in signals].index(False)} is not: end each branch "
            "with random weights (Dense, Conv, ...)"
        )
    _warn_dependent(name, signals)


def _warn_dependent(name: str, signals: list) -> None:
    if sum(not s.drawn for s in signals) > 1:
        warnings.warn(
            f"{name}: two of its inputs are the same up to layers without random weights, so they "
            "are not independent as the infinite limit assumes.",
            stacklevel=2,
        )


def _full_masks(masks, shapes):
    return [
        jnp.zeros((1,) * len(s), bool) if m is None else m
        for m, s in zip(masks, shapes, strict=True)
    ]


_ASSUMPTION = (
    "FanIn layers assume that their inputs are independent, which is only partly checked: end "
    "each branch with random weights of its own (Dense, Conv, GlobalSelfAttention, ...) or be sure "
    "that at most one of them has none."
)


class _EntryWise(Node):
    """Inputs of equal shapes, combined entry by entry."""

    many_inputs = True
    kernel_warning = _ASSUMPTION

    def out_shape(self, shape):
        _check_list(self.name, shape)
        if any(tuple(s) != tuple(shape[0]) for s in shape):
            raise ValueError(f"{self.name}: all inputs must have equal shapes, and have {shape}")
        return tuple(shape[0])

    def out_examples(self, index, out):
        return index[0]


@node
class FanInSumNode(_EntryWise):
    """x_1 + x_2 + ..."""

    name = "FanInSum"
    plane_wise = True
    takes_rest = True

    def signal(self, signal):
        _check_list(self.name, signal)
        _same_axes(self.name, signal)
        shape = self.out_shape([s.shape for s in signal])
        _check_independent(self.name, signal)
        return signal[0].replace(shape=shape, drawn=any(s.drawn for s in signal))

    def apply(self, params, x, *, mask=None, **kwargs):
        _check_list(self.name, x)
        return sum(x[1:], start=x[0])

    def mask_out(self, mask, shape):
        # A sum is missing only where every term is.
        full = _full_masks(mask, shape)
        out = full[0]
        for m in full[1:]:
            out = out & m
        return out

    def rule(self, context: Any, tile: Any) -> Tile:
        rests = [isinstance(t.ntk, Rest) for t in tile]
        if not all(rests):
            tile = [t.whole() for t in tile]
        ntks = [t.ntk for t in tile]
        cov12s = [t.cov12 for t in tile]
        gap12 = None
        if all(c.carries(t) for c, t in zip(context, tile, strict=True)):
            gap12 = gap_of_sum(cov12s, [t.gap12 for t in tile], [c.variances for c in context])
        if all(rests):
            return Tile(add_up(cov12s), Rest(add_up(rest.array for rest in ntks)), gap12)
        return Tile(add_up(cov12s), None if ntks[0] is None else add_up(ntks), gap12)


def FanInSum() -> Layer:
    """Sum of the inputs.

    At infinite width the sum of their kernels, if they are independent: each must be Gaussian, and
    no two the same process.

    Warns:
      UserWarning: at each call of `kernel_fn`, that independence is assumed; another where two
        branches are seen to depend on each other.

    Raises:
      ValueError: if shapes differ.
      NotImplementedError: in `kernel_fn`, if an input is not Gaussian.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import stax
        >>> _, add, _ = stax.FanInSum()
        >>> add((), [jnp.ones(2), 2 * jnp.ones(2)]).tolist()
        [3.0, 3.0]
    """
    return Layer(FanInSumNode())


@node
class FanInProdNode(_EntryWise):
    """x_1 * x_2 * ..."""

    name = "FanInProd"

    def signal(self, signal):
        _check_list(self.name, signal)
        _same_axes(self.name, signal)
        _warn_dependent(self.name, signal)
        shape = self.out_shape([s.shape for s in signal])
        gaussian = len(signal) == 1 and signal[0].is_gaussian
        return signal[0].replace(
            shape=shape, is_gaussian=gaussian, drawn=any(s.drawn for s in signal)
        )

    def apply(self, params, x, *, mask=None, **kwargs):
        _check_list(self.name, x)
        return math.prod(x[1:], start=x[0])

    def mask_out(self, mask, shape):
        full = _full_masks(mask, shape)
        out = full[0]
        for m in full[1:]:
            out = out | m
        return out

    def rule(self, context: Any, tile: Any) -> Tile:
        covs = [t.cov12 for t in tile]
        ntk = None
        if tile[0].ntk is not None:
            ntk = jnp.zeros((), covs[0].dtype)
            for i, t in enumerate(tile):
                others = [c for j, c in enumerate(covs) if j != i]
                ntk = ntk + math.prod(others, start=t.ntk)
        return Tile(math.prod(covs[1:], start=covs[0]), ntk)


def FanInProd() -> Layer:
    """Product of the inputs, entry by entry.

    At infinite width K' = Π K_b and, by the product rule, T' = Σ_b T_b Π_{c≠b} K_c, for independent
    inputs. The output is not Gaussian.

    Raises:
      ValueError: if shapes differ.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import stax
        >>> _, multiply, _ = stax.FanInProd()
        >>> multiply((), [3 * jnp.ones(2), 2 * jnp.ones(2)]).tolist()
        [6.0, 6.0]
    """
    return Layer(FanInProdNode())


@node
class FanInConcatNode(Node):
    """Concatenate along one axis."""

    axis: int = -1
    name = "FanInConcat"
    many_inputs = True
    kernel_warning = _ASSUMPTION

    @property
    def mixes_examples(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.axis != -1  # the rank is not known here, so any other may be the batch axis

    def out_shape(self, shape):
        _check_list(self.name, shape)
        axis = self.axis % len(shape[0])
        first = [s for i, s in enumerate(shape[0]) if i != axis]
        for s in shape:
            if [u for i, u in enumerate(s) if i != axis] != first:
                raise ValueError(
                    f"{self.name}: shapes must be equal but for axis {axis}, and are {shape}"
                )
        total = sum(s[axis] for s in shape)
        return (*shape[0][:axis], total, *shape[0][axis + 1 :])

    def _kind(self, signal) -> str:
        axis = self.axis % len(signal.shape)
        names = {signal.channel_axis: "channel", signal.batch_axis: "batch"}
        return names.get(axis, "spatial")

    def signal(self, signal):
        _check_list(self.name, signal)
        _same_axes(self.name, signal)
        kind = self._kind(signal[0])
        if kind != "channel":
            _check_independent(self.name, signal)
        if kind == "batch":
            warnings.warn(
                "FanInConcat over the batch axis: examples of different inputs are taken to be "
                "independent.",
                stacklevel=2,
            )
        return signal[0].replace(
            shape=self.out_shape([s.shape for s in signal]),
            is_gaussian=all(s.is_gaussian for s in signal),
            drawn=any(s.drawn for s in signal),
        )

    def apply(self, params, x, *, mask=None, **kwargs):
        _check_list(self.name, x)
        return jnp.concatenate(x, axis=self.axis)

    def mask_out(self, mask, shape):
        full = [
            jnp.broadcast_to(m, s) for m, s in zip(_full_masks(mask, shape), shape, strict=True)
        ]
        return jnp.concatenate(full, axis=self.axis)

    def out_examples(self, index, out):
        if out.batch == index[0].shape[0]:
            return index[0]
        n = len(index)  # examples of different inputs never are one example
        return jnp.concatenate([n * each + i for i, each in enumerate(index)])

    def _blocks(self, arrays, axes):
        """Block-diagonal over `axes` (a pair of them), or concatenated (one)."""
        if len(axes) == 1:
            return jnp.concatenate(arrays, axis=axes[0])
        sizes = [a.shape[axes[1]] for a in arrays]
        padded = []
        for i, a in enumerate(arrays):
            pads = [(0, 0)] * a.ndim
            pads[axes[1]] = (sum(sizes[:i]), sum(sizes[i + 1 :]))
            padded.append(jnp.pad(a, pads))
        return jnp.concatenate(padded, axis=axes[0])

    def rule(self, context: Any, tile: Any) -> Tile:
        first = context[0]
        kind = self._kind(first.in1)
        n = first.n_batch
        covs, ntks = [t.cov12 for t in tile], [t.ntk for t in tile]
        if ntks[0] is not None and any(t.ndim for t in ntks):
            ntks = [jnp.broadcast_to(t, c.shape) for t, c in zip(ntks, covs, strict=True)]
        if kind == "channel":
            widths = [c.in1.width for c in context]
            total = sum(widths)

            def combine(arrays):
                return sum(w / total * a for w, a in zip(widths, arrays, strict=True))

            return Tile(combine(covs), None if ntks[0] is None else combine(ntks))

        if kind == "batch":
            axes = tuple(range(n))
        else:
            place = first.in1.spatial_axes.index(self.axis % len(first.in1.shape))
            axes = (n + place,)
            if first.layout == Layout.FULL:
                axes = (n + 2 * place, n + 2 * place + 1)
        ntk = ntks[0]
        if ntk is not None and ntk.ndim:
            ntk = self._blocks(ntks, axes)
        return Tile(self._blocks(covs, axes), ntk)


def FanInConcat(axis: int = -1) -> Layer:
    """Concatenate the inputs.

    At infinite width: over channels, the average of the kernels weighted by the number of channels;
    over a spatial axis or the batch axis, blocks on the diagonal (positions or examples of
    different inputs are independent, so all must be Gaussian).

    Args:
      axis: the axis along which to concatenate.

    Raises:
      ValueError: if shapes differ elsewhere.
      NotImplementedError: in `kernel_fn`, if an input is not Gaussian and `axis` is not the channel
        axis.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import stax
        >>> _, concatenate, _ = stax.FanInConcat()
        >>> concatenate((), [jnp.ones((1, 2)), jnp.ones((1, 3))]).shape
        (1, 5)
    """
    return Layer(FanInConcatNode(axis))
