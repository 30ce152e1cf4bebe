"""Handwritten digits: 1,797 real images of 8 × 8 pixels that come inside scikit-learn."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

CLASSES = 10


@dataclass(frozen=True)
class Digits:
    """Images (n, 8, 8, 1) of mean zero and unit variance, and labels (n,)."""

    x_train: np.ndarray
    labels_train: np.ndarray
    x_test: np.ndarray
    labels_test: np.ndarray

    @property
    def y_train(self) -> np.ndarray:
        """Regression targets: one-hot less 1/10, so that each row sums to zero."""
        return targets(self.labels_train)

    def first(self, train: int) -> Digits:
        """The same with the first training images only."""
        return replace(self, x_train=self.x_train[:train], labels_train=self.labels_train[:train])


def targets(labels: np.ndarray) -> np.ndarray:
    """One-hot labels less 1/10, float32."""
    return (np.eye(CLASSES)[labels] - 1 / CLASSES).astype(np.float32)


def load(train: int, test: int, seed: int) -> Digits:
    """A random split."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    x = images.reshape(-1, 8, 8, 1).astype(np.float32)
    chosen = order[: train + test]
    x, labels = x[chosen], labels[chosen]
    mean, scale = x[:train].mean(), x[:train].std()
    x = (x - mean) / scale
    return Digits(x[:train], labels[:train], x[train:], labels[train:])
