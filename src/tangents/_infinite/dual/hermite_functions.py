"""Hermite functions of any order, on the host in float64: he_n(z) g(z), g the normal density.

The first come from their recurrence. Of a large order n, an integer or not, y = he_n(z)
exp(-z^2 / 4) solves y'' + q y = 0, q = N - z^2 / 4, N = n + 1/2, and is

    y = p^(-1/2) cos(a),   a' = p,   p^2 = q - p'' / (2 p) + 3/4 (p' / p)^2

(sin for odd n; Kummer 1834, "De generali quadam aequatione differentiali tertii ordinis"; phase and
amplitude of DLMF 2.8). p^2 / N is a power series in t = z^2 / 4N whose coefficients are series in
1 / N^2: that is all of y while it oscillates, to the last digit for n >= 256.
"""

from __future__ import annotations

import math

import numpy as np

DENSITY = 1 / math.sqrt(2 * math.pi)  # at 0
_POWERS = 26  # of t
_CORRECTIONS = 7  # powers of 1 / N^2
# Central binomial coefficients C(2 m, m) 4^-m sqrt(pi m), in powers of 1 / m (DLMF 5.11.13).
_CENTRAL = (1, -1 / 8, 1 / 128, 5 / 1024, -21 / 32768, -399 / 262144, 869 / 4194304)


def first(z: np.ndarray, number: int) -> np.ndarray:
    """he_n(z) g(z) for n < number, (n, z)."""
    rows = [DENSITY * np.exp(-z * z / 2)]
    rows.append(z * rows[0])
    for n in range(1, number - 1):
        rows.append((z * rows[n] - math.sqrt(n) * rows[n - 1]) / math.sqrt(n + 1))
    return np.stack(rows[:number])


def at_zero(order: np.ndarray) -> np.ndarray:
    """|he_n(0)| g(0) for real n between the even ones, to the last digit for n >= 30."""
    half = order / 2
    inside = np.polynomial.polynomial.polyval(1 / half, _CENTRAL)
    return DENSITY * np.sqrt(inside / np.sqrt(np.pi * half))


def power(order: np.ndarray, exponent: int) -> np.ndarray:
    """Coefficients of max(x, 0)^exponent / exponent!, of even or odd n, with the sign of he_n."""
    below = order - exponent - 1
    falling = np.prod([order - i for i in range(exponent + 1)], 0)
    return (-1) ** ((exponent + 1) // 2) * at_zero(below) / np.sqrt(falling)


def later(order: np.ndarray, z: np.ndarray, odd: bool) -> np.ndarray:
    """he_n(z) g(z) of real orders between the even (odd) ones, over its sign at 0; (n, z).

    z must be far from 2 sqrt(n), where the functions end.
    """
    big = order + 0.5
    squares = _slopes_squared(big)
    roots = _root(squares)
    t = z * z / (4 * big[:, None])
    phase, square = np.zeros_like(t), np.zeros_like(t)
    for k in reversed(range(_POWERS)):
        phase = phase * t + roots[:, k, None] / (2 * k + 1)
        square = square * t + squares[:, k, None]
    phase = phase * np.sqrt(big)[:, None] * z
    amplitude = (squares[:, :1] / square) ** 0.25 * np.exp(-z * z / 4)
    if odd:
        slope = at_zero(order - 1) * np.sqrt(order / big) / roots[:, 0]
        return slope[:, None] * amplitude * np.sin(phase)
    return at_zero(order)[:, None] * amplitude * np.cos(phase)


# ---- power series, (orders, coefficients) --------------------------------------------------------


def _slopes_squared(big: np.ndarray) -> np.ndarray:
    """p^2 / N."""
    start = np.zeros((len(big), _POWERS))
    start[:, 0], start[:, 1] = 1, -1
    found = start
    for _ in range(_CORRECTIONS):
        log = _product(_derivative(found), _inverse(found)) / 2  # d log(p) / dt
        curve = _times_t(_derivative(log)) + log / 2 - _times_t(_product(log, log)) / 2
        found = start - curve / (2 * big[:, None] ** 2)
    return found


def _derivative(a: np.ndarray) -> np.ndarray:
    return np.concatenate([a[:, 1:] * np.arange(1, _POWERS), 0 * a[:, :1]], 1)


def _times_t(a: np.ndarray) -> np.ndarray:
    return np.concatenate([0 * a[:, :1], a[:, :-1]], 1)


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.stack([np.sum(a[:, : k + 1] * b[:, k::-1], 1) for k in range(_POWERS)], 1)


def _inverse(a: np.ndarray) -> np.ndarray:
    out = np.zeros_like(a)
    out[:, 0] = 1 / a[:, 0]
    for k in range(1, _POWERS):
        out[:, k] = -np.sum(a[:, 1 : k + 1] * out[:, k - 1 :: -1], 1) / a[:, 0]
    return out


def _root(a: np.ndarray) -> np.ndarray:
    out = np.zeros_like(a)
    out[:, 0] = np.sqrt(a[:, 0])
    for k in range(1, _POWERS):
        known = np.sum(out[:, 1:k] * out[:, k - 1 : 0 : -1], 1)
        out[:, k] = (a[:, k] - known) / (2 * out[:, 0])
    return out
