"""How kernels compare with one another and with the targets."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from tangents._core.precision import DEFAULT as HIGHEST
from tangents._core.typing import Array
from tangents._inference.layout import as_matrix_argument, matrix
from tangents._inference.spectrum import as_spectrum


def _square(kernel: Any, caller: str, argument: str) -> Array:
    k = matrix(as_matrix_argument(kernel, caller=caller, argument=argument))
    if k.ndim != 2 or k.shape[0] != k.shape[1]:
        raise ValueError(f"{caller}: {argument} has shape {k.shape}, but must be square.")
    return k


def _centre(k: Array) -> Array:
    rows = jnp.mean(k, axis=0)
    return k - rows[None, :] - rows[:, None] + jnp.mean(rows)


def _cosine(a: Array, b: Array) -> Array:
    return jnp.sum(a * b) / jnp.sqrt(jnp.sum(a * a) * jnp.sum(b * b))


def kernel_alignment(kernel: Array, other: Array, *, centred: bool = True) -> Array:
    r"""⟨K, L⟩ / (‖K‖ ‖L‖) with Frobenius products: 1 for kernels that are multiples of one another.

    Centred kernels, H K H with H = I − 1 1ᵀ / n, make this the centred kernel alignment (Cortes,
    Mohri, Rostamizadeh 2012) and the similarity CKA (Kornblith et al. 2019).

    Args:
        kernel: (n, n).
        other: a second kernel (n, n).
        centred: whether to centre both.

    Returns:
        A scalar.

    Examples:
        >>> import jax.numpy as jnp, tangents
        >>> round(float(tangents.kernel_alignment(jnp.eye(3), 2 * jnp.eye(3))), 6)
        1.0
    """
    k = _square(kernel, "kernel_alignment", "kernel")
    other = _square(other, "kernel_alignment", "other")
    if k.shape != other.shape:
        raise ValueError(f"kernel_alignment: kernels of shapes {k.shape} and {other.shape}.")
    return _cosine(_centre(k), _centre(other)) if centred else _cosine(k, other)


def target_alignment(kernel: Array, y: Array, *, centred: bool = True) -> Array:
    r"""Alignment of a kernel with the kernel of the targets, L = y yᵀ (Cristianini et al. 2001).

    yᵀ K y / (‖K‖ ‖y yᵀ‖), with Frobenius norms, y (n, c), K and y centred on request.

    Args:
        kernel: (n, n).
        y: targets, (n,) or (n, c).
        centred: whether to centre both.

    Returns:
        A scalar.

    Examples:
        >>> import jax.numpy as jnp, tangents
        >>> y = jnp.array([1., -1.])
        >>> round(float(tangents.target_alignment(jnp.outer(y, y), y)), 6)
        1.0
    """
    k = _square(kernel, "target_alignment", "kernel")
    y = jnp.asarray(y)
    if y.ndim == 0 or y.shape[0] != k.shape[0]:
        raise ValueError(f"target_alignment: kernel {k.shape} and y {y.shape}: pass y (n, c).")
    y = y.reshape(k.shape[0], -1).astype(k.dtype)
    if centred:
        k, y = _centre(k), y - jnp.mean(y, axis=0)
    along = jnp.sum(y * jnp.matmul(k, y, precision=HIGHEST))
    gram = jnp.matmul(y.T, y, precision=HIGHEST)
    return along / (jnp.sqrt(jnp.sum(k * k)) * jnp.sqrt(jnp.sum(gram * gram)))


def kernel_distance(kernel: Array, other: Array, *, centred: bool = False) -> Array:
    r"""1 − ⟨K, L⟩ / (‖K‖ ‖L‖): how far a kernel has turned (Fort et al. 2020, eq. 5).

    Examples:
        >>> import jax.numpy as jnp, tangents
        >>> float(tangents.kernel_distance(jnp.diag(jnp.array([1., 0.])),
        ...                                jnp.diag(jnp.array([0., 1.]))))
        1.0
    """
    return 1 - kernel_alignment(kernel, other, centred=centred)


def kernel_velocity(kernels: Sequence[Array], times: Any = None, *, centred: bool = False) -> Array:
    r"""Kernel distance between neighbours of a series of kernels, over the time between them.

    Args:
        kernels: kernels (n, n) on one set of examples at several times of training.
        times: when; default 0, 1, 2, ...
        centred: whether to centre the kernels.

    Returns:
        (len(kernels) − 1,). Source: Fort et al. 2020, section 4.

    Examples:
        >>> import jax.numpy as jnp, tangents
        >>> tangents.kernel_velocity([jnp.eye(2), 2 * jnp.eye(2)]).shape
        (1,)
    """
    if len(kernels) < 2:
        raise ValueError(f"kernel_velocity: {len(kernels)} kernels; a change needs two or more.")
    moved = jnp.stack(
        [kernel_distance(a, b, centred=centred) for a, b in itertools.pairwise(kernels)]
    )
    if times is None:
        return moved
    times = jnp.asarray(times, moved.dtype)
    if times.shape != (len(kernels),):
        raise ValueError(f"kernel_velocity: {len(kernels)} kernels, but times {times.shape}.")
    return moved / jnp.diff(times)


def task_model_alignment(kernel: Any, y: Array) -> Array:
    r"""C(k) = Σ_{i ≤ k} ‖u_iᵀ y‖² / ‖y‖²: how much of the targets the leading k modes hold.

    The faster it rises, the fewer examples the kernel needs (Canatar, Bordelon, Pehlevan 2021).

    Args:
        kernel: a matrix (n, n), or a `Spectrum`, complete or not.
        y: targets, (n,) or (n, c).

    Returns:
        (k,), ascending; its last entry is 1 for a complete spectrum.

    Examples:
        >>> import jax.numpy as jnp, tangents
        >>> k = jnp.diag(jnp.array([2., 1.]))
        >>> tangents.task_model_alignment(k, jnp.array([1., 1.])).tolist()
        [0.5, 1.0]
    """
    s = as_spectrum(kernel)
    y = jnp.asarray(y)
    y = y.reshape(s.size, -1).astype(s.eigenvectors.dtype)
    inside = jnp.matmul(s.eigenvectors.T, y, precision=HIGHEST)
    return jnp.cumsum(jnp.sum(inside**2, axis=1)) / jnp.sum(y**2)
