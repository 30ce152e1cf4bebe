"""Inputs spread over devices, in a process of its own with two simulated ones."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import tangents
from tangents import stax
from tangents._infinite import executors

assert jax.device_count() == 2
mesh = jax.make_mesh((2,), ("examples",), axis_types=(AxisType.Auto,))
spread = lambda x: jax.device_put(x, NamedSharding(mesh, P("examples")))
conv = lambda: stax.serial(stax.Conv(1, (3, 3), padding="SAME"), stax.Relu())
pool = stax.AvgPool((2, 2), (2, 2))
dense = stax.serial(stax.Dense(1, 1.25, 0.125), stax.Relu(), stax.Dense(1))
image = stax.serial(conv(), pool, conv(), stax.GlobalAvgPool())
cases = [
    (dense[2], (8, 5), executors.Blocked(least=1, most=6)),
    (image[2], (4, 4, 4, 2), executors.ByPlanes(least=1)),
]
for kernel_fn, shape, executor in cases:
    executors.register(executor)
    x = jax.random.normal(jax.random.key(0), shape)
    y = jax.random.normal(jax.random.key(1), shape)
    assert f"({executor.name})" in kernel_fn.explain(x)
    for second in (None, y):
        expected = kernel_fn(x, second, "ntk")
        other = None if second is None else spread(second)
        for call in (kernel_fn, jax.jit(kernel_fn, static_argnums=2)):
            np.testing.assert_allclose(call(spread(x), other, "ntk"), expected, rtol=1e-5)
        shared = tangents.batch(kernel_fn, 2, device_count=2)
        np.testing.assert_allclose(shared(x, second, "ntk"), expected, rtol=1e-5)
    executors.unregister(executor)
print("done")
"""


@pytest.mark.slow
def test_sharded_inputs_and_tiles_on_two_devices():
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0 and run.stdout.endswith("done\n"), run.stderr[-3000:]
