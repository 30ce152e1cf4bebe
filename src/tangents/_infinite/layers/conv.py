"""Convolutions: shared weights, transposed, and local (unshared).

With q(o, t) the input position that output position o reads at tap t (of k taps):

    Conv, ConvTranspose:  K'(o, o') = W_std^2 / k sum_t K(q(o, t), q(o', t)) + b_std^2
    ConvLocal:            the same where o = o', and 0 elsewhere: weights are not shared

(Novak et al. 2019, eq. 5; Xiao et al. 2018, eq. 2; Garriga-Alonso et al. 2019; tangent kernel:
Arora et al. 2019, sec. 4; local layers: Novak et al. 2019, sec. 5). The average runs along
diagonals of the covariance: shifts and adds, axis after axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tangents._core import precision
from tangents._infinite.barrier import computed_apart
from tangents._infinite.dual.single_precision import is_single
from tangents._infinite.graph import Node, hyper, node
from tangents._infinite.layer import Layer
from tangents._infinite.layers.axes import check_axes, collapse_channels
from tangents._infinite.layers.gap import average_over_windows
from tangents._infinite.layers.parameterization import (
    add_bias,
    affine_rule,
    check_parameterization,
    init_bias,
    init_weights,
    scale_weights,
    width_after,
)
from tangents._infinite.layers.window import (
    Padding,
    Window,
    as_padding,
    extend,
    extended_all,
    transposed_windows,
    window_mask,
    window_means,
    window_sum,
    window_sum_pairs,
    window_sum_written,
    windows,
)
from tangents._infinite.planes import window_sum_planes
from tangents._infinite.tile import Layout, Need, Rest, Tile, embed_diagonal, spatial_diagonal


@node
class ConvNode(Node):
    """y = W_std / sqrt(k n) W * x + b_std b."""

    out_chan: int
    filter_shape: tuple[int, ...]
    strides: tuple[int, ...]
    padding: Padding
    specs: tuple[str, str, str]
    W_std: Any = hyper(1.0)
    b_std: Any = hyper(None)
    parameterization: str = "ntk"
    s: tuple[int, int] = (1, 1)
    kind: str = "Conv"
    random_weights = True
    takes_rest = True

    @property
    def name(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.kind

    @property
    def batch_axis(self):
        return self.specs[0].index("N")

    @property
    def channel_axis(self):
        return self.specs[0].index("C")

    @property
    def letters(self) -> str:
        """Spatial letters, in the order of the filter."""
        return "".join(c for c in self.specs[1] if c not in "IO")

    @property
    def axes(self) -> tuple[int, ...]:
        """Spatial axes of the input in the order of the filter."""
        return tuple(self.specs[0].index(c) for c in self.letters)

    def input_axes(self):
        return self.batch_axis, self.channel_axis

    def windows(self, shape) -> tuple[Window, ...]:
        """One window a spatial axis, in the order of the filter."""
        make = transposed_windows if self.kind == "ConvTranspose" else windows
        sizes = [shape[a] for a in self.axes]
        return make(sizes, self.filter_shape, self.strides, self.padding)

    def out_shape(self, shape):
        if len(shape) != len(self.filter_shape) + 2:
            raise ValueError(
                f"{self.name} with filter_shape={self.filter_shape} needs an input of "
                f"{len(self.filter_shape) + 2} axes, and gets shape {tuple(shape)}"
            )
        ws = self.windows(shape)
        sizes = {
            c: w.out_size(shape[a]) for c, w, a in zip(self.letters, ws, self.axes, strict=True)
        }
        sizes["N"] = shape[self.batch_axis]
        sizes["C"] = width_after(self.out_chan, self.parameterization, self.s)
        return tuple(sizes[c] for c in self.specs[2])

    def gaussian(self, incoming):
        return True

    def signal(self, signal):
        check_axes(self, signal)
        out = super().signal(signal)
        return out.replace(
            batch_axis=self.specs[2].index("N"), channel_axis=self.specs[2].index("C")
        )

    def _fan_in(self, channels: int) -> int:
        return channels * math.prod(self.filter_shape)

    def init_params(self, rng, shape):
        k1, k2 = jax.random.split(rng)
        channels, out = shape[self.channel_axis], self.out_shape(shape)
        out_sizes = dict(zip(self.specs[2], out, strict=True))
        sizes = dict(zip(self.letters, self.filter_shape, strict=True))
        sizes |= {"I": channels, "O": out_sizes["C"]}
        b_sizes = dict.fromkeys(self.letters, 1)
        if self.kind == "ConvLocal":
            sizes |= {c: out_sizes[c] for c in self.letters} | {"I": self._fan_in(channels)}
            b_sizes = {c: out_sizes[c] for c in self.letters}
        b_sizes |= {"N": 1, "C": out_sizes["C"]}
        fan_in, name = self._fan_in(channels), self.parameterization
        W_shape = [sizes[c] for c in self.specs[1]]
        W = init_weights(k1, W_shape, fan_in, self.W_std, name, self.s)
        return W, init_bias(k2, [b_sizes[c] for c in self.specs[2]], self.b_std, name)

    def apply(self, params, x, *, mask=None, **kwargs):
        W, b = params
        ws = self.windows(x.shape)
        if self.padding == Padding.CIRCULAR:
            for axis, w in zip(self.axes, ws, strict=True):
                x = extend(x, axis, w)
            ws = tuple(Window(w.size, w.stride, 0, 0) for w in ws)
        arguments: dict[str, Any] = {
            "window_strides": [w.stride for w in ws],
            "padding": [(w.lo, w.hi) for w in ws],
            "lhs_dilation": [w.dilation for w in ws],
            "dimension_numbers": self.specs,
            "precision": precision.DEFAULT,
        }
        if self.kind == "ConvLocal":
            y = lax.conv_general_dilated_local(x, W, filter_shape=self.filter_shape, **arguments)
        else:
            y = lax.conv_general_dilated(x, W, **arguments)
        fan_in = self._fan_in(x.shape[self.channel_axis])
        y = scale_weights(fan_in, self.W_std, self.parameterization, self.s) * y
        return add_bias(y, b, self.b_std, self.parameterization)

    def mask_out(self, mask, shape):
        # Broadcast along the windows first: a size of one would shrink.
        sizes = [shape[a] if a in self.axes else m for a, m in enumerate(mask.shape)]
        mask = collapse_channels(jnp.broadcast_to(mask, sizes), self.channel_axis)
        mask = window_mask(mask, self.axes, self.windows(shape))
        return jnp.transpose(mask, [self.specs[0].index(c) for c in self.specs[2]])

    def needs(self, need):
        if self.kind != "ConvLocal":
            return need
        return Need(Layout.DIAGONAL, min(need.side, Layout.DIAGONAL))

    def out_layout(self, layout, wanted):
        return wanted if self.kind == "ConvLocal" else layout

    @property
    def plane_wise(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        before, after = ([c for c in spec if c not in "NC"] for spec in self.specs[::2])
        return self.kind == "Conv" and before == after

    def by_library(self, state):
        return state.tile is None and self._calls_library(state.in1, state.side1, state.planes)

    def _calls_library(self, signal, variance, planes):
        if planes is None or not planes.apart or not is_single(variance) or len(self.letters) > 3:
            return False
        return not any(w.wrap for w in self._own_windows(signal.shape))

    def _own_windows(self, shape) -> list[Window]:
        """Windows in the order of the input's spatial axes."""
        by_letter = dict(zip(self.letters, self.windows(shape), strict=True))
        return [by_letter[c] for c in self.specs[0] if c not in "NC"]

    def plane_windows(self, signal):
        return self._own_windows(signal.shape)

    def parts_apart(self, state):
        return state.tile.gap12 is None

    def plane_strides(self, signal):
        return tuple(w.stride for w in self._own_windows(signal.shape))

    def _planes_rule(self, context, tile):
        ws, k = self._own_windows(context.in1.shape), math.prod(self.filter_shape)
        if not context.carries(tile):
            after = context.planes.strided([w.stride for w in ws])
            if context.planes.apart:
                return self._apart(context, tile, after, ws)
            sizes = context.in1.spatial

            def total(a):
                return window_sum_planes(extended_all(a, range(len(ws)), ws), sizes, after, ws)

            return self._affine(context, tile.linear(lambda a: total(a) / k), None)
        # At offset 0: windows axis by axis, each axis written, are faster than both at once.
        axes = range(len(ws))
        averaged = tile.linear(lambda a: window_sum(a, axes, ws) / k)
        var1, var2 = context.variances
        cov12, gap12, *variances = average_over_windows(
            tile.cov12, tile.gap12, var1, var2, axes, ws
        )
        return self._affine(context, averaged._replace(cov12=cov12, gap12=gap12), variances)

    def _apart(self, context, tile, after, ws):
        """cov12 and tangent kernel by one program: T' = K' + A[T], A[T] a `Rest`."""
        sizes, k = context.in1.spatial, math.prod(self.filter_shape)

        def average(a, after, weight, bias):
            return weight * (window_sum_planes(a, sizes, after, ws) / k) + bias

        def each(a, weight, bias):
            wide = a
            for axis, w in enumerate(ws):
                wide = extend(wide, axis, w)
            scalars = (jnp.asarray(x, a.dtype) for x in (weight, bias))
            return computed_apart(average, wide, after, *scalars)

        if isinstance(tile.ntk, Rest):
            tile = computed_apart(Tile.whole, tile)
        if self.parameterization != "ntk":
            averaged = tile.linear(lambda a: each(a, 1, 0))
            return computed_apart(lambda tile: self._affine(context, tile, None), averaged)
        weight, bias = self.W_std**2, 0 if self.b_std is None else self.b_std**2
        cov12 = each(tile.cov12, weight, bias)
        if tile.ntk is None:
            return Tile(cov12)
        return Tile(cov12, Rest(each(tile.ntk, weight, 0) if tile.ntk.ndim else tile.ntk))

    def _affine(self, context, averaged, variances):
        return affine_rule(
            averaged,
            self.W_std,
            self.b_std,
            self._fan_in(context.in1.width),
            self.parameterization,
            self.s,
            variances=variances,
        )

    def rule(self, context, tile):
        if context.layout == Layout.PLANES:
            return self._planes_rule(context, tile)
        n = context.n_batch
        letters_in = [c for c in self.specs[0] if c not in "NC"]
        letters_out = [c for c in self.specs[2] if c not in "NC"]
        ws = self._own_windows(context.in1.shape)
        full = context.layout == Layout.FULL and self.kind != "ConvLocal"
        width = 2 if full else 1
        order = [letters_in.index(c) for c in letters_out]
        moved = [*range(n), *(n + width * i + j for i in order for j in range(width))]
        k = math.prod(self.filter_shape)

        def average(a):
            if full:
                return jnp.transpose(window_sum_pairs(a, n, ws) / k, moved)
            a = spatial_diagonal(a, n) if context.layout == Layout.FULL else a
            total = window_sum_written if context.equal_entries else window_sum
            return jnp.transpose(total(a, range(n, n + len(ws)), ws) / k, moved)

        if context.equal_entries and self._calls_library(context.in1, tile.cov12, context.planes):
            cov12 = jnp.transpose(window_means(tile.cov12, ws, self.W_std**2), moved)
            return Tile(cov12 if self.b_std is None else cov12 + self.b_std**2)
        averaged, variances = tile.linear(average), None
        if context.layout == Layout.DIAGONAL and context.carries(tile):
            var1, var2 = context.variances
            arrays = average_over_windows(
                tile.cov12, tile.gap12, var1, var2, range(n, n + len(ws)), ws
            )
            cov12, gap12, *variances = (jnp.transpose(a, moved) for a in arrays)
            averaged = averaged._replace(cov12=cov12, gap12=gap12)
        out = self._affine(context, averaged, variances)
        if self.kind == "ConvLocal" and context.need.tile == Layout.FULL:
            out = out.linear(lambda a: embed_diagonal(a, n))
        return out


def _layer(
    kind: str,
    out_chan: int,
    filter_shape: Sequence[int],
    strides: Sequence[int] | None,
    padding: Any,
    W_std: Any,
    b_std: Any,
    dimension_numbers: Any,
    parameterization: str,
    s: tuple[int, int],
) -> Layer:
    n = len(filter_shape)
    if dimension_numbers is None:
        letters = "HWDEFG"[:n]
        dimension_numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    strides = (1,) * n if strides is None else tuple(strides)
    if len(strides) != n:
        raise ValueError(
            f"{kind}: strides={strides} and filter_shape={tuple(filter_shape)} must have the same "
            "length"
        )
    node = ConvNode(
        out_chan,
        tuple(filter_shape),
        strides,
        as_padding(padding),
        tuple(dimension_numbers),
        W_std,
        b_std,
        check_parameterization(parameterization, kind),
        (s[0], s[1]),
        kind,
    )
    return Layer(node)


def Conv(
    out_chan: int,
    filter_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Any = "VALID",
    W_std: Any = 1.0,
    b_std: Any = None,
    dimension_numbers: Any = None,
    parameterization: str = "ntk",
    s: tuple[int, int] = (1, 1),
) -> Layer:
    """Convolution, y = W_std / sqrt(k n) W * x + b_std b, with k taps and n input channels.

    At infinite width covariances are averaged along diagonals,
    K'(o, o') = W_std²/k Σ_t K(o+t, o'+t) + b_std² (Novak et al. 2019; Arora et al. 2019).

    Args:
      out_chan: number of output channels.
      filter_shape: window size along each spatial axis.
      strides: steps of the window; None: ones.
      padding: 'VALID', 'SAME' (zeros beyond the edge, which count in k) or 'CIRCULAR' (a torus).
      W_std: standard deviation of the weights.
      b_std: standard deviation of the biases; None: no bias.
      dimension_numbers: names of the axes of input, filter and output, such as
        ('NHWC', 'HWIO', 'NHWC'), which is the default for two spatial axes.
      parameterization: 'ntk' or 'standard', as for `Dense`.
      s: scalings of input and output width, as for `Dense`.

    Returns:
      A layer with parameters `(W, b)`; b has ones except on the channel axis, or is None.

    Examples:
        >>> import jax
        >>> from tangents import stax
        >>> init_fn, _, _ = stax.Conv(8, (3, 3), strides=(2, 2), padding="SAME", b_std=0.1)
        >>> shape, (W, b) = init_fn(jax.random.key(0), (-1, 5, 6, 3))
        >>> shape, W.shape, b.shape
        ((-1, 3, 3, 8), (3, 3, 3, 8), (1, 1, 1, 8))
    """
    return _layer(
        "Conv",
        out_chan,
        filter_shape,
        strides,
        padding,
        W_std,
        b_std,
        dimension_numbers,
        parameterization,
        s,
    )


def ConvTranspose(
    out_chan: int,
    filter_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Any = "VALID",
    W_std: Any = 1.0,
    b_std: Any = None,
    dimension_numbers: Any = None,
    parameterization: str = "ntk",
    s: tuple[int, int] = (1, 1),
) -> Layer:
    """Transposed (fractionally strided) convolution, scaled as `Conv`.

    The window runs over the input with `stride - 1` zeros between its entries
    (`jax.lax.conv_transpose`; the filter is not flipped). On a torus ('CIRCULAR') n positions
    become n * stride.

    Args:
      out_chan: number of output channels.
      filter_shape: window size along each spatial axis.
      strides: upsampling factors; None: ones.
      padding: 'VALID', 'SAME' or 'CIRCULAR'.
      W_std: standard deviation of the weights.
      b_std: standard deviation of the biases; None: no bias.
      dimension_numbers: as for `Conv`.
      parameterization: 'ntk' or 'standard'.
      s: scalings of input and output width, as for `Dense`.

    Returns:
      A layer with parameters `(W, b)`.

    Examples:
        >>> import jax
        >>> from tangents import stax
        >>> init_fn, _, _ = stax.ConvTranspose(8, (3,), strides=(2,), padding="SAME")
        >>> init_fn(jax.random.key(0), (1, 5, 3))[0]
        (1, 10, 8)
    """
    return _layer(
        "ConvTranspose",
        out_chan,
        filter_shape,
        strides,
        padding,
        W_std,
        b_std,
        dimension_numbers,
        parameterization,
        s,
    )


def ConvLocal(
    out_chan: int,
    filter_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Any = "VALID",
    W_std: Any = 1.0,
    b_std: Any = None,
    dimension_numbers: Any = None,
    parameterization: str = "ntk",
    s: tuple[int, int] = (1, 1),
) -> Layer:
    """Locally connected layer: a convolution with weights of its own at every output position.

    At infinite width different output positions are uncorrelated; equal ones are as in `Conv`
    (Novak et al. 2019, sec. 5).

    Args:
      out_chan: number of output channels.
      filter_shape: window size along each spatial axis.
      strides: steps of the window; None: ones.
      padding: 'VALID', 'SAME' or 'CIRCULAR'.
      W_std: standard deviation of the weights.
      b_std: standard deviation of the biases; None: no bias.
      dimension_numbers: as for `Conv`.
      parameterization: 'ntk' or 'standard'.
      s: scalings of input and output width, as for `Dense`.

    Returns:
      A layer with parameters `(W, b)`: W has the output sizes in its spatial slots and
      n * prod(filter_shape) in its input slot; b is (1, *output sizes, out_chan), or None.

    Examples:
        >>> import jax
        >>> from tangents import stax
        >>> _, (W, b) = stax.ConvLocal(8, (3,), b_std=0.1)[0](jax.random.key(0), (-1, 6, 2))
        >>> W.shape, b.shape
        ((4, 6, 8), (1, 4, 8))
    """
    return _layer(
        "ConvLocal",
        out_chan,
        filter_shape,
        strides,
        padding,
        W_std,
        b_std,
        dimension_numbers,
        parameterization,
        s,
    )
