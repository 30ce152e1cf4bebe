"""Nonlinearities: y = phi(x), element by element, on a Gaussian input.

With the dual kernel of phi (see `tangents._infinite.dual`),

    K' = E[phi(u) phi(v)],   T' = E[phi'(u) phi'(v)] T,   (u, v) ~ N(0, [[v1, K], [K, v2]])

(Jacot et al. 2018, thm 1). A new nonlinearity is a dual in `dual/`, a function like those in
`nonlinearity_*.py`, and a row in `tests/infinite/dual/table.py`.
"""

from __future__ import annotations

from typing import Any

import jax

from tangents._infinite.dual.expansion import Expansion
from tangents._infinite.dual.form import DualKernel
from tangents._infinite.graph import Node, hyper, node
from tangents._infinite.layer import Layer
from tangents._infinite.tile import Layout, Need, Tile


@node
class NonlinearityNode(Node):
    """y = phi(x).

    label: the name of the layer. kernel: phi and its dual. hyper: scalars of phi by name.
    """

    label: str
    kernel: DualKernel | Expansion
    hyper: Any = hyper()
    kernel_warning: str | None = None
    gaussian_input = True
    takes_rest = True

    @property
    def name(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.label

    @property
    def plane_wise(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        # Coefficients of an expansion belong to single positions, which planes repeat.
        return not isinstance(self.kernel, Expansion)

    @property
    def side_maker(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        prepare = getattr(self.kernel, "prepare", None)
        return None if prepare is None else jax.tree_util.Partial(prepare)

    @property
    def reads_norm(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return isinstance(self.kernel, DualKernel) and self.kernel.of_norm is not None

    def gaussian(self, incoming):
        return False

    def signal(self, signal):
        if not signal.is_gaussian:
            raise ValueError(
                "The input to the activation function must be Gaussian, and the input to "
                f"{self.name} is not: put a layer with random weights (Dense, Conv, ...) directly "
                "before it"
            )
        return super().signal(signal)

    def apply(self, params, x, *, mask=None, **kwargs):
        return self.kernel.phi(self.hyper, x)

    def needs(self, need):
        return Need(need.tile, max(need.side, Layout.DIAGONAL))

    def rule(self, context, tile):
        kernel = self.kernel
        exact = isinstance(kernel, Expansion) or kernel.exact_diagonal
        if exact and context.equal_entries:
            return Tile(kernel.diagonal(self.hyper, tile.cov12))
        var1, var2 = context.variances
        if isinstance(self.kernel, Expansion):
            sides = context.pair(context.variance(1), context.variance(2))
            given = tile.cov12, var1, var2, *sides, tile.gap12
            prepared = context.prepared
            if prepared is not None:
                numbers = jax.vmap(context.pair)(*prepared.sides)
                prepared = prepared._replace(sides=numbers)
            dual = self.kernel.from_sides(self.hyper, *given, prepared=prepared)
        elif context.norm is not None and self.kernel.of_norm is not None:
            dual = self.kernel.of_norm(self.hyper, tile.cov12, context.norm, tile.gap12)
        else:
            dual = self.kernel.dual(self.hyper, tile.cov12, var1, var2, tile.gap12)
        ntk = tile.whole().ntk
        if ntk is not None and ntk.ndim > 0:  # a zero without axes stays one
            ntk = dual.d_nngp * ntk
        return Tile(dual.nngp, ntk, dual.gap12)


def nonlinearity(
    name: str, kernel: DualKernel | Expansion, *, kernel_warning: str | None = None, **hyper: Any
) -> Layer:
    """A layer from a dual kernel and the scalars of its nonlinearity."""
    return Layer(NonlinearityNode(name, kernel, hyper, kernel_warning))
