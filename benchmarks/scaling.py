"""Cost of infinite kernels against their size: `python -m benchmarks.scaling`.

CPU time of jitted calls, float32, x2=None, the smallest of three; the exponent is that of the
largest size against the one before. Compile time is tracing and compiling by themselves.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any


def _measure(network: Callable[[Any], Any], shape: Sequence[int]) -> tuple[float, float]:
    """`(seconds to compile, seconds of a call)`."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from tangents import stax

    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    kernel_fn = network(stax)[2]
    start = time.process_time()
    call = jax.jit(lambda x: tuple(kernel_fn(x, None, ("nngp", "ntk")))).lower(x).compile()
    compiled = time.process_time() - start
    jax.block_until_ready(call(x))
    times = []
    for _ in range(3):
        start = time.process_time()
        jax.block_until_ready(call(x))
        times.append(time.process_time() - start)
    return compiled, min(times)


def _table(title: str, sizes: Sequence[int], network: Any, shape: Any) -> None:
    print(f"\n{title}\n\n| size | call | exponent | compile |\n| --- | --- | --- | --- |")
    before = None
    for size in sizes:
        compiled, call = _measure(lambda stax, size=size: network(stax, size), shape(size))
        exponent = ""
        if before is not None:
            exponent = f"{math.log(call / before[1]) / math.log(size / before[0]):.2f}"
        before = (size, call)
        print(f"| {size} | {1e3 * call:.3g} ms | {exponent} | {compiled:.2g} s |", flush=True)


def main() -> None:
    """Print the tables."""
    from benchmarks.workloads.infinite_cnn import flat_network, myrtle
    from benchmarks.workloads.infinite_fcn import dense_network

    dense = lambda stax, depth: dense_network(stax, "Relu", depth)
    _table(
        "ReLU, depth 5: examples",
        (625, 1250, 2500, 5000),
        lambda s, n: dense(s, 5),
        lambda n: (n, 784),
    )
    _table("ReLU, 1250 examples: depth", (4, 8, 16, 32, 64), dense, lambda depth: (1250, 784))
    _table(
        "five convolutions and Flatten, 16 examples: side of the image",
        (8, 16, 32, 64),
        lambda s, n: flat_network(s),
        lambda n: (16, n, n, 3),
    )
    _table(
        "Myrtle-5, 2 examples: side of the image",
        (16, 32, 64),
        lambda s, n: myrtle(s, 5),
        lambda n: (2, n, n, 3),
    )


if __name__ == "__main__":
    main()
