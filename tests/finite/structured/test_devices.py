"""Inputs spread over devices, and programs written for them."""

import os
import subprocess
import sys

import pytest

SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import tangents as nt

assert jax.device_count() == 4
mesh = jax.make_mesh((2, 2), ("rows", "columns"), axis_types=(AxisType.Auto,) * 2)
draw = np.random.RandomState(0).standard_normal
normal = lambda *shape: jnp.asarray(draw(shape).astype(np.float32))
params = {"w": normal(8, 16) / 3, "b": normal(16), "v": normal(16, 6) / 4}
f = lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]
x1, x2 = normal(8, 8), normal(4, 8)
place = lambda x, *names: jax.device_put(x, NamedSharding(mesh, P(*names)))
spread = {"w": place(params["w"], None, "columns"), "b": params["b"], "v": params["v"]}
for axes in ((-1,), ()):
    for implementation in (0, 3):
        fn = jax.jit(nt.empirical_ntk_fn(f, axes, implementation=implementation))
        expected = fn(x1, x2, params)
        got = fn(place(x1, "rows"), place(x2, "columns"), spread)
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())

inside = jax.shard_map(
    lambda w, x: jax.lax.psum(x @ w, "rows"), mesh=mesh, in_specs=(P("rows"), P(None, "rows")),
    out_specs=P(),
)
g = lambda p, x: jnp.tanh(inside(p["w"], x) + p["b"]) @ p["v"]
plain = nt.empirical_ntk_fn(f, implementation=1)(x1, None, params)
got = jax.jit(nt.empirical_ntk_fn(g, implementation=3))(x1, None, params)
np.testing.assert_allclose(got, plain, rtol=2e-5, atol=2e-5 * np.abs(plain).max())
text = nt.ntk_operator(g, params, x1, implementation=3).explain()
assert "`shard_map` has no rule" in text, text
print("done")
"""


@pytest.mark.slow
def test_sharded_inputs_and_shard_map():
    """On four simulated devices; a weight that enters a `shard_map` is taken as a whole."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    done = subprocess.run(
        [sys.executable, "-c", SHARDED],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0 and "done" in done.stdout, done.stderr[-3000:]
