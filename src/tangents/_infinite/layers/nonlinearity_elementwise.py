"""Any function of one number: with its dual given, or by quadrature (`dual/quadrature.py`)."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from tangents._core.typing import Array
from tangents._infinite.dual.quadrature import elementwise, elementwise_numerical
from tangents._infinite.layer import Layer
from tangents._infinite.layers.nonlinearity import nonlinearity


def Elementwise(
    fn: Callable[[Array], Array] | None = None,
    nngp_fn: Callable[[Array, Array, Array], Array] | None = None,
    d_nngp_fn: Callable[[Array, Array, Array], Array] | None = None,
) -> Layer:
    """A nonlinearity whose dual kernel you know, phi = fn.

    K' = nngp_fn(K, v1, v2) and T' = d_nngp_fn(K, v1, v2) T, where, under
    (u, v) ~ N(0, [[v1, K], [K, v2]]), nngp_fn is E[phi(u) phi(v)] and d_nngp_fn its derivative in
    K, E[phi'(u) phi'(v)] (Price 1958). The layer is named after `fn`.

    Args:
      fn: phi, applied to arrays element by element. None: `apply_fn` is not available.
      nngp_fn: function of three scalars. None: `kernel_fn` is not available.
      d_nngp_fn: function of three scalars. None: `nngp_fn` is differentiated in its first argument.

    Raises:
      ValueError: if both `fn` and `nngp_fn` are None.
      NotImplementedError: in `apply_fn` without `fn`, in `kernel_fn` without `nngp_fn`.

    Warns:
      UserWarning: if `d_nngp_fn` is derived; it may be nan where the formula is 0/0, as often at
        equal inputs.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import stax
        >>> square = stax.Elementwise(
        ...     lambda x: x**2,
        ...     lambda cov12, var1, var2: 2 * cov12**2 + var1 * var2,
        ...     lambda cov12, var1, var2: 4 * cov12,
        ... )
        >>> _, _, kernel_fn = stax.serial(stax.Dense(1), square)
        >>> kernel_fn(jnp.ones((1, 2)), None, "nngp").tolist()
        [[3.0]]
    """
    if fn is None and nngp_fn is None:
        raise ValueError("Elementwise: give fn (for apply_fn), nngp_fn (for kernel_fn), or both")
    if nngp_fn is not None and d_nngp_fn is None:
        warnings.warn(
            "Elementwise: d_nngp_fn is derived from nngp_fn by automatic differentiation, which "
            "may give nan where the formula is 0/0 (often at equal inputs). Pass d_nngp_fn to "
            "avoid it.",
            stacklevel=2,
        )
    name = getattr(fn, "__name__", "Elementwise")
    return nonlinearity(name, elementwise(fn, nngp_fn, d_nngp_fn))


def ElementwiseNumerical(
    fn: Callable[[Array], Array], deg: int, df: Callable[[Array], Array] | None = None
) -> Layer:
    """Any nonlinearity, phi = fn, its dual by Gauss-Hermite quadrature.

    K' ≈ Σ_ij w_i w_j phi(u_i) phi(v_ij) with u = √v1 x and v = K/√v1 x + √(v2 - K²/v1) y at the
    nodes of the rule; T' the same with phi' (Abramowitz & Stegun 1964, 25.4.46). Exact for
    polynomials of degree below `deg`; for a function with a kink the error falls slowly, like
    1/deg. Time grows with deg², memory does not.

    Args:
      fn: phi, applied to arrays element by element.
      deg: number of nodes along each of the two axes.
      df: phi'. None: `fn` is differentiated.

    Raises:
      ValueError: if `deg` is not a positive integer.

    Warns:
      UserWarning: as the error is not estimated.

    Examples:
        >>> import warnings
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from tangents import stax
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     layer = stax.ElementwiseNumerical(jnp.tanh, deg=30)
        >>> _, _, kernel_fn = stax.serial(stax.Dense(1), layer)
        >>> print(np.asarray(kernel_fn(jnp.ones((1, 2)), None, "nngp")).round(4))
        [[0.3943]]
    """
    if not isinstance(deg, int) or deg < 1:
        raise ValueError(f"ElementwiseNumerical: deg={deg!r} must be an integer >= 1")
    warnings.warn(
        f"ElementwiseNumerical: the kernel is a quadrature with {deg} x {deg} nodes, whose error "
        "is not estimated. Compare it with that of a larger deg.",
        stacklevel=2,
    )
    name = getattr(fn, "__name__", "ElementwiseNumerical")
    return nonlinearity(name, elementwise_numerical(fn, deg, df))
