"""How well stated uncertainties hold."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tangents._core.typing import Array


class Calibration(NamedTuple):
    """Quality of predictive Gaussians.

    Attributes:
        nll: mean negative log density of the targets.
        rmse: root mean squared error of the means.
        sharpness: mean predictive standard deviation.
        chi2: mean squared error in units of the variance; 1 if calibrated, more if overconfident.
        levels: nominal coverages of central intervals.
        coverage: share of targets inside these intervals.
        calibration_error: mean of |coverage − level|.
    """

    nll: Array
    rmse: Array
    sharpness: Array
    chi2: Array
    levels: Array
    coverage: Array
    calibration_error: Array


def calibration(
    mean: Array, variance: Array, y: Array, levels: tuple[float, ...] | None = None
) -> Calibration:
    r"""Calibration of predictive Gaussians N(mean, variance) against targets.

    Args:
        mean: (m,) or (m, c).
        variance: of the targets (noise included), (m,) for all outputs or in the shape of `mean`.
        y: targets in the shape of `mean`.
        levels: nominal coverages. Default: 0.05, 0.10, ..., 0.95.

    Returns:
        `Calibration`. Source: Kuleshov, Fenner, Ermon 2018.

    Raises:
        ValueError: if shapes do not fit.

    Examples:
        >>> import jax.numpy as jnp, tangents
        >>> float(tangents.calibration(jnp.zeros(4), jnp.ones(4), jnp.ones(4)).chi2)
        1.0
    """
    mean, variance, y = jnp.asarray(mean), jnp.asarray(variance), jnp.asarray(y)
    if mean.shape != y.shape or variance.shape not in (mean.shape, mean.shape[:1]):
        raise ValueError(
            f"calibration: mean {mean.shape}, variance {variance.shape}, y {y.shape}: mean and y "
            "need one shape, variance the same or (m,)."
        )
    if variance.ndim < mean.ndim:
        variance = variance.reshape(variance.shape + (1,) * (mean.ndim - variance.ndim))
    variance = jnp.broadcast_to(variance, mean.shape)
    z2 = (y - mean) ** 2 / variance
    grid = jnp.asarray(np.arange(1, 20) / 20 if levels is None else levels, mean.dtype)
    bounds = jax.scipy.stats.norm.ppf(0.5 + grid / 2)
    inside = jnp.sqrt(z2).reshape(-1, 1) <= bounds
    coverage = jnp.mean(inside.astype(mean.dtype), axis=0)
    return Calibration(
        nll=0.5 * jnp.mean(jnp.log(2 * jnp.pi * variance) + z2),
        rmse=jnp.sqrt(jnp.mean((y - mean) ** 2)),
        sharpness=jnp.mean(jnp.sqrt(variance)),
        chi2=jnp.mean(z2),
        levels=grid,
        coverage=coverage,
        calibration_error=jnp.mean(jnp.abs(coverage - grid)),
    )


def class_probabilities(mean: Array, variance: Array, points: int = 32) -> Array:
    r"""Probability of each class to have the largest output, outputs N(mean, variance) independent.

        P(j) = ∫ N(z; 0, 1) Π_{k≠j} Φ((m_j + σ_j z − m_k) / σ_k) dz,   by Gauss-Hermite quadrature.

    Args:
        mean: (m, c), as from regression on one-hot targets.
        variance: (m,) for all classes, or (m, c).
        points: of the quadrature.

    Returns:
        (m, c), rows summing to 1.

    Examples:
        >>> import jax.numpy as jnp, tangents
        >>> tangents.class_probabilities(jnp.zeros((1, 2)), jnp.ones(1)).tolist()
        [[0.5, 0.5]]
    """
    mean = jnp.asarray(mean)
    variance = jnp.asarray(variance, mean.dtype)
    sigma = jnp.sqrt(variance if variance.ndim == mean.ndim else variance[:, None])
    sigma = jnp.maximum(jnp.broadcast_to(sigma, mean.shape), 1e-6 * jnp.max(jnp.abs(mean)) + 1e-30)
    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    z = jnp.asarray(nodes, mean.dtype)
    w = jnp.asarray(weights / weights.sum(), mean.dtype)
    values = mean[:, :, None] + sigma[:, :, None] * z
    gaps = (values[:, :, None, :] - mean[:, None, :, None]) / sigma[:, None, :, None]
    logs = jax.scipy.stats.norm.logcdf(gaps)
    other = 1 - jnp.eye(mean.shape[1], dtype=mean.dtype)
    joint = jnp.exp(jnp.sum(logs * other[None, :, :, None], axis=2))
    probability = jnp.sum(joint * w, axis=-1)
    return probability / jnp.sum(probability, axis=1, keepdims=True)


class ClassCalibration(NamedTuple):
    """Quality of class probabilities.

    Attributes:
        accuracy: share of examples whose likeliest class is right.
        nll: mean negative log probability of the right class.
        brier: mean squared distance to the one-hot label.
        calibration_error: expected calibration error, Σ_b |accuracy_b − confidence_b| n_b / n.
    """

    accuracy: Array
    nll: Array
    brier: Array
    calibration_error: Array


def class_calibration(probabilities: Array, labels: Array, bins: int = 15) -> ClassCalibration:
    r"""Calibration of class probabilities (m, c) against integer labels (m,).

    The expected calibration error bins examples by confidence (Guo et al. 2017).

    Examples:
        >>> import jax.numpy as jnp, tangents
        >>> p = jnp.array([[0.8, 0.2], [0.8, 0.2]])
        >>> round(float(tangents.class_calibration(p, jnp.array([0, 1])).calibration_error), 3)
        0.3
    """
    p, labels = jnp.asarray(probabilities), jnp.asarray(labels)
    if p.ndim != 2 or labels.shape != p.shape[:1]:
        raise ValueError(
            f"class_calibration: probabilities {p.shape} and labels {labels.shape}: pass (m, c) "
            "and (m,)."
        )
    right = (jnp.argmax(p, axis=1) == labels).astype(p.dtype)
    confidence = jnp.max(p, axis=1)
    chosen = jnp.take_along_axis(p, labels[:, None], axis=1)[:, 0]
    place = jnp.clip((confidence * bins).astype(jnp.int32), 0, bins - 1)
    gaps = jax.ops.segment_sum(right - confidence, place, bins)
    one_hot = jax.nn.one_hot(labels, p.shape[1], dtype=p.dtype)
    return ClassCalibration(
        accuracy=jnp.mean(right),
        nll=-jnp.mean(jnp.log(jnp.maximum(chosen, jnp.finfo(p.dtype).tiny))),
        brier=jnp.mean(jnp.sum((p - one_hot) ** 2, axis=1)),
        calibration_error=jnp.sum(jnp.abs(gaps)) / p.shape[0],
    )
