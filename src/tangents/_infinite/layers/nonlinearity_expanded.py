"""Nonlinearities whose duals are expansions (`dual/expansion.py`)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tangents._core.typing import Array
from tangents._infinite.dual.breakpoints import breakpoints
from tangents._infinite.dual.expansion import Expansion, Kink, expand
from tangents._infinite.layer import Layer
from tangents._infinite.layers.nonlinearity import nonlinearity

_SELU_SCALE, _SELU_ALPHA = 1.0507009873554805, 1.6732632423543772


def _elu(alpha: Any, x: Array) -> Array:
    return jnp.where(x > 0, x, alpha * jnp.expm1(jnp.minimum(x, 0)))


def _elu_kinks(scale: Any, alpha: Any) -> tuple[Kink, ...]:
    """At 0 the slope jumps by 1 - alpha, and the derivatives above by -alpha."""
    return (Kink(0.0, (0.0, scale * (1 - alpha), -scale * alpha, -scale * alpha)),)


def _hard_tanh(hyper: Any, x: Array) -> Array:
    return jnp.clip(x, -1, 1)


_HARD_TANH_KINKS = (Kink(-1.0, (0.0, 1.0, 0.0, 0.0)), Kink(1.0, (0.0, -1.0, 0.0, 0.0)))

TANH = expand(lambda hyper, x: jnp.tanh(x), parity=1)
SOFTPLUS = expand(lambda hyper, x: jax.nn.softplus(x))
SILU = expand(lambda hyper, x: jax.nn.silu(x))
MISH = expand(lambda hyper, x: jax.nn.mish(x))
ELU = expand(
    lambda hyper, x: _elu(hyper["alpha"], x),
    lambda hyper: _elu_kinks(1, hyper["alpha"]),
    tabulated=False,
)
SELU = expand(
    lambda hyper, x: _SELU_SCALE * _elu(_SELU_ALPHA, x),
    lambda hyper: _elu_kinks(_SELU_SCALE, _SELU_ALPHA),
)
# Without its kinks it is a constant.
HARD_TANH = expand(_hard_tanh, lambda hyper: _HARD_TANH_KINKS, terms=4)


@functools.lru_cache(maxsize=256)
def elu_of(alpha: float) -> Expansion:
    """The dual of Elu for a number known beforehand."""
    return expand(lambda hyper, x: _elu(alpha, x), lambda hyper: _elu_kinks(1.0, alpha))


@functools.lru_cache(maxsize=256)  # one kernel for one function: it is a key of plans
def expansion_of(fn: Callable[[Array], Array]) -> Expansion:
    """The dual of any function; its kinks are looked for when the kernel is first asked for."""

    @functools.cache
    def found() -> tuple[Kink, ...]:
        return tuple(Kink(b.place, b.jumps) for b in breakpoints(fn))

    return expand(lambda hyper, x: fn(x), lambda hyper: found())


def Tanh() -> Layer:
    """Hyperbolic tangent, phi(x) = tanh(x).

    Kernels by the expansion of `Elementwise`, of odd terms only.

    Examples:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from tangents import stax
        >>> _, _, kernel_fn = stax.serial(stax.Dense(1), stax.Tanh())
        >>> print(np.asarray(kernel_fn(jnp.ones((1, 2)), None, "nngp")).round(4))
        [[0.3943]]
    """
    return nonlinearity("Tanh", TANH)


def Softplus() -> Layer:
    """Softplus, phi(x) = log(1 + exp(x)); kernels by the expansion of `Elementwise`.

    Examples:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from tangents import stax
        >>> _, phi, _ = stax.Softplus()
        >>> print(np.asarray(phi((), jnp.zeros(1))).round(4))
        [0.6931]
    """
    return nonlinearity("Softplus", SOFTPLUS)


def SiLU() -> Layer:
    """Sigmoid linear unit, phi(x) = x / (1 + exp(-x)) (Ramachandran et al. 2017).

    Kernels by the expansion of `Elementwise`. `Swish` is another name of it.

    Examples:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from tangents import stax
        >>> _, phi, _ = stax.SiLU()
        >>> print(np.asarray(phi((), jnp.ones(1))).round(4))
        [0.7311]
    """
    return nonlinearity("SiLU", SILU)


Swish = SiLU


def Mish() -> Layer:
    """Mish, phi(x) = x tanh(softplus(x)) (Misra 2019); kernels by the expansion of `Elementwise`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import stax
        >>> _, phi, _ = stax.Mish()
        >>> phi((), jnp.zeros(1)).tolist()
        [0.0]
    """
    return nonlinearity("Mish", MISH)


def Elu(alpha: Any = 1.0) -> Layer:
    """Exponential linear unit, phi(x) = x for x > 0, else alpha (exp(x) - 1) (Clevert et al. 2016).

    Kernels by the expansion of `Elementwise`, with the jumps of phi' and phi'' at 0 taken apart.

    Args:
      alpha: minus the limit at -∞; the kernel is differentiable in it.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import stax
        >>> _, phi, _ = stax.Elu(2.0)
        >>> phi((), jnp.array([-50.0, 3.0])).tolist()
        [-2.0, 3.0]
    """
    if isinstance(alpha, int | float):
        return nonlinearity("Elu", elu_of(float(alpha)))
    return nonlinearity("Elu", ELU, alpha=alpha)


def Selu() -> Layer:
    """Scaled exponential linear unit, phi = λ Elu(α) (Klambauer et al. 2017).

    With λ ≈ 1.0507 and α ≈ 1.6733 variance 1 is a fixed point. Kernels as of `Elu`.

    Examples:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from tangents import stax
        >>> _, _, kernel_fn = stax.serial(stax.Dense(1), stax.Selu())
        >>> print(np.asarray(kernel_fn(jnp.ones((1, 2)), None, "nngp")).round(4))
        [[1.]]
    """
    return nonlinearity("Selu", SELU)


def HardTanh() -> Layer:
    """Clipped identity, phi(x) = min(max(x, -1), 1).

    Kernels in closed form, by Owen's function (`dual/orthant.py`); in single precision by short
    polynomials (`dual/corners.py`).

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import stax
        >>> _, phi, _ = stax.HardTanh()
        >>> phi((), jnp.array([-2.0, 0.5])).tolist()
        [-1.0, 0.5]
    """
    return nonlinearity("HardTanh", HARD_TANH)
