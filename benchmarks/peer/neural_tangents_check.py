"""Self-check of the neural-tangents environment: versions, and one kernel of each kind."""

import jax
import jax.numpy as jnp
import neural_tangents as nt
import numpy as np
from neural_tangents import stax

assert nt.__version__ == "0.6.5", nt.__version__
assert jax.__version__ == "0.4.25", jax.__version__

init_fn, apply_fn, kernel_fn = stax.serial(stax.Dense(16), stax.Relu(), stax.Dense(2))
x = jnp.asarray(np.random.RandomState(0).randn(3, 5), jnp.float32)
_, params = init_fn(jax.random.PRNGKey(0), x.shape)
jacobian = jax.jacobian(apply_fn)(params, x)
flat = np.concatenate([np.reshape(j, (6, -1)) for j in jax.tree_util.tree_leaves(jacobian)], 1)
dense = (flat @ flat.T).reshape(3, 2, 3, 2).transpose(0, 2, 1, 3)
for method in (1, 2, 3):
    ntk_fn = nt.empirical_ntk_fn(apply_fn, trace_axes=(), vmap_axes=0, implementation=method)
    np.testing.assert_allclose(ntk_fn(x, None, params), dense, rtol=1e-4, atol=1e-4)
assert kernel_fn(x, None, "ntk").shape == (3, 3)
print(f"neural-tangents {nt.__version__} on jax {jax.__version__}: kernels agree with J J^T")
