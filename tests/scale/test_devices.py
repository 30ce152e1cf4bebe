"""Tiles and samples shared by several devices: in a process of its own, with two CPU devices."""

import os
import subprocess
import sys

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
import tangents

assert jax.local_device_count() == 2
x1 = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)))
x2 = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)))
seen = set()

def gram(a, b):
    return jnp.exp(a @ (a if b is None else b).T)

for size in (0, 2):
    for second in (x2, None):
        tiled = tangents.batch(gram, size)
        assert tiled.device_count == 2
        np.testing.assert_allclose(tiled(x1, second), gram(x1, second), rtol=1e-5)
one = tangents.batch(gram, 2, device_count=0)
assert not hasattr(one, "device_count")

init_fn = lambda key, shape: ((-1, 1), jax.random.normal(key, (shape[-1], 1)))
apply_fn = lambda w, x: x @ w
make = lambda size, count: tangents.monte_carlo_kernel_fn(
    init_fn, apply_fn, jax.random.key(0), 3, size, count, standard_error=True
)
exact = make(0, 0)(x1, x2, "nngp")
for size in (0, 2):
    got = make(size, -1)(x1, x2, "nngp")
    np.testing.assert_allclose(got.mean, exact.mean, rtol=1e-5)
    np.testing.assert_allclose(got.standard_error, exact.standard_error, rtol=1e-4)
print("done")
"""


def test_two_devices():
    environment = dict(os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0 and run.stdout.endswith("done\n"), run.stderr[-3000:]
