"""Single rules over generated shapes and dimension numbers, and what analysis says of them."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import tangents as nt
from finite.table import normal
from reference import finite as reference
from tangents._finite import cost
from tangents._finite.functions import compute
from tangents._finite.methods import structured_derivatives
from tangents._finite.methods.structured_derivatives import Options
from tangents._finite.problem import make_problem
from tangents._finite.structure.passes import Traced


def check(f, params, x, rtol, **options):
    """The full kernel of f(params, x), nothing promised of the batch, against full Jacobians."""
    problem = make_problem(f, x, None, params, {}, caller="test")
    method = functools.partial(structured_derivatives.kernels, options=Options(**options))
    got = compute(problem, method, problem.pair_axes((), ()))[0]
    expected = reference.ntk(f, params, x, None, ())
    scale = np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=rtol * scale)
    return Traced(problem, problem.side1).analysis


@st.composite
def products(draw):
    """A dot_general: shapes and dimension numbers, a weight on either side."""
    kinds = [draw(st.integers(0, 2)) for _ in range(3)]  # batch, contracted, free
    batch, contracted = ([draw(st.integers(1, 3)) for _ in range(n)] for n in kinds[:2])
    free = [[draw(st.integers(1, 2)) for _ in range(kinds[2])] for _ in range(2)]
    sides = []
    for mine in free:
        named = [
            *(("b", k) for k in range(len(batch))),
            *(("c", k) for k in range(len(contracted))),
        ]
        sizes = [*batch, *contracted, *mine]
        order = draw(st.permutations(range(len(sizes))))
        at = {name: order.index(k) for k, name in enumerate(named)}
        axes = lambda kind, n, at=at: tuple(at[kind, k] for k in range(n))
        shape = tuple(sizes[k] for k in order)
        sides.append((shape, axes("c", len(contracted)), axes("b", len(batch))))
    return sides, draw(st.integers(0, 1))


@settings(max_examples=6)
@given(products())
def test_dot_general(case):
    (lhs, rhs), operand = case
    numbers = ((lhs[1], rhs[1]), (lhs[2], rhs[2]))
    shapes = (lhs[0], rhs[0])
    rtol = 1e-10 if jax.config.jax_enable_x64 else 2e-4

    def f(w, x):
        pair = (w, x) if operand == 0 else (x, w)
        y = jnp.tanh(lax.dot_general(*pair, numbers))
        # A second use, in another place: cross terms.
        return jnp.sum(y) + jnp.sin(w) * 1.0 if w.size < 3 else y.reshape(-1)[:3] * w.reshape(-1)[1]

    analysis = check(f, normal(0, *shapes[operand]), normal(1, *shapes[1 - operand]), rtol)
    assert any(use.primitive == "dot_general" and not use.reason for use in analysis.uses)


@st.composite
def convolutions(draw):
    """A convolution of one or two spatial axes, any order of axes."""
    spatial = draw(st.integers(1, 2))
    small = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(spatial))
    window, strides, rhs_dilation, lhs_dilation = small(1, 3), small(1, 2), small(1, 2), small(1, 2)
    padding = tuple(zip(small(-1, 2), small(0, 2), strict=True))
    size = tuple(
        max(3, 1 + (k - 1) * d + max(0, -low)) + 1
        for k, d, (low, _) in zip(window, rhs_dilation, padding, strict=True)
    )
    features, batches = draw(st.sampled_from([(1, 1), (2, 1), (1, 2)]))
    inner = draw(st.integers(1, 2))
    image = (2 * batches if batches > 1 else draw(st.integers(1, 2)), features * inner, *size)
    kernel = (2 * max(features, batches), inner, *window)
    specs = [tuple(draw(st.permutations(range(2 + spatial)))) for _ in range(3)]
    place = lambda sizes, spec: tuple(sizes[spec.index(k)] for k in range(len(sizes)))
    keywords = {
        "window_strides": strides,
        "padding": padding,
        "lhs_dilation": lhs_dilation,
        "rhs_dilation": rhs_dilation,
        "dimension_numbers": lax.ConvDimensionNumbers(*specs),
        "feature_group_count": features,
        "batch_group_count": batches,
    }
    return place(image, specs[0]), place(kernel, specs[1]), keywords


@settings(max_examples=6)
@given(convolutions())
def test_convolution(case):
    image, kernel, keywords = case
    rtol = 1e-10 if jax.config.jax_enable_x64 else 2e-4
    x = normal(1, *image)
    entries = min(
        4,
        jax.eval_shape(
            lambda a, b: lax.conv_general_dilated(a, b, **keywords), x, normal(0, *kernel)
        ).size,
    )

    def f(w, x):
        y = lax.conv_general_dilated(x, w, **keywords)
        mixing = jnp.cos(jnp.arange(entries * y.size, dtype=y.dtype)).reshape(entries, -1)
        return mixing @ jnp.tanh(y).reshape(-1)

    for form in ("outer", "pairs"):
        analysis = check(f, normal(0, *kernel), x, rtol, form=form)
        assert [use.reason for use in analysis.uses] == [""]


def test_uses_without_rules_are_named():
    def f(p, x):
        solved = lax.linalg.triangular_solve(p["matrix"], x[None] @ p["w"], left_side=False)
        return solved[0] * jnp.exp(p["s"])

    params = {"matrix": normal(0, 2, 2), "w": normal(1, 2, 2), "s": normal(2, 2)}
    op = nt.ntk_operator(f, params, normal(3, 2), implementation=3)
    head, *rows, last = op.explain().splitlines()
    assert head.split()[:4] == ["weight", "shape", "uses", "form"]
    by_weight = {row.split()[0]: row for row in rows}
    assert "`triangular_solve` has no rule" in by_weight["['matrix']"]
    assert "no rule" not in by_weight["['w']"] and "dot_general" in by_weight["['w']"]
    assert "outer" in by_weight["['s']"]
    assert last.startswith("at once: 2 outputs; about ")


def test_spectral_norm(rtol):
    """A weight divided by its largest singular value, found by power iterations from ones."""

    def f(w, x):
        u = jnp.ones(3, w.dtype)
        for _ in range(2):
            v = w.T @ u / jnp.linalg.norm(w.T @ u)
            u = w @ v / jnp.linalg.norm(w @ v)
        return jnp.tanh(x @ (w / (u @ w @ v))) * 2

    analysis = check(f, normal(0, 3, 4), normal(1, 2, 3), rtol)
    assert [use.reason for use in analysis.uses] == [""]
    assert analysis.roots[analysis.uses[0].root].shape == (3, 4)


def test_while_is_refused_by_name():
    def f(w, x):
        return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ w)), (0, x))[
            1
        ]

    with pytest.raises(NotImplementedError, match=r"empirical_ntk_fn: .* `while` loop .* lax.scan"):
        nt.empirical_ntk_fn(f, implementation=0)(normal(0, 2, 3), None, normal(1, 3, 3))
    # Before anything meets a weight a loop is no obstacle.
    g = lambda w, x: lax.while_loop(lambda c: c.sum() > 1, lambda c: c / 2, x) @ w
    nt.empirical_ntk_fn(g, implementation=0)(normal(0, 2, 3), None, normal(1, 3, 3))


@pytest.mark.parametrize("vmap_axes", [0, None])
def test_memory_below_the_least_is_an_error_that_states_it(vmap_axes, rtol):
    f = lambda w, x: jnp.tanh(x @ w)
    x, w = normal(0, 6, 40), normal(1, 40, 5)
    fn = lambda memory: nt.empirical_ntk_fn(f, (), (), vmap_axes, 0, memory=memory)
    with pytest.raises(ValueError, match=r"memory=50 is 50 B, .* needs about .*Pass memory='"):
        fn(50)(x, None, w)
    expected = fn(None)(x, None, w)
    np.testing.assert_allclose(fn("20KiB")(x, None, w), expected, rtol=rtol, atol=rtol)
    with pytest.raises(ValueError, match="JACOBIAN_CONTRACTION does not work in chunks"):
        nt.empirical_ntk_fn(f, implementation=1, memory="1GiB")


def tied(p, x):
    """One weight at every step and after them, another in parts, a stack of them in a loop."""
    q, k = jnp.split(p["qk"], 2, axis=1)
    x = jnp.tanh(x @ q) * jnp.tanh(x @ k)
    x, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["stack"])
    return jnp.tanh(x @ p["w"]) @ p["w"]


@pytest.mark.parametrize("width", [1, 2])
def test_weights_in_slices(width, rtol):
    """Gradients of some entries at a time: weights with several uses, in parts, in loops."""
    p = {"qk": normal(0, 3, 10), "stack": normal(1, 3, 5, 5) / 2, "w": normal(2, 5, 5) / 2}
    x = normal(3, 2, 3)
    problem = make_problem(tied, x, None, p, {}, caller="test")
    (plan,) = structured_derivatives.plans(
        problem, problem.pair_axes((), ()), Options(form="outer")
    )
    for weight, form in plan.forms.items():
        uses = plan.side1.analysis.uses_of(weight)
        root = plan.side1.analysis.roots[weight]
        cut = cost.sliced(uses, uses, root, form, 0, 1)
        assert cut is not None and cut.entries < form.entries
        assert len(cut.slices) == (2 if weight == 0 else 1)  # q and k are apart
        slices = tuple(replace(part, width=width) for part in cut.slices)
        plan.forms[weight] = replace(cut, slices=slices)
    plan.dense.clear()
    expected = reference.ntk(tied, p, x, None, ())
    scale = np.abs(expected).max()
    np.testing.assert_allclose(plan.compute(), expected, rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("shape", [(64, 200, 10), (16, 300, 50)])
def test_working_memory_follows_the_budget(shape):
    """XLA's own count of temporaries stays under budgets over two orders of magnitude."""
    examples, width, outputs = shape
    f = lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]
    p = {"a": normal(0, 30, width), "b": normal(1, width, width), "c": normal(2, width, outputs)}
    x = normal(3, examples, 30)
    sizes = []
    for budget in (2**19, 2**22, 2**26):
        for trace in ((-1,), ()):
            fn = jax.jit(nt.empirical_ntk_fn(f, trace, (), 0, 0, memory=budget))
            compiled = fn.lower(x, None, p).compile()
            analysis = compiled.memory_analysis()
            # The result is copied once to make it symmetric and once to arrange it.
            used = analysis.temp_size_in_bytes - 3 * analysis.output_size_in_bytes
            assert used <= budget, (budget, trace)
            sizes.append(analysis.temp_size_in_bytes)
    assert sizes[0] < sizes[-2] or sizes[-2] < 2**19


@settings(max_examples=6)
@given(st.integers(0, 2), st.integers(1, 3), st.integers(0, 1))
def test_dynamic_slice(start, window, axis):
    """Windows that data choose, one over the end, and a second use of the same table."""
    rtol = 1e-10 if jax.config.jax_enable_x64 else 2e-4

    def f(w, x):
        first = jnp.int32(x[0] > 0) + start
        taken = lax.dynamic_slice_in_dim(w, first, window, axis) * x[:1]
        return jnp.tanh(taken).sum(axis) + (x[:3] @ w).sum()

    analysis = check(f, normal(0, 3, 3), normal(1, 4), rtol)
    assert [use.reason for use in analysis.uses] == ["", ""]
