"""Hermite series of large standard deviations: their high terms are sampled.

Where a function changes within a distance of 1 from 0, at a deviation sd the coefficients of phi'
(`expansion.py`)

    beta_n = E[phi'(sd z) he_n(z)],    E[phi'(u) phi'(v)] = sum_n beta_n(sd1) beta_n(sd2) rho^n,
    E[phi(u) phi(v)] = E[phi(u)] E[phi(v)] + sd1 sd2 sum_n beta_n beta_n rho^(n + 1) / (n + 1)

begin to fall at n = sd^2 only. So thousands of terms are needed, or jumps of high derivatives in
closed form, which grow like powers of sd and cancel. But beta_n is smooth in n, for even and for
odd n: he_n(x / sd) is close to a cosine or sine of sqrt(n + 1/2) x / sd. So of [N, 2 N),
[2 N, 4 N), ... a Gauss rule takes a few n each (not integers: Hermite functions of real order), and
4e15 terms are 530 in single precision, 1180 in double. They are tabulated on the host in the
deviation (`sampling.py`); for a jump of phi' itself its closed form (`arc_cosine.py`) stands for
all n that are left.

The gap is a sum of terms that do not cancel either: with k^2 = E[phi^2] and alpha_n the
coefficients of phi over k,

    1 - E[phi(u) phi(v)] / k1 k2 = sum_n (alpha_n - alpha_n')^2 / 2 + alpha_n alpha_n' (1 - rho^n).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tangents._core import precision
from tangents._core.typing import Array
from tangents._infinite.dual import arc_cosine, sampling
from tangents._infinite.dual.angle import reciprocal, relative_gap, safe_sqrt, sine_squared
from tangents._infinite.dual.sampling import FIRST, OCTAVES, REACH, SMALL, Precision, Sampled


class _Side(NamedTuple):
    """Of one side, k^2 = E[phi^2]: sd / k, E[phi] / k, and sd beta_n / k.

    betas: in the order of `sampling.constants`. scale: k. outer: k / sd. sd is within the table, k
    that of the given deviation.
    """

    ratio: Array
    mean: Array
    betas: Array
    scale: Array
    outer: Array


def _polynomials(u: Array, number: int) -> Array:
    """T_n(u), (number, *u.shape), by their recurrence: a loop is quickly compiled."""

    def following(pair, _):
        before, now = pair
        return (now, 2 * u * now - before), before

    return jax.lax.scan(following, (jnp.ones_like(u), u), None, length=number)[1]


def _side(found: Sampled, var: Array) -> _Side:
    given = safe_sqrt(var)
    sd = jnp.clip(given, 1e-9, REACH)
    basis = _polynomials(sampling.node(sd, jnp.log).reshape(-1), found.rows.shape[1])
    rows = jnp.asarray(found.rows, var.dtype)
    features = jnp.matmul(rows, basis, precision=precision.DEFAULT)
    mean, betas = sampling.coefficients(found, features.reshape((-1, *var.shape)), sd)
    order, weight, _ = sampling.constants(found.precision)
    weights = jnp.asarray(weight / (order + 1), var.dtype)
    over = jnp.sqrt((mean / sd) ** 2 + jnp.tensordot(weights, betas * betas, 1))
    scale, stretch = over * sd, given / sd
    # Beyond the table a line goes on, and steps are as high as before.
    scale = scale * (jnp.minimum(stretch, 1) if found.start == 0 else 1)
    scale = scale * (1 if found.bounded else jnp.maximum(stretch, 1))
    outer = over / (jnp.maximum(stretch, 1) if found.bounded else 1)
    return _Side(1 / over, mean / (over * sd), betas / over, scale, outer)


def scale(found: Sampled, var: Array) -> Array:
    """The root of E[phi^2]."""
    return _side(found, var.reshape(-1)).scale.reshape(var.shape)


def _sides(found: Sampled, side1: Array, side2: Array) -> tuple[_Side, _Side]:
    """Both at once, so that there is less to compile."""
    both = _side(found, jnp.concatenate([side1.reshape(-1), side2.reshape(-1)]))
    one, two = (
        _Side(*(a[..., part].reshape((*a.shape[:-1], *side.shape)) for a in both))
        for part, side in (
            (slice(None, side1.size), side1),
            (slice(side1.size, None), side2),
        )
    )
    return one, two


class _Pair(NamedTuple):
    """rho, 1 - |rho|, and the product of both sd / k."""

    rho: Array
    deviation: Array
    ratios: Array


def _first_terms(
    of: Precision, one: _Side, two: _Side, pair: _Pair, constants: Any
) -> tuple[Array, Array]:
    """1 - E[phi phi] / k1 k2 and the sum of alpha alpha' n rho^(n-1) of terms one by one."""
    zero = jnp.zeros_like(pair.rho)

    def add(carry, term):
        near, ahead, running, slope = carry
        a, b, weight, integrated, kink = term
        product = a * b - kink * pair.ratios
        near = near + integrated / 2 * (a - b) ** 2
        running = running + integrated * product  # sum_n c_n (1 - rho^n) / (1 - rho)
        return (
            near,
            ahead * pair.rho + running,
            running,
            slope * pair.rho + weight * product,
        ), None

    near = (one.mean - two.mean) ** 2 / 2 + zero
    terms = tuple(c[: of.one_by_one] for c in (one.betas, two.betas, *constants))
    carry = (near, zero, zero, zero)
    near, ahead, _, slope = jax.lax.scan(add, carry, terms, reverse=True)[0]
    toward = jnp.where(pair.rho < 0, 2 - pair.deviation, pair.deviation)
    return near + toward * ahead, slope


def _sampled_terms(
    of: Precision, one: _Side, two: _Side, pair: _Pair, constants: Any, octaves: Array | None
) -> tuple[Array, Array]:
    """As `_first_terms`. octaves: how many count; None: all, and reverse mode keeps little."""
    negative, size = pair.rho < 0, 1 - pair.deviation
    inverse = 1 / jnp.maximum(size, 0.25)  # below, the powers are zero
    log = jnp.log1p(-jnp.minimum(pair.deviation, 0.75))
    orders = jnp.asarray(sampling.orders(of)[0], log.dtype)

    def less_of(mu: Array) -> Array:
        """|rho|^mu - 1."""
        return jnp.expm1(log * mu.reshape((-1,) + (1,) * log.ndim))

    def terms_of(less, terms):
        a, b, weight, integrated, _ = terms[0]
        a2, b2, weight2, integrated2, kink2 = terms[1]
        product, product2 = a * b, a2 * b2 - kink2 * pair.ratios
        gap, gap2 = jnp.where(negative, 2 + less, -less), pair.deviation - size * less
        closer = integrated * ((a - b) ** 2 / 2 + product * gap)
        closer = closer + integrated2 * ((a2 - b2) ** 2 / 2 + product2 * gap2)
        power = 1 + less
        steeper = weight * product * power * inverse
        steeper = steeper + weight2 * product2 * jnp.where(negative, -power, power)
        return closer, steeper

    def blocks(start: int) -> list[Array]:
        parts = []
        for c in (one.betas, two.betas, *constants):
            part = c[start : start + orders.size]
            rank = max(log.ndim + 1 - part.ndim, 0) if part.ndim == 1 else 0
            parts.append(part.reshape((*orders.shape, *c.shape[1:], *(1,) * rank)))
        return parts

    terms = blocks(of.one_by_one), blocks(of.one_by_one + orders.size)
    zero = jnp.zeros_like(pair.rho)

    @jax.checkpoint
    def anew(carry, block):
        mu, terms = block
        more = (jnp.sum(part, 0) for part in terms_of(less_of(mu), terms))
        return jax.tree.map(jnp.add, carry, tuple(more)), None

    if octaves is None:
        return jax.lax.scan(anew, (zero, zero), (orders, terms))[0]

    # Where all powers are zero what is left belongs to one side each.
    smallest = jnp.min(pair.deviation, initial=1)
    vanished = jnp.log2(-jnp.log(jnp.finfo(log.dtype).eps) / FIRST / smallest) + 1
    count = jnp.clip(jnp.minimum(octaves, vanished), 0, octaves).astype(jnp.int32)

    def rest(values: Array) -> Array:
        """Sum over the octaves that are left out."""
        weights = (jnp.arange(OCTAVES, dtype=count.dtype) >= count).astype(log.dtype)
        return jnp.tensordot(weights, values, 1)

    near = zero
    for a, b, _, integrated, kink in terms:
        own = (rest(jnp.sum(integrated * c * c, 1)) for c in (a, b))
        near = near + sum(own) / 2 - rest(jnp.sum(integrated * kink, 1)) * pair.ratios

    # Node by node, so that three arrays of the shape of all pairs are at work.
    def node(k, carry):
        def octave(i, carry):
            near, slope, less = carry
            closer, steeper = terms_of(less, jax.tree.map(lambda c: c[i, k], terms))
            return near + closer, slope + steeper, less * (2 + less)

        return jax.lax.fori_loop(0, count, octave, (*carry, less_of(orders[0, k])[0]))[:2]

    return jax.lax.fori_loop(0, of.nodes, node, (near, zero))


def sums(
    found: Sampled,
    cov12: Array,
    side1: Array,
    side2: Array,
    gap12: Array | None,
    carried: bool = True,
) -> tuple[Array, Array, tuple[Array, Array]]:
    """k1 k2 - E[phi phi], E[phi' phi'], and k1 and k2, at any deviations.

    carried: powers are squared from octave to octave, which has no derivative in reverse mode.
    """
    one, two = _sides(found, side1, side2)
    inverse = reciprocal(safe_sqrt(side1)) * reciprocal(safe_sqrt(side2))
    if gap12 is not None:
        deviation = relative_gap(side1, side2, gap12)
    else:
        cosine = jnp.minimum(jnp.abs(cov12) * inverse, 1)
        deviation = jnp.clip(sine_squared(cov12, side1, side2) / (1 + cosine), 0, 1)
    rho = jnp.where(cov12 < 0, deviation - 1, 1 - deviation)
    pair = _Pair(rho, deviation, one.ratio * two.ratio)
    of = found.precision
    order, weight, step = sampling.constants(of)
    kink = found.jumps[0] ** 2 * step
    constants = tuple(jnp.asarray(c, rho.dtype) for c in (weight, weight / (order + 1), kink))
    largest = jnp.maximum(jnp.max(side1, initial=0), jnp.max(side2, initial=0))
    finest = of.finest**2 * (jax.lax.stop_gradient(largest) + SMALL**2)
    octaves = jnp.log2(finest / FIRST) + 1 + (of.more_octaves if any(found.jumps) else 0)
    octaves = jnp.clip(octaves, 0, OCTAVES)
    near, slope = _first_terms(of, one, two, pair, constants)
    more, steeper = _sampled_terms(of, one, two, pair, constants, octaves if carried else None)
    near, slope = near + more, slope + steeper
    if found.jumps[0]:
        one_ = jnp.ones_like(rho)
        ramps = arc_cosine.RELU.dual({}, rho, one_, one_, deviation)
        assert ramps.gap12 is not None
        bend = found.jumps[0] ** 2 * pair.ratios
        near, slope = near + bend * ramps.gap12, slope + bend * ramps.d_nngp
    outer = one.outer * two.outer
    near = jnp.maximum(near, 0) * (one.scale * two.scale)
    return near, slope * outer, (one.scale, two.scale)


def expectations(
    found: Sampled,
    cov12: Array,
    side1: Array,
    side2: Array,
    gap12: Array | None = None,
    carried: bool = False,
) -> tuple[Array, Array, Array]:
    """E[phi phi], E[phi' phi'] and the gap after the layer; `carried` as in `sums`."""
    lost, slope, (one, two) = sums(found, cov12, side1, side2, gap12, carried)
    nngp = one * two - lost
    return nngp, slope, jnp.where(nngp < 0, one * two + nngp, lost)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def dual(found: Sampled, *args: Array) -> tuple[Array, Array, Array]:
    """`expectations` with derivatives. args: cov12, side1, side2 and, if known, gap12."""
    return expectations(found, *args, carried=True)


@dual.defjvp
def _dual_jvp(found, primals, tangents):
    change = jax.jvp(functools.partial(expectations, found), primals, tangents)[1]
    return dual(found, *primals), change
