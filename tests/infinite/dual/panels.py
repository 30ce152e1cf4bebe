"""E[f(u) f(v)] in float64 for functions with kinks anywhere: Gauss-Legendre between the kinks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

_X, _W = np.polynomial.legendre.leggauss(32)
_REACH = 9.0


def _gaussian_rule(cuts: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of a standard normal, panels at most 1 wide that end at the cuts."""
    inside = sorted(c for c in cuts if -_REACH < c < _REACH)
    ends = [-_REACH, *inside, _REACH]
    edges = [-_REACH]
    for low, high in itertools.pairwise(ends):
        edges += list(np.linspace(low, high, max(1, int(np.ceil(high - low))) + 1)[1:])
    middle, half = (np.add(edges[1:], edges[:-1]) / 2, np.diff(edges) / 2)
    z = (middle[:, None] + half[:, None] * _X).ravel()
    w = (half[:, None] * _W).ravel() * np.exp(-z * z / 2) / np.sqrt(2 * np.pi)
    return z, w


def panel_pair(
    f: Callable, cov12: float, var1: float, var2: float, kinks: Sequence[float] = ()
) -> float:
    """u = sqrt(var1) z, v = along z + across y; the kinks of f cut both integrals."""
    sigma = np.sqrt(var1)
    along = cov12 / sigma
    across = np.sqrt(max(var2 - along**2, 0.0))
    cuts = [k / sigma for k in kinks]
    if across < 1e-9:
        z, w = _gaussian_rule(cuts + [k / along for k in kinks])
        return float(np.sum(w * f(sigma * z) * f(along * z)))
    total = 0.0
    for z, w in zip(*_gaussian_rule(cuts), strict=True):
        if w > 1e-20:
            y, wy = _gaussian_rule([(k - along * z) / across for k in kinks])
            inner = np.sum(wy * f(along * z + across * y))
            total += w * float(f(np.array(sigma * z))) * inner
    return float(total)
