"""Preconditioned conjugate gradients against a Cholesky factor: digits enlarged to 16 000.

The digits of scikit-learn, each shifted by up to one pixel in nine ways; the kernel is the NNGP of
three ReLU layers. Ours solves to a relative residual of 1e-6, measured in float64, preconditioner
included. The other side factorises in float32 and stops there: its residual is about 1e-4.
"""

from __future__ import annotations

from benchmarks.protocol import Case, Side, Target, Workload

RIDGE = 1e-3


def images(n: int):
    """Images (n, 64) on the unit sphere: the digits that sklearn ships, shifted."""
    import numpy as np

    try:
        from sklearn.datasets import load_digits

        pictures, _ = load_digits(return_X_y=True)
    except ImportError:
        # The peer's environment may have no scikit-learn: blobs of the same shape.
        random = np.random.RandomState(0)
        blobs = 4 * random.standard_normal((10, 64))[np.arange(1797) % 10]
        pictures = blobs + random.standard_normal((1797, 64))
    pictures = pictures.reshape(-1, 8, 8)
    shifts = [(a, b) for a in (0, -1, 1) for b in (0, -1, 1)]
    shifted = np.concatenate([np.roll(pictures, s, (1, 2)) for s in shifts])[:n].reshape(-1, 64)
    shifted = shifted / np.linalg.norm(shifted, axis=1, keepdims=True)
    return shifted.astype(np.float32)


def targets(n: int):
    """Ten columns of which the kernel explains a part."""
    import numpy as np

    return np.eye(10, dtype=np.float32)[np.arange(n) % 1797 % 10]


def nngp(x, layers: int = 3):
    """Arc-cosine kernel of unit inputs, a block of rows at a time."""
    import numpy as np

    out = np.empty((len(x), len(x)), np.float32)
    for start in range(0, len(x), 1000):
        c = np.clip(x[start : start + 1000] @ x.T, -1, 1)
        for _ in range(layers):
            c = (np.sqrt(1 - c * c) + (np.pi - np.arccos(c)) * c) / np.pi
            c = np.clip(c, -1, 1)
        out[start : start + 1000] = c
    np.fill_diagonal(out, 1)
    return out


def ours(side: Side) -> Case:
    import jax.numpy as jnp

    n = side.size(16_000, 300)
    k, y = jnp.asarray(nngp(images(n))), jnp.asarray(targets(n))
    run = lambda: side.nt.solve(k, y, RIDGE, method="cg", rtol=1e-6).residual
    return Case(run=lambda: jnp.where(run() <= 1e-6, 1.0, jnp.nan))


def cholesky(side: Side) -> Case:
    import jax
    import jax.numpy as jnp

    n = side.size(16_000, 300)
    k, y = jnp.asarray(nngp(images(n))), jnp.asarray(targets(n))

    @jax.jit
    def solve(k, y):
        shifted = k + RIDGE * jnp.eye(len(k), dtype=k.dtype)
        factor = jax.scipy.linalg.cho_factor(shifted, lower=True)
        return jax.scipy.linalg.cho_solve(factor, y)

    return Case(run=lambda: jnp.where(jnp.isfinite(solve(k, y)).all(), 1.0, jnp.nan))


WORKLOADS = [
    Workload(
        "solve/cg_against_cholesky/16000",
        ours,
        peer_build=cholesky,
        targets=(Target("speedup", 1.0),),
        memory=False,
    )
]
