"""Kernel functions in tiles: rows of x1 by rows of x2, on one or many devices.

Tiles have the size asked for and the last ones are ragged: no divisor is looked for. A kernel of a
set with itself is symmetric, so where `x2 is None` only the tiles on and below the diagonal are
computed and the others are their mirror images. Of bare arrays with more than two axes all tiles
are computed: a mirror image exchanges the two indices of each pair of axes, and from an array
(n1, n2, a, b) nobody can tell whether a and b are a pair (all outputs of an empirical kernel) or
two axes of which the diagonal was kept. A `Kernel` knows.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import random

from tangents._core.memory import chunks
from tangents._core.typing import Array, PyTree
from tangents._infinite.kernel import Kernel
from tangents._scale.host_array import aligned, taken_over

KernelFn = Callable[..., Any]


def batch(
    kernel_fn: KernelFn,
    batch_size: int = 0,
    device_count: int = -1,
    store_on_device: bool = True,
) -> KernelFn:
    r"""A kernel function that computes its result in tiles of `batch_size` × `batch_size` examples.

    Args:
        kernel_fn: `kernel_fn(x1, x2, *args, **kwargs)` with examples on axis 0 of each input: of
            `stax`, `empirical_*_fn` or `monte_carlo_kernel_fn`. Its result may be an array, a
            `Kernel`, or named tuples and lists of these, with n1 and n2 on axes 0 and 1.
        batch_size: examples on each side of a tile; 0 takes all at once.
        device_count: devices that share the tiles; -1 takes all local ones, 0 the default one.
        store_on_device: whether finished tiles stay where they were computed; otherwise they are
            moved to the memory of the host.

    Returns:
        A function of the same signature. It is compiled inside; do not jit it. Arguments that are
        not arrays must be hashable. Array keyword arguments are pairs with examples on axis 0 (such
        as `pattern`) or a key `rng`, which is split over the tiles. `x1` may be a `Kernel`, from
        which `kernel_fn` goes on. With more than one device it has an attribute `device_count`.

    Raises:
        ValueError: for sizes that make no sense, or an x2 beside a `Kernel`.
        NotImplementedError: for `diagonal_batch=False`, whose covariances have no tiles.
        TypeError: for results that cannot be tiled.

    Examples:
        >>> import jax.numpy as jnp, tangents
        >>> gram = lambda x1, x2: x1 @ (x1 if x2 is None else x2).T
        >>> tangents.batch(gram, batch_size=2)(jnp.ones((5, 3))).shape
        (5, 5)
    """
    if batch_size < 0:
        raise ValueError(f"batch: batch_size={batch_size} is negative; 0 means all at once.")
    devices = jax.local_devices()
    if device_count > len(devices):
        raise ValueError(f"batch: device_count={device_count}, but there are {len(devices)}.")
    used = devices if device_count < 0 else devices[:device_count]
    spread = used if len(used) > 1 or device_count > 0 else []

    @functools.cache
    def compiled(static_args: tuple, static_kwargs: tuple):
        def call(x1, x2, dynamic_args, dynamic_kwargs):
            args = [d if s is _DYNAMIC else s for s, d in zip(static_args, dynamic_args)]
            return kernel_fn(x1, x2, *args, **dynamic_kwargs, **dict(static_kwargs))

        return jax.jit(call)

    def batched(x1: PyTree, x2: PyTree | None = None, *args: Any, **kwargs: Any):
        """The kernel in tiles; see `batch`."""
        _check(x1, x2, kwargs)
        is_array = [_is_dynamic(a) for a in args]
        static_args = tuple(_DYNAMIC if d else a for d, a in zip(is_array, args))
        dynamic_args = [a if d else None for d, a in zip(is_array, args)]
        dynamic = {k: v for k, v in kwargs.items() if _is_dynamic(v)}
        static = tuple((k, v) for k, v in kwargs.items() if k not in dynamic)
        run = compiled(static_args, static)
        n1 = _examples(x1)
        n2 = _examples(x1, 1) if _kernels(x1) else n1 if x2 is None else _examples(x2)
        rows, columns = _tiling(n1, n2, batch_size, len(spread))
        if len(rows) * len(columns) <= 1 and not spread:
            return run(x1, x2, dynamic_args, dynamic)
        tile = _TileRunner(run, x1, x2, dynamic_args, dynamic, spread, rows, columns)
        return _assemble(tile, rows, columns, store_on_device)

    if len(spread) > 0:
        batched.device_count = len(spread)  # pyright: ignore[reportFunctionMemberAccess]
    return batched


class _Dynamic:
    """Stands for an array among the arguments a compiled function is looked up by."""


_DYNAMIC = _Dynamic()


def _is_dynamic(value: Any) -> bool:
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves)


def _check(x1: PyTree, x2: PyTree | None, kwargs: dict[str, Any]) -> None:
    if kernels := _kernels(x1):
        if x2 is not None:
            raise ValueError("batch: x1 is a Kernel, which has both sides: x2 must be None.")
        if not all(kernel.diagonal_batch for kernel in kernels):
            raise NotImplementedError("batch: a Kernel with diagonal_batch=False has no tiles.")
    if kwargs.get("diagonal_batch") is False:
        raise NotImplementedError(
            "batch: diagonal_batch=False keeps covariances between all examples of one side, which "
            "have no tiles: call kernel_fn itself."
        )


def _is_kernel(x: Any) -> bool:
    return isinstance(x, Kernel)


def _kernels(x: PyTree) -> list[Kernel]:
    """The kernels where x is one, or a list or tuple of them as `parallel` gives; else none."""
    leaves = jax.tree.leaves(x, is_leaf=_is_kernel)
    return leaves if leaves and all(map(_is_kernel, leaves)) else []


def _examples(x: PyTree, side: int = 0) -> int:
    arrays = [kernel.nngp for kernel in _kernels(x)] or jax.tree.leaves(x)
    sizes = {array.shape[side] for array in arrays}
    if len(sizes) != 1:
        raise ValueError(f"batch: inputs have {sorted(sizes)} examples on axis 0; they must agree.")
    return sizes.pop()


def _tiling(n1: int, n2: int, batch_size: int, devices: int) -> tuple[list[slice], list[slice]]:
    if batch_size:
        return list(chunks(n1, batch_size)), list(chunks(n2, batch_size))
    # All at once: one tile, or one block of rows for each device.
    per_device = math.ceil(n1 / max(devices, 1))
    return list(chunks(n1, per_device)), list(chunks(n2, n2))


class _TileRunner:
    """Computes one tile, on the device whose turn it is."""

    def __init__(self, run, x1, x2, args, kwargs, devices, rows, columns):
        self.run, self.x1, self.args = run, x1, args
        self.continues = bool(_kernels(x1))
        self.symmetric = x2 is None and not self.continues
        self.kwargs, self.devices, self.turn = kwargs, devices, 0
        self.keys = None
        if kwargs.get("rng") is not None and not isinstance(kwargs["rng"], tuple):
            self.keys = random.split(kwargs["rng"], len(rows) * len(columns))
        if not self.continues:
            self.parts1 = _cut(x1, rows)
            shared = self.symmetric and rows == columns
            self.parts2 = self.parts1 if shared else _cut(x1 if x2 is None else x2, columns)

    def __call__(self, row: slice, column: slice) -> Any:
        if self.continues:
            part = lambda kernel: kernel.slice(row, column)
            x1, x2 = jax.tree.map(part, self.x1, is_leaf=_is_kernel), None
        else:
            x1 = self.parts1[row.start]
            x2 = None if self.symmetric and row == column else self.parts2[column.start]
        kwargs = {}
        for name, value in self.kwargs.items():
            if name == "rng":
                kwargs[name] = value if self.keys is None else self.keys[self.turn]
            elif isinstance(value, tuple) and len(value) == 2:
                part = lambda x, s: jax.tree.map(lambda a: a[s], x)
                kwargs[name] = (part(value[0], row), part(value[1], column))
            else:
                raise ValueError(
                    f"batch: the array argument {name} is not a pair: pass ({name} of x1, {name} "
                    "of x2), each with examples on axis 0."
                )
        inputs = (x1, x2, self.args, kwargs)
        if self.devices:
            inputs = jax.device_put(inputs, self.devices[self.turn % len(self.devices)])
        self.turn += 1
        return self.run(*inputs)


def _cut(x: PyTree, parts: list[slice]) -> dict[int, PyTree]:
    """The rows of each part by its start: once for all tiles, in one program."""
    bounds = tuple((part.start, part.stop) for part in parts)
    return dict(zip([part.start for part in parts], _cut_compiled(x, bounds)))


@functools.partial(jax.jit, static_argnums=1)
def _cut_compiled(x: PyTree, bounds: tuple[tuple[int, int], ...]) -> list[PyTree]:
    return [jax.tree.map(lambda a, part=slice(*b): a[part], x) for b in bounds]


def _assemble(
    tile: _TileRunner, rows: list[slice], columns: list[slice], store_on_device: bool
) -> Any:
    """All tiles in one result; of a symmetric one, half are computed if mirroring is safe."""
    first = tile(rows[0], columns[0])
    leaves, structure = _flatten(first)
    mirror = tile.symmetric and rows == columns and all(_can_mirror(leaf) for leaf in leaves)
    wholes = [_Whole(leaf, rows, columns, store_on_device) for leaf in leaves]
    # A tile is fetched after the next ones have been handed to their devices.
    waiting = deque([(0, 0, leaves)])

    def fetch() -> None:
        i, j, found = waiting.popleft()
        for whole, leaf in zip(wholes, found):
            whole.put(i, j, leaf)
            if mirror and i != j:
                whole.put(j, i, _mirrored(leaf))

    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            if i == j == 0 or (mirror and j > i):
                continue
            waiting.append((i, j, _flatten(tile(row, column))[0]))
            if len(waiting) > max(1, len(tile.devices)):
                fetch()
    while waiting:
        fetch()
    return jax.tree.unflatten(structure, [whole.merged(tile.symmetric) for whole in wholes])


class _Whole:
    """One leaf of the result, an array or a `Kernel`, put together tile by tile."""

    def __init__(self, first: Any, rows: list[slice], columns: list[slice], on_device: bool):
        self.kernel = isinstance(first, Kernel)
        if not self.kernel and (not hasattr(first, "ndim") or first.ndim < 2):
            raise TypeError(
                f"batch: kernel_fn returned a {type(first).__name__}; tiles need arrays of shape "
                "(n1, n2, ...), Kernels, or named tuples and lists of these."
            )
        self.rows, self.columns, self.on_device = rows, columns, on_device
        self.grid: list[list[Any]] = [[None] * len(columns) for _ in rows]
        names = [n for n in ("nngp", "ntk") if self.kernel and jnp.ndim(getattr(first, n)) >= 2]
        self.parts = {n: _Whole(getattr(first, n), rows, columns, on_device) for n in names}
        self.out: np.ndarray | None = None
        if not self.kernel and _in_host_memory(first, on_device):
            # Written where it belongs at once, and taken over by JAX without a copy.
            shape = (rows[-1].stop, columns[-1].stop, *first.shape[2:])
            self.out = aligned(shape, first.dtype)

    def put(self, i: int, j: int, leaf: Any) -> None:
        """Tile (i, j)."""
        if self.kernel:
            for name, whole in self.parts.items():
                whole.put(i, j, getattr(leaf, name))
            leaf = leaf.replace(**dict.fromkeys(self.parts))
        if self.out is not None:
            self.out[self.rows[i], self.columns[j]] = leaf
        else:
            self.grid[i][j] = _stored(leaf, self.on_device)

    def merged(self, symmetric: bool) -> Any:
        """All tiles as one."""
        if self.kernel:
            arrays = {name: whole.merged(symmetric) for name, whole in self.parts.items()}
            return _merge_kernels(self.grid, symmetric).replace(**arrays)
        if self.out is not None:
            return taken_over(self.out)
        lines = self.grid
        if not any(isinstance(a, jax.core.Tracer) for line in lines for a in line):
            target = lines[0][0].devices().copy().pop()
            lines = [[jax.device_put(a, target) for a in line] for line in lines]
        return jnp.concatenate([jnp.concatenate(line, axis=1) for line in lines], axis=0)


def _in_host_memory(leaf: Any, on_device: bool) -> bool:
    if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array):
        return False
    return not on_device or all(d.platform == "cpu" for d in leaf.devices())


def _flatten(result: Any) -> tuple[list[Any], Any]:
    return jax.tree.flatten(result, is_leaf=lambda a: isinstance(a, Kernel))


def _stored(leaf: Any, store_on_device: bool) -> Any:
    if store_on_device or leaf is None:
        return leaf
    return jax.device_put(leaf, jax.local_devices(backend="cpu")[0])


def _can_mirror(leaf: Any) -> bool:
    # Of an array with more axes nobody says whether they come in pairs: such tiles are computed.
    return leaf.batch_axis == 0 if isinstance(leaf, Kernel) else leaf.ndim == 2


def _swap(a: Array, diagonal: bool) -> Array:
    """Exchange the indices of each pair of axes; `diagonal` axes beyond the first two stay."""
    axes = [1, 0]
    for i in range(2, a.ndim, 1 if diagonal else 2):
        axes += [i] if diagonal else [i + 1, i]
    return jnp.transpose(a, axes)


def _mirrored(leaf: Any) -> Any:
    if not isinstance(leaf, Kernel):
        return leaf.T
    swap = lambda a: a if a is None or jnp.ndim(a) < 2 else _swap(a, leaf.diagonal_spatial)
    cov1 = leaf.cov1 if leaf.cov2 is None else leaf.cov2
    return leaf.replace(
        nngp=swap(leaf.nngp),
        ntk=swap(leaf.ntk),
        cov1=cov1,
        cov2=leaf.cov1,
        shape1=leaf.shape2,
        shape2=leaf.shape1,
        mask1=leaf.mask2,
        mask2=leaf.mask1,
    )


def _merge_kernels(grid: list[list[Kernel]], symmetric: bool) -> Kernel:
    """The kernels of all tiles but for `nngp` and `ntk`, which are arrays of their own."""
    corner = grid[0][0]
    column, row = [line[0] for line in grid], grid[0]

    def beside(values: list[Any]) -> Any:
        return None if any(v is None for v in values) else jnp.concatenate(values, axis=0)

    def shape(kernels: list[Kernel], name: str) -> tuple[int, ...]:
        total = sum(getattr(k, name)[k.batch_axis] for k in kernels)
        sizes = list(getattr(kernels[0], name))
        sizes[corner.batch_axis] = total
        return tuple(sizes)

    if symmetric:
        # On the diagonal a tile has no second side: its cov1 stands for both.
        cov1, cov2 = beside([line[i].cov1 for i, line in enumerate(grid)]), None
    else:
        cov1 = beside([k.cov1 for k in column])
        cov2 = beside([k.cov2 for k in row])
    same = [jnp.asarray(k.x1_is_x2) for line in grid for k in line]
    return corner.replace(
        cov1=cov1,
        cov2=cov2,
        x1_is_x2=jnp.asarray(True) if symmetric else jnp.all(jnp.stack(same)),
        shape1=shape(column, "shape1"),
        shape2=shape(row, "shape2"),
        mask1=beside([k.mask1 for k in column]),
        mask2=beside([k.mask2 for k in row]),
    )
