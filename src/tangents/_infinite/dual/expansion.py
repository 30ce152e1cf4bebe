"""The dual of any function of one number: a Hermite expansion, kinks apart.

With a_n(v) = E[phi(sqrt(v) z) he_n(z)], he_n the normalised probabilists' polynomials, and rho the
correlation (Mehler 1866; Daniely et al. 2016, lemma 11),

    E[phi(u) phi(v)] = sum_n a_n(var1) a_n(var2) rho^n,

and E[phi'(u) phi'(v)] is the same with the coefficients b_n of phi'. The coefficients belong to
one side each, so they are computed for rows and columns, not for pairs: a pair costs two
multiplications and an addition for each term.

Where phi is analytic, a_n falls faster than any power. A jump of the m-th derivative leaves
a_n ~ n^(-m/2 - 3/4), and the sum of a truncated series (Han et al. 2022, "Fast neural kernel
embeddings for general activations", sec. 3) is wrong near rho = 1 where kernels matter most.
Here jumps are taken out: with phi = ... + sum_b J_b (x - b)_+ and k_n the coefficients of that,

    E[phi(u) phi(v)] = sum_n (a_n a_n - k_n k_n) rho^n + sum_bc J_b J_c E[(u - b)_+ (v - c)_+],

with the last expectation in closed form, and jumps of the second derivative likewise (`kinks.py`).
What is left over falls fast again; where phi is quadratic between kinks it is a polynomial.

The number of terms is the smallest of a few for which the last quarter of the series does not
matter at the largest variance there is (a decision of the running program). `truncation` says what
is left at the largest number. For a phi without kinks that rest is added at its size, as one more
even and one more odd power: so the diagonal is right, and the kernel positive semidefinite, always.
In double precision functions smooth apart from 0 have all terms there are (`sampled.py`), and this
series only where they have no kink and its 256 terms do.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tangents._core import precision
from tangents._core.typing import Array
from tangents._infinite.dual import (
    by_corners,
    by_tables,
    close,
    piecewise_linear,
    piecewise_quadratic,
    power_series,
    sampled,
    sampling,
)
from tangents._infinite.dual.angle import norm, reciprocal, safe_sqrt
from tangents._infinite.dual.form import Dual
from tangents._infinite.dual.kinks import (
    Kink,
    Together,
    clip,
    closed_part,
    curved,
    is_none,
    line_part,
    third_at_zero,
    turn_of,
)
from tangents._infinite.dual.orthant import power_coefficients
from tangents._infinite.dual.prepared import Prepared
from tangents._infinite.dual.sampling import Sampled
from tangents._infinite.dual.single_precision import is_single
from tangents._infinite.dual.tabulated import tables_of

Phi = Callable[[Any, Array], Array]

_TERMS = {4: (16, 32, 64, 160, 640), 8: (64, 256, 1024)}  # by bytes of a number
_REACH = {4: 7.0, 8: 10.0}  # of the quadrature, in standard deviations
_OF_DERIVATIVES = 160, 640  # terms in single precision: each of these numbers is compiled
_OF_QUADRATICS = 4  # terms of a quadratic polynomial: 0, 1, 2
_TOGETHER = 4.0  # deviation over the nearest place, at most, for `Together` in single precision
_SMALL = {4: 1e-5, 8: 1e-13}  # share of the last quarter of the series that does not matter
_ROUNDING = {4: 2e-6, 8: 1e-13}  # of a sum of squares
_CHUNK = 8192  # variances whose coefficients are computed at once


class Expansion(NamedTuple):
    """The faces of a `DualKernel`, and `from_sides`, which is told the variances of both sides.

    from_sides: `(hyper, cov12, var1, var2, side1, side2, gap12=None, prepared=None) -> Dual`; var1
      and var2 are the variances of each pair, side1 and side2 the same numbers, broadcastable, not
      repeated for each pair.
    truncation: `(hyper, var) -> share` of the last quarter of the longest series of phi', at equal
      inputs of these variances: what is left out is of that size.
    carries_gap: does `dual` return the gap where it is given one (in float64 only where the slope
      of phi jumps).
    prepare: `(variances of side 1, of side 2 if it is another) -> what from_sides takes`, in single
      precision; else None.
    """

    phi: Phi
    dual: Callable[..., Dual]
    diagonal: Callable[[Any, Array], Array]
    from_sides: Callable[..., Dual]
    truncation: Callable[[Any, Array], Array]
    carries_gap: bool
    prepare: Callable[..., Prepared | None] | None


# ---- coefficients --------------------------------------------------------------------------------


@functools.cache
def _rule(terms: int, itemsize: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nodes z, weights w of the Gaussian, and w he_n(z), (nodes, terms).

    Gauss-Legendre on each half-line, so that what happens at 0 does not matter. The fastest
    oscillation of phi he_n that counts is 2 sqrt(terms).
    """
    reach = _REACH[itemsize]
    n = math.ceil(reach * math.sqrt(terms) / 2) + 6 * itemsize
    x, w = np.polynomial.legendre.leggauss(n)
    z = np.concatenate([-(x[::-1] + 1), x + 1]) * reach / 2
    w = np.concatenate([w[::-1], w]) * reach / 2 * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    columns = [w]
    before = np.zeros_like(w)
    for j in range(terms - 1):
        after = (z * columns[-1] - math.sqrt(j) * before) / math.sqrt(j + 1)
        before = columns[-1]
        columns.append(after)
    return z, w, np.stack(columns, 1)


class _Side(NamedTuple):
    """Coefficients of one side, each (terms, *var.shape): of phi, phi' and their kinks.

    value[0] is of phi, the others are subtracted; slope the same of phi'.
    """

    value: tuple[Array, ...]
    slope: tuple[Array, ...]


def _derivative(phi: Phi, hyper: Any) -> Callable[[Array], Array]:
    return lambda x: jax.jvp(lambda x: phi(hyper, x), (x,), (jnp.ones_like(x),))[1]


def _smooth_values(phi: Phi, hyper: Any, kinks: Sequence[Kink], x: Array) -> tuple[Array, Array]:
    """Values of phi and phi' at x without their jumps at places other than 0."""
    value, slope = phi(hyper, x), _derivative(phi, hyper)(x)
    zero = jnp.zeros((), x.dtype)
    for kink in kinks:
        place, (jump, bend, curve, _) = kink
        if place == 0.0:
            continue
        turn = turn_of(kinks, kink)
        beyond = jnp.maximum(turn * (x - place), zero)
        side = (turn * (x - place) > 0).astype(x.dtype)
        arch = turn * curve * (beyond * beyond / 2)
        value = value - jump * (x > place).astype(x.dtype) - bend * beyond - arch
        slope = slope - turn * bend * side - curve * beyond
    return value, slope


def _exponents(parity: int | None, terms: int) -> range:
    return range(terms) if parity is None else range(parity, terms, 2)


def _coefficients(
    phi: Phi, hyper: Any, kinks: Sequence[Kink], parity: int | None, terms: int, var: Array
) -> _Side:
    shape, flat = var.shape, var.reshape(-1)
    if flat.size > _CHUNK:
        one = functools.partial(_coefficients, phi, hyper, kinks, parity, terms)
        side = jax.lax.map(one, flat, batch_size=_CHUNK)
        side = jax.tree.map(lambda a: jnp.moveaxis(a, 0, -1), side)
    else:
        side = _flat_coefficients(phi, hyper, kinks, parity, terms, flat)
    return jax.tree.map(lambda a: a.reshape((*a.shape[:1], *shape)), side)


def _flat_coefficients(phi, hyper, kinks, parity, terms, var) -> _Side:
    itemsize = var.dtype.itemsize
    z, w, weighted = (jnp.asarray(a, var.dtype) for a in _rule(terms, itemsize))
    sigma = safe_sqrt(var)
    value, slope = _smooth_values(phi, hyper, kinks, sigma[:, None] * z)
    dot = functools.partial(jnp.einsum, "eq,qn->ne", precision=precision.DEFAULT)
    a, b = dot(value, weighted), dot(slope, weighted)
    kink_a, kink_b, bend0 = jnp.zeros_like(a), jnp.zeros_like(a), None
    away = jnp.maximum(sigma, float(np.sqrt(jnp.finfo(var.dtype).tiny)) ** 0.5)
    third, joint = third_at_zero(kinks), isinstance(kinks, Together)
    for kink in kinks:
        place, (jump, bend, curve, _) = kink
        turn = turn_of(kinks, kink)
        h = turn * place / away if place else jnp.zeros((1,), var.dtype)
        turns = jnp.asarray(turn ** np.arange(terms), var.dtype)[:, None]
        power = functools.cache(lambda m, h=h, turns=turns: turns * power_coefficients(h, m, terms))
        if place != 0.0 and not is_none(jump):
            a = a + jump * power(0) if turn > 0 else (a - jump * power(0)).at[0].add(jump)
        parts = []
        if not is_none(bend):
            parts.append((bend * away * power(1), turn * bend * power(0)))
        if not is_none(bend) and third is not None:
            parts.append((third * away**3 * power(3), third * away**2 * power(2)))
        if not is_none(curve):
            arches = turn * curve * away**2 * power(2), curve * away * power(1)
            if joint:
                parts.append(arches)
            elif place == 0.0:
                bend0 = arches
            else:
                a, b = a + arches[0], b + arches[1]
        for ramps, steps in parts:
            kink_a, kink_b = kink_a + ramps, kink_b + steps
            if place != 0.0:
                a, b = a + ramps, b + steps
    values, slopes = [a], [b]
    if joint or any(not is_none(k.jumps[1]) for k in kinks):
        values.append(kink_a)
        slopes.append(kink_b)
    if bend0 is not None:
        values.append(bend0[0])
        slopes.append(bend0[1])
    other = None if parity is None else 1 - parity  # of phi'
    own, others = (np.asarray(_exponents(p, terms)) for p in (parity, other))
    if kinks:
        return _Side(tuple(c[own] for c in values), tuple(c[others] for c in slopes))
    return _Side(
        (_with_rest(a[own], value, w, parity, terms),),
        (_with_rest(b[others], slope, w, other, terms),),
    )


def _with_rest(a: Array, value: Array, w: Array, parity: int | None, terms: int) -> Array:
    """Append what a_n lacks of E[phi^2] = sum a_n^2, apart for even and odd n."""
    mirrored = value[:, ::-1]
    rest = []
    for odd in (0, 1) if parity is None else (parity,):
        part = (value - mirrored if odd else value + mirrored) / 2
        total = jnp.einsum("eq,q->e", part * part, w, precision=precision.DEFAULT)
        own = a[odd::2] if parity is None else a
        missing = total - jnp.sum(own * own, 0)
        small = _ROUNDING[a.dtype.itemsize] * total  # its root is not to be added
        rest.append(safe_sqrt(jnp.where(missing > small, missing, 0)))
    if parity is None and terms % 2:
        rest = rest[::-1]
    return jnp.concatenate([a, jnp.stack(rest)])


# ---- the dual ------------------------------------------------------------------------------------


def _rough(side: _Side, parity: int | None, terms: int) -> Array:
    """Last quarter of the first terms of the series of phi', at equal inputs, over E[phi'^2]."""
    used = terms if parity is None else terms // 2
    squares = jnp.square(side.slope[0][:used])
    products = jnp.abs(squares - sum(jnp.square(c[:used]) for c in side.slope[1:]))
    return products[-(used // 4) :].sum(0) / (squares.sum(0) + jnp.finfo(products.dtype).tiny)


def _square(phi: Phi, var: Array) -> Array:
    """E[phi^2] without hyperparameters."""
    z, w, _ = (jnp.asarray(a, var.dtype) for a in _rule(64, var.dtype.itemsize))
    return jnp.sum(w * jnp.square(phi({}, safe_sqrt(var)[..., None] * z)), -1)


def expand(
    phi: Phi,
    kinks: Callable[[Any], Sequence[Kink]] = lambda hyper: (),
    parity: int | None = None,
    tabulated: bool = True,
    terms: int | None = None,
) -> Expansion:
    """The dual of phi.

    Args:
      phi: `(hyper, x) -> y`, element by element, differentiable by JAX.
      kinks: places and jumps for values of the hyperparameters.
      parity: 0: phi is even, 1: odd, None: neither; None also where there are kinks.
      tabulated: there are no hyperparameters, so that single precision may use a table
        (`tabulated.py`) and double precision sampled orders (`sampled.py`).
      terms: of the series, where it is known beforehand that more are zero.
    """

    def kinks_of(hyper, together: bool) -> Sequence[Kink]:
        found = tuple(kinks(hyper))
        return Together(found) if together and curved(found) else found

    def levels_of(array: Array, together: bool) -> tuple[int, ...]:
        itemsize = array.dtype.itemsize
        if terms is None and is_quadratic(itemsize) and (together or not curved(kinks({}))):
            return (_OF_QUADRATICS,)
        return _TERMS[itemsize] if terms is None else (terms,)

    @functools.cache
    def is_quadratic(itemsize: int) -> bool:
        """Is phi a quadratic polynomial between kinks? Then the series without them ends."""
        if not tabulated:
            return False
        tolerance = piecewise_linear.STRAIGHT[itemsize]
        return piecewise_quadratic.is_piecewise_quadratic(
            lambda x: phi({}, x), kinks({}), tolerance
        )

    @functools.cache
    def form(itemsize: int) -> piecewise_linear.PiecewiseLinear | None:
        """Phi as a piecewise linear function, if it is one known beforehand."""
        if not tabulated:
            return None
        tolerance = piecewise_linear.STRAIGHT[itemsize]
        return piecewise_linear.form_of(lambda x: phi({}, x), kinks({}), tolerance)

    @functools.cache
    def cornered() -> by_corners.Form | None:
        """Phi by corners, if it is piecewise linear or quadratic."""
        if form(4) is not None or not tabulated:
            return form(4)
        tolerance = piecewise_linear.STRAIGHT[4]
        return piecewise_quadratic.form_of(lambda x: phi({}, x), kinks({}), tolerance)

    slope_parity = None if parity is None else 1 - parity
    square = functools.partial(_square, phi)

    def at_level(hyper, together, terms, cov12, var1, var2, side1, side2):
        ks = kinks_of(hyper, together)
        make = functools.partial(_coefficients, phi, hyper, ks, parity, terms)
        one = make(side1)
        two = one if side2 is side1 else make(side2)
        rho = clip(cov12 * reciprocal(norm(side1, side2)))
        step_ = 1 if parity is None else 2
        forms = [power_series.Form(p or 0, step_) for p in (parity, slope_parity)]
        value = power_series.total(forms[0], one.value, two.value, rho)
        slope = power_series.total(forms[1], one.slope, two.slope, rho)
        return value, slope

    def switched(hyper, together, levels, cov12, var1, var2, side1, side2) -> tuple[Array, Array]:
        small = _SMALL[cov12.dtype.itemsize]
        largest = jax.lax.stop_gradient(
            jnp.maximum(jnp.max(side1, initial=0), jnp.max(side2, initial=0))
        ).reshape(1)
        frozen = jax.lax.stop_gradient(hyper)
        ks = kinks_of(frozen, together)
        probe = _coefficients(phi, frozen, ks, parity, levels[-1], largest)
        rough = [jnp.max(_rough(probe, parity, terms)) > small for terms in levels[:-1]]
        level = sum((r.astype(jnp.int32) for r in rough[1:]), start=rough[0].astype(jnp.int32))
        branches = [
            lambda hyper, *args, terms=terms: at_level(hyper, together, terms, *args)
            for terms in levels
        ]
        return jax.lax.switch(level, branches, hyper, cov12, var1, var2, side1, side2)

    def series(
        hyper, together, levels, cov12, var1, var2, side1, side2, gap12=None
    ) -> tuple[Array, Array]:
        ks = kinks_of(hyper, together)
        args = cov12, var1, var2, side1, side2
        straight = form(cov12.dtype.itemsize)
        if straight is not None:
            value, slope = line_part(straight.line, ks, cov12, side1, side2)
        elif len(levels) > 1:
            value, slope = switched(hyper, together, levels, *args)
        else:
            value, slope = at_level(hyper, together, levels[0], *args)
        if ks:
            more, steeper = closed_part(ks, *args, gap12)
            value, slope = value + more, slope + steeper
        return value, slope

    def with_gap(
        hyper, cov12, var1, var2, side1, side2, gap12=None, levels=None, together=None
    ) -> tuple[Any, ...]:
        """Both expectations, E[phi^2]^(1/2) of both sides, and the gap if the slope jumps."""
        args = cov12, var1, var2, side1, side2
        ks = tuple(kinks(hyper))
        if all(is_none(k.jumps[1]) for k in ks):
            gap12 = None
        together = not is_single(cov12) if together is None else together
        both = series(hyper, together, levels or levels_of(cov12, together), *args, gap12)
        sds = safe_sqrt(side1), safe_sqrt(side2)
        one, two = (close.ends_of(functools.partial(phi, hyper), ks, sd) for sd in sds)
        gap = None if gap12 is None else close.gap_after(one, two, *sds, (cov12, gap12), both)
        return *both, (one.size, two.size), gap

    def jumps_at_zero() -> tuple[Any, Any, Any] | None:
        """Of the first three derivatives, of a function smooth apart from 0."""
        ks = tuple(kinks({}))
        if any(k.place != 0.0 or not is_none(k.jumps[0]) for k in ks):
            return None
        return ks[0].jumps[1:] if ks else (0.0, 0.0, 0.0)

    def reach_of(number: int, itemsize: int) -> float:
        """The deviation up to which so many terms of the series are enough."""
        sd = np.geomspace(0.1, 10, 61)

        @jax.jit
        def rough_at(var):
            side = _coefficients(phi, {}, tuple(kinks({})), parity, number, var)
            return _rough(side, parity, number)

        with jax.ensure_compile_time_eval(), jax.enable_x64(True):
            rough = np.asarray(rough_at(jnp.asarray(sd**2)) > _SMALL[itemsize])
        return float(np.min(sd[rough], initial=sd[-1]))

    @functools.cache
    def table() -> by_tables.ByTables | None:
        """Of a function smooth apart from 0, whose tables hold it."""
        jumps = jumps_at_zero()
        found = () if jumps is None else tables_of(lambda x: phi({}, x), bool(kinks({})))
        if jumps is None or not found:
            return None
        far = sampling.sampled(lambda x: phi({}, x), jumps)

        every = levels_of(jnp.zeros((), jnp.float32), False)

        def of_series(levels, cov12, *others):
            return series({}, False, levels or every[-1:], cov12, *others)

        @functools.cache
        def levels():
            if far is None or len(every) == 1:
                return ((math.inf, every),)
            return tuple((reach_of(n, 4), (n,)) for n in _OF_DERIVATIVES)

        return by_tables.ByTables(found, far, levels, of_series, square)

    @functools.cache
    def in_samples() -> tuple[float, Sampled] | None:
        """In double precision: from which deviation on terms are sampled, if they are.

        Of a function with a kink always: the series without its kinks still falls like a power.
        """
        jumps = jumps_at_zero()
        if not tabulated or terms is not None or jumps is None or form(8) is not None:
            return None
        found = sampling.sampled(lambda x: phi({}, x), jumps, sampling.DOUBLE)
        if found is None or kinks({}):
            return None if found is None else (0.0, found)
        return reach_of(_TERMS[8][-2], 8), found

    def in_double(args: tuple[Array, Array, Array, Array, Array], gap12) -> Dual:
        """Without hyperparameters."""
        samples = in_samples()

        def summed(args, gap12, levels=None):
            value, slope, _, gap = with_gap({}, *args, gap12=gap12, levels=levels)
            return Dual(value, slope, gap)

        if samples is None:
            return summed(args, gap12)
        reach, found = samples

        def far(args, gap12):
            cov12, _, _, side1, side2 = args
            extra = () if gap12 is None else (gap12,)
            value, slope, gap = sampled.dual(found, cov12, side1, side2, *extra)
            return Dual(value, slope, gap if extra and found.jumps[0] else None)

        if not reach:
            return far(args, gap12)
        near = functools.partial(summed, levels=_TERMS[8][-2:-1])
        reached = by_tables.largest_of(*args[3:]) <= reach**2
        return jax.lax.cond(reached, near, far, args, gap12)

    def beyond_together(cov12, var1, var2, side1, side2, gap12=None) -> tuple[Any, ...]:
        """As `with_gap`, for deviations beyond `_TOGETHER`, of many terms."""
        ends = form(4) is not None or (is_quadratic(4) and not curved(kinks({})))
        levels = None if ends or terms is not None else _OF_DERIVATIVES
        args = cov12, var1, var2, side1, side2
        return with_gap({}, *args, gap12, levels=levels, together=False)

    def in_single(cov12, var1, var2, side1, side2, gap12=None) -> tuple[Any, ...]:
        """As `with_gap`, without hyperparameters or a table."""
        args = cov12, var1, var2, side1, side2
        if not is_quadratic(cov12.dtype.itemsize) or not curved(kinks({})):
            return with_gap({}, *args, gap12)
        nearest = min(abs(k.place) for k in kinks({}) if k.place != 0.0)
        reached = by_tables.largest_of(side1, side2) <= (_TOGETHER * nearest) ** 2
        near = functools.partial(with_gap, {}, together=True)
        return jax.lax.cond(reached, near, beyond_together, *args, gap12)

    exact = by_corners.Exact(beyond_together, in_single)

    def prepare(*sides: Array) -> Prepared | None:
        if not is_single(sides[0]):
            return None
        found = cornered() if sides[0].dtype == jnp.float32 else None
        if found is not None:
            return by_corners.prepare_sides(found, *sides)
        found = table()
        return None if found is None else found.prepare(*sides)

    def from_sides(
        hyper, cov12, var1, var2, side1, side2, gap12=None, prepared: Prepared | None = None
    ) -> Dual:
        args = (cov12, var1, var2, side1, side2)
        extra = () if gap12 is None else (gap12,)
        found = cornered() if cov12.dtype == jnp.float32 else None
        if found is not None:
            return Dual(*by_corners.dual(found, exact, prepared, *args, *extra))
        found = table() if tabulated and is_single(cov12) else None
        if tabulated and not is_single(cov12):
            return in_double(args, gap12)
        if found is None and is_single(cov12) and tabulated and terms is None:
            value, slope, _, gap = in_single(*args, gap12)
            return Dual(value, slope, gap)
        if found is None:
            value, slope, _, gap = with_gap(hyper, *args, gap12)
            return Dual(value, slope, gap)
        return Dual(*by_tables.dual(found, prepared, *args, *extra))

    def dual(hyper, cov12, var1, var2, gap12=None) -> Dual:
        return from_sides(hyper, cov12, var1, var2, var1, var2, gap12)

    def diagonal(hyper, var):
        found = cornered() if var.dtype == jnp.float32 else None
        if found is not None:
            return by_corners.diagonal(found, exact, var)
        found = table() if tabulated and is_single(var) else None
        if found is not None:
            return by_tables.diagonal(found, var)
        return dual(hyper, var, var, var).nngp

    def truncation(hyper, var):
        ks = tuple(kinks(hyper))
        most = levels_of(var, False)[-1]
        return _rough(_coefficients(phi, hyper, ks, parity, most, var), parity, most)

    # Hyperparameters may be traced, and a table may not: without any there may be one.
    prepares = prepare if tabulated else None
    return Expansion(phi, dual, diagonal, from_sides, truncation, tabulated, prepares)
