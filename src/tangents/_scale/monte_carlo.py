"""Kernels of infinitely wide networks estimated from random finite ones.

K̂ = (1/n) Σ_i K(θ_i), θ_i drawn by `init_fn`: the mean over draws of the empirical kernels. Its
standard error falls as 1/√(n · width).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import random

from tangents._core.get import Get, canonical_get, named_tuple
from tangents._core.precision import PrecisionLike
from tangents._core.typing import ApplyFn, Array, Axes, PyTree, VMapAxes
from tangents._finite.functions import empirical_kernel_fn
from tangents._finite.implementation import NtkImplementation
from tangents._scale.batch import batch


class MonteCarloEstimate(NamedTuple):
    """A Monte Carlo mean and its standard error, in one structure each."""

    mean: Any
    standard_error: Any


def monte_carlo_kernel_fn(
    init_fn: Callable[..., Any],
    apply_fn: ApplyFn,
    key: Array,
    n_samples: int | Iterable[int],
    batch_size: int = 0,
    device_count: int = -1,
    store_on_device: bool = True,
    trace_axes: Axes = (-1,),
    diagonal_axes: Axes = (),
    vmap_axes: VMapAxes = None,
    implementation: NtkImplementation | int | str = NtkImplementation.AUTO,
    _j_rules: bool = True,
    _s_rules: bool = True,
    _fwd: bool | None = None,
    *,
    standard_error: bool = False,
    precision: PrecisionLike = None,
) -> Callable[..., Any]:
    r"""A kernel function that averages empirical kernels over random draws of the parameters.

    Args:
        init_fn: `init_fn(key, input_shape) -> (output_shape, params)`, as in `stax`.
        apply_fn: `apply_fn(params, x, **kwargs)`; it is given a key `rng` if it takes one.
        key: random key. Sample i is drawn from the i-th key of a chain, so that estimates from more
            samples contain those from fewer.
        n_samples: number of draws; or several numbers, and the result is then a generator that
            yields the estimate at each of them, in ascending order.
        batch_size: examples on each side of a tile (`batch`); 0 takes all at once.
        device_count: devices that share the work: -1 all local ones, 0 the default one.
            Whole samples are shared where `batch_size` is 0, tiles otherwise.
        store_on_device: whether tiles stay where they were computed.
        trace_axes: output axes to average over, as in `empirical_ntk_fn`.
        diagonal_axes: output axes of which only diagonal pairs are kept.
        vmap_axes: promise of independent examples, as in `empirical_ntk_fn`.
        implementation: method of the empirical NTK.
        _j_rules: as in `empirical_ntk_fn`.
        _s_rules: as in `empirical_ntk_fn`.
        _fwd: as in `empirical_ntk_fn`.
        standard_error: whether to return `MonteCarloEstimate(mean, standard_error)`; the error is
            NaN for one sample.
        precision: of Gram contractions.

    Returns:
        `kernel_fn(x1, x2=None, get=None, **kwargs)`: 'nngp', 'ntk', a tuple of them or both (None),
        as a named tuple `MonteCarloKernel`; or a generator of these.

    Raises:
        ValueError: for numbers of samples that are not positive integers.
        TypeError: if `n_samples` is neither an integer nor iterable.

    Examples:
        >>> import jax, jax.numpy as jnp, tangents
        >>> init_fn = lambda key, shape: ((-1, 1), jax.random.normal(key, (shape[-1], 1)))
        >>> apply_fn = lambda w, x: x @ w
        >>> kernel_fn = tangents.monte_carlo_kernel_fn(init_fn, apply_fn, jax.random.key(0), 10)
        >>> kernel_fn(jnp.ones((2, 3)), None, 'ntk').tolist()
        [[3.0, 3.0], [3.0, 3.0]]
    """
    single, counts = _counts(n_samples)
    kernel_fn = empirical_kernel_fn(
        apply_fn,
        trace_axes,
        diagonal_axes,
        vmap_axes,
        implementation,
        _j_rules,
        _s_rules,
        _fwd,
        precision=precision,
    )
    takes_key = _takes_key(apply_fn)

    def sample(x1: PyTree, x2: PyTree, draw_key: Array, get: Any, **kwargs: Any):
        init_key, apply_key = random.split(draw_key)
        _, params = init_fn(init_key, jax.tree.map(jnp.shape, x1))
        extra = {"rng": apply_key} if takes_key and "rng" not in kwargs else {}
        result = kernel_fn(x1, x2, get, params, **extra, **kwargs)
        if isinstance(get, str):
            return result
        return named_tuple("MonteCarloKernel", result._fields)(*result)

    devices = _devices(device_count) if batch_size == 0 else []
    tiled = batch(sample, batch_size, device_count if batch_size else 0, store_on_device)

    def samples(x1, x2, get, **kwargs) -> Iterator[tuple[int, Any, Any]]:
        """(n, mean, sum of squared deviations) after each draw, by Welford's recurrence."""
        chain = key
        mean = squares = None
        for n in range(1, max(counts) + 1):
            chain, draw_key = random.split(chain)
            inputs = (x1, x2, draw_key)
            if devices:
                inputs = jax.device_put(inputs, devices[(n - 1) % len(devices)])
            drawn = tiled(*inputs, get, **kwargs)
            if devices:
                drawn = jax.device_put(drawn, devices[0])
            if mean is None:
                mean, squares = drawn, jax.tree.map(jnp.zeros_like, drawn)
            else:
                mean, squares = _update(mean, squares, drawn, jnp.asarray(n))
            yield n, mean, squares

    def estimates(x1, x2, get, **kwargs) -> Iterator[Any]:
        for n, mean, squares in samples(x1, x2, get, **kwargs):
            if n not in counts:
                continue
            if not standard_error:
                yield mean
                continue
            # The variance of a mean of n draws, from an unbiased variance of one.
            scale = float("nan") if n == 1 else 1 / (n * (n - 1))
            error = jax.tree.map(lambda s, scale=scale: jnp.sqrt(s * scale), squares)
            yield MonteCarloEstimate(mean, error)

    def monte_carlo(x1: PyTree, x2: PyTree | None = None, get: Get = None, **kwargs: Any):
        """Mean of the empirical kernels of random networks; see `monte_carlo_kernel_fn`."""
        found = estimates(x1, x2, canonical_get(get), **kwargs)
        return next(found) if single else found

    return monte_carlo


@jax.jit
def _update(mean: PyTree, squares: PyTree, drawn: PyTree, n: Array) -> tuple[PyTree, PyTree]:
    new = jax.tree.map(lambda m, d: m + (d - m) / n.astype(m.dtype), mean, drawn)
    squares = jax.tree.map(lambda s, m, d, w: s + (d - m) * (d - w), squares, mean, drawn, new)
    return new, squares


def _counts(n_samples: Any) -> tuple[bool, frozenset[int]]:
    single = isinstance(n_samples, int)
    if not single and not isinstance(n_samples, Iterable):
        raise TypeError(
            f"monte_carlo_kernel_fn: n_samples={n_samples!r}: pass an integer or several."
        )
    counts = [n_samples] if single else list(n_samples)
    for n in counts:
        if isinstance(n, bool) or not hasattr(n, "__index__") or n <= 0:
            raise ValueError(
                f"monte_carlo_kernel_fn: n_samples={n_samples!r}: numbers of samples are positive "
                "integers."
            )
    if not counts:
        raise ValueError("monte_carlo_kernel_fn: n_samples is empty.")
    return single, frozenset(int(n) for n in counts)


def _takes_key(apply_fn: ApplyFn) -> bool:
    try:
        parameters = inspect.signature(apply_fn).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.name == "rng" or p.kind is p.VAR_KEYWORD for p in parameters)


def _devices(device_count: int) -> list[Any]:
    devices = jax.local_devices()
    if device_count > len(devices):
        raise ValueError(
            f"monte_carlo_kernel_fn: device_count={device_count}, but there are {len(devices)}."
        )
    used = devices if device_count < 0 else devices[:device_count]
    return used if len(used) > 1 else []
