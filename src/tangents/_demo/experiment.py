"""What the demonstration computes: kernels, regressions with them, and the trained network."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import tangents
from tangents import predict, stax
from tangents._core.memory import chunks
from tangents._demo.digits import CLASSES, Digits, targets
from tangents._demo.measure import Meter

RIDGE = 1e-4
"""Regularisation of every regression, relative to the mean of the kernel's diagonal."""

BLOCK = 100
"""Examples in a tile of the empirical kernel."""


@dataclass(frozen=True)
class Size:
    """How much is computed."""

    train: int
    test: int
    width: int
    steps: int
    pooled: int
    """Training images for the infinite CNN with pooling, whose cost is pairs of pixels squared."""

    @property
    def subsets(self) -> list[int]:
        """Numbers of training images at which accuracy is measured."""
        return [n for n in (10, 20, 50, 100, 200, 400, 800) if n < self.train] + [self.train]


FULL = Size(train=600, test=300, width=32, steps=400, pooled=200)
QUICK = Size(train=120, test=80, width=8, steps=100, pooled=50)


@dataclass
class Row:
    """One line of the table: a way to predict, how well it does and what it takes."""

    name: str
    accuracy: float
    seconds: float
    peak: int
    curve: list[float]
    """Accuracy with each of the first `Size.subsets` training images; of some, not of all."""


@dataclass
class Outcome:
    """Everything the report shows."""

    size: Size
    seed: int
    digits: Digits
    rows: list[Row] = field(default_factory=list)
    kernel: Any = None
    """Empirical NTK of the convolutional network at initialisation, on the training images."""
    prediction: Any = None
    """Its predictions on the test images, shape (test, 10)."""


Progress = Callable[..., Any]
"""`progress(iterable, desc=...)`, such as `tqdm`."""


def run(size: Size, seed: int, digits: Digits, progress: Progress) -> Outcome:
    """All steps in order; each adds a row."""
    outcome = Outcome(size, seed, digits)
    init_fn, apply_fn, _ = network(size.width)
    _, params = init_fn(jax.random.key(seed), (-1, 8, 8, 1))

    with Meter() as meter:
        kernels = empirical_kernels(apply_fn, params, digits, progress, "NTK at initialisation")
    outcome.kernel = kernels[0]
    name = "Kernel regression, NTK of the CNN at initialisation"
    outcome.prediction = add_regression(outcome, name, kernels, meter)

    trained = add_training(outcome, apply_fn, params, progress)
    with Meter() as meter:
        kernels = empirical_kernels(apply_fn, trained, digits, progress, "NTK after training")
    add_regression(outcome, "Kernel regression, NTK of the CNN after training", kernels, meter)

    for title, layers, kind, train in infinite_networks(size):
        part = digits.first(train)
        with Meter() as meter:
            for _ in progress([kind], desc=f"{kind.upper()} of an {title}"):
                kernels = infinite_kernels(layers, part, kind)
        name = f"Kernel regression, {kind.upper()} of an {title}"
        if train < size.train:
            name += f" ({train} images)"
        add_regression(outcome, name, kernels, meter, train)
    return outcome


def infinite_networks(size: Size) -> list[tuple[str, Any, str, int]]:
    """Title, network, kernel and number of training images of each row of infinite width."""
    fully_connected = [stax.Flatten()]
    for _ in range(3):
        fully_connected += [stax.Dense(1, W_std=1.4, b_std=0.1), stax.Relu()]
    fully_connected = stax.serial(*fully_connected, stax.Dense(CLASSES, W_std=1.0, b_std=0.1))
    pooled = stax.serial(
        stax.Conv(1, (3, 3), strides=(2, 2), padding="SAME", W_std=1.4, b_std=0.1),
        stax.Relu(),
        stax.Conv(1, (3, 3), padding="SAME", W_std=1.4, b_std=0.1),
        stax.Relu(),
        stax.GlobalAvgPool(),
        stax.Dense(CLASSES, W_std=1.0, b_std=0.1),
    )
    return [
        ("infinite FCN", fully_connected, "nngp", size.train),
        ("infinite FCN", fully_connected, "ntk", size.train),
        ("infinite CNN", network(1), "ntk", size.train),
        ("infinite CNN with pooling", pooled, "ntk", size.pooled),
    ]


def network(width: int) -> Any:
    """A small convolutional network for 8 × 8 images."""
    return stax.serial(
        stax.Conv(width, (3, 3), padding="SAME", W_std=1.4, b_std=0.1),
        stax.Relu(),
        stax.Conv(width, (3, 3), strides=(2, 2), padding="SAME", W_std=1.4, b_std=0.1),
        stax.Relu(),
        stax.Conv(width, (3, 3), padding="SAME", W_std=1.4, b_std=0.1),
        stax.Relu(),
        stax.Flatten(),
        stax.Dense(CLASSES, W_std=1.0, b_std=0.1),
    )


def empirical_kernels(
    apply_fn: Any, params: Any, digits: Digits, progress: Progress, title: str
) -> tuple[np.ndarray, np.ndarray]:
    """Θ(train, train) and Θ(test, train), averaged over outputs, tile by tile."""
    ntk_fn = jax.jit(tangents.empirical_ntk_fn(apply_fn, vmap_axes=0))
    x_all = np.concatenate([digits.x_train, digits.x_test])
    train = len(digits.x_train)
    # Of the square over the training images only the tiles on and below the diagonal are computed.
    tiles = [
        (rows, columns)
        for rows in chunks(len(x_all), BLOCK)
        for columns in chunks(train, BLOCK)
        if rows.stop > columns.start
    ]
    kernel = np.zeros((len(x_all), train), np.float32)
    for rows, columns in progress(tiles, desc=title):
        kernel[rows, columns] = ntk_fn(x_all[rows], x_all[columns], params)
    lower = np.tril(kernel[:train])
    return lower + np.tril(lower, -1).T, kernel[train:]


def infinite_kernels(layers: Any, digits: Digits, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """K(train, train) and K(test, train) of an infinitely wide network."""
    kernel_fn = layers[2]
    train, test = jnp.asarray(digits.x_train), jnp.asarray(digits.x_test)
    return np.asarray(kernel_fn(train, None, kind)), np.asarray(kernel_fn(test, train, kind))


def regression(k_train: np.ndarray, y_train: np.ndarray, k_test: np.ndarray) -> np.ndarray:
    """Predictions at infinite time of gradient flow on the squared loss, with a small ridge."""
    fit = predict.gradient_descent_mse(jnp.asarray(k_train), jnp.asarray(y_train), diag_reg=RIDGE)
    return np.asarray(fit(None, None, 0.0, jnp.asarray(k_test)))


def add_regression(
    outcome: Outcome,
    name: str,
    kernels: tuple[np.ndarray, np.ndarray],
    made: Meter,
    most: int | None = None,
) -> np.ndarray:
    """Regress with a kernel on growing subsets of the training images; a row of the table."""
    digits, (k_train, k_test) = outcome.digits, kernels
    curve, prediction = [], np.zeros(0)
    with Meter() as meter:
        for n in outcome.size.subsets:
            if most is not None and n > most:
                break
            y = targets(digits.labels_train[:n])
            prediction = regression(k_train[:n, :n], y, k_test[:, :n])
            curve.append(accuracy(prediction, digits.labels_test))
    seconds = made.seconds + meter.seconds
    outcome.rows.append(Row(name, curve[-1], seconds, max(made.peak, meter.peak), curve))
    return prediction


def accuracy(prediction: np.ndarray, labels: np.ndarray) -> float:
    """Share of right answers."""
    return float(np.mean(prediction.argmax(-1) == labels))


def add_training(outcome: Outcome, apply_fn: Any, params: Any, progress: Progress) -> Any:
    """Train the network itself on each subset; a row of the table, and the last parameters."""
    digits, size = outcome.digits, outcome.size
    curve: list[float] = []
    trained = params
    train = make_trainer(apply_fn, size.steps, outcome.seed)
    predict_fn = jax.jit(apply_fn)
    with Meter() as meter:
        for n in progress(size.subsets, desc="Training the CNN"):
            trained = train(params, digits.x_train[:n], digits.labels_train[:n])
            logits = np.asarray(predict_fn(trained, digits.x_test))
            curve.append(accuracy(logits, digits.labels_test))
    row = Row("The CNN itself, trained with Adam", curve[-1], meter.seconds, meter.peak, curve)
    outcome.rows.append(row)
    return trained


def make_trainer(apply_fn: Any, steps: int, seed: int) -> Callable[..., Any]:
    """`train(params, x, labels)`: cross-entropy, Adam, batches of 50 drawn with replacement."""
    optimiser = optax.adam(2e-2)

    def loss(p: Any, batch: Any) -> Any:
        logits = apply_fn(p, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    @jax.jit
    def step(p: Any, state: Any, batch: Any) -> Any:
        updates, state = optimiser.update(jax.grad(loss)(p, batch), state)
        return optax.apply_updates(p, updates), state

    def train(params: Any, x: np.ndarray, labels: np.ndarray) -> Any:
        state = optimiser.init(params)
        for chosen in _batches(np.random.default_rng(seed), len(x), steps):
            params, state = step(params, state, (x[chosen], labels[chosen]))
        return jax.block_until_ready(params)

    return train


def _batches(draws: np.random.Generator, count: int, steps: int) -> Iterable[np.ndarray]:
    for _ in range(steps):
        yield draws.integers(0, count, 50)
