"""Axes of activations: the checks and mask shapes that layers share."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from tangents._infinite.tile import Context, Signal


def check_axes(node: Any, signal: Signal) -> None:
    """The node's batch and channel axis must be those of its input."""
    ndim = len(signal.shape)
    for kind in ("batch", "channel"):
        own, actual = getattr(node, f"{kind}_axis"), getattr(signal, f"{kind}_axis")
        if not -ndim <= own < ndim or own % ndim != actual:
            raise ValueError(
                f"{node.name} has {kind}_axis={own}, and its input of shape {signal.shape} has "
                f"{kind}_axis={actual}, making the infinite limit ill-defined: pass "
                f"{kind}_axis={actual} to {node.name}"
            )


def collapse_channels(mask: Any, channel_axis: int) -> Any:
    """Masked after a sum over channels: where all channels are."""
    return jnp.all(mask, axis=channel_axis, keepdims=True)


def check_spatial(node: Any, signal: Signal) -> None:
    """The node needs spatial axes."""
    if not signal.spatial_axes:
        raise ValueError(
            f"{node.name} needs an input with spatial axes, and its input of shape {signal.shape} "
            "has none: remove the layer, or the Flatten or global pooling before it"
        )


def check_channel_masks(node: Any, context: Context) -> None:
    """The node counts positions, so masks must be the same in all channels."""
    if context.channel_masks:
        raise NotImplementedError(
            f"{node.name}: masks that differ between channels are not supported at infinite "
            "width: mask whole positions, or put a Dense or Conv before this layer"
        )
