"""Preconditioned conjugate gradients against a Cholesky factor: digits enlarged to 16 000.

The digits of scikit-learn, each shifted by up to one pixel in nine ways; the kernel is the NNGP of
three ReLU layers. Both sides solve to a relative residual of 1e-6, measured in float64, all set-up
included. The other side is SciPy: it factorises in float32, the faster precision, and refines with
residuals in float64 until they are small enough. SciPy is in GPyTorch's environment.
"""

from __future__ import annotations

from benchmarks.protocol import Case, Side, Target, Workload

RIDGE = 1e-3
RTOL = 1e-6


def images(n: int):
    """Images (n, 64) on the unit sphere: the digits that sklearn ships, shifted."""
    import numpy as np
    from sklearn.datasets import load_digits

    pictures, _ = load_digits(return_X_y=True)
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

    def run():
        result = side.nt.solve(k, y, RIDGE, method="cg", rtol=RTOL)
        assert float(result.residual) <= RTOL, float(result.residual)
        return result.value

    return Case(run=run)


def cholesky(side: Side) -> Case:
    import numpy as np
    from scipy.linalg import cho_factor, cho_solve, get_blas_funcs

    (dgemm,) = get_blas_funcs(("gemm",), dtype=np.dtype(np.float64))

    n = side.size(16_000, 300)
    k, y = nngp(images(n)), targets(n)
    sizes = np.linalg.norm(y, axis=0)

    def residual_of(x):
        # In float64 a block of rows at a time: a copy of the matrix would be 2 GB and slower.
        image = np.empty(x.shape)
        for start in range(0, n, 250):
            wide = k[start : start + 250].astype(np.float64)
            image[start : start + 250] = dgemm(1.0, wide.T, x, trans_a=True)
        return y - image - RIDGE * x

    def run():
        shifted = k.copy()
        shifted[np.arange(n), np.arange(n)] += np.float32(RIDGE)
        # Its transpose is the same matrix, in LAPACK's order.
        factor = cho_factor(shifted.T, lower=True, overwrite_a=True, check_finite=False)
        x, residual = np.zeros(y.shape), y.astype(np.float64)
        for _ in range(10):
            x = x + cho_solve(factor, residual.astype(np.float32), check_finite=False)
            residual = residual_of(x)
            relative = float((np.linalg.norm(residual, axis=0) / sizes).max())
            if relative <= RTOL:
                return x.astype(np.float32)
        raise AssertionError(relative)

    return Case(run=run)


WORKLOADS = [
    Workload(
        "solve/cg_against_cholesky/16000",
        ours,
        peer="gpytorch",
        peer_build=cholesky,
        targets=(Target("speedup", 1.0),),
        # Residuals of 1e-6 leave this much of the solution open.
        rtol=1e-2,
        requires=("sklearn",),
        memory=False,
    )
]
