"""Any function of one number: its dual by expansion, given, or by quadrature."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from tangents._core.typing import Array
from tangents._infinite.dual.quadrature import elementwise, elementwise_numerical
from tangents._infinite.layer import Layer
from tangents._infinite.layers.nonlinearity import nonlinearity
from tangents._infinite.layers.nonlinearity_expanded import expansion_of


def Elementwise(
    fn: Callable[[Array], Array] | None = None,
    nngp_fn: Callable[[Array, Array, Array], Array] | None = None,
    d_nngp_fn: Callable[[Array, Array, Array], Array] | None = None,
) -> Layer:
    """Any nonlinearity, phi = fn; its dual kernel is found, or given by you. Named after `fn`.

    With `fn` alone K' and T' come from a Hermite expansion (Daniely et al. 2016, lemma 11),

        K' = Σ_n a_n(v1) a_n(v2) ρ^n,   a_n(v) = E[phi(√v z) he_n(z)],   ρ = K / √(v1 v2),

    with as many terms as the largest variance asks for; kinks of `fn` between -16 and 16 are found
    and their part of the sum taken in closed form (`dual/expansion.py` has formulas, sources, and
    `truncation`, the share that is left out; docs/infinite.md has measured errors).

    With `nngp_fn` K' = nngp_fn(K, v1, v2) and T' = d_nngp_fn(K, v1, v2) T, where, under
    (u, v) ~ N(0, [[v1, K], [K, v2]]), nngp_fn is E[phi(u) phi(v)] and d_nngp_fn its derivative in
    K, E[phi'(u) phi'(v)] (Price 1958).

    Args:
      fn: phi, applied to arrays element by element. None: `apply_fn` is not available.
      nngp_fn: function of three scalars. None: the expansion of `fn`.
      d_nngp_fn: function of three scalars. None: `nngp_fn` is differentiated in its first argument.

    Raises:
      ValueError: if both `fn` and `nngp_fn` are None.
      NotImplementedError: in `apply_fn` without `fn`; in `kernel_fn` with `d_nngp_fn` alone.

    Warns:
      UserWarning: if `d_nngp_fn` is derived; it may be nan where the formula is 0/0, as often at
        equal inputs.

    Examples:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from tangents import stax
        >>> square = stax.Elementwise(
        ...     lambda x: x**2,
        ...     lambda cov12, var1, var2: 2 * cov12**2 + var1 * var2,
        ...     lambda cov12, var1, var2: 4 * cov12,
        ... )
        >>> _, _, kernel_fn = stax.serial(stax.Dense(1), square)
        >>> kernel_fn(jnp.ones((1, 2)), None, "nngp").tolist()
        [[3.0]]
        >>> _, _, kernel_fn = stax.serial(stax.Dense(1), stax.Elementwise(jnp.arctan))
        >>> print(np.asarray(kernel_fn(jnp.ones((1, 2)), None, "nngp")).round(4))
        [[0.4497]]
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
    if fn is not None and nngp_fn is None and d_nngp_fn is None:
        return nonlinearity(name, expansion_of(fn))
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
