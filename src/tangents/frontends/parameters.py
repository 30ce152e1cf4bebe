"""Parameters of a framework's model as a tree of arrays, with the variables' names as paths."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import tree_util

from tangents._core.typing import Array, PyTree

Trainable = Callable[[str], bool] | Collection[str] | None
"""Which variables are parameters: a predicate on paths, a collection of paths or of their
beginnings, or None for what the model itself calls trainable."""


class ParameterNames:
    """The order of a model's parameters and their places in a tree of nested dictionaries."""

    def __init__(self, paths: Sequence[str], shapes: Sequence[tuple[int, ...]]):
        """Paths like `dense/kernel`, in the model's order, and the shape of each."""
        self.paths = _unique(paths)
        self.shapes = [tuple(shape) for shape in shapes]

    def tree(self, values: Iterable[Any]) -> dict[str, Any]:
        """`{"dense": {"kernel": value, …}}`."""
        tree: dict[str, Any] = {}
        for path, value in zip(self.paths, values, strict=True):
            *parents, name = path.split("/")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[name] = value
        return tree

    def values(self, params: PyTree, *, caller: str) -> list[Any]:
        """The leaves in the model's order, of a nested tree, a flat dictionary or a list."""
        if isinstance(params, Mapping):
            found = [_at(params, path) for path in self.paths]
            missing = [path for path, value in zip(self.paths, found, strict=True) if value is None]
            if missing:
                raise ValueError(
                    f"{caller}: params has no {missing[0]!r}; it has {_paths(params)}, and the "
                    f"model's parameters are {self.paths}."
                )
        elif isinstance(params, list | tuple) and len(params) == len(self.paths):
            found = list(params)
        else:
            raise ValueError(
                f"{caller}: params is {_kind(params)}; it must be a dictionary with the paths "
                f"{self.paths}, or a list of {len(self.paths)} arrays in that order."
            )
        for path, value, shape in zip(self.paths, found, self.shapes, strict=True):
            if tuple(np.shape(value)) != shape:
                raise ValueError(
                    f"{caller}: params[{path!r}] has shape {tuple(np.shape(value))}; the model's "
                    f"variable has shape {shape}."
                )
        return found


def chosen(path: str, own: bool, trainable: Trainable) -> bool:
    """Whether a variable is a parameter."""
    if trainable is None:
        return own
    if callable(trainable):
        return bool(trainable(path))
    return any(path == prefix or path.startswith(f"{prefix}/") for prefix in trainable)


def as_dtype(value: Any, dtype: Any) -> Array:
    """A leaf as a JAX array of the model's own element type."""
    return jnp.asarray(value).astype(jnp.dtype(dtype))


def _at(params: Mapping, path: str) -> Any:
    if path in params:
        return params[path]
    node: Any = params
    for name in path.split("/"):
        if not isinstance(node, Mapping) or name not in node:
            return None
        node = node[name]
    return node


def _unique(paths: Sequence[str]) -> list[str]:
    """Paths made different from each other, none of them the beginning of another."""
    taken: set[str] = set()
    inner: set[str] = set()
    unique = []
    for path in paths:
        if any(parent in taken for parent in _parents(path)):
            path = path.replace("/", "_")  # a leaf stands where its branch would
        candidate, count = path, 0
        while candidate in taken or candidate in inner:
            count += 1
            candidate = f"{path}_{count}"
        taken.add(candidate)
        inner.update(_parents(candidate))
        unique.append(candidate)
    return unique


def _parents(path: str) -> list[str]:
    names = path.split("/")
    return ["/".join(names[:i]) for i in range(1, len(names))]


def _paths(params: Mapping) -> list[str]:
    leaves = tree_util.tree_flatten_with_path(params)[0]
    return [tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def _kind(params: PyTree) -> str:
    if isinstance(params, list | tuple):
        return f"a {type(params).__name__} of length {len(params)}"
    return f"of type {type(params).__name__}"
