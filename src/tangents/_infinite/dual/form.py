"""What a dual kernel is, and what it returns.

The dual of a nonlinearity phi (Daniely et al. 2016, def. 4) is, under
(u, v) ~ N(0, [[var1, cov12], [cov12, var2]]),

    nngp   = E[phi(u) phi(v)],
    d_nngp = E[phi'(u) phi'(v)] = d nngp / d cov12      (Price 1958),

and the layer maps (K, T) to (nngp, d_nngp * T) (Jacot et al. 2018, thm 1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tangents._core.typing import Array


class Dual(NamedTuple):
    """Both expectations and, where the caller carries the gap, the gap after the layer.

    gap12: sqrt(E[phi(u)^2] E[phi(v)^2]) - |nngp|, if `gap12` = sqrt(var1 var2) - |cov12| was given
    and the family has a stable form of it; else `None`.
    """

    nngp: Array
    d_nngp: Array
    gap12: Array | None = None


class DualKernel(NamedTuple):
    """The three faces of a nonlinearity. `hyper` maps names to scalars, which may be tracers.

    phi: `(hyper, x) -> y`, the nonlinearity itself.
    dual: `(hyper, cov12, var1, var2, gap12=None) -> Dual`; arguments broadcast.
    diagonal: `(hyper, var) -> E[phi(u)^2]`.
    carries_gap: does `dual` return the gap where it is given one.
    exact_diagonal: is `diagonal` what `dual` gives at equal entries, value and derivatives.
    of_norm: `(hyper, cov12, s, gap12) -> Dual` from s = sqrt(var1 var2) alone, returning no gap:
      values in single precision, no derivatives. `None` where the variances are read apart.
    """

    phi: Callable[[Any, Array], Array]
    dual: Callable[..., Dual]
    diagonal: Callable[[Any, Array], Array]
    carries_gap: bool = False
    exact_diagonal: bool = False
    of_norm: Callable[..., Dual] | None = None
