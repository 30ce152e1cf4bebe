"""`batch` on a fully connected network: the kernel of 4000 examples in tiles of 500."""

from __future__ import annotations

from benchmarks.protocol import Case, Side, Target, Workload


def build(side: Side) -> Case:
    import jax.numpy as jnp
    import numpy as np

    stax = side.stax
    layers = [stax.Dense(1, 1.5, 0.1), stax.Relu()] * 3 + [stax.Dense(1, 1.5, 0.1)]
    kernel_fn = side.nt.batch(stax.serial(*layers)[2], batch_size=side.size(500, 8))
    x = np.random.RandomState(0).standard_normal((side.size(4000, 24), 784)).astype(np.float32)
    x = jnp.asarray(x)
    # Entries near identical inputs are what the peer loses in float32.
    return Case(run=lambda: kernel_fn(x, None, "ntk"))


WORKLOADS = [Workload("batch/fcn/ntk", build, targets=(Target("speedup", 3.0),), rtol=1e-3)]
