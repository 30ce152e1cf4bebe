"""Pictures of kernels, spectra and predictions, with matplotlib: `pip install 'tangents[plot]'`.

Each function draws on the `ax` it is given, or on a new one, and returns it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tangents._inference.spectrum import as_spectrum

__all__ = [
    "kernel_matrix",
    "learning_curves",
    "predictive_bands",
    "spectrum",
    "training_dynamics",
]


def _axes(ax: Any) -> Any:
    if ax is not None:
        return ax
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("tangents.plot needs matplotlib: pip install 'tangents[plot]'.") from None
    # A figure of its own, not pyplot's: nothing is shown or kept behind the user's back.
    return Figure(layout="constrained").add_subplot()


def kernel_matrix(kernel: Any, labels: Any = None, *, ax: Any = None, **imshow: Any) -> Any:
    """A kernel as an image, its examples ordered by label, with lines between the classes.

    Args:
        kernel: (n, n).
        labels: (n,), or None for the order given.
        ax: matplotlib axes, or None for new ones.
        **imshow: of `ax.imshow`.

    Returns:
        The axes.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import plot
        >>> ax = plot.kernel_matrix(jnp.eye(4), labels=[0, 1, 0, 1])
    """
    ax, k = _axes(ax), np.asarray(kernel)
    if labels is not None:
        labels = np.asarray(labels)
        if k.ndim != 2 or labels.shape != (k.shape[0],) or k.shape[0] != k.shape[1]:
            raise ValueError(
                f"plot.kernel_matrix: kernel {k.shape} and labels {labels.shape}: pass (n, n), "
                f"(n,)."
            )
        order = np.argsort(labels, kind="stable")
        k = k[np.ix_(order, order)]
        for edge in np.flatnonzero(np.diff(labels[order])):
            ax.axhline(edge + 0.5, color="white", linewidth=0.5)
            ax.axvline(edge + 0.5, color="white", linewidth=0.5)
    image = ax.imshow(k, **imshow)
    ax.figure.colorbar(image, ax=ax)
    ax.set(xlabel="example", ylabel="example")
    return ax


def spectrum(kernel: Any, *, ridge: float | None = None, ax: Any = None, **line: Any) -> Any:
    """Eigenvalues by rank on logarithmic axes, with error bounds where they are known.

    Args:
        kernel: a matrix, or a `tangents.Spectrum`.
        ridge: marked by a horizontal line.
        ax: matplotlib axes, or None for new ones.
        **line: of `ax.errorbar`.

    Returns:
        The axes.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import plot
        >>> ax = plot.spectrum(jnp.diag(jnp.array([3., 2., 1.])), ridge=0.1)
    """
    ax, s = _axes(ax), as_spectrum(kernel)
    values, bounds = np.asarray(s.eigenvalues), np.asarray(s.error_bounds)
    shown = values > 0
    rank = np.arange(1, len(values) + 1)
    # On a logarithmic axis a bound may not reach zero.
    below = np.minimum(bounds, 0.9 * np.abs(values))[shown]
    ax.errorbar(
        rank[shown],
        values[shown],
        yerr=np.stack([below, bounds[shown]]),
        **{"marker": ".", "linewidth": 1, **line},
    )
    if ridge is not None:
        ax.axhline(ridge, color="grey", linestyle="--", linewidth=1)
    ax.set(xscale="log", yscale="log", xlabel="rank", ylabel="eigenvalue")
    return ax


def learning_curves(
    sizes: Any, errors: Mapping[str, Any] | Any, *, ax: Any = None, **line: Any
) -> Any:
    """Error against the number of training examples, on logarithmic axes.

    Args:
        sizes: (s,).
        errors: (s,), or (s, repetitions), drawn as a mean with its range; or a dictionary of these.
        ax: matplotlib axes, or None for new ones.
        **line: of `ax.plot`.

    Returns:
        The axes.

    Examples:
        >>> from tangents import plot
        >>> ax = plot.learning_curves([10, 100], {"ntk": [0.5, 0.1], "nngp": [0.6, 0.2]})
    """
    ax, sizes = _axes(ax), np.asarray(sizes)
    named = errors if isinstance(errors, Mapping) else {"": errors}
    for name, values in named.items():
        values = np.asarray(values)
        if values.shape[:1] != sizes.shape:
            raise ValueError(
                f"plot.learning_curves: {len(sizes)} sizes, but errors of shape {values.shape}."
            )
        mean = values if values.ndim == 1 else values.mean(axis=1)
        (drawn,) = ax.plot(sizes, mean, **{"marker": "o", "label": name or None, **line})
        if values.ndim == 2:
            low, high = values.min(axis=1), values.max(axis=1)
            ax.fill_between(sizes, low, high, alpha=0.2, color=drawn.get_color())
    ax.set(xscale="log", yscale="log", xlabel="training examples", ylabel="error")
    if any(named):
        ax.legend()
    return ax


def predictive_bands(
    x: Any,
    mean: Any,
    variance: Any,
    *,
    train: tuple[Any, Any] | None = None,
    deviations: Sequence[float] = (1, 2),
    ax: Any = None,
    **line: Any,
) -> Any:
    """A mean with bands of standard deviations over a one-dimensional input.

    Args:
        x: (m,) or (m, 1), in any order.
        mean: (m,) or (m, 1).
        variance: (m,), or a covariance (m, m), of which the diagonal is taken.
        train: (x_train, y_train), drawn as points.
        deviations: half widths of the bands.
        ax: matplotlib axes, or None for new ones.
        **line: of `ax.plot`.

    Returns:
        The axes.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import plot
        >>> x = jnp.linspace(-1, 1, 5)
        >>> ax = plot.predictive_bands(x, x**2, jnp.ones(5), train=([0.0], [0.0]))
    """
    ax = _axes(ax)
    x, mean, variance = (
        np.asarray(x).reshape(-1),
        np.asarray(mean).reshape(-1),
        np.asarray(variance),
    )
    if variance.ndim == 2 and variance.shape[0] == variance.shape[1] == len(x) > 1:
        variance = np.diagonal(variance)
    variance = variance.reshape(-1)
    if not len(x) == len(mean) == len(variance):
        raise ValueError(
            f"plot.predictive_bands: {len(x)} inputs, {len(mean)} means, {len(variance)} variances."
        )
    order = np.argsort(x)
    x, mean, sigma = x[order], mean[order], np.sqrt(np.maximum(variance[order], 0))
    (drawn,) = ax.plot(x, mean, **line)
    for width in deviations:
        ax.fill_between(
            x, mean - width * sigma, mean + width * sigma, alpha=0.2, color=drawn.get_color()
        )
    if train is not None:
        ax.plot(np.ravel(train[0]), np.ravel(train[1]), "k.", label="training data")
    ax.set(xlabel="x", ylabel="f(x)")
    return ax


def training_dynamics(
    times: Any,
    predicted: Any,
    measured: Any = None,
    *,
    measured_times: Any = None,
    ax: Any = None,
    **line: Any,
) -> Any:
    """Outputs or losses during training: the prediction as lines, the real network as points.

    Args:
        times: (t,).
        predicted: (t, ...), one line for each entry.
        measured: (t, ...) of a trained network, or None.
        measured_times: times of `measured`, if they differ.
        ax: matplotlib axes, or None for new ones.
        **line: of `ax.plot`.

    Returns:
        The axes.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import plot
        >>> t = jnp.array([0., 1., 2.])
        >>> ax = plot.training_dynamics(t, jnp.exp(-t), measured=jnp.exp(-t))
    """
    ax, times = _axes(ax), np.asarray(times)
    lines = np.asarray(predicted).reshape(len(times), -1)
    drawn = ax.plot(times, lines, **line)
    if measured is not None:
        at = times if measured_times is None else np.asarray(measured_times)
        points = np.asarray(measured).reshape(len(at), -1)
        if points.shape[1] != lines.shape[1]:
            raise ValueError(
                f"plot.training_dynamics: {lines.shape[1]} predicted curves, "
                f"{points.shape[1]} measured."
            )
        for handle, column in zip(drawn, points.T, strict=True):
            ax.plot(at, column, ".", color=handle.get_color())
    ax.set(xlabel="time (steps × learning rate)", ylabel="output")
    return ax
