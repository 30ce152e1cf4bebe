"""Kernels of Keras models on TensorFlow tensors, against the Jacobian by `tf.GradientTape`.

The peer builds the full Jacobian inside `tf.function(jit_compile=True)` and contracts it, which is
what one writes without this package. `forward` is the kernel of the same network written in plain
JAX. `make bench-tensorflow` runs these rows in an environment that has TensorFlow.
"""

from __future__ import annotations

import os

from benchmarks.protocol import Case, Side, Target, Workload

IN_TENSORFLOW = (Target("speedup", 3.0), Target("over_forward", 1.3))


def keras_model(name: str, side: Side):
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    import keras
    import numpy as np
    import tensorflow as tf

    layers = keras.layers
    keras.utils.set_random_seed(0)
    if name == "resnet50":
        size = side.size(64, 32)
        shape, batch = (size, size, 3), side.size(4, 2)
        model = keras.applications.ResNet50(
            weights=None, input_shape=shape, classes=10, classifier_activation=None
        )
    elif name == "cnn":
        shape, batch = (side.size(16, 6), side.size(16, 6), 3), side.size(16, 2)
        width = side.size(32, 2)
        model = keras.Sequential(
            [
                keras.Input(shape),
                layers.Conv2D(width, 3, activation="relu", padding="same"),
                layers.Conv2D(width, 3, activation="relu", padding="same"),
                layers.Flatten(),
                layers.Dense(10),
            ]
        )
    else:
        shape, batch = (side.size(256, 5),), side.size(64, 3)
        width = side.size(512, 4)
        hidden = [layers.Dense(width, activation="relu") for _ in range(3)]
        model = keras.Sequential([keras.Input(shape), *hidden, layers.Dense(10)])
    x = np.random.default_rng(0).normal(size=(batch, *shape)).astype("float32")
    return model, tf.constant(x)


def plain_jax(name: str):
    """The same networks by hand; weights in the order of the Keras model."""
    import jax
    from jax import lax

    def cnn(params, x):
        k1, b1, k2, b2, w, b = params
        for kernel, bias in ((k1, b1), (k2, b2)):
            x = lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(x + bias)
        return x.reshape(x.shape[0], -1) @ w + b

    def mlp(params, x):
        *hidden, last = zip(params[::2], params[1::2], strict=True)
        for w, b in hidden:
            x = jax.nn.relu(x @ w + b)
        return x @ last[0] + last[1]

    return {"cnn": cnn, "mlp": mlp}[name]


def kernel(name: str):
    def build(side: Side) -> Case:
        import jax
        import jax.numpy as jnp

        from tangents.experimental import empirical_ntk_fn_tf

        model, x = keras_model(name, side)
        kernel_fn = empirical_ntk_fn_tf(model, vmap_axes=0)
        run = lambda: kernel_fn(x, None, model.trainable_variables).numpy()
        if name == "resnet50":
            return Case(run=run)
        ntk_fn = jax.jit(side.nt.empirical_ntk_fn(plain_jax(name), vmap_axes=0))
        params = [jnp.asarray(v.numpy()) for v in model.trainable_variables]
        array = jnp.asarray(x.numpy())
        return Case(run=run, forward=lambda: ntk_fn(array, None, params))

    return build


def tape(name: str):
    def build(side: Side) -> Case:
        import tensorflow as tf

        model, x = keras_model(name, side)

        @tf.function(jit_compile=True)
        def ntk(x):
            with tf.GradientTape() as tape:
                y = model(x, training=False)
            jacobians = tape.jacobian(y, model.trainable_variables)
            rows = [tf.reshape(j, (y.shape[0], -1)) for j in jacobians]
            return tf.add_n([tf.matmul(j, j, transpose_b=True) for j in rows]) / y.shape[1]

        return Case(run=lambda: ntk(x).numpy())

    return build


WORKLOADS = [
    Workload(
        f"tensorflow/kernel/{name}",
        kernel(name),
        peer="tensorflow",
        peer_build=tape(name),
        targets=IN_TENSORFLOW[:1] if name == "resnet50" else IN_TENSORFLOW,
        requires=("tensorflow", "keras"),
        rtol=1e-3,
        memory=False,
    )
    for name in ("mlp", "cnn", "resnet50")
]
