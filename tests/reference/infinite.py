"""Kernels of infinitely wide networks by direct quadrature: slow, obvious, one pair at a time.

A network is a list of steps on the covariance of all positions of all inputs together. Nothing is
taken from the package: expectations are two-dimensional Gauss-Hermite sums of the nonlinearity
itself, and derivatives come from the caller. Converges for variances of order one.
"""

import numpy as np


def expectation(f, g, cov, degree=120):
    """E[f(u) g(v)] for (u, v) ~ N(0, cov), by a tensor-product rule in the eigenbasis of cov."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(degree)
    weights = weights / weights.sum()
    values, vectors = np.linalg.eigh(cov)
    root = vectors * np.sqrt(np.maximum(values, 0))
    a, b = np.meshgrid(nodes, nodes, indexing="ij")
    u, v = root[0, 0] * a + root[0, 1] * b, root[1, 0] * a + root[1, 1] * b
    return float(np.einsum("i,j,ij->", weights, weights, f(u) * g(v)))


def pointwise(K, T, phi, dphi):
    """The kernels after y = phi(x): K and T are (P, P) over all positions of both inputs."""
    K_out, T_out = np.empty_like(K), np.empty_like(T)
    for i in range(len(K)):
        for j in range(len(K)):
            cov = np.array([[K[i, i], K[i, j]], [K[j, i], K[j, j]]])
            K_out[i, j] = expectation(phi, phi, cov)
            T_out[i, j] = T[i, j] * expectation(dphi, dphi, cov)
    return K_out, T_out


def affine(K, T, A, W_std, b_std):
    """The kernels after y = W_std A(W) x + b_std b: A (taps, P_out, P_in) picks the inputs."""
    mean_K = sum(a @ K @ a.T for a in A) / len(A)
    mean_T = sum(a @ T @ a.T for a in A) / len(A)
    K_out = W_std**2 * mean_K + b_std**2
    return K_out, K_out + W_std**2 * mean_T


def dense(K, T, W_std, b_std):
    """A dense layer at every position."""
    return affine(K, T, np.eye(len(K))[None], W_std, b_std)


def window_taps(n, size, inputs=2):
    """Taps of a VALID convolution over n positions of each of `inputs` inputs."""
    out = n - size + 1
    taps = []
    for t in range(size):
        a = np.zeros((out, n))
        a[np.arange(out), np.arange(out) + t] = 1
        taps.append(np.kron(np.eye(inputs), a))
    return np.stack(taps)


def mean_over(blocks, K, inputs=2):
    """Average over all positions of each input."""
    a = np.kron(np.eye(inputs), np.full((1, blocks), 1 / blocks))
    return a @ K @ a.T
