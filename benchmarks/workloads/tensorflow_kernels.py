"""Kernels of Keras models on TensorFlow tensors, against the Jacobian by `tf.GradientTape`.

The peer builds the full Jacobian inside `tf.function(jit_compile=True)` and contracts it, which is
what one writes without this package. `forward` is the kernel of the same network written in plain
JAX. The rows `first_call` are conversion, compilation and one run in a fresh process.
`make bench-tensorflow` runs these rows in an environment that has TensorFlow.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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
    """The same networks by hand; parameters in the tree that `from_model` gives."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    def convolve(layer, x, stride=1, padding="SAME"):
        numbers = ("NHWC", "HWIO", "NHWC")
        strides = (stride, stride)
        x = lax.conv_general_dilated(
            x, layer["kernel"], strides, padding, dimension_numbers=numbers
        )
        return x + layer["bias"]

    def layers(params):
        return jax.tree.leaves(params, is_leaf=lambda tree: "kernel" in tree)

    def dense(layer, x):
        return x @ layer["kernel"] + layer["bias"]

    def cnn(params, x):
        *convolutions, head = layers(params)
        for layer in convolutions:
            x = jax.nn.relu(convolve(layer, x))
        return dense(head, x.reshape(x.shape[0], -1))

    def mlp(params, x):
        *hidden, head = layers(params)
        for layer in hidden:
            x = jax.nn.relu(dense(layer, x))
        return dense(head, x)

    def normalise(layer, x):  # the statistics of a new model: mean 0, variance 1
        return x * (layer["gamma"] * (1 + 1.001e-5) ** -0.5) + layer["beta"]

    def block(params, name, x, stride, widens):
        def unit(i, x, stride=1):
            x = convolve(params[f"{name}_{i}_conv"], x, stride)
            return normalise(params[f"{name}_{i}_bn"], x)

        shortcut = unit(0, x, stride) if widens else x
        x = jax.nn.relu(unit(1, x, stride))
        return jax.nn.relu(shortcut + unit(3, jax.nn.relu(unit(2, x))))

    def resnet50(params, x):
        x = convolve(params["conv1_conv"], x, 2, [(3, 3), (3, 3)])
        x = jnp.pad(jax.nn.relu(normalise(params["conv1_bn"], x)), [(0, 0), (1, 1), (1, 1), (0, 0)])
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")
        for stage, blocks in enumerate((3, 4, 6, 3), start=2):
            for i in range(1, blocks + 1):
                stride = 2 if i == 1 and stage > 2 else 1
                x = block(params, f"conv{stage}_block{i}", x, stride, widens=i == 1)
        return dense(params["predictions"], x.mean((1, 2)))

    return {"cnn": cnn, "mlp": mlp, "resnet50": resnet50}[name]


def kernel(name: str):
    def build(side: Side) -> Case:
        import jax
        import jax.numpy as jnp

        from tangents.experimental import empirical_ntk_fn_tf, get_apply_fn_and_params

        model, x = keras_model(name, side)
        kernel_fn = empirical_ntk_fn_tf(model, vmap_axes=0)
        ntk_fn = jax.jit(side.nt.empirical_ntk_fn(plain_jax(name), vmap_axes=0))
        params = jax.tree.map(
            lambda leaf: jnp.asarray(leaf.numpy()), get_apply_fn_and_params(model)[1]
        )
        array = jnp.asarray(x.numpy())
        return Case(
            run=lambda: kernel_fn(x, None, model.trainable_variables).numpy(),
            forward=lambda: ntk_fn(array, None, params),
        )

    return build


FIRST_CALL = """
import time
import jax.numpy, tensorflow
from benchmarks.protocol import Side
from benchmarks.workloads.tensorflow_kernels import keras_model
from tangents.experimental import empirical_ntk_fn_tf
model, x = keras_model({name!r}, Side("tangents", {quick}))
jax.numpy.ones(3) + 1
wall, cpu = time.perf_counter(), time.process_time()
kernel_fn = empirical_ntk_fn_tf(model, vmap_axes=0, implementation={implementation!r})
kernel_fn(x, None, model.trainable_variables).numpy()
print(time.perf_counter() - wall, time.process_time() - cpu)
"""


def first_call(name: str, implementation: str):
    """Conversion, compilation and one run, in a process that has done nothing before."""

    def build(side: Side) -> Case:
        def measure() -> tuple[float, float]:
            program = FIRST_CALL.format(name=name, implementation=implementation, quick=side.quick)
            done = subprocess.run(
                [sys.executable, "-c", program],
                capture_output=True,
                text=True,
                check=True,
                cwd=Path(__file__).resolve().parents[2],
            )
            wall, cpu = done.stdout.split()[-2:]
            return float(wall), float(cpu)

        return Case(run=list, measure=measure)

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
        targets=IN_TENSORFLOW,
        requires=("tensorflow", "keras"),
        rtol=1e-3,
        memory=False,
    )
    for name in ("mlp", "cnn", "resnet50")
]
WORKLOADS += [
    Workload(
        f"tensorflow/first_call/{name}/{implementation.lower()}",
        first_call(name, implementation),
        peer=None,
        targets=(Target("wall_seconds", bound),),
        requires=("tensorflow", "keras"),
        memory=False,
    )
    for name, bound in (("mlp", 3.0), ("resnet50", 60.0))
    for implementation in (
        "AUTO",
        "JACOBIAN_CONTRACTION",
        "NTK_VECTOR_PRODUCTS",
        "STRUCTURED_DERIVATIVES",
    )
]
