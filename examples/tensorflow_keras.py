"""The kernel of a Keras model before and after training, without leaving TensorFlow.

Trains a small convolutional network to tell stripes apart and prints how far its
neural tangent kernel moved, and how well the linearised network predicts the trained one. Needs
`pip install "tangents[tensorflow]"`.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

from tangents.experimental import empirical_ntk_fn_tf, get_apply_fn_and_params, linearize_tf


def stripes(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy pictures of horizontal (0) and vertical (1) stripes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    wave = np.sin(np.arange(8) * 1.5 + rng.uniform(0, 6, (n, 1)))
    pictures = np.where(labels[:, None, None], wave[:, None, :], wave[:, :, None])
    pictures = pictures + 0.3 * rng.normal(size=(n, 8, 8))
    return pictures[..., None].astype("float32"), labels


def main():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(8, 3, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Conv2D(8, 3, activation="relu"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(2),
        ]
    )
    x, labels = stripes(64, 0)
    probe = tf.constant(stripes(8, 1)[0])
    _, before = get_apply_fn_and_params(model)
    kernel_fn = empirical_ntk_fn_tf(model, vmap_axes=0)
    first = kernel_fn(probe, None, before)
    linear = linearize_tf(model, before)

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.05), loss)
    for _ in range(20):  # in evaluation mode, as the kernel is
        with tf.GradientTape() as tape:
            value = loss(labels, model(x, training=False))
        gradients = tape.gradient(value, model.trainable_variables)
        model.optimizer.apply(gradients, model.trainable_variables)

    after = model.trainable_variables
    last = kernel_fn(probe, None, after)
    change = tf.norm(last - first) / tf.norm(first)
    moved = tf.nest.pack_sequence_as(before, [None] * len(after))
    for variable in after:
        branch = moved
        *parents, name = variable.path.split("/")
        for parent in parents:
            branch = branch[parent]
        branch[name] = tf.convert_to_tensor(variable)
    gap = tf.norm(linear(moved, probe) - model(probe, training=False))
    step = tf.norm(model(probe, training=False) - linear(before, probe))
    print(f"loss after training: {value:.3f}")
    print(f"the kernel moved by {100 * change:.0f} %")
    print(f"the linearised network misses {100 * gap / step:.0f} % of the change in outputs")


if __name__ == "__main__":
    main()
