"""Entries that data choose: any gather, in and out of bounds, alone and beside other uses."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import tangents as nt
from finite.structured.test_rules import check
from finite.table import normal
from reference import finite as reference
from tangents._finite import cost
from tangents._finite.methods import structured_derivatives
from tangents._finite.methods.structured_derivatives import Options
from tangents._finite.problem import make_problem


@st.composite
def gathers(draw):
    """Shape of the table, indices (some repeated, some out of bounds), and the gather."""
    kinds = draw(st.lists(st.sampled_from(["indexed", "window", "whole", "part"]), max_size=2))
    kinds = draw(st.permutations([*kinds, "indexed"]))
    batched = draw(st.booleans())
    table = [draw(st.integers(2, 3)) for _ in kinds]
    sizes = [
        {"indexed": 1, "whole": n}.get(kind) or draw(st.integers(1, n))
        for kind, n in zip(kinds, table, strict=True)
    ]
    moving = [k for k, kind in enumerate(kinds) if kind in ("indexed", "window")]
    moving = draw(st.permutations(moving))
    collapsed = [k for k in moving if sizes[k] == 1 and draw(st.booleans())]
    places = [draw(st.integers(1, 3)) for _ in range(draw(st.integers(0, 2)))]
    if batched:  # the table's first axis goes with the first axis of the indices
        table, sizes, places = [2, *table], [1, *sizes], [2, *places]
        moving, collapsed = [k + 1 for k in moving], [k + 1 for k in collapsed]
    slices = len(table) - len(collapsed) - batched
    offsets = sorted(draw(st.permutations(range(slices + len(places))))[:slices])
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(offsets),
        collapsed_slice_dims=tuple(sorted(collapsed)),
        start_index_map=tuple(moving),
        operand_batching_dims=(0,) if batched else (),
        start_indices_batching_dims=(0,) if batched else (),
    )
    dtype = draw(st.sampled_from([np.int32, np.int8, np.uint8]))
    low = 0 if dtype == np.uint8 else -1
    count = int(np.prod([*places, len(moving)]))
    flat = draw(st.lists(st.integers(low, 3), min_size=count, max_size=count))
    indices = np.asarray(flat, dtype).reshape(*places, len(moving))
    mode = draw(st.sampled_from(["clip", "fill"]))
    keywords = {"dimension_numbers": numbers, "slice_sizes": tuple(sizes), "mode": mode}
    return tuple(table), indices, keywords


@settings(max_examples=12)
@given(
    gathers(),
    st.sampled_from(["none", "head", "rows", "columns"]),
    st.booleans(),
    st.sampled_from(["outer", "pairs"]),
)
def test_gather(case, other, turned, form):
    """Against full Jacobians: alone, with a tied head, and with rows along another axis."""
    table, indices, keywords = case
    rtol = 1e-10 if jax.config.jax_enable_x64 else 2e-4
    shape = table[::-1] if turned else table

    def f(w, x):
        view = jnp.transpose(w) if turned else w
        y = lax.gather(view, x, fill_value=0.0, **keywords).reshape(-1)
        mixing = jnp.cos(jnp.arange(2 * y.size, dtype=y.dtype)).reshape(2, -1)
        out = jnp.tanh(mixing @ y)
        number = x.reshape(-1)[0].astype(jnp.int32)
        if other == "head":
            entries = jnp.sin((number + jnp.arange(w.shape[0], dtype=number.dtype)).astype(w.dtype))
            out = out * jnp.sum(jnp.tensordot(entries, w, 1))
        elif other != "none":
            axis = 0 if other == "rows" else w.ndim - 1
            out = out + jnp.sin(jnp.take(w, number % 2, axis=axis).sum())
        return out

    analysis = check(f, normal(0, *shape), jnp.asarray(indices), rtol, form=form)
    assert all(use.reason == "" for use in analysis.uses)


def test_rows_along_two_axes_of_one_table(rtol):
    """Equal numbers of rows and of columns are not equal entries."""

    def f(w, x):
        return jnp.tanh(w[x[:, 0]] @ jnp.ones(4)) * jnp.tanh(jnp.ones(5) @ w[:, x[:, 1]])

    x, w = jnp.asarray([[1, 2], [4, 0], [3, 3], [1, 1]]), normal(0, 5, 4)
    check(f, w, x, rtol, form="pairs")
    check(f, w, x, rtol, form="outer")


def test_rows_of_a_repeated_row(rtol):
    """All rows of what was broadcast are one row of the weight."""
    f = lambda w, x: jnp.tanh(jnp.broadcast_to(w, (5, 3))[x] @ jnp.ones((3, 2)))
    for form in ("pairs", "outer"):
        check(f, normal(0, 3), jnp.asarray([[1, 2], [4, 0]]), rtol, form=form)


def test_tables_that_a_loop_goes_through(rtol):
    """Each step reads rows of its own slice of a stack, and of one table they share."""

    def f(p, x):
        def step(h, given):
            table, rows = given
            return jnp.tanh(h + table[rows] + p["shared"][rows + 1]), None

        return lax.scan(step, jnp.zeros((2, 3), p["stack"].dtype), (p["stack"], x.T))[0]

    p = {"stack": normal(0, 3, 4, 3), "shared": normal(1, 5, 3)}
    x = jnp.asarray([[0, 1, 2], [3, 1, 0]])
    for form in ("pairs", "outer"):
        check(f, p, x, rtol, form=form)


@pytest.mark.parametrize("width", [1, 2])
def test_tables_in_slices(width, rtol):
    """Gradients of some entries of a table at a time: along its rows, and along its columns."""

    def f(p, x):
        rows = p["rows"][x] @ jnp.ones((2, 2))
        columns = p["columns"][:, x].sum(0)[..., None]
        return jnp.tanh(rows.sum(1) + columns.sum(1) + p["grid"][x, x[:, ::-1]].sum(1)[..., None])

    p = {"rows": normal(0, 5, 2), "columns": normal(1, 2, 5), "grid": normal(2, 5, 5)}
    x = jnp.asarray([[0, 4, 4], [1, 3, 0]])
    problem = make_problem(f, x, None, p, {}, vmap_axes=0, caller="test")
    axes = problem.pair_axes((), ())
    (plan,) = structured_derivatives.plans(problem, axes, Options(form="outer"))
    for weight, form in plan.forms.items():
        uses, root = plan.side1.analysis.uses_of(weight), plan.side1.analysis.roots[weight]
        cut = cost.sliced(uses, uses, root, form, 0, 1)
        assert cut is not None
        plan.forms[weight] = replace(
            cut, slices=tuple(replace(part, width=width) for part in cut.slices)
        )
    plan.dense.clear()
    expected = reference.ntk(f, p, x, None, ())
    np.testing.assert_allclose(plan.compute(), expected, rtol=rtol, atol=rtol)


def test_one_hots_are_not_made(rtol):
    """A table of many words: memory follows the words that are read, not the table."""
    words, d = 20_000, 4
    f = lambda p, x: jnp.tanh(p["table"][x]).sum(1) @ p["readout"]
    p = {"table": normal(0, words, d), "readout": normal(1, d, 2)}
    x = jnp.asarray(np.random.RandomState(0).randint(0, words, (4, 64)))
    compiled = jax.jit(nt.empirical_ntk_fn(f, vmap_axes=0)).lower(x, None, p).compile()
    one_hot = x.size * words * p["table"].dtype.itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < one_hot / 4
    expected = nt.empirical_ntk_fn(f, vmap_axes=0, implementation=1)(x, None, p)
    np.testing.assert_allclose(compiled(x, None, p), expected, rtol=10 * rtol)
