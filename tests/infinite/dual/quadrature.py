"""Dual kernels by two-dimensional quadrature at 30 digits: slow, obvious, shares no formula."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import mpmath
from mpmath import mp, mpf

mp.dps = 30

Function = Callable[[mpf], mpf]


def smooth_pair(
    functions: tuple[Function, ...], cov12: float, var1: float, var2: float, step: float = 0.25
) -> list[mpf]:
    """E[f(u) f(v)] for each f, analytic everywhere, by the trapezoidal rule.

    On a Gaussian weight it converges faster than any power (for the rows of the table and
    variances up to 4 the step leaves less than 1e-16); u = sqrt(var1) x and v = along x + across y
    with x, y independent standard normal.
    """
    c, v1, v2 = mpf(cov12), mpf(var1), mpf(var2)
    along = c / mpmath.sqrt(v1) if v1 else mpf(0)
    across = mpmath.sqrt(max(v2 - along**2, mpf(0)))
    n = round(10 / step)
    nodes = [mpf(step) * i for i in range(-n, n + 1)]
    weights = [mpf(step) * mpmath.npdf(x) for x in nodes]
    if not across:
        inner = [(mpf(0), mpf(1))]
    else:
        inner = list(zip(nodes, weights, strict=True))
    out = []
    for f in functions:
        shared = {} if along else {y: f(across * y) for y, _ in inner}  # f(v) without x
        total = mpf(0)
        for x, wx in zip(nodes, weights, strict=True):
            if shared:
                row = sum(wy * shared[y] for y, wy in inner)
            else:
                row = sum(wy * f(along * x + across * y) for y, wy in inner if wx * wy > 1e-21)
            total += wx * f(mpmath.sqrt(v1) * x) * row
        out.append(total)
    return out


def kinked_pair(
    functions: tuple[Function, ...], cov12: float, var1: float, var2: float
) -> list[mpf]:
    """E[f(u) f(v)] for each f, analytic but for x = 0, in polar coordinates.

    u = sqrt(var1) r cos(t), v = sqrt(var2) r cos(t - theta): in each sector between the rays u = 0
    and v = 0 everything is analytic, and Gauss-Legendre converges.
    """
    c, v1, v2 = mpf(cov12), mpf(var1), mpf(var2)
    if not v1 or not v2:  # one of them is constant: one integral for the other
        return [f(mpf(0)) * _half_lines(f, max(v1, v2)) for f in functions]
    theta = mpmath.atan2(mpmath.sqrt(max(v1 * v2 - c**2, mpf(0))), c)
    rays = sorted({-mp.pi / 2, theta - mp.pi / 2, mp.pi / 2, theta + mp.pi / 2})
    rays.append(rays[0] + 2 * mp.pi)
    s1, s2 = mpmath.sqrt(v1), mpmath.sqrt(v2)
    out = []
    for f in functions:
        total = mpf(0)
        for start, end in itertools.pairwise(rays):
            if end - start < mpf(10) ** -25:
                continue

            def integrand(t, r, f=f):
                weight = r * mpmath.exp(-r * r / 2) / (2 * mp.pi)
                return weight * f(s1 * r * mpmath.cos(t)) * f(s2 * r * mpmath.cos(t - theta))

            # A sector as thin as the distance of the inputs is as good as straight.
            total += _gauss_legendre(integrand, (start, end), (mpf(0), mpf(12)))
        out.append(total)
    return out


def _half_lines(f: Function, var: mpf) -> mpf:
    if not var:
        return f(mpf(0))
    s = mpmath.sqrt(var)

    def integrand(r):
        return mpmath.npdf(r) * (f(s * r) + f(-s * r))

    return mpmath.quad(integrand, [0, 12], method="gauss-legendre")


def _rule(n: int) -> list[tuple[mpf, mpf]]:
    """Nodes and weights on [-1, 1], by Newton's iteration on the Legendre polynomial."""
    rule = []
    for i in range(n):
        x = mpmath.cos(mp.pi * (i + mpf(3) / 4) / (n + mpf(1) / 2))
        for _ in range(8):
            before, value = mpf(1), x
            for k in range(2, n + 1):
                before, value = value, ((2 * k - 1) * x * value - (k - 1) * before) / k
            slope = n * (x * value - before) / (x * x - 1)
            x -= value / slope
        rule.append((x, 2 / ((1 - x * x) * slope**2)))
    return rule


_ANGULAR, _RADIAL = _rule(24), _rule(48)


def _gauss_legendre(f, t_range, r_range) -> mpf:
    (t0, t1), (r0, r1) = t_range, r_range
    total = mpf(0)
    for x, wx in _ANGULAR:
        t = (t0 + t1 + x * (t1 - t0)) / 2
        total += wx * sum(wy * f(t, (r0 + r1 + y * (r1 - r0)) / 2) for y, wy in _RADIAL)
    return total * (t1 - t0) / 2 * (r1 - r0) / 2
