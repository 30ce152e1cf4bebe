"""Keras models against the Jacobian of `tf.GradientTape`."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
import tensorflow as tf

import tangents
from frontends import gradient_tape

L = keras.layers


@pytest.fixture(autouse=True)
def precision(floating):
    keras.config.set_dtype_policy(floating)
    keras.config.set_floatx(floating)
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy("float32")
    keras.config.set_floatx("float32")


def sequence(*layers, shape=(4, 3)):
    return keras.Sequential([keras.Input(shape), *layers, L.Dense(2)])


def randomise(model):
    """Weights that are not at their special initial values: statistics, biases, scales."""
    rng = np.random.default_rng(1)
    for variable in model.variables:
        if "seed" not in variable.path:
            value = np.asarray(variable.numpy())
            noise = rng.normal(size=value.shape) * 0.1
            variable.assign(value + (np.abs(noise) if "variance" in variable.path else noise))
    return model


def transformer():
    tokens = keras.Input((4,), dtype="int32")
    x = L.Embedding(7, 6)(tokens)
    x = L.LayerNormalization()(x + L.MultiHeadAttention(2, 3)(x, x, use_causal_mask=True))
    x = L.LayerNormalization()(x + L.Dense(6)(L.Dense(8, activation="gelu")(x)))
    return keras.Model(tokens, L.Dense(2)(L.GlobalAveragePooling1D()(x)))


def shared():
    """One layer used twice, one frozen."""
    x = keras.Input((4,))
    layer, frozen = L.Dense(4, activation="tanh"), L.Dense(4, trainable=False)
    return keras.Model(x, L.Dense(2)(frozen(layer(layer(x)))))


class Reversed(keras.layers.Layer):
    """Logits by the transposed weight of another layer."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding = embedding

    def call(self, x):
        return keras.ops.matmul(x, keras.ops.transpose(self.embedding.embeddings))


def tied():
    tokens = keras.Input((4,), dtype="int32")
    embedding = L.Embedding(7, 6)
    hidden = L.Dense(6, activation="tanh")(L.GlobalAveragePooling1D()(embedding(tokens)))
    return keras.Model(tokens, Reversed(embedding)(hidden))


class Scale(keras.layers.Layer):
    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")
        self.shift = self.add_weight(shape=(), initializer="zeros", trainable=False, name="shift")

    def call(self, x):
        return x * self.scale + self.shift


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.inner = [L.Dense(4, activation="swish"), Scale()]
        self.dropout = L.Dropout(0.5)
        self.head = L.Dense(2)

    def call(self, x, training=False):
        for layer in self.inner:
            x = layer(x)
        return self.head(self.dropout(x, training=training))


def subclassed():
    model = Subclassed()
    model(np.ones((1, 3)))
    return model


def cnn():
    return sequence(
        L.Conv2D(4, 3, padding="same", strides=2),
        L.BatchNormalization(),
        L.ReLU(),
        L.Dropout(0.5),
        L.MaxPooling2D(2, padding="same"),
        L.DepthwiseConv2D(2),
        L.LeakyReLU(),
        L.Flatten(),
        shape=(7, 6, 3),
    )


activations = [
    "relu",
    "gelu",
    "softplus",
    "selu",
    "elu",
    "swish",
    "softmax",
    "log_softmax",
    "relu6",
]
MODELS = {
    "mlp": lambda: sequence(*(L.Dense(3, activation=a) for a in activations), shape=(3,)),
    "cnn": cnn,
    "average pooling": lambda: sequence(
        L.Conv1D(3, 2), L.AveragePooling1D(2, padding="same"), L.GlobalMaxPooling1D()
    ),
    "group norm": lambda: sequence(L.Dense(4), L.GroupNormalization(2), L.Flatten()),
    "transposed": lambda: sequence(
        L.Conv2DTranspose(2, 3, strides=2), L.UpSampling2D(2), L.Flatten(), shape=(2, 2, 1)
    ),
    "separable": lambda: sequence(
        L.SeparableConv2D(3, 2), L.GlobalAveragePooling2D(), shape=(4, 4, 2)
    ),
    "lstm": lambda: sequence(L.LSTM(3)),
    "gru": lambda: sequence(L.GRU(3, go_backwards=True, return_sequences=True), L.Flatten()),
    "bidirectional": lambda: sequence(
        L.Bidirectional(L.LSTM(2, return_sequences=True)), L.GRU(3, reset_after=False)
    ),
    "masking": lambda: sequence(L.Masking(), L.LSTM(3), shape=(4, 3)),
    "unrolled": lambda: sequence(L.SimpleRNN(3, unroll=True)),
    "time distributed": lambda: sequence(L.TimeDistributed(L.Dense(3)), L.Flatten()),
    "transformer": transformer,
    "shared": shared,
    "tied": tied,
    "subclassed": subclassed,
}


def inputs(model, floating, batch=2):
    known = getattr(model, "inputs", None)
    shape = (batch, *(known[0].shape[1:] if known else (3,)))
    rng = np.random.default_rng(0)
    if known and "int" in known[0].dtype:
        return rng.integers(0, 7, size=shape).astype("int32")
    x = rng.normal(size=shape).astype(floating)
    if any(isinstance(layer, L.Masking) for layer in model.layers):
        x[0, 2:] = 0.0
    return x


def in_order(model, tree):
    """Leaves of a tree like `params` in the order of the model's trainable variables."""
    leaves = []
    for variable in model.trainable_variables:
        leaf = tree
        for name in variable.path.split("/"):
            leaf = leaf[name]
        leaves.append(leaf)
    return leaves


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_jacobian(name, floating, x64):
    model = randomise(MODELS[name]())
    x = inputs(model, floating)
    apply_fn, params = tangents.from_model(model)
    tolerance = 1e-8 if x64 else 1e-5
    f = lambda x: model(x, training=False)
    np.testing.assert_allclose(apply_fn(params, x), f(x), rtol=tolerance, atol=tolerance)
    ours = in_order(model, jax.jit(jax.jacrev(apply_fn))(params, x))
    theirs = gradient_tape.jacobian(f, model.trainable_variables, tf.constant(x))
    scale = max(np.abs(j).max() for j in theirs)
    for a, b, variable in zip(ours, theirs, model.trainable_variables, strict=True):
        np.testing.assert_allclose(
            np.reshape(a, b.shape), b, rtol=tolerance, atol=tolerance * scale, err_msg=variable.path
        )


@pytest.mark.parametrize("name", ["lstm", "bidirectional", "masking"])
def test_loops_become_scans(name, floating):
    model = MODELS[name]()
    apply_fn, params = tangents.from_model(model)
    text = str(jax.make_jaxpr(apply_fn)(params, inputs(model, floating)))
    assert "scan[" in text and "while[" not in text
    assert "dynamic_slice" not in text


def test_activations_at_zero(floating):
    """Where an expansion would divide by zero, or share a tie, the derivative is TensorFlow's."""
    for activation in activations:
        model = keras.Sequential([keras.Input((3,)), L.Dense(3, activation=activation)])
        x = np.zeros((1, 3), floating)
        apply_fn, params = tangents.from_model(model)
        theirs = gradient_tape.jacobian(model, model.trainable_variables, tf.constant(x))
        for a, b in zip(in_order(model, jax.jacrev(apply_fn)(params, x)), theirs, strict=True):
            np.testing.assert_allclose(np.reshape(a, b.shape), b, atol=1e-6, err_msg=activation)


def test_only_trainable_variables_are_parameters(floating):
    model = shared()
    _, params = tangents.from_model(model)
    frozen = [v.path.split("/")[0] for v in model.non_trainable_variables]
    assert len(jax.tree.leaves(params)) == len(model.trainable_variables) == 4
    assert not set(frozen) & set(params)
    _, everything = tangents.from_model(model, trainable=lambda path: True)
    assert len(jax.tree.leaves(everything)) == len(model.variables) == 6
    head = model.layers[-1].name
    _, chosen = tangents.from_model(model, trainable=[head])
    assert set(chosen) == {head}
    model = tied()  # the weight of two layers, once
    _, params = tangents.from_model(model)
    assert len(jax.tree.leaves(params)) == len(model.trainable_variables) == 3


def test_state_is_closed_over(floating):
    model = randomise(keras.Sequential([keras.Input((3,)), L.BatchNormalization()]))
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(floating)
    apply_fn, params = tangents.from_model(model)
    before = np.asarray(model(x, training=False))
    model.layers[0].moving_mean.assign(np.full(3, 100.0))
    np.testing.assert_allclose(apply_fn(params, x), before, rtol=1e-5)


def test_a_model_stands_in_for_a_function(floating, x64):
    model = sequence(L.Dense(4, activation="relu"), shape=(3,))
    x = inputs(model, floating, 3)
    apply_fn, params = tangents.from_model(model)
    tolerance = 1e-8 if x64 else 1e-4
    theirs = gradient_tape.ntk(model, model.trainable_variables, x, x)
    for f, p in [(model, params), (apply_fn, params), (model, model.trainable_variables)]:
        kernel = tangents.empirical_ntk_fn(f)(x, None, p)
        np.testing.assert_allclose(kernel, theirs, rtol=tolerance)
    operator = tangents.ntk_operator(model, params, tf.constant(x))
    expected = tangents.ntk_operator(apply_fn, params, x).materialise()
    np.testing.assert_allclose(operator.materialise(), expected, rtol=tolerance)
    moved = jax.tree.map(lambda p: p + 0.1, params)
    np.testing.assert_allclose(
        tangents.linearize(model, params)(moved, x),
        tangents.linearize(apply_fn, params)(moved, x),
        rtol=tolerance,
    )
    np.testing.assert_allclose(
        tangents.taylor_expand(model, params, 2)(moved, x),
        tangents.taylor_expand(apply_fn, params, 2)(moved, x),
        rtol=tolerance,
    )
    gram = np.asarray(model(x)) @ np.asarray(model(x)).T / 2
    np.testing.assert_allclose(
        tangents.empirical_nngp_fn(model)(x, None, params), gram, rtol=tolerance
    )
    both = tangents.empirical_kernel_fn(model)(x, None, None, params)
    np.testing.assert_allclose(both.nngp, gram, rtol=tolerance)
    np.testing.assert_allclose(both.ntk, theirs, rtol=tolerance)
    vector = np.linspace(-1, 1, 6, dtype=floating).reshape(3, 2)
    np.testing.assert_allclose(
        tangents.empirical_ntk_vp_fn(model, x, None, params)(vector),
        (operator @ jnp.asarray(vector)),
        rtol=tolerance,
    )


def test_examples_may_interact(floating, x64):
    """The model is converted at the batch size asked for, so nothing is assumed about examples."""

    class Centred(keras.layers.Layer):
        def call(self, x):
            return x - keras.ops.mean(x, axis=0, keepdims=True)

    model = sequence(L.Dense(3, activation="tanh"), Centred(), shape=(3,))
    x = inputs(model, floating, 3)
    apply_fn, params = tangents.from_model(model)
    np.testing.assert_allclose(apply_fn(params, x), model(x), rtol=1e-5, atol=1e-6)


def test_a_model_that_is_not_built(floating):
    with pytest.raises(ValueError, match=r"not built.*Pass example_input="):
        tangents.from_model(Subclassed())
    model = Subclassed()
    apply_fn, params = tangents.from_model(model, np.ones((2, 3), floating))
    np.testing.assert_allclose(
        apply_fn(params, np.ones((4, 3), floating)), model(np.ones((4, 3))), rtol=1e-5
    )


def test_an_operation_that_cannot_be_converted_is_named(floating):
    class Strings(keras.layers.Layer):
        def call(self, x):
            return x + tf.cast(tf.strings.length(tf.strings.as_string(x)), x.dtype)

    model = sequence(Strings(name="strings"), shape=(3,))
    apply_fn, params = tangents.from_model(model)
    with pytest.raises(NotImplementedError, match=r"strings.*(AsString|StringLength)"):
        apply_fn(params, np.ones((2, 3), floating))


def test_keras_on_jax_needs_no_tensorflow():
    code = """
import sys, keras, numpy as np, jax, tangents
model = keras.Sequential([keras.Input((3, 2)), keras.layers.LSTM(2), keras.layers.Dropout(0.5)])
apply_fn, params = tangents.from_model(model)
x = np.ones((2, 3, 2), "float32")
np.testing.assert_allclose(apply_fn(params, x), model(x), rtol=1e-6)
assert tangents.empirical_ntk_fn(model)(x, None, model.trainable_variables).shape == (2, 2)
assert len(jax.tree.leaves(params)) == 3 and "tensorflow" not in sys.modules
"""
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_several_inputs_and_outputs(floating, x64):
    a, b = keras.Input((3,), name="a"), keras.Input((2,), name="b")
    joined = L.Concatenate()([a, b])
    model = keras.Model({"a": a, "b": b}, [L.Dense(2)(joined), L.Dense(1)(a)])
    x = {"a": np.ones((2, 3), floating), "b": np.full((2, 2), 2.0, floating)}
    apply_fn, params = tangents.from_model(model)
    for ours, theirs in zip(apply_fn(params, x), model(x), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    kernels = tangents.empirical_ntk_fn(apply_fn)(x, None, params)
    assert [k.shape for k in kernels] == [(2, 2), (2, 2)]
    # Each dense layer's kernel is the Gram matrix of its inputs with a one for the bias.
    np.testing.assert_allclose(kernels[0], jnp.full((2, 2), 3.0 + 8.0 + 1.0), rtol=1e-5)


ARCHITECTURES = {
    "ResNet50": keras.applications.ResNet50,
    "MobileNetV2": keras.applications.MobileNetV2,
    "EfficientNetB0": keras.applications.EfficientNetB0,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_published_architectures(name, floating, x64):
    """Row by row of the Jacobian; the norm of each variable's error against that of its block."""
    make = ARCHITECTURES[name]
    model = make(weights=None, input_shape=(32, 32, 3), classes=3, classifier_activation=None)
    x = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(floating)
    with tf.GradientTape(persistent=True) as tape:
        theirs = model(x, training=False)
        entries = tf.unstack(tf.reshape(theirs, [-1]))
    apply_fn, params = tangents.from_model(model)
    outputs, transpose = jax.vjp(lambda p: apply_fn(p, x), params)
    tolerance = 1e-8 if x64 else 1e-5
    assert np.linalg.norm(outputs - theirs) <= tolerance * np.linalg.norm(theirs)
    errors, norms = [], []
    for entry, unit in zip(entries, jnp.eye(len(entries), dtype=floating), strict=True):
        ours = in_order(model, transpose(unit.reshape(outputs.shape))[0])
        rows = tape.gradient(entry, model.trainable_variables, unconnected_gradients="zero")
        rows = [np.asarray(tf.convert_to_tensor(row)) for row in rows]
        errors.append([np.linalg.norm(a - b) for a, b in zip(ours, rows, strict=True)])
        norms.append([np.linalg.norm(b) for b in rows])
    errors, norms = (np.linalg.norm(entries, axis=0) for entries in (errors, norms))
    for error, norm, variable in zip(errors, norms, model.trainable_variables, strict=True):
        assert error <= tolerance * norm, f"{variable.path}: {error} of {norm}"
