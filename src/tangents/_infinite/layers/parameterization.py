"""Parameterisations of trainable layers: 'ntk' and 'standard'.

ntk:       y = (W_std / sqrt(fan_in)) W x + b_std b,  W, b ~ N(0, 1).
standard:  y = W x / sqrt(s0) + b,  W ~ N(0, W_std^2 s0 / fan_in), b ~ N(0, b_std^2),
           with s = (s0, s1) the scalings of the widths before and after the layer: the width of
           the output is s1 times the nominal one (Sohl-Dickstein et al. 2020, sec. 2 and 3).

The limit of the tangent kernel (same source, and Park et al. 2019):

    ntk:       T' = K' + A[T],  K' = A[K] + b_std^2
    standard:  T' = (fan_in / s0) A[K] / W_std^2 + 1[b] + A[T]

with A[K] = W_std^2 times the average of K over the fan-in (for a dense layer, K itself).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from tangents._infinite.dual.angle import affine_gap
from tangents._infinite.tile import Tile


def check_parameterization(parameterization: str, layer: str) -> str:
    """The name in lower case; anything but 'ntk' and 'standard' is an error."""
    name = parameterization.lower() if isinstance(parameterization, str) else parameterization
    if name not in ("ntk", "standard"):
        raise ValueError(
            f"{layer}: parameterization={parameterization!r} must be 'ntk' or 'standard'"
        )
    return name


def width_after(out_dim: int, parameterization: str, s: tuple[int, int]) -> int:
    """Number of output channels."""
    return out_dim * s[1] if parameterization == "standard" else out_dim


def init_weights(rng, shape, fan_in: int, W_std, parameterization: str, s) -> jax.Array:
    """W of a layer whose outputs sum over `fan_in` inputs."""
    W = jax.random.normal(rng, shape)
    if parameterization == "standard":
        W = W * (W_std * (s[0] / fan_in) ** 0.5)
    return W


def init_bias(rng, shape, b_std, parameterization: str) -> jax.Array | None:
    """The bias, or None."""
    if b_std is None:
        return None
    b = jax.random.normal(rng, shape)
    return b * b_std if parameterization == "standard" else b


def scale_weights(fan_in: int, W_std, parameterization: str, s) -> Any:
    """What the product of weights and inputs is multiplied by."""
    if parameterization == "standard":
        return 1 / s[0] ** 0.5
    return W_std / fan_in**0.5


def add_bias(y: jax.Array, b: jax.Array | None, b_std, parameterization: str) -> jax.Array:
    """The output with its bias."""
    if b is None:
        return y
    return y + (b if parameterization == "standard" else b_std * b)


def affine_rule(
    averaged: Tile,
    W_std,
    b_std,
    fan_in: int,
    parameterization: str,
    s,
    bias_where: Any = None,
    variances: Any = None,
) -> Tile:
    """Covariances after random weights and bias, from those averaged over the fan-in.

    `bias_where` (boolean, broadcasts to the tile) restricts the bias to some pairs of positions.
    `variances`: those of both sides, averaged; with them a gap is carried.
    """
    mean, ntk, gap12 = averaged
    bias = None
    if b_std is not None:
        bias = jnp.asarray(b_std**2, mean.dtype)
        one = jnp.ones((), mean.dtype)
        if bias_where is not None:
            bias = jnp.where(bias_where, bias, 0 * bias)
            one = jnp.where(bias_where, one, 0 * one)
    cov12 = W_std**2 * mean
    if ntk is not None:
        ntk = W_std**2 * ntk
        if parameterization == "standard":
            ntk = ntk + fan_in / s[0] * mean
            if bias is not None:
                ntk = ntk + one
        else:
            ntk = ntk + cov12
            if bias is not None:
                ntk = ntk + bias
    if bias is not None:
        cov12 = cov12 + bias
    if gap12 is not None:
        if variances is None or bias_where is not None:
            return Tile(cov12, ntk)
        var1, var2 = variances
        weight = jnp.asarray(W_std**2, mean.dtype)
        gap12 = affine_gap(mean, gap12, var1, var2, weight, bias)
    return Tile(cov12, ntk, gap12)
