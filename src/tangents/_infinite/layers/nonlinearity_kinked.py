"""Nonlinearities with a kink or a jump at 0: the arc-cosine family (`dual/arc_cosine.py`).

`do_stabilize` is accepted for compatibility: dual kernels here are computed from the angle and the
norm of every pair apart, so that large variances do not overflow and there is nothing to stabilise.
"""

from __future__ import annotations

from typing import Any

from tangents._infinite.dual.arc_cosine import (
    ABRELU,
    ABS,
    LEAKY_RELU,
    RELU,
    SIGN,
    rectified_monomial,
)
from tangents._infinite.layer import Layer
from tangents._infinite.layers.nonlinearity import nonlinearity


def Relu(do_stabilize: bool = False) -> Layer:
    """Rectified linear unit, phi(x) = max(x, 0).

    With s = √(v1 v2) and cos θ = K / s: K' = s (sin θ + (π - θ) cos θ) / 2π and
    T' = T (π - θ) / 2π (Cho & Saul 2009, eq. 6). Where inputs are equal or opposite T' has a cusp;
    its derivative there is the symmetric subgradient. At zero variance phi'(0) = 1/2.

    Args:
      do_stabilize: without effect; the kernel is always computed in the stable form.

    Examples:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from tangents import stax
        >>> _, _, kernel_fn = stax.serial(stax.Dense(1), stax.Relu())
        >>> print(np.asarray(kernel_fn(2.0 * jnp.eye(2), None, "nngp")).round(4))
        [[1.     0.3183]
         [0.3183 1.    ]]
    """
    return nonlinearity("Relu", RELU)


def LeakyRelu(alpha: Any, do_stabilize: bool = False) -> Layer:
    """Leaky rectified linear unit, phi(x) = alpha min(x, 0) + max(x, 0).

    K' = (1 + α²) K / 2 + (1 - α)² s (sin θ - θ cos θ) / 2π, T' = T ((1 + α²) / 2 - (1 - α)² θ / 2π)
    with s, θ as in `Relu` (Tsuchida et al. 2018, eq. 6). Derivative at equal inputs: as `Relu`.

    Args:
      alpha: slope for negative x.
      do_stabilize: without effect; the kernel is always computed in the stable form.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import stax
        >>> _, phi, _ = stax.LeakyRelu(0.5)
        >>> phi((), jnp.array([-1.0, 1.0])).tolist()
        [-0.5, 1.0]
    """
    return nonlinearity("LeakyRelu", LEAKY_RELU, alpha=alpha)


def Abs(do_stabilize: bool = False) -> Layer:
    """Absolute value, phi(x) = |x|.

    K' = K + 2 s (sin θ - θ cos θ) / π, T' = T (1 - 2 θ / π) with s, θ as in `Relu`: LeakyRelu with
    alpha = -1. Derivative at equal inputs: as `Relu`.

    Args:
      do_stabilize: without effect; the kernel is always computed in the stable form.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import stax
        >>> _, phi, _ = stax.Abs()
        >>> phi((), jnp.array([-2.0, 1.0])).tolist()
        [2.0, 1.0]
    """
    return nonlinearity("Abs", ABS)


def ABRelu(a: Any, b: Any, do_stabilize: bool = False) -> Layer:
    """Piecewise linear, phi(x) = a min(x, 0) + b max(x, 0).

    K' = (a² + b²) K / 2 + (a - b)² s (sin θ - θ cos θ) / 2π,
    T' = T ((a² + b²) / 2 - (a - b)² θ / 2π) with s, θ as in `Relu` (Tsuchida et al. 2018, eq. 6).
    Derivative at equal inputs: as `Relu`.

    Args:
      a: slope for negative x.
      b: slope for positive x.
      do_stabilize: without effect; the kernel is always computed in the stable form.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import stax
        >>> _, phi, _ = stax.ABRelu(-1.0, 2.0)
        >>> phi((), jnp.array([-1.0, 1.0])).tolist()
        [1.0, 2.0]
    """
    return nonlinearity("ABRelu", ABRELU, a=a, b=b)


def Sign() -> Layer:
    """Sign function, phi(x) = sign(x), with sign(0) = 0.

    K' = 2/π arcsin(K / √(v1 v2)) (Sheppard 1899). T' = 0: the derivative of the sign is zero where
    it exists. The gradient of K' at equal or opposite inputs is the symmetric subgradient.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import stax
        >>> _, _, kernel_fn = stax.serial(stax.Dense(1), stax.Sign())
        >>> kernel_fn(jnp.eye(2), None, "nngp").round(4).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    return nonlinearity("Sign", SIGN)


def RectifiedMonomial(degree: int) -> Layer:
    """Rectified power, phi(x) = max(x, 0)^degree; the unit step for degree 0.

    K' = (v1 v2)^(n/2) J_n(θ) / 2π, T' = T n² (v1 v2)^((n-1)/2) J_(n-1)(θ) / 2π with the arc-cosine
    functions J_n of Cho & Saul 2009 (eq. 4); finite at every θ. T' = 0 for degree 0.

    Args:
      degree: n >= 0.

    Raises:
      ValueError: if `degree` is not a non-negative integer.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import stax
        >>> _, phi, _ = stax.RectifiedMonomial(2)
        >>> phi((), jnp.array([-2.0, 3.0])).tolist()
        [0.0, 9.0]
    """
    if not isinstance(degree, int) or degree < 0:
        raise ValueError(f"RectifiedMonomial: degree={degree!r} must be an integer >= 0")
    return nonlinearity("RectifiedMonomial", rectified_monomial(degree))
