"""`tf.Module` and `tf.function` against `tf.GradientTape`."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import tensorflow as tf

import tangents
from frontends import gradient_tape
from tangents import experimental


class Network(tf.Module):
    """A frozen variable, a tied weight, a list, a constant, a state that each call changes."""

    def __init__(self, dtype: str):
        super().__init__()
        rng = np.random.default_rng(0)
        self.w = tf.Variable(rng.normal(size=(3, 4)).astype(dtype), name="w")
        self.frozen = tf.Variable(rng.normal(size=4).astype(dtype), trainable=False)
        self.rest = [tf.Variable(rng.normal(size=(4, 2)).astype(dtype)), self.w]
        self.table = tf.constant(rng.normal(size=(300, 2)).astype(dtype))
        self.calls = tf.Variable(0, trainable=False)

    @tf.function
    def __call__(self, x):
        self.calls.assign_add(1)
        hidden = tf.nn.relu(x @ self.w + self.frozen)
        hidden += tf.stop_gradient(tf.nn.tanh(x @ self.rest[1]))
        return hidden @ self.rest[0] + tf.reduce_sum(self.table)


def example(floating, n=3):
    return np.random.default_rng(1).normal(size=(n, 3)).astype(floating)


def test_module(floating, x64):
    module, x = Network(floating), example(floating)
    apply_fn, params = tangents.from_model(module)
    assert set(params) == {"rest"} and set(params["rest"]) == {"0", "1"}  # each variable once
    tolerance = 1e-8 if x64 else 1e-5
    np.testing.assert_allclose(apply_fn(params, x), module(x), rtol=tolerance)
    variables = [module.w, module.rest[0]]
    theirs = gradient_tape.jacobian(module, variables, tf.constant(x))
    found = jax.jacrev(apply_fn)(params, x)
    for a, b in zip([found["rest"]["1"], found["rest"]["0"]], theirs, strict=True):
        np.testing.assert_allclose(np.reshape(a, b.shape), b, rtol=tolerance, atol=tolerance)
    _, everything = tangents.from_model(module, trainable=lambda path: True)
    assert set(everything) == {"rest", "frozen", "calls"}


def test_kernel_on_tensors_and_its_gradient(floating, x64):
    module, x = Network(floating), tf.constant(example(floating))
    kernel_fn = experimental.empirical_ntk_fn_tf(module)
    variables = module.trainable_variables
    with tf.GradientTape() as tape:
        kernel = kernel_fn(x, None, list(variables))
        total = tf.reduce_sum(kernel)
    theirs = gradient_tape.ntk(module, variables, x, x)
    np.testing.assert_allclose(kernel, theirs, rtol=1e-8 if x64 else 1e-4)
    found = tape.gradient(total, variables)
    assert [g.shape for g in found] == [v.shape for v in variables]
    # Without the stopped part the kernel is quadratic in v for w, constant for v itself.
    twice = [2 * v if v is module.rest[0] else v for v in variables]
    half = tf.reduce_sum(kernel_fn(x, None, twice)) - total
    place = [v is module.rest[0] for v in variables].index(True)
    slope = tf.reduce_sum(found[place] * module.rest[0])
    np.testing.assert_allclose(half, 1.5 * slope, rtol=1e-8 if x64 else 1e-3)


def test_variables_that_are_found_by_calling(floating):
    hidden = tf.Variable(np.ones((3, 2), "float32"), name="hidden")

    class Outside(tf.Module):
        input_shape = (None, 3)

        def __call__(self, x):
            return x @ hidden

    apply_fn, params = tangents.from_model(Outside())
    assert set(params) == {"hidden"}
    x = example("float32")
    np.testing.assert_allclose(apply_fn(params, x), x @ np.ones((3, 2), "float32"), rtol=1e-5)


def test_a_module_without_variables_asks_for_an_example():
    class Empty(tf.Module):
        def __call__(self, x):
            return x

    with pytest.raises(ValueError, match=r"input's shape is not known.*example_input="):
        tangents.from_model(Empty())
    with pytest.raises(TypeError, match=r"Module is a tf.Module without a __call__"):
        tangents.from_model(tf.Module())


def test_function_of_params(floating, x64):
    @tf.function(
        input_signature=[
            {"w": tf.TensorSpec((3, 2), floating), "b": tf.TensorSpec((2,), floating)},
            tf.TensorSpec((None, 3), floating),
        ]
    )
    def f(params, x):
        return tf.math.erf(x @ params["w"] + params["b"])

    apply_fn, none = tangents.from_model(f)
    assert none is None
    rng = np.random.default_rng(0)
    params = {k: rng.normal(size=s).astype(floating) for k, s in [("w", (3, 2)), ("b", (2,))]}
    x = example(floating)
    np.testing.assert_allclose(apply_fn(params, x), f(params, x), rtol=1e-6)
    variables = [tf.Variable(params["w"]), tf.Variable(params["b"])]
    g = lambda x: f({"w": variables[0], "b": variables[1]}, x)
    kernel = tangents.empirical_ntk_fn(f)(x, None, params)
    theirs = gradient_tape.ntk(g, variables, tf.constant(x), tf.constant(x))
    np.testing.assert_allclose(kernel, theirs, rtol=1e-8 if x64 else 1e-5)


def test_function_of_an_input(floating):
    w = tf.Variable(np.ones((3, 2), floating), name="w")

    @tf.function(input_signature=[tf.TensorSpec((None, 3), floating)])
    def f(x):
        return tf.nn.softplus(x @ w)

    apply_fn, params = tangents.from_model(f)
    assert set(params) == {"w"}
    x = example(floating)
    np.testing.assert_allclose(apply_fn(params, x), f(x), rtol=1e-5)


# TensorFlow's autograph puts attributes of its own on syntax trees, which Python 3.13 deprecates;
# as an error the warning makes it give up.
@pytest.mark.filterwarnings("ignore:.*got an unexpected keyword argument:DeprecationWarning")
def test_python_control_flow_on_tensors(floating):
    class Branching(tf.Module):
        def __init__(self):
            super().__init__()
            self.w = tf.Variable(np.ones((3, 2), floating))

        def __call__(self, x):
            y = x @ self.w
            if tf.reduce_sum(y) > 0:
                y = 2 * y
            for _ in tf.range(3):
                y = tf.sin(y)
            return y

    module, x = Branching(), example(floating)
    apply_fn, params = tangents.from_model(module)
    for sign in (1, -1):
        expected = module(tf.constant(sign * x))
        np.testing.assert_allclose(apply_fn(params, sign * x), expected, rtol=1e-5)
    gradient = jax.grad(lambda p: apply_fn(p, x).sum())(params)["w"]
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(module(tf.constant(x)))
    np.testing.assert_allclose(gradient, tape.gradient(total, module.w), rtol=1e-5)


def doubled(x, **most):
    """x doubled until its mean square is above 5."""
    goes_on = lambda y: tf.reduce_mean(y * y) < 5
    (y,) = tf.while_loop(goes_on, lambda y: (y * (1 + tf.sigmoid(x)),), (x,), **most)
    return y


@pytest.mark.parametrize("most", [2, 20])
def test_a_loop_with_maximum_iterations(most, floating, x64):
    f = tf.function(lambda params, x: doubled(x * params, maximum_iterations=most))
    apply_fn, _ = tangents.from_model(f)
    x, w = example(floating), np.asarray([0.9, 1.1, -0.7], floating)
    variable = tf.Variable(w)
    y = f(variable, x)
    assert (np.mean(np.square(y)) >= 5) == (most == 20)
    tolerance = 1e-8 if x64 else 2e-5
    np.testing.assert_allclose(apply_fn(w, x), y, rtol=tolerance)
    (theirs,) = gradient_tape.jacobian(lambda x: f(variable, x), [variable], tf.constant(x))
    np.testing.assert_allclose(jax.jacrev(apply_fn)(w, x), theirs, rtol=tolerance, atol=tolerance)
    kernel = tangents.empirical_ntk_fn(f)(x, None, w)
    expected = np.einsum("nkp,mkp->nm", theirs, theirs) / 3
    np.testing.assert_allclose(kernel, expected, rtol=tolerance, atol=tolerance)


def test_a_loop_that_depends_on_data_says_what_to_do(floating):
    f = tf.function(lambda params, x: doubled(x * params))
    bounded = tf.function(lambda params, x: doubled(x * params, maximum_iterations=20))
    apply_fn, known = (tangents.from_model(function)[0] for function in (f, bounded))
    x, w = example(floating), np.asarray([0.9, 1.1, -0.7], floating)
    np.testing.assert_allclose(apply_fn(w, x), f(w, x), rtol=1e-5)
    forward = jax.jacfwd(apply_fn)(w, x)
    np.testing.assert_allclose(forward, jax.jacfwd(known)(w, x), rtol=1e-5, atol=1e-5)
    assert tangents.empirical_nngp_fn(f)(x, None, w).shape == (3, 3)
    with pytest.raises(NotImplementedError, match=r"loop .*while.*depends on data.*maximum_iter"):
        jax.grad(lambda w: apply_fn(w, x).sum())(w)
    for implementation in tangents.NtkImplementation:
        kernel_fn = tangents.empirical_ntk_fn(f, implementation=implementation)
        with pytest.raises(NotImplementedError, match=r"while.*depends on data.*maximum_iter"):
            kernel_fn(x, None, w)


def test_a_gradient_written_by_hand_warns(floating):
    @tf.custom_gradient
    def straight_through(x):
        return tf.round(x), lambda dy: dy

    f = tf.function(lambda params, x: straight_through(x * params))
    apply_fn, _ = tangents.from_model(f)
    with pytest.warns(UserWarning, match=r"gradient at IdentityN is written by hand"):
        apply_fn(np.ones(3, floating), example(floating))


FUNCTIONS = {
    "tf.abs": tf.abs,
    "tf.acosh": lambda x: tf.acosh(2 + x * x),
    "tf.asin": lambda x: tf.asin(tf.tanh(x)),
    "tf.asinh": tf.asinh,
    "tf.atan": tf.atan,
    "tf.atan2": lambda x: tf.atan2(x, 2 + x * x),
    "tf.atanh": lambda x: tf.atanh(tf.tanh(x) / 2),
    "tf.cumsum": lambda x: tf.cumsum(x, 1),
    "tf.cumprod": lambda x: tf.math.cumprod(x, 1) + tf.math.cumprod(x, 0, True, True),
    "tf.cumulative_logsumexp": lambda x: tf.math.cumulative_logsumexp(x, 1),
    "tf.digamma": lambda x: tf.math.digamma(1 + x * x),
    "tf.einsum": lambda x: tf.einsum("ij,kj->ik", x, x),
    "tf.erf": tf.math.erf,
    "tf.erfc": tf.math.erfc,
    "tf.gather": lambda x: tf.gather(x, [1, 0, 1], axis=1),
    "tf.lgamma": lambda x: tf.math.lgamma(1 + x * x),
    "tf.log1p": lambda x: tf.math.log1p(x * x),
    "tf.logsumexp": lambda x: tf.reduce_logsumexp(x, 1),
    "tf.maximum": lambda x: tf.maximum(x, 0.1),
    "tf.norm": lambda x: tf.norm(x, axis=1),
    "tf.one_hot": lambda x: x * tf.one_hot(tf.argmax(x, 1), 3, dtype=x.dtype),
    "tf.pad": lambda x: tf.pad(x, [[0, 0], [1, 1]], "REFLECT"),
    "tf.pow": lambda x: tf.pow(1 + tf.abs(x), 1.5),
    "tf.prod": lambda x: tf.reduce_prod(x, 1),
    "tf.reverse": lambda x: tf.reverse(x, [1]),
    "tf.roll": lambda x: tf.roll(x, 1, 1),
    "tf.sigmoid": tf.sigmoid,
    "tf.softsign": tf.nn.softsign,
    "tf.sort": lambda x: tf.sort(x, 1, direction="DESCENDING"),
    "tf.tan": tf.tan,
    "tf.tile": lambda x: tf.tile(x, [1, 2]),
    "tf.top_k": lambda x: tf.math.top_k(x, 2).values,
    "tf.unstack": lambda x: tf.stack(tf.unstack(x, axis=1)[::-1]),
    "tf.where": lambda x: tf.where(x > 0, x, tf.sinh(x)),
    "tf.map_fn": lambda x: tf.map_fn(lambda row: tf.sin(row), x),
    "tf.scan": lambda x: tf.scan(lambda a, row: tf.tanh(a + row), x),
    "tf.scatter": lambda x: tf.tensor_scatter_nd_add(x, [[0, 1], [1, 0]], x[0, :2]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_tensorflow(name, floating, x64):
    g = FUNCTIONS[name]
    f = tf.function(lambda params, x: g(x * params))
    x, w = example(floating), np.asarray([0.9, 1.1, -0.7], floating)
    apply_fn, _ = tangents.from_model(f)
    tolerance = 1e-8 if x64 else 2e-5
    variable = tf.Variable(w)
    y = f(variable, x)
    np.testing.assert_allclose(apply_fn(w, x), y, rtol=tolerance, atol=tolerance)
    cotangent = np.cos(np.arange(np.size(y))).reshape(y.shape).astype(floating)
    _, transpose = jax.vjp(lambda w: apply_fn(w, x), w)
    (theirs,) = gradient_tape.pullback(
        lambda x: f(variable, x), [variable], tf.constant(x), cotangent
    )
    np.testing.assert_allclose(transpose(cotangent)[0], theirs, rtol=tolerance, atol=tolerance)
