"""Pictures of the report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no window system is needed, and none is touched
import matplotlib.pyplot as plt

from tangents import plot
from tangents._demo.experiment import Outcome


def kernel_matrix(outcome: Outcome) -> Any:
    """The empirical NTK between training images ordered by class, as correlations."""
    labels = np.sort(outcome.digits.labels_train)
    norms = np.sqrt(np.diag(outcome.kernel))
    figure, ax = plt.subplots(figsize=(5.6, 4.8))
    plot.kernel_matrix(
        outcome.kernel / norms / norms[:, None], outcome.digits.labels_train, ax=ax, cmap="viridis"
    )
    middles = [np.mean(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    ax.set_xticks(middles, np.unique(labels))
    ax.set_yticks(middles, np.unique(labels))
    ax.set(
        xlabel="training images, ordered by digit",
        ylabel="",
        title="Θ(x, x′) / √(Θ(x, x) Θ(x′, x′))",
    )
    return figure


def spectrum(outcome: Outcome) -> Any:
    """Eigenvalues of the empirical NTK on the training images."""
    figure, ax = plt.subplots(figsize=(5.6, 4.2))
    plot.spectrum(outcome.kernel, ax=ax)
    ax.set_ylabel("eigenvalue of Θ(train, train)")
    ax.grid(alpha=0.3)
    return figure


def learning_curves(outcome: Outcome) -> Any:
    """Accuracy against the number of training images."""
    sizes = outcome.size.subsets
    figure, ax = plt.subplots(figsize=(6.4, 4.2))
    curves = {r.name: r.curve + [np.nan] * (len(sizes) - len(r.curve)) for r in outcome.rows}
    plot.learning_curves(sizes, curves, ax=ax, markersize=4)
    ax.set_yscale("linear")
    ax.set_xticks(sizes, [str(n) for n in sizes])
    ax.minorticks_off()
    ax.set(xlabel="training images", ylabel=f"accuracy on {outcome.size.test} test images")
    ax.legend(fontsize=7)
    ax.grid(alpha=0.3)
    return figure


def least_sure(outcome: Outcome) -> Any:
    """The eight test images with the smallest margin between the two best answers."""
    best = np.sort(outcome.prediction, -1)
    chosen = np.argsort(best[:, -1] - best[:, -2])[:8]
    answers = np.argsort(-outcome.prediction, -1)
    figure, axes = plt.subplots(2, 4, figsize=(6.4, 3.8))
    for ax, i in zip(axes.flat, chosen, strict=True):
        truth, first, second = outcome.digits.labels_test[i], *answers[i, :2]
        ax.imshow(outcome.digits.x_test[i, :, :, 0], cmap="gray_r")
        ax.set_title(f"{first} or {second}? It is {truth}", fontsize=9)
        ax.set_axis_off()
    return figure


FIGURES: dict[str, tuple[str, Callable[[Outcome], Any]]] = {
    "kernel": ("The NTK of the network at initialisation, ordered by class", kernel_matrix),
    "spectrum": ("Its spectrum", spectrum),
    "learning_curves": ("Accuracy against the number of training images", learning_curves),
    "least_sure": ("The eight test images the kernel is least sure of", least_sure),
}


def draw(outcome: Outcome, name: str, path: Any) -> None:
    """Draw one picture into a PNG file."""
    with plt.rc_context({"font.size": 9, "figure.constrained_layout.use": True}):
        figure = FIGURES[name][1](outcome)
        figure.savefig(path, dpi=130)
        plt.close(figure)
