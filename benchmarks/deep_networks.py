"""Deeper networks in the form of `networks`: residual convolutional ones and a recurrent one."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.networks import Draw, dense

NHWC = ("NHWC", "HWIO", "NHWC")


def _convolve(kernel, x, stride=1):
    scale = math.sqrt(math.prod(kernel.shape[:3]))
    return lax.conv_general_dilated(
        x / scale, kernel, (stride, stride), "SAME", dimension_numbers=NHWC
    )


def resnet(widths=(16, 32, 64, 128), blocks=1, size=32, outputs=10, stem=1, dtype=np.float32):
    """Basic blocks with batch normalisation in evaluation, a stride of 2 between stages."""
    draw = Draw(4, dtype)
    ones = lambda n: (1 + 0.1 * draw(n), 0.1 * draw(n))
    params = {"stem": draw(3, 3, 3, widths[0]), "first": ones(widths[0]), "blocks": []}
    strides, inputs = [], widths[0]
    for stage, width in enumerate(widths):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            one = {
                "a": draw(3, 3, inputs, width),
                "norm_a": ones(width),
                "b": draw(3, 3, width, width),
                "norm_b": ones(width),
            }
            if stride > 1 or inputs != width:
                one["short"] = draw(1, 1, inputs, width)
            params["blocks"].append(one)
            strides.append(stride)
            inputs = width
    params["readout"], params["bias"] = draw(inputs, outputs), draw(outputs)

    def f(params, x):
        normed = lambda pair, x: x * pair[0] + pair[1]
        x = jnp.maximum(normed(params["first"], _convolve(params["stem"], x, stem)), 0)
        for one, stride in zip(params["blocks"], strides):
            y = jnp.maximum(normed(one["norm_a"], _convolve(one["a"], x, stride)), 0)
            y = normed(one["norm_b"], _convolve(one["b"], y))
            x = _convolve(one["short"], x, stride) if "short" in one else x
            x = jnp.maximum(x + y, 0)
        return dense(params["readout"], x.mean((1, 2))) + params["bias"]

    return f, params, lambda n, seed=0: Draw(400 + seed, dtype)(n, size, size, 3)


def lstm(d=64, steps=32, features=16, outputs=10, words=0, dtype=np.float32):
    """One layer as a scan; with `words`, an embedding in front of it."""
    draw = Draw(5, dtype)
    params = {
        "w": draw(features, 4 * d),
        "u": draw(d, 4 * d),
        "b": draw(4 * d),
        "readout": draw(d, outputs),
    }
    if words:
        params["embedding"] = draw(words, features)

    def f(params, x):
        x = params["embedding"][x] if words else x

        def step(carry, x_t):
            h, c = carry
            gates = dense(params["w"], x_t) + dense(params["u"], h) + params["b"]
            i, f, g, o = jnp.split(gates, 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), None

        start = jnp.zeros((x.shape[0], d), dtype)
        (h, _), _ = lax.scan(step, (start, start), jnp.swapaxes(x, 0, 1))
        return dense(params["readout"], h)

    def inputs(n, seed=0):
        if words:
            return jnp.asarray(np.random.RandomState(500 + seed).randint(0, words, (n, steps)))
        return Draw(500 + seed, dtype)(n, steps, features)

    return f, params, inputs
