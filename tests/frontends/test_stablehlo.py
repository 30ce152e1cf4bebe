"""The reader of StableHLO, on programs that JAX itself lowers: values and derivatives agree."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tangents.frontends import stablehlo


def read_back(f, *args):
    """`f` lowered to StableHLO and read again."""
    main = stablehlo.parse(jax.jit(f, keep_unused=True).lower(*args).as_text())
    return lambda *args: stablehlo.Machine().run(main, [jnp.asarray(a) for a in args])[0]


def gather_rows(w, i):
    return w[i] * jnp.arange(1.0, 4.0, dtype=w.dtype)


def scatter_rows(w, i):
    return jnp.zeros((7, 3), w.dtype).at[i].add(w[: i.size])


def branches(w, x):
    return lax.cond(x[0, 0] > 0, lambda: jnp.sin(w) @ x.T, lambda: w @ x.T)


def switch(w, x):
    return lax.switch(jnp.argmax(x[0]), [lambda: w, lambda: w * 2, lambda: jnp.sin(w)])


def counted(w, x):
    return lax.fori_loop(0, 4, lambda i, y: jnp.tanh(y @ w.T @ w) + i, x)


def reads_and_writes(w, x):
    def step(i, out):
        row = lax.dynamic_slice(x, (3 - i, 0), (1, 3))
        return lax.dynamic_update_slice(out, jnp.tanh(row @ w.T @ w), (i, 0))

    return lax.fori_loop(0, 4, step, jnp.zeros_like(x))


def scanned(w, x):
    def step(carry, row):
        carry = jnp.tanh(carry + w @ row)
        return carry, carry

    return lax.scan(step, jnp.zeros(5, w.dtype), x)[1]


def reversed_scan(w, x):
    def step(carry, row):
        carry = jnp.tanh(carry + w @ row)
        return carry, carry[:2]

    return lax.scan(step, jnp.zeros(5, w.dtype), x, reverse=True)[1]


def once(w, x):
    return lax.fori_loop(2, 3, lambda i, y: y @ w.T @ w * i, x)


def never(w, x):
    return lax.fori_loop(2, 2, lambda i, y: y @ w.T @ w * i, x) * w[0]


CASES = {
    "elementwise": lambda w, x: jnp.exp(w @ x.T) / (1 + jnp.square(jnp.sin(x @ w.T)).T),
    "special": lambda w, x: jnp.log1p(jnp.abs(w)) + lax.rsqrt(1 + w**2) + jax.nn.sigmoid(w),
    "powers": lambda w, x: jnp.power(jnp.abs(w) + 1, 2.5) + jnp.arctan2(w, 2.0 + w**2),
    "rounding": lambda w, x: jnp.floor(w) * w + jnp.round(w) + jnp.sign(w) * jnp.ceil(w),
    "clip": lambda w, x: jnp.clip(w, -0.5, 0.5),
    "select": lambda w, x: jnp.where(w > 0.1, w, jnp.expm1(w)),
    "shapes": lambda w, x: jnp.pad(jnp.flip(w.T.reshape(5, 3)[:, ::2], 1), ((1, 2), (0, 1))),
    "concatenate": lambda w, x: jnp.concatenate([w, x, w[::2]], 0) * jnp.arange(3.0),
    "negative padding": lambda w, x: lax.pad(w, 0.0, ((-1, 1, 2), (1, -1, 0))),
    "batched product": lambda w, x: jnp.einsum("abc,dbc->bad", w.reshape(5, 3, 1), x[..., None]),
    "reductions": lambda w, x: w.sum(0) + w.max() * w.min(1).sum() + w.prod(0),
    "window sum": lambda w, x: lax.reduce_window(w, 0.0, lax.add, (2, 2), (1, 1), "SAME"),
    "window max": lambda w, x: lax.reduce_window(w, -jnp.inf, lax.max, (2, 2), (2, 1), "SAME"),
    "argmax": lambda w, x: w * jnp.argmax(w, 1, keepdims=True).astype(w.dtype),
    "sort": lambda w, x: jnp.sort(w, 0) * jnp.arange(3.0),
    "cumulative sum": lambda w, x: jnp.cumsum(w, 1),
    "constant table": lambda w, x: w * jnp.asarray(np.arange(15.0).reshape(5, 3)).astype(w.dtype),
    "branches": branches,
    "switch": switch,
    "counted loop": counted,
    "reads and writes": reads_and_writes,
    "scan": scanned,
    "reversed scan": reversed_scan,
    "one step": once,
    "no step": never,
}


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    dtype = jnp.result_type(float)
    return jnp.asarray(rng.normal(size=(5, 3)), dtype), jnp.asarray(rng.normal(size=(4, 3)), dtype)


@pytest.mark.parametrize("name", CASES)
def test_values_and_derivatives_survive(name, arrays, rtol):
    f, (w, x) = CASES[name], arrays
    with jax.numpy_dtype_promotion("standard"):
        again = read_back(f, w, x)
        np.testing.assert_allclose(again(w, x), f(w, x), rtol=rtol, atol=rtol)
        cotangent = jnp.cos(jnp.arange(f(w, x).size, dtype=w.dtype)).reshape(f(w, x).shape)
        along = lambda function: jax.vjp(lambda w: function(w, x), w)[1](cotangent)[0]
        if name != "no step":  # JAX's own loop of no steps has a reverse mode too
            np.testing.assert_allclose(along(again), along(_reversible(f)), rtol=rtol, atol=rtol)
        batch = jnp.stack([w, 2 * w])
        np.testing.assert_allclose(
            jax.vmap(again, (0, None))(batch, x)[1], f(2 * w, x), rtol=rtol, atol=rtol
        )


def _reversible(f):
    return f


@pytest.mark.parametrize("f", [gather_rows, scatter_rows])
def test_gather_and_scatter(f, arrays, rtol):
    w, i = arrays[0], jnp.array([2, 0, 2, 4])
    again = read_back(f, w, i)
    np.testing.assert_allclose(again(w, i), f(w, i), rtol=rtol)
    gradient = lambda function: jax.grad(lambda w: jnp.sum(jnp.sin(function(w, i))))(w)
    np.testing.assert_allclose(gradient(again), gradient(f), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_convolution(groups, padding, rtol):
    rng = np.random.default_rng(0)
    dtype = jnp.result_type(float)
    x = jnp.asarray(rng.normal(size=(2, 7, 6, 4)), dtype)
    w = jnp.asarray(rng.normal(size=(3, 2, 4 // groups, 6)), dtype)

    def f(w, x):
        return lax.conv_general_dilated(
            x,
            w,
            (2, 1),
            padding,
            rhs_dilation=(1, 2),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    again = read_back(f, w, x)
    np.testing.assert_allclose(again(w, x), f(w, x), rtol=rtol, atol=rtol)
    gradient = lambda function: jax.grad(lambda w: jnp.sum(jnp.sin(function(w, x))))(w)
    np.testing.assert_allclose(gradient(again), gradient(f), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("f", [counted, reads_and_writes, scanned, reversed_scan])
def test_loops_of_known_length_become_scans(f, arrays):
    w, x = arrays
    with jax.numpy_dtype_promotion("standard"):
        again = read_back(f, w, x)
    text = str(jax.make_jaxpr(again)(w, x))
    assert "scan[" in text and "while[" not in text


@pytest.mark.parametrize("f", [reads_and_writes, scanned])
def test_rows_are_sliced_and_stacked_outside_the_loop(f, arrays):
    w, x = arrays
    with jax.numpy_dtype_promotion("standard"):
        text = str(jax.make_jaxpr(read_back(f, w, x))(w, x))
    assert "dynamic_slice" not in text and "dynamic_update_slice" not in text


def test_a_loop_that_depends_on_data_runs_forward(arrays, rtol):
    w, x = arrays

    def f(w, x):
        return lax.while_loop(lambda y: jnp.sum(y) < 10, lambda y: y + jnp.abs(w), jnp.abs(w))

    again = read_back(f, w, x)
    np.testing.assert_allclose(again(w, x), f(w, x), rtol=rtol)
    tangent = lambda function: jax.jvp(lambda w: function(w, x), (w,), (jnp.ones_like(w),))[1]
    np.testing.assert_allclose(tangent(again), tangent(f), rtol=rtol)


def test_a_loop_that_depends_on_data_has_no_reverse_mode_and_says_so(arrays):
    def f(w):
        return lax.while_loop(lambda y: jnp.sum(y) < 10, lambda y: y + jnp.abs(w), jnp.abs(w))

    again = read_back(f, arrays[0])
    with pytest.raises(NotImplementedError, match=r"loop stablehlo.while.*maximum_iterations="):
        jax.grad(lambda w: again(w).sum())(arrays[0])


@pytest.mark.parametrize("most", [0, 1, 6, 100])
def test_a_loop_with_a_known_most_stops_by_itself(most, arrays, rtol):
    w = jnp.abs(arrays[0])

    def f(w):  # also carries a counter of its own, and reads what the first condition has
        def goes_on(state):
            steps, _, y = state
            return (steps < most) & (jnp.sum(y) < 40)

        def step(state):
            steps, odd, y = state
            return steps + 1, odd + 2, y * (1 + jnp.sin(w)) + odd

        _, odd, y = lax.while_loop(goes_on, step, (0, 1, w))
        return y * odd

    def unrolled(w):
        odd, y = 1, w
        for _ in range(most):
            if not jnp.sum(lax.stop_gradient(y)) < 40:
                break
            odd, y = odd + 2, y * (1 + jnp.sin(w)) + odd
        return y * odd

    with jax.numpy_dtype_promotion("standard"):
        again = read_back(f, w)
        np.testing.assert_allclose(again(w), f(w), rtol=rtol)
        along = lambda function: jax.vjp(function, w)[1](jnp.cos(w))[0]
        np.testing.assert_allclose(along(again), along(unrolled), rtol=rtol)
        np.testing.assert_allclose(jax.vmap(again)(w[None])[0], f(w), rtol=rtol)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("exclusive", [0, 1])
@pytest.mark.parametrize(
    ("monoid", "start"), [(lax.mul, 1), (lax.add, 0), (lax.max, -np.inf), (lax.min, np.inf)]
)
def test_windows_from_one_end_are_cumulative(monoid, start, exclusive, reverse, arrays, rtol):
    w = arrays[0].at[2, 1].set(0.0)
    padding = (0, 2 + exclusive) if reverse else (2 + exclusive, 0)

    def windows(w):
        return lax.reduce_window(
            w, np.asarray(start, w.dtype), monoid, (1, 3), (1, 1), [(0, 0), padding]
        )

    def obvious(w):
        columns = list(w.T[::-1] if reverse else w.T)
        results = [jnp.full_like(columns[0], start)] * exclusive
        for i in range(3):
            results.append(functools.reduce(monoid, columns[: i + 1]))
        return jnp.stack(results[::-1] if reverse else results, 1)

    again = read_back(windows, w)
    np.testing.assert_allclose(again(w), obvious(w), rtol=rtol)
    cotangent = jnp.cos(jnp.arange(obvious(w).size, dtype=w.dtype)).reshape(obvious(w).shape)
    along = lambda function: jax.vjp(function, w)[1](cotangent)[0]
    np.testing.assert_allclose(along(again), along(obvious), rtol=rtol, atol=rtol)


def test_ties_of_maximum_go_to_the_first_operand():
    f = lambda x: jnp.maximum(x, 0.0)
    again = read_back(f, jnp.zeros(3))
    np.testing.assert_array_equal(jax.grad(lambda x: again(x).sum())(jnp.zeros(3)), np.ones(3))
    assert np.isnan(again(jnp.full(3, jnp.nan))).all()


def test_an_operation_without_a_rule_is_named(arrays):
    f = lambda x: lax.reduce_precision(x, 8, 7)
    again = read_back(f, arrays[0])
    with pytest.raises(stablehlo.UnsupportedOperation, match=r"stablehlo\.reduce_precision"):
        again(arrays[0])
