"""The largest step of gradient descent that does not diverge."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from tangents._core.typing import Array
from tangents._inference.layout import as_matrix_argument, matrix


def max_learning_rate(
    ntk_train_train: Array,
    y_train_size: int | None = None,
    momentum: float = 0.0,
    eps: float = 1e-12,
) -> Array:
    r"""The largest stable learning rate on the mean squared error (Lee et al. 2019, section 2.2).

        η_max = 2 (1 + m) s / (λ_max + ε),    s = number of targets,

    for the loss ½ · mean((f − y)²) over all targets, and heavy-ball momentum m.

    Args:
        ntk_train_train: (n, n), or (n, n, c, c) with the outputs in pairs.
        y_train_size: s, the number of targets. Default: the rows of the kernel as a matrix, which
            is right for one output or for a kernel with all outputs; with traced outputs pass n·c.
        momentum: m in [0, 1).
        eps: ε, so that a kernel of zeros gives a finite number.

    Returns:
        A scalar. May be called under `jit`, `vmap` and `grad`.

    Raises:
        TypeError: if a `Kernel` is passed.
        ValueError: if the kernel is not square.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import predict
        >>> round(float(predict.max_learning_rate(jnp.diag(jnp.array([4., 1.])))), 6)
        1.0
    """
    caller = "max_learning_rate"
    k = as_matrix_argument(ntk_train_train, caller=caller, argument="ntk_train_train")
    if k.ndim % 2 or k.ndim == 0 or k.shape[0::2] != k.shape[1::2]:
        raise ValueError(
            f"{caller}: ntk_train_train has shape {k.shape}, but needs pairs of equal axes, such "
            f"as "
            "(n, n) or (n, n, c, c)."
        )
    k = matrix(k)
    size: Any = k.shape[0] if y_train_size is None else y_train_size
    largest = jnp.linalg.eigvalsh(k)[-1]
    return 2 * (1 + momentum) * jnp.asarray(size, largest.dtype) / (largest + eps)
