"""Kernels on TensorFlow tensors, eagerly, in `tf.function`, and under a tape."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
import tensorflow as tf

from frontends import gradient_tape
from tangents import NtkImplementation, experimental

L = keras.layers


@pytest.fixture(scope="module")
def model():
    """float64 in every run: the kernels keep TensorFlow's precision, whatever JAX's setting is."""
    keras.utils.set_random_seed(0)
    dense = lambda *args, **kwargs: L.Dense(*args, dtype="float64", **kwargs)
    layers = [dense(4, activation="relu"), dense(2)]
    return keras.Sequential([keras.Input((3,), dtype="float64"), *layers])


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    return tf.constant(rng.normal(size=(3, 3))), tf.constant(rng.normal(size=(4, 3)))


@pytest.fixture(scope="module")
def expected(model, inputs):
    return gradient_tape.ntk(model, model.trainable_variables, *inputs)


@pytest.mark.parametrize("implementation", list(NtkImplementation))
def test_kernel(model, inputs, expected, implementation):
    kernel_fn = experimental.empirical_ntk_fn_tf(model, implementation=implementation)
    kernel = kernel_fn(*inputs, model.trainable_variables)
    assert isinstance(kernel, tf.Tensor) and kernel.dtype == tf.float64
    np.testing.assert_allclose(kernel, expected, rtol=1e-8)


@pytest.mark.parametrize("implementation", ["AUTO", "STRUCTURED_DERIVATIVES"])
def test_more_outputs_than_features(inputs, implementation):
    """JAX takes a factorisation of the last layer there, which TensorFlow's runtime lacks."""
    keras.utils.set_random_seed(0)
    dense = lambda *args, **kwargs: L.Dense(*args, dtype="float64", **kwargs)
    layers = [dense(4, activation="relu"), dense(9)]
    wide = keras.Sequential([keras.Input((3,), dtype="float64"), *layers])
    kernel_fn = experimental.empirical_ntk_fn_tf(wide, vmap_axes=0, implementation=implementation)
    expected = gradient_tape.ntk(wide, wide.trainable_variables, *inputs)
    kernel = kernel_fn(*inputs, wide.trainable_variables)
    np.testing.assert_allclose(kernel, expected, rtol=1e-8)


def test_defaults_are_those_of_the_jax_function():
    import inspect

    import tangents

    ours = inspect.signature(experimental.empirical_ntk_fn_tf).parameters
    for name, parameter in inspect.signature(tangents.empirical_ntk_fn).parameters.items():
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            assert ours[name].default == parameter.default


@pytest.mark.parametrize(
    "route", [{"_j_rules": False}, {"_s_rules": False}, {"_fwd": True}, {"_fwd": False}]
)
def test_routes_of_structured_derivatives(model, inputs, expected, route):
    kernel_fn = experimental.empirical_ntk_fn_tf(
        model, implementation="STRUCTURED_DERIVATIVES", **route
    )
    kernel = kernel_fn(*inputs, model.trainable_variables)
    np.testing.assert_allclose(kernel, expected, rtol=1e-8)


def test_forms_of_parameters(model, inputs, expected):
    kernel_fn = experimental.empirical_ntk_fn_tf(model, vmap_axes=0)
    _, params = experimental.get_apply_fn_and_params(model)
    assert all(isinstance(leaf, tf.Tensor) for leaf in jax.tree.leaves(params))
    with jax.enable_x64(True):
        arrays = jax.tree.map(lambda leaf: jnp.asarray(leaf.numpy()), params)
    numpy = jax.tree.map(lambda leaf: leaf.numpy(), params)
    for given in (params, model.trainable_variables, numpy, arrays):
        np.testing.assert_allclose(kernel_fn(*inputs, given), expected, rtol=1e-8)


def test_parameters_carry_the_names(model):
    apply_fn, params = experimental.get_apply_fn_and_params(model)
    first = model.trainable_variables[0]
    leaf = params
    for name in first.path.split("/"):
        leaf = leaf[name]
    np.testing.assert_array_equal(leaf, first)
    x = np.ones((2, 3))
    np.testing.assert_allclose(apply_fn(params, x), model(x), rtol=1e-5)
    frozen = keras.Sequential([keras.Input((3,)), L.BatchNormalization(), L.Dropout(0.5)])
    sizes = [
        len(jax.tree.leaves(experimental.get_apply_fn_and_params(frozen, trainable_only=flag)[1]))
        for flag in (True, False)
    ]
    assert sizes == [2, 5]  # scale and shift; mean, variance and seed too


def test_inside_tf_function_with_x2_none(model, inputs, expected):
    kernel_fn = experimental.empirical_ntk_fn_tf(model)
    x1, _ = inputs
    theirs = gradient_tape.ntk(model, model.trainable_variables, x1, x1)

    @tf.function
    def twice(x):
        return 2.0 * kernel_fn(x, None, model.trainable_variables)

    np.testing.assert_allclose(twice(x1), 2 * theirs, rtol=1e-8)
    one = kernel_fn(x1=x1[:1], x2=None, params=model.trainable_variables)
    np.testing.assert_allclose(one, theirs[:1, :1], rtol=1e-8)
    assert kernel_fn.get_concrete_function(x1, None, [*model.trainable_variables]) is not None


def test_an_unknown_batch_size_says_what_to_do(model, inputs):
    kernel_fn = experimental.empirical_ntk_fn_tf(model)
    x1, _ = inputs
    signature = [tf.TensorSpec((None, 3), tf.float64)]
    unknown = tf.function(
        lambda x: kernel_fn(x, None, model.trainable_variables), input_signature=signature
    )
    with pytest.raises(ValueError, match=r"shape \(None, 3\).*tf.ensure_shape"):
        unknown(x1)
    known = tf.function(
        lambda x: kernel_fn(tf.ensure_shape(x, (3, 3)), None, model.trainable_variables),
        input_signature=signature,
    )
    assert known(x1).shape == (3, 3)


def test_a_tape_differentiates_the_kernel(model, inputs):
    kernel_fn = experimental.empirical_ntk_fn_tf(model, vmap_axes=0)
    x1, x2 = inputs
    with tf.GradientTape() as tape:
        tape.watch(x1)
        total = tf.reduce_sum(kernel_fn(x1, x2, model.trainable_variables))
    found = tape.gradient(total, [x1, *model.trainable_variables])
    step = 1e-6
    kernel = lambda x, params: tf.reduce_sum(kernel_fn(x, x2, params)).numpy()
    variables = [v.numpy() for v in model.trainable_variables]
    move = np.zeros((3, 3))
    move[1, 2] = step
    slope = (kernel(x1 + move, variables) - kernel(x1 - move, variables)) / (2 * step)
    np.testing.assert_allclose(found[0][1, 2], slope, rtol=1e-6)
    up, down = [v.copy() for v in variables], [v.copy() for v in variables]
    up[2][1, 0] += step
    down[2][1, 0] -= step
    slope = (kernel(x1, up) - kernel(x1, down)) / (2 * step)
    np.testing.assert_allclose(found[3][1, 0], slope, rtol=1e-6)


@pytest.mark.parametrize("inside", [False, True])
def test_two_tapes_take_the_second_derivative(model, inputs, inside):
    kernel_fn = experimental.empirical_ntk_fn_tf(model, vmap_axes=0)
    x1, x2 = inputs
    weights = model.trainable_variables

    def slopes(x):
        """The gradient of the kernel's sum of squares, in the input and in a weight."""
        with tf.GradientTape() as tape:
            tape.watch(x)
            total = tf.reduce_sum(kernel_fn(x, x2, weights) ** 2)
        return tape.gradient(total, [x, weights[2].value])

    def second(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            by_input, by_weight = slopes(x)
            total = tf.reduce_sum(tf.sin(by_input)) + tf.reduce_sum(tf.sin(by_weight))
        return tape.gradient(total, x)

    found = (tf.function(second) if inside else second)(x1)
    step = 1e-5
    move = np.zeros((3, 3))
    move[1, 2] = step
    totals = [
        sum(np.sin(slope).sum() for slope in slopes(tf.constant(x1 + sign * move)))
        for sign in (1, -1)
    ]
    np.testing.assert_allclose(found[1, 2], (totals[0] - totals[1]) / (2 * step), rtol=1e-6)


def test_tokens_and_several_outputs():
    """Inputs without a gradient, in a dictionary; a list of outputs gives a list of kernels."""
    floating = {"dtype": "float64"}
    tokens = keras.Input((4,), dtype="int32", name="tokens")
    x = keras.Input((3,), name="x", **floating)
    pooled = L.GlobalAveragePooling1D(**floating)(L.Embedding(5, 3, **floating)(tokens))
    product = L.Multiply(**floating)([pooled, x])
    outputs = [L.Dense(2, **floating)(product), L.Dense(1, **floating)(product)]
    model = keras.Model({"tokens": tokens, "x": x}, outputs)
    rng = np.random.default_rng(0)
    given = {
        "tokens": tf.constant(rng.integers(0, 5, size=(3, 4)), tf.int32),
        "x": tf.constant(rng.normal(size=(3, 3))),
    }
    weights = model.trainable_variables
    kernel_fn = experimental.empirical_ntk_fn_tf(model)
    with tf.GradientTape() as tape:
        kernels = kernel_fn(given, None, weights)
        total = tf.reduce_sum(kernels[0])
    assert [kernel.shape for kernel in kernels] == [(3, 3), (3, 3)]
    for i, kernel in enumerate(kernels):
        connected = [weights[0], *weights[1 + 2 * i : 3 + 2 * i]]
        theirs = gradient_tape.ntk(lambda x, i=i: model(x)[i], connected, given, given)
        np.testing.assert_allclose(kernel, theirs, rtol=1e-8)
    found = tape.gradient(total, weights)
    # The kernel is a sum of quadratic forms in table and kernel of the head, apart from the bias's.
    names = [variable.path.split("/")[-1] for variable in weights]
    moving = [n for n, g in zip(names, found, strict=True) if g is not None and np.any(g)]
    assert moving == ["embeddings", "kernel"]
    twice = [2 * v if g is not None else v for v, g in zip(weights, found, strict=True)]
    slope = sum(tf.reduce_sum(g * v) for g, v in zip(found, weights, strict=True) if g is not None)
    bias = 9.0
    np.testing.assert_allclose(
        tf.reduce_sum(kernel_fn(given, None, twice)[0]) - bias, 4 * (total - bias), rtol=1e-8
    )
    np.testing.assert_allclose(slope, 2 * (total - bias), rtol=1e-8)


def test_options_of_the_jax_function(model, inputs, expected):
    kernel_fn = experimental.empirical_ntk_fn_tf(model, memory="1MiB", precision="highest")
    np.testing.assert_allclose(kernel_fn(*inputs, model.trainable_variables), expected, rtol=1e-8)
    tiny = experimental.empirical_ntk_fn_tf(model, memory=1)
    with pytest.raises(ValueError, match=r"memory"):
        tiny(*inputs, model.trainable_variables)


def test_a_model_that_is_not_built_takes_an_example(inputs):
    class Late(keras.Model):
        def __init__(self):
            super().__init__()
            self.head = L.Dense(2, dtype="float64")

        def call(self, x):
            return self.head(x)

    x1, x2 = inputs
    with pytest.raises(ValueError, match=r"not built.*example_input="):
        experimental.empirical_ntk_fn_tf(Late())
    model = Late()
    kernel_fn = experimental.empirical_ntk_fn_tf(model, example_input=x1)
    kernel = kernel_fn(x1, x2, model.trainable_variables)
    np.testing.assert_allclose(kernel, np.asarray(x1) @ np.asarray(x2).T + 1, rtol=1e-8)


def test_nngp_and_both(model, inputs, expected):
    x1, x2 = inputs
    params = model.trainable_variables
    gram = np.asarray(model(x1)) @ np.asarray(model(x2)).T / 2
    np.testing.assert_allclose(
        experimental.empirical_nngp_fn_tf(model)(x1, x2, params), gram, rtol=1e-8
    )
    both = experimental.empirical_kernel_fn_tf(model)(x1, x2, ("nngp", "ntk"), params)
    np.testing.assert_allclose(both.nngp, gram, rtol=1e-8)
    np.testing.assert_allclose(both.ntk, expected, rtol=1e-8)


def test_vector_products(model, inputs):
    x1, x2 = inputs
    params = model.trainable_variables
    full = experimental.empirical_ntk_fn_tf(model, trace_axes=())(x1, x2, params)
    vector = tf.constant(np.random.default_rng(1).normal(size=(4, 2)))
    product = experimental.empirical_ntk_vp_fn_tf(model, x1, x2, params)(vector)
    np.testing.assert_allclose(product, tf.einsum("nmij,mj->ni", full, vector), rtol=1e-8)


def test_expansions(model, inputs):
    x, _ = inputs
    _, params = experimental.get_apply_fn_and_params(model)
    linear = experimental.linearize_tf(model, params)
    np.testing.assert_allclose(linear(params, x), model(x), rtol=1e-8)
    moved = jax.tree.map(lambda leaf: leaf + 0.01, params)
    step = sum(
        j @ np.full(j.shape[-1], 0.01)
        for j in gradient_tape.jacobian(model, model.trainable_variables, x)
    )
    np.testing.assert_allclose(linear(moved, x), model(x) + step, rtol=1e-8)
    constant = experimental.taylor_expand_tf(model, params, 0)
    np.testing.assert_allclose(constant(moved, x), model(x), rtol=1e-8)


def test_a_torch_backend_is_named(model, monkeypatch):
    monkeypatch.setattr(keras.config, "backend", lambda: "torch")
    with pytest.raises(NotImplementedError, match=r"torch backend.*KERAS_BACKEND"):
        experimental.empirical_ntk_fn_tf(model)
