"""Analytic training dynamics against networks that are really trained, on digits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tangents import kernel_velocity, ntk_operator, predict

TIMES = np.array([5.0, 50.0, 400.0])


@pytest.fixture(scope="module")
def digits():
    sklearn = pytest.importorskip("sklearn.datasets")
    images, labels = sklearn.load_digits(return_X_y=True)
    x = jnp.asarray(images[:30] / np.linalg.norm(images[:30], axis=1, keepdims=True))
    y = jnp.asarray((labels[:30, None] % 2) - 0.5)
    dtype = jnp.result_type(float)
    return x[:20].astype(dtype), x[20:].astype(dtype), y[:20].astype(dtype)


def init(key, width):
    sizes = (64, width, width, 1)
    keys = jax.random.split(key, 3)
    return [
        jax.random.normal(k, (a, b)) for k, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def network(params, x):
    for i, w in enumerate(params):
        # Unit inputs: √2 keeps the size of the signal through the rectifiers.
        x = x @ w * np.sqrt(2.0 / (w.shape[0] if i else 1))
        x = jax.nn.relu(x) if i < 2 else x
    return x


def train(params, x, xt, y, rate, steps):
    """Plain gradient descent on ½ mean((f − y)²): outputs on both sets at the given steps, and the
    parameters after the last."""
    loss = lambda p: 0.5 * jnp.mean((network(p, x) - y) ** 2)

    @jax.jit
    def run(params, n):
        step = lambda _, p: jax.tree.map(lambda w, g: w - rate * g, p, jax.grad(loss)(p))
        return jax.lax.fori_loop(0, n, step, params)

    outputs, done = [], 0
    for n in steps:
        params = run(params, n - done)
        done = n
        outputs.append(jnp.concatenate([network(params, x), network(params, xt)]))
    return jnp.stack(outputs), params


def test_wide_networks_follow_gradient_flow(digits):
    x, xt, y = digits
    errors, turned = [], []
    for width in (32, 512):
        distance, turns = [], []
        for seed in range(2):
            params = init(jax.random.key(seed), width)
            operator = ntk_operator(network, params, jnp.concatenate([x, xt]))
            kernel = operator.materialise()
            k, k_td = kernel[:20, :20], kernel[20:, :20]
            # A small rate, so that steps of gradient descent are its flow.
            rate = 0.05 * float(predict.max_learning_rate(k))
            steps = [int(t) for t in TIMES]
            trained, final = train(params, x, xt, y, rate, steps)
            flow = predict.gradient_descent_mse(k, y, learning_rate=rate)
            predicted = flow(TIMES, network(params, x), network(params, xt), k_td)
            difference = trained - jnp.concatenate(predicted, axis=1)
            distance.append(jnp.sqrt(jnp.mean(difference**2)))
            after = ntk_operator(network, final, jnp.concatenate([x, xt])).materialise()
            turns.append(kernel_velocity([kernel, after], [0.0, TIMES[-1]])[0])
        errors.append(float(np.mean(distance)))
        turned.append(float(np.mean(turns)))
    # From width 32 to 512 the kernel's motion, and with it the error, falls by 1/√width at least.
    assert errors[1] < errors[0] / 2.5
    assert errors[1] < 0.1
    assert 0 < turned[1] < turned[0] / 4
