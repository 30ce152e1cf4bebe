"""`Kernel`: covariances of a network's outputs with everything needed to continue from them."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tangents._infinite.execute import State
from tangents._infinite.tile import Layout, Need, Signal, Tile, pair_positions, position_mask

_LEAVES = ("nngp", "ntk", "cov1", "cov2", "x1_is_x2", "mask1", "mask2")


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """Covariances of the activations of an infinitely wide layer, and how they are laid out.

    With batch sizes N1 and N2 and spatial axes H, W:

    - `nngp`, `ntk`: `(N1, N2, H, H, W, W)`, or `(N1, N2, H, W)` if `diagonal_spatial`. `ntk` is
      `None` if it was not asked for, a zero without axes before the first trainable layer.
    - `cov1`: `(N1, H, H, W, W)` if `diagonal_batch`, else `(N1, N1, H, H, W, W)`; without the
      doubled spatial axes if `diagonal_spatial`. `cov2` likewise, `None` if x2 is x1.
    - `x1_is_x2`: are the inputs equal by value (a boolean, possibly traced).
    - `is_gaussian`: is the activation a Gaussian process (it follows random weights).
    - `is_reversed`: always `False`; spatial axes stand in the order of the input.
    - `shape1`, `shape2`: shapes of the activations; `batch_axis`, `channel_axis` in them.
    - `mask1`, `mask2`: `None` or boolean, broadcastable to `shape1`, `shape2`, `True` = masked.

    Operators act as they do on the activations: `k * c` multiplies them by c (all four arrays by
    c²), `k + c` adds c (c² to second moments, nothing to the ntk), `k[idx]` indexes them.
    A Kernel is immutable and a pytree.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import stax
        >>> _, _, kernel_fn = stax.Dense(1, W_std=2.0)
        >>> k = kernel_fn(jnp.eye(3))
        >>> (k * 3.0).nngp.shape, k.is_gaussian
        ((3, 3), True)
    """

    nngp: Any
    ntk: Any
    cov1: Any
    cov2: Any
    x1_is_x2: Any
    is_gaussian: bool
    is_reversed: bool
    is_input: bool
    diagonal_batch: bool
    diagonal_spatial: bool
    shape1: Any
    shape2: Any
    batch_axis: int
    channel_axis: int
    mask1: Any = None
    mask2: Any = None

    def replace(self, **changes: Any) -> Kernel:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def asdict(self) -> dict[str, Any]:
        """Fields by name; not a deep copy."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def astuple(self) -> tuple[Any, ...]:
        """Fields in order; not a deep copy."""
        return tuple(self.asdict().values())

    def _map(self, fn: Callable[[Any, int], Any], **changes: Any) -> Kernel:
        """Apply `fn(array, number of pair axes)` to the four arrays; zeros without axes stay."""
        n_side = 1 if self.diagonal_batch else 2

        def each(a, n):
            return a if a is None or jnp.ndim(a) == 0 else fn(a, n)

        return self.replace(
            nngp=each(self.nngp, 2),
            ntk=each(self.ntk, 2),
            cov1=each(self.cov1, n_side),
            cov2=each(self.cov2, n_side),
            **changes,
        )

    def slice(self, n1_slice: slice, n2_slice: slice) -> Kernel:
        """The kernel of some examples of x1 against some of x2.

        Args:
          n1_slice: slice of examples of x1.
          n2_slice: slice of examples of x2.

        Raises:
          NotImplementedError: if the covariances of a side hold all pairs of examples.
        """
        if not self.diagonal_batch:
            raise NotImplementedError("Kernel.slice needs diagonal_batch=True")
        cov2 = self.cov1 if self.cov2 is None else self.cov2

        def cut(a, index, axis):
            if a is None or jnp.ndim(a) == 0:
                return a
            return a[(slice(None),) * axis + (index,)]

        def cut_shape(shape, index):
            size = len(range(*index.indices(shape[self.batch_axis])))
            return (*shape[: self.batch_axis], size, *shape[self.batch_axis + 1 :])

        def both(a):
            return None if a is None else a if jnp.ndim(a) == 0 else a[n1_slice, n2_slice]

        mask2 = self.mask1 if self.mask2 is None and self.cov2 is None else self.mask2
        return self.replace(
            nngp=both(self.nngp),
            ntk=both(self.ntk),
            cov1=cut(self.cov1, n1_slice, 0),
            cov2=cut(cov2, n2_slice, 0),
            shape1=cut_shape(self.shape1, n1_slice),
            shape2=cut_shape(self.shape2, n2_slice),
            mask1=cut(self.mask1, n1_slice, self.batch_axis),
            mask2=cut(mask2, n2_slice, self.batch_axis),
        )

    def transpose(self, axes: Sequence[int] | None = None) -> Kernel:
        """Permute the spatial axes; `axes` counts spatial axes only, `None` keeps them."""
        width = 1 if self.diagonal_spatial else 2

        def permute(a, n):
            order = range((a.ndim - n) // width) if axes is None else axes
            moved = [n + width * i + j for i in order for j in range(width)]
            return jnp.transpose(a, (*range(n), *moved))

        signal = Signal(tuple(self.shape1), self.batch_axis, self.channel_axis)
        spatial = signal.spatial_axes
        order = range(len(spatial)) if axes is None else axes
        shapes = []
        for shape in (self.shape1, self.shape2):
            new = list(shape)
            for target, source in zip(spatial, order, strict=True):
                new[target] = shape[spatial[source]]
            shapes.append(tuple(new))
        moved = list(range(len(self.shape1)))
        for target, source in zip(spatial, order, strict=True):
            moved[target] = spatial[source]
        masks = [m if m is None else jnp.transpose(m, moved) for m in (self.mask1, self.mask2)]
        return self._map(
            permute, shape1=shapes[0], shape2=shapes[1], mask1=masks[0], mask2=masks[1]
        )

    def reverse(self) -> Kernel:
        """Store the spatial axes in the opposite order and flip `is_reversed`.

        Kept for code that was written for it: no kernel of this package is stored reversed.
        """
        width = 1 if self.diagonal_spatial else 2

        def flip(a, n):
            order = range((a.ndim - n) // width)[::-1]
            return jnp.transpose(
                a, (*range(n), *(n + width * i + j for i in order for j in range(width)))
            )

        return self._map(flip, is_reversed=not self.is_reversed)

    def mask(self, mask1: Any, mask2: Any) -> Kernel:
        """Zero the covariances of masked positions and set the masks.

        Args:
          mask1: boolean, broadcastable to `shape1`, `True` = masked; or None.
          mask2: the same for `shape2`.
        """
        layout = Layout.DIAGONAL if self.diagonal_spatial else Layout.FULL
        signals = [
            Signal(tuple(shape), self.batch_axis, self.channel_axis)
            for shape in (self.shape1, self.shape2)
        ]
        positions = [position_mask(m, s) for m, s in zip((mask1, mask2), signals, strict=True)]

        def hide(a, m1, m2, all_pairs):
            if a is None or jnp.ndim(a) == 0 or (m1 is None and m2 is None):
                return a
            other = m2 if m1 is None else m1
            m1 = jnp.zeros((1,) * other.ndim, bool) if m1 is None else m1
            m2 = jnp.zeros((1,) * other.ndim, bool) if m2 is None else m2
            m1, m2 = pair_positions(m1, m2, layout, all_pairs)
            return jnp.where(m1 | m2, jnp.zeros((), a.dtype), a)

        p1, p2 = positions
        side = not self.diagonal_batch
        return self.replace(
            nngp=hide(self.nngp, p1, p2, True),
            ntk=hide(self.ntk, p1, p2, True),
            cov1=hide(self.cov1, p1, p1, side),
            cov2=hide(self.cov2, p2, p2, side),
            mask1=mask1,
            mask2=mask2,
        )

    def dot_general(self, other1: Any, other2: Any, is_lhs: bool, dimension_numbers: Any) -> Kernel:
        """Covariances after `lax.dot_general` of the activations with constants.

        Args:
          other1: the constant for x1; None is the identity.
          other2: the constant for x2; None is the identity.
          is_lhs: are the constants on the left side of the product.
          dimension_numbers: as in `jax.lax.dot_general`, for the order of arguments it has.

        Returns:
          The Kernel of the products; contracted and batched axes as in `lax.dot_general`.
        """
        from tangents._infinite.layers.contraction import kernel_dot_general

        return kernel_dot_general(self, other1, other2, is_lhs, dimension_numbers)

    def __getitem__(self, idx: Any) -> Kernel:
        """Index the activations; see `stax.Index`."""
        from tangents._infinite.layers.shape import IndexNode, make_index

        return self.through(IndexNode(make_index(idx), self.batch_axis, self.channel_axis))

    def through(self, node: Any) -> Kernel:
        """The Kernel after one node of a network graph."""
        from tangents._infinite.execute import run

        layout = Layout.DIAGONAL if self.diagonal_spatial else Layout.FULL
        need = Need(layout, layout if self.cov1 is not None else Layout.NONE)
        return from_state(run(node, to_state(self), need, (None, None), {}), self.x1_is_x2)

    def __mul__(self, other: Any) -> Kernel:
        return self._map(lambda a, n: a * other**2)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Kernel:
        return self._map(lambda a, n: a / other**2)

    def __add__(self, other: Any) -> Kernel:
        ntk = self.ntk
        return self._map(lambda a, n: a + other**2).replace(ntk=ntk)

    __radd__ = __add__
    __sub__ = __add__
    __rsub__ = __add__

    def __neg__(self) -> Kernel:
        return self

    def __pos__(self) -> Kernel:
        return self


def _flatten(k: Kernel):
    static = tuple(
        tuple(v) if isinstance(v, list) else v for v in (getattr(k, n) for n in _static_names())
    )
    return tuple(getattr(k, n) for n in _LEAVES), static


def _static_names() -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(Kernel) if f.name not in _LEAVES)


def _unflatten(static, leaves):
    k = object.__new__(Kernel)
    for names, values in ((_static_names(), static), (_LEAVES, leaves)):
        for n, v in zip(names, values, strict=True):
            object.__setattr__(k, n, v)
    return k


jax.tree_util.register_pytree_with_keys(
    Kernel,
    lambda k: (
        tuple((jax.tree_util.GetAttrKey(n), getattr(k, n)) for n in _LEAVES),
        _flatten(k)[1],
    ),
    _unflatten,
    _flatten,
)


def to_state(kernel: Any) -> Any:
    """The state of the graph walk a Kernel (or list of them) describes."""
    if isinstance(kernel, (list, tuple)):
        return [to_state(k) for k in kernel]
    k = kernel.reverse() if kernel.is_reversed else kernel
    signals = [
        Signal(tuple(map(operator.index, shape)), k.batch_axis, k.channel_axis, k.is_gaussian)
        for shape in (k.shape1, k.shape2)
    ]
    layout = Layout.DIAGONAL if k.diagonal_spatial else Layout.FULL
    shared = k.cov2 is None
    return State(
        tile=Tile(k.nngp, k.ntk),
        side1=k.cov1,
        side2=k.cov2,
        mask1=k.mask1,
        mask2=None if shared else k.mask2,
        index1=jnp.arange(signals[0].batch),
        index2=jnp.arange(signals[1].batch),
        x1_is_x2=jnp.asarray(k.x1_is_x2),
        in1=signals[0],
        in2=signals[1],
        layout=layout,
        side_layout=Layout.NONE if k.cov1 is None else layout,
        side_pairs=not k.diagonal_batch,
        shared=shared,
    )


def from_state(state: Any, x1_is_x2: Any = None, ntk: bool = True) -> Any:
    """The Kernel (or list of them) of a state."""
    if isinstance(state, (list, tuple)):
        return [from_state(s, x1_is_x2, ntk) for s in state]
    side_layout, spatial = state.side_layout, state.in1.spatial_axes
    if side_layout not in (Layout.NONE, state.layout) and spatial:
        raise AssertionError("the sides of a Kernel have the layout of its tile")
    return Kernel(
        nngp=state.tile.cov12,
        ntk=state.tile.ntk if ntk else None,
        cov1=state.side1,
        cov2=state.side2,
        x1_is_x2=state.x1_is_x2 if x1_is_x2 is None else x1_is_x2,
        is_gaussian=state.in1.is_gaussian,
        is_reversed=False,
        is_input=False,
        diagonal_batch=not state.side_pairs,
        diagonal_spatial=state.layout == Layout.DIAGONAL and bool(spatial),
        shape1=state.in1.shape,
        shape2=state.in2.shape,
        batch_axis=state.in1.batch_axis,
        channel_axis=state.in1.channel_axis,
        mask1=state.mask1,
        mask2=state.mask1 if state.shared else state.mask2,
    )
