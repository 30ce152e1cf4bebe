"""Networks as plain JAX functions: the same source on both sides, on any JAX from 0.4 on.

Each returns (f, params, inputs): `f(params, x)`, a tree of float32 arrays, and a function that
draws a batch of n inputs. All numbers come from NumPy, since JAX's generators gave others in 0.4.
Weights are N(0, 1) and divided by the square root of their fan-in in `f` (NTK parameterisation).
"""

from __future__ import annotations

import math
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Draw:
    """Standard normal arrays from one seed, in order."""

    def __init__(self, seed: int, dtype=np.float32):
        self.random = np.random.RandomState(seed)
        self.dtype = dtype

    def __call__(self, *shape: int):
        return jnp.asarray(self.random.standard_normal(shape).astype(self.dtype))


def dense(w, x):
    # The scale stands before the product: on JAX 0.4.25, CPU, float32, jit(x @ w / c + b) computes
    # (x @ w + b) / c from about 64×512 on (its fusion of the bias into oneDNN's product).
    return (x / math.sqrt(w.shape[0])) @ w


def mlp(width=512, depth=3, inputs=784, outputs=10, dtype=np.float32):
    """`depth` hidden layers of `width` with ReLU, biases in each."""
    draw = Draw(1, dtype)
    sizes = [inputs] + [width] * depth + [outputs]
    params = [(draw(m, n), draw(n)) for m, n in pairwise(sizes)]

    def f(params, x):
        for index, (w, b) in enumerate(params):
            x = dense(w, x) + b
            if index < depth:
                x = jnp.maximum(x, 0)
        return x

    return f, params, lambda n, seed=0: Draw(100 + seed, dtype)(n, inputs)


def cnn(width=32, size=32, channels=3, outputs=10, depth=3, dtype=np.float32):
    """`depth` 3×3 convolutions (VALID) with ReLU between them, flattened into a dense layer."""
    draw = Draw(2, dtype)
    fan = [channels] + [width] * depth
    kernels = [draw(3, 3, m, n) for m, n in pairwise(fan)]
    rest = size - 2 * depth
    params = [kernels, draw(rest * rest * width, outputs)]

    def f(params, x):
        kernels, readout = params
        for index, kernel in enumerate(kernels):
            x = lax.conv_general_dilated(
                x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            ) / math.sqrt(math.prod(kernel.shape[:3]))
            if index < depth - 1:
                x = jnp.maximum(x, 0)
        return dense(readout, x.reshape(x.shape[0], -1))

    return f, params, lambda n, seed=0: Draw(200 + seed, dtype)(n, size, size, channels)


def transformer(d=128, blocks=2, tokens=64, heads=4, features=48, outputs=10, dtype=np.float32):
    """Encoder, normalisation first, on `tokens` patches of `features`; mean, dense layer."""
    draw = Draw(3, dtype)
    params = {
        "embed": draw(features, d),
        "position": draw(tokens, d),
        "blocks": [
            {
                "gain": (jnp.ones(d, dtype), jnp.ones(d, dtype)),
                "qkv": draw(d, 3 * d),
                "out": draw(d, d),
                "up": draw(d, 4 * d),
                "down": draw(4 * d, d),
            }
            for _ in range(blocks)
        ],
        "readout": draw(d, outputs),
    }

    def normalise(x, gain):
        x = x - x.mean(-1, keepdims=True)
        return gain * x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5)

    def attention(block, x):
        n, t, _ = x.shape
        q, k, v = jnp.split(dense(block["qkv"], x).reshape(n, t, 3 * heads, d // heads), 3, axis=2)
        scores = jnp.einsum("nqhc,nkhc->nhqk", q, k) / math.sqrt(d // heads)
        mixed = jnp.einsum("nhqk,nkhc->nqhc", jax.nn.softmax(scores), v)
        return dense(block["out"], mixed.reshape(n, t, d))

    def f(params, x):
        x = dense(params["embed"], x) + params["position"]
        for block in params["blocks"]:
            x = x + attention(block, normalise(x, block["gain"][0]))
            hidden = jax.nn.gelu(dense(block["up"], normalise(x, block["gain"][1])))
            x = x + dense(block["down"], hidden)
        return dense(params["readout"], x.mean(1))

    return f, params, lambda n, seed=0: Draw(300 + seed, dtype)(n, tokens, features)
