"""Smooth nonlinearities: error functions, trigonometric functions, exponentials."""

from __future__ import annotations

from typing import Any

from tangents._infinite.dual.error_function import ERF, GELU, GELU_TANH
from tangents._infinite.dual.exponential import (
    COS,
    EXP,
    GABOR,
    GAUSSIAN,
    RBF,
    SIN,
    exp_normalized,
)
from tangents._infinite.layer import Layer
from tangents._infinite.layers.nonlinearity import nonlinearity


def Erf(a: Any = 1.0, b: Any = 1.0, c: Any = 0.0) -> Layer:
    """Error function, phi(x) = a erf(b x) + c.

    K' = 2a²/π arcsin(2 b² K / √((1 + 2 b² v1)(1 + 2 b² v2))) + c² (Williams 1996, eq. 11), and T'
    is T times its derivative in K.

    Args:
      a: scale of the output.
      b: scale of the input.
      c: shift of the output.

    Examples:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from tangents import stax
        >>> _, _, kernel_fn = stax.serial(stax.Dense(1), stax.Erf())
        >>> print(np.asarray(kernel_fn(jnp.ones((1, 2)), None, "nngp")).round(4))
        [[0.4646]]
    """
    return nonlinearity("Erf", ERF, a=a, b=b, c=c)


def Sigmoid_like() -> Layer:
    """A sigmoid from the error function: phi(x) = (erf(x / 2.4020563531719796) + 1) / 2.

    Within 0.02 of the logistic sigmoid, and with a dual in closed form: that of `Erf`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import stax
        >>> _, phi, _ = stax.Sigmoid_like()
        >>> phi((), jnp.zeros(1)).tolist()
        [0.5]
    """
    return nonlinearity("Sigmoid_like", ERF, a=0.5, b=1 / 2.4020563531719796, c=0.5)


def Gelu(approximate: bool = False) -> Layer:
    """Gaussian error linear unit, phi(x) = x Φ(x), Φ the standard normal distribution function.

    K' = K/4 + (K arcsin(K/√((1+v1)(1+v2))) + (v1 v2 √d + K²/√d) / ((1+v1)(1+v2))) / 2π with
    d = (1 + v1)(1 + v2) - K² (Tsuchida et al. 2020, "Avoiding kernel fixed points", sec. 3.1), and
    T' is T times its derivative in K.

    Args:
      approximate: `apply_fn` uses the tanh approximation; the kernel is always the exact one.

    Examples:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from tangents import stax
        >>> _, _, kernel_fn = stax.serial(stax.Dense(1), stax.Gelu())
        >>> print(np.asarray(kernel_fn(jnp.ones((1, 2)), None, "nngp")).round(4))
        [[0.4252]]
    """
    return nonlinearity("Gelu", GELU_TANH if approximate else GELU)


def Sin(a: Any = 1.0, b: Any = 1.0, c: Any = 0.0) -> Layer:
    """Sine, phi(x) = a sin(b x + c).

    K' = a²/2 (exp(-b² (v1 + v2 - 2K) / 2) - cos(2c) exp(-b² (v1 + v2 + 2K) / 2)) (for b = 1, c = 0:
    Louart et al. 2018, table 1); T' is T times its derivative in K.

    Args:
      a: amplitude.
      b: frequency.
      c: phase.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import stax
        >>> _, phi, _ = stax.Sin(2.0)
        >>> phi((), jnp.zeros(1)).tolist()
        [0.0]
    """
    return nonlinearity("Sin", SIN, a=a, b=b, c=c)


def Cos(a: Any = 1.0, b: Any = 1.0, c: Any = 0.0) -> Layer:
    """Cosine, phi(x) = a cos(b x + c).

    K' = a²/2 (exp(-b² (v1 + v2 - 2K) / 2) + cos(2c) exp(-b² (v1 + v2 + 2K) / 2)); T' is T times its
    derivative in K (`Sin` with its phase shifted by a quarter).

    Args:
      a: amplitude.
      b: frequency.
      c: phase.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import stax
        >>> _, phi, _ = stax.Cos(2.0)
        >>> phi((), jnp.zeros(1)).tolist()
        [2.0]
    """
    return nonlinearity("Cos", COS, a=a, b=b, c=c)


def Rbf(gamma: Any = 1.0) -> Layer:
    """Random Fourier feature, phi(x) = √2 sin(√(2γ) x + π/4).

    K' = exp(-γ (v1 + v2 - 2K)), the squared-exponential kernel (Rahimi & Recht 2007), and
    T' = 2 γ K' T.

    Args:
      gamma: inverse squared length scale, γ.

    Examples:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from tangents import stax
        >>> _, _, kernel_fn = stax.serial(stax.Dense(1), stax.Rbf(0.5))
        >>> print(np.asarray(kernel_fn(jnp.eye(2), None, "nngp")).round(4))
        [[1.     0.6065]
         [0.6065 1.    ]]
    """
    return nonlinearity("Rbf", RBF, gamma=gamma)


def Gabor() -> Layer:
    """Gabor function, phi(x) = exp(-x²) sin(x).

    K' = exp(-(v1 + v2 + 4D) / 2d) sinh(K/d) / √d with D = v1 v2 - K², d = 1 + 2 (v1 + v2) + 4D (a
    Gaussian integral with imaginary linear term); T' is T times its derivative in K.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import stax
        >>> _, phi, _ = stax.Gabor()
        >>> phi((), jnp.zeros(1)).tolist()
        [0.0]
    """
    return nonlinearity("Gabor", GABOR)


def Exp(a: Any = 1, b: Any = 1) -> Layer:
    """Exponential, phi(x) = a exp(b x).

    K' = a² exp(b² (v1 + v2 + 2K) / 2) and T' = b² K' T (Daniely et al. 2016, table 1). It grows
    doubly exponentially with depth: keep b √v small.

    Args:
      a: scale of the output.
      b: scale of the input.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import stax
        >>> _, phi, _ = stax.Exp(2.0)
        >>> phi((), jnp.zeros(1)).tolist()
        [2.0]
    """
    return nonlinearity("Exp", EXP, a=a, b=b)


def Gaussian(a: Any = 1, b: Any = -1) -> Layer:
    """Gaussian, phi(x) = a exp(b x²).

    K' = a² / √d and T' = 4 a² b² K T / d^(3/2) with d = (1 - 2 b v1)(1 - 2 b v2) - 4 b² K²
    (Williams 1996, sec. 3.2). For b > 0 the expectation is infinite where 2 b v >= 1, and so is K'.

    Args:
      a: scale of the output.
      b: scale of the squared input; negative for a bell.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import stax
        >>> _, phi, _ = stax.Gaussian()
        >>> phi((), jnp.zeros(1)).tolist()
        [1.0]
    """
    return nonlinearity("Gaussian", GAUSSIAN, a=a, b=b)


def ExpNormalized(gamma: Any = 1, shift: Any = -1, do_clip: bool = False) -> Layer:
    """Exponential of the correlation: a kernel without a nonlinearity of finite width.

    K' = √(v1 v2) exp(γ (K / √(v1 v2) + shift)) and T' = γ exp(γ (K / √(v1 v2) + shift)) T, the
    normalised Gaussian kernel of Shankar et al. 2020 ("Neural kernels without tangents"). The
    correlation with a zero input counts as 0.

    Args:
      gamma: scale of the exponent, γ.
      shift: shift of the correlation.
      do_clip: keep the correlation within [-1, 1] against rounding.

    Raises:
      NotImplementedError: in `apply_fn`.

    Examples:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from tangents import stax
        >>> _, _, kernel_fn = stax.serial(stax.Dense(1), stax.ExpNormalized())
        >>> print(np.asarray(kernel_fn(jnp.eye(2), None, "nngp")).round(4))
        [[0.5    0.1839]
         [0.1839 0.5   ]]
    """
    return nonlinearity("ExpNormalized", exp_normalized(bool(do_clip)), gamma=gamma, shift=shift)
