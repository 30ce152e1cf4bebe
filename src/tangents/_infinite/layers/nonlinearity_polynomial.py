"""Polynomial nonlinearities (`dual/polynomial.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tangents._infinite.dual.polynomial import POLYNOMIAL, hermite, monomial
from tangents._infinite.layer import Layer
from tangents._infinite.layers.nonlinearity import nonlinearity


def Hermite(degree: int) -> Layer:
    """Normalised probabilists' Hermite polynomial, phi(x) = He_n(x) / √n!.

    For inputs of variance 1, K' = K^n and T' = n K^(n-1) T (Daniely et al. 2016, lemma 11). Other
    variances are accounted for exactly.

    Args:
      degree: n >= 0.

    Raises:
      ValueError: if `degree` is not a non-negative integer.

    Warns:
      UserWarning: at each call of `kernel_fn`, as the polynomials are orthonormal for inputs of
        variance 1 only.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import stax
        >>> _, phi, _ = stax.Hermite(1)
        >>> phi((), jnp.array([0.5])).tolist()
        [0.5]
    """
    if not isinstance(degree, int) or degree < 0:
        raise ValueError(f"Hermite: degree={degree!r} must be an integer >= 0")
    warning = (
        f"Hermite({degree}): Hermite polynomials are orthonormal for inputs of variance 1 (unit "
        f"norm), and only then is the NNGP the {degree}-th power of that before the layer. Other "
        "variances are accounted for exactly; they grow fast with the degree."
    )
    return nonlinearity("Hermite", hermite(degree), kernel_warning=warning)


def Monomial(degree: int) -> Layer:
    """Power, phi(x) = x^degree.

    K' = Σ_k (n over k)² k! ((n-k-1)!!)² K^k (v1 v2)^((n-k)/2) over k = n, n-2, ... (Isserlis 1918);
    T' is T times its derivative in K.

    Args:
      degree: n from 0 to 5.

    Raises:
      NotImplementedError: if `degree` is not from 0 to 5.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import stax
        >>> _, _, kernel_fn = stax.serial(stax.Dense(1), stax.Monomial(2))
        >>> kernel_fn(jnp.ones((1, 2)), None, "nngp").tolist()
        [[3.0]]
    """
    if degree not in range(6):
        raise NotImplementedError(
            f"Monomial: degree={degree!r} must be one of 0 to 5; other polynomials: Polynomial"
        )
    return nonlinearity("Monomial", monomial(int(degree)))


def Polynomial(coef: Sequence[Any]) -> Layer:
    """Polynomial, phi(x) = Σ_k coef[k] x^k.

    K' = Σ_k K^k / k! E[phi^(k)(u)] E[phi^(k)(v)] (Daniely et al. 2016, lemma 11) and T' is T times
    its derivative in K.

    Args:
      coef: coefficients, the constant one first.

    Raises:
      ValueError: if `coef` is empty.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import stax
        >>> _, phi, _ = stax.Polynomial([1.0, 0.0, 2.0])
        >>> phi((), jnp.array([3.0])).tolist()
        [19.0]
    """
    coef = tuple(coef)
    if not coef:
        raise ValueError("Polynomial: coef must have at least one coefficient, the constant one")
    return nonlinearity("Polynomial", POLYNOMIAL, coef=coef)
