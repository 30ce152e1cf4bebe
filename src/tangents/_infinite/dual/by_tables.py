"""The dual of a function in single precision: by tables, and beyond them by its series."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tangents._core.typing import Array
from tangents._infinite.barrier import computed_apart, made_once, made_together, taken_apart
from tangents._infinite.dual import sampled, tabulated
from tangents._infinite.dual.angle import norm, safe_sqrt
from tangents._infinite.dual.prepared import Prepared, prepare
from tangents._infinite.dual.sampling import Sampled
from tangents._infinite.dual.tabulated import Sums, Table


@dataclasses.dataclass(frozen=True, eq=False)
class ByTables:
    """A function by tables.

    tables: of growing reach, at least one. far: the series whose high terms are sampled, if there
    is one. levels: deviations up to which a series has derivatives, and its numbers of terms, of
    which it chooses; beyond, `far`. series: `(terms, cov12, var1, var2, side1, side2, gap12=None)`
    to `(nngp, d_nngp)`; without terms all of them. square: `var -> E[phi^2]`.
    """

    tables: tuple[Table, ...]
    far: Sampled | None
    levels: Callable[[], tuple[tuple[float, tuple[int, ...]], ...]]
    series: Callable[..., tuple[Array, Array]]
    square: Callable[[Array], Array]

    def level(self, side1: Array, side2: Array) -> Array:
        """Which table reaches; their number: none does."""
        return _how_many([t.reach for t in self.tables], largest_of(side1, side2))

    def prepare(self, *sides: Array) -> Prepared:
        """What belongs to one side each, by the table that serves all."""
        forms = [functools.partial(_features, table) for table in self.tables]
        return prepare(forms, self.level(sides[0], sides[-1]), sides)


def _features(table: Table, side: Array) -> Array:
    """`tabulated.features`, for sides of all layers by the same kernels."""
    found = computed_apart(functools.partial(tabulated.features, table), side.reshape(-1))
    return found.reshape((-1, *side.shape))


def _sampled(found: Sampled, cov12: Array, side1: Array, side2: Array, gap: Array | None) -> Sums:
    near, slope, scales = sampled.sums(found, cov12, side1, side2, gap)
    return Sums(made_together(near, slope), scales)


def _how_many(reaches: Sequence[float], largest: Array) -> Array:
    """Of the deviations are exceeded by the largest variance."""
    return sum(((largest > r * r).astype(jnp.int32) for r in reaches), jnp.int32(0))


def largest_of(side1: Array, side2: Array) -> Array:
    """The largest variance."""
    return jnp.maximum(jnp.max(side1, initial=0), jnp.max(side2, initial=0))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def dual(of: ByTables, prepared: Prepared | None, cov12, var1, var2, side1, side2, *gap12):
    """Nngp, d_nngp and, if given, the gap: from the first table that reaches, else from the series.

    prepared: of both sides, by `ByTables.prepare`, or None. Derivatives are those of the series.
    """
    gap = gap12[0] if gap12 else None
    signed = of.tables[0].signed

    def tabulated_(table, prepared, cov12, var1, var2, side1, side2, gap):
        if prepared is None:
            found = tuple(_features(table, side) for side in (side1, side2))
            found = made_once(found, (side1.shape, side2.shape), cov12)
        else:
            found = prepared.sides
        sums = functools.partial(tabulated.sums, table)
        return computed_apart(sums, found, cov12, side1, side2, gap)

    def summed(prepared, cov12, var1, var2, side1, side2, gap):
        size = jnp.abs(cov12) if signed else cov12
        if of.far is not None:
            return computed_apart(functools.partial(_sampled, of.far), size, side1, side2, gap)
        value, slope = of.series((), size, var1, var2, side1, side2, gap)
        scales = safe_sqrt(of.square(side1)), safe_sqrt(of.square(side2))
        return Sums(made_together(scales[0] * scales[1] - value, slope), scales)

    level = of.level(side1, side2) if prepared is None else prepared.level
    branches = [*(functools.partial(tabulated_, table) for table in of.tables), summed]
    args = prepared, cov12, var1, var2, side1, side2, gap
    pair, scales = jax.lax.switch(level, branches, *args)
    near, slope = taken_apart(pair)
    scale = scales[0] * scales[1]
    nngp = scale - near
    gap = jnp.maximum(jnp.where(nngp < 0, scale + nngp, near), 0)
    if signed:
        nngp = jnp.where(cov12 < 0, -nngp, nngp)
    return (nngp, slope, gap) if gap12 else (nngp, slope)


@dual.defjvp
def _dual_jvp(of, primals, tangents):
    prepared, *primals = primals
    tangents = tangents[1:]

    def near(terms, cov12, var1, var2, side1, side2, *gap12):
        nngp, slope = of.series(terms, cov12, var1, var2, side1, side2, *gap12)
        if not gap12:
            return nngp, slope
        return nngp, slope, norm(of.square(side1), of.square(side2)) - jnp.abs(nngp)

    def beyond(cov12, var1, var2, side1, side2, *gap12):
        found = sampled.expectations(of.far, cov12, side1, side2, *gap12)
        return found if gap12 else found[:2]

    def change(values: Callable, primals: Any, tangents: Any) -> Any:
        return jax.jvp(values, primals, tangents)[1]

    primals = tuple(primals)
    out = dual(of, prepared, *primals)
    levels = of.levels()
    reaches = [reach for reach, _ in levels if reach < math.inf]
    forms = [functools.partial(near, terms) for _, terms in levels]
    branches = [functools.partial(change, values) for values in (*forms, beyond)]
    level = _how_many(reaches, largest_of(*primals[3:5]))
    return out, jax.lax.switch(level, branches[: len(reaches) + 1], primals, tangents)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def diagonal(of: ByTables, var: Array) -> Array:
    """E[phi(u)^2], in value what `dual` gives for equal inputs."""

    def tabulated_(table, var):
        return tabulated.scale(_features(table, var))

    def beyond(var):
        return safe_sqrt(of.square(var)) if of.far is None else sampled.scale(of.far, var)

    branches = [*(functools.partial(tabulated_, table) for table in of.tables), beyond]
    scale = jax.lax.switch(of.level(var, var), branches, var)
    return scale * scale


@diagonal.defjvp
def _diagonal_jvp(of, primals, tangents):
    def change(square, primals, tangents):
        return jax.jvp(square, primals, tangents)[1]

    out = diagonal(of, *primals)
    near = functools.partial(change, of.square)
    if of.far is None:
        return out, near(primals, tangents)
    beyond = functools.partial(change, lambda var: sampled.scale(of.far, var) ** 2)
    reached = jnp.max(primals[0], initial=0) <= of.tables[-1].reach ** 2
    return out, jax.lax.cond(reached, near, beyond, primals, tangents)
