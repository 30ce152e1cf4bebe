"""Against `torch.func`: Jacobians by vmap(jacrev), then one contraction for each parameter.

The recipe of PyTorch's tutorial on neural tangent kernels, on the networks of `networks.py`. It
shares an environment with the workloads of Gaussian processes.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from benchmarks.protocol import Case, Side, Target, Workload


def _numbers(side: Side, name: str):
    """Parameters and inputs as NumPy arrays, drawn in the order of `benchmarks.networks`."""
    import numpy as np

    def draws(seed: int):
        random = np.random.RandomState(seed)
        return lambda *shape: random.standard_normal(shape).astype(np.float32)

    if name == "mlp":
        width, inputs, outputs = side.size(512, 8), side.size(784, 5), side.size(10, 3)
        draw, sizes = draws(1), [inputs, width, width, width, outputs]
        params = [(draw(m, n), draw(n)) for m, n in pairwise(sizes)]
        return params, draws(100)(side.size(64, 3), inputs)
    width, size, outputs = side.size(32, 4), side.size(32, 8), side.size(10, 2)
    draw, fan = draws(2), [3, width, width, width]
    kernels = [draw(3, 3, m, n) for m, n in pairwise(fan)]
    rest = size - 6
    return [kernels, draw(rest * rest * width, outputs)], draws(200)(
        side.size(16, 2), size, size, 3
    )


def ours(name: str):
    def build(side: Side) -> Case:
        import jax

        from benchmarks.workloads.finite_methods import network

        f, params, inputs, batch = network(name, side)
        x = inputs(batch, 0)
        ntk_fn = jax.jit(side.nt.empirical_ntk_fn(f, trace_axes=()))
        return Case(run=lambda: ntk_fn(x, None, params))

    return build


def torch_kernel(name: str):
    def build(side: Side) -> Case:
        import torch
        from torch.func import jacrev, vmap

        params, x = _numbers(side, name)
        dense = lambda w, x: (x / math.sqrt(w.shape[0])) @ w

        def mlp(flat: list[Any], x):
            pairs = list(zip(flat[::2], flat[1::2], strict=True))
            for index, (w, b) in enumerate(pairs):
                x = dense(w, x) + b
                x = torch.relu(x) if index < len(pairs) - 1 else x
            return x

        def cnn(flat: list[Any], x):
            *kernels, readout = flat
            x = x.permute(2, 0, 1)[None]
            for index, kernel in enumerate(kernels):
                scale = math.sqrt(math.prod(kernel.shape[:3]))
                x = torch.nn.functional.conv2d(x, kernel.permute(3, 2, 0, 1)) / scale
                x = torch.relu(x) if index < len(kernels) - 1 else x
            return dense(readout, x.permute(0, 2, 3, 1).reshape(-1))

        if name == "mlp":
            f, flat = mlp, [part for pair in params for part in pair]
        else:
            f, flat = cnn, [*params[0], params[1]]
        flat = [torch.from_numpy(part) for part in flat]
        x = torch.from_numpy(x)

        def run():
            rows = vmap(jacrev(f), (None, 0))(flat, x)
            rows = [j.flatten(2) for j in rows]
            return torch.stack([torch.einsum("nap,mbp->nmab", j, j) for j in rows]).sum(0)

        return Case(run=run)

    return build


WORKLOADS = [
    Workload(
        f"ntk/torch/{name}/outputs",
        ours(name),
        peer="gpytorch",
        peer_build=torch_kernel(name),
        targets=(Target("speedup", 1.0),),
    )
    for name in ("mlp", "cnn")
]
