"""A kernel of known spectrum."""

import jax.numpy as jnp
import numpy as np
import pytest

N = 40


@pytest.fixture
def kernel():
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(N, N)))
    values = np.arange(1, N + 1) ** -1.5
    return (
        jnp.asarray((basis * values) @ basis.T, jnp.result_type(float)),
        values,
        jnp.asarray(rng.normal(size=(N, 2)), jnp.result_type(float)),
    )
