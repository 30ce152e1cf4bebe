"""One row for each nonlinearity: its dual, hyperparameters, and phi, phi' for mpmath."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import mpmath
from mpmath import mp, mpf

from tangents._infinite.dual.arc_cosine import (
    ABRELU,
    ABS,
    LEAKY_RELU,
    RELU,
    SIGN,
    rectified_monomial,
)
from tangents._infinite.dual.error_function import ERF, GELU
from tangents._infinite.dual.exponential import (
    COS,
    EXP,
    GABOR,
    GAUSSIAN,
    RBF,
    SIN,
    exp_normalized,
)
from tangents._infinite.dual.form import DualKernel
from tangents._infinite.dual.polynomial import POLYNOMIAL, hermite, monomial


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    kernel: DualKernel
    hyper: Mapping[str, Any]
    phi: Callable[[mpf], mpf] | None
    d_phi: Callable[[mpf], mpf] | None
    kink: bool = False  # not analytic at 0
    discontinuous: bool = False  # d_nngp is zero by convention, not the derivative of nngp
    carries_gap: bool = False


def _ab(name, kernel, hyper, a, b):
    return Row(
        name,
        kernel,
        hyper,
        lambda x: (mpf(b) if x > 0 else mpf(a)) * x,
        lambda x: mpf(b) if x > 0 else mpf(a) if x < 0 else (mpf(a) + mpf(b)) / 2,
        kink=True,
        carries_gap=True,
    )


def _rectified(n):
    def step(x):
        return mpf(1) if x > 0 else mpf(0) if x < 0 else mpf(1) / 2

    return Row(
        f"RectifiedMonomial({n})",
        rectified_monomial(n),
        {},
        (lambda x: max(x, mpf(0)) ** n) if n else step,
        (lambda x: n * max(x, mpf(0)) ** (n - 1)) if n > 1 else (lambda x: n * step(x)),
        kink=True,
        discontinuous=n == 0,
        carries_gap=True,
    )


def _erf(name, a, b, c):
    a, b, c = (float(h) for h in (a, b, c))
    return Row(
        name,
        ERF,
        {"a": a, "b": b, "c": c},
        lambda x: a * mpmath.erf(b * x) + c,
        lambda x: 2 * a * b / mpmath.sqrt(mp.pi) * mpmath.exp(-((b * x) ** 2)),
        carries_gap=True,
    )


def _polynomial(name, kernel, hyper, coefficients):
    c = [mpf(x) for x in coefficients]
    slope = [j * x for j, x in enumerate(c)][1:] or [mpf(0)]
    return Row(
        name,
        kernel,
        hyper,
        lambda x: mpmath.polyval(c, x, asc=True),
        lambda x: mpmath.polyval(slope, x, asc=True),
    )


def _hermite(n):
    norm = mpmath.sqrt(mpmath.factorial(n))

    def he(m, x):
        before, value = mpf(0), mpf(1)
        for k in range(m):
            before, value = value, x * value - k * before
        return value

    return Row(
        f"Hermite({n})",
        hermite(n),
        {},
        lambda x: he(n, x) / norm,
        lambda x: n * he(n - 1, x) / norm if n else mpf(0),
    )


def _gelu_slope(x):
    return mpmath.ncdf(x) + x * mpmath.npdf(x)


COEFFICIENTS = (0.5, 1.0, -0.3, 0.2)
ROWS = [
    _ab("Relu", RELU, {}, 0.0, 1.0),
    _ab("LeakyRelu", LEAKY_RELU, {"alpha": 0.1}, 0.1, 1.0),
    _ab("Abs", ABS, {}, -1.0, 1.0),
    _ab("ABRelu", ABRELU, {"a": 0.7, "b": -1.3}, 0.7, -1.3),
    Row(
        "Sign",
        SIGN,
        {},
        mpmath.sign,
        lambda x: mpf(0),
        kink=True,
        discontinuous=True,
        carries_gap=True,
    ),
    *(_rectified(n) for n in (0, 1, 2, 3, 5)),
    _erf("Erf", 1, 1, 0),
    _erf("Erf(a, b, c)", 1.2, 0.7, 0.4),
    Row("Gelu", GELU, {}, lambda x: x * mpmath.ncdf(x), _gelu_slope),
    Row(
        "Sin",
        SIN,
        {"a": 1.3, "b": 0.8, "c": 0.5},
        lambda x: mpf(1.3) * mpmath.sin(mpf(0.8) * x + mpf(0.5)),
        lambda x: mpf(1.3) * mpf(0.8) * mpmath.cos(mpf(0.8) * x + mpf(0.5)),
    ),
    Row(
        "Cos",
        COS,
        {"a": 0.7, "b": 1.4, "c": -0.3},
        lambda x: mpf(0.7) * mpmath.cos(mpf(1.4) * x - mpf(0.3)),
        lambda x: -mpf(0.7) * mpf(1.4) * mpmath.sin(mpf(1.4) * x - mpf(0.3)),
    ),
    Row(
        "Rbf",
        RBF,
        {"gamma": 0.6},
        lambda x: mpmath.sqrt(2) * mpmath.sin(mpmath.sqrt(2 * mpf(0.6)) * x + mp.pi / 4),
        lambda x: 2 * mpmath.sqrt(mpf(0.6)) * mpmath.cos(mpmath.sqrt(2 * mpf(0.6)) * x + mp.pi / 4),
    ),
    Row(
        "Gabor",
        GABOR,
        {},
        lambda x: mpmath.exp(-x * x) * mpmath.sin(x),
        lambda x: mpmath.exp(-x * x) * (mpmath.cos(x) - 2 * x * mpmath.sin(x)),
    ),
    Row(
        "Exp",
        EXP,
        {"a": 0.5, "b": 0.4},
        lambda x: mpf(0.5) * mpmath.exp(mpf(0.4) * x),
        lambda x: mpf(0.5) * mpf(0.4) * mpmath.exp(mpf(0.4) * x),
    ),
    Row(
        "Gaussian",
        GAUSSIAN,
        {"a": 1.1, "b": -0.8},
        lambda x: mpf(1.1) * mpmath.exp(mpf(-0.8) * x * x),
        lambda x: 2 * mpf(1.1) * mpf(-0.8) * x * mpmath.exp(mpf(-0.8) * x * x),
    ),
    *(_polynomial(f"Monomial({n})", monomial(n), {}, (0,) * n + (1,)) for n in (0, 1, 2, 3, 4, 5)),
    _polynomial("Polynomial", POLYNOMIAL, {"coef": COEFFICIENTS}, COEFFICIENTS),
    *(_hermite(n) for n in (0, 1, 2, 5)),
]

WITHOUT_PHI = Row(
    "ExpNormalized",
    exp_normalized(True),
    {"gamma": 2.0, "shift": -0.5},
    phi=None,
    d_phi=None,
    carries_gap=True,
)
"""A kernel that is not the dual of a function: no quadrature, but all the identities."""
