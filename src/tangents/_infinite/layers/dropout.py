"""Dropout: keep each entry with probability `rate`, and divide what is kept by it.

    E[y y'] = x x' + [same example, same draw, same position] x x' (1 / rate - 1),

since two different entries are dropped independently (Schoenholz et al. 2017, sec. 5).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from tangents._infinite.graph import Node, hyper, node
from tangents._infinite.layer import Layer


@node
class DropoutNode(Node):
    """y = x * Bernoulli(rate) / rate in training, y = x in test mode."""

    rate: Any = hyper()
    mode: str = "train"
    name = "Dropout"

    @property
    def stochastic(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.mode == "train"

    def gaussian(self, incoming):
        return False

    def apply(self, params, x, *, mask=None, rng=None, **kwargs):
        if self.mode == "test":
            return x
        if rng is None:
            raise ValueError(
                "Dropout in mode 'train' draws at random: call apply_fn(..., rng=key), or make the "
                "layer with mode='test'"
            )
        keep = jax.random.bernoulli(rng, self.rate, x.shape)
        return jnp.where(keep, x / self.rate, jnp.zeros((), x.dtype))

    def rule(self, context, tile):
        same = context.same_entries
        if self.mode == "test" or same is None:
            return tile
        return tile.linear(lambda a: jnp.where(same, a / self.rate, a))


def Dropout(rate: Any, mode: str = "train") -> Layer:
    """Keep each entry with probability `rate` and divide it by `rate`; set the others to zero.

    Args:
      rate: probability to KEEP an entry, in (0, 1].
      mode: 'train' (`apply_fn` needs `rng=`) or 'test' (the identity).

    Raises:
      ValueError: for a rate outside (0, 1] or another mode.

    The output is not Gaussian. At infinite width the covariance of an example with itself is
    divided by `rate` at equal positions; so is that of x1 with x2 where they are one example: the
    inputs are equal by value, hence dropped by one draw.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from tangents import stax
        >>> _, drop, _ = stax.Dropout(0.5)
        >>> sorted(set(drop((), jnp.ones((1, 50)), rng=jax.random.key(0)).ravel().tolist()))
        [0.0, 2.0]
    """
    if not isinstance(rate, Tracer) and not 0 < rate <= 1:
        raise ValueError(f"Dropout: rate={rate} is the probability to keep an entry: 0 < rate <= 1")
    if mode not in ("train", "test"):
        raise ValueError(f"Dropout: mode={mode!r} must be 'train' or 'test'")
    return Layer(DropoutNode(rate, mode))
