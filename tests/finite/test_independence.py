"""Whether examples interact, found out from the network: what is found, and what it is used for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import tangents as nt
from finite.table import normal
from reference import finite as reference
from tangents._finite.problem import make_problem

W = normal(0, 3, 3)
NHWC = ("NHWC", "HWIO", "NHWC")


def batch_norm(w, x, training):
    h = x @ w
    mean, var = (h.mean(0), h.var(0)) if training else (w[0], w[1] ** 2)
    return jnp.tanh((h - mean) / jnp.sqrt(var + 1))


def attention(w, x):
    q, k, v = x @ w, x @ w.T, x
    scores = jax.nn.softmax(jnp.einsum("nqc,nkc->nqk", q, k), axis=-1)
    return jnp.einsum("nqk,nkc->nqc", scores, v).mean(1) @ w


def convolution(w, x):
    kernel = jnp.broadcast_to(w[None, None], (2, 1, 3, 3))
    y = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC)
    y = lax.reduce_window(y, -jnp.inf, lax.max, (1, 2, 1, 1), (1, 2, 1, 1), "VALID")
    return y.reshape(y.shape[0], -1)


def scan(w, x):
    step = lambda h, x_t: (jnp.tanh(x_t @ w + h), h)
    h, hs = lax.scan(step, jnp.zeros_like(x[:, 0]), jnp.swapaxes(x, 0, 1))
    return h + hs.sum(0)


def lstm(w, x):
    """Starts from zeros, which lose their shape in products before they meet the examples."""

    def step(carry, x_t):
        h, c = carry
        i, f, g = jnp.split((x_t + h) @ jnp.tile(w, 3) + h @ jnp.tile(w.T, 3), 3, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (jnp.tanh(c), c), None

    start = jnp.zeros((x.shape[0], 3), w.dtype)
    return lax.scan(step, (start, start), jnp.swapaxes(x, 0, 1))[0][0]


def embedding_lstm(w, x):
    return lstm(w, w[jnp.argmax(x, -1)])


def numbered_start(w, x):
    """The start is different for each example: on one alone it would be another."""
    start = jnp.zeros_like(x[:, 0]) + jnp.arange(1.0, len(x) + 1, dtype=x.dtype)[:, None]
    return lax.scan(lambda h, x_t: (h @ w + x_t, None), start, jnp.swapaxes(x, 0, 1))[0]


def numbered_product(w, x):
    rows = jnp.arange(1.0, len(x) + 1, dtype=x.dtype)[:, None] * jnp.ones_like(x)
    return x @ w + rows @ w


def over_examples(w, x):
    return lax.scan(lambda h, x_n: (jnp.tanh(h + x_n @ w),) * 2, jnp.zeros(3, x.dtype), x)[1]


def cond(w, x):
    return lax.cond(w[0, 0] > 0, lambda x: x @ w, lambda x: jnp.sin(x), x)


@jax.custom_jvp
def custom(x):
    return jnp.sin(x)


custom.defjvp(lambda x, dx: (custom(x[0]), dx[0] * jnp.cos(x[0])))


def with_token(w, x):
    token = jnp.broadcast_to(w[0], (len(x), 1, 3))
    return jnp.concatenate([token, x], 1).sum(1)


def solved(w, x):
    return jnp.linalg.solve(w + 5 * jnp.eye(3, dtype=w.dtype), x[..., None])[..., 0]


X, TOKENS, IMAGES = (4, 3), (4, 5, 3), (4, 4, 4, 3)
INDEPENDENT = {
    "evaluation": (lambda w, x: batch_norm(w, x, False), X),
    "attention": (attention, TOKENS),
    "convolution": (convolution, IMAGES),
    "scan": (scan, TOKENS),
    "lstm": (lstm, TOKENS),
    "embedding lstm": (embedding_lstm, TOKENS),
    "zeros": (lambda w, x: x @ w + jnp.ones_like(x) @ w, X),
    "cond": (cond, X),
    "custom_jvp": (lambda w, x: custom(x @ w), X),
    "remat": (jax.checkpoint(lambda w, x: jnp.tanh(x @ w)), X),
    "embedding": (lambda w, x: w[jnp.argmax(x, -1)], X),
    "class token": (with_token, TOKENS),
    "rank one": (lambda w, x: jnp.einsum("ni,ij,nj->n", x, w, x), X),
    "positions": (lambda w, x: (x + jnp.arange(5.0, dtype=x.dtype)[:, None]) @ w, TOKENS),
    "outer sum": (lambda w, x: x[:, :, None] * w + x[:, None] / w.shape[0], X),
    "one-hot": (lambda w, x: jax.nn.one_hot(jnp.argmax(x, -1), 3, dtype=x.dtype) @ w, X),
    "normalised": (lambda w, x: (x - x.mean(-1, keepdims=True)) / (1 + x.std(-1)[:, None]) @ w, X),
    "sorted": (lambda w, x: jnp.sort(x @ w, -1) + jnp.cumsum(x, -1), X),
}
MIXED = {
    "training": (lambda w, x: batch_norm(w, x, True), X),
    "reversed": (lambda w, x: x[::-1] @ w, X),
    "over examples": (over_examples, X),
    "running sum": (lambda w, x: jnp.cumsum(x @ w, 0), X),
    "similarities": (lambda w, x: jax.nn.softmax(x @ w @ x.T, -1) @ x, X),
    "branch": (lambda w, x: lax.cond(w[0, 0] > 0, lambda x: x - x.mean(0), jnp.sin, x) @ w, X),
}
UNKNOWN = {
    "merged": (lambda w, x: (x.reshape(-1, 3) @ w).reshape(x.shape), TOKENS),
    "numbered": (lambda w, x: x @ w * jnp.arange(1.0, len(x) + 1, dtype=x.dtype)[:, None], X),
    "numbered start": (numbered_start, TOKENS),
    "numbered product": (numbered_product, X),
    "divided by the batch": (lambda w, x: x @ w / x.shape[0], X),
    "another alone": (lambda w, x: jnp.sin(x @ w) if len(x) == 1 else jnp.tanh(x @ w), X),
    "another scale alone": (lambda w, x: (3.0 if len(x) == 1 else 2.0) * (x @ w), X),
    "another start alone": (lambda w, x: jnp.full(x.shape, 1.0 * (len(x) > 1)) @ w + x, X),
    "another part alone": (lambda w, x: (x[:, :2] if len(x) == 1 else x[:, 1:]) @ w[1:], X),
    # Of one example the products are taken in another order.
    "three operands": (lambda w, x: jnp.einsum("ni,ij,jk->nk", x, w, w), X),
    "one by one": (lambda w, x: jnp.stack([jnp.tanh(x[k] @ w) for k in range(len(x))]), X),
    "values": (lambda w, x: x @ w if float(np.asarray(x)[0, 0]) > -100 else x, X),
}


def problem_of(f, shape, **options):
    x1, x2 = normal(1, *shape), normal(2, 3, *shape[1:])
    return make_problem(f, x1, x2, W, {}, caller="t", **options)


@pytest.mark.parametrize("name", INDEPENDENT)
def test_independent_examples_are_found(name, rtol):
    f, shape = INDEPENDENT[name]
    problem = problem_of(f, shape, find_examples=True)
    assert problem.side1.vmap is not None and problem.side2.vmap is not None
    # What is found must hold: each example alone gives its row.
    x = normal(1, *shape)
    rows = jnp.concatenate([f(W, x[k : k + 1]) for k in range(len(x))])
    np.testing.assert_allclose(rows, f(W, x), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", [*MIXED, *UNKNOWN])
def test_mixed_and_unknown_examples_are_not(name):
    problem = problem_of(*(MIXED | UNKNOWN)[name], find_examples=True)
    assert problem.side1.vmap is None and problem.side2.vmap is None


@pytest.mark.parametrize("name", MIXED)
def test_a_broken_promise_is_an_error(name):
    with pytest.raises(ValueError, match="vmap_axes=0 promises that examples do not interact, but"):
        problem_of(*MIXED[name], vmap_axes=0)


@pytest.mark.parametrize("name", [*INDEPENDENT, "merged", "one by one"])
def test_a_kept_promise_is_none(name):
    problem = problem_of(*(INDEPENDENT | UNKNOWN)[name], vmap_axes=0)
    assert problem.side1.vmap is not None


def test_wrong_axis_of_the_output_is_an_error():
    f = lambda w, x: (x @ w).T
    with pytest.raises(ValueError, match="vmap_axes promises that examples do not"):
        problem_of(f, (3, 3), vmap_axes=0)
    assert problem_of(f, (3, 3), vmap_axes=(0, 1, {})).side1.vmap is not None


def test_dropout_of_one_key_is_left_alone():
    f = lambda w, x, rng: jnp.where(jax.random.bernoulli(rng, 0.5, x.shape), x @ w, 0)
    key = {"rng": jax.random.key(0)}
    problem = make_problem(f, normal(1, 4, 3), None, W, key, caller="t", find_examples=True)
    assert problem.side1.vmap is None


@pytest.mark.parametrize("name", ["attention", "training", "merged", "values", "lstm"])
def test_kernels_without_a_promise(name, rtol):
    f, shape = (INDEPENDENT | MIXED | UNKNOWN)[name]
    x1, x2 = normal(1, *shape), normal(2, 3, *shape[1:])
    got = nt.empirical_ntk_fn(f)(x1, x2, W)
    expected = reference.ntk(f, W, x1, x2)
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=rtol * np.abs(expected).max())
