"""Products of powers of ramps, against quadrature and differences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tangents._infinite.dual.orthant import moments, ramps_and_steps

CASES = [(0.3, 0.7, -0.4), (-0.6, 1.2, 0.3), (0.8, -0.5, -0.6), (0.0, 0.0, 1.5)]


def all_moments(cosine, h, k):
    sine = jnp.sqrt(1 - cosine * cosine)
    return moments(ramps_and_steps(cosine, sine, h, k), cosine, sine, h, k)


def legendre(low, high):
    """Nodes and weights times the normal density."""
    t, w = np.polynomial.legendre.leggauss(80)
    x = low + (t + 1) / 2 * (high - low)
    return x, w * (high - low) / 2 * np.exp(-x * x / 2) / np.sqrt(2 * np.pi)


@pytest.mark.parametrize("case", CASES)
def test_moments_against_quadrature(case):
    rho, h, k = case
    with jax.enable_x64(True):
        got = all_moments(*map(jnp.asarray, case))
    s = np.sqrt(1 - rho * rho)
    u, of_u = legendre(h, 10)
    z, of_z = legendre(np.clip((k - rho * u) / s, -10, 10)[:, None], 10)
    v = rho * u[:, None] + s * z
    for name, value in got._asdict().items():
        i, j = int(name[1]), int(name[2])
        want = np.sum(of_u[:, None] * of_z * (u[:, None] - h) ** i * (v - k) ** j)
        np.testing.assert_allclose(value, want, rtol=1e-11)


@pytest.mark.parametrize("case", CASES)
def test_derivatives_of_moments(case):
    with jax.enable_x64(True):
        args = tuple(map(jnp.asarray, case))
        slopes = jax.jacfwd(all_moments, (0, 1, 2))(*args)
        for n in range(3):
            step = [1e-5 * (m == n) for m in range(3)]
            up, down = (
                all_moments(*(a + sign * e for a, e in zip(args, step, strict=True)))
                for sign in (1, -1)
            )
            for got, one, two in zip(slopes, up, down, strict=True):
                np.testing.assert_allclose(got[n], (one - two) / 2e-5, rtol=1e-7, atol=1e-9)


def test_moments_at_equal_and_opposite_inputs():
    """E[(z - h)_+^4] and so on; of opposite inputs nothing is beyond two positive thresholds."""
    with jax.enable_x64(True):
        h = jnp.asarray(0.4)
        same = moments(ramps_and_steps(1.0 + 0 * h, 0 * h, h, h), 1.0 + 0 * h, 0 * h, h, h)
        other = moments(ramps_and_steps(-1.0 + 0 * h, 0 * h, h, h), -1.0 + 0 * h, 0 * h, h, h)
    z, w = legendre(0.4, 10)
    for name, value in same._asdict().items():
        want = np.sum(w * (z - 0.4) ** (int(name[1]) + int(name[2])))
        np.testing.assert_allclose(value, want, rtol=1e-12)
    np.testing.assert_allclose(np.asarray(other), 0, atol=1e-16)
