"""The slow, obvious reference: Jacobians and kernels by `tf.GradientTape`."""

from __future__ import annotations

import logging

import numpy as np
import tensorflow as tf

# Each Jacobian is a new function to TensorFlow, which warns of that.
logging.getLogger("tensorflow").setLevel(logging.ERROR)


def jacobian(f, variables, x):
    """∂f(x) / ∂variables, each (*output shape, size of the variable)."""
    with tf.GradientTape() as tape:
        y = f(x)
    found = tape.jacobian(y, variables, unconnected_gradients="zero")
    return [np.reshape(j, (*y.shape, -1)) for j in found]


def ntk(f, variables, x1, x2):
    """Mean over the logits of J(x1) J(x2)ᵀ, for outputs (n, k)."""
    j1, j2 = jacobian(f, variables, x1), jacobian(f, variables, x2)
    return sum(np.einsum("nkp,mkp->nm", a, b) for a, b in zip(j1, j2, strict=True)) / j1[0].shape[1]


def pullback(f, variables, x, cotangent):
    """cotangentᵀ ∂f(x) / ∂variables."""
    with tf.GradientTape() as tape:
        y = f(x)
    found = tape.gradient(y, variables, cotangent, unconnected_gradients="zero")
    return [np.asarray(tf.convert_to_tensor(g)) for g in found]
